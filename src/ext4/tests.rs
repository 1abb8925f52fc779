//! The whole writer against oracles that we did not write: e2fsck, debugfs and the kernel.

use std::collections::BTreeMap;

use super::{
    Attributes, DataError, DataRun, Ext4Error, Geometry, Identity, Image, Kind, LINKS_MAX,
    NAME_MAX, Run, Timestamp, Tree, TreeError, XattrError,
};
use crate::units::{Bytes, SECTOR};
use disk::Disk;

mod continued;
mod disk;
mod random;

const MIB: u64 = 1 << 20;

fn rule() -> super::hash::HashRule {
    let seed = super::superblock::seed_words(&Identity::default().hash_seed);
    super::hash::HashRule { seed, signed: false }
}

fn attributes(mode: u16) -> Attributes {
    Attributes {
        mode,
        uid: 1000,
        gid: 100_000,
        mtime: Timestamp { secs: 1_700_000_000, nanos: 123_456_789 },
        xattrs: BTreeMap::new(),
    }
}

/// Hands out places in the fake tar, each behind a header.
#[derive(Default)]
struct TarOffsets(u64);

impl TarOffsets {
    fn file(&mut self, size: u64) -> Kind {
        if size == 0 {
            return Kind::Regular { size: Bytes(0), runs: Vec::new() };
        }
        self.0 += SECTOR;
        let run = DataRun::remote(Bytes(0), Bytes(self.0), Bytes(size));
        self.0 += size.next_multiple_of(SECTOR);
        Kind::Regular { size: Bytes(size), runs: vec![run] }
    }

    /// Data where `pieces` (offset, length) are, holes elsewhere.
    fn sparse(&mut self, size: u64, pieces: &[(u64, u64)]) -> Kind {
        self.0 += SECTOR;
        let mut runs = Vec::new();
        for &(offset, len) in pieces {
            let run = DataRun::remote(Bytes(offset), Bytes(self.0), Bytes(len));
            self.0 += len.next_multiple_of(SECTOR);
            runs.extend(run.split(Bytes(size)));
        }
        for run in &mut runs {
            if run.needs_bytes(Bytes(size)) {
                run.bytes = Some(disk::tar_bytes(run.tar_offset.0, run.len.0).into());
            }
        }
        Kind::Regular { size: Bytes(size), runs }
    }
}

#[test]
fn an_empty_image_of_any_size_is_clean() {
    for size in [64 * MIB, 128 * MIB, 128 * MIB + 4096, 1 << 30, 64 << 30, 2 << 40] {
        let mut disk = Disk::new(size);
        let tree = Tree::new();
        let layer = disk.commit_clean(&tree);
        eprintln!("{} MiB: {} bytes of metadata", size / MIB, layer.metadata_len());
        disk.compare(&tree);
    }
}

#[test]
fn every_kind_of_file_looks_in_the_kernel_as_in_the_tree() {
    let mut tree = Tree::new();
    let mut tar = TarOffsets::default();
    let root = tree.root();
    let dir = tree.create(root, b"dir", Kind::Directory, attributes(0o1777)).unwrap();
    for size in [0, 1, 511, 512, 4095, 4096, 4097, 300_000] {
        let name = format!("file{size}");
        let file = tree.create(dir, name.as_bytes(), tar.file(size), attributes(0o4755)).unwrap();
        tree.link(root, format!("link{size}").as_bytes(), file).unwrap();
    }
    for length in [1, 59, 60, 61, 4000, 4094] {
        let target = Kind::Symlink(vec![b'x'; length]);
        tree.create(dir, format!("symlink{length}").as_bytes(), target, attributes(0o777)).unwrap();
    }
    for (major, minor) in [(1, 3), (255, 255), (256, 0), (4095, 1_048_575)] {
        let name = format!("{major}-{minor}");
        tree.create(
            dir,
            format!("c{name}").as_bytes(),
            Kind::Char { major, minor },
            attributes(0o600),
        )
        .unwrap();
        tree.create(
            dir,
            format!("b{name}").as_bytes(),
            Kind::Block { major, minor },
            attributes(0o660),
        )
        .unwrap();
    }
    tree.create(dir, b"fifo", Kind::Fifo, attributes(0o644)).unwrap();
    let long = [b'n'; NAME_MAX];
    tree.create(dir, &long, Kind::Directory, attributes(0o755)).unwrap();
    let owner = Attributes { uid: u32::MAX - 1, gid: 65_536, ..attributes(0) };
    tree.create(dir, "grün\u{1f980}".as_bytes(), tar.file(5), owner).unwrap();
    let mut disk = Disk::new(64 * MIB);
    disk.commit_clean(&tree);
    disk.compare(&tree);
}

