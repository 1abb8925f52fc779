//! Extents: runs of contiguous disk blocks of a file.
//!
//! Up to four extents fit into the inode. More extents go into blocks of 340; if there are more than four
//! blocks, further levels of index blocks follow. All blocks but the last of a level are full.

use super::allocation::BlockRun;
use super::field::{high32, low16, low32, put16, put32};
use super::geometry::BLOCK;

/// Longest extent with data (larger values of the field mean "reads as zeros").
const LONGEST: u32 = 32_768;
/// Extents or index entries in an inode.
const IN_INODE: usize = 4;
/// Extents or index entries in a block: (4096 - 12) / 12.
const IN_BLOCK: usize = 340;
/// Bytes of the header and of an entry of either kind.
const ENTRY: usize = 12;

/// An extent: the `count` blocks of a file from `logical` on lie at `physical`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct InodeExtent {
    pub(super) logical: u32,
    pub(super) physical: u64,
    pub(super) count: u32,
}

/// Appends a run of blocks, joined to the last extent if it continues that one in the file and on the disk.
pub(super) fn append(extents: &mut Vec<InodeExtent>, logical: u32, run: BlockRun) {
    let BlockRun { mut start, mut count } = run;
    let mut logical = logical;
    if let Some(last) = extents.last_mut()
        && last.logical + last.count == logical
        && last.physical + u64::from(last.count) == start
    {
        let more = count.min(u64::from(LONGEST - last.count));
        last.count += more as u32;
        logical += more as u32;
        start += more;
        count -= more;
    }
    while count > 0 {
        let part = count.min(u64::from(LONGEST)) as u32;
        extents.push(InodeExtent { logical, physical: start, count: part });
        // The last block of the largest file is 2^32 - 2, so this can overflow only at the end.
        logical = logical.saturating_add(part);
        start += u64::from(part);
        count -= u64::from(part);
    }
}

/// Number of blocks that a tree of that many extents needs outside the inode.
pub(super) fn tree_blocks(extents: usize) -> usize {
    let mut level = extents;
    let mut blocks = 0;
    while level > IN_INODE {
        level = level.div_ceil(IN_BLOCK);
        blocks += level;
    }
    blocks
}

/// The blocks of all extents, in the order of the file.
pub(super) fn places(extents: &[InodeExtent]) -> impl Iterator<Item = u64> {
    extents.iter().flat_map(|extent| extent.physical..extent.physical + u64::from(extent.count))
}

/// Encodes the tree: returns the bytes for the inode, and passes each block outside it to `write`. `blocks`
/// are the positions of those, [`tree_blocks`] many.
pub(super) fn encode(
    extents: &[InodeExtent],
    blocks: &[u64],
    mut write: impl FnMut(u64, &mut [u8; BLOCK]),
) -> [u8; 60] {
    let mut entries: Vec<(u32, [u8; ENTRY])> = extents.iter().map(leaf_entry).collect();
    let mut free = blocks.iter();
    let mut depth = 0;
    while entries.len() > IN_INODE {
        let mut above = Vec::with_capacity(entries.len().div_ceil(IN_BLOCK));
        for (part, &place) in entries.chunks(IN_BLOCK).zip(&mut free) {
            let mut block = [0; BLOCK];
            fill(&mut block, part, IN_BLOCK, depth);
            write(place, &mut block);
            above.push(index_entry(part[0].0, place));
        }
        entries = above;
        depth += 1;
    }
    let mut root = [0; 60];
    fill(&mut root, &entries, IN_INODE, depth);
    root
}

/// Writes a node: the header, then the entries.
fn fill(node: &mut [u8], entries: &[(u32, [u8; ENTRY])], most: usize, depth: u16) {
    put16(node, 0, 0xf30a); // magic
    put16(node, 2, entries.len() as u16);
    put16(node, 4, most as u16);
    put16(node, 6, depth);
    for (slot, (_, entry)) in node[ENTRY..].chunks_exact_mut(ENTRY).zip(entries) {
        slot.copy_from_slice(entry);
    }
}

fn leaf_entry(extent: &InodeExtent) -> (u32, [u8; ENTRY]) {
    let mut entry = [0; ENTRY];
    put32(&mut entry, 0, extent.logical);
    put16(&mut entry, 4, extent.count as u16);
    put16(&mut entry, 6, low16(high32(extent.physical)));
    put32(&mut entry, 8, low32(extent.physical));
    (extent.logical, entry)
}

fn index_entry(logical: u32, block: u64) -> (u32, [u8; ENTRY]) {
    let mut entry = [0; ENTRY];
    put32(&mut entry, 0, logical);
    put32(&mut entry, 4, low32(block));
    put16(&mut entry, 8, low16(high32(block)));
    (logical, entry)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contiguous_blocks_make_one_extent_up_to_its_longest() {
        let mut extents = Vec::new();
        append(&mut extents, 0, BlockRun { start: 100, count: 40_000 });
        append(&mut extents, 40_000, BlockRun { start: 40_100, count: 1 });
        append(&mut extents, 40_002, BlockRun { start: 40_101, count: 1 });
        let shape: Vec<_> = extents.iter().map(|e| (e.logical, e.physical, e.count)).collect();
        assert_eq!(shape, [(0, 100, 32_768), (32_768, 32_868, 7_233), (40_002, 40_101, 1)]);
    }

    #[test]
    fn the_tree_grows_a_level_only_when_the_root_is_full() {
        assert_eq!(tree_blocks(4), 0);
        assert_eq!(tree_blocks(5), 1);
        assert_eq!(tree_blocks(4 * 340), 4);
        assert_eq!(tree_blocks(4 * 340 + 1), 5 + 1);
    }
}
