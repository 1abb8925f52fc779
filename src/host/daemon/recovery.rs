//! Devices of an earlier daemon of this run directory, taken back.
//!
//! A daemon reads its [`Journal`] when it starts. Each device of it *returns* on a thread of its own: its image is opened again, and
//! compared with what was served; then the kernel's device gets this process as its server (the order of steps is that of
//! [`frontends::ublk::recovery`]). Readers wait until then, and notice nothing else. New requests are answered meanwhile, and the lists show the
//! returning devices.
//!
//! | what is found | what happens |
//! |---|---|
//! | no device with the record's token, or another `diskseq` | the record is removed |
//! | a device that was never served, or did not survive its server | it is removed, with its record |
//! | the image cannot be opened now | again after a pause, up to [`LONGEST_PAUSE`], until a client detaches the device |
//! | the image is another one now | the device is lost: it stays until a client detaches it; never is another disk shown |
//! | the kernel lost the device (a daemon died while it armed the tags, on a driver before `QUIESCE_DEV`) | it is removed, its readers get EIO |
//!
//! One device that does not return holds up no other.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use client::protocol::DeviceState;
use client::{DeviceRecord, DeviceSpec, Frontend, mounts};
use frontends::ublk::recovery::{self, KernelDevice, KernelState, RecoveryStep};
use frontends::ublk::{UblkDevice, UblkError, probe};
use parking_lot::Mutex;
use rustix::mount::{UnmountFlags, unmount};
use source::failure::with_causes;
use thiserror::Error;

use super::journal::{DeviceStage, Journal, JournalRecord, RecordedDevice};
use super::table::{DeviceTable, TableEntry, in_use};
use super::{HostError, ServableImage};

/// Pause after the first failure of a device to return.
const FIRST_PAUSE: Duration = Duration::from_millis(200);

/// Longest pause between two tries. Readers wait at most so much longer than the registry was away.
const LONGEST_PAUSE: Duration = Duration::from_secs(10);

/// Longest wait for a dead server's last descriptor, before the device's state is believed.
const RELEASE: Duration = Duration::from_secs(60);

/// A device of an earlier daemon that is not served yet.
pub(super) struct Returning {
    pub(super) journal: JournalRecord,
    /// The reason why it is not served yet, once a try has failed.
    trouble: Option<String>,
    /// True if it never returns.
    is_lost: bool,
    /// True while the kernel's device changes hands: then it cannot be removed.
    changes_hands: bool,
}

impl Returning {
    /// The device for a list. Nothing is asked of the device, which would wait.
    pub(super) fn now(&self) -> DeviceRecord {
        let (spec, number) = (&self.journal.spec, self.journal.number);
        let trouble = self.trouble.as_deref().unwrap_or("It is being taken back");
        DeviceRecord {
            image: self.journal.image.clone(),
            mountpoint: self.journal.mountpoint.clone(),
            state: if self.is_lost { DeviceState::Failed } else { DeviceState::Stalled },
            size_bytes: self.journal.size_bytes,
            since_unix_s: self.journal.since_unix_s,
            trouble: Some(trouble.to_owned()),
            ..DeviceRecord::new(number, spec, Frontend::Ublk, self.node())
        }
    }

    fn node(&self) -> PathBuf {
        node(self.journal.device)
    }

    /// Error of a client that asks for the removal; `None`: it can be removed.
    pub(super) fn busy(&self) -> Option<HostError> {
        let busy = |mounted| Some(HostError::Busy { device: self.node(), mounted });
        if self.changes_hands {
            return busy(" (it is being taken back from an earlier daemon)".to_owned());
        }
        let place = self.journal.mountpoint.as_ref();
        let place = place.map(|place| format!(" (mounted at {})", place.display()));
        if in_use(&self.node()) { busy(place.unwrap_or_default()) } else { None }
    }

    /// True if it can be removed now.
    pub(super) fn is_unused(&self) -> bool {
        !self.changes_hands && !in_use(&self.node())
    }
}

fn node(device: Option<RecordedDevice>) -> PathBuf {
    device.map_or_else(
        || PathBuf::from("/dev/ublkb?"),
        |device| PathBuf::from(format!("/dev/ublkb{}", device.id)),
    )
}

