//! ublk devices of turbobd whose daemon is dead, of whatever run directory.
//!
//! Their readers wait until a daemon of the same run directory takes them back, or until the device is removed. They are found by their
//! [token](frontends::ublk::recovery::DeviceToken); devices of other programs have none and are never touched. Nothing is
//! read of a device or of its mounts: that would wait.

use std::path::Path;
use std::time::{Duration, Instant};

use client::protocol::DeviceState;
use client::{ClientError, DeviceRecord, DeviceSpec, Frontend, ImageSpec, mounts};
use frontends::ublk::recovery::{self, KernelDevice, KernelState};

use super::HostError;

/// Longest wait for an unmount after the device was stopped: its readers get EIO first.
const UNMOUNT: Duration = Duration::from_secs(5);

/// What the lists say of an orphan.
const TROUBLE: &str = "Its daemon is dead, and its readers wait: a daemon of the same run directory takes it back (turbobd attach starts one), `turbobd detach` removes it";

/// The orphans of this host that are not among the `known` devices of a daemon. Empty where the driver cannot be asked: without
/// root, or without ublk.
#[must_use]
pub fn orphans(known: &[DeviceRecord]) -> Vec<DeviceRecord> {
    let devices = recovery::kernel_devices().unwrap_or_default().into_iter();
    devices
        .filter(|device| device.token.is_some() && !has_server(device))
        .map(|device| record(&device))
        .filter(|orphan| known.iter().all(|known| known.device != orphan.device))
        .collect()
}

/// Unmounts and removes the orphan that `what` names by its device or mount point; `None`: it names none. Readers that wait get
/// EIO. A mount that files keep open stays, and its device is removed.
///
/// # Errors
/// [`HostError::Ublk`]; the error of the unmount.
pub fn remove_orphan(
    what: &str,
    known: &[DeviceRecord],
) -> Result<Option<DeviceRecord>, HostError> {
    let is_it = |orphan: &DeviceRecord| {
        let control = orphan.device.to_string_lossy().replace("ublkb", "ublkc");
        orphan.device == Path::new(what)
            || control == what
            || orphan.mountpoint.as_deref() == Some(Path::new(what))
            || std::path::absolute(what).is_ok_and(|path| orphan.mountpoint == Some(path))
    };
    let Some(orphan) = orphans(known).into_iter().find(is_it) else { return Ok(None) };
    // The list of mounts needs the node, which goes with the stop.
    let places = mounts::mounted_from(&orphan.device).unwrap_or_default();
    let unmount = || places.iter().rev().try_for_each(|place| mounts::unmount_dir(place));
    let mut unmounted = unmount();
    let name = orphan.device.to_string_lossy();
    if let Some(id) = name.strip_prefix("/dev/ublkb").and_then(|id| id.parse().ok()) {
        let refused = |source| HostError::Ublk { image: orphan.image.clone(), source };
        recovery::remove_orphan(id).map_err(refused)?;
    }
    let until = Instant::now() + UNMOUNT;
    while let Err(ClientError::Busy(_)) = unmounted
        && Instant::now() < until
    {
        std::thread::sleep(UNMOUNT / 100);
        unmounted = unmount();
    }
    unmounted?;
    Ok(Some(orphan))
}

/// True if a process serves the device, or may be about to.
fn has_server(device: &KernelDevice) -> bool {
    let pid = device.pid;
    device.state == KernelState::Live && pid > 0 && Path::new(&format!("/proc/{pid}")).exists()
}

fn record(device: &KernelDevice) -> DeviceRecord {
    let path = device.path();
    let spec = DeviceSpec::of(ImageSpec::of_reference("-"));
    DeviceRecord {
        mountpoint: mounts::mounted_from(&path).unwrap_or_default().pop(),
        state: DeviceState::Failed,
        size_bytes: device.size,
        trouble: Some(TROUBLE.to_owned()),
        ..DeviceRecord::new(0, &spec, Frontend::Ublk, path)
    }
}
