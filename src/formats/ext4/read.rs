//! Reading of an existing ext4 filesystem, so that a layer can be added on top of it.
//!
//! [`read`] returns the state that the writer would have if it had made the lower layers itself: the
//! [`Tree`], and an [`Image`] with the filesystem's own geometry, bitmaps, checksums and hash. File data is
//! not touched: files keep their blocks, and their content is not read. All directories are read, all inodes
//! in use, and attribute blocks.
//!
//! # Accepted and refused filesystems
//!
//! All filesystems that mkfs makes with 4 KiB blocks are accepted: those of this program, of upstream's
//! forked libext2fs, and of mke2fs for ext2, ext3 and ext4. A later layer keeps the filesystem's own format
//! (descriptors of 32 or 64 bytes, inodes of 128 bytes and more, CRC-16 or CRC-32C) and uses the features of
//! ext4: extents, indexed directories. A filesystem that lacks these features gets them; older files keep
//! their indirect blocks. An unsupported feature is refused by name: a journal that must be replayed,
//! bigalloc, encryption, and so on.
//!
//! # Checks
//!
//! The checks make sure that a new layer cannot damage a lower file. Every block belongs to one owner and is
//! marked in use, or reading fails: a block that two files share could not be freed, and an unmarked block in
//! use would be given out. This also bounds the work for any input, but not the memory: a layer can show one block of names
//! at any number of places of the disk. So memory is reserved for what is kept, as it is read ([`read_within`]).
//!
//! New files get blocks that are free *and* were never written by a lower layer, because only those read as
//! zeros where a layer has no mapping ([`super::allocation`]).
//!
//! `lost+found` of mkfs belongs to the filesystem and not to the image: empty, owned by root, mode 0700, in
//! the first inode. It stays, and is not in the tree, as with the writer of this program.

mod blocks;
mod directory;
mod file;
mod groups;
mod indexed;
mod superblock;
mod walk;
mod xattr;

use super::allocation::{BlockRun, Blocks, Inodes, subtract};
use super::geometry::{BLOCK, BLOCK_SECTORS, FilesystemLayout, Geometry};
use super::image::Image;
use super::tree::Tree;
use crate::units::{Bytes, Sectors};
use groups::Groups;
use source::{ByteSource, OverBudget, Reserved, SourceError};
use superblock::Superblock;
use walk::Walk;

/// Reasons why a filesystem cannot be continued.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ReadError {
    /// The disk could not be read.
    #[error("Cannot read the filesystem of the lower layers")]
    Source(#[from] SourceError),
    /// There is no memory for what it contains.
    #[error(transparent)]
    Memory(#[from] OverBudget),
    /// There is no ext4 filesystem.
    #[error("The lower layers hold no ext4 filesystem: no magic number 0xef53 at byte 1080")]
    NotExt4,
    /// A form of ext4 that this program does not write.
    #[error(
        "The filesystem of the lower layers cannot be continued: {0}; convert the whole image anew"
    )]
    Unsupported(String),
    /// The filesystem contradicts itself.
    #[error(
        "The filesystem of the lower layers is damaged: {place} {rule}; convert the whole image anew"
    )]
    Damaged {
        /// The faulty part.
        place: String,
        /// The broken rule.
        rule: String,
    },
}

fn damaged(place: impl Into<String>, rule: impl Into<String>) -> ReadError {
    ReadError::Damaged { place: place.into(), rule: rule.into() }
}

/// Reads the filesystem on `disk`. `written` are the runs of sectors with data in any layer, ascending (first
/// sector, length); all others read as zeros.
///
/// # Errors
/// [`ReadError`] for any input that is not accepted.
pub fn read(
    disk: &dyn ByteSource,
    written: impl IntoIterator<Item = (Sectors, Sectors)>,
) -> Result<(Tree, Image), ReadError> {
    let (tree, image, _) = read_within(disk, written, Reserved::unbounded())?;
    Ok((tree, image))
}

