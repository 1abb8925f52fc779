//! The superblock: the features of the filesystem, and the check that this program supports them.

use super::{ReadError, Source, damaged};
use crate::ext4::checksum::{Checksums, seed_of};
use crate::ext4::field::{get16, get32, get64, put32};
use crate::ext4::geometry::{BLOCK, Geometry};
use crate::ext4::hash::HashRule;
use crate::ext4::image::Rules;
use crate::ext4::superblock::{EXTRA_ISIZE, FIRST_INODE, OFFSET, seed_words};

/// Features by bit, as in the kernel's `EXT4_FEATURE_*`.
mod compatible {
    pub(super) const EXT_ATTR: u32 = 0x8;
    pub(super) const RESIZE_INODE: u32 = 0x10;
    pub(super) const DIR_INDEX: u32 = 0x20;
    pub(super) const SPARSE_SUPER2: u32 = 0x200;
}

mod incompatible {
    pub(super) const FILETYPE: u32 = 0x2;
    pub(super) const META_BG: u32 = 0x10;
    pub(super) const EXTENTS: u32 = 0x40;
    pub(super) const WIDE: u32 = 0x80;
    pub(super) const FLEX_BG: u32 = 0x200;
    pub(super) const CSUM_SEED: u32 = 0x2000;
    pub(super) const LARGEDIR: u32 = 0x4000;
    pub(super) const KNOWN: u32 =
        FILETYPE | META_BG | EXTENTS | WIDE | FLEX_BG | CSUM_SEED | LARGEDIR;
}

mod read_only {
    pub(super) const SPARSE_SUPER: u32 = 0x1;
    pub(super) const LARGE_FILE: u32 = 0x2;
    pub(super) const HUGE_FILE: u32 = 0x8;
    pub(super) const GDT_CSUM: u32 = 0x10;
    pub(super) const DIR_NLINK: u32 = 0x20;
    pub(super) const EXTRA_ISIZE: u32 = 0x40;
    pub(super) const METADATA_CSUM: u32 = 0x400;
    /// The bit 0x4 was never used.
    pub(super) const KNOWN: u32 = SPARSE_SUPER
        | LARGE_FILE
        | 0x4
        | HUGE_FILE
        | GDT_CSUM
        | DIR_NLINK
        | EXTRA_ISIZE
        | METADATA_CSUM;
}

/// Unsupported features by bit.
const REFUSED_INCOMPATIBLE: [(u32, &str); 10] = [
    (0x1, "compression"),
    (0x4, "a journal that must be replayed: it was not unmounted cleanly"),
    (0x8, "it is a journal device"),
    (0x100, "multi-mount protection (mmp)"),
    (0x400, "attributes in inodes of their own (ea_inode)"),
    (0x1000, "data in directories (dirdata)"),
    (0x8000, "files in inodes (inline_data)"),
    (0x1_0000, "encryption (encrypt)"),
    (0x2_0000, "names without case (casefold)"),
    (0x20, "the unknown feature incompat 0x20"),
];
const REFUSED_READ_ONLY: [(u32, &str); 9] = [
    (0x80, "snapshots (has_snapshot)"),
    (0x100, "quota"),
    (0x200, "clusters of blocks (bigalloc)"),
    (0x800, "replica"),
    (0x1000, "it is marked read-only (read-only)"),
    (0x2000, "project quota (project)"),
    (0x4000, "files that share blocks (shared_blocks)"),
    (0x8000, "verity"),
    (0x1_0000, "orphan files that must be freed (orphan_present): it was not unmounted cleanly"),
];

/// Flag for the hash of names as signed bytes; the next one for unsigned bytes.
const SIGNED_HASH: u32 = 1;
const UNSIGNED_HASH: u32 = 2;

/// The fields of the superblock.
pub(super) struct Superblock {
    /// Block 0, with the features that a later layer needs.
    pub(super) block: Box<[u8; BLOCK]>,
    pub(super) blocks: u64,
    pub(super) group_blocks: u32,
    pub(super) group_inodes: u32,
    pub(super) inode_size: usize,
    pub(super) descriptor_size: usize,
    pub(super) first_inode: u32,
    pub(super) checksums: Checksums,
    /// First group with its own blocks of descriptors (feature meta_bg), if any.
    pub(super) first_meta_group: Option<u32>,
    /// Reserved blocks behind the descriptors for more of them.
    pub(super) reserved_descriptors: u64,
    backups: Backups,
    hash: HashRule,
    extra_isize: u16,
    wide: bool,
}

