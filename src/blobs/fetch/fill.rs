//! Background fill: fetches whole layers when it is quiet.
//!
//! Once an image is attached, its layers are fetched from the first to the last, each in the order of its
//! tar, so that the worst start is a parallel download and later starts need no network. One thread decides
//! which chunk is fetched next; the rest is the path of any chunk: it is claimed in the cache, so that a
//! reader who comes meanwhile waits for the same fetch and makes it demand; it is fetched by ranges of several chunks
//! ([`Pace`](super::pace::Pace) gives their size and number), verified by the decode threads, and stored in
//! the tier that keeps it. It is stored only there: the memory is for chunks that are read. Without any tier
//! the free part of the memory is filled, and nothing is evicted for it.
//!
//! A start pays nothing for it: no chunk is chosen, requested, verified or hashed while there is demand
//! ([`quiet`](crate::quiet)), and what is computed is of the [idle class](sys::idle).
//!
//! The fill keeps no more in flight than the tier's queue has room for, so it runs at the disk's speed where
//! that is the lower one. It pauses while the disk is full, ends when its [`Filling`] is dropped, and after a
//! restart skips the chunks that are stored already. A blob without a table of checksums is hashed when it is there as a
//! whole (`whole`).

mod whole;

use std::collections::{HashMap, VecDeque};
use std::hash::{BuildHasher as _, RandomState};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex, MutexGuard};

use super::blob::{Blob, Key};
use super::fair::Flow;
use super::inflate::{DecodeJob, Input};
use super::queue::WantedChunk;
use super::{Claim, FetchShared};
use crate::quiet::Allowance;
use crate::tier::store::ChunkPayload;
use crate::tier::{QUEUE, TierBlob, TierKind};
use source::chunk::{ChunkBytes, ChunkError, EncodedChunk, Room};
use source::{Class, OneBuffer};
use sys::idle::IdleThread;

/// Limit on the bytes in flight or waiting for the disk: the rest of the tier's queue is for chunks that are
/// read meanwhile.
const MOST_UNDER_WAY: u64 = QUEUE / 4 * 3;

/// Encoded bytes that are requested together: the size of a request for each of two connections.
const STRETCH: u64 = 8 << 20;

/// Failed chunks of a blob in a row after which the fill continues with the next blob.
const MOST_FAILURES: u32 = 4;

/// Pause when the disk has no space, and longest single wait for the rate limit.
const REST: Duration = Duration::from_millis(500);

/// Pause before a blob is tried again; doubled each time.
const AGAIN: Duration = Duration::from_secs(2);

/// Options of a fill: overlaybd's `download`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FillOptions {
    /// Delay before it begins.
    pub delay: Duration,
    /// Upper bound of a random addition to the delay.
    pub delay_extra: Duration,
    /// Limit on encoded bytes a second.
    pub rate: Option<u64>,
    /// Number of rounds over chunks that could not be fetched.
    pub tries: u64,
    /// Least bytes of a request.
    pub block: u64,
}

impl Default for FillOptions {
    fn default() -> Self {
        let delay = Duration::ZERO;
        Self { delay, delay_extra: delay, rate: None, tries: 5, block: 256 << 10 }
    }
}

/// Progress of a fill.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct FillProgress {
    /// Chunks of all its blobs that are not local.
    pub chunks: u64,
    /// Those that are near now.
    pub near: u64,
    /// True if it has ended.
    pub ended: bool,
}

/// A fill in progress. Dropping it ends it.
pub struct Filling {
    task: Arc<Task>,
    shared: Weak<FetchShared>,
}

impl Filling {
    /// True if it has ended: all is near, or no more can be.
    #[must_use]
    pub fn ended(&self) -> bool {
        self.task.ended.load(Ordering::Acquire)
    }

    /// Its progress.
    #[must_use]
    pub fn progress(&self) -> FillProgress {
        let mut progress =
            FillProgress { ended: self.task.ended.load(Ordering::Acquire), ..Default::default() };
        for blob in &self.task.blobs {
            let count = blob.source().chunk_count();
            progress.chunks += u64::from(count);
            progress.near += (0..count).filter(|&chunk| blob.is_near(chunk)).count() as u64;
        }
        progress
    }
}

impl Drop for Filling {
    fn drop(&mut self) {
        self.task.stopped.store(true, Ordering::Release);
        if let Some(shared) = self.shared.upgrade() {
            shared.fill.wake.notify_all();
        }
    }
}

