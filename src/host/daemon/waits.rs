//! The reads of a device that wait for their bytes: their start, their deadline, and the action after it.
//!
//! A [`Watched`] volume stands between a front end and the disk. It adds no cost to a read whose bytes are
//! there. When a read has to wait, the front end's waiter is kept here under a number, and the disk gets
//! another waiter that ends the wait here. So the daemon knows at any time how long each read has waited, and
//! a read whose deadline has passed is ended ([`OnError::Eio`]) although the disk has not answered yet.
//!
//! With [`OnError::Wait`] a read never ends that way. When it fails for a temporary reason (the registry
//! cannot be reached, but not: the blob does not exist), the front end does not get the error. Instead, after
//! a pause, it gets the signal to ask again, which fetches the bytes anew. The pauses double from
//! [`FIRST_PAUSE`] to [`LONGEST_PAUSE`], as upstream's do, but without upstream's end after seven days.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use parking_lot::{Mutex, MutexGuard};

use super::alarm::Bell;
use super::audit::AuditedDevice;
use super::outage::{Outage, STALLED};
use crate::config::OnError;
use crate::readings::WaitReading;
use blobs::Histogram;
use disk::DiskRange;
use disk::volume::{Located, Volume, VolumeError, Waiter, WritableVolume};
use threads::Counter;

/// Pause after the first failure of a read. Most of the waiting is done by the client of the registry, which
/// gives up only after the deadline; so this is short.
const FIRST_PAUSE: Duration = Duration::from_millis(20);

/// Longest pause: a registry that is back should be noticed soon.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// Time for which a read that failed after a long wait fails again at once, unless its bytes have come. The kernel asks a
/// second time, page by page, for what a read-ahead did not get, before the program sees the error: its deadline would pass
/// twice.
const ASKED_AGAIN: Duration = Duration::from_secs(1);

/// A wait that a program notices as one.
const LONG: Duration = Duration::from_secs(1);

/// Deadline of reads, and the action after it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReadPolicy {
    /// Time from the moment that a read has to wait.
    pub deadline: Duration,
    /// Action after the deadline.
    pub on_error: OnError,
}

/// A minute: longer than any healthy answer takes, and than a registry's restart; shorter than the two
/// minutes after which the kernel reports a hung task.
impl Default for ReadPolicy {
    fn default() -> Self {
        Self { deadline: Duration::from_secs(60), on_error: OnError::Eio }
    }
}

/// The waits of one device.
pub(super) struct Waits {
    policy: ReadPolicy,
    bell: Bell,
    reason: Box<dyn Fn() -> Option<String> + Send + Sync>,
    table: Mutex<WaitTable>,
    /// Number of reads that failed: zero means that a read need not take the lock.
    failing: AtomicUsize,
    closed: AtomicBool,
    times: Histogram,
    expired: Counter,
    repeated: Counter,
    audit: OnceLock<AuditedDevice>,
    outage: Outage,
}

#[derive(Default)]
struct WaitTable {
    last: u64,
    /// Reads that wait for the disk, in the order in which they came. They wait since their last request, so
    /// the first is due first.
    waiting: BTreeMap<u64, Waiting>,
    /// Reads that failed and will ask again, or have asked again and wait.
    failed: HashMap<DiskRange, Failed>,
    /// Reads that have failed after a long wait, with the time of the failure, the oldest first.
    late: Vec<(DiskRange, Instant)>,
}

struct Waiting {
    range: DiskRange,
    since: Instant,
    waiter: Waiter,
}

struct Failed {
    since: Instant,
    tries: u32,
    error: String,
    next: Instant,
    /// Waiters that ask again at `next`; empty when they have.
    waiters: Vec<Waiter>,
}

/// A read that waits, for display.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct WaitingRead {
    /// Its bytes of the disk.
    pub range: DiskRange,
    /// Time that it has waited.
    pub waits: Duration,
    /// Number of failures.
    pub tries: u32,
    /// Its last error.
    pub error: Option<String>,
    /// Time until it is repeated; `None` if it is in flight.
    pub next: Option<Duration>,
}