/// Reason why a device has not returned.
#[derive(Debug, Error)]
enum ReturnError {
    /// The image cannot be opened, or the driver does not give the device yet.
    #[error(transparent)]
    NotNow(#[from] HostError),
    /// The driver refuses.
    #[error("The driver does not give {device} back", device = .device.display())]
    Driver {
        /// The device.
        device: PathBuf,
        /// Its answer.
        #[source]
        source: UblkError,
    },
    /// The disk is another one.
    #[error("{image} is not what {device} showed: {what}", device = .device.display())]
    Another {
        /// The image.
        image: String,
        /// The device.
        device: PathBuf,
        /// The difference.
        what: &'static str,
    },
}

/// ReturnOutcome of a try.
enum ReturnOutcome {
    /// The device is served.
    Served(Box<TableEntry>),
    /// There is no device any more.
    Gone,
    /// A client has removed it in the meantime.
    Detached,
}

/// The record of a device that is about to be made, in the journal. `None`, with a warning: the device does not survive this daemon.
pub(super) fn begin_record(
    journal: Option<&Journal>,
    spec: &DeviceSpec,
    number: u64,
    image: &ServableImage,
) -> Option<JournalRecord> {
    let may_be_ublk = spec.frontend != Frontend::Loop && Path::new(probe::CONTROL).exists();
    let journal = journal.filter(|_| may_be_ublk)?;
    let record = JournalRecord {
        boot: journal.boot().to_owned(),
        token: recovery::DeviceToken::draw().number(),
        stage: DeviceStage::Making,
        number,
        spec: spec.clone(),
        image: image.name.clone(),
        identity: image.identity.clone(),
        size_bytes: image.volume.size(),
        since_unix_s: 0,
        mountpoint: None,
        device: None,
    };
    match journal.write(&record) {
        Ok(()) => Some(record),
        Err(error) => {
            tracing::warn!(%error, "The device of {} will not survive this daemon: its record cannot be written", image.name);
            None
        }
    }
}

/// Completes the record of a device that is served now; removes it if the device is none of ublk.
pub(super) fn complete_record(
    journal: Option<&Journal>,
    record: Option<JournalRecord>,
    device: Result<Option<KernelDevice>, UblkError>,
    since_unix_s: u64,
) -> Option<JournalRecord> {
    let (journal, record) = (journal?, record?);
    let device = match device {
        Ok(None) => {
            drop_record(journal, record.token);
            return None;
        }
        Ok(Some(device)) => Some(RecordedDevice { id: device.id, diskseq: device.diskseq }),
        // The token finds it.
        Err(_) => None,
    };
    let record = JournalRecord { stage: DeviceStage::Serving, device, since_unix_s, ..record };
    keep_record(journal, &record);
    Some(record)
}

/// Writes a changed record. A failure is no harm: the token of the older one finds the device too.
pub(super) fn keep_record(journal: &Journal, record: &JournalRecord) {
    if let Err(error) = journal.write(record) {
        tracing::warn!(%error, "The record of a device is not up to date");
    }
}

/// Removes a record. A failure is no harm: the next daemon finds no device for it.
pub(super) fn drop_record(journal: &Journal, token: u64) {
    if let Err(error) = journal.remove(token) {
        tracing::warn!(%error, "The record of a removed device stays");
    }
}

impl DeviceTable {
    /// Reads the journal; from then on the lists show its devices. Returns the numbers of those that must
    /// [return](Self::bring_back).
    pub(super) fn read_journal(&self) -> Vec<u64> {
        let Some(journal) = self.journal() else { return Vec::new() };
        let (records, refused) = match journal.read() {
            Ok(read) => read,
            Err(error) => {
                tracing::error!(%error, "The records of an earlier daemon cannot be read: its devices stay without a server");
                return Vec::new();
            }
        };
        for (path, error) in refused {
            let error = with_causes(&error);
            tracing::error!(
                "{} is passed over, and its device stays without a server: {error}",
                path.display()
            );
        }
        let mut devices = self.lock();
        for journal in records {
            drop_copies(&journal);
            let number = journal.number;
            devices.last = devices.last.max(number);
            let returning =
                Returning { journal, trouble: None, is_lost: false, changes_hands: false };
            devices.returning.insert(number, returning);
        }
        devices.returning.keys().copied().collect()
    }