/// The work of one [`Filling`].
struct Task {
    blobs: Vec<Arc<Blob>>,
    options: FillOptions,
    stopped: AtomicBool,
    ended: AtomicBool,
}

/// A task that waits for its turn.
struct Turn {
    task: Arc<Task>,
    due: Instant,
    round: u64,
}

/// The thread and its work.
#[derive(Default)]
pub(super) struct FillQueue {
    state: Mutex<FillState>,
    wake: Condvar,
    /// Number of chunks in flight: readable without the lock.
    under_way: AtomicU64,
}

#[derive(Default)]
struct FillState {
    turns: VecDeque<Turn>,
    /// Bytes that each chunk in flight will take in the tier's queue.
    chunks: HashMap<Key, u64>,
    bytes: u64,
    failures: u32,
    thread: Option<JoinHandle<()>>,
    ending: bool,
}

impl FillQueue {
    fn lock(&self) -> MutexGuard<'_, FillState> {
        self.state.lock()
    }

    fn wait<'a>(
        &self,
        mut state: MutexGuard<'a, FillState>,
        most: Duration,
    ) -> MutexGuard<'a, FillState> {
        self.wake.wait_for(&mut state, most);
        state
    }

    /// Records that a chunk's load has ended, of the fill or of a reader.
    pub(super) fn ended(&self, key: Key, good: bool) {
        if self.under_way.load(Ordering::Acquire) == 0 {
            return;
        }
        let mut state = self.lock();
        let Some(bytes) = state.chunks.remove(&key) else { return };
        state.bytes -= bytes;
        state.failures = if good { 0 } else { state.failures + 1 };
        self.under_way.fetch_sub(1, Ordering::Release);
        drop(state);
        self.wake.notify_all();
    }

    pub(super) fn end(&self) {
        let mut state = self.lock();
        state.ending = true;
        state.turns.clear();
        self.wake.notify_all();
    }

    pub(super) fn join(&self) {
        let thread = self.lock().thread.take();
        if let Some(thread) = thread.filter(|one| one.thread().id() != std::thread::current().id())
        {
            let _ = thread.join();
        }
    }
}

/// Adds a task, and starts the thread if there is none.
pub(super) fn begin(
    shared: &Arc<FetchShared>,
    blobs: Vec<Arc<Blob>>,
    options: FillOptions,
) -> Filling {
    let blobs = blobs.into_iter().filter(|blob| !blob.source().blob().is_local()).collect();
    let task = Arc::new(Task {
        blobs,
        options,
        stopped: AtomicBool::new(false),
        ended: AtomicBool::new(false),
    });
    let filling = Filling { task: task.clone(), shared: Arc::downgrade(shared) };
    if task.blobs.is_empty() {
        task.ended.store(true, Ordering::Release);
        return filling;
    }
    shared.pace.block(options.block);
    // The process that will read has not begun.
    shared.pace.demand().attached();
    let extra = RandomState::new().hash_one(0) as f64 / u64::MAX as f64;
    let due = Instant::now() + options.delay + options.delay_extra.mul_f64(extra.clamp(0.0, 1.0));
    let mut state = shared.fill.lock();
    state.turns.push_back(Turn { task, due, round: 0 });
    if state.thread.is_none() && !state.ending {
        let own = shared.clone();
        match std::thread::Builder::new().name("fill".into()).spawn(move || run(&own)) {
            Ok(thread) => state.thread = Some(thread),
            Err(error) => tracing::error!("Cannot start the background fill: {error}"),
        }
    }
    drop(state);
    shared.fill.wake.notify_all();
    filling
}

/// Body of the thread.
fn run(shared: &Arc<FetchShared>) {
    threads::mark_io_thread();
    if let Err(error) = sys::idle::yield_disk() {
        tracing::debug!(%error, "The fill reads the disk in the class of other threads");
    }
    let thread = IdleThread::current();
    while let Some(mut turn) = next(&shared.fill) {
        let task = turn.task.clone();
        let whole = fill(shared, &thread, &task);
        turn.round += 1;
        if whole || task.stopped.load(Ordering::Acquire) || turn.round >= task.options.tries.max(1)
        {
            task.ended.store(true, Ordering::Release);
            continue;
        }
        turn.due = Instant::now() + AGAIN * 2_u32.saturating_pow(turn.round.min(8) as u32 - 1);
        let mut state = shared.fill.lock();
        if !state.ending {
            state.turns.push_back(turn);
        }
    }
}

