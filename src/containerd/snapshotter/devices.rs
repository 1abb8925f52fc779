//! Devices of images, one for each content, mounted read-only.
//!
//! A device belongs to its content ([`DeviceKey`]) and to no snapshot. It is mounted at `devices/KEY/mnt`, below the snapshotter's root,
//! and every container whose layers are these has that folder as the lower one of its overlay. Nothing is written about
//! it: the daemon lists its devices by the name that they were asked for with, the kernel lists mounts, and the records of
//! snapshots say which content is in use. So a device that is missing after a crash, a reboot or the death of the daemon is
//! made again by the next call, and one that is there is taken as it is.
//!
//! **Time.** Opening a device can take as long as its registry does, and a call of containerd may not. Each opening has a
//! thread of its own, one for a content at a time; a caller waits for it until its own deadline, and what is opened later is found by the
//! next caller. A call for another image never waits for it. If all is well, a caller makes two system calls: is the daemon's
//! connection still open, and is the folder on the device that was mounted there?
//!
//! **Life.** A device that died with its daemon stays mounted and fails its reads. Its mount is detached lazily, so that containers
//! which still have it end by themselves, and the new device is mounted in its place. A device that no running container needs is removed after
//! an idle time; one that the kernel says is busy stays.
//!
//! * [`host`]   the seam: what the daemon and the kernel do
//! * `memory`   doubles of it for tests

pub mod host;
#[cfg(any(test, feature = "testing"))]
pub mod memory;

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use client::{ClientError, Code, DeviceRecord, DeviceSpec, ImageSpec};
use parking_lot::{Condvar, Mutex};
use source::failure::with_causes;
use thiserror::Error;

use self::host::DeviceHost;
use super::chain::{DeviceImage, DeviceKey, DeviceSource};

/// Beginning of the name of a device in the daemon; its key follows.
const NAME: &str = "containerd-";

/// Folder of a device's mount, in the device's folder. It holds nothing else, so that the mount can be cloned by its parent.
const MOUNT_NAME: &str = "mnt";

/// Device config of a device, in the device's folder.
const CONFIG_NAME: &str = "config.v1.json";

/// Times that a dead mount is taken off a folder before its device counts as failed: mounts can lie upon each other.
const MOST_MOUNTS: usize = 64;

/// Failure to open a device. It is kept for all who wait for it.
#[derive(Clone, Debug, Error)]
pub enum DeviceError {
    /// The folder of a device cannot be made or written.
    #[error("Cannot use {folder} for a device", folder = folder.display())]
    Folder {
        /// The folder.
        folder: PathBuf,
        /// Answer of the system.
        #[source]
        source: Arc<io::Error>,
    },
    /// The daemon, or the kernel, refuses.
    #[error("Cannot make the device of {name}")]
    Host {
        /// Name of the image.
        name: String,
        /// The refusal.
        #[source]
        source: Arc<ClientError>,
    },
    /// There is no daemon.
    #[error(
        "No turbobd daemon answers at {socket}: start it (systemctl start turbobd), and try again",
        socket = socket.display()
    )]
    NoDaemon {
        /// Socket of the daemon.
        socket: PathBuf,
    },
    /// The caller's time is over.
    #[error(
        "The device of {name} is not ready after {seconds:.1} s. It is opened further, so try again; `turbobd ls` and the daemon's log say what it waits for"
    )]
    Late {
        /// Name of the image.
        name: String,
        /// Time that was waited.
        seconds: f64,
    },
}

impl DeviceError {
    /// Kind of the failure.
    #[must_use]
    pub fn code(&self) -> Code {
        match self {
            Self::Folder { source, .. } => client::error::code_of_io(source),
            Self::Host { source, .. } => source.code(),
            Self::NoDaemon { .. } | Self::Late { .. } => Code::Unavailable,
        }
    }
}

/// State of a device.
#[derive(Clone, Debug)]
pub enum Readiness {
    /// It was never asked for, or was removed.
    Absent,
    /// It is being opened or removed.
    Working,
    /// It is mounted.
    Ready,
    /// The last opening failed.
    Failed(DeviceError),
}

/// The devices of a snapshotter.
pub struct ContentDevices {
    root: PathBuf,
    host: Arc<dyn DeviceHost>,
    entries: Mutex<HashMap<DeviceKey, ContentEntry>>,
    changed: Condvar,
}

impl fmt::Debug for ContentDevices {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ContentDevices").field("root", &self.root).finish_non_exhaustive()
    }
}

