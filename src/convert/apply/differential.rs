//! Random layers, unpacked with system calls like containerd's and shown by the kernel's overlayfs, against
//! the tree of [`LayerApply`](super::LayerApply). Needs root and overlayfs; without them the test prints that
//! and passes.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _, lchown, symlink};
use std::path::{Path as FilePath, PathBuf};
use std::process::Command;

use proptest::prelude::*;
use rustix::fs::{
    AtFlags, CWD, FileType, Mode, Timespec, Timestamps, XattrFlags, lgetxattr, llistxattr,
    lsetxattr, makedev, mknodat, utimensat,
};

use super::path::{Names, PathStep};
use super::tests::{apply_lines, entry};
use super::*;

/// A folder in which a path can be followed.
struct Folder<'a>(&'a FilePath);

impl Names for Folder<'_> {
    type Dir = &'static FilePath;

    fn root(&self) -> Self::Dir {
        leak(self.0.to_owned())
    }

    fn step(&self, dir: Self::Dir, name: &[u8]) -> PathStep<'_, Self::Dir> {
        let path = dir.join(OsStr::from_bytes(name));
        match fs::symlink_metadata(&path) {
            Ok(file) if file.is_dir() => PathStep::Dir(leak(path)),
            Ok(file) if file.is_symlink() => PathStep::Link(Box::leak(
                fs::read_link(&path).unwrap().as_os_str().as_bytes().to_vec().into_boxed_slice(),
            )),
            _ => PathStep::Leaf,
        }
    }
}

fn leak(path: PathBuf) -> &'static FilePath {
    Box::leak(path.into_boxed_path())
}

fn on_disk(root: &FilePath, path: &Path) -> PathBuf {
    path.components().fold(root.to_owned(), |path, name| path.join(OsStr::from_bytes(name)))
}

fn remove_all(path: &FilePath) -> io::Result<()> {
    match fs::symlink_metadata(path) {
        Ok(file) if file.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(_) => Ok(()),
    }
}

fn set_time(path: &FilePath, secs: i64) -> io::Result<()> {
    let time = Timespec { tv_sec: secs.max(0), tv_nsec: 0 };
    let times = Timestamps { last_access: time, last_modification: time };
    Ok(utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW)?)
}

fn set_xattr(path: &FilePath, name: &[u8], value: &[u8]) -> io::Result<()> {
    match lsetxattr(path, name, value, XattrFlags::empty()) {
        // Names without a prefix that Linux knows, and user.* on links and devices.
        Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::PERM) => Ok(()),
        done => Ok(done?),
    }
}

fn xattrs(path: &FilePath) -> BTreeMap<Vec<u8>, Vec<u8>> {
    let (mut names, mut value) = (vec![0; 4096], vec![0; 4096]);
    let len = llistxattr(path, &mut names[..]).unwrap();
    let names = names[..len]
        .split(|&byte| byte == 0)
        .filter(|name| name.starts_with(b"user.") || name.starts_with(b"security."));
    names
        .map(|name| {
            let len = lgetxattr(path, name, &mut value[..]).unwrap();
            (name.to_vec(), value[..len].to_vec())
        })
        .collect()
}

fn make_parent(upper: &FilePath, parents: &[PathBuf], path: &Path) -> io::Result<()> {
    for depth in 1..=path.components().count() {
        let prefix = path.prefix(depth);
        let dir = on_disk(upper, &prefix);
        match fs::symlink_metadata(&dir) {
            Ok(file) if file.is_dir() => continue,
            Ok(_) => return Err(io::ErrorKind::NotADirectory.into()),
            Err(_) => fs::create_dir(&dir)?,
        }
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o755))?;
        for parent in parents {
            let Ok(resolved) = path::resolve(&Folder(parent), prefix.clone()) else { break };
            let lower = on_disk(parent, &resolved);
            let Ok(file) = fs::symlink_metadata(&lower) else { continue };
            if file.is_dir() {
                lchown(&dir, Some(file.uid()), Some(file.gid()))?;
                fs::set_permissions(&dir, fs::Permissions::from_mode(file.mode() & 0o7777))?;
                xattrs(&lower).iter().try_for_each(|(name, value)| set_xattr(&dir, name, value))?;
            }
            break;
        }
    }
    Ok(())
}