fn time(secs: i64, nanos: u32) -> Attributes {
    Attributes { mtime: Timestamp { secs, nanos }, ..attributes(0o644) }
}

fn with_xattrs(pairs: &[(&str, &[u8])]) -> Attributes {
    let xattrs =
        pairs.iter().map(|&(name, value)| (name.as_bytes().to_vec(), value.to_vec())).collect();
    Attributes { xattrs, ..attributes(0o644) }
}

#[test]
fn a_disk_of_a_wrong_size_is_refused() {
    for size in [0, 64 * MIB - 4096, 64 * MIB + 512, (16 << 40) + 4096, u64::MAX] {
        let size = Bytes(size);
        let image = Image::new(Geometry { size }, Identity::default());
        assert_eq!(image.err(), Some(Ext4Error::BadSize { size }));
    }
    assert!(Image::new(Geometry { size: Geometry::MAX }, Identity::default()).is_ok());
}

#[test]
fn large_directories_are_found_by_the_kernel() {
    for (count, levels) in
        [(1, None), (60, None), (1_000, Some(0)), (20_000, Some(0)), (100_000, Some(1))]
    {
        let mut tree = Tree::new();
        let dir = tree.create(tree.root(), b"dir", Kind::Directory, attributes(0o755)).unwrap();
        for number in 0..count {
            let name = format!("{number:07}-{}", "long".repeat(3 + number % 10));
            tree.create(dir, name.as_bytes(), Kind::Fifo, attributes(0o600)).unwrap();
        }
        let mut disk = Disk::new(1 << 30);
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
fn the_hash_is_the_one_of_debugfs() {
    let mut disk = Disk::new(64 * MIB);
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
        let found = super::hash::hash(name.as_bytes(), rule());
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
            tree.create(tree.root(), &name, Kind::Fifo, attributes(0o600)).unwrap();
        }
    }
    let mut disk = Disk::new(64 * MIB);
    disk.commit_clean(&tree);
    disk.compare(&tree);
}

