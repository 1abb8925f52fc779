//! The superblock, and the features of the filesystem.

use super::checksum::Checksums;
use super::field::{high32, low32, put16, put32};
use super::geometry::{BLOCK, DESCRIPTOR, FilesystemLayout};
use super::hash::HALF_MD4;

/// Offset of the superblock in block 0: the first KiB belongs to a boot loader.
pub(super) const OFFSET: usize = 1024;

/// First inode number that is not reserved; `lost+found` by custom.
pub(super) const FIRST_INODE: u32 = 11;

/// ext_attr, dir_index, sparse_super2. The last one with no backup groups listed means: no backups.
const COMPATIBLE: u32 = 0x8 | 0x20 | 0x200;
/// filetype, extents, 64bit, flex_bg.
const INCOMPATIBLE: u32 = 0x2 | 0x40 | 0x80 | 0x200;
/// sparse_super, large_file, huge_file, uninit_bg (checksummed descriptors), dir_nlink,
/// extra_isize.
const READ_ONLY_COMPATIBLE: u32 = 0x1 | 0x2 | 0x8 | 0x10 | 0x20 | 0x40;

/// Bytes of an inode's fixed part that lie beyond the first 128.
pub(super) const EXTRA_ISIZE: u16 = 32;

/// Properties that distinguish one filesystem from another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FilesystemIdentity {
    /// UUID. It also seeds the checksum of group descriptors.
    pub uuid: [u8; 16],
    /// Volume name, padded with NUL.
    pub label: [u8; 16],
    /// Seed of the hash that sorts large directories.
    pub hash_seed: [u8; 16],
}

impl Default for FilesystemIdentity {
    /// Fixed, so that equal layers give equal bytes and layers deduplicate between images. ext4 mounts any
    /// number of filesystems with one UUID.
    fn default() -> Self {
        const UUID: [u8; 16] = [
            0x74, 0x75, 0x72, 0x62, 0x6f, 0x62, 0x44, 0x00, 0x80, 0x00, 0x65, 0x78, 0x74, 0x34,
            0x00, 0x01,
        ];
        FilesystemIdentity { uuid: UUID, label: *b"turbobd\0\0\0\0\0\0\0\0\0", hash_seed: UUID }
    }
}

impl FilesystemIdentity {}

/// The seed of hashes as their four start words.
pub(super) fn seed_words(seed: &[u8]) -> [u32; 4] {
    let mut words = [0; 4];
    for (word, bytes) in words.iter_mut().zip(seed.chunks_exact(4)) {
        *word = bytes.iter().rev().fold(0, |word, &byte| word << 8 | u32::from(byte));
    }
    words
}

/// Writes the free counts into block 0, and its checksum.
pub(super) fn update(
    block: &mut [u8; BLOCK],
    free_blocks: u64,
    free_inodes: u32,
    sums: Checksums,
    wide: bool,
) {
    let record = &mut block[OFFSET..2 * OFFSET];
    put32(record, 12, low32(free_blocks));
    put32(record, 16, free_inodes);
    if wide {
        put32(record, 344, high32(free_blocks));
    }
    sums.seal_superblock(record);
}

/// Block 0 of a new disk, without the free counts. All times are zero: the bytes must not depend on the time
/// of creation.
pub(super) fn fresh(layout: &FilesystemLayout, identity: &FilesystemIdentity) -> [u8; BLOCK] {
    let mut block = [0; BLOCK];
    let record = &mut block[OFFSET..2 * OFFSET];
    put32(record, 0, layout.inodes());
    put32(record, 4, low32(layout.blocks));
    put32(record, 24, 2); // log2(block size / 1024)
    put32(record, 28, 2); // log2(cluster size / 1024)
    put32(record, 32, layout.group_blocks);
    put32(record, 36, layout.group_blocks);
    put32(record, 40, layout.group_inodes);
    put16(record, 54, 0xffff); // never check for the number of mounts
    put16(record, 56, 0xef53); // magic
    put16(record, 58, 1); // cleanly unmounted
    put16(record, 60, 1); // on errors: continue
    put32(record, 76, 1); // revision with variable inode size
    put32(record, 84, FIRST_INODE);
    put16(record, 88, layout.inode_size as u16);
    put32(record, 92, COMPATIBLE);
    put32(record, 96, INCOMPATIBLE);
    put32(record, 100, READ_ONLY_COMPATIBLE);
    record[104..120].copy_from_slice(&identity.uuid);
    record[120..136].copy_from_slice(&identity.label);
    record[236..252].copy_from_slice(&identity.hash_seed);
    record[252] = HALF_MD4;
    put16(record, 254, DESCRIPTOR as u16);
    put32(record, 256, 0xc); // mount options by default: user_xattr, acl
    put32(record, 336, high32(layout.blocks));
    put16(record, 348, EXTRA_ISIZE); // least extra size of inodes
    put16(record, 350, EXTRA_ISIZE); // requested extra size
    put32(record, 352, 2); // names are hashed as unsigned bytes
    record[372] = layout.group_count().next_power_of_two().ilog2() as u8; // log2(groups per flex group): one holds all
    // Saves the kernel the sum over all groups at mount; 32 bits are enough for the tables of 2^17 groups.
    put32(record, 584, low32(layout.metadata));
    block
}