    /// Serves a device of the journal again. Returns when it is served, gone, lost or detached.
    pub(super) fn bring_back(&self, number: u64) {
        let mut pause = FIRST_PAUSE;
        let begun = Instant::now();
        loop {
            let record = self.lock().returning.get(&number).map(|device| device.journal.clone());
            let Some(record) = record else { return };
            let error = match self.try_back(&record) {
                Ok(ReturnOutcome::Served(mut entry)) => {
                    let mut devices = self.lock();
                    let returning = devices.returning.remove(&number);
                    // A client may have told a new one in the meantime.
                    let mountpoint = returning.and_then(|returning| returning.journal.mountpoint);
                    entry.record.mountpoint.clone_from(&mountpoint);
                    if let (Some(journal), Some(record)) = (self.journal(), &mut entry.journal) {
                        record.mountpoint = mountpoint;
                        keep_record(journal, record);
                    }
                    tracing::warn!(device = %entry.device().display(), "{}: taken back from an earlier daemon in {:.1?}", record.image, begun.elapsed());
                    devices.entries.insert(number, *entry);
                    return;
                }
                Ok(ReturnOutcome::Gone) => {
                    self.lock().returning.remove(&number);
                    if let Some(journal) = self.journal() {
                        drop_record(journal, record.token);
                    }
                    return;
                }
                Ok(ReturnOutcome::Detached) => return,
                Err(error) => error,
            };
            let is_lost = matches!(error, ReturnError::Another { .. });
            let text = with_causes(&error);
            let mut devices = self.lock();
            let Some(device) = devices.returning.get_mut(&number) else { return };
            device.changes_hands = false;
            if device.trouble.as_ref() != Some(&text) {
                let next = if is_lost {
                    "it is lost, its readers wait until `turbobd detach` removes it"
                } else {
                    "its readers wait, and it is tried again"
                };
                tracing::error!(device = %device.node().display(), "{} is not taken back, {next}: {text}", record.image);
            }
            device.trouble = Some(text);
            device.is_lost = is_lost;
            if is_lost {
                return;
            }
            self.changed().wait_for(&mut devices, pause);
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    /// Gives up a device that is returning, and that nothing uses.
    pub(super) fn remove_returning(&self, device: &Returning) -> Result<(), HostError> {
        let record = &device.journal;
        if let Some(found) = find(record).map_err(|error| self.refused(record, error))? {
            recovery::remove_orphan(found.id).map_err(|error| self.refused(record, error))?;
        }
        if let Some(journal) = self.journal() {
            drop_record(journal, record.token);
        }
        Ok(())
    }

    fn refused(&self, record: &JournalRecord, source: UblkError) -> HostError {
        HostError::Ublk { image: record.image.clone(), source }
    }

    fn try_back(&self, record: &JournalRecord) -> Result<ReturnOutcome, ReturnError> {
        let driver = |source| ReturnError::Driver { device: node(record.device), source };
        let Some(found) = find(record).map_err(driver)? else { return Ok(ReturnOutcome::Gone) };
        let found = settled(found).map_err(driver)?;
        let Some(found) = found else { return Ok(ReturnOutcome::Gone) };
        if !found.survives || found.state == KernelState::Dead {
            tracing::warn!(device = %found.path().display(), "{}: its device did not survive an earlier daemon, and is removed", record.image);
            recovery::remove_orphan(found.id).map_err(driver)?;
            return Ok(ReturnOutcome::Gone);
        }
        if record.stage == DeviceStage::Arming && recovery::arming_is_deadly().map_err(driver)? {
            tracing::error!(device = %found.path().display(), "{}: an earlier daemon died while it took the device back, and this kernel loses it then: its readers get EIO, and it is removed", record.image);
            recovery::remove_orphan(found.id).map_err(driver)?;
            return Ok(ReturnOutcome::Gone);
        }
        // From here on the node is known, also if the record was written before it.
        let record = JournalRecord {
            device: Some(RecordedDevice { id: found.id, diskseq: found.diskseq }),
            ..record.clone()
        };
        let image = self.open_again(&record)?;
        let another =
            |what| ReturnError::Another { image: record.image.clone(), device: found.path(), what };
        if image.volume.size() != record.size_bytes || image.volume.size() != found.size {
            return Err(another("its size differs"));
        }
        if image.identity != record.identity {
            return Err(another("its layers differ"));
        }
        {
            let mut devices = self.lock();
            let Some(device) = devices.returning.get_mut(&record.number) else {
                return Ok(ReturnOutcome::Detached);
            };
            device.journal = record.clone();
            device.changes_hands = true;
        }
        self.take_back(record, &found, image)
    }

    fn open_again(&self, record: &JournalRecord) -> Result<ServableImage, HostError> {
        let mut spec = record.spec.clone();
        if spec.image.manifest.is_none() {
            // The tag may have moved since.
            spec.image.manifest = record.identity.as_ref().and_then(|identity| identity.manifest);
        }
        self.open(&spec)
    }

    fn take_back(
        &self,
        record: JournalRecord,
        found: &KernelDevice,
        image: ServableImage,
    ) -> Result<ReturnOutcome, ReturnError> {
        let start = Instant::now();
        let (waits, volume) = self.watch(&image)?;
        let written = Mutex::new(record.clone());
        let mut note = |step: RecoveryStep| {
            let mut record = written.lock();
            record.stage = step.into();
            if let Some(device) = self.lock().returning.get_mut(&record.number) {
                device.journal.stage = record.stage;
            }
            self.journal().map_or(Ok(()), |journal| journal.write(&record))
        };
        let before = record.stage.step();
        let served = match UblkDevice::take_back(volume, found, before, &mut note) {
            Ok(served) => served,
            Err(error) if error.leaves_the_device() => {
                return Err(ReturnError::Driver { device: found.path(), source: error });
            }
            Err(error) => {
                tracing::error!(device = %found.path().display(), "{}: {}", record.image, with_causes(&error));
                return Ok(ReturnOutcome::Gone);
            }
        };
        let record = JournalRecord { stage: DeviceStage::Serving, ..record };
        let spec = record.spec.clone();
        let times = [Duration::ZERO, start.elapsed()];
        let mut entry = self.entry(&spec, record.number, image, waits, Box::new(served), times);
        entry.record.since_unix_s = record.since_unix_s;
        entry.journal = Some(record);
        Ok(ReturnOutcome::Served(Box::new(entry)))
    }
}

/// Takes the mounts of a device out of this process's mount namespace, which copied them when it was made. Where the host's mounts
/// are private, an unmount there would leave them here, and the device in use.
fn drop_copies(record: &JournalRecord) {
    let Some(device) = record.device else { return };
    if device.diskseq.is_none() || recovery::diskseq(device.id) != device.diskseq {
        return;
    }
    for place in mounts::mounted_from(&node(record.device)).unwrap_or_default().iter().rev() {
        let flags = UnmountFlags::DETACH | UnmountFlags::NOFOLLOW;
        if let Err(error) = unmount(place, flags) {
            tracing::warn!(%error, "The daemon keeps a copy of the mount at {}", place.display());
        }
    }
}

/// The kernel's device of a record; `None`: it is gone.
fn find(record: &JournalRecord) -> Result<Option<KernelDevice>, UblkError> {
    let Some(token) = record.token() else { return Ok(None) };
    let is_it = |device: &KernelDevice| {
        // A disk that was stopped has no number any more.
        let recorded = record.device.and_then(|recorded| recorded.diskseq);
        let same_disk =
            device.diskseq.is_none() || recorded.is_none() || recorded == device.diskseq;
        device.token == Some(token) && same_disk
    };
    if let Some(recorded) = record.device {
        return Ok(recovery::kernel_device(recorded.id)?.filter(is_it));
    }
    Ok(recovery::kernel_devices()?.into_iter().find(is_it))
}

/// Waits until a dead server has closed a device that does not survive it: until then, it looks live.
fn settled(found: KernelDevice) -> Result<Option<KernelDevice>, UblkError> {
    let begun = Instant::now();
    let mut now = found;
    while !now.survives && now.state == KernelState::Live && begun.elapsed() < RELEASE {
        std::thread::sleep(FIRST_PAUSE / 20);
        match recovery::kernel_device(now.id)? {
            Some(device) => now = device,
            None => return Ok(None),
        }
    }
    Ok(Some(now))
}

/// Brings the devices of the journal back, each on a thread of its own.
pub(super) fn bring_all_back<T>(server: &Arc<T>, table: fn(&T) -> &DeviceTable, done: fn(&T))
where
    T: Send + Sync + 'static,
{
    for number in table(server).read_journal() {
        let owned = server.clone();
        let body = move || {
            table(&owned).bring_back(number);
            done(&owned);
        };
        let thread = std::thread::Builder::new().name("recovery".into()).spawn(body);
        if let Err(error) = thread {
            tracing::error!(%error, "A device of an earlier daemon waits for the next daemon: no thread can be started");
        }
    }
}