#[test]
fn colliding_hashes_across_leaves_are_found() {
    // Names of one major hash, found by trying: birthday over 31 bits needs many, so the leaves are
    // cut with long names until a pair straddles two of them.
    let seed = rule();
    let mut seen = std::collections::HashMap::new();
    let mut pairs = Vec::new();
    for number in 0..400_000u32 {
        let name = format!("{number:0>200}");
        if let Some(other) = seen.insert(super::hash::hash(name.as_bytes(), seed).major, number) {
            pairs.push((other, number));
        }
    }
    assert!(pairs.len() > 10);
    let mut tree = Tree::new();
    let mut hashes: Vec<_> = seen.iter().collect();
    hashes.sort_unstable();
    // Around each pair its neighbours in hash order, more or fewer of them, so that cuts fall
    // everywhere.
    for (nth, &(one, other)) in pairs.iter().enumerate() {
        let dir = tree
            .create(tree.root(), format!("{nth}").as_bytes(), Kind::Directory, attributes(0o755))
            .unwrap();
        let name = |number: u32| format!("{number:0>200}");
        let major = super::hash::hash(name(one).as_bytes(), seed).major;
        let place = hashes.partition_point(|&(&hash, _)| hash < major);
        let before = (17 * (nth % 3) + 18).min(place);
        for &(_, &number) in &hashes[place - before..(place + 40).min(hashes.len())] {
            tree.create(dir, name(number).as_bytes(), Kind::Fifo, attributes(0o600)).unwrap();
        }
        for number in [one, other] {
            if tree.lookup(dir, name(number).as_bytes()).is_none() {
                tree.create(dir, name(number).as_bytes(), Kind::Fifo, attributes(0o600)).unwrap();
            }
        }
    }
    let mut disk = Disk::new(64 * MIB);
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
fn times_keep_nanoseconds_from_1901_to_2446() {
    let mut tree = Tree::new();
    let (first, last) = (i64::from(i32::MIN), (3 << 32) + i64::from(i32::MAX));
    for secs in [
        first,
        -1,
        0,
        1,
        i64::from(i32::MAX),
        i64::from(i32::MAX) + 1,
        (1 << 32) - 1,
        1 << 32,
        3 << 32,
        last,
    ] {
        for nanos in [0, 1, 999_999_999] {
            let name = format!("{secs}.{nanos}");
            tree.create(tree.root(), name.as_bytes(), Kind::Fifo, time(secs, nanos)).unwrap();
        }
    }
    let mut disk = Disk::new(64 * MIB);
    disk.commit_clean(&tree);
    disk.compare(&tree);
    tree.create(tree.root(), b"before", Kind::Fifo, time(i64::MIN, 5)).unwrap();
    tree.create(tree.root(), b"after", Kind::Fifo, time(i64::MAX, u32::MAX)).unwrap();
    disk.commit_clean(&tree);
    assert!(disk.debugfs("stat /before").contains("mtime: 0x80000000:00000000"));
    assert!(disk.debugfs("stat /after").contains("mtime: 0x7fffffff:00000003"));
}

#[test]
fn attributes_go_into_the_inode_then_into_a_block() {
    let mut capability = 0x0200_0001u32.to_le_bytes().to_vec();
    capability.extend([0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    let mut acl = 2u32.to_le_bytes().to_vec();
    for (tag, perm, id) in [
        (1u16, 6u16, u32::MAX),
        (2, 4, 1234),
        (4, 4, u32::MAX),
        (8, 5, 99),
        (0x10, 5, u32::MAX),
        (0x20, 4, u32::MAX),
    ] {
        acl.extend(tag.to_le_bytes());
        acl.extend(perm.to_le_bytes());
        acl.extend(id.to_le_bytes());
    }
    let sets: [(&str, Attributes); 8] = [
        ("capability", with_xattrs(&[("security.capability", &capability)])),
        (
            "selinux",
            with_xattrs(&[("security.selinux", b"system_u:object_r:container_file_t:s0\0")]),
        ),
        ("empty", with_xattrs(&[("user.empty", b""), ("user.b", b"")])),
        ("exact", with_xattrs(&[("user.1234", &[7; 68])])),
        ("block", with_xattrs(&[("user.large", &[9; 4000])])),
        (
            "both",
            with_xattrs(&[
                ("user.large", &[9; 2000]),
                ("trusted.overlay.opaque", b"y"),
                ("user.gr\u{fc}n", b"123"),
                ("user.z", &[8; 70]),
            ]),
        ),
        ("full", with_xattrs(&[("user.a", &[1; 4096 - 32 - 4 - 20]), ("user.bcde", &[7; 68])])),
        ("acl", Attributes { mode: 0o654, ..with_xattrs(&[("system.posix_acl_access", &acl)]) }),
    ];
    let mut tree = Tree::new();
    let mut tar = TarOffsets::default();
    for (name, attributes) in &sets {
        tree.create(tree.root(), name.as_bytes(), tar.file(10_000), attributes.clone()).unwrap();
        if *name != "acl" {
            let of_link = with_xattrs(&[]);
            let of_link = Attributes {
                xattrs: attributes
                    .xattrs
                    .clone()
                    .into_iter()
                    .filter(|(name, _)| !name.starts_with(b"user."))
                    .collect(),
                mode: 0o777,
                ..of_link
            };
            tree.create(
                tree.root(),
                format!("l-{name}").as_bytes(),
                Kind::Symlink(b"target".to_vec()),
                of_link,
            )
            .unwrap();
        }
    }
    let dir = Attributes {
        mode: 0o754,
        ..with_xattrs(&[("system.posix_acl_default", &acl), ("system.posix_acl_access", &acl)])
    };
    tree.create(tree.root(), b"dir", Kind::Directory, dir).unwrap();
    let mut disk = Disk::new(64 * MIB);
    disk.commit_clean(&tree);
    disk.compare(&tree);
    // Taken away and exchanged by a later layer.
    for (name, _) in &sets {
        let node = tree.lookup(tree.root(), name.as_bytes()).unwrap();
        let other = if *name == "block" {
            with_xattrs(&[("user.other", &[3; 3000])])
        } else {
            attributes(0o600)
        };
        tree.set_attributes(node, other);
    }
    disk.commit_clean(&tree);
    disk.compare(&tree);
}

#[test]
fn attributes_that_ext4_cannot_hold_are_errors_that_name_the_file() {
    let cases: [(&str, Vec<u8>, &str); 7] = [
        ("user.big", vec![0; 4100], "does not fit"),
        ("user.", vec![], "no prefix"),
        ("gnu.translator", vec![1], "no prefix"),
        ("system.data", vec![1], "no prefix"),
        ("system.posix_acl_accessory", vec![2, 0, 0, 0], "no prefix"),
        ("system.posix_acl_access", vec![2, 0, 0, 0, 1], "list of version 2"),
        ("system.posix_acl_access", vec![2, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0], "list of version 2"),
    ];
    for (name, value, message) in cases {
        let mut tree = Tree::new();
        let dir = tree.create(tree.root(), b"etc", Kind::Directory, attributes(0o755)).unwrap();
        let file = tree.create(dir, b"file", Kind::Fifo, with_xattrs(&[(name, &value)])).unwrap();
        tree.link(tree.root(), b"other", file).unwrap();
        tree.remove(dir, b"file").unwrap();
        let error = Disk::new(64 * MIB).image.commit_layer(&tree).unwrap_err();
        assert!(error.to_string().contains("\"/other\""), "{error}");
        let Ext4Error::Xattr { source, .. } = error else { panic!("{error}") };
        assert!(
            source.to_string().contains(message) && source.to_string().contains(name),
            "{source}"
        );
    }
}

#[test]
fn sparse_files_have_holes_and_their_odd_pieces_are_stored() {
    let mut tree = Tree::new();
    let mut tar = TarOffsets::default();
    let giant = tar.sparse(40 << 30, &[(0, 4096), (20 << 30, 8192), ((40 << 30) - 512, 512)]);
    let odd = tar.sparse(
        100_000,
        &[
            (0, 100),
            (512, 512),
            (4096, 4096),
            (10_000, 1),
            (12_288, 700),
            (20_480, 5000),
            (99_000, 1000),
        ],
    );
    let crossing =
        tar.sparse(60_000, &[(1000, 3000), (4000, 200), (4608, 20_000), (30_208, 29_792)]);
    let pieces: Vec<_> = (0..10_000).map(|nth| (nth * 8192, 4096)).collect();
    let holes = tar.sparse(10_000 * 8192, &pieces);
    for (name, kind) in [("giant", giant), ("odd", odd), ("crossing", crossing), ("holes", holes)] {
        tree.create(tree.root(), name.as_bytes(), kind, attributes(0o644)).unwrap();
    }
    let empty = Kind::Regular { size: Bytes(1 << 43), runs: Vec::new() };
    tree.create(tree.root(), b"empty", empty, attributes(0o644)).unwrap();
    let mut disk = Disk::new(1 << 30);
    disk.commit_clean(&tree);
    let extents = disk.debugfs("dump_extents /holes");
    assert!(extents.lines().count() > 10_000);
    disk.compare(&tree);
    // And its tree goes when it goes.
    tree.remove(tree.root(), b"holes").unwrap();
    disk.commit_clean(&tree);
}

#[test]
fn a_file_of_terabytes_has_a_tree_of_two_levels() {
    let size = 5 << 39;
    let mut tree = Tree::new();
    tree.create(tree.root(), b"file", TarOffsets::default().file(size), attributes(0o644)).unwrap();
    let mut disk = Disk::new(4 << 40);
    disk.commit_with(&tree, false);
    disk.fsck();
    let stat = disk.debugfs("stat /file");
    // 20,480 extents of 128 MiB: 61 leaves below one index block.
    let blocks = size / 4096 + 61 + 1;
    assert!(stat.contains(&format!("Blockcount: {}", blocks * 8)), "{stat:.600}");
}

#[test]
#[ignore = "reads a terabyte of bitmaps and tables: half a minute"]
fn the_largest_disk_is_clean() {
    // One block less than 16 TiB is the longest file that the host's ext4 can hold.
    let mut disk = Disk::new((16 << 40) - 4096);
    let tree = Tree::new();
    disk.commit_clean(&tree);
    disk.compare(&tree);
}

#[test]
fn a_piece_beside_the_sectors_keeps_its_tail_out_of_the_hole() {
    // The run ends within a sector and a hole follows: what the tar holds behind it must not show.
    let mut tree = Tree::new();
    let kind = TarOffsets::default().sparse(8192, &[(0, 1000)]);
    tree.create(tree.root(), b"file", kind, attributes(0o644)).unwrap();
    let mut disk = Disk::new(64 * MIB);
    let layer = disk.commit_clean(&tree);
    let remote: Vec<_> = layer
        .runs()
        .filter(|run| matches!(run, Run::Remote { .. }))
        .map(|run| run.count().0)
        .collect();
    assert_eq!(remote, [1]);
    disk.compare(&tree);
}

#[test]
fn runs_that_are_no_map_of_the_file_are_errors() {
    let run = |file, tar, len| DataRun::remote(Bytes(file), Bytes(tar), Bytes(len));
    let long = (1 << 44) - 4095;
    let cases = [
        (4096, vec![run(0, 512, 4097)]),
        (8192, vec![run(4096, 512, 4096), run(0, 8192, 4096)]),
        (8192, vec![run(0, 512, 4096), run(4000, 8192, 100)]),
        (8192, vec![run(u64::MAX, 512, 4096)]),
        (8192, vec![run(0, u64::MAX - 511, 4096)]),
        (8192, run(1, u64::MAX, 4096).split(Bytes(8192))),
        (8192, vec![run(0, 513, 4096)]),
        (8192, vec![run(0, 512, 100)]),
        (8192, vec![DataRun { bytes: Some(Box::new([0; 3])), ..run(0, 512, 100) }]),
        (long, vec![]),
    ];
    for (size, runs) in cases {
        let mut tree = Tree::new();
        let kind = Kind::Regular { size: Bytes(size), runs };
        tree.create(tree.root(), b"file", kind, attributes(0o644)).unwrap();
        let error = Disk::new(64 * MIB).image.commit_layer(&tree).unwrap_err();
        assert!(matches!(error, Ext4Error::Data { ref path, .. } if path == "/file"), "{error}");
    }
    assert_eq!(
        DataError::BadRun { file_offset: Bytes(5) }.to_string().get(..17),
        Some("The data run at 5")
    );
}

#[test]
fn data_lies_on_the_disk_in_the_order_of_the_tar() {
    let mut tree = Tree::new();
    let mut tar = TarOffsets::default();
    let kinds: Vec<_> = (0..100).map(|nth| tar.file(1 + nth * 1000)).collect();
    for (nth, kind) in kinds.into_iter().enumerate().rev() {
        tree.create(tree.root(), format!("{nth}").as_bytes(), kind, attributes(0o644)).unwrap();
    }
    let layer = Disk::new(64 * MIB).image.commit_layer(&tree).unwrap();
    let targets: Vec<_> = layer
        .runs()
        .filter_map(|run| match run {
            Run::Remote { target, .. } => Some(target),
            _ => None,
        })
        .collect();
    assert_eq!(targets.len(), 100);
    assert!(targets.is_sorted());
}

#[test]
fn sixty_four_layers_of_small_changes_are_clean_and_small() {
    let mut tree = Tree::new();
    let mut disk = Disk::new(256 * MIB);
    let big = tree.create(tree.root(), b"big", Kind::Directory, attributes(0o755)).unwrap();
    for number in 0..3000 {
        tree.create(
            big,
            format!("file-{number}").as_bytes(),
            TarOffsets(number * 8192).file(100),
            attributes(0o644),
        )
        .unwrap();
    }
    disk.commit_clean(&tree);
    let shared = tree.lookup(big, b"file-2999").unwrap();
    for layer in 0..64u64 {
        let mut tar = TarOffsets(layer * MIB);
        let dir = tree
            .create(
                tree.root(),
                format!("layer-{layer}").as_bytes(),
                Kind::Directory,
                attributes(0o755),
            )
            .unwrap();
        for number in 0..10 {
            tree.create(
                dir,
                format!("{number}").as_bytes(),
                tar.file(5000 * number),
                attributes(0o600),
            )
            .unwrap();
        }
        // A link into a lower layer, a whiteout, a replaced file, other attributes.
        tree.link(dir, b"link", shared).unwrap();
        tree.remove(big, format!("file-{}", layer * 40).as_bytes()).unwrap();
        tree.remove(big, format!("file-{}", layer * 40 + 1).as_bytes()).unwrap();
        tree.create(
            big,
            format!("file-{}", layer * 40 + 1).as_bytes(),
            tar.file(9000),
            attributes(0o640),
        )
        .unwrap();
        let node = tree.lookup(big, format!("file-{}", layer * 40 + 2).as_bytes()).unwrap();
        tree.set_attributes(node, attributes(0o400));
        if layer > 4 {
            tree.remove(tree.root(), format!("layer-{}", layer - 4).as_bytes()).unwrap();
        }
        let blocks = disk.commit_clean(&tree);
        assert!(blocks.metadata_len() < 60 * 4096, "{} bytes", blocks.metadata_len());
        let again = disk.image.commit_layer(&tree).unwrap();
        assert_eq!(again.runs().len(), 0, "nothing changed, nothing written");
    }
    disk.compare(&tree);
}

#[test]
fn directories_grow_and_shrink_in_their_own_blocks() {
    // Two that grow in turns have scattered blocks, so that their extents need a tree.
    let mut tree = Tree::new();
    let mut disk = Disk::new(64 * MIB);
    let dirs = [&b"one"[..], b"two"]
        .map(|name| tree.create(tree.root(), name, Kind::Directory, attributes(0o755)).unwrap());
    let name = |number: usize| format!("{number:0>100}").into_bytes();
    for layer in 0..10 {
        for dir in dirs {
            for number in 100 * layer..100 * (layer + 1) {
                tree.create(dir, &name(number), Kind::Fifo, attributes(0o600)).unwrap();
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
        tree.create(dirs[1], format!("{layer}").as_bytes(), Kind::Fifo, attributes(0o600)).unwrap();
        disk.commit_clean(&tree);
        disk.compare(&tree);
    }
    assert!(disk.debugfs("stat /one").contains("Size: 4096"));
}

#[test]
fn removing_everything_leaves_a_clean_disk() {
    let mut tree = Tree::new();
    let mut tar = TarOffsets::default();
    let mut disk = Disk::new(64 * MIB);
    let mut dir = tree.root();
    for depth in 0..300 {
        dir = tree
            .create(dir, format!("d{depth}").as_bytes(), Kind::Directory, attributes(0o755))
            .unwrap();
        tree.create(dir, b"file", tar.file(6000), with_xattrs(&[("user.x", &[1; 200])])).unwrap();
    }
    disk.commit_clean(&tree);
    disk.compare(&tree);
    tree.remove(tree.root(), b"d0").unwrap();
    assert_eq!(tree.links(tree.root()), 2);
    disk.commit_clean(&tree);
    disk.compare(&tree);
    assert!(
        disk.debugfs("stats").contains("Free inodes:              16373"),
        "{:.2000}",
        disk.debugfs("stats")
    );
}

#[test]
fn a_million_directories_deep_is_no_stack_overflow() {
    let mut tree = Tree::new();
    let mut dir = tree.root();
    for _ in 0..1_000_000 {
        dir = tree.create(dir, b"d", Kind::Directory, Attributes::default()).unwrap();
    }
    tree.remove(tree.root(), b"d").unwrap();
    assert_eq!(tree.links(dir), 0);
}

#[test]
fn the_images_own_lost_and_found_replaces_ours() {
    let mut tree = Tree::new();
    let mut disk = Disk::new(64 * MIB);
    disk.commit_clean(&tree);
    tree.create(tree.root(), b"lost+found", Kind::Directory, attributes(0o750)).unwrap();
    disk.commit_clean(&tree);
    disk.compare(&tree);
    tree.remove(tree.root(), b"lost+found").unwrap();
    disk.commit_clean(&tree);
    disk.compare(&tree);
    assert!(disk.debugfs("stat /lost+found").contains("Mode:  0700"));
}

#[test]
fn more_links_than_the_field_holds() {
    let mut tree = Tree::new();
    let dir = tree.create(tree.root(), b"dir", Kind::Directory, attributes(0o755)).unwrap();
    let file = tree.create(tree.root(), b"file", Kind::Fifo, attributes(0o755)).unwrap();
    for number in 1..LINKS_MAX {
        tree.link(dir, format!("{number}").as_bytes(), file).unwrap();
    }
    assert!(matches!(tree.link(dir, b"more", file), Err(TreeError::TooManyLinks { .. })));
    for number in 0..65_000 {
        tree.create(dir, format!("d{number}").as_bytes(), Kind::Directory, attributes(0o755))
            .unwrap();
    }
    let mut disk = Disk::new(2 << 30);
    disk.commit_clean(&tree);
    assert!(disk.debugfs("stat /dir").contains("Links: 1 "));
    tree.remove(dir, b"d0").unwrap();
    tree.remove(dir, b"d1").unwrap();
    disk.commit_clean(&tree);
    disk.compare(&tree);
}

#[test]
fn a_full_disk_is_an_error_that_names_the_flag() {
    let mut tree = Tree::new();
    tree.create(tree.root(), b"large", TarOffsets::default().file(65 * MIB), attributes(0o644))
        .unwrap();
    let error = Disk::new(64 * MIB).image.commit_layer(&tree).unwrap_err();
    assert!(error.to_string().contains("--vsize"), "{error}");
    let mut tree = Tree::new();
    for number in 0..16_384 {
        tree.create(tree.root(), format!("{number}").as_bytes(), Kind::Fifo, attributes(0o644))
            .unwrap();
    }
    let error = Disk::new(64 * MIB).image.commit_layer(&tree).unwrap_err();
    assert_eq!(error, Ext4Error::NoInodes { inodes: 16_384 });
    assert!(error.to_string().contains("--vsize"), "{error}");
}

#[test]
fn each_region_overflows_into_the_other() {
    // Data larger than its region, then directories larger than theirs.
    let mut tree = Tree::new();
    let mut disk = Disk::new(64 * MIB);
    tree.create(tree.root(), b"large", TarOffsets::default().file(58 * MIB), attributes(0o644))
        .unwrap();
    disk.commit_clean(&tree);
    disk.compare(&tree);
    let mut tree = Tree::new();
    let mut disk = Disk::new(64 * MIB);
    for number in 0..4000 {
        tree.create(
            tree.root(),
            format!("{number}").as_bytes(),
            Kind::Directory,
            attributes(0o755),
        )
        .unwrap();
    }
    disk.commit_clean(&tree);
    disk.compare(&tree);
}

#[test]
fn the_same_layers_give_the_same_bytes() {
    let build = || {
        let mut tree = Tree::new();
        let mut image = Image::new(Geometry::default(), Identity::default()).unwrap();
        let mut bytes = Vec::new();
        for layer in 0..3u64 {
            let mut tar = TarOffsets::default();
            for number in 0..500 {
                let xattrs = with_xattrs(&[("user.a", b"1"), ("user.b", &[2; 100])]);
                tree.create(
                    tree.root(),
                    format!("{layer}-{number}").as_bytes(),
                    tar.file(number * 10),
                    xattrs,
                )
                .unwrap();
            }
            bytes.push(format!(
                "{:?}",
                image.commit_layer(&tree).unwrap().runs().collect::<Vec<_>>()
            ));
        }
        bytes
    };
    assert!(build() == build());
}

#[test]
fn names_and_targets_that_no_directory_holds_are_refused() {
    let mut tree = Tree::new();
    let root = tree.root();
    let file = tree.create(root, b"file", Kind::Fifo, Attributes::default()).unwrap();
    for name in [&b""[..], b".", b"..", b"a/b", b"a\0b", &[b'x'; 256]] {
        assert!(matches!(
            tree.create(root, name, Kind::Fifo, Attributes::default()),
            Err(TreeError::BadName { .. })
        ));
        assert!(matches!(tree.link(root, name, file), Err(TreeError::BadName { .. })));
    }
    let create = |tree: &mut Tree, kind| tree.create(root, b"new", kind, Attributes::default());
    for target in [vec![], vec![0], vec![b'x'; 4096]] {
        assert!(matches!(
            create(&mut tree, Kind::Symlink(target)),
            Err(TreeError::BadSymlink { .. })
        ));
    }
    for (major, minor) in [(4096, 0), (0, 1 << 20)] {
        assert!(matches!(
            create(&mut tree, Kind::Char { major, minor }),
            Err(TreeError::BadDevice { .. })
        ));
    }
    assert!(matches!(
        tree.create(file, b"x", Kind::Fifo, Attributes::default()),
        Err(TreeError::NotADirectory { .. })
    ));
    assert!(matches!(
        tree.create(root, b"file", Kind::Fifo, Attributes::default()),
        Err(TreeError::Exists { .. })
    ));
    assert!(matches!(tree.link(root, b"dir", root), Err(TreeError::BadLinkTarget { .. })));
    assert!(matches!(tree.remove(root, b"none"), Err(TreeError::NotFound { .. })));
    assert_eq!(
        XattrError::BadName { name: "x".into() }.to_string().get(..17),
        Some("The attribute \"x\"")
    );
}

#[test]
fn a_typical_image_is_laid_out_quickly() {
    let mut tree = Tree::new();
    let mut tar = TarOffsets::default();
    for dir in 0..2500 {
        let node = tree
            .create(
                tree.root(),
                format!("dir-{dir}").as_bytes(),
                Kind::Directory,
                attributes(0o755),
            )
            .unwrap();
        for number in 0..10 {
            tree.create(
                node,
                format!("some-file-{number}").as_bytes(),
                tar.file(10_000),
                attributes(0o644),
            )
            .unwrap();
        }
    }
    let mut image = Image::new(Geometry::default(), Identity::default()).unwrap();
    let start = std::time::Instant::now();
    let layer = image.commit_layer(&tree).unwrap();
    eprintln!(
        "25,000 files: {:?}, {} bytes, {} runs",
        start.elapsed(),
        layer.metadata_len(),
        layer.runs().len()
    );
    assert_eq!(layer.runs().filter(|run| matches!(run, Run::Remote { .. })).count(), 25_000);
}