/// Groups that begin with a copy of the superblock.
#[derive(Clone, Copy)]
enum Backups {
    All,
    Powers,
    Two([u32; 2]),
}

impl Superblock {
    pub(super) fn read(source: Source<'_>) -> Result<Self, ReadError> {
        if source.0.len() < BLOCK as u64 {
            return Err(ReadError::NotExt4);
        }
        let mut block = source.block(0)?;
        let record: &mut [u8] = &mut block[OFFSET..2 * OFFSET];
        if get16(record, 56) != 0xef53 {
            return Err(ReadError::NotExt4);
        }
        check_features(record)?;
        check_state(record)?;
        let incompatible = get32(record, 96);
        let compatible = get32(record, 92);
        let read_only = get32(record, 100);
        let wide = incompatible & incompatible::WIDE != 0;
        let blocks = get64(record, 4, 336) & if wide { u64::MAX } else { u64::from(u32::MAX) };
        let group_blocks = get32(record, 32);
        let group_inodes = get32(record, 40);
        let inode_size = usize::from(get16(record, 88));
        let descriptor_size = if wide { usize::from(get16(record, 254)) } else { 32 };
        let checksums = checksums(record, read_only, incompatible)?;
        let has_resize = compatible & compatible::RESIZE_INODE != 0;
        let superblock = Self {
            blocks,
            group_blocks,
            group_inodes,
            inode_size,
            descriptor_size,
            first_inode: get32(record, 84),
            checksums,
            first_meta_group: (incompatible & incompatible::META_BG != 0)
                .then(|| get32(record, 260)),
            reserved_descriptors: if has_resize { u64::from(get16(record, 206)) } else { 0 },
            backups: if compatible & compatible::SPARSE_SUPER2 != 0 {
                Backups::Two([get32(record, 588), get32(record, 592)])
            } else if read_only & read_only::SPARSE_SUPER != 0 {
                Backups::Powers
            } else {
                Backups::All
            },
            hash: HashRule {
                seed: seed_words(&record[236..252]),
                signed: get32(record, 352) & UNSIGNED_HASH == 0,
            },
            extra_isize: extra_isize(record, inode_size),
            wide,
            block: {
                adopt(record, inode_size);
                block
            },
        };
        superblock.check_numbers(source.0.len())?;
        Ok(superblock)
    }

    pub(super) fn rules(&self) -> Rules {
        Rules {
            checksums: self.checksums,
            hash: self.hash,
            extra_isize: self.extra_isize,
            first_inode: self.first_inode,
            wide: self.wide,
        }
    }

    /// Number of groups of the disk.
    pub(super) fn groups(&self) -> u32 {
        // At most 2^32 blocks in groups of at least 256.
        self.blocks.div_ceil(u64::from(self.group_blocks)) as u32
    }

    /// Number of descriptors in a block.
    pub(super) fn descriptors_in_block(&self) -> u32 {
        (BLOCK / self.descriptor_size) as u32
    }

    /// True if a group begins with the superblock or a copy of it.
    pub(super) fn has_superblock(&self, group: u32) -> bool {
        let power = |base: u32| {
            let mut value = base;
            while value < group {
                value = value.saturating_mul(base);
            }
            value == group
        };
        group == 0
            || match self.backups {
                Backups::All => true,
                Backups::Two(groups) => groups.contains(&group),
                Backups::Powers => group == 1 || power(3) || power(5) || power(7),
            }
    }

    fn check_numbers(&self, disk: u64) -> Result<(), ReadError> {
        let broken = |rule: String| Err(damaged("The superblock", rule));
        let Self { blocks, group_blocks, group_inodes, inode_size, descriptor_size, .. } = *self;
        if blocks == 0 || blocks > Geometry::MAX.0 / BLOCK as u64 || blocks > disk / BLOCK as u64 {
            return broken(format!("claims {blocks} blocks of 4096 B on a disk of {disk} B"));
        }
        if !(256..=BLOCK as u32 * 8).contains(&group_blocks) || !group_blocks.is_multiple_of(8) {
            return broken(format!("claims {group_blocks} blocks per group"));
        }
        if !inode_size.is_power_of_two() || !(128..=BLOCK).contains(&inode_size) {
            return broken(format!("claims {inode_size} B per inode"));
        }
        if !(8..=BLOCK as u32 * 8).contains(&group_inodes)
            || !group_inodes.is_multiple_of(8)
            || u64::from(self.groups()) * u64::from(group_inodes) > u64::from(u32::MAX)
            || get32(&self.block[..], OFFSET) != self.groups() * group_inodes
        {
            return broken(format!(
                "claims {group_inodes} inodes per group and {} in {} groups",
                get32(&self.block[..], OFFSET),
                self.groups()
            ));
        }
        let least = if self.wide { 64 } else { 32 };
        if !descriptor_size.is_power_of_two() || !(least..=1024).contains(&descriptor_size) {
            return broken(format!("claims {descriptor_size} B per group descriptor"));
        }
        if !(FIRST_INODE..=group_inodes).contains(&self.first_inode) {
            return broken(format!("claims {} as the first inode", self.first_inode));
        }
        Ok(())
    }
}

