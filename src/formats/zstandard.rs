//! Random access into zstd layers: a layer is scanned once; later, its frames are decoded alone.
//!
//! # The mechanism
//!
//! A zstd stream (RFC 8878) is a chain of *frames*. Each decodes alone; between them there can be skippable
//! frames. A frame is a header and blocks of at most 128 KiB of output. So a layer of many frames has natural
//! segments: one or more whole frames, about a span long ([`FramesScanner`]). zstd:chunked writes one frame for
//! each file, the seekable format one for each few MiB, `pzstd` one for each thread's piece.
//!
//! Most layers are *one* frame of any length, because `docker buildx` and `zstd` write them so. A block
//! inside the frame can refer to output a whole window back (2 MiB at the usual level, up to 128 MiB), and to
//! the Huffman and FSE tables of earlier blocks. gzip's index stores a window of at most 32 KiB at each
//! checkpoint; here such an index would be as large as the layer. So a frame longer than [`LONG`] is cut
//! between blocks into segments that are fetched and *verified* alone, but decoded one after the other, from
//! the frame's beginning ([`FrameDecoder`]).
//!
//! # Decoding of a long frame
//!
//! The fetcher (crate `blobs`) decodes a long frame once, to its end, into the tier (the chunk cache on disk), at
//! the pace of the disk. Each long frame has a thread for this while a reader wants chunks of it. Readers
//! receive their chunks as the decoder passes them; later readers use the tier, where every chunk is verified
//! by its CRC-32. Without a tier of decoded chunks, or with a tier too small for the frame, the decoder waits
//! a while for readers that continue. A reader that wants a chunk before the decoder's position makes it
//! decode the frame from its beginning again: slow, but in bounded memory, and never wrong. `attach` warns of
//! it. A separate file beside the tier would duplicate the tier, without its bound, its verification and its
//! life beyond a restart; so there is none.
//!
//! # Reasons for the design
//!
//! * **The library decodes; this module only counts.** Frames and blocks are found by their headers, a few
//!   bytes each ([`walk`]). libzstd decodes their content: streaming in the scan, whole frames at once later.
//! * **This module bounds the memory.** A frame states its window; a window above [`MAX_WINDOW`], zstd's own
//!   default limit, is refused when the layer is converted.
//! * **No check depends on statements of the frame about itself.** Content sizes and checksums are optional
//!   in it. Lengths are those of the decoded output, and the index has its own checksums.
//!
//! # Contents
//!
//! * [`error`]   faults of a layer
//! * [`walk`]    frames and blocks by their headers
//! * [`decode`]  whole frames, and a long one piece by piece
//!
//! [`FramesScanner`]: crate::segments::FramesScanner
//! [`LONG`]: crate::segments::LONG

pub mod decode;
pub mod error;
#[cfg(test)]
mod tests;
pub mod walk;

pub use decode::{FrameDecoder, FramesDecoder};
pub use error::{MOST_INPUT, ZstdError};
pub use walk::{MAX_WINDOW, is_zstd, window};