enum ContentEntry {
    Working,
    Ready(MountedDevice),
    Failed(DeviceError),
}

/// A device that is mounted.
#[derive(Clone, Debug)]
struct MountedDevice {
    /// Number of the device in the daemon.
    id: u64,
    /// Number of the device in the kernel.
    number: u64,
    /// Life of the daemon in which that was so.
    life: u64,
    /// Last time that a caller wanted it.
    wanted: Instant,
}

impl ContentDevices {
    /// The devices in folders of `root`, which is made.
    ///
    /// # Errors
    /// [`DeviceError::Folder`].
    pub fn open(root: PathBuf, host: Arc<dyn DeviceHost>) -> Result<Arc<Self>, DeviceError> {
        make_folder(&root)?;
        let (entries, changed) = Default::default();
        let devices = Arc::new(Self { root, host, entries, changed });
        for key in devices.keys()? {
            // After a reboot nothing is mounted there. The kernel does not remove what is.
            let _ = fs::remove_dir(devices.mount_point(&key));
        }
        Ok(devices)
    }

    /// Folder where a device is or will be mounted.
    #[must_use]
    pub fn mount_point(&self, key: &DeviceKey) -> PathBuf {
        self.folder(key).join(MOUNT_NAME)
    }

    fn folder(&self, key: &DeviceKey) -> PathBuf {
        self.root.join(key.to_string())
    }

    /// Begins to open a device, unless it is open; returns at once.
    pub fn begin(self: &Arc<Self>, source: &DeviceSource) {
        let mut entries = self.entries.lock();
        match entries.get_mut(&source.key) {
            Some(ContentEntry::Working) => return,
            Some(ContentEntry::Ready(mounted)) if self.is_alive(&source.key, mounted) => {
                mounted.wanted = Instant::now();
                return;
            }
            _ => {}
        }
        entries.insert(source.key.clone(), ContentEntry::Working);
        drop(entries);
        let (devices, wanted) = (self.clone(), source.clone());
        let work = move || {
            let opened = devices.make(&wanted);
            if let Err(error) = &opened {
                tracing::warn!(device = %wanted.key, "{}", with_causes(error));
            }
            devices.settle(
                &wanted.key,
                Some(opened.map_or_else(ContentEntry::Failed, ContentEntry::Ready)),
            );
        };
        let thread = std::thread::Builder::new().name("device".into()).spawn(work);
        if let Err(error) = thread {
            let folder = self.folder(&source.key);
            let failed = DeviceError::Folder { folder, source: Arc::new(error) };
            self.settle(&source.key, Some(ContentEntry::Failed(failed)));
        }
    }

    /// Opens a device, unless it is open, and waits for it until `deadline`; returns its mount point.
    ///
    /// # Errors
    /// [`DeviceError`]; after [`DeviceError::Late`] the opening goes on.
    pub fn ensure(
        self: &Arc<Self>,
        source: &DeviceSource,
        deadline: Instant,
    ) -> Result<PathBuf, DeviceError> {
        let start = Instant::now();
        self.begin(source);
        let late = || DeviceError::Late {
            name: source.name.clone(),
            seconds: start.elapsed().as_secs_f64(),
        };
        let mut entries = self.entries.lock();
        loop {
            match entries.get(&source.key) {
                Some(ContentEntry::Ready(_)) => return Ok(self.mount_point(&source.key)),
                Some(ContentEntry::Failed(error)) => return Err(error.clone()),
                Some(ContentEntry::Working) => {
                    if self.changed.wait_until(&mut entries, deadline).timed_out() {
                        return Err(late());
                    }
                }
                None => {
                    // It was being removed when this call came.
                    drop(entries);
                    self.begin(source);
                    entries = self.entries.lock();
                    if Instant::now() >= deadline {
                        return Err(late());
                    }
                }
            }
        }
    }

    /// State of a device, as far as it is known without asking anything.
    #[must_use]
    pub fn state(&self, key: &DeviceKey) -> Readiness {
        match self.entries.lock().get(key) {
            None => Readiness::Absent,
            Some(ContentEntry::Working) => Readiness::Working,
            Some(ContentEntry::Ready(_)) => Readiness::Ready,
            Some(ContentEntry::Failed(error)) => Readiness::Failed(error.clone()),
        }
    }

