//! The image: the state of the disk after the layers so far, and the changes of the next one.
//!
//! A commit goes through the tree once. Removed files release their blocks; new files get inode numbers in
//! the order of their creation; new data gets blocks in the order of the tar. Then every changed file is
//! encoded again in its blocks, and the layer receives only the blocks that differ from those of the lower
//! layers. Bitmaps, descriptors and the superblock are written last.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use super::allocation::{BlockRun, Blocks, Inodes};
use super::checksum::{Checksums, InodeChecksum};
use super::directory::{self, DirectoryEntry, Style, file_type};
use super::extent::{self, InodeExtent};
use super::file::{Attributes, NodeKind};
use super::geometry::{BLOCK, FilesystemLayout, Geometry};
use super::group::{self, Counts};
use super::hash::HashRule;
use super::inode::{self, Fields, INLINE_SYMLINK, InodeContent, Xattrs};
use super::layer::{Emitted, LayerBlocks};
use super::superblock::{self, EXTRA_ISIZE, FIRST_INODE, FilesystemIdentity};
use super::table::InodeTable;
use super::tree::{NodeId, Tree};
use super::xattr::SharedBlocks;
use super::{Ext4Error, data, xattr};
use crate::units::Bytes;

/// Inode number of the root directory.
pub(super) const ROOT_INODE: u32 = 2;
pub(super) const LOST_AND_FOUND_NAME: &[u8] = b"lost+found";

/// Inode and blocks of a file on the disk.
#[derive(Debug, Default)]
pub(super) struct FileRecord {
    pub(super) inode: u32,
    pub(super) directory: bool,
    /// Extents of its content.
    pub(super) extents: Vec<InodeExtent>,
    /// Blocks of its extent tree, or of indirect pointers in an older file.
    pub(super) tree: Vec<u64>,
    pub(super) xattr_block: Option<u64>,
    /// True for a file read from the disk, which the tree has only by name: content and pointers stay
    /// unchanged.
    pub(super) kept: bool,
    /// Attributes of a file read from the disk. They stay unchanged as long as the tree has the same.
    pub(super) kept_xattrs: Option<BTreeMap<Vec<u8>, Vec<u8>>>,
    /// Of a file read from the disk: why a kernel may see another content than this record says.
    pub(super) doubt: Option<&'static str>,
}

/// A contiguous part of a file on a contiguous part of the disk, all in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FilePart {
    /// First byte in the file.
    pub file: u64,
    /// First byte on the disk.
    pub disk: u64,
    /// Length; the last part of a file may end behind the file.
    pub len: u64,
}

impl FileRecord {
    /// Number of blocks of every kind.
    fn blocks(&self) -> u64 {
        let content: u64 = self.extents.iter().map(|extent| u64::from(extent.count)).sum();
        content + self.tree.len() as u64 + u64::from(self.xattr_block.is_some())
    }
}

/// Properties of a filesystem that apply to all its files.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rules {
    pub(super) checksums: Checksums,
    pub(super) hash: HashRule,
    /// Bytes of a new inode's fields beyond the first 128.
    pub(super) extra_isize: u16,
    /// The first inode that is not reserved.
    pub(super) first_inode: u32,
    /// True if counts of blocks have 64 bits.
    pub(super) wide: bool,
}

/// An ext4 filesystem that is built layer by layer.
#[derive(Debug)]
pub struct Image {
    pub(super) layout: FilesystemLayout,
    pub(super) rules: Rules,
    pub(super) blocks: Blocks,
    pub(super) inodes: Inodes,
    pub(super) emitted: Emitted,
    /// Records by node number.
    pub(super) records: Vec<Option<FileRecord>>,
    pub(super) table: InodeTable,
    /// All group descriptors, in whole blocks.
    pub(super) descriptors: Vec<u8>,
    /// Groups that always need a new descriptor: before the first layer, all.
    pub(super) undescribed: BTreeSet<u32>,
    /// Block 0, without the counts.
    pub(super) superblock: Box<[u8; BLOCK]>,
    /// The filesystem's own `lost+found`, which is not in the tree.
    pub(super) lost_and_found: Option<FileRecord>,
    /// Attribute blocks that several files share.
    pub(super) shared_xattrs: SharedBlocks,
    /// The tree's change counter at the last commit.
    pub(super) seen: u64,
}

