//! Group descriptors: positions of a group's bitmaps and inode table, and counts of its free blocks and
//! inodes.

use super::checksum::Checksums;
use super::field::{get16, high16, high32, low16, low32, put16, put32};
use super::geometry::{DESCRIPTOR, FilesystemLayout, GroupPlaces};

/// The inode bitmap was never written: no inode of the group is in use.
pub(super) const INODE_UNINIT: u16 = 1;
/// The block bitmap was never written: only the blocks of the filesystem itself are in use.
pub(super) const BLOCK_UNINIT: u16 = 2;
/// The unused part of the inode table reads as zeros; no initialisation is left to do.
const INODE_ZEROED: u16 = 4;
/// Fields of the block bitmap's checksum: the low and the high half.
pub(super) const BLOCK_BITMAP_SUM: (usize, usize) = (24, 56);
/// Fields of the inode bitmap's checksum: the low and the high half.
pub(super) const INODE_BITMAP_SUM: (usize, usize) = (26, 58);
/// Descriptors from this size on have the high halves of all fields.
const WIDE: usize = 64;

/// Free blocks and inodes of a group.
#[derive(Clone, Copy, Debug)]
pub(super) struct Counts {
    pub(super) free_blocks: u32,
    pub(super) free_inodes: u32,
    pub(super) directories: u32,
    /// Inodes at the end of the table that were never used.
    pub(super) untouched_inodes: u32,
}

/// The descriptors of an empty new disk, in whole blocks, without their counts.
pub(super) fn fresh(layout: &FilesystemLayout) -> Vec<u8> {
    let mut bytes = vec![0; layout.descriptors.len() * super::geometry::BLOCK];
    for (record, places) in bytes.chunks_exact_mut(DESCRIPTOR).zip(&layout.groups) {
        let GroupPlaces { block_bitmap, inode_bitmap, inode_table } = *places;
        for (field, position) in [block_bitmap, inode_bitmap, inode_table].into_iter().enumerate() {
            put32(record, field * 4, low32(position));
            put32(record, 32 + field * 4, high32(position));
        }
        put16(record, 18, INODE_ZEROED | INODE_UNINIT);
    }
    bytes
}

/// Writes the counts of a group into its descriptor. `blocks` is true if the block bitmap is written.
pub(super) fn update(
    record: &mut [u8],
    counts: Counts,
    layout: &FilesystemLayout,
    sums: Checksums,
    blocks: bool,
) {
    let numbers =
        [(12, 44, counts.free_blocks), (14, 46, counts.free_inodes), (16, 48, counts.directories)];
    let wide = record.len() >= WIDE;
    for (low, high, count) in numbers {
        put16(record, low, low16(count));
        if wide {
            put16(record, high, high16(count));
        }
    }
    if !sums.of_descriptors() {
        return;
    }
    let mut flags = get16(record, 18);
    if counts.untouched_inodes < layout.group_inodes {
        flags &= !INODE_UNINIT;
    }
    if blocks {
        flags &= !BLOCK_UNINIT;
    }
    put16(record, 18, flags);
    put16(record, 28, low16(counts.untouched_inodes));
    if wide {
        put16(record, 50, high16(counts.untouched_inodes));
    }
}
