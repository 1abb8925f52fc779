//! The check of a filesystem before the kernel of the host mounts it.
//!
//! The filesystem of an image comes from its author, and the kernel's ext4 was written for disks that their owner made.
//! It checks much, trusts the rest, and obeys what the superblock says: a policy of `errors=panic`, mount options as a text,
//! a journal to be replayed. [`check_mountable`] reads what a mount reads first (the superblock, all group descriptors,
//! the root inode) and refuses what no writer of images makes: numbers that contradict each other or the disk, places
//! outside it, tables that overlap, features that this kernel code need not have, orders to the kernel. It is no fsck:
//! directories and files are the kernel's to check, which gives an error for a damaged one.
//!
//! A native image is a disk as its author left it, made by any `mkfs` ([`ImageKind::Native`]): it may have more features, and a
//! journal that was not closed, which a read-only mount (`noload`) passes over and a writable one replays. Filesystems that this code does not know are
//! not refused in it: `attach --mount` mounts none, and a snapshotter names ext4. All other rules hold for it too. What is read
//! for them is what the mount reads next, so it costs no further request to the registry.
//!
//! An erofs of upstream is read-only by design, and has no such orders. It must be the one that upstream makes: without
//! compression, whose decoders in the kernel would read the image's bytes, without further devices, and within the disk.

use super::field::{get16, get32, get64};
use super::superblock::OFFSET;
use source::{ByteSource, SourceError};

/// Bytes of a superblock.
const RECORD: usize = 1024;

/// Reasons why a filesystem is not given to the kernel.
#[derive(Debug, Clone, thiserror::Error)]
pub enum MountableError {
    /// The disk could not be read.
    #[error("Cannot read the filesystem of the image")]
    Source(#[from] SourceError),
    /// Neither ext4 nor erofs.
    #[error("The image holds neither an ext4 nor an erofs filesystem")]
    NoFilesystem,
    /// A rule that it breaks.
    #[error("The filesystem of the image is not given to the kernel: {0}")]
    Refused(String),
}

/// Features by which the kernel changes the meaning of fields, and that images have: filetype, `meta_bg`, extents, 64bit,
/// `flex_bg`, `ea_inode`, `csum_seed`, largedir, `inline_data`.
const INCOMPATIBLE: u32 = 0x2 | 0x10 | 0x40 | 0x80 | 0x200 | 0x400 | 0x2000 | 0x4000 | 0x8000;

/// `sparse_super`, `large_file`, `btree_dir` (never used), `huge_file`, `gdt_csum`, `dir_nlink`, `extra_isize`,
/// `metadata_csum`, read-only, `shared_blocks`.
const READ_ONLY: u32 = 0x1 | 0x2 | 0x4 | 0x8 | 0x10 | 0x20 | 0x40 | 0x400 | 0x1000 | 0x4000;

const META_BG: u32 = 0x10;
const EXTENTS: u32 = 0x40;
/// What the kernel finds on disks that were in use as such: a journal to be replayed, encryption, case folding.
const INCOMPATIBLE_OF_DISKS: u32 = RECOVER | 0x1_0000 | 0x2_0000;

/// The same: quotas, project quotas, verity, files that were deleted while they were open.
const READ_ONLY_OF_DISKS: u32 = 0x100 | 0x2000 | 0x8000 | 0x1_0000;

/// Features of an erofs by which the kernel changes the meaning of fields, and that upstream's has: files in chunks, names of
/// extended attributes with a common prefix (`erofs_fs.h`: `INCOMPAT_CHUNKED_FILE`, `INCOMPAT_XATTR_PREFIXES`).
const EROFS_INCOMPATIBLE: u32 = 0x4 | 0x40;

/// Most groups: a disk of 16 TiB with blocks of 4 KiB, the largest that this program makes. The check keeps three places of
/// each group, 6 MiB, and the kernel some hundred bytes; a hostile image can claim thousands of millions.
const MOST_GROUPS: u64 = 1 << 17;

const RECOVER: u32 = 0x4;
const WIDE: u32 = 0x80;
const FLEX_BG: u32 = 0x200;
const HAS_JOURNAL: u32 = 0x4;

/// Where a filesystem comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ImageKind {
    /// The metadata of a meta image.
    Meta,
    /// The disk of a native image.
    Native,
}