/// Unpacks one layer into `upper`; `parents` are the folders of the layers below, the topmost first.
fn unpack(upper: &FilePath, parents: &[PathBuf], lines: &[String]) -> io::Result<()> {
    let mut dirs = Vec::new();
    for (number, line) in lines.iter().enumerate() {
        let entry = entry(line, number as u64);
        let Some((dir, base)) = Path::cleaned(&entry.name).split_last() else { continue };
        let dir = path::resolve(&Folder(upper), dir).map_err(io::Error::other)?;
        make_parent(upper, parents, &dir)?;
        let dir = on_disk(upper, &dir);
        if base == OPAQUE {
            set_xattr(&dir, b"trusted.overlay.opaque", b"y")?;
            continue;
        }
        if let Some(hidden) = base.strip_prefix(WHITEOUT) {
            mknodat(
                CWD,
                dir.join(OsStr::from_bytes(hidden)),
                FileType::CharacterDevice,
                Mode::empty(),
                0,
            )?;
            continue;
        }
        let path = dir.join(OsStr::from_bytes(&base));
        let is_dir = fs::symlink_metadata(&path).is_ok_and(|file| file.is_dir());
        if !(is_dir && entry.kind == EntryKind::Directory) {
            remove_all(&path)?;
        }
        let node =
            |kind, major, minor| mknodat(CWD, &path, kind, Mode::empty(), makedev(major, minor));
        match &entry.kind {
            EntryKind::Directory if is_dir => {}
            EntryKind::Directory => fs::create_dir(&path)?,
            EntryKind::Regular => fs::write(&path, vec![b'x'; entry.stored_len.get() as usize])?,
            EntryKind::Symlink(text) => symlink(OsStr::from_bytes(text), &path)?,
            EntryKind::HardLink(target) => {
                let (parent, base) =
                    Path::raw(target).split_last().ok_or(io::ErrorKind::NotFound)?;
                let parent = path::resolve(&Folder(upper), parent).map_err(io::Error::other)?;
                fs::hard_link(on_disk(upper, &parent).join(OsStr::from_bytes(&base)), &path)?;
            }
            EntryKind::Char { major, minor } => node(FileType::CharacterDevice, *major, *minor)?,
            EntryKind::Block { major, minor } => node(FileType::BlockDevice, *major, *minor)?,
            EntryKind::Fifo => node(FileType::Fifo, 0, 0)?,
        }
        lchown(&path, Some(entry.uid as u32), Some(entry.gid as u32))?;
        entry.xattrs.iter().try_for_each(|(name, value)| set_xattr(&path, name, value))?;
        if !fs::symlink_metadata(&path)?.is_symlink() {
            fs::set_permissions(&path, fs::Permissions::from_mode(entry.mode))?;
        }
        set_time(&path, entry.mtime.secs)?;
        if entry.kind == EntryKind::Directory {
            dirs.push((path, entry.mtime.secs));
        }
    }
    // Each directory's time is set again, because making files in it changed it. (containerd does so even if
    // another file is there by now, which then gets the time of a directory.)
    dirs.iter()
        .filter(|(path, _)| fs::symlink_metadata(path).is_ok_and(|file| file.is_dir()))
        .try_for_each(|(path, time)| set_time(path, *time))
}

/// One file as described by both sides.
#[derive(Debug, PartialEq, Eq)]
struct Seen {
    kind: String,
    mode: u32,
    owner: (u32, u32),
    /// Time; for a directory only if a header set it.
    time: Option<i64>,
    xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    /// The first path of the same inode.
    same_as: String,
}

type Listing = BTreeMap<String, Seen>;

/// Times of headers are small; the time of unpacking is not.
const HEADER_TIME_LIMIT: i64 = 1_000_000;

fn list_folder(root: &FilePath) -> Listing {
    let (mut listing, mut inodes) = (Listing::new(), BTreeMap::new());
    let mut paths = vec![root.to_owned()];
    let mut all = Vec::new();
    while let Some(dir) = paths.pop() {
        for file in fs::read_dir(dir).unwrap() {
            let path = file.unwrap().path();
            // In a directory of one layer only, overlayfs lists whiteouts by name; there is no file to
            // compare.
            let Ok(file) = fs::symlink_metadata(&path) else { continue };
            if file.is_dir() {
                paths.push(path.clone());
            }
            all.push(path);
        }
    }
    all.sort();
    for path in all {
        let file = fs::symlink_metadata(&path).unwrap();
        let name = path.strip_prefix(root).unwrap().to_str().unwrap().to_owned();
        let kind = file.file_type();
        let device = (rustix::fs::major(file.rdev()), rustix::fs::minor(file.rdev()));
        let kind = match () {
            () if kind.is_dir() => "dir".to_owned(),
            () if kind.is_symlink() => format!("link {}", fs::read_link(&path).unwrap().display()),
            () if kind.is_char_device() => format!("char {device:?}"),
            () if kind.is_block_device() => format!("block {device:?}"),
            () if kind.is_fifo() => "fifo".to_owned(),
            () => format!("file {}", file.size()),
        };
        let time = (kind != "dir" || file.mtime() < HEADER_TIME_LIMIT).then_some(file.mtime());
        let same_as =
            inodes.entry((file.dev(), file.ino())).or_insert_with(|| name.clone()).clone();
        let seen = Seen {
            kind,
            mode: file.mode() & 0o7777,
            owner: (file.uid(), file.gid()),
            time,
            xattrs: xattrs(&path),
            same_as,
        };
        listing.insert(name, seen);
    }
    listing
}

