//! Mounts of a device, made and found in the caller's mount namespace.

use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{FileExt as _, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::{major, minor};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use crate::error::{ClientError, step};

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

/// Mounts the file system on a device: erofs if its superblock says so, else ext4 ([`mount_ext4`]).
///
/// # Errors
/// Returns [`ClientError::Step`].
pub fn mount_image(device: &Path, dir: &Path, rights: MountRights) -> Result<(), ClientError> {
    let mut magic = [0; 4];
    let read = std::fs::File::open(device).and_then(|file| file.read_exact_at(&mut magic, 1024));
    read.map_err(step("read", device))?;
    if magic == EROFS_MAGIC {
        return mount(device, dir, "erofs", MountFlags::RDONLY | rights.flags(), None)
            .map_err(io::Error::from)
            .map_err(step("mount an erofs at", dir));
    }
    mount_ext4(device, dir, rights)
}

/// Mounts the ext4 of a device: read-only if the device is.
///
/// `noload`: a journal, if the image has one, must not be replayed on a read-only disk; `errors=continue`: a
/// failed read of metadata must never panic the host, whatever the superblock says. These options override
/// those of the image.
///
/// # Errors
/// Returns [`ClientError::Step`].
pub fn mount_ext4(device: &Path, dir: &Path, rights: MountRights) -> Result<(), ClientError> {
    let (flags, options) = if is_writable(device).map_err(step("examine", device))? {
        (MountFlags::empty(), c"errors=remount-ro,discard")
    } else {
        (MountFlags::RDONLY, c"noload,errors=continue")
    };
    mount(device, dir, "ext4", flags | rights.flags(), options)
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

/// File system and source of the uppermost mount at `dir`, an absolute path without links.
fn mounted_at(dir: &Path) -> Result<Option<String>, ClientError> {
    let list = Path::new("/proc/self/mountinfo");
    let text = std::fs::read(list).map_err(step("read", list))?;
    Ok(last_at(&text, dir))
}

/// The last line of mountinfo with this mount point: later mounts lie above earlier ones. A hyphen ends the optional
/// fields; file system and source follow it.
fn last_at(mountinfo: &[u8], dir: &Path) -> Option<String> {
    let shown = |field: &[u8]| PathBuf::from(unescape(field)).display().to_string();
    mountinfo
        .split(|&byte| byte == b'\n')
        .filter_map(|line| {
            let mut fields = line.split(|&byte| byte == b' ');
            if Path::new(&unescape(fields.nth(4)?)) != dir {
                return None;
            }
            let mut kind = fields.skip_while(|field| *field != b"-").skip(1);
            Some(format!("{} on {}", shown(kind.next()?), shown(kind.next()?)))
        })
        .next_back()
}

/// Mount points of the file system on `device`, in the order of the mounts.
///
/// # Errors
/// Returns [`ClientError::Step`] if the device or the list of mounts cannot be read.
pub fn mounted_from(device: &Path) -> Result<Vec<PathBuf>, ClientError> {
    let number = std::fs::metadata(device).map_err(step("examine", device))?.rdev();
    let list = Path::new("/proc/self/mountinfo");
    let text = std::fs::read(list).map_err(step("read", list))?;
    Ok(parse(&text, major(number), minor(number)))
}

/// Parses the format of proc(5): fields separated by spaces; the third is `major:minor`, the fifth the mount
/// point, with blanks, tabs, line ends and backslashes as octal `\ooo`.
fn parse(mountinfo: &[u8], major: u32, minor: u32) -> Vec<PathBuf> {
    let number = format!("{major}:{minor}");
    mountinfo
        .split(|&byte| byte == b'\n')
        .filter_map(|line| {
            let mut fields = line.split(|&byte| byte == b' ');
            let (number_field, place) = (fields.nth(2)?, fields.nth(1)?);
            (number_field == number.as_bytes()).then(|| PathBuf::from(unescape(place)))
        })
        .collect()
}

fn unescape(field: &[u8]) -> OsString {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let [first, tail @ ..] = rest {
        let octal = match rest {
            [b'\\', digits @ ..] => digits.get(..3).and_then(|digits| {
                let digits = std::str::from_utf8(digits).ok()?;
                u8::from_str_radix(digits, 8).ok()
            }),
            _ => None,
        };
        match octal {
            Some(byte) => {
                bytes.push(byte);
                rest = &rest[4..];
            }
            None => {
                bytes.push(*first);
                rest = tail;
            }
        }
    }
    OsString::from_vec(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_uppermost_mount_at_a_folder_is_named() {
        let list = b"21 1 8:1 / / rw - ext4 /dev/sda1 rw\n\
            30 21 0:5 / /a\\040b rw shared:1 - tmpfs none rw\n\
            31 30 7:3 / /a\\040b ro,nosuid shared:2 master:1 - ext4 /dev/loop3 ro\n";
        assert_eq!(last_at(list, Path::new("/a b")).unwrap(), "ext4 on /dev/loop3");
        assert_eq!(last_at(list, Path::new("/")).unwrap(), "ext4 on /dev/sda1");
        assert_eq!(last_at(list, Path::new("/a")), None);
        assert_eq!(last_at(b"31 30 7:3 / /a\n", Path::new("/a")), None);
    }

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

    #[test]
    fn mount_points_are_found_by_device_number_and_unescaped() {
        let text = b"36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw\n\
                     40 35 7:3 / /a\\040b\\134c ro - ext4 /dev/loop3 ro\n\
                     41 35 7:30 / /other ro - ext4 /dev/loop30 ro\n\
                     42 35 7:3 / /twice ro - ext4 /dev/loop3 ro\nshort line\n";
        assert_eq!(parse(text, 7, 3), [PathBuf::from("/a b\\c"), PathBuf::from("/twice")]);
        assert_eq!(parse(text, 9, 9), Vec::<PathBuf>::new());
        assert_eq!(unescape(b"\\9\\"), OsString::from("\\9\\"));
    }
}