/// As [`read`], with `memory` grown by what the tree and the image keep, and returned beside them.
///
/// # Errors
/// [`ReadError`]; [`ReadError::Memory`] when it has no room.
pub fn read_within(
    disk: &dyn ByteSource,
    written: impl IntoIterator<Item = (Sectors, Sectors)>,
    memory: Reserved,
) -> Result<(Tree, Image, Reserved), ReadError> {
    let source = Source(disk);
    let superblock = Superblock::read(source)?;
    let mut groups = Groups::read(source, &superblock, memory)?;
    let walk = Walk::whole(source, &superblock, &mut groups)?;
    let Groups {
        mut layout,
        descriptors,
        mut blocks,
        mut inodes,
        accounts,
        table,
        emitted,
        memory,
        ..
    } = groups;
    let data = match own_layout(&layout) {
        Some(own) => {
            layout = own;
            Some(layout.data)
        }
        None => None,
    };
    let free = subtract(&blocks.free_runs(), &whole_blocks(written));
    let free_inodes =
        free_inodes(&layout, &inodes, &accounts, superblock.first_inode, data.is_some());
    let data = data.unwrap_or_else(|| metadata_end(&free));
    blocks.settle();
    inodes.settle();
    let (tree, records, lost_and_found, shared_xattrs) = walk.finish()?;
    let image = Image {
        rules: superblock.rules(),
        blocks: Blocks::continued(&layout, blocks, &free, data),
        inodes: Inodes::continued(&layout, inodes, accounts, free_inodes),
        emitted,
        records,
        table,
        descriptors,
        undescribed: std::collections::BTreeSet::new(),
        superblock: superblock.block,
        lost_and_found,
        shared_xattrs,
        seen: tree.clock(),
        layout,
    };
    Ok((tree, image, memory))
}

/// The layout, if it is one of this program: its two regions are then known.
fn own_layout(layout: &FilesystemLayout) -> Option<FilesystemLayout> {
    let size = Bytes(layout.blocks * BLOCK as u64);
    let own = FilesystemLayout::new(Geometry { size }).ok()?;
    let same = FilesystemLayout { metadata: own.metadata, data: own.data, ..layout.clone() } == own;
    same.then_some(own)
}

/// Runs of sectors as runs of the blocks that they touch.
fn whole_blocks(sectors: impl IntoIterator<Item = (Sectors, Sectors)>) -> Vec<BlockRun> {
    let mut runs: Vec<BlockRun> = Vec::new();
    for (lba, len) in sectors {
        let start = lba.0 / BLOCK_SECTORS;
        let end = lba.0.saturating_add(len.0).div_ceil(BLOCK_SECTORS);
        match runs.last_mut() {
            Some(last) if last.start + last.count >= start => {
                last.count = last.count.max(end.saturating_sub(last.start));
            }
            _ => runs.push(BlockRun { start, count: end - start }),
        }
    }
    runs
}

/// End of the metadata region on a disk of another program: behind a sixteenth of the free blocks.
fn metadata_end(free: &[BlockRun]) -> u64 {
    let mut left = free.iter().map(|run| run.count).sum::<u64>() / 16;
    for run in free {
        if run.count > left {
            return run.start + left;
        }
        left -= run.count;
    }
    0
}

/// The free inode numbers, less one. On a disk of this program, numbers only go up, so that a layer is the
/// same if the lower layers were made by this process or read back; freed numbers come last.
fn free_inodes(
    layout: &FilesystemLayout,
    inodes: &super::allocation::Bitmaps,
    accounts: &[super::allocation::InodeAccount],
    first: u32,
    own: bool,
) -> Vec<BlockRun> {
    let reserved = BlockRun { start: 0, count: u64::from(first - 1) };
    let free = subtract(&inodes.free_runs(), &[reserved]);
    if !own {
        return free;
    }
    let per_group = u64::from(layout.group_inodes);
    let touched = (0..)
        .zip(accounts)
        .filter(|(_, account)| account.untouched < layout.group_inodes)
        .map(|(group, account)| (group + 1) * per_group - u64::from(account.untouched))
        .max()
        .unwrap_or(0);
    let total = u64::from(layout.inodes());
    let next = BlockRun { start: touched, count: total - touched };
    let mut runs = subtract(&free, &[BlockRun { start: 0, count: touched }]);
    // `lost+found`, in the first inode, is claimed and never taken.
    runs.extend(subtract(&free, &[BlockRun { start: u64::from(first - 1), count: 1 }, next]));
    runs
}

/// Reads whole blocks of the disk.
#[derive(Clone, Copy)]
struct Source<'v>(&'v dyn ByteSource);

impl Source<'_> {
    fn block(self, number: u64) -> Result<Box<[u8; BLOCK]>, ReadError> {
        let mut block = Box::new([0; BLOCK]);
        self.0.read_exact_at(&mut block[..], number.saturating_mul(BLOCK as u64))?;
        Ok(block)
    }
}