/// The numbers of a superblock that the rest of the check needs.
struct MountNumbers {
    block: u64,
    first: u64,
    blocks: u64,
    group_blocks: u64,
    group_inodes: u64,
    inode_size: u64,
    descriptor: u64,
    groups: u64,
    first_meta_group: Option<u64>,
    backups: SuperblockCopies,
}

/// Groups with a copy of the superblock, for the places of descriptors with `meta_bg`.
enum SuperblockCopies {
    All,
    Powers,
    Two([u64; 2]),
}

impl SuperblockCopies {
    fn has(&self, group: u64) -> bool {
        let power = |base: u64| {
            let mut value = base;
            while value < group {
                value = value.saturating_mul(base);
            }
            value == group
        };
        group == 0
            || match self {
                Self::All => true,
                Self::Two(groups) => groups.contains(&group),
                Self::Powers => group == 1 || power(3) || power(5) || power(7),
            }
    }
}

fn refused<T>(rule: impl Into<String>) -> Result<T, MountableError> {
    Err(MountableError::Refused(rule.into()))
}

/// Checks that the filesystem on `disk`, of an image of this kind, may be mounted.
///
/// # Errors
/// [`MountableError`].
pub fn check_mountable(disk: &dyn ByteSource, kind: ImageKind) -> Result<(), MountableError> {
    match check_filesystem(disk, kind) {
        Err(MountableError::NoFilesystem) if kind == ImageKind::Native => Ok(()),
        result => result,
    }
}

fn check_filesystem(disk: &dyn ByteSource, kind: ImageKind) -> Result<(), MountableError> {
    if disk.len() < (OFFSET + RECORD) as u64 {
        return Err(MountableError::NoFilesystem);
    }
    let mut record = [0; RECORD];
    disk.read_exact_at(&mut record, OFFSET as u64)?;
    if get16(&record, 56) != 0xef53 {
        return check_erofs(disk, &record);
    }
    check_features(&record, kind)?;
    check_orders(&record)?;
    let numbers = check_numbers(&record, disk.len())?;
    let tables = check_groups(disk, &numbers)?;
    check_root(disk, &record, &numbers, tables)
}

/// The superblock by `struct erofs_super_block` of the kernel's `erofs_fs.h`.
fn check_erofs(disk: &dyn ByteSource, record: &[u8; RECORD]) -> Result<(), MountableError> {
    if get32(record, 0) != 0xe0f5_e1e2 {
        return Err(MountableError::NoFilesystem);
    }
    let bits = record[12];
    if !(9..=12).contains(&bits) {
        return refused(format!("its erofs has blocks of 2^{bits} bytes"));
    }
    let unknown = get32(record, 80) & !EROFS_INCOMPATIBLE;
    if unknown != 0 {
        return refused(format!(
            "its erofs has features that no image needs (incompat {unknown:#x})"
        ));
    }
    let devices = get16(record, 86);
    if devices != 0 {
        return refused(format!("its erofs has its data on {devices} further devices"));
    }
    let (blocks, tree) =
        (u64::from(get32(record, 36)) << bits, u64::from(get32(record, 40)) << bits);
    let root = tree + u64::from(get16(record, 14)) * 32;
    if blocks > disk.len() || root + 64 > disk.len() {
        return refused(format!(
            "its erofs claims {blocks} bytes and its root at {root}, on a disk of {}",
            disk.len()
        ));
    }
    let mut inode = [0; 64];
    disk.read_exact_at(&mut inode, root)?;
    if get16(&inode, 4) & 0xf000 != 0x4000 {
        return refused("the root of its erofs is not a directory");
    }
    Ok(())
}

