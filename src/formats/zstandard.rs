//! Random access into zstd layers: scan a layer once, later decode its frames alone.
//!
//! # The mechanism
//!
//! A zstd stream (RFC 8878) is a chain of *frames*, each decodable alone, with frames to be skipped among them. A
//! frame is a header and blocks of at most 128 KiB of output. So a layer of many frames (zstd:chunked has
//! one for each file, the seekable format one for each few MiB, `pzstd` one for each thread's piece)
//! has natural segments: one or more whole frames, about a span long ([`Scanner`]).
//!
//! Most layers are *one* frame, whatever their length: that is what `docker buildx` and `zstd` write. A block
//! inside it may refer to output a whole window back (2 MiB at the usual level, up to 128 MiB), and to the
//! Huffman and FSE tables of earlier blocks. What gzip's index does, a window of at most 32 KiB at
//! each checkpoint, would here be an index of the size of the layer. So a frame longer than [`LONG`] is cut
//! between blocks into segments that are fetched and *verified* alone, but decoded one after the other,
//! from the frame's beginning ([`FrameDecoder`]).
//!
//! # Who decodes a long frame, and how often
//!
//! [`fetch`](blobs::fetch) does, on a thread that each long frame has while somebody wants some of it: once, to its
//! end, into the disk tier of decoded chunks, at the pace of the disk; readers get what they want as it
//! passes, and later ones read the tier, where every chunk is verified by its CRC-32. Without such a tier, or
//! with one that the frame does not fit into, the decoder waits a while for readers that go on, and whoever
//! wants what it has passed has the frame decoded from its beginning again: slow, but in bounded memory,
//! and never wrong. `attach` warns of it. A file of our own beside the tier would do the same once more,
//! without its bound, its verification and its life beyond a restart; so there is none.
//!
//! # Why it is built like this
//!
//! * **The library decodes, we only count.** Frames and blocks are found by their headers, a few bytes each
//!   ([`walk`]); what they hold is decoded by libzstd, streaming in the scan, whole frames at once later.
//! * **Memory is bounded by us.** A frame states its window; more than [`MAX_WINDOW`], zstd's own default limit, is
//!   refused when the layer is converted.
//! * **Nothing rests on what a frame says of itself.** Content sizes and checksums are optional in it. Lengths
//!   are those that came out, and the index has its own checksums.
//!
//! # Contents
//!
//! * [`error`]   what can be wrong with a layer
//! * [`walk`]    frames and blocks by their headers
//! * [`scan`]    where to cut a layer
//! * [`decode`]  whole frames, and a long one piece by piece

pub mod decode;
pub mod error;
pub mod scan;
#[cfg(test)]
mod tests;
pub mod walk;

pub use decode::{FrameDecoder, FramesDecoder};
pub use error::ZstdError;
pub use scan::{LONG, Scanner};
pub use walk::{MAX_WINDOW, is_zstd, window};
