//! Group descriptors, bitmaps and inode tables.

use super::superblock::Superblock;
use super::{ReadError, Source, damaged};
use crate::ext4::allocation::{Bitmaps, InodeAccount};
use crate::ext4::field::{get16, get32};
use crate::ext4::geometry::{BLOCK, FilesystemLayout, GroupPlaces};
use crate::ext4::group::{BLOCK_UNINIT, INODE_UNINIT};
use crate::ext4::layer::Emitted;
use crate::ext4::table::InodeTable;
use source::Reserved;

/// The counts of the filesystem, and the owner of each block.
pub(super) struct Groups {
    pub(super) layout: FilesystemLayout,
    pub(super) descriptors: Vec<u8>,
    /// Blocks in use by the filesystem's bitmaps.
    pub(super) blocks: Bitmaps,
    pub(super) inodes: Bitmaps,
    pub(super) accounts: Vec<InodeAccount>,
    pub(super) table: InodeTable,
    pub(super) emitted: Emitted,
    /// Blocks owned by the files read so far.
    claimed: Bitmaps,
    /// What is kept of the filesystem.
    pub(super) memory: Reserved,
}

/// Memory of a group, in bytes: three bitmaps of a block, its descriptor and account, and the checksums of its blocks.
const GROUP_MEMORY: u64 = 4 * BLOCK as u64;

impl Groups {
    pub(super) fn read(
        source: Source<'_>,
        superblock: &Superblock,
        memory: Reserved,
    ) -> Result<Self, ReadError> {
        let (layout, descriptors) = places(source, superblock)?;
        let count = layout.group_count();
        let inodes = Bitmaps::new(layout.group_inodes, u64::from(layout.inodes()), count);
        let mut groups = Self {
            blocks: Bitmaps::new(layout.group_blocks, layout.blocks, count),
            claimed: Bitmaps::new(layout.group_blocks, layout.blocks, count),
            accounts: Vec::with_capacity(layout.groups.len()),
            table: InodeTable::default(),
            emitted: Emitted::default(),
            inodes,
            descriptors,
            layout,
            memory,
        };
        groups.emitted.know(0, &source.block(0)?[..]);
        for (&place, bytes) in
            groups.layout.descriptors.iter().zip(groups.descriptors.chunks(BLOCK))
        {
            groups.emitted.know(place, bytes);
        }
        groups.claim_fixed(superblock)?;
        for group in 0..count {
            groups.load_group(source, superblock, group)?;
        }
        Ok(groups)
    }

    /// Reserves memory for what was read.
    pub(super) fn keep(&mut self, bytes: u64) -> Result<(), ReadError> {
        Ok(self.memory.add(bytes, "The filesystem of the image")?)
    }

    fn descriptor(&self, group: u32) -> &[u8] {
        let size = self.layout.descriptor_size;
        &self.descriptors[group as usize * size..][..size]
    }

    /// Claims superblocks, descriptors, bitmaps and inode tables.
    fn claim_fixed(&mut self, superblock: &Superblock) -> Result<(), ReadError> {
        let descriptor_blocks = self.layout.descriptors.len() as u64;
        let per_block = superblock.descriptors_in_block();
        for group in 0..self.layout.group_count() {
            let start = u64::from(group) * u64::from(self.layout.group_blocks);
            let copies = u64::from(superblock.has_superblock(group));
            let behind = match superblock.first_meta_group {
                Some(first) if group / per_block >= first => {
                    u64::from([0, 1, per_block - 1].contains(&(group % per_block)))
                }
                Some(first) => copies * u64::from(first),
                None => copies * (descriptor_blocks + superblock.reserved_descriptors),
            };
            self.take(start, copies + behind, "a superblock or its descriptors")?;
            let places = self.layout.groups[group as usize];
            self.take(places.block_bitmap, 1, "a block bitmap")?;
            self.take(places.inode_bitmap, 1, "an inode bitmap")?;
            self.take(places.inode_table, self.layout.table_blocks(), "an inode table")?;
        }
        Ok(())
    }

    /// Claims blocks, which must be in range and without an owner.
    fn take(&mut self, start: u64, count: u64, what: &str) -> Result<(), ReadError> {
        let end = start.checked_add(count).filter(|&end| end <= self.layout.blocks);
        let end = end.ok_or_else(|| {
            damaged(format!("Block {start} and {count} more"), "lie outside of the disk")
        })?;
        if !self.claimed.are(false, start, end - start) {
            let place = format!("One of the blocks {start}..{end}");
            return Err(damaged(place, format!("has two owners; one of them is {what}")));
        }
        self.claimed.mark(start, end - start, true);
        Ok(())
    }

    /// Claims blocks for a file; they must be marked in use.
    pub(super) fn claim(&mut self, start: u64, count: u64, inode: u32) -> Result<(), ReadError> {
        if start == 0 {
            return Err(damaged(format!("Inode {inode}"), "points to block 0"));
        }
        self.take(start, count, &format!("inode {inode}"))?;
        if !self.blocks.are(true, start, count) {
            let rule = format!("is marked free, but belongs to inode {inode}");
            return Err(damaged(format!("One of the {count} blocks from {start} on"), rule));
        }
        Ok(())
    }

