//! The fallback: the disk as one file through FUSE, under a loop device.
//!
//! On a kernel without ublk, the virtual disk appears as the file `disk` of a small FUSE file system, and a
//! loop device makes a block device of the file, so that the same ext4 is mounted and everything above it is
//! unchanged.
//!
//! The path of a read: ext4, loop device (a kernel worker), FUSE request, a *session thread* of this process,
//! [`Volume::locate`]; if the bytes are there, the session thread answers at once, and the kernel copies from
//! the cache. If not, the request waits at the volume and an *answer thread* replies later: a slow fetch
//! never holds a session thread. Waiters only send a message, because they may be called under a lock of the
//! volume.
//!
//! The loop device reads the file with direct I/O where it can: the page cache then holds the data once,
//! above the loop device, not twice.
//!
//! A volume that can be [written](disk::volume::WritableVolume) makes a writable device: writes are handed
//! to it as they come, a flush of the device is an `fsync` of the file, and discards are holes punched into
//! it.
//!
//! This front end is slower than ublk (each request crosses two more layers). When this process dies, reads
//! fail, and nothing remains: the FUSE mount is detached from the tree as soon as its file is open (the open
//! file keeps it alive), and the loop device is created with `LO_FLAGS_AUTOCLEAR` and kept open, so that it
//! goes away when its last user closes it.
//!
//! [`Volume::locate`]: disk::volume::Volume::locate

mod device;
pub mod found;
mod fuse;
mod memory;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use thiserror::Error;

use crate::counters::FrontTotals;
use disk::volume::Volume;
use formats::units::SECTOR;

/// Reasons why the fallback could not be set up or removed.
#[derive(Debug, Error)]
pub enum LoopedError {
    /// The disk has a size that no block device can have.
    #[error("A loop device cannot have {0} bytes: the size must be a multiple of 512, not 0")]
    Size(u64),
    /// A step failed.
    #[error("Cannot {what} {path}", path = path.display())]
    Step {
        /// The step.
        what: &'static str,
        /// Its object.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// The device has users.
    #[error("{path} is still in use: unmount it, or end the programs that use it", path = path.display())]
    Busy {
        /// The loop device.
        path: PathBuf,
    },
    /// Other programs took every free loop device first.
    #[error("No free loop device in {0} attempts: another program takes them")]
    NoFreeDevice(u32),
}

/// `Cannot {what} {path}`, for `map_err`.
fn step(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> LoopedError {
    let path = path.to_owned();
    move |source| LoopedError::Step { what, path, source }
}

/// A loop device that is being served. Dropping it stops it.
pub struct LoopedDevice {
    path: PathBuf,
    direct: bool,
    // In the order in which they end: the device holds the file, the file holds the session.
    device: Option<device::LoopDevice>,
    session: Option<fuse::FuseSession>,
}

impl LoopedDevice {
    /// Mounts the file system at `dir` for the moment it takes to open its file, and sets up a loop device on
    /// that file. `dir` is created if it does not exist, and then removed again. Needs `CAP_SYS_ADMIN`. After
    /// an error nothing remains.
    ///
    /// # Errors
    /// Returns [`LoopedError`], naming the step.
    pub fn start(volume: Arc<dyn Volume>, dir: &Path) -> Result<Self, LoopedError> {
        let size = volume.size();
        if size == 0 || !size.is_multiple_of(SECTOR) {
            return Err(LoopedError::Size(size));
        }
        memory::map_large_buffers();
        let writable = volume.writable().is_some();
        let (session, file) = fuse::FuseSession::new(volume, dir)?;
        let device = match device::LoopDevice::attach(&file, &dir.join(fuse::NAME), writable) {
            Ok(device) => device,
            Err(error) => {
                drop(file); // before the session, which waits for it
                return Err(error);
            }
        };
        drop(file);
        let path = device.path().to_owned();
        let direct = device.reads_direct();
        Ok(Self { path, direct, device: Some(device), session: Some(session) })
    }

    /// `/dev/loopN`.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// True if the loop device reads with direct I/O, past the page cache of the file.
    #[must_use]
    pub fn direct(&self) -> bool {
        self.direct
    }

    /// Counters of the file system.
    #[must_use]
    pub fn counters(&self) -> FrontTotals {
        self.session.as_ref().map(fuse::FuseSession::counters).unwrap_or_default()
    }

    /// Makes sure that the device can be stopped: afterwards it takes no new users.
    ///
    /// # Errors
    /// Returns [`LoopedError::Busy`] if another process has the device open; nothing has changed then.
    pub fn give_up(&self) -> Result<(), LoopedError> {
        self.device.as_ref().map_or(Ok(()), device::LoopDevice::give_up)
    }

    /// Detaches the loop device, waits for the file system to end, and joins the threads.
    ///
    /// # Errors
    /// Returns [`LoopedError::Busy`] if the device is mounted or open: it then continues to serve, and goes
    /// away by itself when the last user has closed it.
    pub fn stop(mut self) -> Result<(), LoopedError> {
        self.end()
    }

    fn end(&mut self) -> Result<(), LoopedError> {
        if let Some(device) = self.device.take()
            && let Err(error) = device.detach()
        {
            if let Some(session) = self.session.take() {
                session.abandon();
            }
            return Err(error);
        }
        self.session.take().map_or(Ok(()), fuse::FuseSession::end)
    }
}

impl Drop for LoopedDevice {
    fn drop(&mut self) {
        if let Err(error) = self.end() {
            tracing::error!(device = %self.path.display(), error = &error as &dyn std::error::Error, "Cannot remove the device");
        }
    }
}
