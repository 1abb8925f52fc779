//! The decode threads (`inflate-N`): one for each core; they verify and decode, demand first, and devices take
//! [turns](super::fair).
//!
//! Chunks of the background fill are verified and stored, and decoded only for a tier of decoded chunks. No such chunk is
//! begun while there is demand ([`quiet`](crate::quiet)), and the work on it is of the [idle class](sys::idle): a thread
//! enters that class for the computation alone, and a reader who comes for the chunk meanwhile raises it. The fill may have
//! as many threads as there are cores, and one more is always there for demand.

use std::collections::{HashMap, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_queue::ArrayQueue;
use parking_lot::{Condvar, Mutex, MutexGuard};

use super::blob::{Blob, Key};
use super::fair::{Bounds, Flow, Lines, Shares};
use super::queue::WantedChunk;
use super::{FetchShared, MOST_TRIES, failure, fill};
use crate::quiet::{Allowance, Demand};
use crate::tier::TierKind;
use crate::tier::store::ChunkPayload;
use source::Class;
use source::chunk::{ChunkBytes, ChunkError, EncodedChunk};
use sys::idle::IdleThread;
use threads::Pool;

/// Limit on buffers for encoded chunks that are kept for reuse: as many as are usually in flight.
const SPARE_BUFFERS: usize = 32;

/// Longest buffer that is kept for reuse, 2 MiB: more than a segment of the usual span takes.
const LONGEST_SPARE: usize = 2 << 20;

/// Shortest wait of a thread for quiet.
const HELD_BACK: Duration = Duration::from_millis(50);

/// Cost of a job beside its output, in bytes of output: it is taken, read and delivered.
const JOB_COST: u64 = 64 << 10;

/// Limit on the encoded bytes that wait to be decoded, 64 MiB: as many as the line brings while each core decodes a
/// segment of the longest kind. Fetching waits for the decoding then, so that memory is bounded.
const MOST_WAITING: u64 = 64 << 20;

/// Limit on those of one device.
const MOST_WAITING_OF_ONE: u64 = 16 << 20;

/// A chunk to decode.
pub(super) struct DecodeJob {
    pub(super) blob: Arc<Blob>,
    pub(super) chunk: u32,
    pub(super) class: Class,
    /// Damaged deliveries so far.
    pub(super) tries: u8,
    /// The device that wants it.
    pub(super) flow: Flow,
    pub(super) input: Input,
}

/// Place of its encoded bytes.
pub(super) enum Input {
    /// Fetched from a server.
    Fetched(EncodedChunk),
    /// In a local file or the disk tier: the decode thread reads them.
    Near,
    /// Read from the disk tier.
    Stored(EncodedChunk),
}

impl DecodeJob {
    pub(super) fn wanted(&self) -> WantedChunk {
        let Self { chunk, class, tries, flow, .. } = *self;
        WantedChunk { blob: self.blob.clone(), chunk, class, tries, flow }
    }

    /// Encoded bytes that it holds while it waits.
    fn held(&self) -> u64 {
        match &self.input {
            Input::Fetched(encoded) | Input::Stored(encoded) => encoded.bytes().len() as u64,
            Input::Near => 0,
        }
    }

    /// Cost of its decoding, for the turns: bytes of its output.
    fn cost(&self) -> u64 {
        self.blob.source().room(self.chunk) as u64 + JOB_COST
    }

    pub(super) fn key(&self) -> Key {
        self.blob.key(self.chunk)
    }
}

/// The threads and their work.
pub(super) struct Workers {
    state: Mutex<DecodeQueue>,
    wake: Condvar,
    /// Signalled when fewer bytes wait.
    room: Condvar,
    most: usize,
    spare: ArrayQueue<Vec<u8>>,
}

#[derive(Default)]
struct DecodeQueue {
    demand: Lines<DecodeJob>,
    ahead: Lines<DecodeJob>,
    fill: VecDeque<DecodeJob>,
    /// Threads that each device has, those of the fill excluded.
    shares: Shares,
    /// Encoded bytes of each device that wait, those of the fill excluded: it has a bound of its own.
    waiting: HashMap<Flow, u64>,
    /// Chunks that threads work on for the fill.
    filling: Vec<(Key, Arc<IdleThread>)>,
    idle: usize,
    threads: Pool,
    ending: bool,
}

impl Workers {
    pub(super) fn new(most: usize) -> Self {
        let spare = ArrayQueue::new(SPARE_BUFFERS);
        let (wake, room) = (Condvar::new(), Condvar::new());
        Self { state: Mutex::default(), wake, room, most, spare }
    }

    /// Bounds on the threads of one device: its part of the cores while others are active.
    fn bounds(&self) -> Bounds {
        Bounds { threads: self.most, reserved: 0, divisor: 1, least: 1, bytes: u64::MAX }
    }

    /// Waits until a device may fetch more bytes, or until the end.
    pub(super) fn wait_for_room(&self, flow: Flow) {
        let mut state = self.lock();
        loop {
            let own = state.waiting.get(&flow).copied().unwrap_or(0);
            let all: u64 = state.waiting.values().sum();
            if state.ending || own == 0 || (own < MOST_WAITING_OF_ONE && all < MOST_WAITING) {
                return;
            }
            self.room.wait(&mut state);
        }
    }

    fn lock(&self) -> MutexGuard<'_, DecodeQueue> {
        self.state.lock()
    }

    /// Adds a job; returns it at the end or when there is no thread.
    pub(super) fn push(&self, job: DecodeJob) -> Result<(), DecodeJob> {
        let mut state = self.lock();
        if state.ending || state.threads.is_empty() {
            return Err(job);
        }
        if job.class < Class::Fill {
            state.waits(&job);
        }
        match job.class {
            Class::Demand => state.demand.push(job.flow, job),
            Class::Prefetch => state.ahead.push(job.flow, job),
            Class::Fill => state.fill.push_back(job),
        }
        drop(state);
        self.wake.notify_one();
        Ok(())
    }

    pub(super) fn urge(&self, key: Key, flow: Flow) {
        let mut state = self.lock();
        let is = |job: &DecodeJob| job.key() == key;
        state.demand.hasten(flow, &is);
        if let Some(at) = state.fill.iter().position(is)
            && let Some(job) = state.fill.remove(at)
        {
            state.waits(&job);
            state.demand.push(flow, DecodeJob { class: Class::Demand, ..job });
            self.wake.notify_one();
        }
        if let Some(job) = state.ahead.remove(&is) {
            state.demand.push(flow, DecodeJob { class: Class::Demand, ..job });
        }
        let at_work = state.filling.iter().filter(|(filled, _)| *filled == key);
        at_work.for_each(|(_, thread)| thread.raise());
    }

    /// A buffer that was used before, or a new one.
    pub(super) fn buffer(&self) -> Vec<u8> {
        self.spare.pop().unwrap_or_default()
    }

    fn give_back(&self, encoded: EncodedChunk) {
        let buffer = encoded.into_buffer();
        if buffer.capacity() <= LONGEST_SPARE {
            let _ = self.spare.push(buffer);
        }
    }

    /// Accepts no more jobs; returns those that were not begun.
    pub(super) fn end(&self) -> Vec<DecodeJob> {
        let mut state = self.lock();
        state.ending = true;
        self.wake.notify_all();
        self.room.notify_all();
        let mut left: Vec<DecodeJob> = state.demand.drain();
        left.extend(state.ahead.drain());
        left.extend(state.fill.drain(..));
        left
    }

    /// Waits for the threads.
    pub(super) fn join(&self) {
        // A waiter may hold the last reference to the cache, and drop it on one of these threads.
        let threads = self.lock().threads.take();
        threads.join();
    }

    /// The next job of a thread. `done`: the job before, if it was for a device, or for the fill.
    fn next(
        &self,
        demand: &Demand,
        thread: &Arc<IdleThread>,
        done: Option<JobDone>,
    ) -> Option<DecodeJob> {
        let mut state = self.lock();
        match done {
            Some(JobDone::Fill) => state.filling.retain(|(_, other)| !Arc::ptr_eq(other, thread)),
            Some(JobDone::Of(flow)) => state.shares.end(flow, 0),
            None => {}
        }
        loop {
            if let Some(job) = self.next_of_devices(&mut state) {
                return Some(job);
            }
            if state.filling.len() < self.most_filling(&state, demand)
                && let Some(job) = state.fill.pop_front()
            {
                thread.begin();
                state.filling.push((job.key(), thread.clone()));
                return Some(job);
            }
            if state.ending {
                return None;
            }
            state.idle += 1;
            // A fill that is held back gets no signal when it is quiet.
            if state.fill.is_empty() || state.filling.len() >= self.most {
                self.wake.wait(&mut state);
            } else {
                self.wake.wait_for(&mut state, demand.left().max(HELD_BACK));
            }
            state.idle -= 1;
        }
    }

    /// Threads that may work for the fill now.
    fn most_filling(&self, state: &DecodeQueue, demand: &Demand) -> usize {
        if state.fill.is_empty() {
            return 0;
        }
        match demand.allowance() {
            Allowance::Nothing => 0,
            Allowance::Little => 1,
            Allowance::All => self.most,
        }
    }
}

