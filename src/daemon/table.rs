//! The devices of one process.

use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use super::protocol::State;
use super::{
    AttachRequest, DaemonError, DeviceRecord, Frontend, ImageOpener, IoCounters, Opened, mounts,
};
use crate::looped::{LoopedDevice, LoopedError};
use crate::trace::{Recorder, Recorders, Trace};
use crate::ublk::{UblkDevice, UblkError, UblkOptions};
use crate::volume::Volume;

/// A device of either kind.
enum Served {
    Ublk(UblkDevice),
    Looped(LoopedDevice),
}

struct Entry {
    served: Served,
    record: DeviceRecord,
    counters: Arc<dyn Fn() -> IoCounters + Send + Sync>,
    recorders: Option<Arc<Recorders>>,
    /// What somebody has asked to be recorded.
    recording: Option<Arc<Recorder>>,
}

#[derive(Default)]
struct Devices {
    entries: BTreeMap<u64, Entry>,
    last: u64,
    /// Attaches under way.
    coming: usize,
    /// No new devices any more.
    closed: bool,
}

/// The devices that this process serves. Dropping it removes them all.
pub struct Table {
    run_dir: PathBuf,
    opener: Arc<dyn ImageOpener>,
    devices: Mutex<Devices>,
}

impl Table {
    /// An empty table; FUSE mount points are made in `run_dir`, which exists.
    #[must_use]
    pub fn new(run_dir: PathBuf, opener: Arc<dyn ImageOpener>) -> Self {
        Self { run_dir, opener, devices: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, Devices> {
        self.devices.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Opens an image and serves it. The second value is what the user should be told.
    ///
    /// # Errors
    /// The opener's or the front end's; nothing is left behind then.
    pub fn attach(
        &self,
        request: &AttachRequest,
    ) -> Result<(DeviceRecord, Option<String>), DaemonError> {
        let id = {
            let mut devices = self.lock();
            if devices.closed {
                return Err(DaemonError::Ending);
            }
            devices.coming += 1;
            devices.last += 1;
            devices.last
        };
        let result = self.make(request, id);
        let mut devices = self.lock();
        devices.coming -= 1;
        let (entry, note) = result?;
        let record = entry.record.clone();
        devices.entries.insert(id, entry);
        Ok((record, note))
    }

    fn make(
        &self,
        request: &AttachRequest,
        id: u64,
    ) -> Result<(Entry, Option<String>), DaemonError> {
        let start = Instant::now();
        let Opened { volume, name, counters, recorders } = self
            .opener
            .open(request)
            .map_err(|source| DaemonError::Open { image: request.image.clone(), source })?;
        let size = volume.size();
        let dir = self.run_dir.join(format!("fuse-{}-{id}", std::process::id()));
        let opened = start.elapsed();
        let (served, note) = serve(volume, request, &dir)?;
        let made = start.elapsed() - opened;
        let (frontend, device) = match &served {
            Served::Ublk(device) => (Frontend::Ublk, device.path().to_owned()),
            Served::Looped(device) => (Frontend::Loop, device.path().to_owned()),
        };
        let since = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs());
        let record = DeviceRecord {
            id,
            image: name,
            requested: request.image.clone(),
            frontend,
            device,
            mountpoint: None,
            state: State::Ready,
            size,
            bytes_read: 0,
            bytes_fetched: 0,
            bytes_cached: 0,
            errors: 0,
            since,
            opening: opened.as_micros() as u64,
            making: made.as_micros() as u64,
        };
        tracing::info!(device = %record.device.display(), "{}: opened in {opened:.1?}, device made in {made:.1?}", record.image);
        Ok((Entry { served, record, counters, recorders, recording: None }, note))
    }

    /// The devices now, in the order in which they came.
    #[must_use]
    pub fn list(&self) -> Vec<DeviceRecord> {
        self.lock().entries.values().map(Entry::now).collect()
    }

    /// Notes where a client mounted the device.
    ///
    /// # Errors
    /// [`DaemonError::NotFound`].
    pub fn mounted(&self, id: u64, mountpoint: Option<PathBuf>) -> Result<(), DaemonError> {
        let mut devices = self.lock();
        let entry = devices
            .entries
            .get_mut(&id)
            .ok_or_else(|| DaemonError::NotFound(format!("number {id}")))?;
        entry.record.mountpoint = mountpoint;
        Ok(())
    }

    /// Begins to record what is touched of a device. A recording that was begun before is given up.
    ///
    /// # Errors
    /// [`DaemonError::NotFound`]; [`DaemonError::Recording`] when its image cannot be watched.
    pub fn begin_trace(&self, id: u64) -> Result<(), DaemonError> {
        self.with_recorders(id, |recorders, recording| {
            if let Some(before) = recording.replace(recorders.begin()) {
                recorders.end(&before);
            }
            Ok(())
        })
    }

    /// Ends the recording, and returns what was touched.
    ///
    /// # Errors
    /// [`DaemonError::NotFound`]; [`DaemonError::Recording`] when none was begun.
    pub fn end_trace(&self, id: u64) -> Result<Trace, DaemonError> {
        self.with_recorders(id, |recorders, recording| {
            let recording = recording.take().ok_or("no recording was begun")?;
            Ok(recorders.end(&recording))
        })
    }

    fn with_recorders<T>(
        &self,
        id: u64,
        work: impl FnOnce(&Recorders, &mut Option<Arc<Recorder>>) -> Result<T, &'static str>,
    ) -> Result<T, DaemonError> {
        let mut devices = self.lock();
        let missing = || DaemonError::NotFound(format!("number {id}"));
        let entry = devices.entries.get_mut(&id).ok_or_else(missing)?;
        let result = match &entry.recorders {
            Some(recorders) => work(recorders, &mut entry.recording),
            None => Err("its image cannot be watched"),
        };
        result.map_err(|why| DaemonError::Recording { device: entry.record.device.clone(), why })
    }

    /// Removes a device that nobody uses.
    ///
    /// # Errors
    /// [`DaemonError::NotFound`]; [`DaemonError::Busy`], and the device stays; the front end's.
    pub fn detach(&self, id: u64) -> Result<(), DaemonError> {
        let entry = {
            let mut devices = self.lock();
            let missing = || DaemonError::NotFound(format!("number {id}"));
            let entry = devices.entries.get(&id).ok_or_else(missing)?;
            if in_use(&entry.record.device) {
                return Err(entry.busy());
            }
            devices.entries.remove(&id).ok_or_else(missing)?
        };
        // Outside the lock: requests in flight are answered first.
        entry.stop()
    }

    /// Removes all devices that nobody uses; those in use, and those whose removal failed, come back.
    /// If none does, no new device can be made any more.
    #[must_use]
    pub fn close(&self) -> Vec<DeviceRecord> {
        let ids: Vec<u64> = self.lock().entries.keys().copied().collect();
        for id in ids {
            if let Err(error) = self.detach(id) {
                tracing::warn!(error = super::with_causes(&error), "A device stays");
            }
        }
        if self.close_if_empty() { Vec::new() } else { self.list() }
    }

    /// Whether nothing is served or about to be; then nothing will be any more.
    pub(super) fn close_if_empty(&self) -> bool {
        let mut devices = self.lock();
        let empty = devices.entries.is_empty() && devices.coming == 0;
        devices.closed |= empty;
        empty
    }
}

impl Entry {
    fn now(&self) -> DeviceRecord {
        let image = (self.counters)();
        let (bytes_read, errors, lost) = match &self.served {
            Served::Ublk(device) => {
                let totals = device.counters();
                (totals.bytes, totals.errors, totals.lost_queues > 0)
            }
            Served::Looped(device) => {
                let totals = device.counters();
                (totals.bytes, totals.errors, false)
            }
        };
        let state = match (lost, in_use(&self.record.device)) {
            (true, _) => State::Failed,
            (false, true) => State::InUse,
            (false, false) => State::Ready,
        };
        DeviceRecord {
            state,
            bytes_read,
            bytes_fetched: image.fetched,
            bytes_cached: image.cached,
            errors: errors + image.errors,
            ..self.record.clone()
        }
    }

    fn busy(&self) -> DaemonError {
        let places = mounts::mounted_from(&self.record.device).unwrap_or_default();
        let places: Vec<_> =
            places.iter().chain(&self.record.mountpoint).map(|p| p.display().to_string()).collect();
        let mounted =
            places.first().map(|place| format!(" (mounted at {place})")).unwrap_or_default();
        DaemonError::Busy { device: self.record.device.clone(), mounted }
    }

    fn stop(self) -> Result<(), DaemonError> {
        let image = self.record.image;
        match self.served {
            Served::Ublk(device) => {
                device.stop().map_err(|source| DaemonError::Ublk { image, source })
            }
            Served::Looped(device) => match device.stop() {
                Err(LoopedError::Busy { path }) => {
                    Err(DaemonError::Busy { device: path, mounted: String::new() })
                }
                result => result.map_err(|source| DaemonError::Looped { image, source }),
            },
        }
    }
}

/// Makes the device, with the fallback that was asked for.
fn serve(
    volume: Arc<dyn Volume>,
    request: &AttachRequest,
    dir: &Path,
) -> Result<(Served, Option<String>), DaemonError> {
    let image = || request.image.clone();
    let mut note = None;
    if request.frontend != Frontend::Loop {
        match UblkDevice::start(volume.clone(), &UblkOptions::default()) {
            Ok(device) => return Ok((Served::Ublk(device), None)),
            Err(why @ (UblkError::Unavailable { .. } | UblkError::KnownBadKernel { .. }))
                if request.frontend == Frontend::Auto =>
            {
                note = Some(format!(
                    "{why}; served through FUSE and a loop device, which is slower and ends with its server"
                ));
            }
            Err(source) => return Err(DaemonError::Ublk { image: image(), source }),
        }
    }
    let device = LoopedDevice::start(volume, dir)
        .map_err(|source| DaemonError::Looped { image: image(), source })?;
    Ok((Served::Looped(device), note))
}

/// Whether a mount, or another exclusive user, holds the block device, in whatever mount namespace.
fn in_use(device: &Path) -> bool {
    let opened = OpenOptions::new().read(true).custom_flags(libc::O_EXCL).open(device);
    matches!(opened, Err(error) if error.raw_os_error() == Some(libc::EBUSY))
}
