//! Positions of the fixed parts of the filesystem.
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
//! flex_bg allows all tables of a group anywhere. With all of them in front, the metadata is one short range
//! of the disk, and the rest is data for read-ahead.
//!
//! # Reason for the reverse order of the inode bitmaps
//!
//! Upstream's `overlaybd-apply` may write a native layer on top of a layer of this program. Its cache has
//! lines of 128 KiB and takes only whole 4 KiB blocks. Smaller or larger writes bypass it: the superblock,
//! and the descriptors of more than 8 GiB. They are overwritten when a line is written back with old bytes
//! (upstream `buffer_file.h:BufferFile`; e2fsck then finds wrong counts of groups). So it must never write a
//! single block near the descriptors. The inode bitmap of a group without inodes is safe there: it is marked
//! as uninitialised and never written. Upstream's own disks have reserved descriptor blocks in this position.

use super::Ext4Error;
use crate::units::{Bytes, Sectors};

/// Block size in bytes: equal to the page size, so that one block is one page of the reader's cache.
pub(super) const BLOCK: usize = 4096;

/// Sectors in a block.
pub(super) const BLOCK_SECTORS: u64 = BLOCK as u64 / crate::units::SECTOR;

/// Blocks in a group: the number of bits in a bitmap block.
pub(super) const GROUP_BLOCKS: u64 = BLOCK as u64 * 8;

/// Inodes in a group. One for 8 KiB of disk, twice the default of mkfs: an unused table is a hole and costs
/// nothing, but the bitmaps that cover the tables are ones, 128 bytes per group.
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
    /// 64 GiB, the size of upstream's converter.
    fn default() -> Self {
        Geometry { size: Bytes(64 << 30) }
    }
}

/// Blocks of one group's inode table on a new disk.
const TABLE_BLOCKS: u64 = GROUP_INODES as u64 * INODE as u64 / BLOCK as u64;

/// Positions of a group's bitmaps and inode table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct GroupPlaces {
    pub(super) block_bitmap: u64,
    pub(super) inode_bitmap: u64,
    pub(super) inode_table: u64,
}

/// Sizes and positions of the fixed parts: as drawn above for a new disk, as found for a continued one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct FilesystemLayout {
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
    /// Positions of the blocks of descriptors.
    pub(super) descriptors: Vec<u64>,
    /// One entry per group.
    pub(super) groups: Vec<GroupPlaces>,
    /// Start of the metadata region, which ends at the start of the data region. Only for new disks.
    pub(super) metadata: u64,
    pub(super) data: u64,
}

impl FilesystemLayout {
    pub(super) fn new(geometry: Geometry) -> Result<FilesystemLayout, Ext4Error> {
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
        // A sixteenth for metadata. This is no limit, as each region overflows into the other. The data
        // region starts on a 1 MiB boundary.
        let data = (metadata + blocks / 16).next_multiple_of(256);
        let places = |group| GroupPlaces {
            block_bitmap: block_bitmaps + group,
            inode_bitmap: inode_bitmaps + (groups - 1 - group),
            inode_table: inode_tables + group * TABLE_BLOCKS,
        };
        Ok(FilesystemLayout {
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

    /// Number of groups: at most 2^32 blocks in groups of at least 8 that all have a descriptor, so it fits.
    pub(super) fn group_count(&self) -> u32 {
        self.groups.len() as u32
    }

    /// Number of inodes of the filesystem.
    pub(super) fn inodes(&self) -> u32 {
        self.group_count().saturating_mul(self.group_inodes)
    }

    /// Number of blocks of a group.
    pub(super) fn blocks_in(&self, group: u32) -> u32 {
        let start = u64::from(group) * u64::from(self.group_blocks);
        (self.blocks - start).min(u64::from(self.group_blocks)) as u32
    }

    /// Blocks of one group's inode table.
    pub(super) fn table_blocks(&self) -> u64 {
        (u64::from(self.group_inodes) * self.inode_size as u64).div_ceil(BLOCK as u64)
    }

    /// The block with an inode in it, and its first byte there. `inode` is from 1 to [`FilesystemLayout::inodes`].
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
