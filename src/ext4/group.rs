//! Group descriptors: where a group's bitmaps and inode table lie, and what of it is free.

use super::field::{high16, high32, low16, low32, put16, put32};
use super::geometry::{DESCRIPTOR, GROUP_INODES, Layout, TABLE_BLOCKS};

/// The inode bitmap was never written: no inode of the group is in use.
const INODE_UNINIT: u16 = 1;
/// What of the inode table is unused reads as zeros; nothing is left to initialise.
const INODE_ZEROED: u16 = 4;

/// What a group has left.
#[derive(Clone, Copy, Debug)]
pub(super) struct Counts {
    pub(super) free_blocks: u32,
    pub(super) free_inodes: u32,
    pub(super) directories: u32,
    /// Inodes at the table's end that were never used.
    pub(super) untouched_inodes: u32,
}

/// Encodes the descriptor of `group`, with its checksum.
pub(super) fn descriptor(
    layout: &Layout,
    group: u32,
    counts: Counts,
    uuid: &[u8; 16],
) -> [u8; DESCRIPTOR] {
    let mut record = [0; DESCRIPTOR];
    let nth = u64::from(group);
    let positions = [
        layout.block_bitmaps + nth,
        layout.inode_bitmaps + nth,
        layout.inode_tables + nth * TABLE_BLOCKS,
    ];
    for (field, position) in positions.into_iter().enumerate() {
        put32(&mut record, field * 4, low32(position));
        put32(&mut record, 32 + field * 4, high32(position));
    }
    let numbers =
        [(12, 44, counts.free_blocks), (14, 46, counts.free_inodes), (16, 48, counts.directories)];
    for (low, high, count) in numbers {
        put16(&mut record, low, low16(count));
        put16(&mut record, high, high16(count));
    }
    let uninit = if counts.untouched_inodes == GROUP_INODES { INODE_UNINIT } else { 0 };
    put16(&mut record, 18, INODE_ZEROED | uninit);
    put16(&mut record, 28, low16(counts.untouched_inodes));
    put16(&mut record, 50, high16(counts.untouched_inodes));
    let mut crc = crc16(0xffff, uuid);
    crc = crc16(crc, &group.to_le_bytes());
    crc = crc16(crc, &record[..30]);
    crc = crc16(crc, &record[32..]);
    put16(&mut record, 30, crc);
    record
}

/// CRC-16 with the reflected polynomial 0x8005, as gdt_csum wants it (kernel `lib/crc16.c`).
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
        // The check value of CRC-16/MODBUS, which is this one: initial value 0xffff, reflected
        // 0x8005.
        assert_eq!(crc16(0xffff, b"123456789"), 0x4b37);
    }
}
