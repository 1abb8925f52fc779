//! Random access into a `ZFile` (spec zfile 4 to 6).

use std::io;
use std::ops::Range;
use std::sync::Arc;

use sha2::{Digest as _, Sha256};

use super::ZFileError;
use super::header::{
    BLOCK_SEED, FLAG_DATA, FLAG_DIGEST, FLAG_HEADER, FLAG_OVERWRITTEN, FLAG_SEALED, MAX_BLOCKS,
    SPACE, ZFileHeader, raw_crc32c,
};
use crate::zfile::Algo;
use source::chunk::{ChunkError, ChunkSource, ChunkSpan, EncodedChunk, EncodedRange};
use source::{ByteSource, Origin, Proof, Reserved, SourceError};

/// Plain bytes in a chunk, and the grain of the jump table: 32 blocks of 4 KiB. Large enough that a range
/// request is worth its round trip; small enough that a single 4 KiB read decodes in well under a
/// millisecond.
const CHUNK: u32 = 128 << 10;

/// Most bytes that any compressor adds to an incompressible block: LZ4's bound is n/255 + 16, ZSTD's n/256 +
/// 64, upstream's own buffer has 512; the checksum comes in addition. A longer entry in a jump table is
/// damage, and would let the file decide the size of an allocation.
const MAX_EXPANSION: u32 = 1024;

/// Bytes read at a time from the jump table.
const INDEX_STEP: u64 = 1 << 20;

/// An open `ZFile`, with its record and its jump table.
pub struct ZFile {
    source: Arc<dyn ByteSource>,
    record: ZFileHeader,
    /// Stored length of each block, checksum included.
    lengths: Vec<u32>,
    /// First byte of every block whose number is a multiple of `grain`.
    bases: Vec<u64>,
    /// Blocks in a chunk.
    grain: u64,
}

/// An empty vector with room for `len` bytes, or an error if there is not enough memory.
pub(super) fn room(name: &str, len: u64) -> Result<Vec<u8>, ZFileError> {
    let mut bytes = Vec::new();
    let fits = usize::try_from(len).is_ok_and(|len| bytes.try_reserve_exact(len).is_ok());
    if fits {
        return Ok(bytes);
    }
    let source = Arc::new(io::Error::from(io::ErrorKind::OutOfMemory));
    Err(SourceError::Io { name: name.to_owned(), offset: 0, len: usize::MAX, source }.into())
}

impl ZFile {
    /// Opens a `ZFile` that begins at byte 0 of `source` and reads its jump table.
    ///
    /// # Errors
    /// [`ZFileError`] with the record and the broken rule.
    pub fn open(source: Arc<dyn ByteSource>) -> Result<Self, ZFileError> {
        Self::open_within(source, &mut Reserved::unbounded())
    }

    /// As [`open`](Self::open), with the memory of the jump table added to `part` before it is taken.
    ///
    /// # Errors
    /// As [`open`](Self::open), and [`ZFileError::Budget`].
    pub fn open_within(
        source: Arc<dyn ByteSource>,
        part: &mut Reserved,
    ) -> Result<Self, ZFileError> {
        let (record, end) = read_record(&*source)?;
        let table = record.index_size.saturating_mul(size_of::<u32>() as u64);
        part.add(table, &format!("The jump table of {}", source.name()))?;
        let (lengths, index_crc) = read_index(&*source, &record, end)?;
        let invalid = |rule: String| ZFileError::Invalid {
            name: source.name().to_owned(),
            part: "Jump table",
            offset: record.index_offset,
            rule,
        };
        if record.has(FLAG_DIGEST) && index_crc != record.index_crc {
            return Err(invalid(format!(
                "its checksum should be {:08x}, its bytes give {index_crc:08x}",
                record.index_crc
            )));
        }
        let grain = u64::from(CHUNK / record.block_size);
        let trailer = if record.verify { 4 } else { 0 };
        let mut bases = Vec::with_capacity(lengths.len() / grain as usize + 1);
        let mut at = SPACE as u64 + u64::from(record.dict_size);
        for (number, &length) in lengths.iter().enumerate() {
            if length <= trailer || length > record.block_size + MAX_EXPANSION {
                return Err(invalid(format!("block {number} cannot take {length} bytes")));
            }
            if (number as u64).is_multiple_of(grain) {
                bases.push(at);
            }
            at += u64::from(length); // below 1e9 blocks of 65 KiB: no overflow
        }
        if at != record.index_offset {
            return Err(invalid(format!("its blocks end at byte {at}, not at its beginning")));
        }
        Ok(Self { source, record, lengths, bases, grain })
    }

