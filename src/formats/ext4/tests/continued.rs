//! A filesystem is read back from a disk and continued.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::process::Command;
use std::sync::LazyLock;

use proptest::prelude::*;

use super::disk::{TestDisk, tar_bytes, written};
use super::fixture::{MIB, TarOffsets, attributes, with_xattrs};
use super::random::{RandomStep, apply, step};
use crate::ext4::{LayerBlocks, LayerRun, NodeId, NodeKind, ReadError, Tree, read, read_within};
use crate::units::Sectors;
use source::{ByteSource, MemoryBudget, SourceError};

/// Checks that two trees are equal except for the positions of data.
pub(super) fn assert_same(ours: &Tree, theirs: &Tree) {
    let mut open = vec![(ours.root(), theirs.root())];
    let mut pairs: BTreeMap<NodeId, NodeId> = BTreeMap::new();
    while let Some((one, other)) = open.pop() {
        let path = ours.path(one);
        assert_eq!(ours.attributes(one), theirs.attributes(other), "{path}");
        assert_eq!(ours.links(one), theirs.links(other), "{path}");
        assert_eq!(*pairs.entry(one).or_insert(other), other, "{path}");
        match (ours.kind(one), theirs.kind(other)) {
            (NodeKind::Regular { size, .. }, NodeKind::Regular { size: their_size, .. }) => {
                assert_eq!(size, their_size, "{path}");
            }
            (kind, their_kind) => assert_eq!(kind, their_kind, "{path}"),
        }
        let names: Vec<_> = ours.children(one).collect();
        let their_names: Vec<_> = theirs.children(other).collect();
        assert_eq!(names.len(), their_names.len(), "{path}");
        for ((name, child), (their_name, their_child)) in names.into_iter().zip(their_names) {
            assert_eq!(name, their_name, "{path}");
            open.push((child, their_child));
        }
    }
}

#[test]
fn a_renamed_lost_and_found_is_a_directory_of_the_image_and_a_new_one_is_not() {
    let mut continued = 0;
    for disk in DISKS.iter() {
        let mut disk = disk.clone();
        let place = disk.blocks.iter().find_map(|(&number, block)| {
            Some((number, block.windows(10).position(|name| name == b"lost+found")?))
        });
        let (number, at) = place.unwrap();
        disk.blocks.get_mut(&number).unwrap()[at] ^= 1;
        let Ok((mut tree, mut image)) = read(&disk, disk.written()) else { continue };
        change(&mut tree, 10_000);
        let layer = image.commit_layer(&tree).unwrap();
        disk.put(&layer);
        let (again, _) = read(&disk, disk.written()).unwrap();
        assert!(again.lookup(again.root(), b"most+found").is_some());
        assert_same(&tree, &again);
        continued += 1;
    }
    assert!(continued > 0, "every disk was refused");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn a_layer_on_a_disk_read_back_is_the_layer_of_one_go(steps in prop::collection::vec((step(), any::<u32>()), 1..80)) {
        let mut tree = Tree::new();
        let mut tar = TarOffsets::default();
        let mut disk = TestDisk::new(128 * MIB);
        let mut again = TestDisk::new(128 * MIB);
        disk.commit(&tree);
        again.commit(&tree);
        let mut other = again.reopen();
        let last = (RandomStep::Layer, 0);
        for (serial, (step, choice)) in steps.iter().chain([&last]).enumerate() {
            let mut same = TarOffsets(tar.0);
            apply(&mut tree, &mut tar, serial, step, *choice as usize);
            apply(&mut other, &mut same, serial, step, *choice as usize);
            if matches!(step, RandomStep::Layer) {
                let layer = disk.commit(&tree);
                let layer_again = again.commit(&other);
                prop_assert!(layer.runs().eq(layer_again.runs()));
                other = again.reopen();
                assert_same(&tree, &other);
            }
        }
        again.fsck();
        again.compare(&tree);
    }
}

/// A disk in memory that stores only blocks with data.
#[derive(Clone)]
struct Sparse {
    size: u64,
    blocks: BTreeMap<u64, Vec<u8>>,
}

impl Sparse {
    fn of(file: &File) -> Sparse {
        let mut blocks = BTreeMap::new();
        for (lba, len) in written(file) {
            for block in lba.0 / 8..(lba.0 + len.0).div_ceil(8) {
                let mut bytes = vec![0; 4096];
                file.read_exact_at(&mut bytes, block * 4096).unwrap();
                blocks.insert(block, bytes);
            }
        }
        Sparse { size: file.metadata().unwrap().len(), blocks }
    }

    fn written(&self) -> Vec<(Sectors, Sectors)> {
        self.blocks.keys().map(|&block| (Sectors(block * 8), Sectors(8))).collect()
    }

    fn put(&mut self, layer: &LayerBlocks) {
        for run in layer.runs() {
            let bytes = match run {
                LayerRun::Metadata { bytes, .. } => bytes.to_vec(),
                LayerRun::Zeroed { count, .. } => vec![0; count.bytes().0 as usize],
                LayerRun::Remote { count, target, .. } => {
                    tar_bytes(target.bytes().0, count.bytes().0)
                }
            };
            for (lba, sector) in (run.lba().0..).zip(bytes.chunks(512)) {
                let block = self.blocks.entry(lba / 8).or_insert_with(|| vec![0; 4096]);
                block[(lba % 8) as usize * 512..][..512].copy_from_slice(sector);
            }
        }
    }
}

