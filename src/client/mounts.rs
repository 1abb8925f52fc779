//! Mounts of a device, made and found in the caller's mount namespace.

use std::io;
use std::os::unix::fs::{FileExt as _, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::{major, minor};
use rustix::mount::{MountFlags, UnmountFlags, mount, mount_bind, mount_remount, unmount};

use crate::error::{ClientError, step};
use crate::mountinfo::{self, MountRow};

/// First bytes of an erofs superblock, little-endian `0xE0F5_E1E2`, 1024 bytes into the device.
const EROFS_MAGIC: [u8; 4] = [0xe2, 0xe1, 0xf5, 0xe0];

/// What files of an image may do on this host, besides being read and run. Both are off unless asked for: the author of an
/// image writes a program that is setuid root, or the node of any device, as easily as a text.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MountRights {
    /// Programs get the user, the group and the capabilities that their files name.
    pub suid: bool,
    /// Device nodes are devices.
    pub dev: bool,
}

impl MountRights {
    fn flags(self) -> MountFlags {
        let mut flags = MountFlags::empty();
        flags.set(MountFlags::NOSUID, !self.suid);
        flags.set(MountFlags::NODEV, !self.dev);
        flags
    }
}

/// Mounts the file system on a device: erofs if its superblock says so, else ext4, read-only if the device is.
///
/// `noload`: a journal, if an ext4 has one, must not be replayed on a read-only disk; `errors=continue`: a
/// failed read of metadata must never panic the host, whatever the superblock says. These options override
/// those of the image.
///
/// # Errors
/// Returns [`ClientError::Step`].
pub fn mount_image(device: &Path, dir: &Path, rights: MountRights) -> Result<(), ClientError> {
    mount_with(device, dir, rights.flags())
}

fn mount_with(device: &Path, dir: &Path, flags: MountFlags) -> Result<(), ClientError> {
    let mut magic = [0; 4];
    let read = std::fs::File::open(device).and_then(|file| file.read_exact_at(&mut magic, 1024));
    read.map_err(step("read", device))?;
    if magic == EROFS_MAGIC {
        return mount(device, dir, "erofs", MountFlags::RDONLY | flags, None)
            .map_err(io::Error::from)
            .map_err(step("mount an erofs at", dir));
    }
    let (more, options) = if is_writable(device).map_err(step("examine", device))? {
        (MountFlags::empty(), c"errors=remount-ro,discard")
    } else {
        (MountFlags::RDONLY, c"noload,errors=continue")
    };
    mount(device, dir, "ext4", flags | more, options)
        .map_err(io::Error::from)
        .map_err(step("mount an ext4 at", dir))
}

/// True if sysfs reports the block device as writable.
fn is_writable(device: &Path) -> io::Result<bool> {
    let number = std::fs::metadata(device)?.rdev();
    let path = format!("/sys/dev/block/{}:{}/ro", major(number), minor(number));
    Ok(std::fs::read_to_string(path).is_ok_and(|text| text.trim() == "0"))
}

/// Unmounts the last mount at `dir`.
///
/// # Errors
/// Returns [`ClientError::Busy`] if files there are open, [`ClientError::Step`].
pub fn unmount_dir(dir: &Path) -> Result<(), ClientError> {
    match unmount(dir, UnmountFlags::NOFOLLOW) {
        Err(rustix::io::Errno::BUSY) => Err(ClientError::Busy(dir.to_owned())),
        result => result.map_err(io::Error::from).map_err(step("unmount", dir)),
    }
}

/// A folder for a mount, at which nothing is mounted. It is made if it is missing, and removed again when this is dropped
/// before [`keep`](Self::keep).
#[derive(Debug)]
pub struct MountPoint {
    dir: PathBuf,
    made: bool,
}