    /// Removes devices that are not in `needed` and that no call has wanted for `idle`. Those that the kernel still uses stay.
    pub fn remove_idle(&self, needed: &HashSet<DeviceKey>, idle: Duration) {
        for (key, mounted) in self.take_idle(needed, idle) {
            let next = match self.remove(&key, mounted.id) {
                Ok(()) => {
                    tracing::info!(device = %key, "an idle device is removed");
                    None
                }
                Err(error) => {
                    tracing::debug!(device = %key, "a device stays: {}", with_causes(&error));
                    Some(ContentEntry::Ready(MountedDevice { wanted: Instant::now(), ..mounted }))
                }
            };
            self.settle(&key, next);
        }
    }

    /// The idle devices; callers wait while they are examined.
    fn take_idle(
        &self,
        needed: &HashSet<DeviceKey>,
        idle: Duration,
    ) -> Vec<(DeviceKey, MountedDevice)> {
        let mut entries = self.entries.lock();
        let mut found = Vec::new();
        for (key, entry) in entries.iter_mut() {
            if let ContentEntry::Ready(mounted) = entry
                && !needed.contains(key)
                && mounted.wanted.elapsed() >= idle
            {
                found.push((key.clone(), mounted.clone()));
                *entry = ContentEntry::Working;
            }
        }
        found
    }

    /// Removes what an earlier process has left in the folder of the devices and is not in `needed`: mounts, the daemon's
    /// devices, folders. What the kernel uses stays, and is found by the next sweep.
    ///
    /// # Errors
    /// [`DeviceError::Folder`] if the folder cannot be read.
    pub fn sweep(&self, needed: &HashSet<DeviceKey>) -> Result<(), DeviceError> {
        let keys: Vec<_> = self.keys()?.into_iter().filter(|key| !needed.contains(key)).collect();
        if keys.is_empty() {
            return Ok(());
        }
        // Without a daemon there is no device, only mounts of dead ones.
        let records = self.host.list().unwrap_or_default();
        for key in keys {
            {
                let mut entries = self.entries.lock();
                if entries.contains_key(&key) {
                    continue;
                }
                entries.insert(key.clone(), ContentEntry::Working);
            }
            let record = records.iter().find(|record| is_of(record, &key));
            let removed = match record {
                Some(record) => self.remove(&key, record.id),
                None => self.clear(&key).and_then(|()| self.remove_folder(&key)),
            };
            self.settle(&key, None);
            match removed {
                Ok(()) => {
                    tracing::info!(device = %key, "a device that no snapshot names is removed")
                }
                Err(error) => {
                    tracing::warn!(device = %key, "a device that no snapshot names stays: {}", with_causes(&error));
                }
            }
        }
        Ok(())
    }

    /// Keys of the folders.
    fn keys(&self) -> Result<Vec<DeviceKey>, DeviceError> {
        let in_root = step(&self.root);
        let mut keys = Vec::new();
        for entry in fs::read_dir(&self.root).map_err(&in_root)? {
            let name = entry.map_err(&in_root)?.file_name();
            keys.extend(name.to_str().and_then(DeviceKey::of_folder));
        }
        Ok(keys)
    }

    /// True if the folder is on the device, and its daemon lives.
    fn is_alive(&self, key: &DeviceKey, mounted: &MountedDevice) -> bool {
        self.host.life() == Some(mounted.life)
            && self.host.mounted_at(&self.mount_point(key)) == Some(mounted.number)
    }

    /// Writes the new state of a device; `None`: there is none.
    fn settle(&self, key: &DeviceKey, entry: Option<ContentEntry>) {
        let mut entries = self.entries.lock();
        match entry {
            Some(entry) => entries.insert(key.clone(), entry),
            None => entries.remove(key),
        };
        self.changed.notify_all();
    }

    /// Makes a device, or takes the one that is there.
    fn make(&self, source: &DeviceSource) -> Result<MountedDevice, DeviceError> {
        let refused = |error| self.refused(&source.name, error);
        let key = &source.key;
        let place = self.mount_point(key);
        make_folder(&self.folder(key))?;
        let records = self.host.list().map_err(refused)?;
        // A life that ends from here on is noticed by the next caller.
        let life = self.host.life().unwrap_or_default();
        let known = records.into_iter().find(|record| is_of(record, key));
        let record = match known {
            Some(record) if record.state != client::protocol::DeviceState::Failed => record,
            Some(failed) => {
                self.clear(key)?;
                self.host.remove(failed.id).map_err(refused)?;
                self.attach(source)?
            }
            None => self.attach(source)?,
        };
        let number = self.host.number(&record.device).map_err(refused)?;
        if self.host.mounted_at(&place) != Some(number) {
            self.clear(key)?;
            self.mount(key, &record.device)?;
        }
        self.host.mounted(record.id, Some(&place)).map_err(refused)?;
        Ok(MountedDevice { id: record.id, number, life, wanted: Instant::now() })
    }