    fn load_group(
        &mut self,
        source: Source<'_>,
        superblock: &Superblock,
        group: u32,
    ) -> Result<(), ReadError> {
        self.keep(GROUP_MEMORY)?;
        let places = self.layout.groups[group as usize];
        let record = self.descriptor(group);
        let wide = record.len() >= 64;
        let high = |at: usize| if wide { u32::from(get16(record, at)) << 16 } else { 0 };
        let checked = superblock.checksums.of_descriptors();
        let flags = if checked { get16(record, 18) } else { 0 };
        let per_group = self.layout.group_inodes;
        let untouched = match (checked, flags & INODE_UNINIT != 0) {
            (true, true) => per_group,
            (true, false) => (u32::from(get16(record, 28)) | high(50)).min(per_group),
            (false, _) => 0,
        };
        let directories = u32::from(get16(record, 16)) | high(48);
        self.accounts.push(InodeAccount { directories, untouched });

        let page = source.block(places.block_bitmap)?;
        self.emitted.know(places.block_bitmap, &page[..]);
        let fixed = self.claimed.page(group);
        let page =
            if flags & BLOCK_UNINIT != 0 { fixed.map(|page| Box::new(*page)) } else { Some(page) };
        if let Some(page) = page.filter(|page| page.iter().any(|&byte| byte != 0)) {
            self.blocks.load(group, page);
        }
        let start = u64::from(group) * u64::from(self.layout.group_blocks);
        if !self.blocks.covers(&self.claimed, group) {
            let rule = "marks blocks of the filesystem itself as free";
            return Err(damaged(format!("The bitmap of the group at block {start}"), rule));
        }

        let page = source.block(places.inode_bitmap)?;
        self.emitted.know(places.inode_bitmap, &page[..]);
        if flags & INODE_UNINIT == 0 && page.iter().any(|&byte| byte != 0) {
            self.load_table(source, group, &page, untouched)?;
            self.inodes.load(group, page);
        }
        Ok(())
    }

    /// Loads the blocks of a group's table that contain an inode in use.
    fn load_table(
        &mut self,
        source: Source<'_>,
        group: u32,
        bitmap: &[u8; BLOCK],
        untouched: u32,
    ) -> Result<(), ReadError> {
        let in_block = BLOCK / self.layout.inode_size;
        let touched = (self.layout.group_inodes - untouched) as usize;
        let is_used = |nth: usize| bitmap[nth / 8] & (1 << (nth % 8)) != 0;
        let table = self.layout.groups[group as usize].inode_table;
        for first in (0..self.layout.group_inodes as usize).step_by(in_block) {
            let end = (first + in_block).min(self.layout.group_inodes as usize);
            if !(first..end).any(is_used) {
                continue;
            }
            if let Some(bad) = (touched.max(first)..end).find(|&nth| is_used(nth)) {
                let number = group * self.layout.group_inodes + bad as u32 + 1;
                let rule = "is in use in a part of the table that is marked unused";
                return Err(damaged(format!("Inode {number}"), rule));
            }
            let block = table + (first / in_block) as u64;
            let mut page = source.block(block)?;
            self.emitted.know(block, &page[..]);
            // The bytes there were never written, and can have any value.
            page[(touched.clamp(first, end) - first) * self.layout.inode_size..].fill(0);
            self.table.load(block, page);
        }
        Ok(())
    }
}

/// Reads all descriptors, and the positions in them.
fn places(
    source: Source<'_>,
    superblock: &Superblock,
) -> Result<(FilesystemLayout, Vec<u8>), ReadError> {
    let count = superblock.groups();
    let per_block = superblock.descriptors_in_block();
    let mut layout = FilesystemLayout {
        blocks: superblock.blocks,
        group_blocks: superblock.group_blocks,
        group_inodes: superblock.group_inodes,
        inode_size: superblock.inode_size,
        descriptor_size: superblock.descriptor_size,
        descriptors: Vec::new(),
        groups: Vec::new(),
        metadata: 0,
        data: 0,
    };
    let mut descriptors = Vec::new();
    for first in (0..count).step_by(per_block as usize) {
        let nth = first / per_block;
        let place = match superblock.first_meta_group {
            Some(meta) if nth >= meta => {
                let start = u64::from(first) * u64::from(superblock.group_blocks);
                start + u64::from(superblock.has_superblock(first))
            }
            _ => 1 + u64::from(nth),
        };
        if place >= superblock.blocks {
            return Err(damaged("The superblock", "has its descriptors outside of the disk"));
        }
        let block = source.block(place)?;
        layout.descriptors.push(place);
        for (group, record) in (first..count).zip(block.chunks_exact(superblock.descriptor_size)) {
            let places = group_places(record);
            let table = places.inode_table.checked_add(layout.table_blocks());
            let in_range = |place: u64| place > 0 && place < layout.blocks;
            if !in_range(places.block_bitmap)
                || !in_range(places.inode_bitmap)
                || !in_range(places.inode_table)
                || table.is_none_or(|end| end > layout.blocks)
            {
                let rule = "has its bitmaps or inodes outside of the disk";
                return Err(damaged(format!("Group {group}"), rule));
            }
            layout.groups.push(places);
        }
        descriptors.extend_from_slice(&block[..]);
    }
    Ok((layout, descriptors))
}

fn group_places(record: &[u8]) -> GroupPlaces {
    let place = |low: usize, high: usize| {
        let high = if record.len() >= 64 { get32(record, high) } else { 0 };
        u64::from(get32(record, low)) | u64::from(high) << 32
    };
    GroupPlaces {
        block_bitmap: place(0, 32),
        inode_bitmap: place(4, 36),
        inode_table: place(8, 40),
    }
}