impl ByteSource for Sparse {
    fn len(&self) -> u64 {
        self.size
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> Result<(), SourceError> {
        let (name, end) = (self.name().to_owned(), offset.saturating_add(buf.len() as u64));
        if end > self.size {
            return Err(SourceError::PastEnd { name, offset, end, size: self.size });
        }
        assert!(buf.len() == 4096 && offset.is_multiple_of(4096), "whole blocks are asked for");
        match self.blocks.get(&(offset / 4096)) {
            Some(block) => buf.copy_from_slice(block),
            None => buf.fill(0),
        }
        Ok(())
    }

    fn name(&self) -> &str {
        "a disk in memory"
    }
}

/// A disk of this program, and some of mke2fs, each with a few files of many kinds.
static DISKS: LazyLock<Vec<Sparse>> = LazyLock::new(|| {
    let mut tree = Tree::new();
    let mut tar = TarOffsets::default();
    let root = tree.root();
    let dir = tree.create(root, b"dir", NodeKind::Directory, attributes(0o755)).unwrap();
    let holes: Vec<(u64, u64)> = (0..10).map(|n| (n * 8192, 100)).collect();
    let file = tree.create(dir, b"holes", tar.sparse(81_920, &holes), attributes(0o644)).unwrap();
    tree.link(root, b"hard", file).unwrap();
    tree.create(root, b"slow", NodeKind::Symlink(vec![b's'; 99]), attributes(0o777)).unwrap();
    let long = with_xattrs(&[("user.long", &[b'l'; 500])]);
    for number in 0..200 {
        let name = format!("a-name-that-makes-an-index-of-this-directory-{number}");
        tree.create(dir, name.as_bytes(), tar.file(number), long.clone()).unwrap();
    }
    let mut ours = TestDisk::new(64 * MIB);
    ours.commit(&tree);
    let mut disks = vec![Sparse::of(&ours.file)];
    let work = tempfile::tempdir().unwrap();
    let content = work.path().join("content");
    fs::create_dir_all(content.join("dir")).unwrap();
    for number in 0..100 {
        fs::write(content.join(format!("dir/some-name-of-a-file-that-is-long-{number:040}")), b"x")
            .unwrap();
    }
    std::os::unix::fs::symlink("s".repeat(99), content.join("slow")).unwrap();
    fs::hard_link(
        content
            .join("dir/some-name-of-a-file-that-is-long-")
            .with_file_name(format!("some-name-of-a-file-that-is-long-{:040}", 0)),
        content.join("hard"),
    )
    .unwrap();
    for features in [
        "metadata_csum,64bit",
        "^metadata_csum,uninit_bg",
        "^extent,^64bit,^metadata_csum",
        "meta_bg,^resize_inode,^metadata_csum,^uninit_bg",
    ] {
        let path = work.path().join("disk");
        let _ = fs::remove_file(&path);
        File::create(&path).unwrap().set_len(8 * MIB).unwrap();
        let made = Command::new("mke2fs")
            .args(["-q", "-F", "-t", "ext4", "-b", "4096", "-N", "256", "-d"])
            .arg(&content)
            .args(["-O", &format!("^has_journal,{features}")])
            .arg(&path)
            .status()
            .expect("mke2fs (e2fsprogs) is needed");
        assert!(made.success());
        disks.push(Sparse::of(&File::open(&path).unwrap()));
    }
    disks
});

/// Adds, links, changes and removes files.
fn change(tree: &mut Tree, serial: usize) {
    let mut tar = TarOffsets::default();
    for (nth, step) in [
        RandomStep::Directory,
        RandomStep::File(10_000),
        RandomStep::Many(80),
        RandomStep::Link,
        RandomStep::Remove,
        RandomStep::Attributes(0o700, 300),
        RandomStep::Remove,
        RandomStep::Attributes(0o711, 0),
        RandomStep::Symlink(80),
    ]
    .iter()
    .enumerate()
    {
        // A name or link for which the damaged tree has no room does not matter here.
        apply(tree, &mut tar, serial * 100 + nth, step, 31 * nth + serial);
    }
}

#[test]
fn undamaged_disks_are_continued() {
    for disk in DISKS.iter() {
        let mut disk = disk.clone();
        let (mut tree, mut image) = read(&disk, disk.written()).unwrap();
        change(&mut tree, 10_000);
        disk.put(&image.commit_layer(&tree).unwrap());
        let (again, _) = read(&disk, disk.written()).unwrap();
        assert_same(&tree, &again);
    }
}

#[test]
fn what_is_kept_of_a_filesystem_is_reserved_and_refused_without_room() {
    for disk in DISKS.iter() {
        let budget = MemoryBudget::new(256 << 20);
        let (_, _, memory) = read_within(disk, disk.written(), budget.part()).unwrap();
        let needed = memory.bytes();
        assert!(needed > 0 && budget.used() == needed);
        let little = MemoryBudget::new(needed - 1);
        let refused = read_within(disk, disk.written(), little.part()).err();
        assert!(matches!(refused, Some(ReadError::Memory(_))), "{refused:?}");
        assert_eq!(little.used(), 0);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 600, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn damaged_disks_are_refused_or_continued(
        which in 0usize..5,
        flips in prop::collection::vec((any::<prop::sample::Index>(), 0usize..4096, 1u8..), 1..6),
        serial in 10_000usize..20_000,
    ) {
        let mut disk = DISKS[which].clone();
        let numbers: Vec<u64> = disk.blocks.keys().copied().collect();
        for (block, at, flip) in flips {
            // The superblock is one block of many, and most of it is zeros.
            let number = *block.get(&numbers);
            let at = if number == 0 { 1024 + at % 1024 } else { at };
            disk.blocks.get_mut(&number).unwrap()[at] ^= flip;
        }
        if let Ok((mut tree, mut image)) = read(&disk, disk.written()) {
            change(&mut tree, serial);
            if let Ok(layer) = image.commit_layer(&tree) {
                disk.put(&layer);
                let (again, _) = read(&disk, disk.written()).unwrap();
                assert_same(&tree, &again);
            }
        }
    }
}
