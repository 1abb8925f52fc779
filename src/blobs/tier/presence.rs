//! The presence map: the list of the chunks present in a file, in a form that survives a crash.
//!
//! A header and records of 32 bytes, only ever appended; all numbers are little-endian. A record adds a chunk
//! or removes it. Each record carries its own checksum, seeded with a number of the header that no other map
//! has; so each is checked alone, and a record that was torn, or never reached the disk, is skipped.
//!
//! | Offset | Size | Header |
//! |---|---|---|
//! | 0 | 8 | magic, `TBDTIER` and NUL |
//! | 8 | 2 | version, 1 |
//! | 10 | 1 | kind: 1 encoded, 2 decoded |
//! | 12 | 2 | length of the identity |
//! | 16 | 8 | length of the blob, or of its decoded bytes |
//! | 24 | 4 | number of chunks |
//! | 28 | 4 | seed of the records' checksums |
//! | 32 | 216 | identity of the blob and of its division into chunks |
//! | 252 | 4 | CRC-32C of everything before |
//!
//! | Offset | Size | Record |
//! |---|---|---|
//! | 0 | 1 | 1 present, 2 removed |
//! | 4 | 4 | chunk |
//! | 8 | 8 | position of its first byte in the data file |
//! | 16 | 4 | its length |
//! | 20 | 4 | CRC-32C of its bytes |
//! | 28 | 4 | CRC-32C of everything before, seeded |

use std::collections::HashMap;

use super::TierKind;

/// Length of the header in bytes.
pub(super) const HEADER: usize = 256;
/// Length of a record in bytes.
pub(super) const RECORD: usize = 32;

const MAGIC: &[u8; 8] = b"TBDTIER\0";
const VERSION: u16 = 1;
const IDENTITY: usize = 216;

/// Subject of a map: a blob, in one division into chunks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Subject {
    pub(super) kind: TierKind,
    /// Identity of the blob and of its division into chunks.
    pub(super) id: String,
    /// Length in bytes of the blob or its decoded bytes.
    pub(super) len: u64,
    /// Number of chunks.
    pub(super) chunks: u32,
}

/// Position and checksum of a chunk in a data file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ChunkExtent {
    /// Position of its first byte.
    pub(super) at: u64,
    /// Number of bytes.
    pub(super) len: u32,
    /// CRC-32C of them.
    pub(super) crc: u32,
}

/// One record of the map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum PresenceRecord {
    Present(u32, ChunkExtent),
    Forgotten(u32),
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..at + 4)?.try_into().ok().map(u32::from_le_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    bytes.get(at..at + 8)?.try_into().ok().map(u64::from_le_bytes)
}

impl Subject {
    /// True if the identity has room in a header.
    pub(super) fn fits(&self) -> bool {
        self.id.len() <= IDENTITY
    }

