//! Writer of a `ZFile` (spec zfile 7): equal input and options give equal bytes.
//!
//! The checks here are those of upstream's reader, which are stricter than the format: it reads a block
//! through a buffer of 64 KiB, and stores offsets inside a group of blocks in 16 bits.

use std::io::{self, Seek, SeekFrom, Write};

use super::ZFileError;
use super::block::BlockEncoder;
use super::header::{
    Algo, FLAG_DATA, FLAG_DIGEST, FLAG_HEADER, FLAG_OVERWRITTEN, FLAG_SEALED, MAX_BLOCK,
    MAX_BLOCKS, MIN_BLOCK, SPACE, ZFileHeader, raw_crc32c,
};

/// Most stored bytes of a block, checksum included: the size of the buffer in upstream
/// `zfile.cpp:BlockReader` (the "64 KiB hazard" of spec zfile 7).
const MAX_STORED: u64 = 65536;

/// Largest sum of lengths in a group: blocks of one group share a 64-bit base in upstream's
/// `JumpTable::build`, and their offsets have 16 bits.
const MAX_IN_GROUP: u64 = 65535;

/// Options of the writer.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Compression of the blocks.
    pub algo: Algo,
    /// Level of ZSTD; LZ4 has no levels.
    pub level: i32,
    /// Plain bytes in a block: a power of two from 4096 to 65536.
    pub block_size: u32,
    /// True if a checksum follows each block.
    pub verify: bool,
}

impl Default for Options {
    /// The options that upstream's conversion always uses.
    fn default() -> Self {
        Self { algo: Algo::Lz4, level: 3, block_size: 4096, verify: true }
    }
}

/// Sizes of the written file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Summary {
    /// Bytes of the whole `ZFile`.
    pub len: u64,
    /// Plain bytes.
    pub original_size: u64,
    /// Number of blocks.
    pub blocks: u64,
}

/// Compresses its input. Close it with [`finish`](Self::finish), or with
/// [`finish_streaming`](Self::finish_streaming) if the output cannot seek.
pub struct ZFileWriter<W> {
    out: W,
    options: Options,
    encoder: BlockEncoder,
    plain: Vec<u8>,
    packed: Vec<u8>,
    lengths: Vec<u32>,
    /// Sum of the lengths in the present group.
    in_group: u64,
    original_size: u64,
    /// Bytes given to `out`.
    written: u64,
    /// The first failure: bytes written after it would not form a `ZFile`.
    failed: Option<ZFileError>,
}

/// Blocks compressed by another thread; they follow each other in `bytes`.
#[derive(Default)]
pub struct PackedBlocks {
    /// Stored bytes of all blocks.
    pub bytes: Vec<u8>,
    /// Stored bytes of each.
    pub lengths: Vec<u64>,
    /// Plain bytes of all blocks together.
    pub plain_len: u64,
}

impl<W: Write> ZFileWriter<W> {
    /// Begins a file at the present position of `out`.
    ///
    /// # Errors
    /// [`ZFileError::Options`] for a block size that no reader accepts, [`ZFileError::Write`].
    pub fn new(mut out: W, options: Options) -> Result<Self, ZFileError> {
        let size = options.block_size;
        if !size.is_power_of_two() || !(MIN_BLOCK..=MAX_BLOCK).contains(&size) {
            let rule = format!("block size {size} is not a power of two from 4096 to 65536");
            return Err(ZFileError::Options { rule });
        }
        let encoder = BlockEncoder::new(&options)?;
        let first = record(&options, FLAG_HEADER | FLAG_DATA | FLAG_DIGEST);
        out.write_all(&first.encode())?;
        Ok(Self {
            out,
            options,
            encoder,
            plain: Vec::with_capacity(size as usize),
            packed: Vec::new(),
            lengths: Vec::new(),
            in_group: 0,
            original_size: 0,
            written: SPACE as u64,
            failed: None,
        })
    }

    /// Writes the jump table and the trailer, and leaves the header unchanged: readers then use the trailer.
    ///
    /// # Errors
    /// [`ZFileError::BlockTooLong`], [`ZFileError::Write`].
    pub fn finish_streaming(mut self) -> Result<(W, Summary), ZFileError> {
        let (_, summary) = self.close()?;
        Ok((self.out, summary))
    }

    /// Compresses the remaining bytes, writes the jump table and the trailer, and returns the trailer.
    fn close(&mut self) -> Result<(ZFileHeader, Summary), ZFileError> {
        if !self.plain.is_empty() {
            let plain = std::mem::take(&mut self.plain);
            self.put_block(&plain)?;
        }
        if let Some(error) = self.failed.take() {
            return Err(error);
        }
        let mut trailer = record(&self.options, FLAG_DATA | FLAG_SEALED | FLAG_DIGEST);
        trailer.index_offset = self.written;
        trailer.index_size = self.lengths.len() as u64;
        trailer.original_size = self.original_size;
        for lengths in self.lengths.chunks(1 << 16) {
            self.packed.clear();
            self.packed.extend(lengths.iter().flat_map(|length| length.to_le_bytes()));
            trailer.index_crc = raw_crc32c(trailer.index_crc, &self.packed);
            self.out.write_all(&self.packed)?;
            self.written += self.packed.len() as u64;
        }
        self.out.write_all(&trailer.encode())?;
        self.written += SPACE as u64;
        let (len, blocks) = (self.written, trailer.index_size);
        Ok((trailer, Summary { len, original_size: self.original_size, blocks }))
    }

