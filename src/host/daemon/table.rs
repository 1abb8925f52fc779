//! The devices of one process.

use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use parking_lot::{Mutex, MutexGuard};

use super::alarm::Alarm;
use super::audit::AuditedDevice;
use super::error::step;
use super::outage::STALLED;
use super::view::placed;
use super::waits::{Waits, Watched};
use super::{
    DeviceReading, HostError, ImageOpener, ImageView, ReadPolicy, ServableImage, Snapshots,
};
use crate::metrics::upstream::{Rates, Totals};
use crate::metrics::{Page, names};
use blobs::trace::{Recorder, Recorders};
use client::protocol::{DeviceState, Explanation, WaitingRecord};
use client::{DeviceRecord, DeviceSpec, Frontend, mounts};
use disk::DiskRange;
use disk::volume::Volume;
use formats::trace::Trace;
use frontends::{FrontChoice, FrontKind, ServedDevice};
use source::failure::with_causes;

struct TableEntry {
    served: Box<dyn ServedDevice>,
    record: DeviceRecord,
    view: Arc<dyn ImageView>,
    waits: Arc<Waits>,
    recorders: Option<Arc<Recorders>>,
    dev_id: Option<String>,
    snapshots: Option<Arc<dyn Snapshots>>,
    /// The recording that a client requested.
    recording: Option<Arc<Recorder>>,
}

/// Limit on the waiting reads that `explain` reports.
const MOST_WAITING: usize = 16;

/// Limit on the places of each of them.
const MOST_PLACES: usize = 8;

#[derive(Default)]
struct Devices {
    entries: BTreeMap<u64, TableEntry>,
    last: u64,
    /// Number of attaches in progress.
    coming: usize,
    /// True when no new devices are accepted.
    closed: bool,
    /// Bytes read from devices that are gone.
    gone: Totals,
}

/// The devices that this process serves. Dropping it removes them all.
pub struct DeviceTable {
    run_dir: PathBuf,
    opener: Arc<dyn ImageOpener>,
    policy: ReadPolicy,
    devices: Mutex<Devices>,
    rates: Rates,
    alarm: Alarm,
}

impl DeviceTable {
    /// Creates an empty table; FUSE mount points are created in `run_dir`, which exists.
    #[must_use]
    pub fn new(run_dir: PathBuf, opener: Arc<dyn ImageOpener>, policy: ReadPolicy) -> Self {
        let (devices, rates) = Default::default();
        Self { run_dir, opener, policy, devices, rates, alarm: Alarm::new() }
    }

