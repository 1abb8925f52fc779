//! Allocation of blocks and inodes.
//!
//! Blocks are allocated in ascending order from two lists of runs, one for metadata and one for file data; on
//! a new disk each list begins as one run. A freed block is marked free, but no layer uses it again: if an
//! upper layer took over a block without writing all of it, the lower layer's bytes would be visible. For the
//! same reason, the lists of a continued disk omit free blocks that were ever written.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use super::Ext4Error;
use super::geometry::{BLOCK, FilesystemLayout};
use crate::units::Bytes;

/// Bits of a bitmap block.
const BITS: u32 = BLOCK as u32 * 8;

/// One bitmap per group; a group that was never touched has none and is all free.
#[derive(Debug)]
pub(super) struct Bitmaps {
    /// Objects per full group.
    per_group: u32,
    /// Objects of all groups.
    total: u64,
    pages: BTreeMap<u32, Box<[u8; BLOCK]>>,
    used: Vec<u32>,
    dirty: BTreeSet<u32>,
}

impl Bitmaps {
    pub(super) fn new(per_group: u32, total: u64, groups: u32) -> Bitmaps {
        let used = vec![0; groups as usize];
        Bitmaps { per_group, total, pages: BTreeMap::new(), used, dirty: BTreeSet::new() }
    }

    /// Takes over the bitmap of a group from the disk.
    pub(super) fn load(&mut self, group: u32, page: Box<[u8; BLOCK]>) {
        let valid = self.valid(group) as usize;
        let whole = &page[..valid / 8];
        let mut used: u32 = whole.iter().map(|byte| byte.count_ones()).sum();
        if !valid.is_multiple_of(8) {
            used += (page[valid / 8] & ((1 << (valid % 8)) - 1)).count_ones();
        }
        self.used[group as usize] = used;
        self.pages.insert(group, page);
    }

    /// Number of objects of `group` in use.
    pub(super) fn used(&self, group: u32) -> u32 {
        self.used[group as usize]
    }

    /// Number of objects of `group`.
    fn valid(&self, group: u32) -> u32 {
        let start = u64::from(group) * u64::from(self.per_group);
        u64::from(self.per_group).min(self.total - start) as u32
    }

    /// Number of free objects in all groups.
    pub(super) fn free(&self) -> u64 {
        self.total - self.used.iter().map(|&used| u64::from(used)).sum::<u64>()
    }

    /// True if an object is in use.
    pub(super) fn is_used(&self, object: u64) -> bool {
        let (group, bit) = (object / u64::from(self.per_group), object % u64::from(self.per_group));
        self.pages
            .get(&(group as u32))
            .is_some_and(|page| page[(bit / 8) as usize] & (1 << (bit % 8)) != 0)
    }

    /// The bitmap of a group, if it has one.
    pub(super) fn page(&self, group: u32) -> Option<&[u8; BLOCK]> {
        self.pages.get(&group).map(|page| &**page)
    }

    /// True if all objects `first..first + count` have the state `in_use`.
    pub(super) fn are(&self, in_use: bool, first: u64, count: u64) -> bool {
        let end = first + count;
        let mut at = first;
        while at < end {
            let group = (at / u64::from(self.per_group)) as u32;
            let start = u64::from(group) * u64::from(self.per_group);
            let stop = end.min(start + u64::from(self.per_group));
            let same = match self.pages.get(&group) {
                Some(page) => all((at - start) as usize, (stop - start) as usize, page, in_use),
                None => !in_use,
            };
            if !same {
                return false;
            }
            at = stop;
        }
        true
    }

    /// True if every object of a group that is marked in `other` is marked here too.
    pub(super) fn covers(&self, other: &Bitmaps, group: u32) -> bool {
        let Some(theirs) = other.pages.get(&group) else { return true };
        let valid = self.valid(group) as usize;
        (0..valid.div_ceil(8)).all(|at| {
            let ours = self.pages.get(&group).map_or(0, |page| page[at]);
            let mask = if valid - at * 8 >= 8 { 0xff } else { (1 << (valid - at * 8)) - 1 };
            theirs[at] & mask & !ours == 0
        })
    }

