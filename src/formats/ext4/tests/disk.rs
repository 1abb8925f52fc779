//! A disk as a sparse file, and the programs that check it.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::ext4::{
    FilesystemIdentity, Geometry, Image, LayerBlocks, LayerRun, NodeId, NodeKind, Tree, read,
};
use crate::units::{Bytes, Sectors};
use source::FileSource;

/// Byte `offset` of the fake tar with the data of every layer; never zero.
pub(super) fn tar_byte(offset: u64) -> u8 {
    let mixed = (offset / 8 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (8 * (offset % 8));
    (mixed as u8).max(1)
}

pub(super) fn tar_bytes(offset: u64, len: u64) -> Vec<u8> {
    (offset..offset + len).map(tar_byte).collect()
}

/// Runs of sectors that a file has data for.
pub(super) fn written(file: &File) -> Vec<(Sectors, Sectors)> {
    use rustix::fs::{SeekFrom, seek};
    let mut runs = Vec::new();
    let mut at = 0;
    while let Ok(start) = seek(file, SeekFrom::Data(at)) {
        at = seek(file, SeekFrom::Hole(start)).unwrap();
        runs.push((Sectors(start / 512), Sectors((at - start).div_ceil(512))));
    }
    runs
}

/// An image and the disk it makes.
pub(super) struct TestDisk {
    _dir: tempfile::TempDir,
    pub(super) path: PathBuf,
    pub(super) file: File,
    pub(super) image: Image,
}

impl TestDisk {
    pub(super) fn new(size: u64) -> TestDisk {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        let file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
        file.set_len(size).unwrap();
        let image =
            Image::new(Geometry { size: Bytes(size) }, FilesystemIdentity::default()).unwrap();
        TestDisk { _dir: dir, path, file, image }
    }

    /// Reads the filesystem back, like a process that did not make the lower layers.
    pub(super) fn reopen(&mut self) -> Tree {
        let volume = FileSource::open(&self.path).unwrap();
        let (tree, image) = read(&volume, written(&self.file)).unwrap();
        self.image = image;
        tree
    }

    /// Commits a layer and writes it over the present content, as a reader of the stack would see it.
    pub(super) fn commit(&mut self, tree: &Tree) -> LayerBlocks {
        self.commit_with(tree, true)
    }

    /// Commits a layer with or without file data.
    pub(super) fn commit_with(&mut self, tree: &Tree, data: bool) -> LayerBlocks {
        let layer = self.image.commit_layer(tree).unwrap();
        let mut end = 0;
        for run in layer.runs() {
            assert!(run.lba().0 >= end, "runs ascend");
            assert!(run.count().0 > 0);
            end = run.lba().0 + run.count().0;
            let at = run.lba().bytes().0;
            match run {
                LayerRun::Metadata { bytes, .. } => self.file.write_all_at(bytes, at).unwrap(),
                LayerRun::Remote { .. } if !data => {}
                LayerRun::Remote { count, target, .. } => {
                    let bytes = tar_bytes(target.bytes().0, count.bytes().0);
                    self.file.write_all_at(&bytes, at).unwrap();
                }
                LayerRun::Zeroed { count, .. } => {
                    self.file.write_all_at(&vec![0; count.bytes().0 as usize], at).unwrap();
                }
            }
        }
        layer
    }

    /// Commits and checks the result with e2fsck.
    pub(super) fn commit_clean(&mut self, tree: &Tree) -> LayerBlocks {
        let layer = self.commit(tree);
        self.fsck();
        layer
    }

    pub(super) fn fsck(&self) {
        let (clean, text) = fsck(&self.path);
        assert!(clean, "{text}");
        // Some remarks, such as those about extent trees that could be smaller, do not change the exit code.
        assert!(!text.contains('?'), "{text}");
    }

    /// Output of `debugfs -R command`.
    pub(super) fn debugfs(&self, command: &str) -> String {
        let output = Command::new("debugfs")
            .arg("-R")
            .arg(command)
            .arg(&self.path)
            .output()
            .expect("debugfs (e2fsprogs) is needed");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// Mounts the disk, if this process is root.
    pub(super) fn mount(&self) -> Option<MountedDisk> {
        if !rustix::process::geteuid().is_root() {
            eprintln!("skipped: mounting needs root");
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        let output = Command::new("mount")
            .args(["-t", "ext4", "-o", "loop,ro,noload"])
            .arg(&self.path)
            .arg(dir.path())
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Some(MountedDisk { dir })
    }

    /// Mounts the disk and compares everything with the tree.
    pub(super) fn compare(&self, tree: &Tree) {
        let Some(mount) = self.mount() else { return };
        let mut inodes = BTreeMap::new();
        let mut open = vec![(tree.root(), mount.dir.path().to_owned())];
        while let Some((node, path)) = open.pop() {
            compare_one(tree, node, &path);
            let inode = fs::symlink_metadata(&path).unwrap().ino();
            assert_eq!(*inodes.entry(node).or_insert(inode), inode, "{}", path.display());
            if *tree.kind(node) == NodeKind::Directory {
                let mut listed: Vec<Vec<u8>> = fs::read_dir(&path)
                    .unwrap()
                    .map(|entry| os_bytes(entry.unwrap().file_name()))
                    .collect();
                listed.sort();
                if node == tree.root() && tree.lookup(node, b"lost+found").is_none() {
                    listed.retain(|name| name != b"lost+found");
                }
                let expected: Vec<Vec<u8>> =
                    tree.children(node).map(|(name, _)| name.to_vec()).collect();
                assert!(listed == expected, "names in {}", path.display());
                open.extend(
                    tree.children(node).map(|(name, child)| (child, path.join(os_str(name)))),
                );
            }
        }
    }
}

/// Runs `e2fsck -fn`; returns true if it finds no fault, and the beginning of its output.
pub(super) fn fsck(path: &Path) -> (bool, String) {
    let output =
        Command::new("e2fsck").arg("-fn").arg(path).output().expect("e2fsck (e2fsprogs) is needed");
    let text = String::from_utf8_lossy(&output.stdout).into_owned()
        + &String::from_utf8_lossy(&output.stderr);
    (output.status.success(), text.chars().take(4000).collect())
}

fn os_bytes(name: std::ffi::OsString) -> Vec<u8> {
    std::os::unix::ffi::OsStringExt::into_vec(name)
}

pub(super) fn os_str(name: &[u8]) -> &std::ffi::OsStr {
    std::os::unix::ffi::OsStrExt::from_bytes(name)
}

fn compare_one(tree: &Tree, node: NodeId, path: &Path) {
    let meta = fs::symlink_metadata(path).unwrap();
    let shown = path.display();
    let attributes = tree.attributes(node);
    assert_eq!(meta.mode() & 0o7777, u32::from(attributes.mode), "mode of {shown}");
    assert_eq!((meta.uid(), meta.gid()), (attributes.uid, attributes.gid), "owner of {shown}");
    let time = (attributes.mtime.secs, i64::from(attributes.mtime.nanos));
    assert_eq!((meta.mtime(), meta.mtime_nsec()), time, "mtime of {shown}");
    assert_eq!((meta.ctime(), meta.ctime_nsec()), time, "ctime of {shown}");
    let lost = u32::from(node == tree.root() && tree.lookup(node, b"lost+found").is_none());
    let links = match tree.links(node) + lost {
        many if many > 65_000 => 1,
        links => links,
    };
    assert_eq!(meta.nlink(), u64::from(links), "links of {shown}");
    let kind = meta.file_type();
    match *tree.kind(node) {
        NodeKind::Directory => assert!(kind.is_dir()),
        NodeKind::Regular { size, ref runs } => {
            assert!(kind.is_file());
            assert_eq!(meta.len(), size.0, "size of {shown}");
            let file = File::open(path).unwrap();
            let mut last = 0;
            for run in runs {
                expect_hole(&file, last, run.file_offset.0);
                let mut found = vec![0; run.len.0 as usize];
                file.read_exact_at(&mut found, run.file_offset.0).unwrap();
                assert!(
                    found == tar_bytes(run.tar_offset.0, run.len.0),
                    "data of {shown} at {}",
                    run.file_offset
                );
                last = run.file_offset.0 + run.len.0;
            }
            expect_hole(&file, last, size.0);
        }
        NodeKind::Symlink(ref target) => {
            assert_eq!(&os_bytes(fs::read_link(path).unwrap().into()), target);
        }
        NodeKind::Char { major, minor } => {
            assert!(kind.is_char_device());
            assert_eq!(meta.rdev(), rustix::fs::makedev(major, minor), "device of {shown}");
        }
        NodeKind::Block { major, minor } => {
            assert!(kind.is_block_device());
            assert_eq!(meta.rdev(), rustix::fs::makedev(major, minor), "device of {shown}");
        }
        NodeKind::Fifo => assert!(kind.is_fifo()),
        NodeKind::Socket => assert!(kind.is_socket()),
    }
    compare_xattrs(tree, node, path);
}

/// Checks up to a MiB of zeros at each end of a hole.
fn expect_hole(file: &File, start: u64, end: u64) {
    let len = (end - start).min(1 << 20);
    for at in [start, end - len] {
        let mut found = vec![0; len as usize];
        file.read_exact_at(&mut found, at).unwrap();
        assert!(found.iter().all(|&byte| byte == 0), "hole at {at}");
    }
}

fn compare_xattrs(tree: &Tree, node: NodeId, path: &Path) {
    let mut room = [0; 8192];
    let length = rustix::fs::llistxattr(path, &mut room[..]).unwrap();
    let mut listed: Vec<&[u8]> =
        room[..length].split(|&byte| byte == 0).filter(|name| !name.is_empty()).collect();
    listed.sort_unstable();
    let expected: Vec<&[u8]> = tree.attributes(node).xattrs.keys().map(|name| &name[..]).collect();
    assert_eq!(listed, expected, "attributes of {}", path.display());
    for (name, value) in &tree.attributes(node).xattrs {
        let length = rustix::fs::lgetxattr(path, os_str(name), &mut room[..]).unwrap();
        assert_eq!(
            &room[..length],
            &value[..],
            "attribute {} of {}",
            String::from_utf8_lossy(name),
            path.display()
        );
    }
}

/// A mounted disk; unmounted when dropped.
pub(super) struct MountedDisk {
    pub(super) dir: tempfile::TempDir,
}

impl Drop for MountedDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.dir.path()).status();
    }
}