    fn attach(&self, source: &DeviceSource) -> Result<DeviceRecord, DeviceError> {
        let image = match &source.image {
            DeviceImage::Reference(spec) => (**spec).clone(),
            DeviceImage::Config(text) => {
                let folder = self.folder(&source.key);
                let file = folder.join(CONFIG_NAME);
                fs::write(&file, text).map_err(step(&folder))?;
                ImageSpec::of_device_config(file)
            }
        };
        let dev_id = Some(format!("{NAME}{}", source.key));
        let start = Instant::now();
        let record = self
            .host
            .attach(DeviceSpec { dev_id, ..DeviceSpec::of(image) })
            .map_err(|error| self.refused(&source.name, error))?;
        tracing::info!(
            device = %record.device.display(),
            key = %source.key,
            "{}: attached in {:.1?}",
            source.name,
            start.elapsed()
        );
        Ok(record)
    }

    /// Mounts a device in its folder. The mount point exists no longer than the mount: where it is missing, an overlay over it
    /// fails, and does not show an empty folder.
    fn mount(&self, key: &DeviceKey, device: &Path) -> Result<(), DeviceError> {
        let place = self.mount_point(key);
        make_folder(&place)?;
        self.host.mount(device, &place).map_err(|error| {
            let _ = fs::remove_dir(&place);
            self.refused(&key.to_string(), error)
        })
    }

    /// Takes all mounts off the folder of a device. Containers that have them keep them until they end.
    fn clear(&self, key: &DeviceKey) -> Result<(), DeviceError> {
        let place = self.mount_point(key);
        for _ in 0..MOST_MOUNTS {
            if self.host.mounted_at(&place).is_none() {
                return Ok(());
            }
            let detached = self.host.detach_mount(&place);
            detached.map_err(|error| self.refused(&key.to_string(), error))?;
        }
        let source = Arc::new(io::Error::other("it has too many mounts"));
        Err(DeviceError::Folder { folder: place, source })
    }

    /// Unmounts and removes a device that nothing uses.
    fn remove(&self, key: &DeviceKey, id: u64) -> Result<(), DeviceError> {
        let refused = |error| self.refused(&key.to_string(), error);
        let place = self.mount_point(key);
        let number = self.host.mounted_at(&place);
        if number.is_some() {
            self.host.unmount(&place).map_err(refused)?;
        }
        self.host.mounted(id, None).map_err(refused)?;
        if let Err(error) = self.host.remove(id) {
            // A container that outlives its snapshot has it. The next container shall find it mounted.
            let back = self.host.list().ok().and_then(|records| {
                records.into_iter().find(|record| record.id == id && is_of(record, key))
            });
            if let Some(record) = back {
                self.mount(key, &record.device)?;
                self.host.mounted(id, Some(&place)).map_err(refused)?;
            }
            return Err(refused(error));
        }
        self.remove_folder(key)
    }

    fn remove_folder(&self, key: &DeviceKey) -> Result<(), DeviceError> {
        let folder = self.folder(key);
        // Not recursively: what is mounted there must never be deleted.
        let remove = || {
            match fs::remove_file(folder.join(CONFIG_NAME)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
            match fs::remove_dir(folder.join(MOUNT_NAME)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
            fs::remove_dir(&folder)
        };
        remove().map_err(step(&folder))
    }

    fn refused(&self, name: &str, error: Option<ClientError>) -> DeviceError {
        match error {
            None => DeviceError::NoDaemon { socket: self.host.socket() },
            Some(error) => DeviceError::Host { name: name.to_owned(), source: Arc::new(error) },
        }
    }
}

/// True if a device was asked for by this name.
fn is_of(record: &DeviceRecord, key: &DeviceKey) -> bool {
    record.dev_id.as_deref().and_then(|name| name.strip_prefix(NAME)) == Some(&*key.to_string())
}

fn make_folder(folder: &Path) -> Result<(), DeviceError> {
    match DirBuilder::new().mode(0o700).create(folder) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(step(folder)(error)),
        _ => Ok(()),
    }
}

fn step(folder: &Path) -> impl Fn(io::Error) -> DeviceError {
    let folder = folder.to_owned();
    move |source| DeviceError::Folder { folder: folder.clone(), source: Arc::new(source) }
}

#[cfg(test)]
mod tests;
