//! Directories: a chain of entries in one block, or an index by hash over many blocks.
//!
//! If all entries fit into one block, they are sorted by name. A larger directory becomes an indexed one
//! ("htree"): its entries are sorted by the hash of their names and cut into full leaf blocks. The first hash
//! of each leaf stands in the root block or, past 508 leaves, in one level of index blocks between. A name in
//! a directory of a million is found in three reads. A kernel without dir_index sees the index as empty
//! blocks.

use super::checksum::{InodeChecksum, LEAF_TAIL};
use super::field::{put16, put32};
use super::geometry::BLOCK;
use super::hash::{HALF_MD4, HashRule, NameHash, hash};

/// Bytes before the pairs of the root: `.`, `..` and 8 bytes of information.
const ROOT_HEADER: usize = 32;
/// Bytes before the pairs of an index block: one empty directory entry.
const NODE_HEADER: usize = 8;
/// Bytes of `.` and `..`.
const DOTS: usize = 24;

/// A name in a directory.
#[derive(Clone, Copy, Debug)]
pub(super) struct DirectoryEntry<'a> {
    pub(super) name: &'a [u8],
    pub(super) inode: u32,
    /// One of [`file_type`]'s constants.
    pub(super) file_type: u8,
}

/// The type byte of entries.
pub(super) mod file_type {
    pub(in super::super) const REGULAR: u8 = 1;
    pub(in super::super) const DIRECTORY: u8 = 2;
    pub(in super::super) const CHAR: u8 = 3;
    pub(in super::super) const BLOCK: u8 = 4;
    pub(in super::super) const FIFO: u8 = 5;
    pub(in super::super) const SOCKET: u8 = 6;
    pub(in super::super) const SYMLINK: u8 = 7;
}

/// The content of a directory.
#[derive(Debug)]
pub(super) struct Directory {
    /// Whole blocks.
    pub(super) bytes: Vec<u8>,
    /// True if it has an index.
    pub(super) indexed: bool,
}

/// More entries than two levels of index hold.
#[derive(Debug)]
pub(super) struct TooManyEntries;

/// Directory format of a filesystem.
#[derive(Clone, Copy, Debug)]
pub(super) struct Style {
    pub(super) hash: HashRule,
    pub(super) checksum: InodeChecksum,
}

impl Style {
    /// Bytes of a block available to entries.
    fn leaf_room(self) -> usize {
        if self.checksum.is_some() { BLOCK - LEAF_TAIL } else { BLOCK }
    }

    /// Number of pairs of hash and block behind a header; a checksum takes the room of one pair.
    fn pairs(self, header: usize) -> usize {
        (BLOCK - header) / 8 - usize::from(self.checksum.is_some())
    }
}

/// Encodes a directory; `entries` must be sorted by name, without `.` and `..`.
pub(super) fn encode(
    own: u32,
    parent: u32,
    entries: &[DirectoryEntry],
    style: Style,
) -> Result<Directory, TooManyEntries> {
    let dots = [
        DirectoryEntry { name: b".", inode: own, file_type: file_type::DIRECTORY },
        DirectoryEntry { name: b"..", inode: parent, file_type: file_type::DIRECTORY },
    ];
    let room = style.leaf_room();
    if DOTS + entries.iter().map(|entry| length(entry.name)).sum::<usize>() <= room {
        let mut bytes = vec![0; BLOCK];
        chain(&mut bytes[..room], dots.iter().chain(entries));
        style.checksum.seal_leaf(&mut bytes);
        return Ok(Directory { bytes, indexed: false });
    }
    let mut sorted: Vec<(NameHash, &DirectoryEntry)> =
        entries.iter().map(|entry| (hash(entry.name, style.hash), entry)).collect();
    sorted.sort_unstable_by_key(|&(hash, entry)| (hash, entry.name));
    let leaves = cut(&sorted, room);
    let (in_root, in_node) = (style.pairs(ROOT_HEADER), style.pairs(NODE_HEADER));
    let nodes = if leaves.len() > in_root { leaves.len().div_ceil(in_node) } else { 0 };
    if nodes > in_root {
        return Err(TooManyEntries);
    }
    let mut bytes = vec![0; BLOCK * (1 + nodes + leaves.len())];
    let (index, content) = bytes.split_at_mut(BLOCK * (1 + nodes));
    chain(&mut index[..BLOCK], dots.iter());
    let mut pointers = Vec::with_capacity(leaves.len());
    for ((number, leaf), block) in (1 + nodes..).zip(&leaves).zip(content.chunks_exact_mut(BLOCK)) {
        chain(&mut block[..room], leaf.entries.iter().map(|&(_, entry)| entry));
        style.checksum.seal_leaf(block);
        pointers.push((leaf.first, number as u32));
    }
    write_index(index, &pointers, nodes, style);
    Ok(Directory { bytes, indexed: true })
}

