//! What dead daemons have left on this host: loop devices, their mounts, folders and sockets.
//!
//! When a daemon dies, the kernel removes its loop devices at their last close, but a mounted one stays, with its mount, and
//! each read of it fails. [`remove`] takes away what is not in use: an unmount that the kernel refuses is not forced, and
//! the processes that hold it are named. Nothing of a daemon that lives is touched, however long it does not answer
//! ([`FoundLoop::is_dead`]).

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use client::holders;
use client::mounts::{mounted_from, unmount_dir};
use client::protocol::socket;
pub use frontends::looped::found::FoundLoop as DeadLoop;
use frontends::looped::found::{FoundLoop, loops};
use source::failure::with_causes;

/// Time for the kernel to remove a loop device after the last close.
const GONE: Duration = Duration::from_secs(2);

/// Result of a removal.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Removed {
    /// What was removed, a sentence each.
    pub removed: Vec<String>,
    /// What is left, with the reason, a sentence each.
    pub left: Vec<String>,
}

/// The loop devices without a server.
#[must_use]
pub fn dead_devices() -> Vec<FoundLoop> {
    loops().into_iter().filter(FoundLoop::is_dead).collect()
}

/// Removes dead devices, and what a dead daemon has left in `run_dir`. The caller has the lock of `run_dir`, or leaves it out.
#[must_use]
pub fn remove(run_dir: Option<&Path>) -> Removed {
    let mut all = Removed::default();
    for device in dead_devices() {
        all.add(remove_device(&device));
    }
    if let Some(run_dir) = run_dir {
        all.add(remove_files(run_dir));
    }
    all
}

/// Unmounts a dead device in this mount namespace, and waits until the kernel has removed it.
#[must_use]
pub fn remove_device(device: &FoundLoop) -> Removed {
    let mut all = Removed::default();
    let (node, server) = (device.path.display(), device.server);
    let held = || holders::named(&holders::holders(device.number, 0));
    for place in mounted_from(&device.path).unwrap_or_default().iter().rev() {
        let shown = place.display();
        match unmount_dir(place) {
            Ok(()) => {
                all.removed.push(format!("mount {shown} of {node}, whose daemon {server} has died"))
            }
            Err(client::ClientError::Busy(_)) => {
                all.left.push(format!(
                    "mount {shown} of {node}, whose daemon {server} has died: {}",
                    held()
                ));
            }
            Err(error) => all.left.push(format!("mount {shown}: {}", with_causes(&error))),
        }
    }
    let until = Instant::now() + GONE;
    while device.is_there() && all.left.is_empty() && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(10));
    }
    if device.is_there() {
        if all.left.is_empty() {
            all.left.push(format!("device {node}, whose daemon {server} has died: {}", held()));
        }
    } else {
        all.removed.push(format!("device {node}, whose daemon {server} has died"));
    }
    all
}

/// Removes the folders and the socket of a dead daemon in its run directory.
fn remove_files(run_dir: &Path) -> Removed {
    let mut all = Removed::default();
    for folder in folders(run_dir) {
        // The file system of a daemon that died between two steps of an attach.
        while unmount_dir(&folder).is_ok() {}
        match std::fs::remove_dir(&folder) {
            Ok(()) => all.removed.push(format!("folder {}", folder.display())),
            Err(error) => all.left.push(format!("folder {}: {error}", folder.display())),
        }
    }
    let socket = socket(run_dir);
    if std::fs::remove_file(&socket).is_ok() {
        all.removed.push(format!("socket {}", socket.display()));
    }
    all
}

/// The mount points of FUSE in a run directory whose process is gone.
fn folders(run_dir: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(run_dir).into_iter().flatten().flatten();
    let is_dead = |path: &PathBuf| {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let pid =
            name.strip_prefix("fuse-").and_then(|rest| rest.split_once('-')).map(|(pid, _)| pid);
        pid.and_then(|pid| pid.parse::<u32>().ok())
            .is_some_and(|pid| !Path::new("/proc").join(pid.to_string()).exists())
    };
    entries.map(|entry| entry.path()).filter(is_dead).collect()
}

impl Removed {
    fn add(&mut self, other: Self) {
        self.removed.extend(other.removed);
        self.left.extend(other.left);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_and_socket_of_a_dead_daemon_go_and_those_of_a_living_one_stay() {
        let dir = tempfile::tempdir().unwrap();
        // Larger than the largest number of a process.
        let dead = dir.path().join("fuse-4194305-1");
        let own = dir.path().join(format!("fuse-{}-1", std::process::id()));
        let other = dir.path().join("fuse-x-1");
        for path in [&dead, &own, &other] {
            std::fs::create_dir(path).unwrap();
        }
        drop(std::os::unix::net::UnixListener::bind(socket(dir.path())).unwrap());
        let all = remove_files(dir.path());
        assert_eq!((all.removed.len(), all.left.len()), (2, 0), "{all:?}");
        assert!(
            all.removed[0].contains("fuse-4194305-1") && all.removed[1].contains("turbobd.sock")
        );
        assert!(!dead.exists() && own.exists() && other.exists());
        assert_eq!(remove_files(dir.path()), Removed::default());
    }
}
