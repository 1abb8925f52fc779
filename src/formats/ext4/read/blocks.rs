//! The blocks of a file, found by extents or by the pointers of ext2 and ext3.

use super::groups::Groups;
use super::{ReadError, Source, damaged};
use crate::ext4::allocation::BlockRun;
use crate::ext4::extent::{InodeExtent, append};
use crate::ext4::field::{get16, get32};
use crate::ext4::geometry::BLOCK;

/// Greatest depth of an extent tree, as in the kernel.
const DEEPEST: u16 = 5;
/// Bytes of the header and of an entry of either kind.
const ENTRY: usize = 12;
/// Larger "lengths" mark extents that are allocated and read as zeros.
const LONGEST: u32 = 32_768;
/// Pointers in a block.
const POINTERS: u64 = BLOCK as u64 / 4;
/// Pointers in the inode that lead directly to data.
const DIRECT: usize = 12;

/// Blocks of a file.
#[derive(Debug, Default)]
pub(super) struct FileBlocks {
    pub(super) extents: Vec<InodeExtent>,
    /// Blocks of the tree or of pointers.
    pub(super) tree: Vec<u64>,
    /// True if a part of the file is allocated but not written.
    pub(super) unwritten: bool,
}

/// Reads and claims the blocks of one inode.
pub(super) struct BlockReader<'a, 'v> {
    pub(super) source: Source<'v>,
    pub(super) groups: &'a mut Groups,
    pub(super) inode: u32,
}

impl BlockReader<'_, '_> {
    /// Reads the blocks from the root of the extent tree, 60 bytes of the inode.
    pub(super) fn by_extents(&mut self, root: &[u8]) -> Result<FileBlocks, ReadError> {
        let mut found = FileBlocks::default();
        let depth = get16(root, 6);
        if depth > DEEPEST {
            return Err(self.bad(format!("has a tree of extents {depth} levels deep")));
        }
        // First block of the file, last one allowed, tree block and its level.
        let mut open = Vec::new();
        let mut next = 0;
        self.node(root, depth, &mut found, &mut open, &mut next)?;
        while let Some((place, level)) = open.pop() {
            self.groups.claim(place, 1, self.inode)?;
            found.tree.push(place);
            let block = self.source.block(place)?;
            self.groups.emitted.know(place, &block[..]);
            self.node(&block[..], level, &mut found, &mut open, &mut next)?;
        }
        Ok(found)
    }

    /// Handles one node of the tree: takes its extents, and puts its index entries on the stack in reverse.
    fn node(
        &mut self,
        node: &[u8],
        level: u16,
        found: &mut FileBlocks,
        open: &mut Vec<(u64, u16)>,
        next: &mut u64,
    ) -> Result<(), ReadError> {
        let (magic, count, depth) = (get16(node, 0), usize::from(get16(node, 2)), get16(node, 6));
        if magic != 0xf30a || depth != level || count > (node.len() - ENTRY) / ENTRY {
            return Err(self.bad("has a broken node in its tree of extents"));
        }
        let entries = node[ENTRY..].chunks_exact(ENTRY).take(count);
        if level > 0 {
            let children = entries.map(|entry| {
                (u64::from(get32(entry, 4)) | u64::from(get16(entry, 8)) << 32, level - 1)
            });
            let children: Vec<_> = children.collect();
            open.extend(children.into_iter().rev());
            return Ok(());
        }
        for entry in entries {
            let logical = get32(entry, 0);
            let length = u32::from(get16(entry, 4));
            let unwritten = length > LONGEST;
            let count = if unwritten { length - LONGEST } else { length };
            let physical = u64::from(get32(entry, 8)) | u64::from(get16(entry, 6)) << 32;
            if count == 0 || u64::from(logical) < *next {
                return Err(self.bad("has extents that are empty or out of order"));
            }
            *next = u64::from(logical) + u64::from(count);
            if *next > 1 << 32 {
                return Err(self.bad("has an extent past its last possible block"));
            }
            self.groups.claim(physical, u64::from(count), self.inode)?;
            found.unwritten |= unwritten;
            found.extents.push(InodeExtent { logical, physical, count });
        }
        Ok(())
    }

    /// Reads the blocks from the fifteen pointers of the inode.
    pub(super) fn by_pointers(&mut self, pointers: &[u8]) -> Result<FileBlocks, ReadError> {
        let mut found = FileBlocks::default();
        for nth in 0..DIRECT {
            self.data_block(get32(pointers, nth * 4), nth as u64, &mut found)?;
        }
        let mut logical = DIRECT as u64;
        for level in 1..=3 {
            let place = get32(pointers, (DIRECT - 1 + level as usize) * 4);
            self.pointer_block(place, level, logical, &mut found)?;
            logical += POINTERS.pow(level);
        }
        Ok(found)
    }

    /// Reads a block of pointers, `level` steps above the data.
    fn pointer_block(
        &mut self,
        place: u32,
        level: u32,
        logical: u64,
        found: &mut FileBlocks,
    ) -> Result<(), ReadError> {
        if place == 0 {
            return Ok(());
        }
        self.groups.claim(u64::from(place), 1, self.inode)?;
        found.tree.push(u64::from(place));
        let block = self.source.block(u64::from(place))?;
        let below = POINTERS.pow(level - 1);
        for nth in 0..POINTERS {
            let pointer = get32(&block[..], nth as usize * 4);
            let logical = logical + nth * below;
            if level == 1 {
                self.data_block(pointer, logical, found)?;
            } else {
                self.pointer_block(pointer, level - 1, logical, found)?;
            }
        }
        Ok(())
    }

    fn data_block(
        &mut self,
        place: u32,
        logical: u64,
        found: &mut FileBlocks,
    ) -> Result<(), ReadError> {
        if place == 0 {
            return Ok(());
        }
        let start = u64::from(place);
        self.groups.claim(start, 1, self.inode)?;
        let logical = u32::try_from(logical)
            .map_err(|_| self.bad("has blocks past its last possible one"))?;
        append(&mut found.extents, logical, BlockRun { start, count: 1 });
        Ok(())
    }

    fn bad(&self, rule: impl Into<String>) -> ReadError {
        damaged(format!("Inode {}", self.inode), rule)
    }
}
