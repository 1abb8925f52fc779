//! Where the fixed parts of the filesystem lie.
//!
//! ```text
//! block 0      superblock (at byte 1024)
//! 1 ..         group descriptors, 64 bytes a group
//! ..           inode bitmaps, one block a group, the last group's first
//! ..           block bitmaps, one block a group
//! ..           inode tables: one contiguous array, inode n at (n - 1) * 256
//! ..           metadata region: directories, extent trees, attributes, long symbolic links
//! ..           data region: file data in the order of the tar
//! ```
//!
//! flex_bg allows all of a group's tables anywhere; putting them all in front makes everything that
//! is metadata one short range of the disk, and leaves the rest to data that read-ahead may run
//! through.
//!
//! # Why the last inode bitmaps come first
//!
//! Upstream's `overlaybd-apply` may write a native layer on top of ours. It goes through a cache with lines of
//! 128 KiB that only whole 4 KiB blocks pass; what is larger or smaller, as the superblock and the descriptors of more than 8 GiB are,
//! goes around it, and is overwritten when a line comes back with old bytes
//! (upstream `buffer_file.h:BufferFile`; e2fsck then finds groups counted wrong). It has to be kept from
//! writing any single block near the descriptors. The inode bitmap of a group without inodes is such a block:
//! it is marked as uninitialised, and nobody writes it. Upstream's own disks have reserved descriptor blocks there.

use super::Ext4Error;
use crate::units::{Bytes, Sectors};

/// Block size in bytes: the page size, so that one block is one page of the reader's cache.
pub(super) const BLOCK: usize = 4096;

/// Sectors in a block.
pub(super) const BLOCK_SECTORS: u64 = BLOCK as u64 / crate::units::SECTOR;

/// Blocks in a group: as many as one bitmap block has bits.
pub(super) const GROUP_BLOCKS: u64 = BLOCK as u64 * 8;

/// Inodes in a group. One for 8 KiB of disk, twice mkfs's default: unused table is a hole and costs
/// nothing, but the bitmaps that cover the tables are ones, 128 bytes a group.
pub(super) const GROUP_INODES: u32 = 16_384;

/// Bytes of an inode.
pub(super) const INODE: usize = 256;

/// Bytes of a group descriptor, with the 64bit feature.
pub(super) const DESCRIPTOR: usize = 64;

/// Size of the virtual disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// A multiple of 4 KiB, from 64 MiB to 16 TiB.
    pub size: Bytes,
}

impl Geometry {
    /// The smallest disk.
    pub const MIN: Bytes = Bytes(64 << 20);
    /// The largest: 2^32 blocks, the most that one file's logical blocks can address.
    pub const MAX: Bytes = Bytes(16 << 40);
}

impl Default for Geometry {
    /// 64 GiB, as upstream's converter.
    fn default() -> Self {
        Geometry { size: Bytes(64 << 30) }
    }
}

/// Blocks of one group's inode table on a disk of ours.
const TABLE_BLOCKS: u64 = GROUP_INODES as u64 * INODE as u64 / BLOCK as u64;

/// Where a group keeps its accounts and its inodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct GroupPlaces {
    pub(super) block_bitmap: u64,
    pub(super) inode_bitmap: u64,
    pub(super) inode_table: u64,
}

/// Sizes and places of the fixed parts: as drawn above for a disk of our own making, as found for
/// another's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    /// Blocks of the disk.
    pub(super) blocks: u64,
    /// Blocks of a group; the last group may be short.
    pub(super) group_blocks: u32,
    /// Inodes of a group.
    pub(super) group_inodes: u32,
    /// Bytes of an inode: a power of two from 128 to 4096.
    pub(super) inode_size: usize,
    /// Bytes of a descriptor: a power of two from 32 to 1024.
    pub(super) descriptor_size: usize,
    /// Where the blocks of descriptors are.
    pub(super) descriptors: Vec<u64>,
    /// One a group.
    pub(super) groups: Vec<GroupPlaces>,
    /// Start of the metadata region, which ends where the data region begins. Of our own disks only.
    pub(super) metadata: u64,
    pub(super) data: u64,
}

impl Layout {
    pub(super) fn new(geometry: Geometry) -> Result<Layout, Ext4Error> {
        let size = geometry.size;
        if size < Geometry::MIN || size > Geometry::MAX || !size.0.is_multiple_of(BLOCK as u64) {
            return Err(Ext4Error::BadSize { size });
        }
        let blocks = size.0 / BLOCK as u64;
        let groups = blocks.div_ceil(GROUP_BLOCKS);
        let descriptors = 1;
        let inode_bitmaps = descriptors + (groups * DESCRIPTOR as u64).div_ceil(BLOCK as u64);
        let block_bitmaps = inode_bitmaps + groups;
        let inode_tables = block_bitmaps + groups;
        let metadata = inode_tables + groups * TABLE_BLOCKS;
        // A sixteenth for metadata; each region overflows into the other, so this is no limit. The
        // data region starts on a 1 MiB boundary.
        let data = (metadata + blocks / 16).next_multiple_of(256);
        let places = |group| GroupPlaces {
            block_bitmap: block_bitmaps + group,
            inode_bitmap: inode_bitmaps + (groups - 1 - group),
            inode_table: inode_tables + group * TABLE_BLOCKS,
        };
        Ok(Layout {
            blocks,
            group_blocks: GROUP_BLOCKS as u32,
            group_inodes: GROUP_INODES,
            inode_size: INODE,
            descriptor_size: DESCRIPTOR,
            descriptors: (descriptors..inode_bitmaps).collect(),
            groups: (0..groups).map(places).collect(),
            metadata,
            data,
        })
    }

    /// Groups: at most 2^32 blocks in groups of at least 8 that all have a descriptor, so this fits.
    pub(super) fn group_count(&self) -> u32 {
        self.groups.len() as u32
    }

    /// Inodes of the filesystem.
    pub(super) fn inodes(&self) -> u32 {
        self.group_count().saturating_mul(self.group_inodes)
    }

    /// Blocks of a group.
    pub(super) fn blocks_in(&self, group: u32) -> u32 {
        let start = u64::from(group) * u64::from(self.group_blocks);
        (self.blocks - start).min(u64::from(self.group_blocks)) as u32
    }

    /// Blocks of one group's inode table.
    pub(super) fn table_blocks(&self) -> u64 {
        (u64::from(self.group_inodes) * self.inode_size as u64).div_ceil(BLOCK as u64)
    }

    /// The block that holds an inode, and the first byte of it there. `inode` is from 1 to
    /// [`Layout::inodes`].
    pub(super) fn inode_place(&self, inode: u32) -> (u64, usize) {
        let (group, nth) = ((inode - 1) / self.group_inodes, (inode - 1) % self.group_inodes);
        let at = nth as usize * self.inode_size;
        (self.groups[group as usize].inode_table + (at / BLOCK) as u64, at % BLOCK)
    }
}

/// The disk position of a block.
pub(super) fn sector_of(block: u64) -> Sectors {
    Sectors(block * BLOCK_SECTORS)
}
