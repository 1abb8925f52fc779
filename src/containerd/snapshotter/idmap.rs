//! Lower folders of a container in a user namespace: clones with mapped owners.
//!
//! containerd 1.7 names the users of the container in two labels and knows no option for it; containerd 2 has one, which needs a
//! capability and a lower folder of a certain place. So the lower folders are cloned here, in `idmapped/0`, `idmapped/1`, … of
//! the container's own folder, and the answer has these and no option: right with every version. Nothing is copied and no
//! owner is changed on the disk. The clones go with the container's snapshot.
//!
//! Without the capability `remap-ids` containerd makes a snapshot whose key ends in `-remap`, changes the owner of
//! every file in it, and still sends the labels with the container: mapping them again would be wrong
//! ([`is_remapped`]).

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use client::{ClientError, step};
use rustix::mount::{UnmountFlags, unmount};

use crate::labels::OwnerMap;

/// Folder of the clones, in the snapshot's folder.
const CLONES_NAME: &str = "idmapped";

/// End of the key of a snapshot whose files containerd has given to the container's users.
const REMAPPED: &str = "-remap";

/// True if a layer that was committed from the active snapshot `key` has the container's owners already.
#[must_use]
pub fn is_remapped(key: &str) -> bool {
    key.ends_with(REMAPPED)
}

/// Clones `lowers` with the owners of `map` into the folder of a snapshot; returns the clones in the same order. What is cloned
/// already stays.
///
/// # Errors
/// [`ClientError::Step`]: the kernel's refusal, such as a file system that maps no owners.
pub fn clone_lowers(
    folder: &Path,
    lowers: &[PathBuf],
    map: &OwnerMap,
) -> Result<Vec<PathBuf>, ClientError> {
    let clones = folder.join(CLONES_NAME);
    make(&clones)?;
    let mut found = Vec::new();
    for (number, lower) in lowers.iter().enumerate() {
        let clone = clones.join(number.to_string());
        make(&clone)?;
        let wanted = place(lower)?;
        let mut here = place(&clone)?;
        // A clone of a device that has died since, or nothing.
        while is_mount(&clone)? && here != wanted {
            take_off(&clone)?;
            here = place(&clone)?;
        }
        if here != wanted {
            sys::idmap::mount_mapped(lower, &clone, &map.users, &map.groups)
                .map_err(step("map the owners of the files in", lower))?;
        }
        found.push(clone);
    }
    Ok(found)
}

/// Takes the clones of a snapshot away; programs that use them keep them.
///
/// # Errors
/// [`ClientError::Step`].
pub fn remove_clones(folder: &Path) -> Result<(), ClientError> {
    let clones = folder.join(CLONES_NAME);
    let entries = match fs::read_dir(&clones) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries.map_err(step("list", &clones))?,
    };
    for entry in entries {
        let clone = entry.map_err(step("list", &clones))?.path();
        while is_mount(&clone)? {
            take_off(&clone)?;
        }
        // Not recursively: what is mounted there must never be deleted.
        fs::remove_dir(&clone).map_err(step("remove", &clone))?;
    }
    fs::remove_dir(&clones).map_err(step("remove", &clones))
}

fn make(folder: &Path) -> Result<(), ClientError> {
    match DirBuilder::new().mode(0o700).create(folder) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            Err(step("make", folder)(error))
        }
        _ => Ok(()),
    }
}

/// Device and inode of a folder: of the mount on it, if there is one.
fn place(folder: &Path) -> Result<(u64, u64), ClientError> {
    let meta = fs::symlink_metadata(folder).map_err(step("examine", folder))?;
    Ok((meta.dev(), meta.ino()))
}

/// True if something is mounted at a folder, be it of the same file system.
fn is_mount(folder: &Path) -> Result<bool, ClientError> {
    use rustix::fs::{AtFlags, CWD, StatxAttributes, StatxFlags, statx};
    let found = statx(CWD, folder, AtFlags::SYMLINK_NOFOLLOW, StatxFlags::empty());
    let found = found.map_err(io::Error::from).map_err(step("examine", folder))?;
    Ok(found.stx_attributes.contains(StatxAttributes::MOUNT_ROOT))
}

fn take_off(clone: &Path) -> Result<(), ClientError> {
    let detached = unmount(clone, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW);
    detached.map_err(io::Error::from).map_err(step("unmount", clone))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_layer_is_remapped_if_containerd_made_it_under_such_a_key() {
        assert!(is_remapped("k8s.io/77/0a1b-remap"));
        assert!(!is_remapped("k8s.io/77/extract-1-x sha256:0"));
    }

    #[test]
    fn a_snapshot_without_clones_has_none_to_remove() {
        let dir = tempfile::tempdir().unwrap();
        remove_clones(dir.path()).unwrap();
    }
}
