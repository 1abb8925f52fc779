//! Every name is found in a directory of any size, by the hash that the kernel computes.

use std::os::unix::fs::FileExt as _;

use super::disk::TestDisk;
use super::fixture::{MIB, attributes};
use crate::ext4::{FilesystemIdentity, NAME_MAX, NodeKind, Tree, hash, superblock};

fn rule() -> hash::HashRule {
    let seed = superblock::seed_words(&FilesystemIdentity::default().hash_seed);
    hash::HashRule { seed, signed: false }
}

#[test]
fn large_directories_are_found_by_the_kernel() {
    for (count, levels) in
        [(1, None), (60, None), (1_000, Some(0)), (20_000, Some(0)), (100_000, Some(1))]
    {
        let mut tree = Tree::new();
        let dir = tree.create(tree.root(), b"dir", NodeKind::Directory, attributes(0o755)).unwrap();
        for number in 0..count {
            let name = format!("{number:07}-{}", "long".repeat(3 + number % 10));
            tree.create(dir, name.as_bytes(), NodeKind::Fifo, attributes(0o600)).unwrap();
        }
        let mut disk = TestDisk::new(1 << 30);
        disk.commit_clean(&tree);
        let dump = disk.debugfs("htree_dump /dir");
        match levels {
            None => assert!(!dump.contains("Root node dump")),
            Some(levels) => assert!(
                dump.contains(&format!("Indirect levels: {levels}")),
                "{count}: {dump:.500}"
            ),
        }
        disk.compare(&tree);
    }
}

#[test]
fn an_index_that_misleads_is_noticed_and_a_right_one_is_not_doubted() {
    for count in [1_000, 100_000] {
        let mut tree = Tree::new();
        let dir = tree.create(tree.root(), b"dir", NodeKind::Directory, attributes(0o755)).unwrap();
        for number in 0..count {
            let name = format!("{number:07}-{}", "long".repeat(3 + number % 10));
            tree.create(dir, name.as_bytes(), NodeKind::Fifo, attributes(0o600)).unwrap();
        }
        let mut disk = TestDisk::new(1 << 30);
        disk.commit(&tree);
        let doubt = |disk: &mut TestDisk| {
            let tree = disk.reopen();
            let dir = tree.lookup(tree.root(), b"dir").unwrap();
            (disk.image.doubt(dir), disk.image.blocks_of(dir).next().unwrap().start)
        };
        let (none, root) = doubt(&mut disk);
        assert_eq!(none, None);
        let mut block = [0; 4096];
        disk.file.read_exact_at(&mut block, root).unwrap();
        let edits: [&dyn Fn(&mut [u8; 4096]); 4] = [
            // Two blocks in each other's place, one block twice, one left out, another hash.
            &|block| (0..4).for_each(|byte| block.swap(36 + byte, 44 + byte)),
            &|block| block.copy_within(36..40, 44),
            &|block| block[34] -= 1,
            &|block| block[28] = 2,
        ];
        for (number, edit) in edits.into_iter().enumerate() {
            let mut forged = block;
            edit(&mut forged);
            disk.file.write_all_at(&forged, root).unwrap();
            assert!(doubt(&mut disk).0.is_some(), "edit {number} of {count} names");
        }
    }
}

#[test]
fn the_hash_is_the_one_of_debugfs() {
    let mut disk = TestDisk::new(64 * MIB);
    disk.commit(&Tree::new());
    let seed = "74757262-6f62-4400-8000-657874340001";
    let long = "q".repeat(255);
    for name in [
        "a",
        "abc",
        "abcd",
        "a-name-of-thirty-two-bytes-exact",
        "a-name-of-thirty-three-bytes-here",
        &long,
    ] {
        let text = disk.debugfs(&format!("dx_hash -h half_md4 -s {seed} {name}"));
        let found = hash::hash(name.as_bytes(), rule());
        let expected = format!("0x{:x} (minor 0x{:x})", found.major, found.minor);
        assert!(text.contains(&expected), "{name}: {text} but we {expected}");
    }
}