impl DecodeQueue {
    /// Counts the bytes of a job that waits.
    fn waits(&mut self, job: &DecodeJob) {
        if job.held() > 0 {
            *self.waiting.entry(job.flow).or_default() += job.held();
        }
    }
}

impl Workers {
    /// The next job of a device whose turn it is.
    fn next_of_devices(&self, state: &mut DecodeQueue) -> Option<DecodeJob> {
        let DecodeQueue { demand, ahead, shares, waiting, .. } = state;
        let (active, bounds) = (shares.active(), self.bounds());
        for lines in [demand, ahead] {
            let found = lines.pop(&mut |flow, _| shares.may_begin(flow, 0, active, bounds));
            if let Some((flow, mut job)) = found {
                lines.charge(flow, job.cost());
                shares.begin(flow, 0);
                self.taken(waiting, &job);
                job.flow = flow;
                return Some(job);
            }
        }
        None
    }

    /// Notes that the bytes of a job wait no longer.
    fn taken(&self, waiting: &mut HashMap<Flow, u64>, job: &DecodeJob) {
        if job.held() > 0
            && let Some(bytes) = waiting.get_mut(&job.flow)
        {
            *bytes = bytes.saturating_sub(job.held());
            if *bytes == 0 {
                waiting.remove(&job.flow);
            }
            self.room.notify_all();
        }
    }
}

