//! The image: what the layers so far have put on the disk, and how the next one changes it.
//!
//! A commit goes through the tree once. Files that are gone give up what they had; new files get
//! inode numbers in the order of their creation; new data gets blocks in the order of the tar. Then
//! every file that changed is encoded anew into the places it has, and of all blocks only those
//! that differ from what lower layers hold go into the layer. Last come bitmaps, descriptors and
//! the superblock.

use std::collections::BTreeSet;

use super::allocation::{BlockRun, Blocks, Inodes};
use super::directory::{self, Entry, file_type};
use super::extent::{self, Extent};
use super::file::{Attributes, Kind};
use super::geometry::{BLOCK, DESCRIPTOR, GROUP_INODES, Geometry, INODE, Layout};
use super::group::{Counts, descriptor};
use super::inode::{self, Fields, INLINE_SYMLINK};
use super::layer::{Emitted, LayerBlocks};
use super::superblock::{self, FIRST_INODE, Identity};
use super::tree::{NodeId, Tree};
use super::{Ext4Error, data, xattr};

/// Inode number of the root directory.
const ROOT_INODE: u32 = 2;
/// Inode number of our own `lost+found`.
const LOST_AND_FOUND: u32 = FIRST_INODE;
const LOST_AND_FOUND_NAME: &[u8] = b"lost+found";

/// What a file has on the disk.
#[derive(Debug, Default)]
struct Record {
    inode: u32,
    directory: bool,
    /// Its content.
    extents: Vec<Extent>,
    /// Blocks of its extent tree.
    tree: Vec<u64>,
    xattr_block: Option<u64>,
}

/// An ext4 filesystem being built layer by layer.
#[derive(Debug)]
pub struct Image {
    layout: Layout,
    identity: Identity,
    blocks: Blocks,
    inodes: Inodes,
    emitted: Emitted,
    /// By node number.
    records: Vec<Option<Record>>,
    /// All inode tables from inode 1 to the last one used.
    table: Vec<u8>,
    /// Blocks of it that this layer changed.
    table_dirty: BTreeSet<usize>,
    /// All group descriptors; empty before the first layer.
    descriptors: Vec<u8>,
    /// The block of our own `lost+found` while it exists.
    lost_and_found: Option<u64>,
    /// The tree's counter at the last commit.
    seen: u64,
}

impl Image {
    /// An empty disk.
    ///
    /// # Errors
    /// The size is out of bounds.
    pub fn new(geometry: Geometry, identity: Identity) -> Result<Image, Ext4Error> {
        let layout = Layout::new(geometry)?;
        Ok(Image {
            layout,
            identity,
            blocks: Blocks::new(&layout),
            inodes: Inodes::new(&layout, LOST_AND_FOUND),
            emitted: Emitted::default(),
            records: Vec::new(),
            table: Vec::new(),
            table_dirty: BTreeSet::new(),
            descriptors: Vec::new(),
            lost_and_found: None,
            seen: 0,
        })
    }

    /// Lays out what changed in `tree`, always the same one, since the last call.
    ///
    /// # Errors
    /// The disk has too few blocks or inodes, or a file cannot be expressed; the message names it.
    /// After an error the image is half changed and of no more use.
    pub fn commit_layer(&mut self, tree: &Tree) -> Result<LayerBlocks, Ext4Error> {
        let mut layer = LayerBlocks::default();
        self.release_removed(tree);
        let changed: Vec<NodeId> =
            tree.nodes().filter(|&node| tree.changed(node) > self.seen).collect();
        let new = self.number(tree, &changed)?;
        self.place_data(tree, &new, &mut layer)?;
        self.write_lost_and_found(tree, &mut layer)?;
        for &node in &changed {
            let mut record = self.records[node.index()].take().unwrap_or_default();
            self.write_node(tree, node, &mut record, &mut layer)?;
            self.records[node.index()] = Some(record);
        }
        self.write_table(&mut layer);
        self.write_accounts(&mut layer);
        self.seen = tree.clock();
        layer.sort();
        Ok(layer)
    }

