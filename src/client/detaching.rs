//! Removal of a device with its mounts: all of it, or nothing.
//!
//! A device cannot be removed while it is mounted anywhere. A process that enters a mount namespace of its own has a copy of
//! each mount: for some milliseconds while it sets a container up, or as long as it lives. So an unmount may succeed while the
//! device stays busy. What is done then:
//!
//! 1. If the unmount does not reach the copies (the mount point is on a mount that is not shared), the namespaces that have
//!    one are waited for first, with the mount in place. Namespaces made meanwhile are not: there may always be a new one.
//! 2. All mounts are taken away, and the daemon is asked to remove the device. The last copies go within
//!    milliseconds, so it is asked for [`SETTLE`].
//! 3. If it is still busy, all is mounted again as it was, and the namespaces found to hold it are waited for as in 1.
//!
//! When the time is over, the mounts are in place and the device is served: the error names the processes that hold it.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{major, minor};
use std::os::unix::fs::MetadataExt as _;

use crate::daemon::{DaemonClient, PROMPT};
use crate::error::{ClientError, Code, step};
use crate::holders::{self, DeviceNumber};
use crate::mountinfo::{self, MountRow};
use crate::mounts;
use crate::protocol::DeviceRecord;

/// Default of the wait for a device in use.
pub const TIMEOUT: Duration = Duration::from_secs(10);

/// Time that a device without mounts may stay busy before its mounts are made again. The kernel itself reports it as busy
/// for some milliseconds after an unmount, while any process clones its mount namespace.
const SETTLE: Duration = Duration::from_secs(1);

/// Longest time for the removal itself: requests in flight are answered first, and the kernel may take some seconds.
const REMOVAL: Duration = Duration::from_secs(60);

/// Pause between two tries.
const PAUSE: Duration = Duration::from_millis(20);

/// Time after which the caller learns what is waited for.
const TELL: Duration = Duration::from_secs(2);

/// How long a device in use is waited for, and what happens meanwhile.
pub struct Patience<'a> {
    /// Time at most.
    pub timeout: Duration,
    /// Called once, after two seconds, with a sentence that says what is waited for.
    pub tell: &'a mut dyn FnMut(&str),
    /// The wait ends when this is true: as if its time were over.
    pub enough: &'a dyn Fn() -> bool,
}

/// Result of one try.
enum Try {
    Removed,
    Busy,
}

/// Takes the mounts of a device away and removes it.
pub(crate) fn detach(
    client: &mut DaemonClient,
    record: &DeviceRecord,
    patience: &mut Patience<'_>,
) -> Result<(), ClientError> {
    let number = std::fs::metadata(&record.device).map_err(step("examine", &record.device))?.rdev();
    let number = (major(number), minor(number));
    let start = Instant::now();
    let mut told = false;
    let mut lasting = BTreeSet::new();
    loop {
        let (rows, reaches_copies) = mounted(number)?;
        if !reaches_copies {
            lasting.extend(holders::namespaces(number));
        }
        let holds = |lasting: &BTreeSet<PathBuf>| {
            !lasting.is_empty() && !holders::namespaces(number).is_disjoint(lasting)
        };
        if !holds(&lasting) {
            lasting.clear();
            match attempt(client, record, number, &rows, &mut lasting)? {
                Try::Removed => return Ok(()),
                Try::Busy => {}
            }
        }
        loop {
            let waited = start.elapsed();
            if waited >= patience.timeout || (patience.enough)() {
                let holders = holders::named(&holders::holders(number, client.pid()));
                let (device, seconds) = (record.device.clone(), waited.as_secs());
                return Err(ClientError::InUse { device, seconds, holders });
            }
            if waited >= TELL && !told {
                told = true;
                let holders = holders::named(&holders::holders(number, client.pid()));
                let left = patience.timeout.saturating_sub(waited).as_secs();
                let device = record.device.display();
                (patience.tell)(&format!("{device} is in use: {holders}; waiting {left} s more"));
            }
            std::thread::sleep(PAUSE);
            if !holds(&lasting) {
                break;
            }
        }
    }
}

/// The mounts of the device in this namespace, and true if an unmount of them reaches their copies in others.
fn mounted(number: DeviceNumber) -> Result<(Vec<MountRow>, bool), ClientError> {
    let process = Path::new("/proc/thread-self");
    let all = mountinfo::mounts_of(process).map_err(step("read", process.join("mountinfo")))?;
    let (ours, others): (Vec<_>, Vec<_>) = all.into_iter().partition(|row| row.number == number);
    let is_shared = |row: &MountRow| {
        others.iter().chain(&ours).any(|above| above.id == row.parent && above.is_shared)
    };
    let reaches = !ours.is_empty() && ours.iter().all(is_shared);
    Ok((ours, reaches))
}

/// Tries once. If the device stays busy, all mounts are as before, and `lasting` has the namespaces with copies.
fn attempt(
    client: &mut DaemonClient,
    record: &DeviceRecord,
    number: DeviceNumber,
    rows: &[MountRow],
    lasting: &mut BTreeSet<PathBuf>,
) -> Result<Try, ClientError> {
    // The daemon answers now: else a device would be left without its mounts.
    client.set_patience(PROMPT)?;
    client.list()?;
    client.set_patience(REMOVAL)?;
    let mut taken = Vec::new();
    for row in rows.iter().rev() {
        match mounts::unmount_dir(&row.place) {
            Ok(()) => taken.push(row),
            Err(error) => {
                restore(&record.device, &taken)?;
                return if matches!(error, ClientError::Busy(_)) {
                    Ok(Try::Busy)
                } else {
                    Err(error)
                };
            }
        }
    }
    let until = Instant::now() + if rows.is_empty() { Duration::ZERO } else { SETTLE };
    loop {
        match client.remove(record.id) {
            Ok(()) => return Ok(Try::Removed),
            Err(error) if error.code() == Code::Busy => {
                if Instant::now() >= until {
                    break;
                }
                std::thread::sleep(PAUSE);
            }
            Err(error @ ClientError::Refused(_)) => {
                restore(&record.device, &taken)?;
                return Err(error);
            }
            // The daemon is gone, and its devices with it.
            Err(error) => return Err(error),
        }
    }
    if !rows.is_empty() {
        *lasting = holders::namespaces(number);
    }
    restore(&record.device, &taken)?;
    Ok(Try::Busy)
}

/// Mounts again what was unmounted, the last one first.
fn restore(device: &Path, taken: &[&MountRow]) -> Result<(), ClientError> {
    let mut whole = None;
    for row in taken.iter().rev() {
        mounts::mount_again(device, row, whole)?;
        if row.root == Path::new("/") {
            whole = Some(row.place.as_path());
        }
    }
    Ok(())
}
