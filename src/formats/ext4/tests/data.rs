//! A file has the bytes of the tar, and holes stay holes.

use super::disk::TestDisk;
use super::fixture::{MIB, TarOffsets, attributes};
use crate::ext4::{DataError, DataRun, Ext4Error, LayerRun, NodeKind, Tree};
use crate::units::Bytes;

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
    let empty = NodeKind::Regular { size: Bytes(1 << 43), runs: Vec::new() };
    tree.create(tree.root(), b"empty", empty, attributes(0o644)).unwrap();
    let mut disk = TestDisk::new(1 << 30);
    disk.commit_clean(&tree);
    let extents = disk.debugfs("dump_extents /holes");
    assert!(extents.lines().count() > 10_000);
    disk.compare(&tree);
    // The extent tree is freed together with the file.
    tree.remove(tree.root(), b"holes").unwrap();
    disk.commit_clean(&tree);
}

#[test]
fn a_file_of_terabytes_has_a_tree_of_two_levels() {
    let size = 5 << 39;
    let mut tree = Tree::new();
    tree.create(tree.root(), b"file", TarOffsets::default().file(size), attributes(0o644)).unwrap();
    let mut disk = TestDisk::new(4 << 40);
    disk.commit_with(&tree, false);
    disk.fsck();
    let stat = disk.debugfs("stat /file");
    // 20,480 extents of 128 MiB: 61 leaves below one index block.
    let blocks = size / 4096 + 61 + 1;
    assert!(stat.contains(&format!("Blockcount: {}", blocks * 8)), "{stat:.600}");
}

#[test]
fn a_piece_beside_the_sectors_keeps_its_tail_out_of_the_hole() {
    // The run ends inside a sector and a hole follows: the bytes behind it in the tar must not be visible.
    let mut tree = Tree::new();
    let kind = TarOffsets::default().sparse(8192, &[(0, 1000)]);
    tree.create(tree.root(), b"file", kind, attributes(0o644)).unwrap();
    let mut disk = TestDisk::new(64 * MIB);
    let layer = disk.commit_clean(&tree);
    let remote: Vec<_> = layer
        .runs()
        .filter(|run| matches!(run, LayerRun::Remote { .. }))
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
        let kind = NodeKind::Regular { size: Bytes(size), runs };
        tree.create(tree.root(), b"file", kind, attributes(0o644)).unwrap();
        let error = TestDisk::new(64 * MIB).image.commit_layer(&tree).unwrap_err();
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
    let layer = TestDisk::new(64 * MIB).image.commit_layer(&tree).unwrap();
    let targets: Vec<_> = layer
        .runs()
        .filter_map(|run| match run {
            LayerRun::Remote { target, .. } => Some(target),
            _ => None,
        })
        .collect();
    assert_eq!(targets.len(), 100);
    assert!(targets.is_sorted());
}
