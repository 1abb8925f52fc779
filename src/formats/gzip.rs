//! Random access into gzip layers: scan a layer once, later decode any segment of it alone.
//!
//! # The mechanism
//!
//! A deflate stream is a chain of blocks. Decoding can start at any block, given its bit position
//! and the 32 KiB of output before it, the *window*. A [`Scanner`] reads the layer as it is
//! downloaded, hands on its output, and picks such *checkpoints* about every mebibyte of output; a
//! *segment* reaches from one to the next. The [`Index`] holds the checkpoints. An
//! [`IndexedLayer`] then serves any segment from a range of the unmodified layer.
//!
//! # Why it is built like this
//!
//! * **Windows are the bulk of an index, and nine tenths of their bytes are never used.** The scan
//!   logs which window bytes the output behind a candidate refers to, picks the block boundary with
//!   the fewest, and zeroes the rest. That makes the index about a tenth of upstream's, which takes
//!   every window whole, in upstream's own file format ([`ddgzidx`]).
//! * **Blocks may be huge** (all of a layer, from some compressors). Where there is no boundary near
//!   a target, a point inside a block serves, with a copy of the block's header. Upstream's format
//!   has no place for these: they live in a file of our own beside it ([`sidecar`]).
//! * **Inflate does not notice damage:** every second flipped bit yields wrong data of the right
//!   length. The sidecar carries a SHA-256 of each segment's compressed bytes and a CRC-32 of its
//!   output; both are checked before a byte is handed on.
//! * **Two decoders.** The scan needs block boundaries and matches, which no library tells: it has
//!   its own inflate. Segments are decoded by libdeflate, which is proven and fastest,
//!   inside a stream built around the untouched bytes ([`IndexedLayer`]); the own decoder does the
//!   few segments in which one gzip member ends and the next begins. Each is the other's test.
//!
//! # Contents

mod decoder;
mod error;
mod hasher;
mod index;
mod layer;
mod member;
mod scan;
mod segment;
mod window;

pub mod ddgzidx;
pub mod sidecar;

#[cfg(test)]
mod tests;

pub use ddgzidx::{GZIP_META_NAME, NoGzipMeta};
pub use error::GzipError;
pub use hasher::SegmentHasher;
pub use index::{BlockHeader, Boundary, Checkpoint, CheckpointKind, Index};
pub use layer::IndexedLayer;
pub use scan::{DEFAULT_SPAN, MAX_SPAN, MIN_SPAN, ScanOptions, Scanner};
pub use sidecar::{SIDECAR_NAME, Sidecar, merge};
pub use window::SparseWindow;