#[test]
fn names_of_all_lengths_and_bytes_are_found() {
    let mut tree = Tree::new();
    for length in 1..=NAME_MAX {
        for first in [b'a', 0x01, 0xff, b' '] {
            let mut name = vec![0x80 + (length % 128) as u8; length];
            name[0] = first;
            tree.create(tree.root(), &name, NodeKind::Fifo, attributes(0o600)).unwrap();
        }
    }
    let mut disk = TestDisk::new(64 * MIB);
    disk.commit_clean(&tree);
    disk.compare(&tree);
}

#[test]
fn colliding_hashes_across_leaves_are_found() {
    // Names with the same major hash, found by trying. By the birthday bound over 31 bits, that takes many
    // names, so the leaves are cut with long names until a pair lies on both sides of a cut.
    let seed = rule();
    let mut seen = std::collections::HashMap::new();
    let mut pairs = Vec::new();
    for number in 0..400_000u32 {
        let name = format!("{number:0>200}");
        if let Some(other) = seen.insert(hash::hash(name.as_bytes(), seed).major, number) {
            pairs.push((other, number));
        }
    }
    assert!(pairs.len() > 10);
    let mut tree = Tree::new();
    let mut hashes: Vec<_> = seen.iter().collect();
    hashes.sort_unstable();
    // Each pair gets a varying number of neighbours in hash order, so that cuts fall everywhere.
    for (nth, &(one, other)) in pairs.iter().enumerate() {
        let dir = tree
            .create(
                tree.root(),
                format!("{nth}").as_bytes(),
                NodeKind::Directory,
                attributes(0o755),
            )
            .unwrap();
        let name = |number: u32| format!("{number:0>200}");
        let major = hash::hash(name(one).as_bytes(), seed).major;
        let place = hashes.partition_point(|&(&hash, _)| hash < major);
        let before = (17 * (nth % 3) + 18).min(place);
        for &(_, &number) in &hashes[place - before..(place + 40).min(hashes.len())] {
            tree.create(dir, name(number).as_bytes(), NodeKind::Fifo, attributes(0o600)).unwrap();
        }
        for number in [one, other] {
            if tree.lookup(dir, name(number).as_bytes()).is_none() {
                tree.create(dir, name(number).as_bytes(), NodeKind::Fifo, attributes(0o600))
                    .unwrap();
            }
        }
    }
    let mut disk = TestDisk::new(64 * MIB);
    disk.commit_clean(&tree);
    let continued = (0..pairs.len())
        .filter(|nth| {
            let dump = disk.debugfs(&format!("htree_dump /{nth}"));
            let hashes = dump
                .lines()
                .filter_map(|line| line.split("Hash 0x").nth(1))
                .filter_map(|rest| rest.get(..8));
            hashes.filter_map(|hash| u32::from_str_radix(hash, 16).ok()).any(|hash| hash & 1 == 1)
        })
        .count();
    eprintln!("{} pairs, {continued} directories with a continuation", pairs.len());
    assert!(continued > 0);
    disk.compare(&tree);
}

#[test]
fn directories_grow_and_shrink_in_their_own_blocks() {
    // Two files that grow in turns have scattered blocks, so that their extents need a tree.
    let mut tree = Tree::new();
    let mut disk = TestDisk::new(64 * MIB);
    let dirs = [&b"one"[..], b"two"].map(|name| {
        tree.create(tree.root(), name, NodeKind::Directory, attributes(0o755)).unwrap()
    });
    let name = |number: usize| format!("{number:0>100}").into_bytes();
    for layer in 0..10 {
        for dir in dirs {
            for number in 100 * layer..100 * (layer + 1) {
                tree.create(dir, &name(number), NodeKind::Fifo, attributes(0o600)).unwrap();
            }
        }
        disk.commit_clean(&tree);
    }
    assert!(disk.debugfs("dump_extents /one").lines().count() > 5);
    disk.compare(&tree);
    for (layer, kept) in [900, 200, 30, 0].into_iter().enumerate() {
        for number in (0..1000).filter(|number| *number >= kept) {
            if tree.lookup(dirs[0], &name(number)).is_some() {
                tree.remove(dirs[0], &name(number)).unwrap();
            }
        }
        tree.create(dirs[1], format!("{layer}").as_bytes(), NodeKind::Fifo, attributes(0o600))
            .unwrap();
        disk.commit_clean(&tree);
        disk.compare(&tree);
    }
    assert!(disk.debugfs("stat /one").contains("Size: 4096"));
}