    /// Its jump table as a [`Proof`]: it says where blocks lie, and the checksums beside them find damage only.
    fn proof(&self) -> Proof {
        let ZFileHeader { original_size, block_size, algo, dict_size, verify, .. } = self.record;
        let mut table = Sha256::new();
        table.update(b"turbobd zfile index 1\0");
        table.update(original_size.to_le_bytes());
        table.update(block_size.to_le_bytes());
        table.update(dict_size.to_le_bytes());
        table.update([u8::from(algo == Algo::Zstd), u8::from(verify)]);
        for lengths in self.lengths.chunks(1024) {
            let bytes: Vec<u8> = lengths.iter().flat_map(|length| length.to_le_bytes()).collect();
            table.update(bytes);
        }
        Proof::Index(table.finalize().into())
    }

    /// Number of blocks.
    #[must_use]
    pub fn blocks(&self) -> u64 {
        self.lengths.len() as u64
    }

    /// The record that describes the file: the header if it was overwritten, else the trailer.
    #[must_use]
    pub fn record(&self) -> &ZFileHeader {
        &self.record
    }

    /// Reads all plain bytes.
    ///
    /// # Errors
    /// [`ZFileError`] if a block is damaged or there is no memory for the bytes.
    pub fn read_all(&self) -> Result<Vec<u8>, ZFileError> {
        let mut plain = room(self.source.name(), self.record.original_size)?;
        plain.resize(self.record.original_size as usize, 0);
        self.read_into(&mut plain)?;
        Ok(plain)
    }

    /// Reads all plain bytes into `plain`, which has their length; on all cores if the file is large enough.
    ///
    /// # Errors
    /// [`ZFileError`] if a block is damaged.
    pub fn read_into(&self, plain: &mut [u8]) -> Result<(), ZFileError> {
        self.decode_into(0, self.lengths.len() as u64, plain)
    }

    /// Offset of block `number`, which may be one past the last.
    fn start_of(&self, number: u64) -> u64 {
        let group = (number / self.grain) as usize;
        let Some(&base) = self.bases.get(group) else { return self.record.index_offset };
        let lengths = &self.lengths[(group as u64 * self.grain) as usize..number as usize];
        base + lengths.iter().map(|&length| u64::from(length)).sum::<u64>()
    }

    /// Plain bytes of block `number`, which must exist.
    fn plain_len(&self, number: u64) -> usize {
        let start = number * u64::from(self.record.block_size);
        (self.record.original_size - start).min(u64::from(self.record.block_size)) as usize
    }

    /// Decodes `count` blocks from `first` on; fewer at the end of the file.
    fn decode(&self, first: u64, count: u64) -> Result<Vec<u8>, ZFileError> {
        let last = first.saturating_add(count).min(self.lengths.len() as u64);
        let mut plain = vec![0; (first..last).map(|number| self.plain_len(number)).sum()];
        self.decode_into(first, count, &mut plain)?;
        Ok(plain)
    }

