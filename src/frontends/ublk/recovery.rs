//! A device that outlives its server, and its next server.
//!
//! With `USER_RECOVERY` and `USER_RECOVERY_REISSUE` the kernel keeps a device whose server died: it is *quiesced*, its node,
//! mounts and `diskseq` stay, readers wait, and requests that were in flight are asked of the next server. That one must know
//! which device is which, because the kernel keeps of the server only numbers. So every device carries a [`DeviceToken`], which
//! its server draws and writes down before the device exists. `GET_DEV_INFO` returns it for as long as the device exists.
//!
//! # Order of the steps
//!
//! Measured on Debian's 6.12 and 7.3 (kernel-notes/ublk.md). All that can fail comes before the first step that changes the
//! device: the disk is open, threads and rings exist.
//!
//! 1. `START_USER_RECOVERY`. `EBUSY` until the former server has closed its last descriptor and mapping, which comes some
//!    10 to 100 ms after the end of its process: ask again.
//! 2. Open the character node, map and arm all tags of a queue in one `io_uring_enter`.
//! 3. `END_USER_RECOVERY`, which waits until all tags are armed.
//!
//! A driver without `QUIESCE_DEV` (6.12; those in between are assumed alike) loses a device whose new server dies within step 2,
//! and refuses a second step 1 with `EINVAL`, although step 2 works then. So the caller is told before each step
//! ([`RecoveryStep`]), writes it down, and gives it to the next try.
//!
//! A control command that does not return is given up after a time ([`PATIENCE`]); the device is then left alone.

use std::fmt;
use std::hash::{BuildHasher as _, RandomState};
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use libublk::sys;

use super::UblkError;
use super::control::{Control, DeviceInfo};
use super::features;

/// Longest time for one control command about a device of a dead server. A healthy kernel answers within some ms; on a busy
/// machine the end of a recovery was seen to take 2 s.
pub(super) const PATIENCE: Duration = Duration::from_secs(30);

/// Longest wait for a dead server to close a device. The kernel frees its memory first, and may write a core dump.
const RELEASE: Duration = Duration::from_secs(60);

/// Pauses between two `START_USER_RECOVERY`: the first ones, and those after [`SOON`].
const PAUSES: [Duration; 2] = [Duration::from_millis(1), Duration::from_millis(10)];

/// Time after the first try in which a dead server has usually closed its devices.
const SOON: Duration = Duration::from_millis(300);

/// Upper bits of every token: `turbo`, in ASCII. By them a device of turbobd is known from that of another program.
const MARK: u64 = 0x7475_7262_6f00_0000;

/// Bits of a token that are drawn.
const DRAWN: u64 = 0xff_ffff;

/// Number that a device carries in the driver's field for the server (`ublksrv_flags`): a mark of this program and 24
/// drawn bits. The caller also compares `diskseq`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DeviceToken(u64);

impl DeviceToken {
    /// Draws a token.
    #[must_use]
    pub fn draw() -> Self {
        // Seeded by the system.
        Self(MARK | RandomState::new().hash_one(Instant::now()) & DRAWN)
    }

    /// The token with this number; `None`: no device of this program has it.
    #[must_use]
    pub fn of_number(number: u64) -> Option<Self> {
        (number & !DRAWN == MARK).then_some(Self(number))
    }

    /// Its number, never 0.
    #[must_use]
    pub fn number(self) -> u64 {
        self.0
    }
}

impl fmt::Display for DeviceToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

/// State of a device in the driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KernelState {
    /// Not started, or stopped: it has no disk, and never gets one again.
    Dead,
    /// A process serves it, or has not yet closed it.
    Live,
    /// Its server is gone; readers wait for the next one.
    Quiesced,
    /// Its server is gone; reads fail at once.
    FailIo,
}

/// A device as the driver knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KernelDevice {
    /// N of `/dev/ublkbN`.
    pub id: u32,
    /// Its state.
    pub state: KernelState,
    /// Its token; `None`: another program made it.
    pub token: Option<DeviceToken>,
    /// True if it can get another server.
    pub survives: bool,
    /// Number of the disk that no other disk has until the next boot; `None` without a disk, and before 5.15.
    pub diskseq: Option<u64>,
    /// Bytes of the disk; 0 without one.
    pub size: u64,
    /// Process that served it last, or that serves it. An old kernel keeps the number of a dead one.
    pub pid: i32,
}

impl KernelDevice {
    fn of(info: &DeviceInfo) -> Self {
        let id = info.dev_id;
        Self {
            id,
            state: match u32::from(info.state) {
                sys::UBLK_S_DEV_DEAD => KernelState::Dead,
                sys::UBLK_S_DEV_QUIESCED => KernelState::Quiesced,
                sys::UBLK_S_DEV_LIVE => KernelState::Live,
                _ => KernelState::FailIo,
            },
            token: DeviceToken::of_number(info.ublksrv_flags),
            survives: features::survives(info.flags),
            diskseq: diskseq(id),
            size: attribute(id, "size").unwrap_or_default() * formats::units::SECTOR,
            pid: info.ublksrv_pid,
        }
    }

    /// `/dev/ublkbN`.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        node(self.id)
    }
}

/// The block node of a device.
pub(super) fn node(id: u32) -> PathBuf {
    PathBuf::from(format!("/dev/ublkb{id}"))
}

/// An attribute of the disk in sysfs. Never waits for the device.
fn attribute(id: u32, name: &str) -> Option<u64> {
    std::fs::read_to_string(format!("/sys/block/ublkb{id}/{name}")).ok()?.trim().parse().ok()
}

