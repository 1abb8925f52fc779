//! An idmapped clone of a mount: the same files, owned by other users.
//!
//! A container in a user namespace has its user 0 as, say, the user 65536 of the host, and the files of its image belong to
//! the user 0. The kernel shows a mount's files with mapped owners if the mount says so (`MOUNT_ATTR_IDMAP`, Linux 5.12);
//! nothing is copied and no owner is changed on the disk.
//!
//! The kernel takes the mapping from a user namespace, so one is made: a process that is cloned into it, that waits on a
//! pipe, and that ends once its namespace is open. It is a raw `clone(2)`, because `unshare(CLONE_NEWUSER)` is refused to a
//! process with threads.
//!
//! `unsafe` is needed for `clone(2)` and `mount_setattr(2)`, which `rustix` does not have. The child of the clone has one
//! thread of several, so it may not allocate, lock or unwind: it calls `read(2)` and `_exit(2)`, nothing else.
#![allow(unsafe_code)]

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::CWD;
use rustix::mount::{MoveMountFlags, OpenTreeFlags, move_mount, open_tree};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, WaitOptions, waitpid};

/// `MOUNT_ATTR_RDONLY` of `linux/mount.h`.
const ATTR_RDONLY: u64 = 0x1;
/// `MOUNT_ATTR_IDMAP` of `linux/mount.h`.
const ATTR_IDMAP: u64 = 0x0010_0000;

/// Most ranges that the kernel takes in one mapping (`UID_GID_MAP_MAX_EXTENTS`).
pub const MOST_RANGES: usize = 340;

/// `struct mount_attr` of `linux/mount.h`.
#[repr(C)]
struct MountAttributes {
    set: u64,
    clear: u64,
    propagation: u64,
    namespace: u64,
}

/// A range of users, or of groups: those of the container, and those of the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IdRange {
    /// First one in the container, and of the files on the disk.
    pub inside: u32,
    /// First one on the host.
    pub outside: u32,
    /// Number of them, at least 1.
    pub count: u32,
}

/// Mounts a clone of the mount at `source` at the folder `target`, read-only, with owners that are mapped by `users` and
/// `groups`.
///
/// # Errors
/// The kernel's refusal: [`io::ErrorKind::InvalidInput`] for ranges that overlap or a file system that maps no owners,
/// [`io::ErrorKind::PermissionDenied`] if user namespaces are disabled.
pub fn mount_mapped(
    source: &Path,
    target: &Path,
    users: &[IdRange],
    groups: &[IdRange],
) -> io::Result<()> {
    let namespace = user_namespace(users, groups)?;
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let tree = open_tree(CWD, source, flags)?;
    let attributes = MountAttributes {
        set: ATTR_RDONLY | ATTR_IDMAP,
        clear: 0,
        propagation: 0,
        namespace: u64::try_from(namespace.as_raw_fd()).map_err(io::Error::other)?,
    };
    set_attributes(tree.as_fd(), &attributes)?;
    move_mount(tree, c"", CWD, target, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
    Ok(())
}

fn set_attributes(tree: BorrowedFd<'_>, attributes: &MountAttributes) -> io::Result<()> {
    // SAFETY: the path is a C string, and the structure, of the size that is told, outlives the call, which reads it only.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            std::ptr::from_ref(attributes),
            size_of::<MountAttributes>(),
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// A user namespace with these mappings.
fn user_namespace(users: &[IdRange], groups: &[IdRange]) -> io::Result<OwnedFd> {
    let (wait, hold) = pipe_with(PipeFlags::CLOEXEC)?;
    let child = NamespaceHolder::start(&wait, &hold)?;
    let at = |name: &str| format!("/proc/{}/{name}", child.0.as_raw_nonzero());
    fs::write(at("uid_map"), lines(users))?;
    fs::write(at("gid_map"), lines(groups))?;
    Ok(File::open(at("ns/user"))?.into())
    // The child ends here: its pipe is closed, then it is waited for.
}

/// The text of `/proc/PID/uid_map`.
fn lines(ranges: &[IdRange]) -> String {
    let line = |range: &IdRange| format!("{} {} {}\n", range.inside, range.outside, range.count);
    ranges.iter().map(line).collect()
}

/// A process in a user namespace of its own that does nothing. Dropping it ends it.
struct NamespaceHolder(Pid);

impl NamespaceHolder {
    /// Starts a process that ends once no other process has the writing end of its pipe.
    fn start(wait: &OwnedFd, hold: &OwnedFd) -> io::Result<Self> {
        let (wait, hold) = (wait.as_raw_fd(), hold.as_raw_fd());
        let flags = libc::CLONE_NEWUSER | libc::SIGCHLD;
        let none = std::ptr::null_mut::<libc::c_void>();
        // SAFETY: without CLONE_VM the child has a copy of the memory, and continues on its own copy of this stack as
        // after fork(2). It calls close, read and _exit alone, which are safe after a fork of a process with threads,
        // and never returns.
        let pid = unsafe {
            libc::syscall(libc::SYS_clone, libc::c_long::from(flags), none, none, none, none)
        };
        if pid == 0 {
            let mut byte = 0_u8;
            // SAFETY: the descriptors are open, the byte is writable, and _exit does not return.
            unsafe {
                libc::close(hold);
                libc::read(wait, std::ptr::from_mut(&mut byte).cast(), 1);
                libc::_exit(0);
            }
        }
        let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
        pid.map(Self).ok_or_else(io::Error::last_os_error)
    }
}

impl Drop for NamespaceHolder {
    fn drop(&mut self) {
        // It has no state to lose, and another process may hold a copy of the pipe that was forked meanwhile.
        let _ = rustix::process::kill_process(self.0, rustix::process::Signal::KILL);
        let _ = waitpid(Some(self.0), WaitOptions::empty());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_written_as_the_kernel_reads_them() {
        let ranges = [
            IdRange { inside: 0, outside: 65536, count: 1000 },
            IdRange { inside: 1000, outside: 1, count: 1 },
        ];
        assert_eq!(lines(&ranges), "0 65536 1000\n1000 1 1\n");
    }
}