/// The entries of a leaf block, and the hash that leads to it.
struct Leaf<'a> {
    first: u32,
    entries: &'a [(NameHash, &'a DirectoryEntry<'a>)],
}

/// Cuts the sorted entries into full leaf blocks. If a cut separates names with the same hash, the lowest bit
/// of the second leaf's hash tells a reader at the end of the first to continue there.
fn cut<'a>(sorted: &'a [(NameHash, &'a DirectoryEntry<'a>)], room: usize) -> Vec<Leaf<'a>> {
    let mut leaves = Vec::new();
    let mut start = 0;
    let mut size = 0;
    for (at, (_, entry)) in sorted.iter().enumerate() {
        size += length(entry.name);
        if size > room {
            leaves.push(leaf(sorted, start, at));
            start = at;
            size = length(entry.name);
        }
    }
    leaves.push(leaf(sorted, start, sorted.len()));
    leaves
}

fn leaf<'a>(
    sorted: &'a [(NameHash, &'a DirectoryEntry<'a>)],
    start: usize,
    end: usize,
) -> Leaf<'a> {
    let first = sorted[start].0.major;
    let continued = start > 0 && sorted[start - 1].0.major == first;
    Leaf { first: first | u32::from(continued), entries: &sorted[start..end] }
}

/// Writes the root (with its `.` and `..` already present) and the index blocks behind it.
fn write_index(index: &mut [u8], leaves: &[(u32, u32)], nodes: usize, style: Style) {
    let (root, inner) = index.split_at_mut(BLOCK);
    root[28] = HALF_MD4;
    root[29] = 8; // length of this information
    root[30] = u8::from(nodes > 0); // levels below the root
    if nodes == 0 {
        return write_pointers(root, ROOT_HEADER, leaves, style);
    }
    let mut above = Vec::with_capacity(nodes);
    for ((number, part), block) in
        (1..).zip(leaves.chunks(style.pairs(NODE_HEADER))).zip(inner.chunks_exact_mut(BLOCK))
    {
        put16(block, 4, BLOCK as u16); // one unused entry as long as the block
        write_pointers(block, NODE_HEADER, part, style);
        above.push((part[0].0, number));
    }
    write_pointers(root, ROOT_HEADER, &above, style);
}

/// Writes pairs of hash and block behind a header. The first pair's hash is implied; limit and count lie in
/// its place.
fn write_pointers(block: &mut [u8], header: usize, pointers: &[(u32, u32)], style: Style) {
    let limit = style.pairs(header);
    let slots = &mut block[header..];
    for (slot, &(hash, block)) in slots.chunks_exact_mut(8).zip(pointers) {
        put32(slot, 0, hash);
        put32(slot, 4, block);
    }
    put16(slots, 0, limit as u16);
    put16(slots, 2, pointers.len() as u16);
    style.checksum.seal_index(block, header, limit, pointers.len());
}

/// Bytes of an entry: eight and the name, rounded up to a multiple of four.
fn length(name: &[u8]) -> usize {
    (8 + name.len()).next_multiple_of(4)
}

/// Writes entries one behind the other; the last one extends to the end of the block.
fn chain<'a>(block: &mut [u8], entries: impl Iterator<Item = &'a DirectoryEntry<'a>>) {
    let mut at = 0;
    let mut last = 0;
    for entry in entries {
        let size = length(entry.name);
        let record = &mut block[at..at + size];
        put32(record, 0, entry.inode);
        put16(record, 4, size as u16);
        record[6] = entry.name.len() as u8;
        record[7] = entry.file_type;
        record[8..8 + entry.name.len()].copy_from_slice(entry.name);
        last = at;
        at += size;
    }
    let rest = (block.len() - last) as u16;
    put16(block, last + 4, rest);
}