fn check_features(record: &[u8], kind: ImageKind) -> Result<(), MountableError> {
    let (incompatible, read_only) = (get32(record, 96), get32(record, 100));
    let (may, may_read_only) = match kind {
        ImageKind::Meta => (INCOMPATIBLE, READ_ONLY),
        ImageKind::Native => (INCOMPATIBLE | INCOMPATIBLE_OF_DISKS, READ_ONLY | READ_ONLY_OF_DISKS),
    };
    if incompatible & !may & RECOVER != 0 {
        return refused("its journal must be replayed: it was not unmounted cleanly");
    }
    let unknown = (incompatible & !may, read_only & !may_read_only);
    if unknown != (0, 0) {
        return refused(format!(
            "it has features that no image needs (incompat {:#x}, ro_compat {:#x})",
            unknown.0, unknown.1
        ));
    }
    if read_only & 0x410 == 0x410 {
        return refused("it has gdt_csum and metadata_csum, which exclude each other");
    }
    Ok(())
}

/// What the superblock tells the kernel to do.
fn check_orders(record: &[u8]) -> Result<(), MountableError> {
    // s_errors: 1 continue, 2 read-only, 3 panic; 0 is taken for continue.
    match get16(record, 60) {
        0..=2 => {}
        3 => {
            return refused(
                "its superblock says that the kernel panics at an error (errors=panic)",
            );
        }
        other => {
            return refused(format!("its superblock has the unknown policy {other} of errors"));
        }
    }
    if record[512..576].iter().any(|&byte| byte != 0) {
        return refused("its superblock holds mount options as a text");
    }
    if get32(record, 92) & HAS_JOURNAL != 0 && (get32(record, 224), get32(record, 228)) != (8, 0) {
        return refused("its journal is not in inode 8");
    }
    Ok(())
}

fn check_numbers(record: &[u8], disk: u64) -> Result<MountNumbers, MountableError> {
    let (incompatible, read_only) = (get32(record, 96), get32(record, 100));
    let log = get32(record, 24);
    if log > 2 || get32(record, 28) != log {
        return refused(format!("its blocks have 2^{log} KiB, and the kernel takes 4 at most"));
    }
    let block = 1024u64 << log;
    let revision = get32(record, 76);
    if revision > 1 {
        return refused(format!("its revision is {revision}"));
    }
    let wide = incompatible & WIDE != 0;
    let blocks = if wide { get64(record, 4, 336) } else { u64::from(get32(record, 4)) };
    let first = u64::from(get32(record, 20));
    if first != u64::from(log == 0) || blocks <= first || blocks > disk / block {
        return refused(format!(
            "it claims {blocks} blocks of {block} bytes from {first} on, on a disk of {disk} bytes"
        ));
    }
    let high = |at: usize| if wide { u64::from(get32(record, at)) << 32 } else { 0 };
    let free = u64::from(get32(record, 12)) | high(344);
    let reserved = u64::from(get32(record, 8)) | high(340);
    let overhead = u64::from(get32(record, 584));
    if free > blocks || reserved > blocks || overhead > blocks {
        return refused(format!(
            "of its {blocks} blocks {free} are free, {reserved} reserved and {overhead} its own"
        ));
    }
    let group_blocks = u64::from(get32(record, 32));
    if !(256..=block * 8).contains(&group_blocks)
        || !group_blocks.is_multiple_of(8)
        || u64::from(get32(record, 36)) != group_blocks
    {
        return refused(format!("it claims {group_blocks} blocks per group"));
    }
    let inode_size = if revision == 0 { 128 } else { u64::from(get16(record, 88)) };
    if !inode_size.is_power_of_two() || !(128..=block).contains(&inode_size) {
        return refused(format!("it claims {inode_size} bytes per inode"));
    }
    let extra = u64::from(get16(record, 348).max(get16(record, 350)));
    if inode_size > 128 && extra > inode_size - 128 {
        return refused(format!("it claims {extra} further bytes in inodes of {inode_size}"));
    }
    let groups = (blocks - first).div_ceil(group_blocks);
    if groups > MOST_GROUPS {
        return refused(format!("it claims {groups} groups, and {MOST_GROUPS} are the most"));
    }
    let group_inodes = u64::from(get32(record, 40));
    let inodes = u64::from(get32(record, 0));
    if !(block / inode_size..=block * 8).contains(&group_inodes)
        || !group_inodes.is_multiple_of(8)
        || groups.checked_mul(group_inodes) != Some(inodes)
        || u64::from(get32(record, 16)) > inodes
    {
        return refused(format!(
            "it claims {inodes} inodes, {group_inodes} in each of {groups} groups, and {} free",
            get32(record, 16)
        ));
    }
    let first_inode = if revision == 0 { 11 } else { u64::from(get32(record, 84)) };
    if !(11..=inodes).contains(&first_inode) {
        return refused(format!("it claims {first_inode} as its first inode"));
    }
    let descriptor = if wide { u64::from(get16(record, 254)) } else { 32 };
    if !descriptor.is_power_of_two() || !(if wide { 64 } else { 32 }..=1024).contains(&descriptor) {
        return refused(format!("it claims {descriptor} bytes per group descriptor"));
    }
    let flex = record[372];
    if incompatible & FLEX_BG != 0 && flex > 31 {
        return refused(format!("it claims 2^{flex} groups per flex group"));
    }
    let reserved_descriptors = u64::from(get16(record, 206));
    if reserved_descriptors > block / 4 {
        return refused(format!("it reserves {reserved_descriptors} blocks for descriptors"));
    }
    let descriptor_blocks = (groups * descriptor).div_ceil(block);
    let first_meta_group = (incompatible & META_BG != 0).then(|| u64::from(get32(record, 260)));
    if first_meta_group.is_some_and(|first| first > descriptor_blocks) {
        return refused("its descriptors begin behind their end (first_meta_bg)");
    }
    let backups = if get32(record, 92) & 0x200 != 0 {
        SuperblockCopies::Two([u64::from(get32(record, 588)), u64::from(get32(record, 592))])
    } else if read_only & 0x1 != 0 {
        SuperblockCopies::Powers
    } else {
        SuperblockCopies::All
    };
    Ok(MountNumbers {
        block,
        first,
        blocks,
        group_blocks,
        group_inodes,
        inode_size,
        descriptor,
        groups,
        first_meta_group,
        backups,
    })
}

