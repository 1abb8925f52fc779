//! Positions of a file of a mounted image on its device: the file system is asked, by `FS_IOC_FIEMAP`.
//!
//! `unsafe` is needed for `ioctl(2)`: the kernel writes into a structure whose layout is `struct fiemap` of
//! `linux/fiemap.h`, with room for as many extents as its count states.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, openat2};

/// Number of extents requested at once.
const BATCH: usize = 64;

/// `_IOWR('f', 11, struct fiemap)`.
const FS_IOC_FIEMAP: u64 = 0xc020_660b;

/// Flag of the last extent of the file.
const LAST: u32 = 0x1;
/// Flags of an extent without a usable position: not known, not yet allocated, encoded, inside the inode.
const NO_PLACE: u32 = 0x2 | 0x4 | 0x8 | 0x80 | 0x200;
/// Flag of an extent that is allocated, and reads as zeros.
const UNWRITTEN: u32 = 0x800;

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct RawExtent {
    logical: u64,
    physical: u64,
    length: u64,
    reserved: [u64; 2],
    flags: u32,
    reserved_too: [u32; 3],
}

#[repr(C)]
struct Fiemap {
    start: u64,
    length: u64,
    flags: u32,
    mapped_extents: u32,
    extent_count: u32,
    reserved: u32,
    extents: [RawExtent; BATCH],
}

/// A contiguous part of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileExtent {
    /// First byte of the file.
    pub offset: u64,
    /// Number of bytes.
    pub len: u64,
    /// First byte on the device; `None`: inside the inode, or unwritten.
    pub place: Option<u64>,
}

/// Opens `path` of the image that is mounted at `root`; symbolic links are resolved inside the image.
///
/// # Errors
/// The system's refusal; also when the path leads out of the mount.
pub fn open_inside(root: &Path, path: &Path) -> io::Result<File> {
    let inside = path.strip_prefix(root).unwrap_or(path);
    let dir = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = openat2(CWD, root, dir, Mode::empty(), ResolveFlags::empty())?;
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_XDEV;
    // An empty path is the root itself.
    let name = if inside.as_os_str().is_empty() { Path::new("/") } else { inside };
    Ok(openat2(root, name, flags, Mode::empty(), resolve)?.into())
}

/// Extents of `file` on its device, in the order of the file. The gaps between them are holes.
///
/// # Errors
/// Returns the file system's error: some kinds do not support this.
pub fn extents(file: &File) -> io::Result<Vec<FileExtent>> {
    let size = file.metadata()?.len();
    let mut all = Vec::new();
    let mut start = 0;
    while start < size {
        let mut map = Fiemap {
            start,
            length: u64::MAX - start,
            flags: 0,
            mapped_extents: 0,
            extent_count: BATCH as u32,
            reserved: 0,
            extents: [RawExtent::default(); BATCH],
        };
        // SAFETY: the request takes a `struct fiemap` that is followed by `extent_count` extents; both
        // have the kernel's layout (repr(C), 32 and 56 bytes, no padding) and live through the call.
        let result = unsafe { libc::ioctl(file.as_raw_fd(), FS_IOC_FIEMAP as _, &raw mut map) };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        let mapped = map.extents.get(..map.mapped_extents as usize).unwrap_or(&map.extents);
        let Some(last) = mapped.last() else { break };
        for extent in mapped.iter().filter(|extent| extent.logical < size) {
            // The last block of a file continues past its end.
            let len = extent.length.min(size - extent.logical);
            let place = (extent.flags & (NO_PLACE | UNWRITTEN) == 0).then_some(extent.physical);
            all.push(FileExtent { offset: extent.logical, len, place });
        }
        let end = last.logical.saturating_add(last.length);
        if last.flags & LAST != 0 || end <= start {
            break;
        }
        start = end;
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_structures_have_the_kernels_layout() {
        assert_eq!(size_of::<RawExtent>(), 56);
        assert_eq!(size_of::<Fiemap>(), 32 + 56 * BATCH);
    }

    #[test]
    fn a_path_does_not_lead_out_of_its_root() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("root");
        std::fs::create_dir_all(root.join("etc")).unwrap();
        std::fs::write(dir.path().join("secret"), "outside").unwrap();
        std::fs::write(root.join("secret"), "inside").unwrap();
        std::os::unix::fs::symlink("../../secret", root.join("etc/link")).unwrap();
        for path in ["secret", "/secret", "etc/link", "/etc/link", "../secret"] {
            let file = open_inside(&root, Path::new(path)).unwrap();
            assert_eq!(io::read_to_string(file).unwrap(), "inside", "{path}");
        }
        let whole = root.join("etc/link");
        assert_eq!(io::read_to_string(open_inside(&root, &whole).unwrap()).unwrap(), "inside");
        assert!(open_inside(&root, &root).unwrap().metadata().unwrap().is_dir());
        assert!(open_inside(&root, Path::new("absent")).is_err());
    }
}