    /// Encodes the header.
    pub(super) fn header(&self, seed: u32) -> Vec<u8> {
        let mut bytes = vec![0; HEADER];
        bytes[..8].copy_from_slice(MAGIC);
        bytes[8..10].copy_from_slice(&VERSION.to_le_bytes());
        bytes[10] = self.kind.number();
        bytes[12..14].copy_from_slice(&(self.id.len() as u16).to_le_bytes());
        bytes[16..24].copy_from_slice(&self.len.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.chunks.to_le_bytes());
        bytes[28..32].copy_from_slice(&seed.to_le_bytes());
        bytes[32..32 + self.id.len()].copy_from_slice(self.id.as_bytes());
        let crc = crc32c::crc32c(&bytes[..HEADER - 4]);
        bytes[HEADER - 4..].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// Decodes the subject of a map and its seed; `None` for a file that is not a map of this version.
    fn parse(bytes: &[u8]) -> Option<(Self, u32)> {
        let header = bytes.get(..HEADER)?;
        let whole = u32_at(header, HEADER - 4)? == crc32c::crc32c(&header[..HEADER - 4]);
        if !whole || header[..8] != *MAGIC || header[8..10] != VERSION.to_le_bytes() {
            return None;
        }
        let len = usize::from(u16::from_le_bytes([header[12], header[13]]));
        let id = header.get(32..32 + len).filter(|_| len <= IDENTITY)?;
        let subject = Self {
            kind: TierKind::of(header[10])?,
            id: std::str::from_utf8(id).ok()?.to_owned(),
            len: u64_at(header, 16)?,
            chunks: u32_at(header, 24)?,
        };
        Some((subject, u32_at(header, 28)?))
    }
}

impl PresenceRecord {
    /// Encodes the record, for a map with this seed.
    pub(super) fn bytes(self, seed: u32) -> [u8; RECORD] {
        let mut bytes = [0; RECORD];
        let (kind, chunk, extent) = match self {
            Self::Present(chunk, extent) => (1, chunk, extent),
            Self::Forgotten(chunk) => (2, chunk, ChunkExtent { at: 0, len: 0, crc: 0 }),
        };
        bytes[0] = kind;
        bytes[4..8].copy_from_slice(&chunk.to_le_bytes());
        bytes[8..16].copy_from_slice(&extent.at.to_le_bytes());
        bytes[16..20].copy_from_slice(&extent.len.to_le_bytes());
        bytes[20..24].copy_from_slice(&extent.crc.to_le_bytes());
        let crc = crc32c::crc32c_append(seed, &bytes[..RECORD - 4]);
        bytes[RECORD - 4..].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    fn parse(bytes: &[u8], seed: u32) -> Option<Self> {
        if u32_at(bytes, RECORD - 4)? != crc32c::crc32c_append(seed, bytes.get(..RECORD - 4)?) {
            return None;
        }
        let chunk = u32_at(bytes, 4)?;
        match bytes.first()? {
            1 => {
                let (at, len, crc) = (u64_at(bytes, 8)?, u32_at(bytes, 16)?, u32_at(bytes, 20)?);
                Some(Self::Present(chunk, ChunkExtent { at, len, crc }))
            }
            2 => Some(Self::Forgotten(chunk)),
            _ => None,
        }
    }
}

/// The contents of a map.
#[derive(Debug)]
pub(super) struct Map {
    pub(super) subject: Subject,
    pub(super) seed: u32,
    /// The chunks that are present.
    pub(super) present: HashMap<u32, ChunkExtent>,
    /// Number of record places in the file: the next record goes after them.
    pub(super) records: u64,
}

impl Map {
    /// Reads a map; `None` for a file that is not a map of this version.
    pub(super) fn parse(bytes: &[u8]) -> Option<Self> {
        let (subject, seed) = Subject::parse(bytes)?;
        let mut present = HashMap::new();
        let records = bytes[HEADER..].chunks_exact(RECORD);
        let count = records.len() as u64;
        for record in records.filter_map(|record| PresenceRecord::parse(record, seed)) {
            match record {
                PresenceRecord::Present(chunk, extent)
                    if chunk < subject.chunks && extent.len > 0 =>
                {
                    present.insert(chunk, extent);
                }
                PresenceRecord::Forgotten(chunk) => _ = present.remove(&chunk),
                PresenceRecord::Present(..) => {}
            }
        }
        Some(Self { subject, seed, present, records: count })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn subject() -> Subject {
        let id = "sha256:abc#gzip-1".to_owned();
        Subject { kind: TierKind::Decoded, id, len: 1 << 30, chunks: 64 }
    }

    fn extent(number: u32) -> ChunkExtent {
        ChunkExtent { at: u64::from(number) * 4096, len: number + 1, crc: !number }
    }

    proptest! {
        /// Damage to one record leaves all others as they were written.
        #[test]
        fn a_torn_record_is_passed_over_and_no_other(
            steps in proptest::collection::vec((any::<bool>(), 0_u32..64), 1..100),
            torn in any::<prop::sample::Index>(),
            damage in proptest::collection::vec(any::<u8>(), RECORD),
            cut in 0_usize..RECORD,
        ) {
            let torn = torn.index(steps.len());
            let mut file = subject().header(77);
            let mut expected = HashMap::new();
            for (number, &(present, chunk)) in steps.iter().enumerate() {
                let record = if present { PresenceRecord::Present(chunk, extent(chunk)) } else { PresenceRecord::Forgotten(chunk) };
                let mut bytes = record.bytes(77);
                if number == torn {
                    bytes.iter_mut().zip(&damage).skip(cut).for_each(|(byte, other)| *byte = *other);
                }
                if number == torn && bytes != record.bytes(77) {
                    // removed
                } else if present {
                    expected.insert(chunk, extent(chunk));
                } else {
                    expected.remove(&chunk);
                }
                file.extend(bytes);
            }
            file.extend(&damage[..cut]); // a record that was cut short
            let map = Map::parse(&file).unwrap();
            prop_assert_eq!(map.present, expected);
            prop_assert_eq!(map.records, steps.len() as u64);
            prop_assert_eq!(map.subject, subject());
        }

        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
            let _ = Map::parse(&bytes);
            let mut file = subject().header(1);
            file.extend(bytes);
            prop_assert!(Map::parse(&file).unwrap().present.is_empty());
        }
    }

    #[test]
    fn another_version_and_a_damaged_header_are_no_map() {
        let file = subject().header(5);
        assert!(Map::parse(&file).is_some());
        for at in 0..HEADER {
            let mut file = file.clone();
            file[at] ^= 1;
            assert!(Map::parse(&file).is_none(), "byte {at}");
        }
        let mut other = file;
        other[8] = 2;
        let crc = crc32c::crc32c(&other[..HEADER - 4]);
        other[HEADER - 4..].copy_from_slice(&crc.to_le_bytes());
        assert!(Map::parse(&other).is_none());
    }

    #[test]
    fn records_of_another_map_do_not_count() {
        let mut file = subject().header(5);
        file.extend(PresenceRecord::Present(3, extent(3)).bytes(6));
        assert!(Map::parse(&file).unwrap().present.is_empty());
    }
}