/// The first task that is due; `None` at the end.
fn next(queue: &FillQueue) -> Option<Turn> {
    let mut state = queue.lock();
    loop {
        if state.ending {
            return None;
        }
        state.turns.retain(|turn| !turn.task.stopped.load(Ordering::Acquire));
        let now = Instant::now();
        if let Some(at) = state.turns.iter().position(|turn| turn.due <= now) {
            return state.turns.remove(at);
        }
        let due = state.turns.iter().map(|turn| turn.due).min();
        let most = due.map_or(Duration::from_secs(3600), |due| due.saturating_duration_since(now));
        state = queue.wait(state, most);
    }
}

/// Reasons to end a round.
enum RoundEnd {
    /// The task or everything ends, or there is no place for more chunks.
    Now,
    /// This blob cannot be read now.
    Blob,
}

/// Runs one round over all blobs. True when no chunk is left to fetch.
fn fill(shared: &Arc<FetchShared>, thread: &IdleThread, task: &Task) -> bool {
    let mut round = Round { shared, task, batch: Vec::new(), bytes: 0, due: Instant::now() };
    let mut whole = true;
    let mut capacity =
        HashMap::from([(TierKind::Encoded, u64::MAX), (TierKind::Decoded, u64::MAX)]);
    for blob in &task.blobs {
        shared.fill.lock().failures = 0;
        for chunk in 0..blob.source().chunk_count() {
            // What a reader has fetched waits to be written, until it is quiet.
            let is_offered =
                || blob.stored().target().is_some_and(|(_, stored)| stored.is_offered(chunk));
            if blob.is_near(chunk) || is_offered() {
                continue;
            }
            // The part of a layer beyond the whole tier's capacity would only evict the layer's beginning.
            if let Some((kind, stored)) = blob.stored().target() {
                let left = capacity.entry(kind).or_insert(u64::MAX);
                *left = (*left).min(stored.capacity());
                let Some(rest) = left.checked_sub(size(blob, chunk, kind)) else {
                    round.send();
                    return true;
                };
                *left = rest;
            }
            match round.chunk(blob, chunk) {
                Ok(()) => {}
                Err(RoundEnd::Blob) => break,
                Err(RoundEnd::Now) => {
                    round.send();
                    return true;
                }
            }
        }
        round.send();
    }
    if round.settle().is_err() {
        return true;
    }
    for blob in &task.blobs {
        let is_over = || {
            let state = shared.fill.lock();
            state.ending || task.stopped.load(Ordering::Acquire)
        };
        whole::verify(shared, thread, blob, &|| !shared.pace.demand().wait(&is_over));
    }
    for blob in &task.blobs {
        // Without a tier the near chunks are those in memory, and these come and go.
        whole &= blob.stored().target().is_none()
            || (0..blob.source().chunk_count()).all(|chunk| blob.is_near(chunk));
    }
    whole
}

/// Bytes that a chunk takes in the tier.
fn size(blob: &Blob, chunk: u32, kind: TierKind) -> u64 {
    match kind {
        TierKind::Encoded => blob.source().encoded(chunk).map_or(0, |place| place.len() as u64),
        TierKind::Decoded => blob.source().span(chunk).map_or(0, |span| u64::from(span.len)),
    }
}

struct Round<'a> {
    shared: &'a Arc<FetchShared>,
    task: &'a Task,
    /// Claimed chunks, to be requested together.
    batch: Vec<WantedChunk>,
    bytes: u64,
    /// Time of the next byte, if the rate is limited.
    due: Instant,
}