    fn lock(&self) -> MutexGuard<'_, Devices> {
        self.devices.lock()
    }

    /// Opens an image and serves it. The second value is a note for the user.
    ///
    /// # Errors
    /// Returns the opener's or the front end's error; nothing remains then.
    pub fn attach(&self, spec: &DeviceSpec) -> Result<(DeviceRecord, Option<String>), HostError> {
        let id = {
            let mut devices = self.lock();
            if devices.closed {
                return Err(HostError::Ending);
            }
            devices.check_name(spec.dev_id.as_deref())?;
            devices.coming += 1;
            devices.last += 1;
            devices.last
        };
        let result = self.make(spec, id);
        let mut devices = self.lock();
        devices.coming -= 1;
        let (entry, note) = result?;
        if let Err(error) = devices.check_name(spec.dev_id.as_deref()) {
            // Another device has taken the name in the meantime.
            drop(devices);
            entry.stop()?;
            return Err(error);
        }
        let record = entry.record.clone();
        devices.entries.insert(id, entry);
        Ok((record, note))
    }

    fn make(&self, spec: &DeviceSpec, id: u64) -> Result<(TableEntry, Option<String>), HostError> {
        let start = Instant::now();
        let ServableImage { volume, name, view, recorders, snapshots } = self
            .opener
            .open(spec)
            .map_err(|failure| HostError::of_opener(spec.image.name(), failure))?;
        sys::heap::trim_heap();
        let size = volume.size();
        let dir = self.run_dir.join(format!("fuse-{}-{id}", std::process::id()));
        let opened = start.elapsed();
        let reason = view.clone();
        let waits = Waits::new(self.policy, self.alarm.bell(), move || reason.trouble());
        self.alarm.watch(&waits).map_err(step("start a thread for", &self.run_dir))?;
        if let Some(audit) = self.opener.audit() {
            waits.audit(AuditedDevice::new(audit, &name));
        }
        let volume = Arc::new(Watched::new(volume, waits.clone()));
        let (served, note) = serve(volume, spec, &dir)?;
        let made = start.elapsed() - opened;
        let device = served.path().to_owned();
        let frontend = match served.kind() {
            FrontKind::Ublk => Frontend::Ublk,
            FrontKind::Looped => Frontend::Loop,
        };
        waits.named(&device.to_string_lossy());
        let since = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs());
        let record = DeviceRecord {
            image: name,
            size_bytes: size,
            since_unix_s: since,
            opening_us: opened.as_micros() as u64,
            making_us: made.as_micros() as u64,
            ..DeviceRecord::new(id, spec, frontend, device)
        };
        tracing::info!(device = %record.device.display(), "{}: opened in {opened:.1?}, device made in {made:.1?}", record.image);
        let dev_id = spec.dev_id.clone();
        let entry = TableEntry {
            served,
            record,
            view,
            waits,
            recorders,
            dev_id,
            snapshots,
            recording: None,
        };
        Ok((entry, note))
    }

    /// The devices now, in the order of their attaches.
    #[must_use]
    pub fn list(&self) -> Vec<DeviceRecord> {
        self.lock().entries.values().map(TableEntry::now).collect()
    }

    /// Records the mount point that a client chose for the device.
    ///
    /// # Errors
    /// Returns [`HostError::NotFound`].
    pub fn mounted(&self, id: u64, mountpoint: Option<PathBuf>) -> Result<(), HostError> {
        let mut devices = self.lock();
        let entry = devices
            .entries
            .get_mut(&id)
            .ok_or_else(|| HostError::NotFound(format!("number {id}")))?;
        entry.record.mountpoint = mountpoint;
        Ok(())
    }

    /// Continues a device on the writable layer that the configuration at `config` names. The device is named
    /// by its `--dev-id` or its node.
    ///
    /// # Errors
    /// Returns [`HostError::NotFound`]; [`HostError::Snapshot`], and the device continues unchanged.
    pub fn snapshot(&self, name: &str, config: &Path) -> Result<(), HostError> {
        let (device, snapshots) = {
            let devices = self.lock();
            let is_it = |entry: &&TableEntry| {
                entry.dev_id.as_deref() == Some(name) || entry.record.device == Path::new(name)
            };
            let entry = devices.entries.values().find(is_it);
            let entry = entry.ok_or_else(|| HostError::NotFound(name.to_owned()))?;
            (entry.record.device.clone(), entry.snapshots.clone())
        };
        let taken = match snapshots {
            Some(snapshots) => snapshots.take(config),
            None => {
                Err("it has no writable layer of a device config, so its contents cannot change"
                    .into())
            }
        };
        taken.map_err(|source| HostError::Snapshot { device, source })
    }

    /// Begins a recording of a device's reads. An earlier recording is discarded.
    ///
    /// # Errors
    /// Returns [`HostError::NotFound`]; [`HostError::Recording`] when its image cannot be recorded.
    pub fn begin_trace(&self, id: u64) -> Result<(), HostError> {
        self.with_recorders(id, |recorders, recording| {
            if let Some(before) = recording.replace(recorders.begin()) {
                recorders.end(&before);
            }
            Ok(())
        })
    }

    /// Ends the recording, and returns its trace.
    ///
    /// # Errors
    /// Returns [`HostError::NotFound`]; [`HostError::Recording`] when none was begun.
    pub fn end_trace(&self, id: u64) -> Result<Trace, HostError> {
        self.with_recorders(id, |recorders, recording| {
            let recording = recording.take().ok_or("no recording was begun")?;
            Ok(recorders.end(&recording))
        })
    }

    fn with_recorders<T>(
        &self,
        id: u64,
        work: impl FnOnce(&Recorders, &mut Option<Arc<Recorder>>) -> Result<T, &'static str>,
    ) -> Result<T, HostError> {
        let mut devices = self.lock();
        let missing = || HostError::NotFound(format!("number {id}"));
        let entry = devices.entries.get_mut(&id).ok_or_else(missing)?;
        let result = match &entry.recorders {
            Some(recorders) => work(recorders, &mut entry.recording),
            None => Err("its image cannot be recorded"),
        };
        result.map_err(|why| HostError::Recording { device: entry.record.device.clone(), why })
    }

    /// Removes an unused device.
    ///
    /// # Errors
    /// Returns [`HostError::NotFound`]; [`HostError::Busy`], and the device stays; the front end's error.
    pub fn detach(&self, id: u64) -> Result<(), HostError> {
        let entry = {
            let mut devices = self.lock();
            let missing = || HostError::NotFound(format!("number {id}"));
            let entry = devices.entries.get(&id).ok_or_else(missing)?;
            if in_use(&entry.record.device) {
                return Err(entry.busy());
            }
            // A device that is open but not mounted stays in the table, too.
            entry.served.give_up().map_err(|error| match error {
                error if error.is_busy() => entry.busy(),
                error => HostError::of_front(entry.record.image.clone(), error),
            })?;
            let entry = devices.entries.remove(&id).ok_or_else(missing)?;
            devices.forget(&entry);
            entry
        };
        // Outside the lock: requests in flight are answered first.
        entry.stop()
    }

    /// Removes all unused devices and returns those in use. If there are none of these, no new device can be
    /// created any more.
    #[must_use]
    pub fn close(&self) -> Vec<DeviceRecord> {
        let free: Vec<TableEntry> = {
            let mut devices = self.lock();
            let all = std::mem::take(&mut devices.entries);
            let (busy, free): (BTreeMap<_, _>, BTreeMap<_, _>) =
                all.into_iter().partition(|(_, entry)| in_use(&entry.record.device));
            devices.entries = busy;
            free.values().for_each(|entry| devices.forget(entry));
            free.into_values().collect()
        };
        stop_all(free);
        if self.close_if_empty() { Vec::new() } else { self.list() }
    }

    /// Adds all devices, and the state that they share, to a page of metrics.
    pub fn observe(&self, page: &mut Page) {
        let mut totals = [Totals::default(), self.opener.downloaded()];
        let mut longest = 0;
        {
            let devices = self.lock();
            totals[0] = devices.gone;
            for entry in devices.entries.values() {
                let reading = entry.reading();
                totals[0].reads += reading.front.reads;
                totals[0].bytes += reading.front.bytes;
                let device = entry.record.device.to_string_lossy();
                page.put(
                    names::DEVICE,
                    &reading,
                    &[("device", &*device), ("image", &entry.record.image)],
                );
            }
        }
        self.opener.observe(page);
        let upstream = self.rates.look(Instant::now(), totals, || {
            for entry in self.lock().entries.values() {
                longest = longest.max(entry.waits.take_longest());
            }
            [longest, self.opener.take_longest_download()]
        });
        let node = rustix::system::uname();
        page.put(names::UPSTREAM, &upstream, &[("node", &node.nodename().to_string_lossy())]);
    }

    /// Sources of parts of a device's disk, and the device's problems.
    ///
    /// # Errors
    /// Returns [`HostError::NotFound`].
    pub fn explain(
        &self,
        id: u64,
        ranges: &[DiskRange],
        most: usize,
    ) -> Result<Explanation, HostError> {
        let (device, view, waits) = {
            let devices = self.lock();
            let entry = devices
                .entries
                .get(&id)
                .ok_or_else(|| HostError::NotFound(format!("number {id}")))?;
            (entry.now(), entry.view.clone(), entry.waits.clone())
        };
        let mut places = Vec::new();
        for &range in ranges {
            let left = most.saturating_sub(places.len());
            places.extend(placed(view.explain(range, left)));
        }
        let waiting = waits.oldest(MOST_WAITING).into_iter().map(|read| WaitingRecord {
            offset_bytes: read.range.offset,
            length_bytes: read.range.len,
            waits_ms: milliseconds(read.waits),
            places: placed(view.explain(read.range, MOST_PLACES)).collect(),
            tries: read.tries,
            error: read.error,
            next_ms: read.next.map(milliseconds),
        });
        Ok(Explanation { waiting: waiting.collect(), device, places, blobs: view.blobs() })
    }

    /// True if no device is served or about to be.
    pub(super) fn is_empty(&self) -> bool {
        let devices = self.lock();
        devices.entries.is_empty() && devices.coming == 0
    }

    /// Tests that no device is served or being attached; from then on no new one is accepted.
    pub(super) fn close_if_empty(&self) -> bool {
        let mut devices = self.lock();
        let empty = devices.entries.is_empty() && devices.coming == 0;
        devices.closed |= empty;
        empty
    }
}