/// Checks all group descriptors; returns the first block of the first inode table.
fn check_groups(disk: &dyn ByteSource, numbers: &MountNumbers) -> Result<u64, MountableError> {
    let MountNumbers { block, first, blocks, descriptor, groups, .. } = *numbers;
    let per_block = block / descriptor;
    let table = (numbers.group_inodes * numbers.inode_size).div_ceil(block);
    // Everything that has one place only: superblock and descriptors first, then bitmaps and tables of each group.
    let mut taken = vec![(0, first + 1)];
    let mut root = 0;
    let mut bytes = vec![0; block as usize];
    for start in (0..groups).step_by(per_block as usize) {
        let nth = start / per_block;
        let place = match numbers.first_meta_group {
            Some(meta) if nth >= meta => {
                let group = first + start * numbers.group_blocks;
                // With blocks of 1 KiB, the superblock of group 0 is the block before.
                group + u64::from(numbers.backups.has(start))
            }
            _ => first + 1 + nth,
        };
        if place >= blocks {
            return refused(format!("the descriptors of group {start} lie outside of it"));
        }
        taken.push((place, place + 1));
        disk.read_exact_at(&mut bytes, place * block)?;
        for (group, record) in (start..groups).zip(bytes.chunks_exact(descriptor as usize)) {
            let wide = descriptor >= 64;
            let place = |low: usize, high: usize| {
                let high = if wide { get32(record, high) } else { 0 };
                u64::from(get32(record, low)) | u64::from(high) << 32
            };
            let count = |low: usize, high: usize| {
                let high = if wide { get16(record, high) } else { 0 };
                u64::from(get16(record, low)) | u64::from(high) << 16
            };
            let lens = [(place(0, 32), 1), (place(4, 36), 1), (place(8, 40), table)];
            for (start, len) in lens {
                let end = start.checked_add(len).filter(|&end| start > first && end <= blocks);
                let Some(end) = end else {
                    return refused(format!(
                        "a bitmap or table of group {group} lies outside of it"
                    ));
                };
                taken.push((start, end));
            }
            let (free, free_inodes) = (count(12, 44), count(14, 46));
            let (directories, unused) = (count(16, 48), count(28, 50));
            let most = free_inodes.max(directories).max(unused);
            if free > numbers.group_blocks || most > numbers.group_inodes {
                return refused(format!(
                    "group {group} counts {free} free blocks, {free_inodes} free and {unused} unused inodes and \
                     {directories} directories"
                ));
            }
            if group == 0 {
                root = place(8, 40);
            }
        }
    }
    taken.sort_unstable();
    if let Some(pair) = taken.windows(2).find(|pair| pair[0].1 > pair[1].0) {
        return refused(format!(
            "two of its bitmaps, tables and descriptors overlap at block {}",
            pair[1].0
        ));
    }
    Ok(root)
}