/// The job that a thread has done.
#[derive(Clone, Copy)]
enum JobDone {
    Of(Flow),
    Fill,
}

/// Starts the first thread. The others are started by decode threads; see [`Crew`](super::crew).
pub(super) fn start(shared: &Arc<FetchShared>) {
    add_thread(shared, &mut shared.workers.lock());
}

/// Starts a thread if there is work that no idle one will take; beside those that fill, one more for demand.
fn grow(shared: &Arc<FetchShared>) {
    let workers = &shared.workers;
    let mut state = workers.lock();
    let waiting = state.demand.len() + state.ahead.len() + state.fill.len();
    let needed = state.idle == 0 && (waiting > 0 || !state.filling.is_empty());
    let most = workers.most + usize::from(!state.filling.is_empty());
    if needed && state.threads.len() < most && !state.ending {
        add_thread(shared, &mut state);
    }
}

fn add_thread(shared: &Arc<FetchShared>, state: &mut DecodeQueue) {
    let own = shared.clone();
    state.threads.spawn_or_log("inflate", move || {
        threads::mark_io_thread();
        let thread = Arc::new(IdleThread::current());
        let mut done = None;
        while let Some(job) = own.workers.next(own.pace.demand(), &thread, done) {
            grow(&own);
            done =
                Some(if job.class == Class::Fill { JobDone::Fill } else { JobDone::Of(job.flow) });
            work(&own, &thread, job);
        }
    });
}

/// Result of a job.
enum Made {
    /// Decoded, to be delivered.
    Decoded(ChunkBytes),
    /// Stored, without a waiter: its load has ended already.
    Filled,
    /// The near chunk is no longer there, or is damaged; or it decodes only within its frame.
    Gone,
}

/// Processes one chunk, from its encoded bytes to its waiters.
fn work(shared: &Arc<FetchShared>, thread: &IdleThread, mut job: DecodeJob) {
    // A panic is a bug of the decoder; the reader gets an error and the thread continues.
    let result = catch_unwind(AssertUnwindSafe(|| make(shared, thread, &mut job)));
    let result = result.unwrap_or_else(|_| {
        job.tries = MOST_TRIES;
        Err(failure(&job.blob, "The decoder of this chunk panicked"))
    });
    let error = match result {
        Ok(Made::Decoded(bytes)) => {
            let bytes = Arc::new(bytes);
            shared.deliver(job.key(), Ok(bytes.clone()));
            keep(shared, job, bytes);
            return;
        }
        Ok(Made::Filled) => return,
        Ok(Made::Gone) => {
            shared.want_far(vec![job.wanted()]);
            return;
        }
        Err(error) => error,
    };
    let damaged = matches!(*error, ChunkError::Damaged { .. });
    if damaged {
        shared.counters.damaged.add(1);
        if job.tries + 1 < MOST_TRIES && !shared.crew.is_ending() {
            tracing::warn!(%error, "A chunk is fetched again");
            job.blob.failures().note(job.chunk, true, &*error);
            if let Ok(place) = job.blob.source().encoded(job.chunk) {
                job.blob.source().blob().distrust(place.range);
            }
            let wanted = job.wanted();
            shared.want(vec![WantedChunk { tries: wanted.tries + 1, ..wanted }]);
            return;
        }
    }
    let wanted = WantedChunk { tries: MOST_TRIES, ..job.wanted() };
    shared.fail(&wanted, error);
}

