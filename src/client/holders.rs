//! The processes that keep a device busy: with open files, a working directory, a mapping, or a mount namespace of their own
//! that has a copy of its mount.
//!
//! All of it is read from `/proc`. Processes that end meanwhile, or that the caller may not look at, are passed over. A file
//! is examined without a request to its file system (`AT_STATX_DONT_SYNC`), so that another one that hangs holds nothing up.

use std::collections::BTreeSet;
use std::fmt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, StatxFlags, statx};

use crate::mountinfo;

/// Number of holders that a sentence names.
const NAMED: usize = 4;

/// Major and minor number of a block device.
pub type DeviceNumber = (u32, u32);

/// A process that keeps a device busy.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Holder {
    /// The process.
    pub pid: u32,
    /// Its name.
    pub name: String,
    /// What it has of the device.
    pub has: String,
}

impl fmt::Display for Holder {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "process {} ({}) has {}", self.pid, self.name, self.has)
    }
}

/// A sentence part that names holders, at most [`NAMED`] of them.
#[must_use]
pub fn named(holders: &[Holder]) -> String {
    if holders.is_empty() {
        return "its holder is no process that this one may look at".to_owned();
    }
    let mut parts: Vec<String> = holders.iter().take(NAMED).map(ToString::to_string).collect();
    if holders.len() > NAMED {
        parts.push(format!("and {} more", holders.len() - NAMED));
    }
    parts.join(", ")
}

/// The processes, other than this one and `server`, that keep the device of this number busy.
#[must_use]
pub fn holders(number: DeviceNumber, server: u32) -> Vec<Holder> {
    let mut found = Vec::new();
    for (pid, process) in processes() {
        if pid == std::process::id() || pid == server {
            continue;
        }
        if let Some(has) = open_of(&process, number) {
            found.push(Holder { pid, name: name(&process), has });
        }
    }
    for (pid, process) in namespaces_with(number).1 {
        if !found.iter().any(|holder| holder.pid == pid) {
            let has = "a copy of the mount in its mount namespace".to_owned();
            found.push(Holder { pid, name: name(&process), has });
        }
    }
    found
}

/// The mount namespaces, other than this process's own, in which the device of this number is mounted.
#[must_use]
pub fn namespaces(number: DeviceNumber) -> BTreeSet<PathBuf> {
    namespaces_with(number).0
}

/// The namespaces, and one process of each.
fn namespaces_with(number: DeviceNumber) -> (BTreeSet<PathBuf>, Vec<(u32, PathBuf)>) {
    let namespace = |process: &Path| std::fs::read_link(process.join("ns/mnt")).ok();
    let mut seen: BTreeSet<PathBuf> =
        namespace(Path::new("/proc/thread-self")).into_iter().collect();
    let (mut with, mut owners) = (BTreeSet::new(), Vec::new());
    for (pid, process) in processes() {
        let Some(other) = namespace(&process) else { continue };
        if !seen.insert(other.clone()) {
            continue;
        }
        let Ok(rows) = mountinfo::mounts_of(&process) else {
            // It is ending: another process of the namespace, if there is one, is looked at.
            seen.remove(&other);
            continue;
        };
        if rows.iter().any(|row| row.number == number) {
            with.insert(other);
            owners.push((pid, process));
        }
    }
    (with, owners)
}

fn processes() -> impl Iterator<Item = (u32, PathBuf)> {
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| Some((entry.file_name().to_str()?.parse().ok()?, entry.path())))
}

fn name(process: &Path) -> String {
    std::fs::read_to_string(process.join("comm")).unwrap_or_default().trim_end().to_owned()
}

/// What a process has open of the device, or of the file system on it.
fn open_of(process: &Path, number: DeviceNumber) -> Option<String> {
    let told = |link: &Path| std::fs::read_link(link).unwrap_or_default().display().to_string();
    for (link, what) in
        [("cwd", "its working directory at"), ("root", "its root at"), ("exe", "its program at")]
    {
        let link = process.join(link);
        if is_of(&link, number) {
            return Some(format!("{what} {}", told(&link)));
        }
    }
    for entry in std::fs::read_dir(process.join("fd")).into_iter().flatten().flatten() {
        if is_of(&entry.path(), number) {
            return Some(format!("{} open", told(&entry.path())));
        }
    }
    // Address, rights, offset, `major:minor` in hexadecimal digits, inode, path.
    let maps = std::fs::read(process.join("maps")).unwrap_or_default();
    let device = format!("{:02x}:{:02x}", number.0, number.1);
    let line = String::from_utf8_lossy(&maps);
    let mapped = line.lines().find(|line| line.split_whitespace().nth(3) == Some(&device))?;
    let path = mapped.splitn(6, ' ').last().unwrap_or_default().trim();
    Some(format!("{path} mapped"))
}

/// True if the file is the device's node, or lies on the device.
fn is_of(file: &Path, number: DeviceNumber) -> bool {
    let Ok(stat) = statx(CWD, file, AtFlags::STATX_DONT_SYNC, StatxFlags::TYPE) else {
        return false;
    };
    let is_block = u32::from(stat.stx_mode) & libc_mode::FORMAT == libc_mode::BLOCK;
    (stat.stx_dev_major, stat.stx_dev_minor) == number
        || is_block && (stat.stx_rdev_major, stat.stx_rdev_minor) == number
}

/// Bits of a file's mode, `inode(7)`.
mod libc_mode {
    pub(super) const FORMAT: u32 = 0o170_000;
    pub(super) const BLOCK: u32 = 0o060_000;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_with_an_open_file_is_named_with_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("held");
        std::fs::write(&path, b"x").unwrap();
        let stat = statx(CWD, &path, AtFlags::empty(), StatxFlags::TYPE).unwrap();
        let number = (stat.stx_dev_major, stat.stx_dev_minor);
        let held = std::fs::File::open(&path).unwrap();
        let mut child = std::process::Command::new("sleep")
            .arg("600")
            .current_dir(dir.path())
            .stdin(held)
            .spawn()
            .unwrap();
        // The process is itself once it has its own program.
        let process = PathBuf::from(format!("/proc/{}", child.id()));
        while name(&process) != "sleep" {
            std::thread::yield_now();
        }
        let has = open_of(&process, number).unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(has.contains(dir.path().to_str().unwrap()), "{has}");
    }

    #[test]
    fn a_sentence_names_few_and_counts_the_others() {
        let one = |pid| Holder { pid, name: "sh".into(), has: "/m/a open".into() };
        let all: Vec<_> = (1..=6).map(one).collect();
        assert!(named(&all).starts_with("process 1 (sh) has /m/a open, process 2"));
        assert!(named(&all).ends_with(", and 2 more"));
        assert!(!named(&[]).is_empty());
    }
}
