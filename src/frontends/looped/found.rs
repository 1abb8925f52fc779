//! Loop devices of turbobd on this host, whichever process made them.
//!
//! The kernel shows the backing file of such a device as `/disk`: the file's mount is detached from the tree, so its path
//! begins at the root of the FUSE file system. The name that the device was given ends with `fuse-PID-NUMBER/disk`. A device of
//! an operator has neither, so none is taken for one of turbobd.
//!
//! A device is *dead* when the process of its name is gone and its disk answers a read with an error. A read that is not
//! answered proves nothing: a server that is stopped goes on later.

use std::fs::OpenOptions;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::Duration;

use rustix::fs::{major, minor};

use super::device;
use super::fuse::NAME;

/// Size and alignment of a read past the page cache, in bytes: a page suits every device.
const PAGE: usize = 4096;

/// Time for the answer to a read. A dead connection answers at once.
const ANSWER: Duration = Duration::from_secs(2);

/// A loop device of turbobd.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FoundLoop {
    /// Its node.
    pub path: PathBuf,
    /// Major and minor number of the node.
    pub number: (u32, u32),
    /// Process that made it, in the process namespace of that one.
    pub server: u32,
}

/// The loop devices of turbobd, in no order.
#[must_use]
pub fn loops() -> Vec<FoundLoop> {
    let entries = std::fs::read_dir("/sys/block").into_iter().flatten().flatten();
    entries.filter_map(|entry| of_turbobd(&entry.path())).collect()
}

fn of_turbobd(sysfs: &Path) -> Option<FoundLoop> {
    let backing = std::fs::read_to_string(sysfs.join("loop/backing_file")).ok()?;
    if backing.trim_end() != format!("/{NAME}") {
        return None;
    }
    let path = Path::new("/dev").join(sysfs.file_name()?);
    let node = OpenOptions::new().read(true).open(&path).ok()?;
    let server = server_of(&device::name_of(&node).ok()?)?;
    let number = node.metadata().ok()?.rdev();
    Some(FoundLoop { path, number: (major(number), minor(number)), server })
}

/// The process in a name `…fuse-PID-NUMBER/disk`.
fn server_of(name: &str) -> Option<u32> {
    let folder = name.strip_suffix(NAME)?.strip_suffix('/')?;
    let (_, numbers) = folder.rsplit_once("fuse-")?;
    let (pid, number) = numbers.split_once('-')?;
    number.parse::<u64>().ok()?;
    pid.parse().ok()
}

impl FoundLoop {
    /// True if no process serves the device any more. Takes two seconds at most.
    #[must_use]
    pub fn is_dead(&self) -> bool {
        if Path::new("/proc").join(self.server.to_string()).exists() {
            return false;
        }
        let (path, (sender, receiver)) = (self.path.clone(), mpsc::channel());
        let read = move || {
            let node = OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(path);
            let mut buffer = vec![0; 2 * PAGE];
            let start = buffer.as_ptr().align_offset(PAGE);
            let page = buffer.get_mut(start..start + PAGE).unwrap_or_default();
            let _ = sender.send(node.and_then(|node| node.read_exact_at(page, 0)));
        };
        std::thread::Builder::new().name("dead-or-alive".into()).spawn(read).is_ok()
            && matches!(receiver.recv_timeout(ANSWER), Ok(Err(error)) if is_of_a_dead_one(&error))
    }

    /// True while the kernel has the device.
    #[must_use]
    pub fn is_there(&self) -> bool {
        let name = self.path.file_name().unwrap_or_default();
        Path::new("/sys/block").join(name).join("loop/backing_file").exists()
    }
}

fn is_of_a_dead_one(error: &std::io::Error) -> bool {
    [Some(libc::EIO), Some(libc::ENOTCONN)].contains(&error.raw_os_error())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_name_that_turbobd_gives_names_a_server() {
        assert_eq!(server_of("/run/turbobd/fuse-12-3/disk"), Some(12));
        assert_eq!(server_of("urbobd/fuse-12-3/disk"), Some(12), "the end of a long name");
        for other in ["/disk", "/home/fuse-12/disk", "/run/fuse-a-3/disk", "/run/fuse-1-3/disc", ""]
        {
            assert_eq!(server_of(other), None, "{other}");
        }
    }
}
