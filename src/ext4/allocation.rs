//! Which blocks and inodes are in use.
//!
//! Blocks are given out by two pointers that only move up, one for metadata and one for file data.
//! A freed block is marked free and yet never given out again, by no layer: an upper layer that
//! takes a block over without writing all of it would let the lower layer's bytes shine through.

use std::collections::{BTreeMap, BTreeSet};

use super::Ext4Error;
use super::geometry::{BLOCK, GROUP_BLOCKS, GROUP_INODES, Layout};
use crate::units::Bytes;

/// Bits of a bitmap block.
const BITS: u32 = GROUP_BLOCKS as u32;

/// One bitmap a group; a group that was never touched has none and is all free.
#[derive(Debug)]
pub(super) struct Bitmaps {
    /// Objects of each full group.
    per_group: u32,
    /// Objects of all groups.
    total: u64,
    pages: BTreeMap<u32, Box<[u8; BLOCK]>>,
    used: Vec<u32>,
    dirty: BTreeSet<u32>,
}

impl Bitmaps {
    fn new(per_group: u32, total: u64, groups: u32) -> Bitmaps {
        let used = vec![0; groups as usize];
        Bitmaps { per_group, total, pages: BTreeMap::new(), used, dirty: BTreeSet::new() }
    }

    /// Objects of `group` in use.
    pub(super) fn used(&self, group: u32) -> u32 {
        self.used[group as usize]
    }

    /// Objects of `group`.
    fn valid(&self, group: u32) -> u32 {
        let start = u64::from(group) * u64::from(self.per_group);
        u64::from(self.per_group).min(self.total - start) as u32
    }

    /// Objects free in all groups.
    pub(super) fn free(&self) -> u64 {
        self.total - self.used.iter().map(|&used| u64::from(used)).sum::<u64>()
    }

    /// Groups whose bitmap changed since the last call, with their bitmaps.
    pub(super) fn take_dirty(&mut self) -> Vec<(u32, &[u8; BLOCK])> {
        let dirty = std::mem::take(&mut self.dirty);
        dirty
            .into_iter()
            .filter_map(|group| self.pages.get(&group).map(|page| (group, &**page)))
            .collect()
    }

    /// Makes the bitmap of a group exist. Bits past the group's last object must be ones.
    fn touch(&mut self, group: u32) -> &mut [u8; BLOCK] {
        let valid = self.valid(group);
        self.dirty.insert(group);
        self.pages.entry(group).or_insert_with(|| {
            let mut page = Box::new([0; BLOCK]);
            change(&mut page, valid, BITS, true);
            page
        })
    }

    fn mark(&mut self, first: u64, count: u64, in_use: bool) {
        let end = first + count;
        let mut at = first;
        while at < end {
            let group = (at / u64::from(self.per_group)) as u32;
            let start = u64::from(group) * u64::from(self.per_group);
            let stop = end.min(start + u64::from(self.per_group));
            let (from, to) = ((at - start) as u32, (stop - start) as u32);
            change(self.touch(group), from, to, in_use);
            let used = &mut self.used[group as usize];
            *used = if in_use { *used + (to - from) } else { *used - (to - from) };
            at = stop;
        }
    }
}

/// Sets or clears the bits `from..to`, whole bytes at once.
fn change(page: &mut [u8; BLOCK], from: u32, to: u32, value: bool) {
    let mut bit = from;
    while bit < to {
        let byte = &mut page[(bit / 8) as usize];
        if bit.is_multiple_of(8) && to - bit >= 8 {
            *byte = if value { 0xff } else { 0 };
            bit += 8;
        } else {
            let mask = 1 << (bit % 8);
            *byte = if value { *byte | mask } else { *byte & !mask };
            bit += 1;
        }
    }
}

/// A run of blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct BlockRun {
    pub(super) start: u64,
    pub(super) count: u64,
}

/// The blocks of the disk.
#[derive(Debug)]
pub(super) struct Blocks {
    pub(super) bitmaps: Bitmaps,
    metadata: BlockRun,
    data: BlockRun,
    size: Bytes,
}

