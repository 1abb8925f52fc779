//! A mounted tree as text for comparison: one line a file, with every property that a container can see.

#![allow(dead_code)] // each test uses its part

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write as _;
use std::fs;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::Path;

use sha2::{Digest as _, Sha256};

/// Everything about one name but its modification time.
#[derive(Debug, PartialEq, Eq)]
pub struct Listed {
    /// Type, mode, owner, data, target, device, xattrs, and other names of the same file.
    pub what: String,
    /// Seconds and nanoseconds.
    pub mtime: (i64, i64),
    /// True if it is a directory.
    pub directory: bool,
}

/// Lists `root`, by path. The root itself is `.`.
pub fn list(root: &Path) -> BTreeMap<String, Listed> {
    let mut listing = BTreeMap::new();
    let mut first_names = HashMap::new();
    let mut pending = vec![root.to_path_buf()];
    let mut paths = vec![root.to_path_buf()];
    while let Some(dir) = pending.pop() {
        for entry in fs::read_dir(&dir).unwrap_or_else(|error| panic!("{}: {error}", dir.display()))
        {
            let entry = entry.unwrap();
            if entry.file_type().unwrap().is_dir() {
                pending.push(entry.path());
            }
            paths.push(entry.path());
        }
    }
    paths.sort();
    for path in paths {
        let name =
            path.strip_prefix(root).unwrap().as_os_str().as_bytes().escape_ascii().to_string();
        let name = if name.is_empty() { ".".to_owned() } else { name };
        listing.insert(name.clone(), describe(&path, &name, &mut first_names));
    }
    listing
}

fn describe(path: &Path, name: &str, first_names: &mut HashMap<(u64, u64), String>) -> Listed {
    let meta = path.symlink_metadata().unwrap();
    let kind = meta.file_type();
    let mut what = format!("{:06o} {}:{}", meta.mode(), meta.uid(), meta.gid());
    if kind.is_file() {
        let data = fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let digest = Sha256::digest(&data);
        write!(
            what,
            " size={} sha256={}",
            meta.len(),
            digest[..8].iter().map(|b| format!("{b:02x}")).collect::<String>()
        )
        .unwrap();
    } else if kind.is_symlink() {
        write!(what, " -> {}", fs::read_link(path).unwrap().as_os_str().as_bytes().escape_ascii())
            .unwrap();
    } else if kind.is_char_device() || kind.is_block_device() {
        write!(
            what,
            " device={},{}",
            rustix::fs::major(meta.rdev()),
            rustix::fs::minor(meta.rdev())
        )
        .unwrap();
    }
    if !kind.is_dir() {
        // Overlayfs shows link count 1 for merged directories, so directories are not compared.
        write!(what, " links={}", meta.nlink()).unwrap();
        let first = first_names.entry((meta.dev(), meta.ino())).or_insert_with(|| name.to_owned());
        if first != name {
            write!(what, " same-as={first}").unwrap();
        }
    }
    for (attribute, value) in xattrs(path) {
        write!(what, " {attribute}={value}").unwrap();
    }
    Listed { what, mtime: (meta.mtime(), meta.mtime_nsec()), directory: kind.is_dir() }
}

fn xattrs(path: &Path) -> BTreeMap<String, String> {
    let mut names = vec![0u8; 64 << 10];
    let len = rustix::fs::llistxattr(path, &mut names).unwrap_or(0);
    let mut found = BTreeMap::new();
    for name in names[..len].split(|&b| b == 0).filter(|name| !name.is_empty()) {
        let name = std::str::from_utf8(name).unwrap();
        let mut value = vec![0u8; 64 << 10];
        let len = rustix::fs::lgetxattr(path, name, &mut value).unwrap();
        // Without blanks, so that a line splits into its words.
        let value = value[..len].escape_ascii().to_string().replace(' ', "\\x20");
        found.insert(name.to_owned(), value);
    }
    found
}

/// Asserts that two trees agree in every listed property.
#[track_caller]
pub fn same_trees(ours: &Path, theirs: &Path) {
    let found = differences(&list(ours), &list(theirs), &|_| false, &|_, _| false);
    assert!(found.is_empty(), "{}:\n{}", ours.display(), found.join("\n"));
}

/// Differences of two listings, empty when they agree. `skip` names paths that are not compared, and
/// `loose_mtime` returns true for names of the first listing whose time is not compared.
pub fn differences(
    ours: &BTreeMap<String, Listed>,
    theirs: &BTreeMap<String, Listed>,
    skip: &dyn Fn(&str) -> bool,
    loose_mtime: &dyn Fn(&str, &Listed) -> bool,
) -> Vec<String> {
    let mut out = Vec::new();
    for (name, our) in ours.iter().filter(|(name, _)| !skip(name)) {
        match theirs.get(name) {
            None => out.push(format!("only ours: {name}: {}", our.what)),
            Some(their) if their.what != our.what => {
                out.push(format!("{name}:\n  ours   {}\n  theirs {}", our.what, their.what));
            }
            Some(their) if their.mtime != our.mtime && !loose_mtime(name, their) => {
                out.push(format!("{name}: mtime ours {:?} theirs {:?}", our.mtime, their.mtime));
            }
            Some(_) => {}
        }
    }
    for (name, their) in theirs.iter().filter(|(name, _)| !skip(name) && !ours.contains_key(*name))
    {
        out.push(format!("only theirs: {name}: {}", their.what));
    }
    out
}
