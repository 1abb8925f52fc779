//! What the devices need of the host: the daemon that makes them, and the kernel that mounts them.
//!
//! A seam, so that crashes, refusals and slow answers can be had in tests. Real: [`DaemonHost`]. In memory, and faulty:
//! `memory`.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use client::mounts::{self, MountRights};
use client::{ClientError, DaemonClient, DeviceRecord, DeviceSpec, protocol, step};
use parking_lot::Mutex;
use rustix::mount::{UnmountFlags, unmount};

/// A refusal; `None`: there is no daemon.
pub type Refusal = Option<ClientError>;

/// The daemon and the kernel. Calls to the daemon take as long as it does: call them where waiting is allowed.
pub trait DeviceHost: Send + Sync {
    /// Socket of the daemon, for messages.
    fn socket(&self) -> PathBuf;

    /// A number that changes when the daemon ends and another one takes its place; `None` if it has ended, or was never asked.
    /// Answers at once.
    fn life(&self) -> Option<u64>;

    /// The devices of the daemon. Connects to it if needed.
    ///
    /// # Errors
    /// [`Refusal`].
    fn list(&self) -> Result<Vec<DeviceRecord>, Refusal>;

    /// Makes a device.
    ///
    /// # Errors
    /// [`Refusal`].
    fn attach(&self, spec: DeviceSpec) -> Result<DeviceRecord, Refusal>;

    /// Tells the daemon where a device is mounted; `None`: nowhere.
    ///
    /// # Errors
    /// [`Refusal`].
    fn mounted(&self, id: u64, place: Option<&Path>) -> Result<(), Refusal>;

    /// Removes a device.
    ///
    /// # Errors
    /// [`Refusal`], with [`Code::Busy`](client::Code::Busy) if the device is in use.
    fn remove(&self, id: u64) -> Result<(), Refusal>;

    /// Number of a device in the kernel.
    ///
    /// # Errors
    /// [`Refusal`].
    fn number(&self, device: &Path) -> Result<u64, Refusal>;

    /// Number of the device that is mounted at a folder; `None` if nothing is mounted there.
    fn mounted_at(&self, place: &Path) -> Option<u64>;

    /// Mounts a device at a folder, read-only, with the rights that programs of containers need.
    ///
    /// # Errors
    /// [`Refusal`].
    fn mount(&self, device: &Path, place: &Path) -> Result<(), Refusal>;

    /// Unmounts what is mounted at a folder and not in use.
    ///
    /// # Errors
    /// [`Refusal`], with [`Code::Busy`](client::Code::Busy) if it is in use.
    fn unmount(&self, place: &Path) -> Result<(), Refusal>;

    /// Takes the mount off a folder; programs that use it keep it.
    ///
    /// # Errors
    /// [`Refusal`].
    fn detach_mount(&self, place: &Path) -> Result<(), Refusal>;
}

/// The daemon of a run directory, and this kernel.
pub struct DaemonHost {
    run_dir: PathBuf,
    /// The connection for short requests; it tells when the daemon ends. With the number of its daemon's life.
    connection: Mutex<(u64, Option<DaemonClient>)>,
}

impl DaemonHost {
    /// The daemon of `run_dir`; it is asked when it is needed first, and never started.
    #[must_use]
    pub fn new(run_dir: PathBuf) -> Self {
        Self { run_dir, connection: Mutex::new((0, None)) }
    }

    /// Asks over the connection, which is made if needed.
    fn ask<T>(
        &self,
        request: impl FnOnce(&mut DaemonClient) -> Result<T, ClientError>,
    ) -> Result<T, Refusal> {
        let mut connection = self.connection.lock();
        let (life, client) = &mut *connection;
        if !client.as_ref().is_some_and(DaemonClient::is_open) {
            *client = None;
            *life += 1;
        }
        let client = match client {
            Some(client) => client,
            None => client.insert(DaemonClient::connect(&self.run_dir)?.ok_or(None)?),
        };
        Ok(request(client)?)
    }
}

impl DeviceHost for DaemonHost {
    fn socket(&self) -> PathBuf {
        protocol::socket(&self.run_dir)
    }

    fn life(&self) -> Option<u64> {
        // A thread that waits for the daemon has the lock: nothing is known of it at this moment.
        let connection = self.connection.try_lock()?;
        let (life, client) = &*connection;
        client.as_ref().filter(|client| client.is_open()).map(|_| *life)
    }

    fn list(&self) -> Result<Vec<DeviceRecord>, Refusal> {
        self.ask(DaemonClient::list)
    }

    fn attach(&self, spec: DeviceSpec) -> Result<DeviceRecord, Refusal> {
        // A connection of its own: it is busy as long as the registry is.
        let mut client = DaemonClient::connect(&self.run_dir)?.ok_or(None)?;
        let (record, note) = client.attach(spec)?;
        if let Some(note) = note {
            tracing::debug!("{note}");
        }
        Ok(record)
    }

    fn mounted(&self, id: u64, place: Option<&Path>) -> Result<(), Refusal> {
        self.ask(|client| client.mounted(id, place.map(Path::to_owned)))
    }

    fn remove(&self, id: u64) -> Result<(), Refusal> {
        self.ask(|client| client.remove(id))
    }

    fn number(&self, device: &Path) -> Result<u64, Refusal> {
        Ok(fs::metadata(device).map_err(step("examine", device))?.rdev())
    }

    fn mounted_at(&self, place: &Path) -> Option<u64> {
        let here = fs::symlink_metadata(place).ok()?.dev();
        let above = fs::symlink_metadata(place.parent()?).ok()?.dev();
        (here != above).then_some(here)
    }

    fn mount(&self, device: &Path, place: &Path) -> Result<(), Refusal> {
        // A container decides by its own settings whether suid programs and nodes work; containerd's overlayfs restricts neither.
        Ok(mounts::mount_image(device, place, MountRights { suid: true, dev: true })?)
    }

    fn unmount(&self, place: &Path) -> Result<(), Refusal> {
        Ok(mounts::unmount_dir(place)?)
    }

    fn detach_mount(&self, place: &Path) -> Result<(), Refusal> {
        let detached = unmount(place, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW);
        Ok(detached.map_err(io::Error::from).map_err(step("unmount", place))?)
    }
}