    /// Decodes `count` blocks from `first` on into `plain`, which has their length.
    pub fn decode_into(&self, first: u64, count: u64, plain: &mut [u8]) -> Result<(), ZFileError> {
        let blocks = self.lengths.len() as u64;
        let last = first.saturating_add(count).min(blocks);
        let (start, end) = (self.start_of(first), self.start_of(last));
        let held;
        let stored = if let Some(all) = self.source.as_slice() {
            &all[start as usize..end as usize]
        } else {
            let mut bytes = vec![0; (end - start) as usize];
            self.source.read_exact_at(&mut bytes, start)?;
            held = bytes;
            &held[..]
        };
        self.decode_stored(first..last, stored, plain)
    }

    /// Checks the stored bytes of `blocks` against the checksums among them; `None` if there are none.
    fn verify_stored(&self, blocks: Range<u64>, stored: &[u8]) -> Option<bool> {
        let mut rest = stored;
        for number in self.record.verify.then_some(blocks)? {
            let length = self.lengths[number as usize] as usize;
            let Some((block, more)) = rest.split_at_checked(length) else { return Some(false) };
            let (bytes, crc) = block.split_last_chunk::<4>()?;
            if u32::from_le_bytes(*crc) != raw_crc32c(BLOCK_SEED, bytes) {
                return Some(false);
            }
            rest = more;
        }
        Some(rest.is_empty())
    }

    /// Decodes `blocks` from their stored bytes into `plain`, which has their length.
    fn decode_stored(
        &self,
        blocks: Range<u64>,
        stored: &[u8],
        plain: &mut [u8],
    ) -> Result<(), ZFileError> {
        let start = self.start_of(blocks.start);
        let mut decoder = Decoder::new(self.record.algo)?;
        let (mut at, mut filled) = (0, 0);
        for number in blocks {
            let length = self.lengths[number as usize] as usize;
            let len = self.plain_len(number);
            self.decode_block(
                &mut decoder,
                &stored[at..at + length],
                &mut plain[filled..filled + len],
            )
            .map_err(|reason| ZFileError::Damaged {
                name: self.source.name().to_owned(),
                block: number,
                start: start + at as u64,
                end: start + (at + length) as u64,
                reason,
            })?;
            at += length;
            filled += len;
        }
        Ok(())
    }

    /// Verifies and decodes one block, or returns the fault found.
    fn decode_block(
        &self,
        decoder: &mut Decoder,
        stored: &[u8],
        plain: &mut [u8],
    ) -> Result<(), String> {
        let mut packed = stored;
        if self.record.verify {
            let Some((bytes, crc)) = stored.split_last_chunk::<4>() else {
                return Err("it is shorter than its checksum".to_owned());
            };
            let (stored, computed) = (u32::from_le_bytes(*crc), raw_crc32c(BLOCK_SEED, bytes));
            if stored != computed {
                return Err(format!(
                    "its checksum says {stored:08x}, its bytes give {computed:08x}"
                ));
            }
            packed = bytes;
        }
        let len = decoder.decode(packed, plain)?;
        if len != plain.len() {
            return Err(format!("it decodes to {len} bytes, not {}", plain.len()));
        }
        Ok(())
    }
}

/// The valid record, and the byte before which the jump table ends.
fn read_record(source: &dyn ByteSource) -> Result<(ZFileHeader, u64), ZFileError> {
    let name = source.name();
    let len = source.len();
    if len < SPACE as u64 {
        return Err(ZFileError::NotZFile { name: name.to_owned() });
    }
    let mut bytes = [0; SPACE];
    source.read_exact_at(&mut bytes, 0)?;
    let header = ZFileHeader::parse(&bytes, name, 0)?;
    if !header.has(FLAG_HEADER) {
        return Err(ZFileError::NotZFile { name: name.to_owned() });
    }
    let at = len - SPACE as u64;
    if header.has(FLAG_OVERWRITTEN) {
        // The trailer is not needed, but a truncated file has no room for it.
        return Ok((header, at));
    }
    source.read_exact_at(&mut bytes, at)?;
    let trailer = ZFileHeader::parse(&bytes, name, at)?;
    if trailer.has(FLAG_HEADER) || !trailer.has(FLAG_DATA | FLAG_SEALED) {
        let rule = "its flags are not those of a sealed trailer".to_owned();
        return Err(ZFileError::Invalid {
            name: name.to_owned(),
            part: "Trailer",
            offset: at,
            rule,
        });
    }
    Ok((trailer, at))
}

