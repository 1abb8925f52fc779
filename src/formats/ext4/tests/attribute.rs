//! Times and extended attributes are kept, or refused with the name of the file.

use super::disk::TestDisk;
use super::fixture::{MIB, TarOffsets, attributes, with_xattrs};
use crate::ext4::{Attributes, Ext4Error, NodeKind, Timestamp, Tree};

fn time(secs: i64, nanos: u32) -> Attributes {
    Attributes { mtime: Timestamp { secs, nanos }, ..attributes(0o644) }
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
            tree.create(tree.root(), name.as_bytes(), NodeKind::Fifo, time(secs, nanos)).unwrap();
        }
    }
    let mut disk = TestDisk::new(64 * MIB);
    disk.commit_clean(&tree);
    disk.compare(&tree);
    tree.create(tree.root(), b"before", NodeKind::Fifo, time(i64::MIN, 5)).unwrap();
    tree.create(tree.root(), b"after", NodeKind::Fifo, time(i64::MAX, u32::MAX)).unwrap();
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
                NodeKind::Symlink(b"target".to_vec()),
                of_link,
            )
            .unwrap();
        }
    }
    let dir = Attributes {
        mode: 0o754,
        ..with_xattrs(&[("system.posix_acl_default", &acl), ("system.posix_acl_access", &acl)])
    };
    tree.create(tree.root(), b"dir", NodeKind::Directory, dir).unwrap();
    let mut disk = TestDisk::new(64 * MIB);
    disk.commit_clean(&tree);
    disk.compare(&tree);
    // A later layer removes and replaces them.
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
        let dir = tree.create(tree.root(), b"etc", NodeKind::Directory, attributes(0o755)).unwrap();
        let file =
            tree.create(dir, b"file", NodeKind::Fifo, with_xattrs(&[(name, &value)])).unwrap();
        tree.link(tree.root(), b"other", file).unwrap();
        tree.remove(dir, b"file").unwrap();
        let error = TestDisk::new(64 * MIB).image.commit_layer(&tree).unwrap_err();
        assert!(error.to_string().contains("\"/other\""), "{error}");
        let Ext4Error::Xattr { source, .. } = error else { panic!("{error}") };
        assert!(
            source.to_string().contains(message) && source.to_string().contains(name),
            "{source}"
        );
    }
}
