//! Random access into gzip layers: a layer is scanned once; later, any segment of it is decoded alone.
//!
//! # The mechanism
//!
//! A deflate stream is a chain of blocks. Decoding can begin at any block, given its bit position and the 32
//! KiB of output before it, the *window*. A [`Scanner`] reads the layer during its download, passes its
//! output on, and chooses such *checkpoints* about every mebibyte of output. A *segment* is the piece between
//! two checkpoints. The [`GzipIndex`] holds the checkpoints. An [`IndexedLayer`] then decodes any segment from a
//! range of the unmodified layer.
//!
//! # Reasons for the design
//!
//! * **Windows are the bulk of an index, and nine tenths of their bytes are never used.** The scan logs the
//!   window bytes that the output behind a candidate refers to, chooses the block boundary with the fewest,
//!   and sets the other bytes to zero. The index is then about a tenth of upstream's, which stores every
//!   window whole, and has upstream's own file format ([`ddgzidx`]).
//! * **Blocks can be huge**: some compressors write a whole layer as one block. Where there is no boundary
//!   near a target, the checkpoint is a point inside a block, with a copy of the block's header. Upstream's
//!   format has no field for these, so a separate file beside it holds them ([`sidecar`]).
//! * **Inflate does not detect damage:** every second flipped bit yields wrong data of the correct length.
//!   The sidecar has a SHA-256 of each segment's compressed bytes and a CRC-32 of its output. Both are
//!   checked before a byte is passed on.
//! * **There are two decoders.** The scan needs block boundaries and matches, which no library reports, so it
//!   has its own inflate. Segments are decoded by libdeflate, which is proven and fastest, inside a stream
//!   built around the untouched bytes ([`IndexedLayer`]). The scan's decoder handles the few segments in
//!   which one gzip member ends and the next begins. Each decoder is tested against the other.
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
pub use hasher::GzipSegmentHasher;
pub use index::{BlockHeader, Boundary, Checkpoint, CheckpointKind, GzipIndex};
pub use layer::IndexedLayer;
pub use scan::{DEFAULT_SPAN, MAX_SPAN, MIN_SPAN, ScanOptions, Scanner};
pub use sidecar::{SIDECAR_NAME, Sidecar, merge};
pub use window::SparseWindow;