fn list_tree(tree: &Tree) -> Listing {
    let mut all = Vec::new();
    let mut todo = vec![(String::new(), tree.root())];
    while let Some((path, dir)) = todo.pop() {
        for (name, node) in tree.children(dir) {
            let name = String::from_utf8(name.to_vec()).unwrap();
            let path = if path.is_empty() { name } else { format!("{path}/{name}") };
            if matches!(tree.kind(node), NodeKind::Directory) {
                todo.push((path.clone(), node));
            }
            all.push((path, node));
        }
    }
    all.sort_by(|a, b| FilePath::new(&a.0).cmp(FilePath::new(&b.0)));
    let mut first = BTreeMap::new();
    let mut listing = Listing::new();
    for (path, node) in all {
        let kind = match tree.kind(node) {
            NodeKind::Directory => "dir".to_owned(),
            NodeKind::Symlink(text) => format!("link {}", std::str::from_utf8(text).unwrap()),
            NodeKind::Char { major, minor } => format!("char {:?}", (major, minor)),
            NodeKind::Block { major, minor } => format!("block {:?}", (major, minor)),
            NodeKind::Fifo => "fifo".to_owned(),
            NodeKind::Socket => "socket".to_owned(),
            NodeKind::Regular { size, .. } => format!("file {}", size.get()),
        };
        let attributes = tree.attributes(node).clone();
        let same_as = first.entry(node).or_insert_with(|| path.clone()).clone();
        let (mode, owner) = (u32::from(attributes.mode), (attributes.uid, attributes.gid));
        listing.insert(
            path,
            Seen {
                kind,
                mode,
                owner,
                time: Some(attributes.mtime.secs),
                xattrs: attributes.xattrs,
                same_as,
            },
        );
    }
    listing
}

/// A mount that is removed with its guard.
struct MountGuard(PathBuf);

impl MountGuard {
    fn overlay(lower: &[PathBuf], at: &FilePath) -> Option<Self> {
        let lower: Vec<_> = lower.iter().map(|dir| dir.to_str().unwrap()).collect();
        let options = format!("ro,lowerdir={}", lower.join(":"));
        let status = Command::new("mount")
            .args(["-t", "overlay", "overlay", "-o", &options])
            .arg(at)
            .output()
            .ok()?;
        status.status.success().then(|| Self(at.to_owned()))
    }
}

