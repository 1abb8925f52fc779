//! Does the index of a directory lead to each of its names?
//!
//! The kernel finds a name by its hash: the index says in which block names of that hash are, and no other block is
//! searched. A listing goes through all blocks. So a directory whose index misleads shows a name that cannot be opened.
//! The kernel does not mind; neither does a converter's reader, which needs no index. A comparison must.

use super::directory;
use crate::ext4::field::{get16, get32};
use crate::ext4::geometry::BLOCK;
use crate::ext4::hash::{HALF_MD4, HashRule, hash};

/// Position of the first pair in the root: behind `.`, `..` and eight bytes of information.
const ROOT_HEADER: usize = 32;
/// Position of the first pair in another index block: behind one unused entry.
const NODE_HEADER: usize = 8;
/// Most levels of index blocks below the root, as in the kernel.
const DEEPEST: u8 = 2;

/// A block of names, and the lowest hash that leads to it.
struct IndexedBlock {
    first: u32,
    block: usize,
}

/// True if the index in `blocks`, all of the directory, leads to every name as the kernel follows it. An index of a kind
/// that this program does not know leads nowhere.
pub(super) fn leads_to_all(blocks: &[Box<[u8; BLOCK]>], rule: HashRule) -> bool {
    leaves(blocks).is_some_and(|leaves| leads(blocks, &leaves, rule))
}

/// The leaves in the order of the index; `None` if it has no valid form.
fn leaves(blocks: &[Box<[u8; BLOCK]>]) -> Option<Vec<IndexedBlock>> {
    let root = blocks.first()?;
    let (version, length, levels) = (root[28], root[29], root[30]);
    if get32(&root[..], 24) != 0 || version != HALF_MD4 || length != 8 || levels > DEEPEST {
        return None;
    }
    let mut leaves = Vec::new();
    let mut used = vec![false; blocks.len()];
    *used.first_mut()? = true;
    // Block, its level above the leaves, and the lowest hash that leads to it; the next one is the last.
    let mut open = vec![(0, levels, 0)];
    while let Some((block, level, first)) = open.pop() {
        let header = if block == 0 { ROOT_HEADER } else { NODE_HEADER };
        let pairs = pairs(&blocks[block][header..])?;
        let mut children = Vec::with_capacity(pairs.len());
        for (number, (hash, child)) in pairs.into_iter().enumerate() {
            let child = child as usize;
            if std::mem::replace(used.get_mut(child)?, true) {
                return None;
            }
            children.push((child, if number == 0 { first } else { hash }));
        }
        if level == 0 {
            leaves.extend(children.into_iter().map(|(block, first)| IndexedBlock { first, block }));
        } else {
            let below = children.into_iter().rev();
            open.extend(below.map(|(block, first)| (block, level - 1, first)));
        }
    }
    leaves.is_sorted_by_key(|leaf| leaf.first).then_some(leaves)
}

/// The pairs of hash and block behind a header. The hash of the first is implied: limit and count are in its place.
fn pairs(area: &[u8]) -> Option<Vec<(u32, u32)>> {
    let count = usize::from(get16(area, 2));
    if count == 0 || count > area.len() / 8 {
        return None;
    }
    let slots = area.chunks_exact(8).take(count);
    Some(slots.map(|slot| (get32(slot, 0), get32(slot, 4) & 0x0fff_ffff)).collect())
}

fn leads(blocks: &[Box<[u8; BLOCK]>], leaves: &[IndexedBlock], rule: HashRule) -> bool {
    let mut reached = vec![false; blocks.len()];
    for (number, leaf) in leaves.iter().enumerate() {
        reached[leaf.block] = true;
        let next = leaves.get(number + 1).map(|leaf| leaf.first);
        let found = |name: &[u8]| {
            let hash = hash(name, rule).major;
            let here = leaf.first <= hash && next.is_none_or(|next| hash < next);
            // From the block before, a search goes on to one that begins with the same hash.
            here || leaf.first & !1 == hash
        };
        if !names(blocks, leaf.block).is_some_and(|names| names.iter().all(|name| found(name))) {
            return false;
        }
    }
    // A block that the index does not lead to may have no names.
    (0..blocks.len())
        .all(|block| reached[block] || names(blocks, block).is_some_and(|names| names.is_empty()))
}

/// The names in a block without `.` and `..`.
fn names(blocks: &[Box<[u8; BLOCK]>], block: usize) -> Option<Vec<Box<[u8]>>> {
    let mut names = Vec::new();
    directory::entries(0, &blocks[block][..], &mut names).ok()?;
    Some(names.into_iter().map(|(name, _)| name).collect())
}