impl MountPoint {
    /// Checks `dir`, or makes it.
    ///
    /// # Errors
    /// [`ClientError::MountPointTaken`] if a mount is there, also one that no longer answers; [`ClientError::Step`] if
    /// the folder cannot be made or found.
    pub fn new(dir: &Path) -> Result<Self, ClientError> {
        let found = std::fs::canonicalize(dir);
        let place = match &found {
            Ok(place) => place.clone(),
            // A folder below a mount that does not answer cannot be resolved.
            Err(_) => std::path::absolute(dir).map_err(step("find the mount point", dir))?,
        };
        if let Some(what) = mounted_at(&place)? {
            return Err(ClientError::MountPointTaken { dir: place, what });
        }
        match found {
            Ok(dir) => Ok(Self { dir, made: false }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                std::fs::create_dir_all(dir).map_err(step("make the mount point", dir))?;
                let dir = std::fs::canonicalize(dir).map_err(step("find the mount point", dir))?;
                Ok(Self { dir, made: true })
            }
            Err(error) => Err(step("find the mount point", dir)(error)),
        }
    }

    /// The folder, absolute and without links.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Leaves the folder to its mount.
    pub fn keep(mut self) {
        self.made = false;
    }
}

impl Drop for MountPoint {
    fn drop(&mut self) {
        if self.made {
            let _ = std::fs::remove_dir(&self.dir); // it is empty, or in use by now
        }
    }
}

/// File system and source of the uppermost mount at `dir`, an absolute path without links: later mounts lie above earlier
/// ones.
fn mounted_at(dir: &Path) -> Result<Option<String>, ClientError> {
    let process = Path::new("/proc/self");
    let rows = mountinfo::mounts_of(process).map_err(step("read", process.join("mountinfo")))?;
    let last = rows.into_iter().rfind(|row| row.place == dir);
    Ok(last.map(|row| format!("{} on {}", row.kind, row.source)))
}

/// Mounts what [`unmount_dir`] took away, at the same place with the same options. `whole` is a place where the whole file
/// system is mounted: a mount of one of its folders is made from it.
pub(crate) fn mount_again(
    device: &Path,
    row: &MountRow,
    whole: Option<&Path>,
) -> Result<(), ClientError> {
    let mut flags = MountFlags::empty();
    for (option, flag) in [
        ("ro", MountFlags::RDONLY),
        ("nosuid", MountFlags::NOSUID),
        ("nodev", MountFlags::NODEV),
        ("noexec", MountFlags::NOEXEC),
        ("noatime", MountFlags::NOATIME),
        ("nodiratime", MountFlags::NODIRATIME),
        ("relatime", MountFlags::RELATIME),
    ] {
        flags.set(flag, row.has(option));
    }
    let Some(whole) = whole.filter(|_| row.root != Path::new("/")) else {
        return mount_with(device, &row.place, flags);
    };
    let part = whole.join(row.root.strip_prefix("/").unwrap_or(&row.root));
    mount_bind(&part, &row.place)
        .and_then(|()| mount_remount(&row.place, MountFlags::BIND | flags, c""))
        .map_err(io::Error::from)
        .map_err(step("mount a folder of the image at", &row.place))
}

/// Mount points of the file system on `device`, in the order of the mounts.
///
/// # Errors
/// Returns [`ClientError::Step`] if the device or the list of mounts cannot be read.
pub fn mounted_from(device: &Path) -> Result<Vec<PathBuf>, ClientError> {
    let number = std::fs::metadata(device).map_err(step("examine", device))?.rdev();
    let number = (major(number), minor(number));
    let process = Path::new("/proc/self");
    let rows = mountinfo::mounts_of(process).map_err(step("read", process.join("mountinfo")))?;
    Ok(rows.into_iter().filter(|row| row.number == number).map(|row| row.place).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_that_was_made_for_a_mount_goes_without_one() {
        let dir = tempfile::tempdir().unwrap();
        let place = dir.path().join("mnt");
        drop(MountPoint::new(&place).unwrap());
        assert!(!place.exists());
        MountPoint::new(&place).unwrap().keep();
        drop(MountPoint::new(&place).unwrap());
        assert!(place.is_dir());
        let taken = MountPoint::new(Path::new("/proc")).unwrap_err().to_string();
        assert!(taken.starts_with("/proc is a mount point already, of proc on "), "{taken}");
    }
}