    /// Frees what removed files had.
    fn release_removed(&mut self, tree: &Tree) {
        for (number, slot) in (0..).zip(&mut self.records) {
            if !tree.is_live(NodeId(number))
                && let Some(record) = slot.take()
            {
                for extent in &record.extents {
                    release(
                        &mut self.blocks,
                        &mut self.emitted,
                        extent.physical,
                        u64::from(extent.count),
                        record.directory,
                    );
                }
                for &block in record.tree.iter().chain(&record.xattr_block) {
                    release(&mut self.blocks, &mut self.emitted, block, 1, true);
                }
                self.inodes.free(record.inode, record.directory);
                store(&mut self.table, &mut self.table_dirty, record.inode, &[0; INODE]);
            }
        }
    }

    /// Gives inode numbers to new files and returns those.
    fn number(&mut self, tree: &Tree, changed: &[NodeId]) -> Result<Vec<NodeId>, Ext4Error> {
        let mut new = Vec::new();
        for &node in changed {
            if node.index() >= self.records.len() {
                self.records.resize_with(node.index() + 1, || None);
            }
            let slot = &mut self.records[node.index()];
            if slot.is_none() {
                let directory = *tree.kind(node) == Kind::Directory;
                let inode = if node == tree.root() {
                    self.inodes.count_directory(ROOT_INODE);
                    ROOT_INODE
                } else {
                    self.inodes.take(directory)?
                };
                *slot = Some(Record { inode, directory, ..Record::default() });
                new.push(node);
            }
        }
        Ok(new)
    }

    /// Gives blocks to the data of new files, in the order in which it lies in the tar.
    fn place_data(
        &mut self,
        tree: &Tree,
        new: &[NodeId],
        layer: &mut LayerBlocks,
    ) -> Result<(), Ext4Error> {
        let mut files = Vec::new();
        for &node in new {
            if let Kind::Regular { size, ref runs } = *tree.kind(node) {
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

    /// Encodes one file into its places.
    fn write_node(
        &mut self,
        tree: &Tree,
        node: NodeId,
        record: &mut Record,
        layer: &mut LayerBlocks,
    ) -> Result<(), Ext4Error> {
        let kind = tree.kind(node);
        let attributes = tree.attributes(node);
        let mut indexed = false;
        let mut links = tree.links(node);
        let size = match kind {
            Kind::Directory => {
                let content = self.directory(tree, node, record.inode)?;
                self.write_content(record, &content.bytes, layer)?;
                indexed = content.indexed;
                links += u32::from(node == tree.root() && self.lost_and_found.is_some());
                content.bytes.len() as u64
            }
            Kind::Regular { size, .. } => size.0,
            Kind::Symlink(target) => {
                if target.len() > INLINE_SYMLINK {
                    let mut block = [0; BLOCK];
                    block[..target.len()].copy_from_slice(target);
                    self.write_content(record, &block, layer)?;
                }
                target.len() as u64
            }
            Kind::Char { .. } | Kind::Block { .. } | Kind::Fifo => 0,
        };
        let has_extents = match kind {
            Kind::Directory | Kind::Regular { .. } => true,
            _ => !record.extents.is_empty(),
        };
        let extents = if has_extents { Some(self.write_extents(record, layer)?) } else { None };
        let xattrs = self.write_xattrs(tree, node, record, layer)?;
        let content: u64 = record.extents.iter().map(|extent| u64::from(extent.count)).sum();
        let fields = Fields {
            kind,
            size,
            links,
            blocks: content + record.tree.len() as u64 + u64::from(record.xattr_block.is_some()),
            extents,
            indexed,
            xattrs: &xattrs,
            xattr_block: record.xattr_block.unwrap_or(0),
        };
        store(
            &mut self.table,
            &mut self.table_dirty,
            record.inode,
            &inode::encode(&fields, attributes),
        );
        Ok(())
    }

    fn directory(
        &self,
        tree: &Tree,
        node: NodeId,
        inode: u32,
    ) -> Result<directory::Directory, Ext4Error> {
        let is_root = node == tree.root();
        let mut entries = Vec::new();
        for (name, child) in tree.children(node) {
            entries.push(Entry {
                name,
                inode: self.inode(child),
                file_type: entry_type(tree.kind(child)),
            });
        }
        if is_root && self.lost_and_found.is_some() {
            let entry = Entry {
                name: LOST_AND_FOUND_NAME,
                inode: LOST_AND_FOUND,
                file_type: file_type::DIRECTORY,
            };
            let place = entries.partition_point(|entry| entry.name < LOST_AND_FOUND_NAME);
            entries.insert(place, entry);
        }
        let parent = if is_root { ROOT_INODE } else { self.inode(tree.parent(node)) };
        directory::encode(inode, parent, &entries, self.identity.seed_words()).map_err(|_| {
            Ext4Error::DirectoryTooLarge { path: tree.path(node), entries: entries.len() }
        })
    }

    /// The inode of a file; every one in the tree has a number by now.
    fn inode(&self, node: NodeId) -> u32 {
        if node == NodeId(0) {
            return ROOT_INODE;
        }
        self.records.get(node.index()).and_then(Option::as_ref).map_or(0, |record| record.inode)
    }

    /// Writes whole blocks into the file's blocks, after adding or freeing some at its end.
    fn write_content(
        &mut self,
        record: &mut Record,
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
        let places = record
            .extents
            .iter()
            .flat_map(|extent| extent.physical..extent.physical + u64::from(extent.count));
        for (place, block) in places.zip(bytes.chunks_exact(BLOCK)) {
            self.emitted.emit(layer, place, block);
        }
        Ok(())
    }

    fn write_extents(
        &mut self,
        record: &mut Record,
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
            emitted.emit(layer, place, &block[..]);
        }))
    }