/// The jump table and its checksum. All numbers that describe it are first checked against the length of the
/// file.
fn read_index(
    source: &dyn ByteSource,
    record: &ZFileHeader,
    end: u64,
) -> Result<(Vec<u32>, u32), ZFileError> {
    let invalid = |rule: String| ZFileError::Invalid {
        name: source.name().to_owned(),
        part: "Jump table",
        offset: record.index_offset,
        rule,
    };
    let count = record.index_size;
    let needed = record.original_size.div_ceil(u64::from(record.block_size));
    if count > MAX_BLOCKS {
        return Err(invalid(format!("{count} blocks are more than {MAX_BLOCKS}")));
    }
    if count != needed {
        return Err(invalid(format!(
            "it has {count} blocks where {} bytes take {needed}",
            record.original_size
        )));
    }
    if record.index_offset.checked_add(count * 4).is_none_or(|index_end| index_end > end) {
        return Err(invalid(format!("its {count} entries end past byte {end}")));
    }
    let mut lengths = Vec::new();
    if lengths.try_reserve_exact(count as usize).is_err() {
        return Err(invalid(format!("there is no memory for its {count} entries")));
    }
    let mut step = vec![0; INDEX_STEP.min(count * 4) as usize];
    let (mut at, mut left, mut crc) = (record.index_offset, count * 4, 0);
    while left > 0 {
        let bytes = &mut step[..INDEX_STEP.min(left) as usize];
        source.read_exact_at(bytes, at)?;
        crc = raw_crc32c(crc, bytes);
        lengths.extend(bytes.as_chunks::<4>().0.iter().map(|&word| u32::from_le_bytes(word)));
        at += bytes.len() as u64;
        left -= bytes.len() as u64;
    }
    Ok((lengths, crc))
}

/// A decompressor, made once for many blocks.
enum Decoder {
    Lz4,
    Zstd(zstd::bulk::Decompressor<'static>),
}

impl Decoder {
    fn new(algo: Algo) -> Result<Self, ZFileError> {
        Ok(match algo {
            Algo::Lz4 => Self::Lz4,
            Algo::Zstd => Self::Zstd(zstd::bulk::Decompressor::new()?),
        })
    }

    /// Decoded length, or the codec's error message.
    fn decode(&mut self, packed: &[u8], plain: &mut [u8]) -> Result<usize, String> {
        match self {
            Self::Lz4 => lz4_flex::block::decompress_into(packed, plain)
                .map_err(|e| format!("LZ4 reports: {e}")),
            Self::Zstd(decoder) => decoder
                .decompress_to_buffer(packed, plain)
                .map_err(|e| format!("ZSTD reports: {e}")),
        }
    }
}

impl ByteSource for ZFile {
    fn len(&self) -> u64 {
        self.record.original_size
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> Result<(), SourceError> {
        let end = offset.saturating_add(buf.len() as u64);
        if end > self.len() {
            return Err(SourceError::PastEnd {
                name: self.name().to_owned(),
                offset,
                end,
                size: self.len(),
            });
        }
        let block = u64::from(self.record.block_size);
        let (mut at, mut rest) = (offset, buf);
        while !rest.is_empty() {
            let first = at / block;
            let count = (at + rest.len() as u64).div_ceil(block) - first;
            let plain = self.decode(first, count.min(self.grain)).map_err(|error| match error {
                ZFileError::Source(error) => error,
                error => SourceError::Io {
                    name: self.name().to_owned(),
                    offset: at,
                    len: rest.len(),
                    source: Arc::new(io::Error::new(io::ErrorKind::InvalidData, error)),
                },
            })?;
            let skip = (at - first * block) as usize;
            let len = (plain.len() - skip).min(rest.len());
            let (part, tail) = rest.split_at_mut(len);
            part.copy_from_slice(&plain[skip..skip + len]);
            at += len as u64;
            rest = tail;
        }
        Ok(())
    }

    fn origin(&self) -> Origin {
        self.source.origin()
    }

    fn name(&self) -> &str {
        self.source.name()
    }
}

/// A `ZFile` in chunks of 128 KiB of plain bytes.
pub struct ZFileChunks {
    id: String,
    proof: Proof,
    file: Arc<ZFile>,
}

impl ZFileChunks {
    /// Chunks of `file`, which is named `id`.
    pub fn new(id: impl Into<String>, file: Arc<ZFile>) -> Self {
        Self { id: id.into(), proof: file.proof(), file }
    }
}

impl ZFileChunks {
    /// The blocks of chunk `index`: the first, and one past the last.
    fn blocks(&self, index: u32) -> (u64, u64) {
        let count = self.file.lengths.len() as u64;
        let first = (u64::from(index) * self.file.grain).min(count);
        (first, (first + self.file.grain).min(count))
    }
}

impl ChunkSource for ZFileChunks {
    fn id(&self) -> &str {
        &self.id
    }

