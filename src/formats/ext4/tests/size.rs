//! Disks of every size: clean, full, or refused.

use super::disk::TestDisk;
use super::fixture::{MIB, TarOffsets, attributes};
use crate::ext4::{Ext4Error, FilesystemIdentity, Geometry, Image, NodeKind, Tree};
use crate::units::Bytes;

#[test]
fn an_empty_image_of_any_size_is_clean() {
    for size in [64 * MIB, 128 * MIB, 128 * MIB + 4096, 1 << 30, 64 << 30, 2 << 40] {
        let mut disk = TestDisk::new(size);
        let tree = Tree::new();
        let layer = disk.commit_clean(&tree);
        eprintln!("{} MiB: {} bytes of metadata", size / MIB, layer.metadata_len());
        disk.compare(&tree);
    }
}

#[test]
#[ignore = "reads a terabyte of bitmaps and tables: half a minute"]
fn the_largest_disk_is_clean() {
    // One block less than 16 TiB is the longest file that the host's ext4 can hold.
    let mut disk = TestDisk::new((16 << 40) - 4096);
    let tree = Tree::new();
    disk.commit_clean(&tree);
    disk.compare(&tree);
}

#[test]
fn a_disk_of_a_wrong_size_is_refused() {
    for size in [0, 64 * MIB - 4096, 64 * MIB + 512, (16 << 40) + 4096, u64::MAX] {
        let size = Bytes(size);
        let image = Image::new(Geometry { size }, FilesystemIdentity::default());
        assert_eq!(image.err(), Some(Ext4Error::BadSize { size }));
    }
    assert!(Image::new(Geometry { size: Geometry::MAX }, FilesystemIdentity::default()).is_ok());
}

#[test]
fn a_full_disk_is_an_error_that_names_the_flag() {
    let mut tree = Tree::new();
    tree.create(tree.root(), b"large", TarOffsets::default().file(65 * MIB), attributes(0o644))
        .unwrap();
    let error = TestDisk::new(64 * MIB).image.commit_layer(&tree).unwrap_err();
    assert!(error.to_string().contains("--vsize"), "{error}");
    let mut tree = Tree::new();
    for number in 0..16_384 {
        tree.create(tree.root(), format!("{number}").as_bytes(), NodeKind::Fifo, attributes(0o644))
            .unwrap();
    }
    let error = TestDisk::new(64 * MIB).image.commit_layer(&tree).unwrap_err();
    assert_eq!(error, Ext4Error::NoInodes { inodes: 16_384 });
    assert!(error.to_string().contains("--vsize"), "{error}");
}

#[test]
fn each_region_overflows_into_the_other() {
    // Data larger than its region, then directories larger than theirs.
    let mut tree = Tree::new();
    let mut disk = TestDisk::new(64 * MIB);
    tree.create(tree.root(), b"large", TarOffsets::default().file(58 * MIB), attributes(0o644))
        .unwrap();
    disk.commit_clean(&tree);
    disk.compare(&tree);
    let mut tree = Tree::new();
    let mut disk = TestDisk::new(64 * MIB);
    for number in 0..4000 {
        tree.create(
            tree.root(),
            format!("{number}").as_bytes(),
            NodeKind::Directory,
            attributes(0o755),
        )
        .unwrap();
    }
    disk.commit_clean(&tree);
    disk.compare(&tree);
}
