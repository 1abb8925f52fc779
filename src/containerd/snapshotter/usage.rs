//! What a folder occupies on disk.
//!
//! CRI asks for every active snapshot every 10 s, of hosts with hundreds of containers. So a result is kept for [`REST`] times the time
//! that its walk took: at most a small part of this process's time goes into walks, and small folders are always
//! walked anew.

use std::collections::{HashMap, HashSet};
use std::ffi::{CStr, CString, OsStr};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, open, openat, statat};
use rustix::io::Errno;

use super::error::{SnapshotError, step};
use super::store::record::DiskUsage;

/// A result is kept for so many times the time that its walk took.
const REST: u32 = 20;

/// Bytes of a block of `st_blocks`.
const BLOCK: u64 = 512;

/// Results of walks, by the number of the snapshot.
#[derive(Debug, Default)]
pub struct UsageCache {
    results: Mutex<HashMap<u64, Walked>>,
}

/// A result, and when it is too old.
#[derive(Clone, Copy, Debug)]
struct Walked {
    usage: DiskUsage,
    stale: Instant,
}

impl UsageCache {
    /// What `folder` of the snapshot `id` occupies, from a walk that is not too old.
    ///
    /// # Errors
    /// Returns [`SnapshotError::Folder`]; [`SnapshotError::Deadline`] if the walk has not ended at `until` and there was none before.
    pub fn of(&self, id: u64, folder: &Path, until: Instant) -> Result<DiskUsage, SnapshotError> {
        let known = self.results.lock().get(&id).copied();
        let start = Instant::now();
        if let Some(walked) = known
            && start < walked.stale
        {
            return Ok(walked.usage);
        }
        match walk(folder, until) {
            Ok(usage) => {
                let now = Instant::now();
                let stale = now + (now - start).saturating_mul(REST).min(Duration::from_secs(600));
                self.results.lock().insert(id, Walked { usage, stale });
                Ok(usage)
            }
            // An old figure is better than none.
            Err(SnapshotError::Deadline { .. }) if known.is_some() => {
                Ok(known.map(|walked| walked.usage).unwrap_or_default())
            }
            Err(error) => Err(error),
        }
    }

    /// Forgets a snapshot.
    pub fn forget(&self, id: u64) {
        self.results.lock().remove(&id);
    }
}

/// Adds up the blocks of all files of a folder, itself included. A file with several names counts once; what is mounted below
/// counts not at all. A file that vanishes meanwhile counts not.
///
/// # Errors
/// Returns [`SnapshotError::Folder`] if the folder cannot be read, [`SnapshotError::Deadline`] after `until`.
pub fn walk(folder: &Path, until: Instant) -> Result<DiskUsage, SnapshotError> {
    let failed = |error: Errno| step("read the folder", folder)(io::Error::from(error));
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let root = open(folder, flags, Mode::empty()).map_err(failed)?;
    let stat = rustix::fs::fstat(&root).map_err(failed)?;
    let mut walk = Walk {
        device: stat.st_dev,
        seen: HashSet::new(),
        open: vec![PathBuf::from(".")],
        usage: DiskUsage { bytes: blocks(&stat), inodes: 1 },
    };
    while let Some(path) = walk.open.pop() {
        if Instant::now() >= until {
            return Err(SnapshotError::Deadline { what: format!("Counting {}", folder.display()) });
        }
        match openat(&root, &path, flags, Mode::empty()) {
            Ok(dir) => walk.folder(&path, &dir).map_err(failed)?,
            // It was removed, or lies deeper than a path can say.
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::NAMETOOLONG) => {}
            Err(error) => return Err(failed(error)),
        }
    }
    Ok(walk.usage)
}

/// A walk under way. Folders that are still to be read are paths, not open files: their number has no limit.
struct Walk {
    device: u64,
    /// Inodes with several names that were counted.
    seen: HashSet<u64>,
    /// Folders to read, relative to the root of the walk.
    open: Vec<PathBuf>,
    usage: DiskUsage,
}

impl Walk {
    fn folder(&mut self, path: &Path, dir: &OwnedFd) -> Result<(), Errno> {
        for entry in Dir::read_from(dir)? {
            let entry = entry?;
            let name: &CStr = entry.file_name();
            if name == c"." || name == c".." {
                continue;
            }
            let stat = match statat(dir, name, AtFlags::SYMLINK_NOFOLLOW) {
                Ok(stat) => stat,
                Err(Errno::NOENT) => continue,
                Err(error) => return Err(error),
            };
            if stat.st_dev != self.device {
                continue;
            }
            if stat.st_nlink > 1 && !is_folder(&stat) && !self.seen.insert(stat.st_ino) {
                continue;
            }
            self.usage.inodes += 1;
            self.usage.bytes += blocks(&stat);
            if is_folder(&stat) {
                let name: CString = name.to_owned();
                self.open.push(path.join(OsStr::from_bytes(name.as_bytes())));
            }
        }
        Ok(())
    }
}

fn is_folder(stat: &rustix::fs::Stat) -> bool {
    FileType::from_raw_mode(stat.st_mode) == FileType::Directory
}

fn blocks(stat: &rustix::fs::Stat) -> u64 {
    u64::try_from(stat.st_blocks).unwrap_or(0) * BLOCK
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::process::Command;

    const LATER: Duration = Duration::from_secs(60);

    #[test]
    fn a_folder_occupies_what_du_says() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        fs::create_dir_all(root.join("a/b/c")).unwrap();
        fs::write(root.join("a/big"), vec![1; 100_000]).unwrap();
        fs::write(root.join("a/b/small"), b"x").unwrap();
        fs::hard_link(root.join("a/big"), root.join("a/b/again")).unwrap();
        std::os::unix::fs::symlink("/etc", root.join("link")).unwrap();
        fs::File::create(root.join("hole")).unwrap().set_len(1 << 30).unwrap();
        let usage = walk(root, Instant::now() + LATER).unwrap();
        let du = |arguments: &[&str]| -> u64 {
            let output = Command::new("du").args(arguments).arg(root).output().unwrap();
            let text = String::from_utf8(output.stdout).unwrap();
            text.split_whitespace().next().unwrap().parse().unwrap()
        };
        assert_eq!(usage.bytes, du(&["-s", "-B1"]));
        assert_eq!(usage.inodes, du(&["-s", "--inodes"]));
    }

    #[test]
    fn a_walk_ends_at_its_deadline_and_an_old_figure_is_better_than_none() {
        let dir = tempfile::tempdir().unwrap();
        let over = Instant::now();
        let cache = UsageCache::default();
        let error = cache.of(1, dir.path(), over).unwrap_err();
        assert!(matches!(error, SnapshotError::Deadline { .. }), "{error}");
        let known = cache.of(1, dir.path(), over + LATER).unwrap();
        cache.results.lock().get_mut(&1).unwrap().stale = over;
        assert_eq!(cache.of(1, dir.path(), over).unwrap(), known);
    }
}