    /// Writes the attribute block, if one is needed, and returns what belongs into the inode.
    fn write_xattrs(
        &mut self,
        tree: &Tree,
        node: NodeId,
        record: &mut Record,
        layer: &mut LayerBlocks,
    ) -> Result<[u8; xattr::IN_INODE], Ext4Error> {
        let xattrs =
            tree.attributes(node).xattrs.iter().map(|(name, value)| (&name[..], &value[..]));
        let encoded = xattr::encode(xattrs)
            .map_err(|source| Ext4Error::Xattr { path: tree.path(node), source })?;
        if let Some(block) = &encoded.block {
            let place = match record.xattr_block {
                Some(place) => place,
                None => *record.xattr_block.insert(self.blocks.metadata_block()?),
            };
            self.emitted.emit(layer, place, &block[..]);
        } else if let Some(place) = record.xattr_block.take() {
            release(&mut self.blocks, &mut self.emitted, place, 1, true);
        }
        Ok(encoded.in_inode)
    }

    /// Keeps a `lost+found` in the root unless the tree has its own.
    fn write_lost_and_found(
        &mut self,
        tree: &Tree,
        layer: &mut LayerBlocks,
    ) -> Result<(), Ext4Error> {
        let wanted = tree.lookup(tree.root(), LOST_AND_FOUND_NAME).is_none();
        match self.lost_and_found {
            None if wanted => {
                let block = self.blocks.metadata_block()?;
                self.inodes.claim(LOST_AND_FOUND);
                self.lost_and_found = Some(block);
                self.write_own_directory(block, layer)?;
            }
            Some(block) if !wanted => {
                release(&mut self.blocks, &mut self.emitted, block, 1, true);
                self.inodes.free(LOST_AND_FOUND, true);
                store(&mut self.table, &mut self.table_dirty, LOST_AND_FOUND, &[0; INODE]);
                self.lost_and_found = None;
            }
            _ => {}
        }
        Ok(())
    }

    fn write_own_directory(
        &mut self,
        block: u64,
        layer: &mut LayerBlocks,
    ) -> Result<(), Ext4Error> {
        let seed = self.identity.seed_words();
        let content = directory::encode(LOST_AND_FOUND, ROOT_INODE, &[], seed)
            .map_err(|_| Ext4Error::DirectoryTooLarge { path: "/lost+found".into(), entries: 0 })?;
        self.emitted.emit(layer, block, &content.bytes);
        let extents = [Extent { logical: 0, physical: block, count: 1 }];
        let fields = Fields {
            kind: &Kind::Directory,
            size: BLOCK as u64,
            links: 2,
            blocks: 1,
            extents: Some(extent::encode(&extents, &[], |_, _| {})),
            indexed: false,
            xattrs: &[0; xattr::IN_INODE],
            xattr_block: 0,
        };
        let attributes = Attributes { mode: 0o700, ..Attributes::default() };
        store(
            &mut self.table,
            &mut self.table_dirty,
            LOST_AND_FOUND,
            &inode::encode(&fields, &attributes),
        );
        Ok(())
    }

