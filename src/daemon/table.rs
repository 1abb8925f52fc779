//! The devices of one process.

use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use super::alarm::Alarm;
use super::audit::AuditedDevice;
use super::protocol::{Explanation, State, WaitingRecord};
use super::waits::{Waits, Watched};
use super::{
    AttachRequest, DaemonError, DeviceRecord, Frontend, ImageOpener, ImageView, IoCounters, Opened,
    ReadPolicy, Snapshots, WaitReading, mounts, step,
};
use crate::looped::{LoopedDevice, LoopedError};
use crate::metrics::upstream::{Rates, Totals};
use crate::metrics::{Page, names};
use crate::trace::{Recorder, Recorders, Trace};
use crate::ublk::{QueueTotals, UblkDevice, UblkError, UblkOptions};
use crate::volume::Volume;

/// A device of either kind.
enum Served {
    Ublk(UblkDevice),
    Looped(LoopedDevice),
}

struct Entry {
    served: Served,
    record: DeviceRecord,
    view: Arc<dyn ImageView>,
    waits: Arc<Waits>,
    recorders: Option<Arc<Recorders>>,
    dev_id: Option<String>,
    snapshots: Option<Arc<dyn Snapshots>>,
    /// What somebody has asked to be recorded.
    recording: Option<Arc<Recorder>>,
}

/// A read that waits for so long is no slow one any more: the device is said to be stalled.
const STALLED: Duration = Duration::from_secs(5);

/// Waiting reads that `explain` tells of.
const MOST_WAITING: usize = 16;

/// Places told of each of them.
const MOST_PLACES: usize = 8;

/// What there is to count of a device, at one moment.
#[derive(Clone, Copy, Debug)]
pub struct DeviceReading {
    /// Bytes of the disk.
    pub size: u64,
    /// What its front end did.
    pub front: QueueTotals,
    /// Its reads that waited, and those that wait.
    pub waits: WaitReading,
    /// What its image's blobs did.
    pub image: IoCounters,
}

#[derive(Default)]
struct Devices {
    entries: BTreeMap<u64, Entry>,
    last: u64,
    /// Attaches under way.
    coming: usize,
    /// No new devices any more.
    closed: bool,
    /// What was read of devices that are gone.
    gone: Totals,
}

/// The devices that this process serves. Dropping it removes them all.
pub struct Table {
    run_dir: PathBuf,
    opener: Arc<dyn ImageOpener>,
    policy: ReadPolicy,
    devices: Mutex<Devices>,
    rates: Rates,
    alarm: Alarm,
}

