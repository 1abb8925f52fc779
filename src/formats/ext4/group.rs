//! Group descriptors: where a group's bitmaps and inode table lie, and what of it is free.

use super::checksum::Checksums;
use super::field::{get16, high16, high32, low16, low32, put16, put32};
use super::geometry::{DESCRIPTOR, GroupPlaces, Layout};

/// The inode bitmap was never written: no inode of the group is in use.
pub(super) const INODE_UNINIT: u16 = 1;
/// The block bitmap was never written: in use are the blocks of the filesystem itself.
pub(super) const BLOCK_UNINIT: u16 = 2;
/// What of the inode table is unused reads as zeros; nothing is left to initialise.
const INODE_ZEROED: u16 = 4;
/// Fields of the checksums of the bitmaps: the low and the high halves.
pub(super) const BLOCK_BITMAP_SUM: (usize, usize) = (24, 56);
/// See [`BLOCK_BITMAP_SUM`].
pub(super) const INODE_BITMAP_SUM: (usize, usize) = (26, 58);
/// Descriptors from this size on have the high halves of all fields.
const WIDE: usize = 64;

/// What a group has left.
#[derive(Clone, Copy, Debug)]
pub(super) struct Counts {
    pub(super) free_blocks: u32,
    pub(super) free_inodes: u32,
    pub(super) directories: u32,
    /// Inodes at the table's end that were never used.
    pub(super) untouched_inodes: u32,
}

/// The descriptors of an empty disk of ours, in whole blocks; each lacks its counts.
pub(super) fn fresh(layout: &Layout) -> Vec<u8> {
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

/// Notes the counts of a group in its descriptor. `blocks` says that the block bitmap is written.
pub(super) fn update(
    record: &mut [u8],
    counts: Counts,
    layout: &Layout,
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