impl Drop for MountGuard {
    fn drop(&mut self) {
        // Lazily, because another process may be using the mount.
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

/// Unpacks the layers both ways. `None` if containerd would fail, or cannot be imitated here.
fn compare(layers: &[Vec<String>]) -> Option<(Listing, Listing)> {
    let memory = FilePath::new("/dev/shm");
    let dir =
        if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() }.unwrap();
    let mut folders: Vec<PathBuf> = Vec::new();
    for (number, lines) in layers.iter().enumerate() {
        let upper = dir.path().join(format!("layer{number}"));
        fs::create_dir(&upper).unwrap();
        unpack(&upper, &folders, lines).ok()?;
        folders.insert(0, upper);
    }
    for spare in ["empty", "merged"] {
        fs::create_dir(dir.path().join(spare)).unwrap();
    }
    folders.push(dir.path().join("empty"));
    let mount = MountGuard::overlay(&folders, &dir.path().join("merged"))?;
    let mut theirs = list_folder(&mount.0);
    drop(mount);

    let mut tree = Tree::new();
    for lines in layers {
        let lines: Vec<_> = lines.iter().map(String::as_str).collect();
        apply_lines(&mut tree, &lines).unwrap_or_else(|error| panic!("{error}: {layers:?}"));
    }
    let mut ours = list_tree(&tree);
    for (path, their) in &mut theirs {
        if their.time.is_none()
            && let Some(our) = ours.get_mut(path)
        {
            our.time = None;
        }
    }
    Some((theirs, ours))
}

fn may_unpack() -> bool {
    let able = rustix::process::getuid().is_root()
        && compare(&[vec!["c c".to_owned()], vec!["f f user.a=1".to_owned()]]).is_some();
    if !able {
        eprintln!("Not compared with overlayfs: that needs root and a mount");
    }
    able
}

fn path_text() -> impl Strategy<Value = String> {
    prop::collection::vec(prop::sample::select(vec!["a", "b", "c"]), 1..4)
        .prop_map(|names| names.join("/"))
}

fn line(with_attributes: bool) -> impl Strategy<Value = String> {
    let attributes = (0u32..4, 0u32..3, 0u32..3, any::<bool>(), any::<bool>()).prop_map(
        move |(mode, uid, gid, user, capability)| {
            if !with_attributes {
                return String::new();
            }
            let mode = ["755", "2750", "4711", "600"][mode as usize];
            let user = if user { " user.a=1" } else { "" };
            // A well-formed capability is binary; any other security attribute takes the same path.
            let security = if capability { " security.b=2" } else { "" };
            format!(" mode={mode} uid={uid} gid={gid}{user}{security}")
        },
    );
    let shape = prop_oneof![
        4 => path_text().prop_map(|path| format!("f {path} len=3")),
        5 => path_text().prop_map(|path| format!("d {path}/")),
        3 => (path_text(), path_text(), 0..3).prop_map(|(path, target, up)| format!("l {path} -> {}{target}", ["", "/", "../"][up as usize])),
        3 => (path_text(), path_text()).prop_map(|(path, target)| format!("h {path} -> {target}")),
        1 => path_text().prop_map(|path| format!("c {path} dev=0:0")),
        1 => path_text().prop_map(|path| format!("b {path} dev=8:1")),
        1 => path_text().prop_map(|path| format!("p {path}")),
        3 => path_text().prop_map(|path| match path.rsplit_once('/') {
            Some((dir, name)) => format!("f {dir}/.wh.{name}"),
            None => format!("f .wh.{path}"),
        }),
        // Not in the root: overlayfs ignores it there and this program does not.
        2 => path_text().prop_map(|path| format!("f {path}/.wh..wh..opq")),
    ];
    (shape, attributes).prop_map(move |(shape, attributes)| {
        // Without attributes, directories get the default ones, so that copies do not matter.
        let plain = if shape.starts_with("d ") && !with_attributes { " mode=755" } else { "" };
        format!("{shape}{plain}{attributes}")
    })
}

proptest! {
    // Each case is a mount or two: a quarter of the usual number (set by PROPTEST_CASES).
    #![proptest_config(ProptestConfig::with_cases(ProptestConfig::default().cases / 4))]

    /// With one layer below, containerd's search for the attributes of parents sees only that layer.
    #[test]
    fn two_layers_are_what_overlayfs_shows(layers in prop::collection::vec(prop::collection::vec(line(true), 0..7), 2..3)) {
        if may_unpack() && let Some((theirs, ours)) = compare(&layers) {
            prop_assert_eq!(ours, theirs);
        }
    }

    /// With several layers below, containerd looks into each separately, even if one hides another; the
    /// merged tree cannot show that. So all directories are equal here.
    #[test]
    fn many_layers_are_what_overlayfs_shows(layers in prop::collection::vec(prop::collection::vec(line(false), 0..6), 3..5)) {
        if may_unpack() && let Some((theirs, ours)) = compare(&layers) {
            prop_assert_eq!(ours, theirs);
        }
    }
}

#[test]
fn known_stacks_are_what_overlayfs_shows() {
    if !may_unpack() {
        return;
    }
    let layers = |lines: &[&[&str]]| -> Vec<Vec<String>> {
        lines.iter().map(|lines| lines.iter().map(|&line| line.to_owned()).collect()).collect()
    };
    for stack in [
        layers(&[&["d a mode=700 user.a=1", "f a/x"], &["f .wh.a", "d a mode=711"]]),
        layers(&[&["d usr/lib mode=700", "l lib -> usr/lib"], &["f lib/x"]]),
        layers(&[&["d a mode=2775 gid=5"], &["f a/b/c"]]),
        layers(&[
            &["d d", "f d/f", "d d/e"],
            &["f d/new", "f d/.wh..wh..opq", "f d/e/y"],
            &["d d", "f d/.wh.new"],
        ]),
        layers(&[&["f f len=3 mode=4755", "h g -> f", "h h -> g mode=600 uid=3"], &["f g"]]),
    ] {
        let (theirs, ours) =
            compare(&stack).unwrap_or_else(|| panic!("{stack:?} cannot be unpacked"));
        assert_eq!(ours, theirs, "{stack:?}");
    }
}
