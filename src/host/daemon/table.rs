//! The devices of one process.

use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use parking_lot::{Condvar, Mutex, MutexGuard};

use super::alarm::Alarm;
use super::audit::AuditedDevice;
use super::error::step;
use super::journal::{Journal, JournalRecord};
use super::outage::STALLED;
use super::recovery::{self, Returning};
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
use frontends::ublk::recovery::DeviceToken;
use frontends::{FrontChoice, FrontKind, ServedDevice};
use source::failure::with_causes;

pub(super) struct TableEntry {
    served: Box<dyn ServedDevice>,
    pub(super) record: DeviceRecord,
    /// Its record in the journal, if it is in it.
    pub(super) journal: Option<JournalRecord>,
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
pub(super) struct Devices {
    pub(super) entries: BTreeMap<u64, TableEntry>,
    /// Those of an earlier daemon that are not served yet.
    pub(super) returning: BTreeMap<u64, Returning>,
    pub(super) last: u64,
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
    journal: Option<Journal>,
    /// A returning device was removed.
    changed: Condvar,
}

impl DeviceTable {
    /// Creates an empty table; FUSE mount points are created in `run_dir`, which exists. Its devices do not survive this process.
    #[must_use]
    pub fn new(run_dir: PathBuf, opener: Arc<dyn ImageOpener>, policy: ReadPolicy) -> Self {
        let (devices, rates) = Default::default();
        let (journal, changed) = (None, Condvar::new());
        Self { run_dir, opener, policy, devices, rates, alarm: Alarm::new(), journal, changed }
    }

    /// The same table with records of its devices, so that they survive this process. A failure to keep records is logged.
    pub(super) fn recorded(self) -> Self {
        let journal = Journal::open(&self.run_dir)
            .inspect_err(|error| tracing::warn!(%error, "Devices will not survive this daemon: no records can be kept"))
            .ok();
        Self { journal, ..self }
    }

    pub(super) fn journal(&self) -> Option<&Journal> {
        self.journal.as_ref()
    }

    pub(super) fn changed(&self) -> &Condvar {
        &self.changed
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Devices> {
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
            self.stop(entry)?;
            return Err(error);
        }
        let record = entry.record.clone();
        devices.entries.insert(id, entry);
        Ok((record, note))
    }

    fn make(&self, spec: &DeviceSpec, id: u64) -> Result<(TableEntry, Option<String>), HostError> {
        let start = Instant::now();
        let image = self.open(spec)?;
        let dir = self.run_dir.join(format!("fuse-{}-{id}", std::process::id()));
        let opened = start.elapsed();
        let (waits, volume) = self.watch(&image)?;
        let journal = recovery::begin_record(self.journal(), spec, id, &image);
        let token = journal.as_ref().and_then(JournalRecord::token);
        let (served, note) = serve(volume, spec, &dir, token).inspect_err(|_| {
            // Nothing remains: the record neither.
            if let (Some(journal), Some(token)) = (self.journal(), token) {
                recovery::drop_record(journal, token.number());
            }
        })?;
        let times = [opened, start.elapsed() - opened];
        let mut entry = self.entry(spec, id, image, waits, served, times);
        let kernel = entry.served.kernel_device();
        let since = entry.record.since_unix_s;
        entry.journal = recovery::complete_record(self.journal(), journal, kernel, since);
        Ok((entry, note))
    }

    /// Opens an image.
    pub(super) fn open(&self, spec: &DeviceSpec) -> Result<ServableImage, HostError> {
        let opened = self.opener.open(spec);
        let image = opened.map_err(|failure| HostError::of_opener(spec.image.name(), failure))?;
        sys::heap::trim_heap();
        Ok(image)
    }

    /// The disk of an image, with a watch over the reads that wait.
    pub(super) fn watch(
        &self,
        image: &ServableImage,
    ) -> Result<(Arc<Waits>, Arc<dyn Volume>), HostError> {
        let reason = image.view.clone();
        let waits = Waits::new(self.policy, self.alarm.bell(), move || reason.trouble());
        self.alarm.watch(&waits).map_err(step("start a thread for", &self.run_dir))?;
        if let Some(audit) = self.opener.audit() {
            waits.audit(AuditedDevice::new(audit, &image.name));
        }
        let volume = Arc::new(Watched::new(image.volume.clone(), waits.clone()));
        Ok((waits, volume))
    }

    /// The entry of a device that is served. `times`: to open the image, and to make the device.
    pub(super) fn entry(
        &self,
        spec: &DeviceSpec,
        id: u64,
        image: ServableImage,
        waits: Arc<Waits>,
        served: Box<dyn ServedDevice>,
        [opened, made]: [Duration; 2],
    ) -> TableEntry {
        let ServableImage { volume, name, view, recorders, snapshots, identity: _ } = image;
        let size = volume.size();
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
        TableEntry {
            served,
            record,
            journal: None,
            view,
            waits,
            recorders,
            dev_id,
            snapshots,
            recording: None,
        }
    }

    /// The devices now, in the order of their attaches, with those of an earlier daemon that are not served yet.
    #[must_use]
    pub fn list(&self) -> Vec<DeviceRecord> {
        let devices = self.lock();
        let returning = devices.returning.values().map(Returning::now);
        let mut records: Vec<_> =
            devices.entries.values().map(TableEntry::now).chain(returning).collect();
        records.sort_by_key(|record| record.id);
        records
    }