impl Round<'_> {
    fn is_over(&self, state: &FillState) -> bool {
        state.ending || self.task.stopped.load(Ordering::Acquire)
    }

    /// Fetches a chunk that is not near.
    fn chunk(&mut self, blob: &Arc<Blob>, chunk: u32) -> Result<(), RoundEnd> {
        let encoded = blob.source().encoded(chunk).map_err(|_| RoundEnd::Blob)?.len() as u64;
        let target = blob.stored().target();
        let takes = match target {
            Some((kind, _)) => size(blob, chunk, kind),
            None => blob.source().room(chunk) as u64,
        };
        self.wait_for_room(blob, takes)?;
        match self.shared.delivery.claim(blob, chunk) {
            Claim::Loading => return Ok(()),
            Claim::Held(bytes) => {
                self.store_held(blob, chunk, bytes);
                return Ok(());
            }
            Claim::Claimed => {}
        }
        let key = blob.key(chunk);
        {
            let mut state = self.shared.fill.lock();
            // It may still be under way since another way brought it, and was evicted since.
            match state.chunks.insert(key, takes) {
                Some(before) => state.bytes -= before,
                None => _ = self.shared.fill.under_way.fetch_add(1, Ordering::Release),
            }
            state.bytes += takes;
        }
        self.batch.push(WantedChunk {
            blob: blob.clone(),
            chunk,
            class: Class::Fill,
            tries: 0,
            flow: Flow::default(),
        });
        self.bytes += encoded;
        if self.bytes >= STRETCH {
            self.send();
        }
        self.keep_to_rate(encoded)
    }

    /// Waits until it is quiet, and the disk can take more.
    fn wait_for_room(&mut self, blob: &Blob, takes: u64) -> Result<(), RoundEnd> {
        let target = blob.stored().target().map(|(_, stored)| stored);
        loop {
            let queue = &self.shared.fill;
            let state = queue.lock();
            if self.is_over(&state) {
                return Err(RoundEnd::Now);
            }
            if state.failures >= MOST_FAILURES {
                return Err(RoundEnd::Blob);
            }
            let demand = self.shared.pace.demand();
            if demand.allowance() == Allowance::Nothing {
                if self.batch.is_empty() {
                    drop(queue.wait(state, demand.left().min(REST)));
                } else {
                    drop(state);
                    self.send();
                }
                continue;
            }
            let spare = match target {
                Some(_) => u64::MAX,
                None => self.shared.delivery.spare().saturating_sub(state.bytes),
            };
            if spare < takes && state.bytes == 0 {
                return Err(RoundEnd::Now);
            }
            let full = target.is_some_and(TierBlob::is_full);
            let waiting = target.map_or(0, TierBlob::waiting);
            let under_way = state.bytes + waiting;
            if !full && spare >= takes && (under_way == 0 || under_way + takes <= MOST_UNDER_WAY) {
                return Ok(());
            }
            if !self.batch.is_empty() {
                drop(state);
                self.send();
                continue;
            }
            // The tier's writer sends no signal; it writes a batch in some tens of milliseconds.
            drop(queue.wait(state, if full { REST } else { Duration::from_millis(10) }));
        }
    }

    /// Waits until the rate limit allows `bytes` more.
    fn keep_to_rate(&mut self, bytes: u64) -> Result<(), RoundEnd> {
        let Some(rate) = self.task.options.rate.filter(|rate| *rate > 0) else { return Ok(()) };
        self.due =
            self.due.max(Instant::now()) + Duration::from_secs_f64(bytes as f64 / rate as f64);
        // The size of one request at a time: otherwise each chunk would be a request.
        if self.due.saturating_duration_since(Instant::now()) < Duration::from_millis(50) {
            return Ok(());
        }
        self.send();
        loop {
            let state = self.shared.fill.lock();
            if self.is_over(&state) {
                return Err(RoundEnd::Now);
            }
            let wait = self.due.saturating_duration_since(Instant::now());
            if wait.is_zero() {
                return Ok(());
            }
            drop(self.shared.fill.wait(state, wait.min(REST)));
        }
    }

    fn send(&mut self) {
        self.bytes = 0;
        self.shared.want_far(std::mem::take(&mut self.batch));
    }

    /// Waits for everything in flight and for the disk.
    fn settle(&mut self) -> Result<(), RoundEnd> {
        self.send();
        loop {
            let state = self.shared.fill.lock();
            if self.is_over(&state) {
                return Err(RoundEnd::Now);
            }
            let targets = self.task.blobs.iter().filter_map(|blob| blob.stored().target());
            let waiting: u64 = targets.map(|(_, stored)| stored.waiting()).sum();
            if state.chunks.is_empty() && waiting == 0 {
                return Ok(());
            }
            drop(self.shared.fill.wait(state, Duration::from_millis(20)));
        }
    }

    /// Stores a chunk that is in memory, but not on disk: it came when the tier's queue was full.
    fn store_held(&self, blob: &Blob, chunk: u32, bytes: Arc<ChunkBytes>) {
        let source = blob.source();
        let Some((kind, stored)) = blob.stored().target() else { return };
        if kind == TierKind::Decoded {
            if let Some(span) = source.span(chunk) {
                stored.offer(chunk, span.start, ChunkPayload::Shared(bytes));
            }
            return;
        }
        // The encoded bytes are no longer in memory: this thread fetches them again.
        let Ok(place) = source.encoded(chunk) else { return };
        let mut encoded = EncodedChunk::new(&place, Vec::new());
        let mut buffer = OneBuffer::new(encoded.bytes_mut());
        if source.blob().read_run(place.range.clone(), Class::Fill, &mut buffer).is_err() {
            return;
        }
        let good = source.verify(chunk, encoded.bytes()).unwrap_or_else(|| {
            let mut room = vec![0; source.room(chunk)];
            source.decode(chunk, &mut encoded, &mut room).is_ok_and(|data| room[data] == bytes[..])
        });
        if good {
            let (buffer, data) = encoded.into_parts();
            stored.offer(chunk, place.range.start, ChunkPayload::Owned(buffer, data));
            self.shared.filled(place.len());
        }
    }
}