    /// Runs of free objects, ascending: first object and length.
    pub(super) fn free_runs(&self) -> Vec<BlockRun> {
        let mut runs: Vec<BlockRun> = Vec::new();
        let mut push = |start: u64, count: u64| match runs.last_mut() {
            Some(last) if last.start + last.count == start => last.count += count,
            _ => runs.push(BlockRun { start, count }),
        };
        for group in 0..self.used.len() as u32 {
            let start = u64::from(group) * u64::from(self.per_group);
            let valid = self.valid(group);
            let Some(page) = self.pages.get(&group) else {
                push(start, u64::from(valid));
                continue;
            };
            for bit in 0..valid {
                if page[(bit / 8) as usize] & (1 << (bit % 8)) == 0 {
                    push(start + u64::from(bit), 1);
                }
            }
        }
        runs
    }

    /// Groups with a bitmap that changed since the last call, with their bitmaps.
    pub(super) fn take_dirty(&mut self) -> Vec<(u32, &[u8; BLOCK])> {
        let dirty = std::mem::take(&mut self.dirty);
        dirty
            .into_iter()
            .filter_map(|group| self.pages.get(&group).map(|page| (group, &**page)))
            .collect()
    }

    /// Makes sure that a group has a bitmap. Bits past the group's last object must be ones.
    fn touch(&mut self, group: u32) -> &mut [u8; BLOCK] {
        let valid = self.valid(group);
        self.dirty.insert(group);
        self.pages.entry(group).or_insert_with(|| {
            let mut page = Box::new([0; BLOCK]);
            change(&mut page, valid, BITS, true);
            page
        })
    }

    /// Marks objects; each must have been in the other state before.
    pub(super) fn mark(&mut self, first: u64, count: u64, in_use: bool) {
        let end = first + count;
        let mut at = first;
        while at < end {
            let group = (at / u64::from(self.per_group)) as u32;
            let start = u64::from(group) * u64::from(self.per_group);
            let stop = end.min(start + u64::from(self.per_group));
            let (from, to) = ((at - start) as u32, (stop - start) as u32);
            change(self.touch(group), from, to, in_use);
            let used = &mut self.used[group as usize];
            *used = if in_use { *used + (to - from) } else { used.saturating_sub(to - from) };
            at = stop;
        }
    }

    /// Forgets all changes.
    pub(super) fn settle(&mut self) {
        self.dirty.clear();
    }
}