fn check_features(record: &[u8]) -> Result<(), ReadError> {
    let unsupported = |what: &str| ReadError::Unsupported(format!("it has {what}"));
    let (incompatible, read_only) = (get32(record, 96), get32(record, 100));
    let found = |refused: &[(u32, &str)], features: u32| {
        refused.iter().find(|(bit, _)| features & bit != 0).map(|(_, what)| unsupported(what))
    };
    if let Some(error) =
        found(&REFUSED_INCOMPATIBLE, incompatible).or_else(|| found(&REFUSED_READ_ONLY, read_only))
    {
        return Err(error);
    }
    let unknown = (incompatible & !incompatible::KNOWN, read_only & !read_only::KNOWN);
    if unknown != (0, 0) {
        let what =
            format!("unknown features (incompat {:#x}, ro_compat {:#x})", unknown.0, unknown.1);
        return Err(unsupported(&what));
    }
    if incompatible & incompatible::FILETYPE == 0 {
        return Err(unsupported("directories without file types (feature filetype is missing)"));
    }
    if get32(record, 24) != 2 {
        // log2(block size / 1024)
        let log = get32(record, 24);
        let size = 1024u64.checked_shl(log).filter(|_| log < 7).unwrap_or(0);
        return Err(unsupported(&format!("blocks of {size} B, not of 4096 B")));
    }
    if get32(record, 20) != 0 {
        return Err(damaged("The superblock", "claims that data begins behind block 0"));
    }
    Ok(())
}

fn check_state(record: &[u8]) -> Result<(), ReadError> {
    // Unmounted cleanly, without errors.
    if get16(record, 58) & 3 == 1 {
        return Ok(());
    }
    Err(ReadError::Unsupported("it was not unmounted cleanly, or has errors (s_state)".into()))
}

fn checksums(record: &[u8], read_only: u32, incompatible: u32) -> Result<Checksums, ReadError> {
    let mut uuid = [0; 16];
    uuid.copy_from_slice(&record[104..120]);
    if read_only & read_only::METADATA_CSUM != 0 {
        if record[373] != 1 {
            let what = format!("it has checksums of the unknown type {}", record[373]);
            return Err(ReadError::Unsupported(what));
        }
        let own = incompatible & incompatible::CSUM_SEED != 0;
        let seed = if own { get32(record, 624) } else { seed_of(&uuid) };
        return Ok(Checksums::Metadata { seed });
    }
    let of_groups = read_only & read_only::GDT_CSUM != 0;
    Ok(if of_groups { Checksums::Descriptors { uuid } } else { Checksums::None })
}

/// Extra bytes of a new inode: as many as the filesystem requests, at least enough for all times.
fn extra_isize(record: &[u8], inode_size: usize) -> u16 {
    let room = inode_size.saturating_sub(128) as u16;
    let wanted = get16(record, 350).max(EXTRA_ISIZE).min(room);
    wanted & !3
}

/// Turns on the features that a later layer uses: extents, indexed directories, large files, long times.
fn adopt(record: &mut [u8], inode_size: usize) {
    let mut or = |at: usize, bits: u32| {
        let value = get32(record, at) | bits;
        put32(record, at, value);
    };
    or(92, compatible::EXT_ATTR | compatible::DIR_INDEX);
    or(96, incompatible::EXTENTS);
    or(100, read_only::LARGE_FILE | read_only::HUGE_FILE | read_only::DIR_NLINK);
    if inode_size > 128 {
        or(100, read_only::EXTRA_ISIZE);
    }
    if get32(record, 352) & (SIGNED_HASH | UNSIGNED_HASH) == 0 {
        let flags = get32(record, 352) | SIGNED_HASH;
        put32(record, 352, flags);
    }
}