    fn write_table(&mut self, layer: &mut LayerBlocks) {
        for index in std::mem::take(&mut self.table_dirty) {
            let bytes = &self.table[index * BLOCK..(index + 1) * BLOCK];
            self.emitted.emit(layer, self.layout.inode_tables + index as u64, bytes);
        }
    }

    /// Bitmaps, descriptors and superblock.
    fn write_accounts(&mut self, layer: &mut LayerBlocks) {
        let mut groups = BTreeSet::new();
        for (group, bitmap) in self.blocks.bitmaps.take_dirty() {
            self.emitted.emit(layer, self.layout.block_bitmaps + u64::from(group), bitmap);
            groups.insert(group);
        }
        for (group, bitmap) in self.inodes.bitmaps.take_dirty() {
            self.emitted.emit(layer, self.layout.inode_bitmaps + u64::from(group), bitmap);
            groups.insert(group);
        }
        if self.descriptors.is_empty() {
            let length = self.layout.groups as usize * DESCRIPTOR;
            self.descriptors = vec![0; length.next_multiple_of(BLOCK)];
            groups.extend(0..self.layout.groups);
        }
        let mut dirty = BTreeSet::new();
        for group in groups {
            let at = group as usize * DESCRIPTOR;
            let record = descriptor(&self.layout, group, self.counts(group), &self.identity.uuid);
            self.descriptors[at..at + DESCRIPTOR].copy_from_slice(&record);
            dirty.insert(at / BLOCK);
        }
        for index in dirty {
            let bytes = &self.descriptors[index * BLOCK..(index + 1) * BLOCK];
            self.emitted.emit(layer, self.layout.descriptors + index as u64, bytes);
        }
        let free_inodes = self.inodes.bitmaps.free() as u32;
        let block = superblock::block(
            &self.layout,
            &self.identity,
            self.blocks.bitmaps.free(),
            free_inodes,
        );
        self.emitted.emit(layer, 0, &block);
    }

    fn counts(&self, group: u32) -> Counts {
        Counts {
            free_blocks: self.layout.blocks_in(group) - self.blocks.bitmaps.used(group),
            free_inodes: GROUP_INODES - self.inodes.bitmaps.used(group),
            directories: self.inodes.directories(group),
            untouched_inodes: self.inodes.untouched(group),
        }
    }
}

/// Frees blocks; those of metadata are also forgotten.
fn release(blocks: &mut Blocks, emitted: &mut Emitted, start: u64, count: u64, metadata: bool) {
    blocks.free(BlockRun { start, count });
    if metadata {
        (start..start + count).for_each(|block| emitted.forget(block));
    }
}

/// Puts an inode into the table.
fn store(table: &mut Vec<u8>, dirty: &mut BTreeSet<usize>, inode: u32, record: &[u8; INODE]) {
    let at = (inode - 1) as usize * INODE;
    if table.len() < at + INODE {
        table.resize((at + INODE).next_multiple_of(BLOCK), 0);
    }
    let slot = &mut table[at..at + INODE];
    if *slot != record[..] {
        slot.copy_from_slice(record);
        dirty.insert(at / BLOCK);
    }
}

fn entry_type(kind: &Kind) -> u8 {
    match kind {
        Kind::Directory => file_type::DIRECTORY,
        Kind::Regular { .. } => file_type::REGULAR,
        Kind::Symlink(_) => file_type::SYMLINK,
        Kind::Char { .. } => file_type::CHAR,
        Kind::Block { .. } => file_type::BLOCK,
        Kind::Fifo => file_type::FIFO,
    }
}
