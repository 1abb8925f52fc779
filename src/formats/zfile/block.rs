//! Compression of one block; the result does not depend on the thread.

use std::io;

use super::ZFileError;
use super::header::{Algo, BLOCK_SEED, raw_crc32c};
use super::writer::Options;

/// Compresses blocks of one `ZFile`. Blocks are independent, so many encoders may work on one file.
pub struct BlockEncoder {
    verify: bool,
    codec: Codec,
    scratch: Vec<u8>,
}

enum Codec {
    Lz4,
    Zstd(zstd::bulk::Compressor<'static>),
}

impl BlockEncoder {
    /// An encoder for blocks of these options.
    ///
    /// # Errors
    /// The compressor's, when it cannot be set up.
    pub fn new(options: &Options) -> io::Result<Self> {
        let codec = match options.algo {
            Algo::Lz4 => Codec::Lz4,
            Algo::Zstd => Codec::Zstd(zstd::bulk::Compressor::new(options.level)?),
        };
        Ok(Self { verify: options.verify, codec, scratch: Vec::new() })
    }

    /// Appends the stored form of `plain` (compressed bytes and, if enabled, their checksum) to `out`, and
    /// returns its length.
    pub fn encode(&mut self, plain: &[u8], out: &mut Vec<u8>) -> Result<u64, ZFileError> {
        let bound = match self.codec {
            Codec::Lz4 => lz4_flex::block::get_maximum_output_size(plain.len()),
            Codec::Zstd(_) => zstd::zstd_safe::compress_bound(plain.len()),
        };
        if self.scratch.len() < bound {
            self.scratch.resize(bound, 0);
        }
        let len = match &mut self.codec {
            Codec::Lz4 => lz4_flex::block::compress_into(plain, &mut self.scratch)
                .map_err(io::Error::other)?,
            Codec::Zstd(codec) => codec.compress_to_buffer(plain, &mut self.scratch[..])?,
        };
        let packed = &self.scratch[..len];
        out.extend_from_slice(packed);
        let mut stored = len as u64;
        if self.verify {
            out.extend_from_slice(&raw_crc32c(BLOCK_SEED, packed).to_le_bytes());
            stored += 4;
        }
        Ok(stored)
    }
}