/// Number of the disk of a device now ([`KernelDevice::diskseq`]). Asks neither the driver nor the device.
#[must_use]
pub fn diskseq(id: u32) -> Option<u64> {
    attribute(id, "diskseq")
}

/// Step of a recovery, for the caller's notes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RecoveryStep {
    /// The recovery is about to start.
    Recovering,
    /// The tags are about to be armed.
    Arming,
    /// All tags are armed.
    Armed,
}

/// The ublk devices of this host, of all programs, by their numbers; empty without the driver. Nothing is asked of the devices
/// themselves: this never waits for a server.
///
/// # Errors
/// Returns [`UblkError::Control`].
pub fn kernel_devices() -> Result<Vec<KernelDevice>, UblkError> {
    let ids = numbers();
    if ids.is_empty() {
        return Ok(Vec::new());
    }
    let mut control = Control::with_limit(Some(PATIENCE))?;
    let mut devices = Vec::new();
    for id in ids {
        devices.extend(control.info(id)?.as_ref().map(KernelDevice::of));
    }
    Ok(devices)
}

/// The device with this number; `None`: there is none.
///
/// # Errors
/// Returns [`UblkError::Control`].
pub fn kernel_device(id: u32) -> Result<Option<KernelDevice>, UblkError> {
    let info = Control::with_limit(Some(PATIENCE))?.info(id)?;
    Ok(info.as_ref().map(KernelDevice::of))
}

/// Numbers of all devices, also of those without a disk.
fn numbers() -> Vec<u32> {
    let number = |name: &str| name.strip_prefix("ublkc")?.parse().ok();
    let list = |dir: &str| -> Vec<u32> {
        let names = std::fs::read_dir(dir).into_iter().flatten().flatten();
        names.filter_map(|entry| number(entry.file_name().to_str()?)).collect()
    };
    let class = Path::new("/sys/class/ublk-char");
    let mut ids = if class.exists() { list("/sys/class/ublk-char") } else { list("/dev") };
    ids.sort_unstable();
    ids
}

/// True if a driver may lose a device whose new server dies while it arms the tags.
///
/// # Errors
/// Returns [`UblkError::Control`].
pub fn arming_is_deadly() -> Result<bool, UblkError> {
    Ok(Control::with_limit(Some(PATIENCE))?.arming_is_deadly())
}

/// Stops and deletes a device without a server. Its readers get EIO, and a filesystem on it fails from then on; its number
/// becomes free when the last mount is gone. A device that is gone is no error.
///
/// # Errors
/// Returns [`UblkError::Control`].
pub fn remove_orphan(id: u32) -> Result<(), UblkError> {
    let mut control = Control::with_limit(Some(PATIENCE))?;
    if control.info(id)?.is_none() {
        return Ok(());
    }
    // Of a dead one there is nothing to stop.
    let stopped = control.stop(id);
    let deleted = control.delete_soon(id);
    stopped.and(deleted)
}

/// Takes the kernel's device from its dead server: the first step.
pub(super) fn begin(
    control: &mut Control,
    id: u32,
    before: Option<RecoveryStep>,
) -> Result<(), UblkError> {
    let refused = |source| UblkError::Control { what: "begin its recovery", source };
    let begun = Instant::now();
    loop {
        let error = match control.start_recovery(id) {
            Ok(()) => return Ok(()),
            Err(error) => error,
        };
        match error.raw_os_error() {
            Some(libc::EBUSY) if begun.elapsed() < RELEASE => {
                std::thread::sleep(PAUSES[usize::from(begun.elapsed() > SOON)]);
            }
            // An earlier successor has begun it; on such a driver it cannot be begun again, and need not be.
            Some(libc::EINVAL) if before.is_some() && control.arming_is_deadly() => {
                return Ok(());
            }
            _ => return Err(refused(error)),
        }
    }
}

/// Compares the kernel's device with what its record says.
pub(super) fn check(info: &DeviceInfo, token: DeviceToken) -> Result<(), UblkError> {
    if DeviceToken::of_number(info.ublksrv_flags) != Some(token) {
        let source = io::Error::new(io::ErrorKind::NotFound, "the number is another device's now");
        return Err(UblkError::Control { what: "take it back", source });
    }
    if !features::survives(info.flags) {
        let source = io::Error::new(io::ErrorKind::Unsupported, "it was not made for that");
        return Err(UblkError::Control { what: "take it back", source });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_tells_devices_of_this_program_from_others() {
        let token = DeviceToken::draw();
        assert_eq!(DeviceToken::of_number(token.number()), Some(token));
        // libublk keeps small flags of its own there; most programs keep 0.
        for other in [0, 1, 0xbeef, u64::MAX, token.number() ^ 1 << 24] {
            assert_eq!(DeviceToken::of_number(other), None, "{other:x}");
        }
        let drawn: std::collections::BTreeSet<_> = (0..50).map(|_| DeviceToken::draw()).collect();
        assert!(drawn.len() > 45, "{drawn:?}");
        assert_eq!(token.to_string().len(), 16);
    }

    #[test]
    fn the_states_are_those_of_the_driver() {
        let state = |state: u32| {
            KernelDevice::of(&DeviceInfo { state: state as u16, ..DeviceInfo::default() }).state
        };
        let states =
            [KernelState::Dead, KernelState::Live, KernelState::Quiesced, KernelState::FailIo];
        assert_eq!([0, 1, 2, 3].map(state), states);
    }
}