impl Waits {
    /// Creates the waits of a device. `reason` returns the disk's present problem, for the error of a read
    /// that is late.
    pub(super) fn new(
        policy: ReadPolicy,
        bell: Bell,
        reason: impl Fn() -> Option<String> + Send + Sync + 'static,
    ) -> Arc<Self> {
        Arc::new(Self {
            policy,
            bell,
            reason: Box::new(reason),
            table: Mutex::default(),
            failing: AtomicUsize::new(0),
            closed: AtomicBool::new(false),
            times: Histogram::default(),
            expired: Counter::default(),
            repeated: Counter::default(),
            audit: OnceLock::new(),
            outage: Outage::default(),
        })
    }

    /// Has each wait noted when it is over.
    pub(super) fn audit(&self, device: AuditedDevice) {
        let _ = self.audit.set(device);
    }

    /// The device is there.
    pub(super) fn named(&self, device: &str) {
        self.outage.named(device);
        if let Some(audit) = self.audit.get() {
            audit.named(device);
        }
    }

    /// A wait is over, without an error or with one.
    fn over(&self, range: DiskRange, took: Duration, error: Option<String>) {
        self.times.add(took);
        match &error {
            // A device that is being removed has no users.
            Some(_) if self.closed.load(Ordering::Relaxed) => {}
            Some(error) => self.outage.failed(Instant::now(), range, error),
            None => self.succeeded(),
        }
        if let Some(audit) = self.audit.get() {
            audit.read(range, took, error);
        }
    }

