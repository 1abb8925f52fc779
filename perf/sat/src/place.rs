//! Folders of the harness, and the removal of what a killed run left.
//!
//! Everything is below one folder, `target/sat`, or `$SAT_DIR`. What costs time to make (layers, the registry's
//! storage, records) stays there from one run to the next; `work` has the stores of the one run that is under way and
//! is emptied before each. Processes of a run are in a cgroup of their own, mounts are below `work`: so a run that was
//! killed is cleaned up without a list of what it had started.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::mount::{UnmountFlags, unmount};

use crate::failure::{Attempt as _, Failure};
use crate::measure::group;

/// Folders of the harness.
#[derive(Clone, Debug)]
pub(crate) struct Place {
    /// The repository.
    pub(crate) repository: PathBuf,
    /// Everything that the harness keeps.
    pub(crate) base: PathBuf,
}

impl Place {
    /// The folders of this repository; the base is made.
    pub(crate) fn new() -> Result<Self, Failure> {
        let repository = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."))
            .canonicalize()
            .attempt(|| "find the repository".into())?;
        let base = match std::env::var_os("SAT_DIR") {
            Some(dir) => std::path::absolute(dir).attempt(|| "take SAT_DIR".into())?,
            None => repository.join("target/sat"),
        };
        fs::create_dir_all(&base).attempt(|| format!("make {}", base.display()))?;
        Ok(Self { repository, base })
    }

    /// A folder below the base, made if it is missing.
    pub(crate) fn folder(&self, name: &str) -> Result<PathBuf, Failure> {
        let folder = self.base.join(name);
        fs::create_dir_all(&folder).attempt(|| format!("make {}", folder.display()))?;
        Ok(folder)
    }

    /// Scripts and descriptions of the images.
    pub(crate) fn images(&self) -> PathBuf {
        self.repository.join("perf/sat/images")
    }

    /// Ends what an earlier run left: its processes, its mounts, its stores.
    pub(crate) fn clean(&self) -> Result<(), Failure> {
        group::kill_all(Duration::from_secs(10))?;
        for folder in ["work", "build"] {
            let folder = self.base.join(folder);
            unmount_below(&folder)?;
            if folder.exists() {
                fs::remove_dir_all(&folder).attempt(|| format!("remove {}", folder.display()))?;
            }
        }
        Ok(())
    }
}

/// Unmounts everything that is mounted at `folder` or below, the last mount first.
pub(crate) fn unmount_below(folder: &Path) -> Result<(), Failure> {
    let table = fs::read_to_string("/proc/self/mountinfo").attempt(|| "read the mounts".into())?;
    for point in mounts_below(&table, folder).iter().rev() {
        // A mount that is still in use goes when its last user does.
        unmount(point, UnmountFlags::empty())
            .or_else(|_| unmount(point, UnmountFlags::DETACH))
            .attempt(|| format!("unmount {}", point.display()))?;
    }
    Ok(())
}

/// Mount points at or below `folder`, in the order of a `mountinfo` table.
fn mounts_below(table: &str, folder: &Path) -> Vec<PathBuf> {
    let points = table.lines().filter_map(|line| line.split(' ').nth(4));
    // The kernel writes blanks as \040.
    let points = points.map(|point| PathBuf::from(point.replace("\\040", " ")));
    points.filter(|point| point.starts_with(folder)).collect()
}

/// Free bytes of the file system of `folder`.
pub(crate) fn free_bytes(folder: &Path) -> Result<u64, Failure> {
    let found = rustix::fs::statvfs(folder)
        .attempt(|| format!("ask for the free space of {}", folder.display()))?;
    Ok(found.f_bavail * found.f_frsize)
}

/// Bytes of the blocks that the files below `folder` occupy; what cannot be read counts nothing.
pub(crate) fn used_bytes(folder: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt as _;
    let Ok(device) = fs::symlink_metadata(folder).map(|found| found.dev()) else { return 0 };
    let mut used = 0;
    let mut open = vec![folder.to_owned()];
    let mut linked = std::collections::HashSet::new();
    while let Some(dir) = open.pop() {
        for entry in fs::read_dir(&dir).into_iter().flatten().flatten() {
            let Ok(found) = entry.metadata() else { continue };
            // Mounts below the store are views of what is counted already.
            if found.dev() != device {
                continue;
            }
            if found.is_dir() {
                open.push(entry.path());
            } else if found.nlink() > 1 && !linked.insert(found.ino()) {
                continue;
            }
            used += found.blocks() * 512;
        }
    }
    used
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_mounts_below_the_folder_are_found_in_their_order() {
        let table = "1 0 8:1 / / rw - ext4 /dev/a rw\n2 1 8:2 / /t/sat/a\\040b rw - ext4 /dev/b rw\n\
                     3 1 8:2 / /t/sat/a\\040b/c rw - ext4 /dev/b rw\n4 1 8:2 / /t/satellite rw - ext4 /dev/b rw\n";
        let found = mounts_below(table, Path::new("/t/sat"));
        assert_eq!(found, [Path::new("/t/sat/a b"), Path::new("/t/sat/a b/c")]);
    }

    #[test]
    fn a_file_with_two_names_is_counted_once() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("a"), vec![1; 100_000]).unwrap();
        let one = used_bytes(dir.path());
        fs::hard_link(dir.path().join("a"), dir.path().join("b")).unwrap();
        assert!(one >= 100_000);
        assert_eq!(used_bytes(dir.path()), one);
    }
}