/// Offers a fetched chunk to the tier that keeps it.
fn keep(shared: &Arc<FetchShared>, job: DecodeJob, bytes: Arc<ChunkBytes>) {
    let (Input::Fetched(encoded) | Input::Stored(encoded)) = job.input else { return };
    let blob = job.blob;
    match blob.stored().target() {
        Some((TierKind::Encoded, stored)) if !blob.stored().has(job.chunk) => {
            if let Ok(place) = blob.source().encoded(job.chunk) {
                let (buffer, data) = encoded.into_parts();
                stored.offer(job.chunk, place.range.start, ChunkPayload::Owned(buffer, data));
            }
            return;
        }
        Some((TierKind::Decoded, stored)) => {
            if let Some(span) = blob.source().span(job.chunk) {
                stored.offer(job.chunk, span.start, ChunkPayload::Shared(bytes));
            }
        }
        _ => {}
    }
    shared.workers.give_back(encoded);
}

/// Reads a near chunk, verifies and decodes it; or verifies and stores it, when it has no waiter.
fn make(
    shared: &Arc<FetchShared>,
    thread: &IdleThread,
    job: &mut DecodeJob,
) -> Result<Made, Arc<ChunkError>> {
    let is_serial = job.blob.source().is_serial(job.chunk);
    if let Input::Near = job.input {
        if let Some(bytes) = read_decoded(shared, job) {
            return Ok(Made::Decoded(bytes));
        }
        if is_serial || !read_encoded(shared, job)? {
            return Ok(Made::Gone);
        }
    }
    if job.class == Class::Fill && fill::store(shared, thread, job)? {
        return Ok(Made::Filled);
    }
    if is_serial {
        return Ok(Made::Gone); // it was fetched for the tier in encoded form, and has a waiter by now
    }
    match decode(shared, job) {
        Err(error) if matches!(job.input, Input::Stored(_)) => {
            tracing::debug!(%error, "A chunk of the disk tier does not decode");
            for stored in job.blob.stored().all_encoded() {
                stored.forget(job.chunk);
            }
            job.input = Input::Near;
            Ok(Made::Gone)
        }
        result => result.map(Made::Decoded),
    }
}

/// Reads a chunk from the decoded tier, directly into the cache's memory.
fn read_decoded(shared: &Arc<FetchShared>, job: &DecodeJob) -> Option<ChunkBytes> {
    let stored = job.blob.stored().decoded.as_ref()?;
    let len = stored.len_of(job.chunk)?;
    let source = job.blob.source();
    if source.span(job.chunk).is_some_and(|span| span.len as usize != len) {
        stored.forget(job.chunk);
        return None;
    }
    let mut room = shared.delivery.room(len, job.flow)?;
    let verify = |bytes: &[u8]| source.verify_decoded(job.chunk, bytes);
    stored.read(job.chunk, room.bytes_mut(), &verify).then(|| {
        shared.counters.stored.add(1);
        ChunkBytes::new(room, 0..len)
    })
}

/// Reads the encoded bytes from the tier or the local file; false when they are not there.
fn read_encoded(shared: &Arc<FetchShared>, job: &mut DecodeJob) -> Result<bool, Arc<ChunkError>> {
    let source = job.blob.source();
    let place = source.encoded(job.chunk).map_err(Arc::new)?;
    if source.blob().is_local() {
        let mut encoded = EncodedChunk::new(&place, shared.workers.buffer());
        let read = source.blob().read_exact_at(encoded.bytes_mut(), place.range.start);
        read.map_err(|error| Arc::new(ChunkError::from(error)))?;
        shared.counters.local.add(1);
        job.input = Input::Fetched(encoded);
        return Ok(true);
    }
    let mut files = job.blob.stored().all_encoded().filter(|file| file.has(job.chunk)).peekable();
    if files.peek().is_none() {
        return Ok(false);
    }
    let mut encoded = EncodedChunk::new(&place, shared.workers.buffer());
    // Decoding compares the source's checksums; the tier's own checksum tells damage by the disk from other
    // damage.
    if !files.any(|file| file.read(job.chunk, encoded.bytes_mut(), &|_| None)) {
        return Ok(false);
    }
    shared.counters.stored.add(1);
    job.input = Input::Stored(encoded);
    Ok(true)
}

/// Verifies and decodes the encoded bytes.
fn decode(shared: &Arc<FetchShared>, job: &mut DecodeJob) -> Result<ChunkBytes, Arc<ChunkError>> {
    let source = job.blob.source();
    let (Input::Fetched(encoded) | Input::Stored(encoded)) = &mut job.input else {
        return Err(failure(&job.blob, "The chunk has no bytes"));
    };
    let room = shared.delivery.room(source.room(job.chunk), job.flow);
    let mut room = room.ok_or_else(|| super::no_room(&job.blob))?;
    let begun = Instant::now();
    let data = source.decode(job.chunk, encoded, room.bytes_mut()).map_err(Arc::new)?;
    shared.counters.inflated(encoded.bytes().len(), data.len(), begun);
    Ok(ChunkBytes::new(room, data))
}