    /// A read was answered with its bytes.
    fn succeeded(&self) {
        if self.outage.is_on() {
            let now = Instant::now();
            let stalls = self.lock().reads(now).any(|read| read.waits >= STALLED);
            if !stalls {
                self.outage.succeeded(now);
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, WaitTable> {
        self.table.lock()
    }

    /// Begins a wait. The returned waiter stands for `waiter`.
    fn begin(self: &Arc<Self>, range: DiskRange, waiter: Waiter) -> Waiter {
        let since = Instant::now();
        let mut table = self.lock();
        if table.has_just_failed(range, since) {
            drop(table);
            let last = Some("the same read has just waited so long".to_owned());
            let seconds = self.policy.deadline.as_secs();
            waiter(Err(VolumeError::Deadline { offset: range.offset, seconds, last }));
            return Box::new(|_| {});
        }
        table.last += 1;
        let number = table.last;
        table.waiting.insert(number, Waiting { range, since, waiter });
        drop(table);
        self.bell.by(since + self.deadline().unwrap_or(STALLED).min(STALLED));
        let mut promise = DiskPromise { waits: Some(self.clone()), number };
        Box::new(move |result| promise.keep(Some(result)))
    }

    /// Ends a wait: the disk has answered, or (`None`) dropped the waiter.
    fn end(&self, number: u64, result: Option<Result<(), VolumeError>>) {
        let now = Instant::now();
        let mut table = self.lock();
        // `None`: its deadline has passed.
        let Some(Waiting { range, since, waiter }) = table.waiting.remove(&number) else { return };
        match result {
            Some(Err(error)) if self.deadline().is_none() && error.may_pass() => {
                let next = table.failed(range, since, waiter, &error);
                self.failing.store(table.failed.len(), Ordering::Relaxed);
                drop(table);
                self.bell.by(next);
            }
            result => {
                let failed = table.failed.remove(&range);
                self.failing.store(table.failed.len(), Ordering::Relaxed);
                drop(table);
                let (since, others) =
                    failed.map_or((since, Vec::new()), |failed| (failed.since, failed.waiters));
                let error = match &result {
                    Some(result) => {
                        result.as_ref().err().map(|error| source::failure::with_causes(error))
                    }
                    None => Some("The disk has given the read up".to_owned()),
                };
                let took = now.saturating_duration_since(since);
                if error.is_some() && took >= LONG {
                    self.lock().late.push((range, now));
                }
                self.over(range, took, error);
                // If it is dropped uncalled, the front end's waiter is an error too.
                if let Some(result) = result {
                    waiter(result);
                }
                // Other waits for the same read, which failed before: they may succeed now.
                others.into_iter().for_each(|other| other(Ok(())));
            }
        }
    }

    /// Records a read that was answered at once, which ends its failures.
    fn answered(&self, range: DiskRange) {
        if self.failing.load(Ordering::Relaxed) == 0 {
            return self.succeeded();
        }
        let mut table = self.lock();
        let failed = table.failed.remove(&range);
        self.failing.store(table.failed.len(), Ordering::Relaxed);
        drop(table);
        if let Some(failed) = failed {
            self.over(range, failed.since.elapsed(), None);
            failed.waiters.into_iter().for_each(|waiter| waiter(Ok(())));
        }
    }

    /// Handles the waits that are due at `now`, and returns the time of the next one.
    pub(super) fn due(&self, now: Instant) -> Option<Instant> {
        let (mut late, mut again, mut next) = (Vec::new(), Vec::new(), None);
        let mut table = self.lock();
        while let Some(deadline) = self.deadline()
            && let Some(first) = table.waiting.first_entry()
        {
            let at = first.get().since + deadline;
            if at > now {
                next = Some(at);
                break;
            }
            late.push(first.remove());
        }
        for failed in table.failed.values_mut().filter(|failed| !failed.waiters.is_empty()) {
            if failed.next <= now || self.closed.load(Ordering::Relaxed) {
                again.append(&mut failed.waiters);
            } else {
                next = [next, Some(failed.next)].into_iter().flatten().min();
            }
        }
        let stalled =
            table.reads(now).filter(|read| read.waits >= STALLED).max_by_key(|read| read.waits);
        let soon = table.waiting.values().map(|read| read.since + STALLED).find(|&at| at > now);
        next = [next, soon].into_iter().flatten().min();
        table.late.extend(late.iter().map(|wait| (wait.range, now)));
        drop(table);
        if let Some(read) = stalled
            && !self.outage.is_on()
        {
            let reason = read.error.or_else(|| (self.reason)());
            self.outage.stalled(now, read.range, read.waits, reason.as_deref());
        }
        self.repeated.add(again.len() as u64);
        again.into_iter().for_each(|waiter| waiter(Ok(())));
        let last = if late.is_empty() { None } else { (self.reason)() };
        for Waiting { range, since, waiter } in late {
            self.expired.add(1);
            let (seconds, last) = (self.policy.deadline.as_secs(), last.clone());
            let error = VolumeError::Deadline { offset: range.offset, seconds, last };
            self.over(range, now.saturating_duration_since(since), Some(error.to_string()));
            waiter(Err(error));
        }
        next
    }

    /// Longest wait of a read; `None`: no limit.
    fn deadline(&self) -> Option<Duration> {
        if self.closed.load(Ordering::Relaxed) {
            return Some(Duration::ZERO);
        }
        (self.policy.on_error == OnError::Eio).then_some(self.policy.deadline)
    }

    /// Ends all waits: the device is being removed, so it has no users.
    pub(super) fn close(&self) {
        self.closed.store(true, Ordering::Relaxed);
        self.bell.by(Instant::now());
    }

    /// State now.
    #[must_use]
    pub(super) fn reading(&self) -> WaitReading {
        let now = Instant::now();
        let table = self.lock();
        let asleep = table.failed.values().map(|failed| failed.waiters.len()).sum::<usize>();
        let oldest = table.reads(now).map(|read| read.waits).max();
        WaitReading {
            waiting: (table.waiting.len() + asleep) as u64,
            oldest,
            times: self.times.times(),
            expired: self.expired.get(),
            repeated: self.repeated.get(),
        }
    }

    /// The longest wait in microseconds since the last call.
    #[must_use]
    pub(super) fn take_longest(&self) -> u64 {
        self.times.take_longest()
    }

    /// The reads that wait now, the oldest first, at most `most`.
    #[must_use]
    pub(super) fn oldest(&self, most: usize) -> Vec<WaitingRead> {
        let now = Instant::now();
        let table = self.lock();
        let mut reads: Vec<_> = table.reads(now).collect();
        reads.sort_by_key(|read| std::cmp::Reverse(read.waits));
        reads.truncate(most);
        reads
    }
}

impl WaitTable {
    /// True if the kernel asks once more for what has just failed after a long wait.
    fn has_just_failed(&mut self, range: DiskRange, now: Instant) -> bool {
        self.late.retain(|(_, at)| now.saturating_duration_since(*at) < ASKED_AGAIN);
        let overlaps = |late: &DiskRange| {
            late.offset < range.offset + range.len && range.offset < late.offset + late.len
        };
        self.late.iter().any(|(late, _)| overlaps(late))
    }

    /// Records that a read has failed, and returns the time of its next try.
    fn failed(
        &mut self,
        range: DiskRange,
        since: Instant,
        waiter: Waiter,
        error: &VolumeError,
    ) -> Instant {
        let failed = self.failed.entry(range).or_insert_with(|| Failed {
            since,
            tries: 0,
            error: String::new(),
            next: since,
            waiters: Vec::new(),
        });
        if failed.waiters.is_empty() {
            failed.tries += 1;
            let pause = FIRST_PAUSE.saturating_mul(1 << (failed.tries - 1).min(20));
            failed.next = Instant::now() + pause.min(LONGEST_PAUSE);
        }
        failed.error = source::failure::with_causes(error);
        failed.waiters.push(waiter);
        failed.next
    }

    /// The reads that wait, in no order.
    fn reads(&self, now: Instant) -> impl Iterator<Item = WaitingRead> + '_ {
        let on_their_way = self.waiting.values().map(move |read| {
            let failed = self.failed.get(&read.range);
            let since = failed.map_or(read.since, |failed| failed.since);
            WaitingRead {
                range: read.range,
                waits: now.saturating_duration_since(since),
                tries: failed.map_or(0, |failed| failed.tries),
                error: failed.map(|failed| failed.error.clone()),
                next: None,
            }
        });
        let asleep = self.failed.iter().filter(|(_, failed)| !failed.waiters.is_empty());
        on_their_way.chain(asleep.map(move |(range, failed)| WaitingRead {
            range: *range,
            waits: now.saturating_duration_since(failed.since),
            tries: failed.tries,
            error: Some(failed.error.clone()),
            next: Some(failed.next.saturating_duration_since(now)),
        }))
    }
}

/// The one answer of the disk.
struct DiskPromise {
    waits: Option<Arc<Waits>>,
    number: u64,
}

impl DiskPromise {
    fn keep(&mut self, result: Option<Result<(), VolumeError>>) {
        if let Some(waits) = self.waits.take() {
            waits.end(self.number, result);
        }
    }
}

impl Drop for DiskPromise {
    fn drop(&mut self) {
        self.keep(None);
    }
}

/// A volume whose waits are watched.
pub(super) struct Watched {
    volume: Arc<dyn Volume>,
    waits: Arc<Waits>,
}

impl Watched {
    pub(super) fn new(volume: Arc<dyn Volume>, waits: Arc<Waits>) -> Self {
        Self { volume, waits }
    }
}

impl Volume for Watched {
    fn size(&self) -> u64 {
        self.volume.size()
    }

    fn locate(
        &self,
        range: DiskRange,
        waiter: &mut dyn FnMut() -> Waiter,
    ) -> Result<Located, VolumeError> {
        let located = self.volume.locate(range, &mut || self.waits.begin(range, waiter()));
        let located = located.inspect_err(|error| {
            let error = source::failure::with_causes(error);
            self.waits.outage.failed(Instant::now(), range, &error);
        })?;
        if matches!(located, Located::Ready(_)) {
            self.waits.answered(range);
        }
        Ok(located)
    }

    fn writable(&self) -> Option<&dyn WritableVolume> {
        self.volume.writable()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU32;
    use std::sync::mpsc::{Receiver, channel};

    use super::super::alarm::Alarm;
    use super::*;
    use disk::testing::MemoryVolume;
    use source::SourceError;
    use source::chunk::ChunkError;

    /// A disk with prepared answers: `Some(error)` late, `None` never; after these, the answers of memory.
    struct Told {
        memory: MemoryVolume,
        answers: Mutex<Vec<Option<Result<(), VolumeError>>>>,
        kept: Mutex<Vec<Waiter>>,
        asked: AtomicU32,
    }

    impl Told {
        fn new(answers: Vec<Option<Result<(), VolumeError>>>) -> Arc<Self> {
            Arc::new(Self {
                memory: MemoryVolume::new(vec![7; 8192]),
                answers: Mutex::new(answers),
                kept: Mutex::default(),
                asked: AtomicU32::new(0),
            })
        }
    }

    impl Volume for Told {
        fn size(&self) -> u64 {
            self.memory.size()
        }
        fn locate(
            &self,
            range: DiskRange,
            waiter: &mut dyn FnMut() -> Waiter,
        ) -> Result<Located, VolumeError> {
            self.asked.fetch_add(1, Ordering::SeqCst);
            let mut answers = self.answers.lock();
            if answers.is_empty() {
                return self.memory.locate(range, waiter);
            }
            let waiter = waiter();
            match answers.remove(0) {
                None => self.kept.lock().push(waiter),
                Some(result) => drop(std::thread::spawn(move || {
                    std::thread::sleep(Duration::from_millis(5));
                    waiter(result);
                })),
            }
            Ok(Located::Pending)
        }
    }

    fn remote(lasting: bool) -> VolumeError {
        let (name, reason) = ("b".to_owned(), "no route".to_owned());
        let source = SourceError::Remote { name, offset: 0, end: 1, reason, lasting };
        VolumeError::Chunk { offset: 0, layer: 0, source: Arc::new(ChunkError::Source(source)) }
    }

    struct Watch {
        _alarm: Alarm,
        waits: Arc<Waits>,
        told: Arc<Told>,
        volume: Arc<Watched>,
    }

    fn watch(on_error: OnError, deadline: u64, told: Arc<Told>) -> Watch {
        let alarm = Alarm::new();
        let policy = ReadPolicy { deadline: Duration::from_millis(deadline), on_error };
        let waits = Waits::new(policy, alarm.bell(), || Some("no route".to_owned()));
        alarm.watch(&waits).unwrap();
        let volume = Arc::new(Watched::new(told.clone(), waits.clone()));
        Watch { _alarm: alarm, waits, told, volume }
    }

    fn read(watch: &Watch) -> Receiver<Result<(), VolumeError>> {
        let (sender, receiver) = channel();
        let volume = watch.volume.clone();
        std::thread::spawn(move || sender.send(volume.read_at(&mut [0; 512], 512)));
        receiver
    }

    #[test]
    fn a_read_that_nobody_answers_ends_at_its_deadline_and_says_what_is_wrong() {
        let watch = watch(OnError::Eio, 100, Told::new(vec![None, None]));
        let reads = [read(&watch), read(&watch)];
        std::thread::sleep(Duration::from_millis(50));
        let now = watch.waits.reading();
        assert_eq!((now.waiting, now.expired), (2, 0));
        assert!(now.oldest > Some(Duration::from_millis(10)), "{now:?}");
        assert_eq!(watch.waits.oldest(1)[0].range.offset, 512);
        for read in reads {
            let error = read.recv_timeout(Duration::from_secs(10)).unwrap().unwrap_err();
            assert!(matches!(error, VolumeError::Deadline { offset: 512, .. }), "{error}");
            assert!(error.to_string().ends_with(": no route"), "{error}");
        }
        let now = watch.waits.reading();
        assert_eq!((now.waiting, now.expired, now.times.count()), (0, 2, 2));
        // A late answer is ignored, and the next read is served.
        watch.told.kept.lock().drain(..).for_each(|waiter| waiter(Ok(())));
        read(&watch).recv_timeout(Duration::from_secs(10)).unwrap().unwrap();
        assert_eq!(watch.waits.reading().times.count(), 2);
    }

    #[test]
    fn with_the_policy_to_wait_what_may_pass_is_asked_for_until_it_has() {
        let answers = vec![Some(Err(remote(false))), Some(Err(remote(false))), Some(Ok(()))];
        let watch = watch(OnError::Wait, 10, Told::new(answers));
        read(&watch).recv_timeout(Duration::from_secs(10)).unwrap().unwrap();
        assert_eq!(watch.told.asked.load(Ordering::SeqCst), 4);
        let now = watch.waits.reading();
        assert_eq!((now.waiting, now.repeated, now.expired), (0, 2, 0));
        assert_eq!(now.times.count(), 1, "one read, however often it was asked for");
        assert_eq!(watch.waits.failing.load(Ordering::SeqCst), 0);
    }

    #[test]
    fn a_read_that_is_answered_at_once_when_it_asks_again_is_forgotten() {
        let watch = watch(OnError::Wait, 10, Told::new(vec![Some(Err(remote(false)))]));
        read(&watch).recv_timeout(Duration::from_secs(10)).unwrap().unwrap();
        assert_eq!(watch.waits.failing.load(Ordering::SeqCst), 0);
        assert!(watch.waits.oldest(9).is_empty());
    }

    #[test]
    fn a_read_that_the_kernel_asks_twice_waits_once() {
        let watch = watch(OnError::Eio, 300, Told::new(vec![None, None]));
        read(&watch).recv_timeout(Duration::from_secs(10)).unwrap().unwrap_err();
        let error = read(&watch).recv_timeout(Duration::from_secs(10)).unwrap().unwrap_err();
        assert!(matches!(error, VolumeError::Deadline { .. }), "{error}");
        // It was not waited for: no second wait has expired.
        assert_eq!(
            (watch.waits.reading().expired, watch.told.asked.load(Ordering::SeqCst)),
            (1, 2)
        );
        // What has come meanwhile is served at once.
        read(&watch).recv_timeout(Duration::from_secs(10)).unwrap().unwrap();
    }

    #[test]
    fn what_can_never_succeed_fails_at_once_whatever_the_policy() {
        for on_error in [OnError::Eio, OnError::Wait] {
            let watch = watch(on_error, 60_000, Told::new(vec![Some(Err(remote(true)))]));
            let error = read(&watch).recv_timeout(Duration::from_secs(10)).unwrap().unwrap_err();
            assert!(matches!(error, VolumeError::Chunk { .. }), "{error}");
            assert_eq!(watch.told.asked.load(Ordering::SeqCst), 1);
        }
    }

    #[test]
    fn nobody_waits_for_a_device_that_goes() {
        for on_error in [OnError::Eio, OnError::Wait] {
            let watch = watch(on_error, 60_000, Told::new(vec![None]));
            let read = read(&watch);
            while watch.told.kept.lock().is_empty() {
                std::thread::yield_now();
            }
            watch.waits.close();
            let error = read.recv_timeout(Duration::from_secs(10)).unwrap().unwrap_err();
            assert!(matches!(error, VolumeError::Deadline { .. }), "{error}");
        }
    }

    #[test]
    fn a_waiter_that_the_disk_drops_is_dropped() {
        let watch = watch(OnError::Wait, 10, Told::new(vec![None]));
        let read = read(&watch);
        while watch.told.kept.lock().is_empty() {
            std::thread::yield_now();
        }
        watch.told.kept.lock().clear();
        let error = read.recv_timeout(Duration::from_secs(10)).unwrap().unwrap_err();
        assert!(matches!(error, VolumeError::Closed { .. }), "{error}");
    }
}
