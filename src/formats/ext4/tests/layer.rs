//! Layer upon layer: each clean, as small as its change, fast, and identical in every run.

use super::disk::TestDisk;
use super::fixture::{MIB, TarOffsets, attributes, with_xattrs};
use crate::ext4::{FilesystemIdentity, Geometry, Image, LayerRun, NodeKind, Tree};

#[test]
fn sixty_four_layers_of_small_changes_are_clean_and_small() {
    let mut tree = Tree::new();
    let mut disk = TestDisk::new(256 * MIB);
    let big = tree.create(tree.root(), b"big", NodeKind::Directory, attributes(0o755)).unwrap();
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
                NodeKind::Directory,
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
fn removing_everything_leaves_a_clean_disk() {
    let mut tree = Tree::new();
    let mut tar = TarOffsets::default();
    let mut disk = TestDisk::new(64 * MIB);
    let mut dir = tree.root();
    for depth in 0..300 {
        dir = tree
            .create(dir, format!("d{depth}").as_bytes(), NodeKind::Directory, attributes(0o755))
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
fn the_same_layers_give_the_same_bytes() {
    let build = || {
        let mut tree = Tree::new();
        let mut image = Image::new(Geometry::default(), FilesystemIdentity::default()).unwrap();
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
fn a_typical_image_is_laid_out_quickly() {
    let mut tree = Tree::new();
    let mut tar = TarOffsets::default();
    for dir in 0..2500 {
        let node = tree
            .create(
                tree.root(),
                format!("dir-{dir}").as_bytes(),
                NodeKind::Directory,
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
    let mut image = Image::new(Geometry::default(), FilesystemIdentity::default()).unwrap();
    let start = std::time::Instant::now();
    let layer = image.commit_layer(&tree).unwrap();
    eprintln!(
        "25,000 files: {:?}, {} bytes, {} runs",
        start.elapsed(),
        layer.metadata_len(),
        layer.runs().len()
    );
    assert_eq!(layer.runs().filter(|run| matches!(run, LayerRun::Remote { .. })).count(), 25_000);
}