/// True if the bits `from..to` all have that value; compares whole bytes at once.
fn all(from: usize, to: usize, page: &[u8; BLOCK], value: bool) -> bool {
    let mut bit = from;
    while bit < to {
        let byte = if value { page[bit / 8] } else { !page[bit / 8] };
        let step = if bit.is_multiple_of(8) && to - bit >= 8 { 8 } else { 1 };
        let same = if step == 8 { byte == 0xff } else { byte & (1 << (bit % 8)) != 0 };
        if !same {
            return false;
        }
        bit += step;
    }
    true
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

/// Removes the parts of `runs` that lie in `holes`; both must be ascending and without overlap.
pub(super) fn subtract(runs: &[BlockRun], holes: &[BlockRun]) -> Vec<BlockRun> {
    let mut left = Vec::with_capacity(runs.len());
    let mut holes = holes.iter().peekable();
    for run in runs {
        let (mut start, end) = (run.start, run.start + run.count);
        while let Some(hole) = holes.peek()
            && hole.start < end
        {
            if hole.start > start {
                left.push(BlockRun { start, count: hole.start - start });
            }
            start = start.max(hole.start + hole.count);
            if hole.start + hole.count > end {
                break;
            }
            holes.next();
        }
        if start < end {
            left.push(BlockRun { start, count: end - start });
        }
    }
    left
}

/// Runs of free objects, used in ascending order.
#[derive(Debug, Default)]
struct Free(VecDeque<BlockRun>);

impl Free {
    fn count(&self) -> u64 {
        self.0.iter().map(|run| run.count).sum()
    }

    /// Takes up to `count` consecutive objects.
    fn take(&mut self, count: u64) -> Option<BlockRun> {
        let first = self.0.front_mut()?;
        let taken = BlockRun { start: first.start, count: count.min(first.count) };
        first.start += taken.count;
        first.count -= taken.count;
        if first.count == 0 {
            self.0.pop_front();
        }
        Some(taken)
    }
}

/// The blocks of the disk.
#[derive(Debug)]
pub(super) struct Blocks {
    pub(super) bitmaps: Bitmaps,
    metadata: Free,
    data: Free,
    /// Number of blocks in both lists together.
    available: u64,
    size: Bytes,
}

impl Blocks {
    pub(super) fn new(layout: &FilesystemLayout) -> Blocks {
        let groups = layout.group_count();
        let mut bitmaps = Bitmaps::new(layout.group_blocks, layout.blocks, groups);
        bitmaps.mark(0, layout.metadata, true);
        let last = groups - 1;
        if bitmaps.valid(last) < BITS {
            bitmaps.touch(last);
        }
        let all = BlockRun { start: layout.metadata, count: layout.blocks - layout.metadata };
        Blocks::continued(layout, bitmaps, &[all], layout.data)
    }

    /// The blocks of a disk with the free runs `free`; those from block `data` on are for file data.
    pub(super) fn continued(
        layout: &FilesystemLayout,
        bitmaps: Bitmaps,
        free: &[BlockRun],
        data: u64,
    ) -> Blocks {
        let mut lists = (Free::default(), Free::default());
        for &BlockRun { start, count } in free {
            let end = start + count;
            let cut = data.clamp(start, end);
            for (list, start, end) in [(&mut lists.0, start, cut), (&mut lists.1, cut, end)] {
                if start < end {
                    list.0.push_back(BlockRun { start, count: end - start });
                }
            }
        }
        let (metadata, data) = lists;
        let available = metadata.count() + data.count();
        let size = Bytes(layout.blocks * BLOCK as u64);
        Blocks { bitmaps, metadata, data, available, size }
    }

    /// Takes one block for metadata.
    pub(super) fn metadata_block(&mut self) -> Result<u64, Ext4Error> {
        Ok(self.take(1, false)?.start)
    }

    /// Takes up to `count` (at least 1) consecutive blocks for metadata or for file data.
    pub(super) fn take(&mut self, count: u64, data: bool) -> Result<BlockRun, Ext4Error> {
        let (first, second) = if data {
            (&mut self.data, &mut self.metadata)
        } else {
            (&mut self.metadata, &mut self.data)
        };
        let taken = first.take(count).or_else(|| second.take(count));
        let taken = taken.ok_or(Ext4Error::NoBlocks { size: self.size })?;
        self.available -= taken.count;
        self.bitmaps.mark(taken.start, taken.count, true);
        Ok(taken)
    }

    /// Fails early if fewer than `count` blocks are free.
    pub(super) fn require(&self, count: u64) -> Result<(), Ext4Error> {
        if count > self.available {
            return Err(Ext4Error::NoBlocks { size: self.size });
        }
        Ok(())
    }

    /// Marks blocks free.
    pub(super) fn free(&mut self, run: BlockRun) {
        self.bitmaps.mark(run.start, run.count, false);
    }
}

/// The inodes of the filesystem. Numbers that were never used are given out in ascending order; a number that
/// this process freed is not given out again.
#[derive(Debug)]
pub(super) struct Inodes {
    pub(super) bitmaps: Bitmaps,
    /// Account of each group.
    accounts: Vec<InodeAccount>,
    /// The free numbers, less one.
    free: Free,
    per_group: u32,
    /// The highest number.
    last: u32,
}

/// Counts of inodes in a group's descriptor, except the number of free ones.
#[derive(Clone, Copy, Debug)]
pub(super) struct InodeAccount {
    pub(super) directories: u32,
    /// Number of inodes at the end that were never given out.
    pub(super) untouched: u32,
}

impl Inodes {
    /// All numbers below `first` are in use; `first` itself is only given out by [`Inodes::claim`].
    pub(super) fn new(layout: &FilesystemLayout, first: u32) -> Inodes {
        let last = layout.inodes();
        let per_group = layout.group_inodes;
        let mut bitmaps = Bitmaps::new(per_group, u64::from(last), layout.group_count());
        bitmaps.mark(0, u64::from(first - 1), true);
        let fresh = InodeAccount { directories: 0, untouched: per_group };
        let free = BlockRun { start: u64::from(first), count: u64::from(last - first) };
        let accounts = vec![fresh; layout.groups.len()];
        let mut inodes = Inodes::continued(layout, bitmaps, accounts, [free]);
        inodes.touch(first);
        inodes
    }

    /// The inodes of a disk with the free runs of numbers `free`, less one.
    pub(super) fn continued(
        layout: &FilesystemLayout,
        bitmaps: Bitmaps,
        accounts: Vec<InodeAccount>,
        free: impl IntoIterator<Item = BlockRun>,
    ) -> Inodes {
        Inodes {
            bitmaps,
            accounts,
            free: Free(free.into_iter().filter(|run| run.count > 0).collect()),
            per_group: layout.group_inodes,
            last: layout.inodes(),
        }
    }

    /// Takes this number for a directory if it is free, or else another one.
    pub(super) fn claim(&mut self, number: u32) -> Result<u32, Ext4Error> {
        if self.bitmaps.is_used(u64::from(number - 1)) {
            return self.take(true);
        }
        // On a continued disk it can be among the free numbers.
        let own = BlockRun { start: u64::from(number - 1), count: 1 };
        let free: Vec<BlockRun> = self.free.0.iter().copied().collect();
        if free.iter().any(|run| run.start <= own.start && own.start < run.start + run.count) {
            self.free = Free(free.iter().flat_map(|run| subtract(&[*run], &[own])).collect());
        }
        self.give(number, true);
        Ok(number)
    }

    /// Takes the next free number.
    pub(super) fn take(&mut self, directory: bool) -> Result<u32, Ext4Error> {
        let taken = self.free.take(1).ok_or(Ext4Error::NoInodes { inodes: self.last })?;
        let number = taken.start as u32 + 1;
        self.give(number, directory);
        Ok(number)
    }

    fn give(&mut self, number: u32, directory: bool) {
        self.bitmaps.mark(u64::from(number - 1), 1, true);
        self.touch(number);
        if directory {
            self.count_directory(number);
        }
    }

    /// Notes that a number was in use at some time.
    fn touch(&mut self, number: u32) {
        let group = self.group_of(number);
        let touched = (number - 1) % self.per_group + 1;
        let account = &mut self.accounts[group];
        account.untouched = account.untouched.min(self.per_group - touched);
    }

    /// Counts a directory with an inode that was reserved.
    pub(super) fn count_directory(&mut self, number: u32) {
        let group = self.group_of(number);
        self.accounts[group].directories += 1;
    }

    /// Marks a number free.
    pub(super) fn free(&mut self, number: u32, directory: bool) {
        self.bitmaps.mark(u64::from(number - 1), 1, false);
        if directory {
            let group = self.group_of(number);
            let count = &mut self.accounts[group].directories;
            *count = count.saturating_sub(1);
        }
    }

    /// The counts of `group`.
    pub(super) fn account(&self, group: u32) -> InodeAccount {
        self.accounts[group as usize]
    }

    fn group_of(&self, number: u32) -> usize {
        ((number - 1) / self.per_group) as usize
    }
}
