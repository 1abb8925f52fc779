//! Files of every kind, their names and their links.

use super::disk::TestDisk;
use super::fixture::{MIB, TarOffsets, attributes};
use crate::ext4::{Attributes, LINKS_MAX, NAME_MAX, NodeKind, Tree, TreeError, XattrError};

#[test]
fn every_kind_of_file_looks_in_the_kernel_as_in_the_tree() {
    let mut tree = Tree::new();
    let mut tar = TarOffsets::default();
    let root = tree.root();
    let dir = tree.create(root, b"dir", NodeKind::Directory, attributes(0o1777)).unwrap();
    for size in [0, 1, 511, 512, 4095, 4096, 4097, 300_000] {
        let name = format!("file{size}");
        let file = tree.create(dir, name.as_bytes(), tar.file(size), attributes(0o4755)).unwrap();
        tree.link(root, format!("link{size}").as_bytes(), file).unwrap();
    }
    for length in [1, 59, 60, 61, 4000, 4094] {
        let target = NodeKind::Symlink(vec![b'x'; length]);
        tree.create(dir, format!("symlink{length}").as_bytes(), target, attributes(0o777)).unwrap();
    }
    for (major, minor) in [(1, 3), (255, 255), (256, 0), (4095, 1_048_575)] {
        let name = format!("{major}-{minor}");
        tree.create(
            dir,
            format!("c{name}").as_bytes(),
            NodeKind::Char { major, minor },
            attributes(0o600),
        )
        .unwrap();
        tree.create(
            dir,
            format!("b{name}").as_bytes(),
            NodeKind::Block { major, minor },
            attributes(0o660),
        )
        .unwrap();
    }
    tree.create(dir, b"fifo", NodeKind::Fifo, attributes(0o644)).unwrap();
    let long = [b'n'; NAME_MAX];
    tree.create(dir, &long, NodeKind::Directory, attributes(0o755)).unwrap();
    let owner = Attributes { uid: u32::MAX - 1, gid: 65_536, ..attributes(0) };
    tree.create(dir, "grün\u{1f980}".as_bytes(), tar.file(5), owner).unwrap();
    let mut disk = TestDisk::new(64 * MIB);
    disk.commit_clean(&tree);
    disk.compare(&tree);
}

#[test]
fn names_and_targets_that_no_directory_holds_are_refused() {
    let mut tree = Tree::new();
    let root = tree.root();
    let file = tree.create(root, b"file", NodeKind::Fifo, Attributes::default()).unwrap();
    for name in [&b""[..], b".", b"..", b"a/b", b"a\0b", &[b'x'; 256]] {
        assert!(matches!(
            tree.create(root, name, NodeKind::Fifo, Attributes::default()),
            Err(TreeError::BadName { .. })
        ));
        assert!(matches!(tree.link(root, name, file), Err(TreeError::BadName { .. })));
    }
    let create = |tree: &mut Tree, kind| tree.create(root, b"new", kind, Attributes::default());
    for target in [vec![], vec![0], vec![b'x'; 4096]] {
        assert!(matches!(
            create(&mut tree, NodeKind::Symlink(target)),
            Err(TreeError::BadSymlink { .. })
        ));
    }
    for (major, minor) in [(4096, 0), (0, 1 << 20)] {
        assert!(matches!(
            create(&mut tree, NodeKind::Char { major, minor }),
            Err(TreeError::BadDevice { .. })
        ));
    }
    assert!(matches!(
        tree.create(file, b"x", NodeKind::Fifo, Attributes::default()),
        Err(TreeError::NotADirectory { .. })
    ));
    assert!(matches!(
        tree.create(root, b"file", NodeKind::Fifo, Attributes::default()),
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
fn more_links_than_the_field_holds() {
    let mut tree = Tree::new();
    let dir = tree.create(tree.root(), b"dir", NodeKind::Directory, attributes(0o755)).unwrap();
    let file = tree.create(tree.root(), b"file", NodeKind::Fifo, attributes(0o755)).unwrap();
    for number in 1..LINKS_MAX {
        tree.link(dir, format!("{number}").as_bytes(), file).unwrap();
    }
    assert!(matches!(tree.link(dir, b"more", file), Err(TreeError::TooManyLinks { .. })));
    for number in 0..65_000 {
        tree.create(dir, format!("d{number}").as_bytes(), NodeKind::Directory, attributes(0o755))
            .unwrap();
    }
    let mut disk = TestDisk::new(2 << 30);
    disk.commit_clean(&tree);
    assert!(disk.debugfs("stat /dir").contains("Links: 1 "));
    tree.remove(dir, b"d0").unwrap();
    tree.remove(dir, b"d1").unwrap();
    disk.commit_clean(&tree);
    disk.compare(&tree);
}

#[test]
fn the_images_own_lost_and_found_replaces_ours() {
    let mut tree = Tree::new();
    let mut disk = TestDisk::new(64 * MIB);
    disk.commit_clean(&tree);
    tree.create(tree.root(), b"lost+found", NodeKind::Directory, attributes(0o750)).unwrap();
    disk.commit_clean(&tree);
    disk.compare(&tree);
    tree.remove(tree.root(), b"lost+found").unwrap();
    disk.commit_clean(&tree);
    disk.compare(&tree);
    assert!(disk.debugfs("stat /lost+found").contains("Mode:  0700"));
}

#[test]
fn a_million_directories_deep_is_no_stack_overflow() {
    let mut tree = Tree::new();
    let mut dir = tree.root();
    for _ in 0..1_000_000 {
        dir = tree.create(dir, b"d", NodeKind::Directory, Attributes::default()).unwrap();
    }
    tree.remove(tree.root(), b"d").unwrap();
    assert_eq!(tree.links(dir), 0);
}
