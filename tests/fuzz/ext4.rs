//! Any bytes as a filesystem below a new layer: refused, or continued so that the result reads back as the
//! same tree.
//!
//! The input is a sparse disk: block number and length, 16 bits each, and the beginning of that block.
#![no_main]

use std::collections::BTreeMap;

use formats::ext4::{Attributes, LayerBlocks, LayerRun, NodeId, NodeKind, Tree, read};
use formats::units::{Bytes, Sectors};
use libfuzzer_sys::fuzz_target;
use source::{ByteSource, SourceError};

const BLOCK: usize = 4096;
const BLOCKS: usize = 2048;

#[derive(Default)]
struct Disk(BTreeMap<u64, Vec<u8>>);

impl Disk {
    fn parse(mut data: &[u8]) -> Self {
        let mut disk = Self::default();
        while let [a, b, c, d, rest @ ..] = data {
            let number = u64::from(u16::from_le_bytes([*a, *b])) % BLOCKS as u64;
            let len = (usize::from(u16::from_le_bytes([*c, *d])) % (BLOCK + 1)).min(rest.len());
            let mut block = rest[..len].to_vec();
            block.resize(BLOCK, 0);
            disk.0.insert(number, block);
            data = &rest[len..];
        }
        disk
    }

    fn written(&self) -> Vec<(Sectors, Sectors)> {
        self.0.keys().map(|&block| (Sectors(block * 8), Sectors(8))).collect()
    }

    fn put(&mut self, layer: &LayerBlocks) {
        for run in layer.runs() {
            let bytes = match run {
                LayerRun::Metadata { bytes, .. } => bytes.to_vec(),
                LayerRun::Zeroed { count, .. } => vec![0; count.bytes().0 as usize],
                LayerRun::Remote { count, .. } => vec![1; count.bytes().0 as usize],
            };
            for (lba, sector) in (run.lba().0..).zip(bytes.chunks(512)) {
                let block = self.0.entry(lba / 8).or_insert_with(|| vec![0; BLOCK]);
                block[(lba % 8) as usize * 512..][..512].copy_from_slice(sector);
            }
        }
    }
}

impl ByteSource for Disk {
    fn len(&self) -> u64 {
        (BLOCKS * BLOCK) as u64
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> Result<(), SourceError> {
        let (name, end) = (self.name().to_owned(), offset.saturating_add(buf.len() as u64));
        if end > self.len() {
            return Err(SourceError::PastEnd { name, offset, end, size: self.len() });
        }
        // Only whole blocks are requested.
        match self.0.get(&(offset / BLOCK as u64)) {
            Some(block) => buf.copy_from_slice(block),
            None => buf.fill(0),
        }
        Ok(())
    }

    fn name(&self) -> &str {
        "the disk"
    }
}

/// Paths with the visible properties of each file, by a walk.
fn listing(tree: &Tree) -> BTreeMap<Vec<u8>, String> {
    let mut found = BTreeMap::new();
    let mut open = vec![(Vec::new(), tree.root())];
    while let Some((path, dir)) = open.pop() {
        for (name, child) in tree.children(dir) {
            let path = [&path[..], b"/", name].concat();
            let kind = match tree.kind(child) {
                NodeKind::Regular { size, .. } => format!("file of {size}"),
                other => format!("{other:?}"),
            };
            let line = format!("{kind} {:?} {}", tree.attributes(child), tree.links(child));
            found.insert(path.clone(), line);
            if *tree.kind(child) == NodeKind::Directory {
                open.push((path, child));
            }
        }
    }
    found
}

/// A layer that adds, links, changes and removes.
fn change(tree: &mut Tree) -> Option<()> {
    let root = tree.root();
    let names: Vec<(Vec<u8>, NodeId)> =
        tree.children(root).map(|(name, node)| (name.to_vec(), node)).collect();
    let attributes = Attributes { mode: 0o755, ..Attributes::default() };
    let dir =
        tree.create(root, b"added by the layer", NodeKind::Directory, attributes.clone()).ok()?;
    let file = NodeKind::Regular { size: Bytes(0), runs: Vec::new() };
    for number in 0..60 {
        let name = format!("a name that takes some of its block {number:060}");
        tree.create(dir, name.as_bytes(), file.clone(), attributes.clone()).ok()?;
    }
    for (nth, (name, node)) in names.iter().enumerate() {
        match nth % 3 {
            0 => tree.remove(root, name).ok()?,
            1 => {
                let mut changed = tree.attributes(*node).clone();
                changed.xattrs.insert(b"user.layer".to_vec(), vec![7; 200]);
                tree.set_attributes(*node, changed);
            }
            _ => {
                let _ = tree.link(dir, name, *node);
            }
        }
    }
    Some(())
}

fuzz_target!(|data: &[u8]| {
    let mut disk = Disk::parse(data);
    let Ok((mut tree, mut image)) = read(&disk, disk.written()) else { return };
    for _ in 0..2 {
        let _ = change(&mut tree);
        let Ok(layer) = image.commit_layer(&tree) else { return };
        disk.put(&layer);
        let (again, _) = read(&disk, disk.written()).expect("what was written is read back");
        assert_eq!(listing(&tree), listing(&again));
    }
});
