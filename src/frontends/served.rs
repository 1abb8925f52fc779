//! A device of either front end, from its start to its stop.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::Mutex;
use thiserror::Error;

use crate::counters::FrontTotals;
use crate::looped::{LoopedDevice, LoopedError};
use crate::ublk::recovery::{DeviceToken, KernelDevice};
use crate::ublk::{UblkDevice, UblkError, UblkOptions};
use disk::volume::Volume;

/// Number of devices that are stopped at the same time.
const STOPPERS: usize = 8;

/// Front end of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FrontKind {
    /// The ublk driver.
    Ublk,
    /// FUSE and a loop device.
    Looped,
}

/// Front ends that may serve a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FrontChoice {
    /// This one, or an error.
    Only(FrontKind),
    /// ublk, or FUSE and a loop device on a host that must do without ublk.
    UblkOrLooped,
}

/// A block device that a front end serves. Dropping it stops it.
pub trait ServedDevice: Send + Sync {
    /// Its front end.
    fn kind(&self) -> FrontKind;

    /// Its block node.
    fn path(&self) -> &Path;

    /// Counters of its requests.
    fn counters(&self) -> FrontTotals;

    /// The device as the ublk driver knows it; `None` for another front end.
    ///
    /// # Errors
    /// Returns the driver's refusal.
    fn kernel_device(&self) -> Result<Option<KernelDevice>, UblkError> {
        Ok(None)
    }

    /// Makes sure that the device can be stopped, as far as its front end can: afterwards it takes no new users.
    ///
    /// # Errors
    /// Returns the front end's error; [`FrontError::is_busy`] if the device has users. Nothing has changed then.
    fn give_up(&self) -> Result<(), FrontError> {
        Ok(())
    }

    /// Stops and removes the device after the requests in flight were answered. Unmount it first.
    ///
    /// # Errors
    /// Returns the front end's error; [`FrontError::is_busy`] if the device has users.
    fn stop(self: Box<Self>) -> Result<(), FrontError>;
}

/// Failure of a front end.
#[derive(Debug, Error)]
pub enum FrontError {
    /// Failure of ublk.
    #[error(transparent)]
    Ublk(#[from] UblkError),
    /// Failure of FUSE or of the loop device.
    #[error(transparent)]
    Looped(#[from] LoopedError),
}

impl FrontError {
    /// True if the device has users: it continues to serve them.
    #[must_use]
    pub fn is_busy(&self) -> bool {
        matches!(self, Self::Looped(LoopedError::Busy { .. }))
    }
}

impl ServedDevice for UblkDevice {
    fn kind(&self) -> FrontKind {
        FrontKind::Ublk
    }

    fn path(&self) -> &Path {
        self.path()
    }

    fn counters(&self) -> FrontTotals {
        self.counters()
    }

    fn kernel_device(&self) -> Result<Option<KernelDevice>, UblkError> {
        self.kernel_device()
    }

    fn stop(self: Box<Self>) -> Result<(), FrontError> {
        Ok((*self).stop()?)
    }
}

impl ServedDevice for LoopedDevice {
    fn kind(&self) -> FrontKind {
        FrontKind::Looped
    }

    fn path(&self) -> &Path {
        self.path()
    }

    fn counters(&self) -> FrontTotals {
        self.counters()
    }

    fn give_up(&self) -> Result<(), FrontError> {
        Ok(self.give_up()?)
    }

    fn stop(self: Box<Self>) -> Result<(), FrontError> {
        Ok((*self).stop()?)
    }
}

/// Serves a disk. A file system that the loop front end needs is mounted at `dir` for a moment. The second value is
/// the reason why ublk was passed over, if it was. A ublk device with a token survives this process if it is read-only.
///
/// # Errors
/// Returns the error of the front end that failed; nothing remains then.
pub fn serve(
    volume: Arc<dyn Volume>,
    choice: FrontChoice,
    dir: &Path,
    token: Option<DeviceToken>,
) -> Result<(Box<dyn ServedDevice>, Option<UblkError>), FrontError> {
    let mut passed_over = None;
    if choice != FrontChoice::Only(FrontKind::Looped) {
        match UblkDevice::start(volume.clone(), &UblkOptions { token, ..UblkOptions::default() }) {
            Ok(device) => return Ok((Box::new(device), None)),
            Err(why @ (UblkError::Unavailable { .. } | UblkError::KnownBadKernel { .. }))
                if choice == FrontChoice::UblkOrLooped =>
            {
                passed_over = Some(why);
            }
            Err(error) => return Err(error.into()),
        }
    }
    let device = LoopedDevice::start(volume, dir)?;
    Ok((Box::new(device), passed_over))
}

/// Stops many devices, several at a time, and returns the failures with the paths of their devices. For most of
/// the time that a ublk device takes to stop, the kernel waits (for readers of freed memory), and it can wait for
/// several at once, if no thread holds its lock.
#[must_use]
pub fn stop_all(devices: Vec<Box<dyn ServedDevice>>) -> Vec<(PathBuf, FrontError)> {
    let rest = Mutex::new(devices.into_iter());
    let failures = Mutex::new(Vec::new());
    let next = || rest.lock().next();
    std::thread::scope(|scope| {
        for _ in 0..STOPPERS {
            scope.spawn(|| {
                while let Some(device) = next() {
                    let path = device.path().to_owned();
                    if let Err(error) = device.stop() {
                        failures.lock().push((path, error));
                    }
                }
            });
        }
    });
    failures.into_inner()
}
