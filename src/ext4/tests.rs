//! The whole writer against oracles that we did not write: e2fsck, debugfs and the kernel.

use std::collections::BTreeMap;

use super::*;
use crate::units::SECTOR;
use disk::Disk;

mod disk;

const MIB: u64 = 1 << 20;

fn attributes(mode: u16) -> Attributes {
    Attributes { mode, uid: 1000, gid: 100_000, mtime: Timestamp { secs: 1_700_000_000, nanos: 123_456_789 }, xattrs: BTreeMap::new() }
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
    for size in [64 * MIB, 128 * MIB, 128 * MIB + 4096, 1 << 30, 64 << 30, 16 << 40] {
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
        tree.create(dir, format!("c{name}").as_bytes(), Kind::Char { major, minor }, attributes(0o600)).unwrap();
        tree.create(dir, format!("b{name}").as_bytes(), Kind::Block { major, minor }, attributes(0o660)).unwrap();
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
