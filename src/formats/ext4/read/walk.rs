//! Reads all directories from the root down, then builds the tree.

use std::collections::BTreeMap;

use super::file::{self, File};
use super::groups::Groups;
use super::superblock::Superblock;
use super::{ReadError, Source, damaged, directory, indexed, xattr};
use crate::ext4::file::NodeKind;
use crate::ext4::geometry::BLOCK;
use crate::ext4::image::{FileRecord, LOST_AND_FOUND_NAME, ROOT_INODE};
use crate::ext4::tree::{NodeId, Tree};
use crate::ext4::xattr::SharedBlocks;

type ChildNames = Vec<(Box<[u8]>, u32)>;
type Finished = (Tree, Vec<Option<FileRecord>>, Option<FileRecord>, SharedBlocks);

/// Memory of a file, in bytes: it stands in the list of files, in the tree, and in the records of the image.
const FILE_MEMORY: u64 = 768;

/// Memory of a name: in the list of names, and in the tree.
const NAME_MEMORY: u64 = 128;

fn memory_of(file: &File) -> u64 {
    let xattrs = file.attributes.xattrs.iter();
    let xattrs = xattrs.map(|(name, value)| (name.len() + value.len() + 128) as u64).sum::<u64>();
    // Attributes are in the tree and in the record.
    FILE_MEMORY + file.content.len() as u64 * 8 + 2 * xattrs
}

/// Result of the walk.
pub(super) struct Walk {
    /// Files by inode number: those of this program are returned in the order of their creation.
    files: BTreeMap<u32, File>,
    names: BTreeMap<u32, ChildNames>,
    lost_and_found: Option<FileRecord>,
    xattrs: XattrBlocks,
}

impl Walk {
    /// Reads every file that has a name.
    pub(super) fn whole(
        source: Source<'_>,
        superblock: &Superblock,
        groups: &mut Groups,
    ) -> Result<Self, ReadError> {
        let mut xattrs = XattrBlocks::default();
        let mut files: BTreeMap<u32, File> = BTreeMap::new();
        let mut names = BTreeMap::new();
        let root = file::read(source, groups, &mut xattrs, ROOT_INODE)?;
        if root.kind != NodeKind::Directory {
            return Err(damaged("The root", "is not a directory"));
        }
        files.insert(ROOT_INODE, root);
        let mut open = vec![ROOT_INODE];
        while let Some(dir) = open.pop() {
            let Some(file) = files.get_mut(&dir) else { continue };
            let (content, indexed) = (file.content.clone(), file.indexed);
            let (entries, blocks) = read_names(source, groups, dir, &content, indexed)?;
            if indexed && !indexed::leads_to_all(&blocks, superblock.rules().hash) {
                file.record.doubt = Some("has an index that does not lead to each of its names");
            }
            for &(_, child) in &entries {
                let known = files.get(&child);
                if child < superblock.first_inode
                    || known.is_some_and(|file| file.kind == NodeKind::Directory)
                {
                    let rule = "is a directory with two names, or a reserved inode with a name";
                    return Err(damaged(format!("Inode {child}"), rule));
                }
                if known.is_none() {
                    let file = file::read(source, groups, &mut xattrs, child)?;
                    groups.keep(memory_of(&file))?;
                    if file.kind == NodeKind::Directory {
                        open.push(child);
                    }
                    files.insert(child, file);
                }
            }
            names.insert(dir, entries);
        }
        let mut walk = Self { files, names, lost_and_found: None, xattrs };
        walk.hide_lost_and_found(superblock.first_inode);
        Ok(walk)
    }

    /// Removes the filesystem's own `lost+found` from the tree. It has the first inode, unless another file has that one:
    /// then the writer gave it another.
    fn hide_lost_and_found(&mut self, first: u32) {
        let is_own = |file: &File| {
            let own = &file.attributes;
            file.kind == NodeKind::Directory
                && (own.mode, own.uid, own.gid) == (0o700, 0, 0)
                && own.xattrs.is_empty()
        };
        let Some(root) = self.names.get(&ROOT_INODE) else { return };
        let Some(at) = root.iter().position(|(name, _)| **name == *LOST_AND_FOUND_NAME) else {
            return;
        };
        let inode = root[at].1;
        let is_placed = inode == first || self.files.contains_key(&first);
        if !is_placed
            || !self.files.get(&inode).is_some_and(is_own)
            || self.names.get(&inode).is_some_and(|names| !names.is_empty())
        {
            return;
        }
        if let Some(root) = self.names.get_mut(&ROOT_INODE) {
            root.remove(at);
        }
        self.names.remove(&inode);
        self.lost_and_found = self.files.remove(&inode).map(|file| file.record);
    }