impl Image {
    /// Makes an empty disk.
    ///
    /// # Errors
    /// [`Ext4Error`] if the size is out of bounds.
    pub fn new(geometry: Geometry, identity: FilesystemIdentity) -> Result<Image, Ext4Error> {
        let layout = FilesystemLayout::new(geometry)?;
        let seed = superblock::seed_words(&identity.hash_seed);
        let rules = Rules {
            checksums: Checksums::Descriptors { uuid: identity.uuid },
            hash: HashRule { seed, signed: false },
            extra_isize: EXTRA_ISIZE,
            first_inode: FIRST_INODE,
            wide: true,
        };
        Ok(Image {
            rules,
            blocks: Blocks::new(&layout),
            inodes: Inodes::new(&layout, FIRST_INODE),
            emitted: Emitted::default(),
            records: Vec::new(),
            table: InodeTable::default(),
            descriptors: group::fresh(&layout),
            undescribed: (0..layout.group_count()).collect(),
            superblock: Box::new(superblock::fresh(&layout, &identity)),
            lost_and_found: None,
            shared_xattrs: SharedBlocks::default(),
            seen: 0,
            layout,
        })
    }

    /// Size of the filesystem in bytes.
    #[must_use]
    pub fn size(&self) -> Bytes {
        Bytes(self.layout.blocks * BLOCK as u64)
    }