impl Devices {
    /// Refuses a name that a device has.
    fn check_name(&self, name: Option<&str>) -> Result<(), HostError> {
        let Some(name) = name else { return Ok(()) };
        match self.entries.values().find(|entry| entry.dev_id.as_deref() == Some(name)) {
            None => Ok(()),
            Some(entry) => {
                Err(HostError::Taken { name: name.to_owned(), device: entry.record.device.clone() })
            }
        }
    }

    /// Keeps the totals of a device that is removed.
    fn forget(&mut self, entry: &TableEntry) {
        let front = entry.served.counters();
        self.gone.reads += front.reads;
        self.gone.bytes += front.bytes;
    }
}

impl TableEntry {
    fn reading(&self) -> DeviceReading {
        let (size, front) = (self.record.size_bytes, self.served.counters());
        DeviceReading { size, front, waits: self.waits.reading(), image: self.view.counters() }
    }

    fn now(&self) -> DeviceRecord {
        let DeviceReading { front, waits, image, .. } = self.reading();
        let oldest = waits.oldest.unwrap_or_default();
        let state = if front.lost_queues > 0 {
            DeviceState::Failed
        } else if oldest >= STALLED {
            DeviceState::Stalled
        } else if in_use(&self.record.device) {
            DeviceState::InUse
        } else {
            DeviceState::Ready
        };
        DeviceRecord {
            state,
            bytes_read: front.bytes,
            bytes_fetched: image.fetched,
            bytes_cached: image.cached,
            errors: front.errors + image.errors,
            retries: image.retries,
            waiting: waits.waiting,
            oldest_wait_ms: milliseconds(oldest),
            ..self.record.clone()
        }
    }