impl Blocks {
    pub(super) fn new(layout: &Layout) -> Blocks {
        let mut bitmaps = Bitmaps::new(BITS, layout.blocks, layout.groups);
        bitmaps.mark(0, layout.metadata, true);
        let last = layout.groups - 1;
        if bitmaps.valid(last) < BITS {
            bitmaps.touch(last);
        }
        let metadata = BlockRun { start: layout.metadata, count: layout.data - layout.metadata };
        let data = BlockRun { start: layout.data, count: layout.blocks - layout.data };
        Blocks { bitmaps, metadata, data, size: Bytes(layout.blocks * BLOCK as u64) }
    }

    /// One block for metadata.
    pub(super) fn metadata_block(&mut self) -> Result<u64, Ext4Error> {
        Ok(self.take(1, false)?.start)
    }

    /// Up to `count` (at least 1) consecutive blocks for metadata or for file data.
    pub(super) fn take(&mut self, count: u64, data: bool) -> Result<BlockRun, Ext4Error> {
        let (first, second) = if data {
            (&mut self.data, &mut self.metadata)
        } else {
            (&mut self.metadata, &mut self.data)
        };
        let region = if first.count > 0 { first } else { second };
        let taken = BlockRun { start: region.start, count: count.min(region.count) };
        if taken.count == 0 {
            return Err(Ext4Error::NoBlocks { size: self.size });
        }
        region.start += taken.count;
        region.count -= taken.count;
        self.bitmaps.mark(taken.start, taken.count, true);
        Ok(taken)
    }

    /// Fails early if `count` blocks are not to be had.
    pub(super) fn require(&self, count: u64) -> Result<(), Ext4Error> {
        if count > self.data.count + self.metadata.count {
            return Err(Ext4Error::NoBlocks { size: self.size });
        }
        Ok(())
    }

    /// Marks blocks free.
    pub(super) fn free(&mut self, run: BlockRun) {
        self.bitmaps.mark(run.start, run.count, false);
    }
}

/// The inodes of the filesystem. Numbers go up and are never reused.
#[derive(Debug)]
pub(super) struct Inodes {
    pub(super) bitmaps: Bitmaps,
    /// Directories by group.
    directories: Vec<u32>,
    /// The number to give out next.
    next: u32,
    /// The highest one.
    last: u32,
}

impl Inodes {
    /// All numbers below `first` are in use; `first` itself is only given out by [`Inodes::claim`].
    pub(super) fn new(layout: &Layout, first: u32) -> Inodes {
        let last = layout.inodes();
        let mut bitmaps = Bitmaps::new(GROUP_INODES, u64::from(last), layout.groups);
        bitmaps.mark(0, u64::from(first - 1), true);
        Inodes { bitmaps, directories: vec![0; layout.groups as usize], next: first + 1, last }
    }

    /// Takes a free number for a directory.
    pub(super) fn claim(&mut self, number: u32) {
        self.bitmaps.mark(u64::from(number - 1), 1, true);
        self.count_directory(number);
    }

    /// The next free number.
    pub(super) fn take(&mut self, directory: bool) -> Result<u32, Ext4Error> {
        let number = self.next;
        if number > self.last {
            return Err(Ext4Error::NoInodes { inodes: self.last });
        }
        self.next += 1;
        self.bitmaps.mark(u64::from(number - 1), 1, true);
        if directory {
            self.count_directory(number);
        }
        Ok(number)
    }

    /// Counts a directory whose inode was reserved.
    pub(super) fn count_directory(&mut self, number: u32) {
        self.directories[group_of(number)] += 1;
    }

    /// Marks a number free.
    pub(super) fn free(&mut self, number: u32, directory: bool) {
        self.bitmaps.mark(u64::from(number - 1), 1, false);
        if directory {
            self.directories[group_of(number)] -= 1;
        }
    }

    /// Directories in `group`.
    pub(super) fn directories(&self, group: u32) -> u32 {
        self.directories[group as usize]
    }

    /// Inodes at the end of `group` that were never given out.
    pub(super) fn untouched(&self, group: u32) -> u32 {
        let end = (group + 1) * GROUP_INODES;
        (end + 1).saturating_sub(self.next).min(GROUP_INODES)
    }
}

fn group_of(number: u32) -> usize {
    ((number - 1) / GROUP_INODES) as usize
}