    /// The parts of a file's content, in the order of the file; what lies between them is holes. The file must have been
    /// laid out or [read](super::read()).
    pub fn parts_of(&self, node: NodeId) -> impl Iterator<Item = FilePart> + '_ {
        let record = self.records.get(node.index()).and_then(Option::as_ref);
        record.into_iter().flat_map(|record| &record.extents).map(|extent| FilePart {
            file: u64::from(extent.logical) * BLOCK as u64,
            disk: extent.physical * BLOCK as u64,
            len: u64::from(extent.count) * BLOCK as u64,
        })
    }

    /// Why a kernel may show another content of a file than [`parts_of`](Self::parts_of) and the tree say; `None` if it
    /// cannot. No converter writes such a file.
    #[must_use]
    pub fn doubt(&self, node: NodeId) -> Option<&'static str> {
        self.records.get(node.index()).and_then(Option::as_ref)?.doubt
    }

    /// Positions on the disk of a file's content, in bytes and in the order of the file, without holes. The
    /// file must have been laid out or [read](super::read()).
    pub fn blocks_of(&self, node: NodeId) -> impl Iterator<Item = Range<u64>> + '_ {
        let record = self.records.get(node.index()).and_then(Option::as_ref);
        record.into_iter().flat_map(|record| &record.extents).map(|extent| {
            let start = extent.physical * BLOCK as u64;
            start..start + u64::from(extent.count) * BLOCK as u64
        })
    }

    /// Lays out the changes in `tree` since the last call. It must always be the same tree.
    ///
    /// # Errors
    /// [`Ext4Error`] if the disk has too few blocks or inodes, or a file cannot be represented; the message
    /// names the file. After an error the image is partly changed and must be dropped.
    pub fn commit_layer(&mut self, tree: &Tree) -> Result<LayerBlocks, Ext4Error> {
        let mut layer = LayerBlocks::default();
        self.release_removed(tree);
        let mut changed: Vec<NodeId> =
            tree.nodes().filter(|&node| tree.changed(node) > self.seen).collect();
        let new = self.number(tree, &changed)?;
        self.place_data(tree, &new, &mut layer)?;
        let root = tree.root();
        if self.write_lost_and_found(tree, &mut layer)? && changed.first() != Some(&root) {
            changed.insert(0, root);
        }
        for &node in &changed {
            let mut record = self.records[node.index()].take().unwrap_or_default();
            self.write_node(tree, node, &mut record, &mut layer)?;
            self.records[node.index()] = Some(record);
        }
        self.shared_xattrs.write(self.rules.checksums, &mut self.emitted, &mut layer);
        self.table.write(&mut self.emitted, &mut layer);
        self.write_accounts(&mut layer);
        self.seen = tree.clock();
        layer.sort();
        Ok(layer)
    }

    /// Frees the inodes and blocks of removed files.
    fn release_removed(&mut self, tree: &Tree) {
        for number in 0..self.records.len() {
            if !tree.is_live(NodeId(number as u32))
                && let Some(record) = self.records[number].take()
            {
                self.release_record(record);
            }
        }
    }

    /// Frees an inode and all its blocks.
    fn release_record(&mut self, mut record: FileRecord) {
        for extent in &record.extents {
            release(
                &mut self.blocks,
                &mut self.emitted,
                extent.physical,
                u64::from(extent.count),
                record.directory,
            );
        }
        for &block in &record.tree {
            release(&mut self.blocks, &mut self.emitted, block, 1, true);
        }
        self.release_xattrs(&mut record);
        self.inodes.free(record.inode, record.directory);
        self.table.clear(&self.layout, record.inode);
    }

    /// Releases a file's attribute block.
    fn release_xattrs(&mut self, record: &mut FileRecord) {
        if let Some(block) = record.xattr_block.take()
            && self.shared_xattrs.release(block)
        {
            release(&mut self.blocks, &mut self.emitted, block, 1, true);
        }
    }

    /// Gives inode numbers to new files and returns these files.
    fn number(&mut self, tree: &Tree, changed: &[NodeId]) -> Result<Vec<NodeId>, Ext4Error> {
        let mut new = Vec::new();
        for &node in changed {
            if node.index() >= self.records.len() {
                self.records.resize_with(node.index() + 1, || None);
            }
            let slot = &mut self.records[node.index()];
            if slot.is_none() {
                let directory = *tree.kind(node) == NodeKind::Directory;
                let inode = if node == tree.root() {
                    self.inodes.count_directory(ROOT_INODE);
                    ROOT_INODE
                } else {
                    self.inodes.take(directory)?
                };
                *slot = Some(FileRecord { inode, directory, ..FileRecord::default() });
                new.push(node);
            }
        }
        Ok(new)
    }

    /// Allocates blocks for the data of new files, in the order of the data in the tar.
    fn place_data(
        &mut self,
        tree: &Tree,
        new: &[NodeId],
        layer: &mut LayerBlocks,
    ) -> Result<(), Ext4Error> {
        let mut files = Vec::new();
        for &node in new {
            if let NodeKind::Regular { size, ref runs } = *tree.kind(node) {
                data::check(size, runs)
                    .map_err(|source| Ext4Error::Data { path: tree.path(node), source })?;
                if let Some(first) = runs.iter().map(|run| run.tar_offset).min() {
                    files.push((first, node, runs));
                }
            }
        }
        files.sort_by_key(|&(first, node, _)| (first, node));
        for (_, node, runs) in files {
            let extents = data::place(runs, &mut self.blocks, layer)?;
            if let Some(record) = &mut self.records[node.index()] {
                record.extents = extents;
            }
        }
        Ok(())
    }

    /// Encodes one file in its blocks and its inode.
    fn write_node(
        &mut self,
        tree: &Tree,
        node: NodeId,
        record: &mut FileRecord,
        layer: &mut LayerBlocks,
    ) -> Result<(), Ext4Error> {
        let kind = tree.kind(node);
        let own = self.inode_record(record);
        let sums = self.rules.checksums.of_inode(record.inode, inode::generation(&own));
        let xattrs = self.write_xattrs(tree, node, record, inode::xattr_room(&own), layer)?;
        let content = if record.kept && *kind != NodeKind::Directory {
            InodeContent::Kept
        } else {
            self.write_kind(tree, node, record, sums, layer)?
        };
        let mut links = tree.links(node);
        links += u32::from(node == tree.root() && self.lost_and_found.is_some());
        let fields = Fields { kind, links, blocks: record.blocks(), content, xattrs };
        self.write_inode(record, own, &fields, tree.attributes(node));
        Ok(())
    }

    /// Writes a file's blocks outside its inode, except file data.
    fn write_kind(
        &mut self,
        tree: &Tree,
        node: NodeId,
        record: &mut FileRecord,
        sums: InodeChecksum,
        layer: &mut LayerBlocks,
    ) -> Result<InodeContent, Ext4Error> {
        let kind = tree.kind(node);
        let mut indexed = false;
        let size = match kind {
            NodeKind::Directory => {
                let content = self.directory(tree, node, record.inode, sums)?;
                self.write_content(record, &content.bytes, layer)?;
                indexed = content.indexed;
                content.bytes.len() as u64
            }
            NodeKind::Regular { size, .. } => size.0,
            NodeKind::Symlink(target) => {
                if target.len() > INLINE_SYMLINK {
                    let mut block = [0; BLOCK];
                    block[..target.len()].copy_from_slice(target);
                    self.write_content(record, &block, layer)?;
                }
                target.len() as u64
            }
            NodeKind::Char { .. } | NodeKind::Block { .. } | NodeKind::Fifo | NodeKind::Socket => 0,
        };
        let has_extents = match kind {
            NodeKind::Directory | NodeKind::Regular { .. } => true,
            _ => !record.extents.is_empty(),
        };
        let extents =
            if has_extents { Some(self.write_extents(record, sums, layer)?) } else { None };
        Ok(InodeContent::New { size, extents, indexed })
    }

    /// The present inode of a file: the one of the lower layers, or a blank one.
    fn inode_record(&self, record: &FileRecord) -> Vec<u8> {
        let present = record.kept.then(|| self.table.get(&self.layout, record.inode)).flatten();
        present.map_or_else(
            || inode::blank(self.layout.inode_size, self.rules.extra_isize),
            <[u8]>::to_vec,
        )
    }

    fn write_inode(
        &mut self,
        record: &FileRecord,
        mut own: Vec<u8>,
        fields: &Fields,
        attributes: &Attributes,
    ) {
        inode::encode(&mut own, fields, attributes);
        self.rules.checksums.of_inode(record.inode, inode::generation(&own)).seal_inode(&mut own);
        self.table.put(&self.layout, record.inode, &own);
    }

    fn directory(
        &self,
        tree: &Tree,
        node: NodeId,
        inode: u32,
        checksum: InodeChecksum,
    ) -> Result<directory::Directory, Ext4Error> {
        let is_root = node == tree.root();
        let mut entries = Vec::new();
        for (name, child) in tree.children(node) {
            entries.push(DirectoryEntry {
                name,
                inode: self.inode(child),
                file_type: entry_type(tree.kind(child)),
            });
        }
        if is_root && let Some(own) = &self.lost_and_found {
            let entry = DirectoryEntry {
                name: LOST_AND_FOUND_NAME,
                inode: own.inode,
                file_type: file_type::DIRECTORY,
            };
            let place = entries.partition_point(|entry| entry.name < LOST_AND_FOUND_NAME);
            entries.insert(place, entry);
        }
        let parent = if is_root { ROOT_INODE } else { self.inode(tree.parent(node)) };
        let style = Style { hash: self.rules.hash, checksum };
        directory::encode(inode, parent, &entries, style).map_err(|_| {
            Ext4Error::DirectoryTooLarge { path: tree.path(node), entries: entries.len() }
        })
    }

    /// The inode number of a file; by now each file in the tree has one.
    fn inode(&self, node: NodeId) -> u32 {
        if node == NodeId(0) {
            return ROOT_INODE;
        }
        self.records.get(node.index()).and_then(Option::as_ref).map_or(0, |record| record.inode)
    }

    /// Writes whole blocks into the file's blocks, after adding or freeing blocks at its end.
    fn write_content(
        &mut self,
        record: &mut FileRecord,
        bytes: &[u8],
        layer: &mut LayerBlocks,
    ) -> Result<(), Ext4Error> {
        let needed = (bytes.len() / BLOCK) as u64;
        let mut present: u64 = record.extents.iter().map(|extent| u64::from(extent.count)).sum();
        while present < needed {
            let run = self.blocks.take(needed - present, false)?;
            extent::append(&mut record.extents, present as u32, run);
            present += run.count;
        }
        while present > needed
            && let Some(last) = record.extents.last_mut()
        {
            let excess = (present - needed).min(u64::from(last.count));
            last.count -= excess as u32;
            release(
                &mut self.blocks,
                &mut self.emitted,
                last.physical + u64::from(last.count),
                excess,
                true,
            );
            if last.count == 0 {
                record.extents.pop();
            }
            present -= excess;
        }
        for (place, block) in extent::places(&record.extents).zip(bytes.chunks_exact(BLOCK)) {
            self.emitted.emit(layer, place, block);
        }
        Ok(())
    }

    fn write_extents(
        &mut self,
        record: &mut FileRecord,
        sums: InodeChecksum,
        layer: &mut LayerBlocks,
    ) -> Result<[u8; 60], Ext4Error> {
        let needed = extent::tree_blocks(record.extents.len());
        while record.tree.len() < needed {
            record.tree.push(self.blocks.metadata_block()?);
        }
        for block in record.tree.drain(needed..) {
            release(&mut self.blocks, &mut self.emitted, block, 1, true);
        }
        let emitted = &mut self.emitted;
        Ok(extent::encode(&record.extents, &record.tree, |place, block| {
            sums.seal_extents(block);
            emitted.emit(layer, place, &block[..]);
        }))
    }

    /// Writes the attribute block, if one is needed, and returns the bytes for the inode, which has `room`
    /// bytes for them.
    fn write_xattrs(
        &mut self,
        tree: &Tree,
        node: NodeId,
        record: &mut FileRecord,
        room: usize,
        layer: &mut LayerBlocks,
    ) -> Result<Xattrs, Ext4Error> {
        let xattrs = &tree.attributes(node).xattrs;
        if record.kept_xattrs.take_if(|kept| kept != xattrs).is_some() {
            // A block that other files may share is left to them.
            if record.xattr_block.is_some_and(|block| self.shared_xattrs.is_shared(block)) {
                self.release_xattrs(record);
            }
        } else if record.kept_xattrs.is_some() {
            return Ok(Xattrs::Kept);
        }
        let pairs = xattrs.iter().map(|(name, value)| (&name[..], &value[..]));
        let encoded = xattr::encode(pairs, room)
            .map_err(|source| Ext4Error::Xattr { path: tree.path(node), source })?;
        if let Some(mut block) = encoded.block {
            let place = match record.xattr_block {
                Some(place) => place,
                None => *record.xattr_block.insert(self.blocks.metadata_block()?),
            };
            self.rules.checksums.seal_xattrs(&mut block[..], place);
            self.emitted.emit(layer, place, &block[..]);
        } else {
            self.release_xattrs(record);
        }
        Ok(Xattrs::New { in_inode: encoded.in_inode, block: record.xattr_block.unwrap_or(0) })
    }

    /// Keeps a `lost+found` in the root unless the tree has its own. Returns true if it changed.
    fn write_lost_and_found(
        &mut self,
        tree: &Tree,
        layer: &mut LayerBlocks,
    ) -> Result<bool, Ext4Error> {
        let wanted = tree.lookup(tree.root(), LOST_AND_FOUND_NAME).is_none();
        match (self.lost_and_found.is_some(), wanted) {
            (false, true) => {
                let block = self.blocks.metadata_block()?;
                let inode = self.inodes.claim(self.rules.first_inode)?;
                let extents = vec![InodeExtent { logical: 0, physical: block, count: 1 }];
                let own = FileRecord { inode, directory: true, extents, ..FileRecord::default() };
                self.write_own_directory(&own, layer)?;
                self.lost_and_found = Some(own);
            }
            (true, false) => {
                if let Some(own) = self.lost_and_found.take() {
                    self.release_record(own);
                }
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn write_own_directory(
        &mut self,
        own: &FileRecord,
        layer: &mut LayerBlocks,
    ) -> Result<(), Ext4Error> {
        let style =
            Style { hash: self.rules.hash, checksum: self.rules.checksums.of_inode(own.inode, 0) };
        let content = directory::encode(own.inode, ROOT_INODE, &[], style)
            .map_err(|_| Ext4Error::DirectoryTooLarge { path: "/lost+found".into(), entries: 0 })?;
        for place in extent::places(&own.extents) {
            self.emitted.emit(layer, place, &content.bytes);
        }
        let record = self.inode_record(own);
        let fields = Fields {
            kind: &NodeKind::Directory,
            links: 2,
            blocks: own.blocks(),
            content: InodeContent::New {
                size: BLOCK as u64,
                extents: Some(extent::encode(&own.extents, &[], |_, _| {})),
                indexed: false,
            },
            xattrs: Xattrs::New { in_inode: vec![0; inode::xattr_room(&record)], block: 0 },
        };
        let attributes = Attributes { mode: 0o700, ..Attributes::default() };
        self.write_inode(own, record, &fields, &attributes);
        Ok(())
    }

    /// Writes bitmaps, descriptors and superblock.
    fn write_accounts(&mut self, layer: &mut LayerBlocks) {
        let size = self.layout.descriptor_size;
        let mut groups = std::mem::take(&mut self.undescribed);
        let sums = self.rules.checksums;
        let mut block_bitmaps = BTreeSet::new();
        for (group, bitmap) in self.blocks.bitmaps.take_dirty() {
            let places = &self.layout.groups[group as usize];
            self.emitted.emit(layer, places.block_bitmap, bitmap);
            let record = &mut self.descriptors[group as usize * size..][..size];
            let bits = &bitmap[..self.layout.group_blocks as usize / 8];
            sums.note_bitmap(record, group::BLOCK_BITMAP_SUM, bits);
            groups.insert(group);
            block_bitmaps.insert(group);
        }
        for (group, bitmap) in self.inodes.bitmaps.take_dirty() {
            let places = &self.layout.groups[group as usize];
            self.emitted.emit(layer, places.inode_bitmap, bitmap);
            let record = &mut self.descriptors[group as usize * size..][..size];
            let bits = &bitmap[..self.layout.group_inodes as usize / 8];
            sums.note_bitmap(record, group::INODE_BITMAP_SUM, bits);
            groups.insert(group);
        }
        let mut dirty = BTreeSet::new();
        for group in groups {
            let counts = self.counts(group);
            let at = group as usize * size;
            let record = &mut self.descriptors[at..at + size];
            group::update(record, counts, &self.layout, sums, block_bitmaps.contains(&group));
            sums.seal_descriptor(record, group);
            dirty.insert(at / BLOCK);
        }
        for index in dirty {
            let bytes = &self.descriptors[index * BLOCK..(index + 1) * BLOCK];
            self.emitted.emit(layer, self.layout.descriptors[index], bytes);
        }
        let free_inodes = self.inodes.bitmaps.free() as u32;
        let free_blocks = self.blocks.bitmaps.free();
        superblock::update(&mut self.superblock, free_blocks, free_inodes, sums, self.rules.wide);
        self.emitted.emit(layer, 0, &self.superblock[..]);
    }

    fn counts(&self, group: u32) -> Counts {
        let account = self.inodes.account(group);
        Counts {
            free_blocks: self.layout.blocks_in(group) - self.blocks.bitmaps.used(group),
            free_inodes: self.layout.group_inodes - self.inodes.bitmaps.used(group),
            directories: account.directories,
            untouched_inodes: account.untouched,
        }
    }
}

/// Frees blocks; blocks of metadata are also forgotten.
fn release(blocks: &mut Blocks, emitted: &mut Emitted, start: u64, count: u64, metadata: bool) {
    blocks.free(BlockRun { start, count });
    if metadata {
        (start..start + count).for_each(|block| emitted.forget(block));
    }
}

fn entry_type(kind: &NodeKind) -> u8 {
    match kind {
        NodeKind::Directory => file_type::DIRECTORY,
        NodeKind::Regular { .. } => file_type::REGULAR,
        NodeKind::Symlink(_) => file_type::SYMLINK,
        NodeKind::Char { .. } => file_type::CHAR,
        NodeKind::Block { .. } => file_type::BLOCK,
        NodeKind::Fifo => file_type::FIFO,
        NodeKind::Socket => file_type::SOCKET,
    }
}