    fn put_block(&mut self, plain: &[u8]) -> Result<(), ZFileError> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        let result = self.try_put_block(plain);
        if let Err(error) = &result {
            self.failed = Some(error.clone());
        }
        result
    }

    fn try_put_block(&mut self, plain: &[u8]) -> Result<(), ZFileError> {
        self.packed.clear();
        let stored = self.encoder.encode(plain, &mut self.packed)?;
        let length = self.admit(stored)?;
        self.out.write_all(&self.packed)?;
        self.written += u64::from(length);
        self.lengths.push(length);
        self.original_size += plain.len() as u64;
        Ok(())
    }

    /// Appends blocks that were compressed elsewhere with the same options. All blocks but the last of the
    /// file must have the full size, and the caller must not also write through [`Write`].
    pub fn put_packed(&mut self, blocks: &PackedBlocks) -> Result<(), ZFileError> {
        for &stored in &blocks.lengths {
            let length = self.admit(stored)?;
            self.lengths.push(length);
        }
        self.out.write_all(&blocks.bytes)?;
        self.written += blocks.bytes.len() as u64;
        self.original_size += blocks.plain_len;
        Ok(())
    }

    /// Refuses a block that upstream's reader could not read back.
    fn admit(&mut self, stored: u64) -> Result<u32, ZFileError> {
        let block = self.lengths.len() as u64;
        let block_size = self.options.block_size;
        let too_long = |rule| Err(ZFileError::BlockTooLong { block, stored, block_size, rule });
        if block >= MAX_BLOCKS {
            return Err(ZFileError::Options {
                rule: format!("the stream has more than {MAX_BLOCKS} blocks"),
            });
        }
        if stored > MAX_STORED {
            return too_long("readers have a buffer of 65536");
        }
        let group = u64::from(MAX_BLOCK / block_size);
        if block.is_multiple_of(group) {
            self.in_group = 0;
        }
        // The last block of a group may end anywhere: only offsets of beginnings are stored in 16 bits.
        if block % group != group - 1 {
            self.in_group += stored;
            if self.in_group >= MAX_IN_GROUP {
                return too_long(
                    "all but the last of the blocks that share 64 KiB must take less than 65535",
                );
            }
        }
        Ok(stored as u32)
    }
}

impl<W: Write + Seek> ZFileWriter<W> {
    /// Writes the jump table and the trailer, and also the final values into the header, so that a reader
    /// needs one request less (like `overlaybd-commit -z`). Leaves `out` at the end.
    ///
    /// # Errors
    /// [`ZFileError::BlockTooLong`], [`ZFileError::Write`].
    pub fn finish(mut self) -> Result<(W, Summary), ZFileError> {
        let (mut header, summary) = self.close()?;
        header.flags = FLAG_HEADER | FLAG_DATA | FLAG_OVERWRITTEN | FLAG_DIGEST;
        let end = self.out.stream_position()?;
        let Some(start) = end.checked_sub(summary.len) else {
            return Err(io::Error::other(
                "The position of the output changed while a ZFile was written to it",
            )
            .into());
        };
        self.out.seek(SeekFrom::Start(start))?;
        self.out.write_all(&header.encode())?;
        self.out.seek(SeekFrom::Start(end))?;
        Ok((self.out, summary))
    }
}

impl<W: Write> Write for ZFileWriter<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let size = self.options.block_size as usize;
        let mut rest = bytes;
        while !rest.is_empty() {
            if self.plain.is_empty() && rest.len() >= size {
                let (block, tail) = rest.split_at(size);
                self.put_block(block).map_err(io::Error::other)?;
                rest = tail;
                continue;
            }
            let (part, tail) = rest.split_at(rest.len().min(size - self.plain.len()));
            self.plain.extend_from_slice(part);
            rest = tail;
            if self.plain.len() == size {
                let mut plain = std::mem::take(&mut self.plain);
                self.put_block(&plain).map_err(io::Error::other)?;
                plain.clear();
                self.plain = plain;
            }
        }
        Ok(bytes.len())
    }

    /// Passes the compressed bytes on to the output; a partial block stays.
    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

/// A record with all fields but those of the index.
fn record(options: &Options, flags: u64) -> ZFileHeader {
    ZFileHeader {
        flags,
        index_offset: 0,
        index_size: 0,
        original_size: 0,
        index_crc: 0,
        block_size: options.block_size,
        algo: options.algo,
        dict_size: 0,
        verify: options.verify,
    }
}