impl FetchShared {
    pub(super) fn filled(&self, bytes: usize) {
        self.counters.filled.add(1);
        self.counters.filled_bytes.add(bytes as u64);
    }

    /// Ends the load of a chunk that was filled; false when it has a waiter by now.
    pub(super) fn abandon(&self, key: Key) -> bool {
        let abandoned = self.delivery.abandon(key);
        if abandoned {
            self.fill.ended(key, true);
        }
        abandoned
    }
}

/// Verifies and stores a chunk without a waiter. False when it has one: then it is decoded and delivered.
///
/// Memory is taken and touched before the thread enters the idle class, and all that readers share is touched after it has left it.
pub(super) fn store(
    shared: &Arc<FetchShared>,
    thread: &IdleThread,
    job: &mut DecodeJob,
) -> Result<bool, Arc<ChunkError>> {
    let key = job.blob.key(job.chunk);
    let Input::Fetched(encoded) = &mut job.input else { return Ok(false) };
    if shared.delivery.is_awaited(key) {
        return Ok(false);
    }
    let (blob, chunk) = (job.blob.clone(), job.chunk);
    let source = blob.source();
    let place = source.encoded(chunk).map_err(Arc::new)?;
    match blob.stored().target() {
        Some((TierKind::Encoded, stored)) => {
            // A chunk that cannot be verified in its encoded form must decode.
            if thread.run(|| source.verify(chunk, encoded.bytes())) != Some(true) {
                let mut room = vec![0; source.room(chunk)];
                sys::idle::fault_in(&mut room);
                let decoded = thread.run(|| source.decode(chunk, encoded, &mut room));
                decoded.map_err(Arc::new)?;
            }
            if !shared.abandon(key) {
                return Ok(false);
            }
            let (buffer, data) = std::mem::take(encoded).into_parts();
            stored.offer(chunk, place.range.start, ChunkPayload::Owned(buffer, data));
        }
        Some((TierKind::Decoded, stored)) => {
            let room: Box<dyn Room> = Box::new(vec![0; source.room(chunk)]);
            let bytes = decoded(shared, thread, job, room)?;
            if let Some(span) = source.span(chunk) {
                stored.offer(chunk, span.start, ChunkPayload::Shared(bytes.clone()));
            }
            if !shared.abandon(key) {
                shared.deliver(key, Ok(bytes));
            }
        }
        None => {
            let Some(room) = shared.delivery.spare_room(source.room(chunk)) else {
                return Ok(shared.abandon(key));
            };
            let bytes = decoded(shared, thread, job, room)?;
            shared.deliver(key, Ok(bytes));
        }
    }
    shared.filled(place.len());
    Ok(true)
}

fn decoded(
    shared: &Arc<FetchShared>,
    thread: &IdleThread,
    job: &mut DecodeJob,
    mut room: Box<dyn Room>,
) -> Result<Arc<ChunkBytes>, Arc<ChunkError>> {
    let Input::Fetched(encoded) = &mut job.input else {
        return Err(super::failure(&job.blob, "The chunk has no bytes"));
    };
    sys::idle::fault_in(room.bytes_mut());
    let begun = Instant::now();
    let source = job.blob.source();
    let data =
        thread.run(|| source.decode(job.chunk, encoded, room.bytes_mut())).map_err(Arc::new)?;
    shared.counters.inflated(encoded.bytes().len(), data.len(), begun);
    Ok(Arc::new(ChunkBytes::new(room, data)))
}

#[cfg(test)]
mod tests;
