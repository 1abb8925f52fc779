//! Copies of the mounts of turbobd's devices in the mount namespace that the daemon has just entered.
//!
//! On a host whose mounts are private, a new mount namespace has a copy of each mount that no later unmount on the host
//! reaches. A daemon that kept a copy of another daemon's mount would keep that device busy as long as it lives. So it takes
//! these copies away, and no others: an operator's folder may lie on a loop or ublk device too.
//!
//! A loop device is known by its backing file ([`loops`]), a ublk device by the process that serves it: that
//! one has the device's `/dev/ublkcN` open, and a thread of the name [`ALARM_THREAD`].

use std::collections::BTreeSet;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, StatxFlags, major, minor, statx};
use rustix::mount::{UnmountFlags, unmount};

use super::alarm::ALARM_THREAD;
use client::mountinfo;
use frontends::looped::found::loops;

/// Takes the copies away in this thread's mount namespace, which must be its own. Returns their mount points.
pub(super) fn release() -> Vec<PathBuf> {
    let rows = mountinfo::mounts_of(Path::new("/proc/thread-self")).unwrap_or_default();
    let is_block = |number: (u32, u32)| number.0 != 0;
    if !rows.iter().any(|row| is_block(row.number)) {
        return Vec::new();
    }
    let mut own: BTreeSet<(u32, u32)> = loops().into_iter().map(|device| device.number).collect();
    own.extend(ublk_devices());
    let copies = rows.iter().rev().filter(|row| own.contains(&row.number));
    let taken = copies.filter(|row| {
        // Another mount may lie over it: what the path leads to is then not this one.
        let found = statx(
            CWD,
            &row.place,
            AtFlags::SYMLINK_NOFOLLOW | AtFlags::STATX_DONT_SYNC,
            StatxFlags::MNT_ID,
        );
        let is_it = found.is_ok_and(|found| found.stx_mnt_id == row.id);
        let flags = UnmountFlags::DETACH | UnmountFlags::NOFOLLOW;
        is_it && row.place != Path::new("/") && unmount(&row.place, flags).is_ok()
    });
    taken.map(|row| row.place.clone()).collect()
}

/// Numbers of the ublk devices that processes of turbobd serve.
fn ublk_devices() -> Vec<(u32, u32)> {
    let number = |name: &str| {
        let number = std::fs::metadata(format!("/dev/ublkb{name}")).ok()?.rdev();
        Some((major(number), minor(number)))
    };
    let processes = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let files = processes.flat_map(|process| {
        let process = process.path();
        let open = std::fs::read_dir(process.join("fd")).into_iter().flatten().flatten();
        let links = open.filter_map(|entry| std::fs::read_link(entry.path()).ok());
        let nodes = links.filter(|link| link.to_string_lossy().starts_with("/dev/ublkc"));
        let nodes: BTreeSet<PathBuf> = nodes.collect();
        if !nodes.is_empty() && is_turbobd(&process) { nodes } else { BTreeSet::new() }
    });
    let names =
        files.filter_map(|node| Some(node.to_str()?.strip_prefix("/dev/ublkc")?.to_owned()));
    names.filter_map(|name| number(&name)).collect()
}

fn is_turbobd(process: &Path) -> bool {
    let threads = std::fs::read_dir(process.join("task")).into_iter().flatten().flatten();
    let mut names =
        threads.filter_map(|thread| std::fs::read_to_string(thread.path().join("comm")).ok());
    names.any(|name| name.trim_end() == ALARM_THREAD)
}