    fn busy(&self) -> HostError {
        let places = mounts::mounted_from(&self.record.device).unwrap_or_default();
        let places: Vec<_> =
            places.iter().chain(&self.record.mountpoint).map(|p| p.display().to_string()).collect();
        let mounted =
            places.first().map(|place| format!(" (mounted at {place})")).unwrap_or_default();
        HostError::Busy { device: self.record.device.clone(), mounted }
    }

    fn stop(self) -> Result<(), HostError> {
        self.waits.close();
        let image = self.record.image;
        let device = self.record.device;
        self.served.stop().map_err(|error| {
            if error.is_busy() {
                HostError::Busy { device, mounted: String::new() }
            } else {
                HostError::of_front(image, error)
            }
        })
    }
}

/// Stops unused devices, several at a time; failures are logged.
fn stop_all(entries: Vec<TableEntry>) {
    let close = |entry: TableEntry| {
        entry.waits.close();
        entry.served
    };
    for (device, error) in frontends::stop_all(entries.into_iter().map(close).collect()) {
        let error = with_causes(&error);
        tracing::warn!(device = %device.display(), error, "A device was not removed cleanly");
    }
}

pub(super) fn milliseconds(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// Creates the device, with the requested fallback. The second value is a note for the user.
fn serve(
    volume: Arc<dyn Volume>,
    spec: &DeviceSpec,
    dir: &Path,
) -> Result<(Box<dyn ServedDevice>, Option<String>), HostError> {
    let choice = match spec.frontend {
        Frontend::Auto => FrontChoice::UblkOrLooped,
        Frontend::Ublk => FrontChoice::Only(FrontKind::Ublk),
        Frontend::Loop => FrontChoice::Only(FrontKind::Looped),
    };
    let (device, passed_over) = frontends::serve(volume, choice, dir)
        .map_err(|error| HostError::of_front(spec.image.name(), error))?;
    let note = passed_over.map(|why| {
        format!("{why}; served through FUSE and a loop device, which is slower than ublk")
    });
    Ok((device, note))
}

/// True if a mount, or another exclusive user, holds the block device, in any mount namespace.
fn in_use(device: &Path) -> bool {
    let opened = OpenOptions::new().read(true).custom_flags(libc::O_EXCL).open(device);
    matches!(opened, Err(error) if error.raw_os_error() == Some(libc::EBUSY))
}