/// The root inode: a directory whose extents begin in it as the kernel reads them.
fn check_root(
    disk: &dyn ByteSource,
    superblock: &[u8],
    numbers: &MountNumbers,
    table: u64,
) -> Result<(), MountableError> {
    let mut inode = [0; 128];
    disk.read_exact_at(&mut inode, table * numbers.block + numbers.inode_size)?;
    if get16(&inode, 0) & 0xf000 != 0x4000 || get16(&inode, 26) == 0 {
        return refused("its root is not a directory");
    }
    let uses_extents = get32(&inode, 32) & 0x8_0000 != 0;
    if !uses_extents {
        return Ok(());
    }
    let (entries, most, depth) = (get16(&inode, 42), get16(&inode, 44), get16(&inode, 46));
    if get32(superblock, 96) & EXTENTS == 0
        || get16(&inode, 40) != 0xf30a
        || most != 4
        || entries > most
        || depth > 5
    {
        return refused("the extents of its root are damaged");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ext4::field::{put16, put32};
    use crate::ext4::{FilesystemIdentity, Geometry, Image, LayerRun, Tree};
    use crate::units::{Bytes, SECTOR};
    use source::MemorySource;

    /// The metadata of an empty image.
    fn sample() -> Vec<u8> {
        let size = Bytes(64 << 20);
        let mut image = Image::new(Geometry { size }, FilesystemIdentity::default()).unwrap();
        let blocks = image.commit_layer(&Tree::new()).unwrap();
        let mut disk = vec![0; size.0 as usize];
        for run in blocks.runs() {
            if let LayerRun::Metadata { lba, bytes } = run {
                let at = (lba.0 * SECTOR) as usize;
                disk[at..at + bytes.len()].copy_from_slice(bytes);
            }
        }
        disk
    }

    fn check(disk: &[u8]) -> Result<(), String> {
        check_kind(disk, ImageKind::Meta)
    }

    fn check_kind(disk: &[u8], kind: ImageKind) -> Result<(), String> {
        check_mountable(&MemorySource::new("disk", disk), kind).map_err(|error| error.to_string())
    }

    #[test]
    fn an_image_of_this_program_is_mountable_and_noise_is_no_filesystem() {
        assert_eq!(check(&sample()), Ok(()));
        assert!(check(&[7; 8192]).unwrap_err().contains("neither"));
        assert!(check(&[]).is_err());
    }

    #[test]
    fn what_the_kernel_would_trust_or_obey_is_refused_by_name() {
        type Change = fn(&mut [u8]);
        let cases: [(Change, &str); 16] = [
            (|record| put16(record, 60, 3), "errors=panic"),
            (|record| record[512..520].copy_from_slice(b"abort,\0\0"), "mount options"),
            (|record| put32(record, 4, u32::MAX), "blocks of 4096"),
            (|record| put32(record, 0, 7), "claims 7 inodes"),
            (|record| put32(record, 12, u32::MAX), "are free"),
            (|record| put32(record, 16, u32::MAX), "free"),
            (|record| put32(record, 32, 1), "blocks per group"),
            (|record| put32(record, 40, 0), "inodes"),
            (|record| put16(record, 88, 3), "bytes per inode"),
            (|record| put16(record, 254, 65535), "group descriptor"),
            (|record| put32(record, 96, get32(record, 96) | 0x4), "replayed"),
            (|record| put32(record, 96, get32(record, 96) | 0x8), "features"),
            (|record| put32(record, 100, get32(record, 100) | 0x1_0000), "features"),
            (|record| put32(record, 24, 6), "2^6 KiB"),
            (|record| record[584..588].fill(0xff), "its own"),
            (|record| put16(record, 206, u16::MAX), "for descriptors"),
        ];
        for (change, needle) in cases {
            let mut disk = sample();
            change(&mut disk[OFFSET..OFFSET + RECORD]);
            let text = check(&disk).unwrap_err();
            assert!(text.contains(needle), "{text}");
        }
    }

    #[test]
    fn the_disk_of_a_native_image_may_be_one_that_was_used_and_must_obey_the_same_rules() {
        let native = |disk: &[u8]| check_kind(disk, ImageKind::Native);
        assert_eq!(native(&sample()), Ok(()));
        assert_eq!(native(&[7; 8192]), Ok(()), "no filesystem that is mounted");
        let mut used = sample();
        let record = &mut used[OFFSET..OFFSET + RECORD];
        put32(record, 96, get32(record, 96) | RECOVER);
        put32(record, 100, get32(record, 100) | 0x1_0000);
        assert_eq!(native(&used), Ok(()));
        let mut panics = sample();
        put16(&mut panics[OFFSET..OFFSET + RECORD], 60, 3);
        assert!(native(&panics).unwrap_err().contains("errors=panic"));
        let mut outside = sample();
        put32(&mut outside[4096..], 8, u32::MAX);
        assert!(native(&outside).unwrap_err().contains("outside"));
    }

    #[test]
    fn more_groups_than_any_image_has_are_refused_before_they_are_read() {
        /// A disk of 2 PiB: the superblock, and nothing else that could be read.
        struct Huge(Vec<u8>);
        impl ByteSource for Huge {
            fn len(&self) -> u64 {
                2 << 50
            }
            fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> Result<(), SourceError> {
                assert_eq!(offset, OFFSET as u64);
                buf.copy_from_slice(&self.0[OFFSET..][..buf.len()]);
                Ok(())
            }
            fn name(&self) -> &str {
                "huge"
            }
        }
        let mut disk = sample();
        let record = &mut disk[OFFSET..OFFSET + RECORD];
        let groups = MOST_GROUPS + 1;
        let blocks = groups * u64::from(get32(record, 32));
        put32(record, 96, get32(record, 96) | WIDE);
        put32(record, 4, blocks as u32);
        put32(record, 336, (blocks >> 32) as u32);
        let text = check_mountable(&Huge(disk), ImageKind::Meta).unwrap_err().to_string();
        assert!(text.contains("131073 groups"), "{text}");
    }

    #[test]
    fn an_erofs_is_the_one_that_upstream_makes() {
        type Change = fn(&mut [u8]);
        let erofs = || {
            let mut disk = vec![0; 16384];
            put32(&mut disk[1024..], 0, 0xe0f5_e1e2);
            disk[1024 + 12] = 12;
            put16(&mut disk[1024..], 14, 1); // root
            put32(&mut disk[1024..], 36, 4); // blocks
            put32(&mut disk[1024..], 40, 1); // inodes begin in this block
            put16(&mut disk[4096 + 32..], 4, 0o040_755);
            disk
        };
        assert_eq!(check(&erofs()), Ok(()));
        let cases: [(Change, &str); 7] = [
            (|record| record[12] = 16, "2^16"),
            (|record| put32(record, 80, 1), "features"),
            (|record| put32(record, 80, 0x8), "features"),
            (|record| put16(record, 86, 1), "further devices"),
            (|record| put32(record, 36, 5), "claims"),
            (|record| put32(record, 40, 4), "claims"),
            (|record| put16(record, 14, 2), "not a directory"),
        ];
        for (change, needle) in cases {
            let mut disk = erofs();
            change(&mut disk[1024..2048]);
            let text = check(&disk).unwrap_err();
            assert!(text.contains(needle), "{text}");
        }
    }

    #[test]
    fn groups_that_point_outside_or_over_each_other_are_refused() {
        for (at, value, needle) in [
            (0, u32::MAX, "outside"),
            (8, 0, "outside"),
            (4, 1, "overlap"),
            (12, 0xffff_ffff, "counts"),
        ] {
            let mut disk = sample();
            put32(&mut disk[4096..], at, value);
            let text = check(&disk).unwrap_err();
            assert!(text.contains(needle), "{text}");
        }
        let mut disk = sample();
        let table = get32(&disk[4096..], 8) as usize;
        disk[table * 4096 + 256..][..128].fill(0);
        assert!(check(&disk).unwrap_err().contains("root"));
    }
}
