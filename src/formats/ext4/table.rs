//! The inode tables, as far as they have content: pages by disk block.

use std::collections::{BTreeMap, BTreeSet};

use super::geometry::{BLOCK, FilesystemLayout};
use super::layer::{Emitted, LayerBlocks};

/// Blocks of inodes, with marks on those that this layer changed.
#[derive(Debug, Default)]
pub(super) struct InodeTable {
    pages: BTreeMap<u64, Box<[u8; BLOCK]>>,
    dirty: BTreeSet<u64>,
}

impl InodeTable {
    /// Takes over a block from the lower layers.
    pub(super) fn load(&mut self, block: u64, page: Box<[u8; BLOCK]>) {
        self.pages.insert(block, page);
    }

    /// An inode, if its block was ever written.
    pub(super) fn get(&self, layout: &FilesystemLayout, inode: u32) -> Option<&[u8]> {
        let (block, at) = layout.inode_place(inode);
        self.pages.get(&block).map(|page| &page[at..at + layout.inode_size])
    }

    /// Writes an inode to its position.
    pub(super) fn put(&mut self, layout: &FilesystemLayout, inode: u32, record: &[u8]) {
        let (block, at) = layout.inode_place(inode);
        let page = self.pages.entry(block).or_insert_with(|| Box::new([0; BLOCK]));
        let slot = &mut page[at..at + record.len()];
        if *slot != *record {
            slot.copy_from_slice(record);
            self.dirty.insert(block);
        }
    }

    /// Sets an inode to zeros.
    pub(super) fn clear(&mut self, layout: &FilesystemLayout, inode: u32) {
        self.put(layout, inode, &vec![0; layout.inode_size]);
    }

    /// Adds the changed blocks to the layer.
    pub(super) fn write(&mut self, emitted: &mut Emitted, layer: &mut LayerBlocks) {
        for block in std::mem::take(&mut self.dirty) {
            if let Some(page) = self.pages.get(&block) {
                emitted.emit(layer, block, &page[..]);
            }
        }
    }
}