    fn proof(&self) -> Proof {
        self.proof
    }

    fn decoded_len(&self) -> u64 {
        self.file.len()
    }

    fn chunk_count(&self) -> u32 {
        self.file.bases.len() as u32
    }

    fn chunk_at(&self, offset: u64) -> Option<ChunkSpan> {
        let size = self.file.len();
        (offset < size).then(|| {
            let index = offset / u64::from(CHUNK);
            let start = index * u64::from(CHUNK);
            ChunkSpan {
                index: index as u32,
                start,
                len: (size - start).min(u64::from(CHUNK)) as u32,
            }
        })
    }

    fn span(&self, index: u32) -> Option<ChunkSpan> {
        self.chunk_at(u64::from(index) * u64::from(CHUNK))
    }

    fn verify(&self, index: u32, encoded: &[u8]) -> Option<bool> {
        let (first, last) = self.blocks(index);
        self.file.verify_stored(first..last, encoded)
    }

    fn blob(&self) -> &Arc<dyn ByteSource> {
        &self.file.source
    }

    fn encoded(&self, index: u32) -> Result<EncodedRange, ChunkError> {
        if index >= self.chunk_count() {
            let offset = u64::from(index) * u64::from(CHUNK);
            let (name, size) = (self.file.name().to_owned(), self.file.len());
            return Err(SourceError::PastEnd { name, offset, end: offset + 1, size }.into());
        }
        let (first, last) = self.blocks(index);
        let range = self.file.start_of(first)..self.file.start_of(last);
        Ok(EncodedRange { range, head: 0, tail: 0 })
    }

    fn room(&self, index: u32) -> usize {
        let (first, last) = self.blocks(index);
        (first..last).map(|number| self.file.plain_len(number)).sum()
    }

    fn decode(
        &self,
        index: u32,
        encoded: &mut EncodedChunk,
        room: &mut [u8],
    ) -> Result<Range<usize>, ChunkError> {
        let (first, last) = self.blocks(index);
        match self.file.decode_stored(first..last, encoded.bytes(), room) {
            Ok(()) => Ok(0..room.len()),
            Err(ZFileError::Source(error)) => Err(error.into()),
            Err(ZFileError::Damaged { name, block, start, end, reason }) => {
                let reason = format!("in ZFile block {block}, {reason}");
                Err(ChunkError::Damaged { blob: name, chunk: index, start, end, reason })
            }
            Err(error) => Err(ChunkError::Damaged {
                blob: self.id.clone(),
                chunk: index,
                start: 0,
                end: 0,
                reason: error.to_string(),
            }),
        }
    }
}
