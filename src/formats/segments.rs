//! The segments of a layer that is not gzip: their positions and checksums.
//!
//! # The mechanism
//!
//! A *segment* is the piece of a layer that is fetched, verified and decoded as a whole, as in a gzip layer
//! ([`gzip`](crate::gzip)). An uncompressed tar is cut every [`PLAIN_SPAN`] bytes. A zstd layer is cut
//! between its frames, as near to the span as they allow. A frame that is much longer is cut between its
//! *blocks* too ([`zstandard`](crate::zstandard)). A segment inside a frame has compressed bytes of its own,
//! which are fetched and verified alone, but it decodes only behind all earlier segments of its frame: zstd's
//! blocks refer to output as far back as the frame's window (mebibytes) and to tables of earlier blocks.
//!
//! The [`SegmentIndex`] records all this, with a SHA-256 of each segment's compressed bytes and a CRC-32 of
//! its output. It is stored in the layer archive as `turbobd.segments`, [version 2](sidecar); version 1 is
//! gzip's. [`SegmentedLayer`] decodes any segment of it.
//!
//! # Reasons for the design
//!
//! * **One format for both encodings.** Only the byte that names the encoding, and the decoder, differ.
//! * **Upstream must not misread a zstd layer.** Its format knows only gzip and plain targets, and takes any
//!   other media type for plain: it would return compressed bytes as files. So the target is annotated as
//!   gzip, and there is no `gzip.meta`: upstream refuses such a layer when it is opened, as it refuses one of
//!   many gzip members. The encoding stands in this index, which upstream does not read. Upstream reads an
//!   uncompressed layer as before.
//! * **No other checksum verifies a range of a tar.** The digest of the layer covers only the whole of it.
//!
//! # Contents
//!
//! * [`index`]    the segments of a layer
//! * [`sidecar`]  the index as a file
//! * [`hasher`]   the SHA-256 of each, behind a scan
//! * [`plain`]    the scan of an uncompressed layer
//! * [`frames`]   the scan of a zstd layer
//! * [`layer`]    decoding of any segment of a layer
//! * `columns`    numbers, as both versions of the file store them

pub(crate) mod columns;
pub mod error;
pub mod frames;
pub mod hasher;
pub mod index;
pub mod layer;
pub mod plain;
pub mod sidecar;

pub use error::SegmentsError;
pub use frames::{FramesScanner, LONG};
pub use hasher::SegmentHasher;
pub use index::{Encoding, MAX_SEGMENT, ScannedLayer, Segment, SegmentEntry, SegmentIndex};
pub use layer::SegmentedLayer;
pub use plain::{PLAIN_SPAN, PlainScanner};
