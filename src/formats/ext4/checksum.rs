//! Checksums of metadata: none, CRC-16 of descriptors only (uninit_bg), or CRC-32C of nearly
//! everything (metadata_csum).
//!
//! A new disk has CRC-16; a continued disk keeps its own kind. Source: the kernel's "ext4 Data Structures and
//! Algorithms", chapter on checksums.

use super::field::{high16, low16, put16, put32};
use super::geometry::BLOCK;

/// Protection of a filesystem's metadata.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Checksums {
    /// No checksums.
    None,
    /// Checksums of group descriptors, seeded with the UUID.
    Descriptors { uuid: [u8; 16] },
    /// Checksums of all metadata, seeded with the CRC of the UUID or with the seed in the superblock.
    Metadata { seed: u32 },
}

/// Bytes of the checksum entry that ends a directory's leaf.
pub(super) const LEAF_TAIL: usize = 12;

impl Checksums {
    /// True if descriptors may mark parts of a group as never written.
    pub(super) fn of_descriptors(self) -> bool {
        self != Checksums::None
    }

    /// Writes the checksum of a group descriptor; `group` is its number.
    pub(super) fn seal_descriptor(self, record: &mut [u8], group: u32) {
        let sum = match self {
            Checksums::None => return,
            Checksums::Descriptors { uuid } => {
                let crc = crc16(crc16(0xffff, &uuid), &group.to_le_bytes());
                let crc = crc16(crc, &record[..30]);
                record.get(32..).map_or(crc, |rest| crc16(crc, rest))
            }
            Checksums::Metadata { seed } => {
                put16(record, 30, 0);
                low16(crc32c(crc32c(seed, &group.to_le_bytes()), record))
            }
        };
        put16(record, 30, sum);
    }

    /// Writes the checksum of a bitmap into its group's descriptor; `low` and `high` are its fields.
    pub(super) fn note_bitmap(self, record: &mut [u8], (low, high): (usize, usize), bits: &[u8]) {
        if let Checksums::Metadata { seed } = self {
            let sum = crc32c(seed, bits);
            put16(record, low, low16(sum));
            if record.len() >= high + 2 {
                put16(record, high, high16(sum));
            }
        }
    }

    /// Writes the checksum of the superblock: 1024 bytes.
    pub(super) fn seal_superblock(self, record: &mut [u8]) {
        if let Checksums::Metadata { .. } = self {
            let sum = crc32c(u32::MAX, &record[..1020]);
            put32(record, 1020, sum);
        }
    }

    /// The checksum of the metadata of one inode.
    pub(super) fn of_inode(self, inode: u32, generation: u32) -> InodeChecksum {
        InodeChecksum(match self {
            Checksums::Metadata { seed } => {
                Some(crc32c(crc32c(seed, &inode.to_le_bytes()), &generation.to_le_bytes()))
            }
            Checksums::None | Checksums::Descriptors { .. } => None,
        })
    }

    /// Writes the checksum of an attribute block.
    pub(super) fn seal_xattrs(self, block: &mut [u8], place: u64) {
        if let Checksums::Metadata { seed } = self {
            put32(block, 16, 0);
            let sum = crc32c(crc32c(seed, &place.to_le_bytes()), block);
            put32(block, 16, sum);
        }
    }
}

/// Writes the checksums of one inode's blocks; does nothing without metadata_csum.
#[derive(Clone, Copy, Debug)]
pub(super) struct InodeChecksum(Option<u32>);

impl InodeChecksum {
    /// True if blocks need room for it.
    pub(super) fn is_some(self) -> bool {
        self.0.is_some()
    }

    /// Writes the checksum of the inode itself, of any size.
    pub(super) fn seal_inode(self, record: &mut [u8]) {
        let Some(seed) = self.0 else { return };
        put16(record, 124, 0);
        let has_high = record.len() > 128 && u16::from_le_bytes([record[128], record[129]]) >= 4;
        if has_high {
            put16(record, 130, 0);
        }
        let sum = crc32c(seed, record);
        put16(record, 124, low16(sum));
        if has_high {
            put16(record, 130, high16(sum));
        }
    }

    /// Writes the checksum of a block of an extent tree that has room for as many entries as fit.
    pub(super) fn seal_extents(self, block: &mut [u8; BLOCK]) {
        if let Some(seed) = self.0 {
            let sum = crc32c(seed, &block[..BLOCK - 4]);
            put32(block, BLOCK - 4, sum);
        }
    }

    /// Ends a block of directory entries with its checksum; the last [`LEAF_TAIL`] bytes must be free for it.
    pub(super) fn seal_leaf(self, block: &mut [u8]) {
        if let Some(seed) = self.0 {
            let at = block.len() - LEAF_TAIL;
            put16(block, at + 4, LEAF_TAIL as u16);
            block[at + 7] = 0xde; // a type that no file has
            let sum = crc32c(seed, &block[..at]);
            put32(block, at + 8, sum);
        }
    }

    /// Ends a block of a directory's index with its checksum. The pairs begin at `slots`, with room for
    /// `limit`; there are `count` of them.
    pub(super) fn seal_index(self, block: &mut [u8], slots: usize, limit: usize, count: usize) {
        if let Some(seed) = self.0 {
            let sum = crc32c(crc32c(seed, &block[..slots + count * 8]), &[0; 8]);
            put32(block, slots + limit * 8, 0);
            put32(block, slots + limit * 8 + 4, sum);
        }
    }
}

/// The seed of a filesystem with this UUID.
pub(super) fn seed_of(uuid: &[u8]) -> u32 {
    crc32c(u32::MAX, uuid)
}

/// CRC-32C as in the kernel, without inversion of the result. The crate inverts before and after.
fn crc32c(crc: u32, bytes: &[u8]) -> u32 {
    !crc32c::crc32c_append(!crc, bytes)
}

/// CRC-16 with the reflected polynomial 0x8005, as required for gdt_csum (kernel `lib/crc16.c`).
fn crc16(crc: u16, bytes: &[u8]) -> u16 {
    const TABLE: [u16; 256] = crc16_table();
    bytes.iter().fold(crc, |crc, &byte| (crc >> 8) ^ TABLE[usize::from(crc as u8 ^ byte)])
}

const fn crc16_table() -> [u16; 256] {
    let mut table = [0; 256];
    let mut index = 0;
    while index < 256 {
        let mut crc = index as u16;
        let mut bit = 0;
        while bit < 8 {
            crc = if crc & 1 == 1 { (crc >> 1) ^ 0xa001 } else { crc >> 1 };
            bit += 1;
        }
        table[index] = crc;
        index += 1;
    }
    table
}

#[cfg(test)]
mod tests {
    use super::crc16;

    #[test]
    fn crc16_is_the_kernels() {
        // The check value of CRC-16/MODBUS, which has the same parameters: initial value 0xffff, reflected
        // 0x8005.
        assert_eq!(crc16(0xffff, b"123456789"), 0x4b37);
    }
}