    /// Records the mount point that a client chose for the device.
    ///
    /// # Errors
    /// Returns [`HostError::NotFound`].
    pub fn mounted(&self, id: u64, mountpoint: Option<PathBuf>) -> Result<(), HostError> {
        let mut devices = self.lock();
        let devices = &mut *devices;
        let record = match (devices.entries.get_mut(&id), devices.returning.get_mut(&id)) {
            (Some(entry), _) => {
                entry.record.mountpoint.clone_from(&mountpoint);
                entry.journal.as_mut()
            }
            (None, Some(returning)) => Some(&mut returning.journal),
            (None, None) => return Err(HostError::NotFound(format!("number {id}"))),
        };
        if let (Some(journal), Some(record)) = (self.journal(), record) {
            record.mountpoint = mountpoint;
            recovery::keep_record(journal, record);
        }
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
            if let Some(returning) = devices.returning.get(&id) {
                if let Some(busy) = returning.busy() {
                    return Err(busy);
                }
                let returning = devices.returning.remove(&id).ok_or_else(missing)?;
                self.changed.notify_all();
                drop(devices);
                return self.remove_returning(&returning);
            }
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
        self.stop(entry)
    }

    /// Stops a device, and removes its record when it is gone.
    fn stop(&self, entry: TableEntry) -> Result<(), HostError> {
        let token = entry.journal.as_ref().map(|record| record.token);
        entry.stop()?;
        if let (Some(journal), Some(token)) = (self.journal(), token) {
            recovery::drop_record(journal, token);
        }
        Ok(())
    }

    /// Removes all unused devices and returns those in use. If there are none of these, no new device can be
    /// created any more.
    #[must_use]
    pub fn close(&self) -> Vec<DeviceRecord> {
        let (free, lost): (Vec<TableEntry>, Vec<Returning>) = {
            let mut devices = self.lock();
            let unused = devices.returning.extract_if(.., |_, device| device.is_unused());
            let lost = unused.map(|(_, device)| device).collect();
            self.changed.notify_all();
            let all = std::mem::take(&mut devices.entries);
            let (busy, free): (BTreeMap<_, _>, BTreeMap<_, _>) =
                all.into_iter().partition(|(_, entry)| in_use(&entry.record.device));
            devices.entries = busy;
            free.values().for_each(|entry| devices.forget(entry));
            (free.into_values().collect(), lost)
        };
        self.stop_all(free);
        for device in lost {
            if let Err(error) = self.remove_returning(&device) {
                tracing::warn!("A device was not removed cleanly: {}", with_causes(&error));
            }
        }
        if self.close_if_empty() { Vec::new() } else { self.list() }
    }

    /// Stops unused devices, several at a time; failures are logged.
    fn stop_all(&self, entries: Vec<TableEntry>) {
        let mut tokens = BTreeMap::new();
        let close = |entry: TableEntry| {
            entry.waits.close();
            let record = entry.journal.as_ref();
            tokens.extend(record.map(|record| (entry.device().to_owned(), record.token)));
            entry.served
        };
        for (device, error) in frontends::stop_all(entries.into_iter().map(close).collect()) {
            tokens.remove(&device);
            let error = with_causes(&error);
            tracing::warn!(device = %device.display(), error, "A device was not removed cleanly");
        }
        for (journal, token) in
            self.journal().into_iter().flat_map(|j| tokens.values().map(move |t| (j, t)))
        {
            recovery::drop_record(journal, *token);
        }
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

    /// True if devices of an earlier daemon are not back yet.
    pub(super) fn has_returning(&self) -> bool {
        !self.lock().returning.is_empty()
    }

    /// True if no device is served or about to be.
    pub(super) fn is_empty(&self) -> bool {
        let devices = self.lock();
        devices.is_empty()
    }

    /// Tests that no device is served or being attached; from then on no new one is accepted.
    pub(super) fn close_if_empty(&self) -> bool {
        let mut devices = self.lock();
        let empty = devices.is_empty();
        devices.closed |= empty;
        empty
    }
}

impl Devices {
    /// True if no device is served, returning or about to be made.
    fn is_empty(&self) -> bool {
        self.entries.is_empty() && self.returning.is_empty() && self.coming == 0
    }

    /// Refuses a name that a device has.
    fn check_name(&self, name: Option<&str>) -> Result<(), HostError> {
        let Some(name) = name else { return Ok(()) };
        let mut returning = self.returning.values();
        if let Some(device) =
            returning.find(|device| device.journal.spec.dev_id.as_deref() == Some(name))
        {
            let device = device.now().device;
            return Err(HostError::Taken { name: name.to_owned(), device });
        }
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
    /// Its node.
    pub(super) fn device(&self) -> &Path {
        &self.record.device
    }

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

pub(super) fn milliseconds(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// Creates the device, with the requested fallback. The second value is a note for the user.
fn serve(
    volume: Arc<dyn Volume>,
    spec: &DeviceSpec,
    dir: &Path,
    token: Option<DeviceToken>,
) -> Result<(Box<dyn ServedDevice>, Option<String>), HostError> {
    let choice = match spec.frontend {
        Frontend::Auto => FrontChoice::UblkOrLooped,
        Frontend::Ublk => FrontChoice::Only(FrontKind::Ublk),
        Frontend::Loop => FrontChoice::Only(FrontKind::Looped),
    };
    let (device, passed_over) = frontends::serve(volume, choice, dir, token)
        .map_err(|error| HostError::of_front(spec.image.name(), error))?;
    let note = passed_over.map(|why| {
        format!("{why}; served through FUSE and a loop device, which is slower than ublk")
    });
    Ok((device, note))
}

/// True if a mount, or another exclusive user, holds the block device, in any mount namespace. Reads nothing of the device, so it
/// does not wait for a server.
pub(super) fn in_use(device: &Path) -> bool {
    let opened = OpenOptions::new().read(true).custom_flags(libc::O_EXCL).open(device);
    matches!(opened, Err(error) if error.raw_os_error() == Some(libc::EBUSY))
}