impl Table {
    /// An empty table; FUSE mount points are made in `run_dir`, which exists.
    #[must_use]
    pub fn new(run_dir: PathBuf, opener: Arc<dyn ImageOpener>, policy: ReadPolicy) -> Self {
        let (devices, rates) = Default::default();
        Self { run_dir, opener, policy, devices, rates, alarm: Alarm::new() }
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
            devices.check_name(request.dev_id.as_deref())?;
            devices.coming += 1;
            devices.last += 1;
            devices.last
        };
        let result = self.make(request, id);
        let mut devices = self.lock();
        devices.coming -= 1;
        let (entry, note) = result?;
        if let Err(error) = devices.check_name(request.dev_id.as_deref()) {
            // Another has taken the name meanwhile.
            drop(devices);
            entry.stop()?;
            return Err(error);
        }
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
        let Opened { volume, name, view, recorders, snapshots } = self
            .opener
            .open(request)
            .map_err(|source| DaemonError::Open { image: request.image.clone(), source })?;
        super::trim::trim_heap();
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
        let (served, note) = serve(volume, request, &dir)?;
        let made = start.elapsed() - opened;
        let (frontend, device) = match &served {
            Served::Ublk(device) => (Frontend::Ublk, device.path().to_owned()),
            Served::Looped(device) => (Frontend::Loop, device.path().to_owned()),
        };
        waits.named(&device.to_string_lossy());
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
            retries: 0,
            waiting: 0,
            oldest_wait: 0,
            since,
            opening: opened.as_micros() as u64,
            making: made.as_micros() as u64,
        };
        tracing::info!(device = %record.device.display(), "{}: opened in {opened:.1?}, device made in {made:.1?}", record.image);
        let dev_id = request.dev_id.clone();
        let entry =
            Entry { served, record, view, waits, recorders, dev_id, snapshots, recording: None };
        Ok((entry, note))
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

    /// Continues a device on the writable layer that the configuration at `config` names. The device is called by
    /// its `--dev-id` or its node.
    ///
    /// # Errors
    /// [`DaemonError::NotFound`]; [`DaemonError::Snapshot`], and the device goes on as it was.
    pub fn snapshot(&self, name: &str, config: &Path) -> Result<(), DaemonError> {
        let (device, snapshots) = {
            let devices = self.lock();
            let is_it = |entry: &&Entry| {
                entry.dev_id.as_deref() == Some(name) || entry.record.device == Path::new(name)
            };
            let entry = devices.entries.values().find(is_it);
            let entry = entry.ok_or_else(|| DaemonError::NotFound(name.to_owned()))?;
            (entry.record.device.clone(), entry.snapshots.clone())
        };
        let taken = match snapshots {
            Some(snapshots) => snapshots.take(config),
            None => {
                Err("it has no writable layer of a device config, so nothing of it can change"
                    .into())
            }
        };
        taken.map_err(|source| DaemonError::Snapshot { device, source })
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
            let entry = devices.entries.remove(&id).ok_or_else(missing)?;
            devices.forget(&entry);
            entry
        };
        // Outside the lock: requests in flight are answered first.
        entry.stop()
    }

    /// Removes all devices that nobody uses; those in use come back. If none does, no new device can be
    /// made any more.
    #[must_use]
    pub fn close(&self) -> Vec<DeviceRecord> {
        let free: Vec<Entry> = {
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

    /// Puts all devices, and what they share, onto a page of metrics.
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

    /// Where parts of a device's disk come from, and what is wrong with the device.
    ///
    /// # Errors
    /// [`DaemonError::NotFound`].
    pub fn explain(
        &self,
        id: u64,
        ranges: &[(u64, u64)],
        most: usize,
    ) -> Result<Explanation, DaemonError> {
        let (device, view, waits) = {
            let devices = self.lock();
            let entry = devices
                .entries
                .get(&id)
                .ok_or_else(|| DaemonError::NotFound(format!("number {id}")))?;
            (entry.now(), entry.view.clone(), entry.waits.clone())
        };
        let mut places = Vec::new();
        for &(offset, len) in ranges {
            let left = most.saturating_sub(places.len());
            places.extend(view.explain(offset..offset.saturating_add(len), left));
        }
        let waiting = waits.oldest(MOST_WAITING).into_iter().map(|read| WaitingRecord {
            offset: read.offset,
            len: read.len as u64,
            waits: milliseconds(read.waits),
            places: view.explain(read.offset..read.offset + read.len as u64, MOST_PLACES),
            tries: read.tries,
            error: read.error,
            next: read.next.map(milliseconds),
        });
        Ok(Explanation { waiting: waiting.collect(), device, places, blobs: view.blobs() })
    }

    /// Whether nothing is served or about to be; then nothing will be any more.
    pub(super) fn close_if_empty(&self) -> bool {
        let mut devices = self.lock();
        let empty = devices.entries.is_empty() && devices.coming == 0;
        devices.closed |= empty;
        empty
    }
}

impl Devices {
    /// Refuses a name that a device has.
    fn check_name(&self, name: Option<&str>) -> Result<(), DaemonError> {
        let Some(name) = name else { return Ok(()) };
        match self.entries.values().find(|entry| entry.dev_id.as_deref() == Some(name)) {
            None => Ok(()),
            Some(entry) => Err(DaemonError::Taken {
                name: name.to_owned(),
                device: entry.record.device.clone(),
            }),
        }
    }

    /// What a device that goes has read still counts.
    fn forget(&mut self, entry: &Entry) {
        let front = entry.front();
        self.gone.reads += front.reads;
        self.gone.bytes += front.bytes;
    }
}

impl Entry {
    /// What the front end did, in ublk's words.
    fn front(&self) -> QueueTotals {
        match &self.served {
            Served::Ublk(device) => device.counters(),
            Served::Looped(device) => {
                let totals = device.counters();
                QueueTotals {
                    reads: totals.reads,
                    bytes: totals.bytes,
                    direct: totals.reads.saturating_sub(totals.gathered),
                    gathered: totals.gathered,
                    pending: totals.pending,
                    writes: totals.writes,
                    flushes: totals.flushes,
                    errors: totals.errors,
                    ..QueueTotals::default()
                }
            }
        }
    }

    fn reading(&self) -> DeviceReading {
        let (size, front) = (self.record.size, self.front());
        DeviceReading { size, front, waits: self.waits.reading(), image: self.view.counters() }
    }

    fn now(&self) -> DeviceRecord {
        let DeviceReading { front, waits, image, .. } = self.reading();
        let oldest = waits.oldest.unwrap_or_default();
        let state = if front.lost_queues > 0 {
            State::Failed
        } else if oldest >= STALLED {
            State::Stalled
        } else if in_use(&self.record.device) {
            State::InUse
        } else {
            State::Ready
        };
        DeviceRecord {
            state,
            bytes_read: front.bytes,
            bytes_fetched: image.fetched,
            bytes_cached: image.cached,
            errors: front.errors + image.errors,
            retries: image.retries,
            waiting: waits.waiting,
            oldest_wait: milliseconds(oldest),
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
        self.waits.close();
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

/// Stops devices that nobody uses, ublk's several at a time; what goes wrong is logged.
fn stop_all(entries: Vec<Entry>) {
    let mut ublk = Vec::new();
    for entry in entries {
        entry.waits.close();
        let result = match entry.served {
            Served::Ublk(device) => {
                ublk.push(device);
                continue;
            }
            Served::Looped(device) => device.stop(),
        };
        if let Err(error) = result {
            let error = super::with_causes(&error);
            tracing::warn!(device = %entry.record.device.display(), error, "A device stays");
        }
    }
    if let Err(error) = crate::ublk::stop_all(ublk) {
        tracing::warn!(error = super::with_causes(&error), "A device was not removed cleanly");
    }
}

pub(super) fn milliseconds(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
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
