//! The segments of a layer that is not gzip: where each lies, and what it must be.
//!
//! # The mechanism
//!
//! A *segment* is the piece of a layer that is fetched, verified and decoded as a whole, as a gzip layer's is
//! ([`gzip`](crate::gzip)). An uncompressed tar is cut every [`PLAIN_SPAN`] bytes. A zstd layer is cut between
//! its frames, as near to the span as they allow; a frame that is much longer is cut between its *blocks*
//! too ([`zstandard`](crate::zstandard)). Such a segment has compressed bytes of its own, which can be
//! fetched and verified alone, but it decodes only behind all those before it in its frame: zstd's
//! blocks refer to output as far back as the frame's window, mebibytes, and to tables of earlier blocks.
//!
//! The [`SegmentIndex`] says all this, with a SHA-256 of each segment's compressed bytes and a CRC-32 of its
//! output. It is kept in the layer archive as `turbobd.segments`, [version 2](sidecar); version 1 is
//! gzip's. [`SegmentedLayer`] serves any segment of it.
//!
//! # Why it is built like this
//!
//! * **One form for both.** What differs is one byte that names the encoding, and the decoder.
//! * **Upstream must not misread a zstd layer.** Its format knows gzip and plain targets only, and takes any
//!   other media type for plain: it would serve compressed bytes as files. So the target is annotated
//!   as gzip, and there is no `gzip.meta`: upstream refuses such a layer when it is opened, as it does one of
//!   many gzip members. The encoding stands here, where only we look. An uncompressed layer it reads as before.
//! * **Nothing else verifies a range of a tar.** Its digest does, over the whole of it.
//!
//! # Contents
//!
//! * [`index`]    what a layer's segments are
//! * [`sidecar`]  the same as a file
//! * [`hasher`]   the SHA-256 of each, behind a scan
//! * [`plain`]    the scan of an uncompressed layer
//! * [`layer`]    any segment of a layer, on request
//! * `columns`    numbers, as both versions of the file store them

pub(crate) mod columns;
pub mod error;
pub mod hasher;
pub mod index;
pub mod layer;
pub mod plain;
pub mod sidecar;

pub use error::SegmentsError;
pub use hasher::SegmentHasher;
pub use index::{Encoding, Entry, Scanned, Segment, SegmentIndex};
pub use layer::SegmentedLayer;
pub use plain::{PLAIN_SPAN, PlainScanner};
