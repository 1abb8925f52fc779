//! The record at both ends of a `ZFile` (spec zfile 2 and 3; upstream `zfile.cpp:HeaderTrailer`).
//!
//! Files of 2021 contain uninitialised stack bytes in the unused bits of `flags`, in the digests and behind
//! the record. So bits are tested one by one; digests are tested only if their bit says that they are
//! present; `size`, reserved fields and padding are never tested.

use super::ZFileError;
use source::ByteSource;

/// Bytes of each record with its padding.
pub const SPACE: usize = 512;

/// "ZFile\0\1\0", then sixteen bytes that are unique to this format.
pub const MAGIC: [u8; 24] = *b"ZFile\x00\x01\x00tuji.yyf@Alibaba";

/// Bytes of a record that have a meaning; written into `size`, never checked.
const RECORD_LEN: u32 = 96;

/// Set in the record at the beginning, clear in the one at the end.
pub const FLAG_HEADER: u64 = 1;
/// Always set.
pub const FLAG_DATA: u64 = 1 << 1;
/// Set only at the end.
pub const FLAG_SEALED: u64 = 1 << 2;
/// The header was rewritten with the final values: the trailer need not be read.
pub const FLAG_OVERWRITTEN: u64 = 1 << 3;
/// The digest of the record and the checksum of the jump table are valid.
pub const FLAG_DIGEST: u64 = 1 << 4;

/// Smallest block size that upstream's reader can address (spec zfile 4).
pub const MIN_BLOCK: u32 = 4 << 10;
/// Largest block size; larger blocks make upstream divide by zero.
pub const MAX_BLOCK: u32 = 64 << 10;

/// Largest number of blocks in a file that upstream opens (spec zfile 4).
pub const MAX_BLOCKS: u64 = 1_000_000_000;

/// Compression of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Algo {
    /// LZ4, raw block format.
    Lz4,
    /// ZSTD, one frame per block.
    Zstd,
}

/// A header or a trailer, without its magic.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ZFileHeader {
    /// The flag bits; unknown ones can have any value.
    pub flags: u64,
    /// First byte of the jump table.
    pub index_offset: u64,
    /// Number of blocks.
    pub index_size: u64,
    /// Length of the plain bytes.
    pub original_size: u64,
    /// Checksum of the jump table; valid only with [`FLAG_DIGEST`].
    pub index_crc: u32,
    /// Plain bytes in every block but the last.
    pub block_size: u32,
    /// Compression of the blocks.
    pub algo: Algo,
    /// Bytes between the header and the first block.
    pub dict_size: u32,
    /// True if a checksum of four bytes follows every block.
    pub verify: bool,
}

/// CRC-32C as upstream computes it: the register starts at `seed` and is returned unchanged, while the usual
/// CRC-32C inverts it before and after (spec zfile 3).
#[must_use]
pub fn raw_crc32c(seed: u32, bytes: &[u8]) -> u32 {
    !crc32c::crc32c_append(!seed, bytes)
}

/// Seed of the checksum behind a block (upstream `NOI_WELL_KNOWN_PRIME`).
pub const BLOCK_SEED: u32 = 100_007;

fn le32(bytes: &[u8; SPACE], at: usize) -> u32 {
    let mut word = [0; 4];
    word.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(word)
}

fn le64(bytes: &[u8; SPACE], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(word)
}

/// Digest of a record: computed over all 512 bytes with its own field set to zero.
fn digest(bytes: &[u8; SPACE]) -> u32 {
    let mut blank = *bytes;
    blank[28..32].fill(0);
    raw_crc32c(0, &blank)
}

impl ZFileHeader {
    /// True if all bits of `flag` are set.
    #[must_use]
    pub const fn has(&self, flag: u64) -> bool {
        self.flags & flag == flag
    }

    /// Reads a record. `name` and `offset`, the position of the record in it, are for messages.
    ///
    /// # Errors
    /// [`ZFileError::NotZFile`] without the magic, [`ZFileError::Invalid`] with the broken rule.
    pub fn parse(bytes: &[u8; SPACE], name: &str, offset: u64) -> Result<Self, ZFileError> {
        let part = if offset == 0 { "Header" } else { "Trailer" };
        let invalid =
            |rule: String| ZFileError::Invalid { name: name.to_owned(), part, offset, rule };
        if bytes[..24] != MAGIC {
            return Err(if offset == 0 {
                ZFileError::NotZFile { name: name.to_owned() }
            } else {
                invalid("its first 24 bytes are not the magic".to_owned())
            });
        }
        let flags = le64(bytes, 32);
        if flags & FLAG_DIGEST != 0 && le32(bytes, 28) != digest(bytes) {
            let (found, computed) = (le32(bytes, 28), digest(bytes));
            return Err(invalid(format!(
                "its digest says {found:08x}, its bytes give {computed:08x}"
            )));
        }
        let algo = match bytes[76] {
            1 => Algo::Lz4,
            2 => Algo::Zstd,
            other => {
                return Err(invalid(format!(
                    "compression {other} is neither 1 (LZ4) nor 2 (ZSTD)"
                )));
            }
        };
        let block_size = le32(bytes, 72);
        if !block_size.is_power_of_two() || !(MIN_BLOCK..=MAX_BLOCK).contains(&block_size) {
            return Err(invalid(format!(
                "block size {block_size} is not a power of two from 4096 to 65536"
            )));
        }
        if bytes[78] != 0 {
            return Err(invalid(
                "it requires a dictionary, which no known writer makes".to_owned(),
            ));
        }
        Ok(Self {
            flags,
            index_offset: le64(bytes, 40),
            index_size: le64(bytes, 48),
            original_size: le64(bytes, 56),
            index_crc: le32(bytes, 64),
            block_size,
            algo,
            dict_size: le32(bytes, 84),
            verify: bytes[88] != 0,
        })
    }

    /// The 512 bytes, with their digest if [`FLAG_DIGEST`] is set.
    #[must_use]
    pub fn encode(&self) -> [u8; SPACE] {
        let mut bytes = [0; SPACE];
        let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
        put(0, &MAGIC);
        put(24, &RECORD_LEN.to_le_bytes());
        put(32, &self.flags.to_le_bytes());
        put(40, &self.index_offset.to_le_bytes());
        put(48, &self.index_size.to_le_bytes());
        put(56, &self.original_size.to_le_bytes());
        put(64, &self.index_crc.to_le_bytes());
        put(72, &self.block_size.to_le_bytes());
        put(
            76,
            &[match self.algo {
                Algo::Lz4 => 1,
                Algo::Zstd => 2,
            }],
        );
        put(84, &self.dict_size.to_le_bytes());
        put(88, &[u8::from(self.verify)]);
        if self.has(FLAG_DIGEST) {
            let digest = digest(&bytes);
            bytes[28..32].copy_from_slice(&digest.to_le_bytes());
        }
        bytes
    }
}

/// True if a source begins with the magic of a `ZFile`. A wrong digest does not make it plain;
/// [`ZFileHeader::parse`] then refuses it.
///
/// # Errors
/// [`ZFileError::Source`] if the first bytes cannot be read.
pub fn is_zfile(source: &dyn ByteSource) -> Result<bool, ZFileError> {
    if source.len() < SPACE as u64 {
        return Ok(false);
    }
    let mut bytes = [0; SPACE];
    source.read_exact_at(&mut bytes, 0)?;
    Ok(bytes[..24] == MAGIC && le64(&bytes, 32) & FLAG_HEADER != 0)
}