    /// The tree, the records of its nodes by number, and the filesystem's own `lost+found`.
    pub(super) fn finish(self) -> Result<Finished, ReadError> {
        let mut tree = Tree::new();
        let mut records = Vec::with_capacity(self.files.len());
        let mut nodes: BTreeMap<u32, NodeId> = BTreeMap::new();
        for (inode, file) in self.files {
            let node = if inode == ROOT_INODE {
                tree.set_attributes(tree.root(), file.attributes);
                tree.root()
            } else {
                tree.restore(file.kind, file.attributes).ok_or_else(|| {
                    ReadError::Unsupported("it has more files than there are numbers".into())
                })?
            };
            nodes.insert(inode, node);
            records.push(Some(file.record));
        }
        for (dir, names) in self.names {
            for (name, inode) in names {
                if let (Some(&dir), Some(&node)) = (nodes.get(&dir), nodes.get(&inode)) {
                    tree.restore_name(dir, name, node).map_err(|error| {
                        damaged("A directory", format!("has an entry that is not allowed: {error}"))
                    })?;
                }
            }
        }
        let shared = self.xattrs.shared()?;
        Ok((tree, records, self.lost_and_found, shared))
    }
}

/// The names of a directory, and its blocks if they are to be kept.
fn read_names(
    source: Source<'_>,
    groups: &mut Groups,
    dir: u32,
    content: &[u64],
    keep: bool,
) -> Result<(ChildNames, Vec<Box<[u8; BLOCK]>>), ReadError> {
    let (mut names, mut kept) = (Vec::new(), Vec::new());
    for &place in content {
        let block = source.block(place)?;
        groups.emitted.know(place, &block[..]);
        let before = names.len();
        directory::entries(dir, &block[..], &mut names)?;
        let kept_too = if keep { BLOCK as u64 } else { 0 };
        groups.keep((names.len() - before) as u64 * NAME_MEMORY + kept_too)?;
        if keep {
            kept.push(block);
        }
    }
    Ok((names, kept))
}

/// Attribute blocks, which several files can share.
#[derive(Default)]
pub(super) struct XattrBlocks(BTreeMap<u64, XattrBlock>);

struct XattrBlock {
    bytes: Box<[u8; BLOCK]>,
    found: u32,
    claimed: u32,
}

impl XattrBlocks {
    /// Adds the attributes in the block at `place` of `inode`.
    pub(super) fn read(
        &mut self,
        source: Source<'_>,
        groups: &mut Groups,
        inode: u32,
        place: u64,
        found: &mut BTreeMap<Vec<u8>, Vec<u8>>,
    ) -> Result<(), ReadError> {
        if let Some(known) = self.0.get_mut(&place) {
            known.found += 1;
            xattr::in_block(inode, &known.bytes[..], found)?;
            return Ok(());
        }
        groups.claim(place, 1, inode)?;
        let bytes = source.block(place)?;
        groups.emitted.know(place, &bytes[..]);
        let claimed = xattr::in_block(inode, &bytes[..], found)?;
        self.0.insert(place, XattrBlock { bytes, found: 1, claimed });
        Ok(())
    }

    /// The blocks that more than one file has.
    fn shared(self) -> Result<SharedBlocks, ReadError> {
        let mut shared = SharedBlocks::default();
        for (place, block) in self.0 {
            if block.found > block.claimed {
                let rule =
                    format!("counts {} files, but {} refer to it", block.claimed, block.found);
                return Err(damaged(format!("The attribute block {place}"), rule));
            }
            if block.claimed > 1 {
                shared.insert(place, block.bytes, block.claimed);
            }
        }
        Ok(shared)
    }
}
