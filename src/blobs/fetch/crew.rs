//! The fetch threads: they wait for the network, so that no other thread has to.
//!
//! There is one at first, and another starts whenever all are busy, up to a limit. New ones are started by
//! fetch threads, never by the thread that wants a chunk: a thread inherits the CPUs that it may run on, and
//! a ublk queue thread is bound to its own. A quarter of the threads is reserved for demand, and a quarter for other
//! devices than the one that has the most ([`fair`](super::fair)).
//!
//! A request to a registry that is down, or slow, keeps its thread until a deadline. So a way (see [`Key`]) without any
//! request in flight gets a thread for its demand even when all are busy, beyond the limit: the readers of one
//! repository never wait for another's.
//!
//! The background fill gets the line when it is quiet, limited by [`Pace`](super::pace). The threads are the same, and of
//! their ordinary class: they wait for the network, and a reader may want what the request of a fill brings. A request
//! of the fill that has no answer yet is not waited for, though: it may be held up by the fill's rate limit. Its chunk is
//! then fetched again, for the reader, and the first to come serves.
//!
//! The threads of long frames ([`serial`](super::serial)) make requests of their own, and hold a [`Permit`] of the crew
//! for each: one limit is for all requests in flight, and one for those ahead of demand. A request of theirs that
//! has a reader is admitted before the crew's next one.

use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex, MutexGuard};

use super::blob::Blob;
use super::fair::{Bounds, Flow, Shares};
use super::pace::Pace;
use super::queue::{FetchQueue, Limit, Taken, WantedChunk};
use super::run::ChunkRun;
use super::{FetchShared, Key};
use crate::quiet::{Allowance, Demand};
use source::chunk::{ChunkError, EncodedRange};
use source::{Class, Run as _};
use threads::Pool;

/// Limit on the encoded bytes of one request, 4 MiB: at a gigabit 32 ms, longer than a round trip across a
/// continent, so larger requests save nothing, while a broken connection loses no more than this.
pub(crate) const MOST_BYTES: u64 = 4 << 20;

/// Limit on the encoded bytes of all requests in flight, 256 MiB: a line of 10 Gbit/s brings as many in 200 ms. A segment
/// can be longer than a request ([`MAX_SEGMENT`](formats::segments::MAX_SEGMENT)), so the number of requests is no bound.
const MOST_IN_FLIGHT: u64 = 256 << 20;

/// Encoded bytes below which a request is not divided between connections, 1 MiB: half a round trip at an
/// object store's rate for one connection. Below it more requests only cost more.
const LEAST_BYTES: u64 = 1 << 20;

/// Limit on requests in flight beyond those, one for each way that has no other: more repositories are seldom in use at
/// once, and far fewer are down.
const MOST_BEYOND: usize = 32;

/// Interval at which what is held back is checked again: a fill by others' requests, a permit.
const HELD_BACK: Duration = Duration::from_millis(50);

/// The threads and their work.
pub(super) struct Crew {
    state: Mutex<CrewState>,
    wake: Condvar,
    /// Wakes threads that wait for a permit.
    admits: Condvar,
    most: usize,
    /// Requests of [`Class::Prefetch`] under way at most.
    prefetches: usize,
}

#[derive(Default)]
struct CrewState {
    queue: FetchQueue,
    /// Number of threads that wait for work.
    idle: usize,
    /// Requests in flight by way, those by a permit included.
    requests_of: HashMap<u32, usize>,
    /// Requests in flight without a waiter, those of the fill included.
    ahead: usize,
    /// Requests of the fill in flight, by their first chunks.
    fills: HashMap<Key, FillRequest>,
    /// Requests of each device in flight, those of the fill excluded.
    shares: Shares,
    /// Requests of the crew in flight.
    own: usize,
    /// Permits of each [`Class`].
    permits: [usize; 3],
    /// Threads that wait for a permit for demand.
    awaited: usize,
    threads: Pool,
    ending: bool,
}

/// A request of the fill in flight.
struct FillRequest {
    blob: Arc<Blob>,
    chunks: Range<u32>,
    /// True when its first byte has come.
    answered: bool,
    /// Chunks of it that are fetched again, for a reader.
    again: HashSet<u32>,
}

impl FillRequest {
    /// The chunk of a key, if it is one of these.
    fn chunk_of(&self, key: Key) -> Option<u32> {
        let chunk = key.chunk.number;
        (self.chunks.contains(&chunk) && self.blob.key(chunk) == key).then_some(chunk)
    }
}

impl CrewState {
    /// Requests in flight for demand or ahead of it.
    fn for_readers(&self) -> usize {
        let [demand, prefetches, _] = self.permits;
        self.own.saturating_sub(self.fills.len()) + demand + prefetches
    }

    /// Makes demand of a chunk that the fill has requested, if the answer has not begun.
    fn take_over(&mut self, key: Key, flow: Flow) -> bool {
        let requests = self.fills.values_mut().filter(|request| !request.answered);
        let found = requests.filter_map(|request| {
            let chunk = request.chunk_of(key)?;
            request.again.insert(chunk).then(|| (request.blob.clone(), chunk))
        });
        let Some((blob, chunk)) = found.last() else { return false };
        self.queue.push(WantedChunk { blob, chunk, class: Class::Demand, tries: 0, flow });
        true
    }

    fn begun(&mut self, way: u32) {
        *self.requests_of.entry(way).or_default() += 1;
    }

    fn ended(&mut self, way: u32) {
        if let Some(requests) = self.requests_of.get_mut(&way) {
            *requests -= 1;
            if *requests == 0 {
                self.requests_of.remove(&way);
            }
        }
    }

    /// True if a way that has no request in flight may make one beyond the limit.
    fn is_idle(&self, way: u32, most: usize) -> bool {
        !self.requests_of.contains_key(&way) && self.in_flight() < most + MOST_BEYOND
    }

    /// Requests in flight.
    fn in_flight(&self) -> usize {
        self.own + self.permits.iter().sum::<usize>()
    }

    /// Requests of [`Class::Prefetch`] in flight.
    fn prefetches(&self) -> usize {
        self.ahead - self.fills.len().min(self.ahead) + self.permits[Class::Prefetch as usize]
    }

    /// Requests in flight without a waiter.
    fn all_ahead(&self) -> usize {
        let [_, prefetches, fills] = self.permits;
        self.ahead + prefetches + fills
    }
}

/// A request that a thread outside the crew may make, until it is dropped.
pub(super) struct Permit<'a> {
    crew: &'a Crew,
    class: Class,
    way: u32,
}

impl Drop for Permit<'_> {
    fn drop(&mut self) {
        let mut state = self.crew.lock();
        state.permits[self.class as usize] -= 1;
        state.ended(self.way);
        self.crew.freed(&state);
    }
}

impl Crew {
    pub(super) fn new(most: usize, prefetches: Option<usize>) -> Self {
        let prefetches = prefetches.unwrap_or(usize::MAX).max(1);
        let (state, wake, admits) = (Mutex::default(), Condvar::new(), Condvar::new());
        Self { state, wake, admits, most, prefetches }
    }

    fn lock(&self) -> MutexGuard<'_, CrewState> {
        self.state.lock()
    }

    /// Makes demand of a chunk that is wanted, or in a request of the fill. True if it is requested a second time.
    pub(super) fn urge(&self, key: Key, flow: Flow) -> bool {
        let mut state = self.lock();
        let again = !state.queue.urge(key, flow) && state.take_over(key, flow);
        drop(state);
        self.wake.notify_one();
        again
    }

    /// Notes that the answer to a request of the fill has begun: its chunks come soon.
    pub(super) fn answered(&self, first: Key) {
        if let Some(request) = self.lock().fills.get_mut(&first) {
            request.answered = true;
        }
    }

    /// Wakes the threads that wait for a permit: what they fetch may have become demand.
    pub(super) fn look_again(&self) {
        self.admits.notify_all();
    }

    pub(super) fn is_ending(&self) -> bool {
        self.lock().ending
    }

    /// Accepts no more work; returns the work that was not begun.
    pub(super) fn end(&self) -> Vec<WantedChunk> {
        let mut state = self.lock();
        state.ending = true;
        self.wake.notify_all();
        self.admits.notify_all();
        state.queue.drain()
    }

    /// Waits for the threads; requests in flight end first.
    pub(super) fn join(&self) {
        // A waiter may hold the last reference to the cache, and drop it on one of these threads.
        let threads = self.lock().threads.take();
        threads.join();
    }

    /// Limit on the requests in flight ahead of demand.
    fn most_ahead(&self) -> usize {
        (self.most * 3 / 4).max(1)
    }

    /// Returns the next request, and waits for one if there is none. `None` at the end.
    fn next(&self, pace: &Pace) -> Option<Taken> {
        let mut state = self.lock();
        loop {
            if state.ending {
                return None;
            }
            let free = self.most.saturating_sub(state.in_flight() + state.awaited);
            let demand_only = !self.admits_ahead(&state, Class::Prefetch);
            let has_fill = state.queue.has_fill();
            let fill = if has_fill { pace.fill(state.for_readers(), state.fills.len()) } else { 0 };
            let limit = Limit { most: MOST_BYTES, least: LEAST_BYTES, free, demand_only, fill };
            let CrewState { queue, shares, requests_of, .. } = &mut *state;
            let (active, bounds) = (shares.active(), self.bounds());
            let may = |flow, bytes| shares.may_begin(flow, bytes, active, bounds);
            let taken = if free > 0 {
                queue.take(limit, &may)
            } else {
                queue.take_of_idle(limit, &|way| requests_of.contains_key(&way))
            };
            if let Some(taken) = taken {
                if taken.class < Class::Fill {
                    state.shares.begin(taken.flow, taken.bytes);
                }
                state.own += 1;
                state.begun(taken.blob.way());
                state.ahead += usize::from(taken.class > Class::Demand);
                if taken.class == Class::Fill {
                    let first = taken.blob.key(taken.chunks.start);
                    let (blob, chunks) = (taken.blob.clone(), taken.chunks.clone());
                    let (answered, again) = (false, HashSet::new());
                    state.fills.insert(first, FillRequest { blob, chunks, answered, again });
                }
                return Some(taken);
            }
            state.idle += 1;
            // A fill that is held back gets no signal when it is quiet, so it looks then.
            if state.queue.has_fill() {
                self.wake.wait_for(&mut state, pace.demand().left().max(HELD_BACK));
            } else {
                self.wake.wait(&mut state);
            }
            state.idle -= 1;
        }
    }

    /// True if another request of this class, which is not demand, fits beside those ahead of demand.
    fn admits_ahead(&self, state: &CrewState, class: Class) -> bool {
        state.all_ahead() < self.most_ahead()
            && (class != Class::Prefetch || state.prefetches() < self.prefetches)
    }

    /// Waits until a thread outside the crew may make a request of this way and class; `is_urgent` tells whether it has
    /// become demand meanwhile. `None` at the end.
    pub(super) fn admit(
        &self,
        way: u32,
        mut class: Class,
        is_urgent: &dyn Fn() -> bool,
        demand: &Demand,
    ) -> Option<Permit<'_>> {
        loop {
            // Without the lock: it takes another.
            if class > Class::Demand && is_urgent() {
                class = Class::Demand;
            }
            let mut state = self.lock();
            if state.ending {
                return None;
            }
            let held_back = class == Class::Fill && demand.allowance() == Allowance::Nothing;
            let fits = state.in_flight() < self.most
                && (class == Class::Demand || self.admits_ahead(&state, class) && !held_back);
            if fits || class == Class::Demand && state.is_idle(way, self.most) {
                state.permits[class as usize] += 1;
                state.begun(way);
                return Some(Permit { crew: self, class, way });
            }
            let awaited = usize::from(class == Class::Demand);
            state.awaited += awaited;
            self.admits.wait_for(&mut state, HELD_BACK);
            state.awaited -= awaited;
        }
    }

    /// A request has ended: another may begin.
    fn freed(&self, state: &CrewState) {
        self.admits.notify_all();
        // Work that this request held back may start now, on another thread if this one takes demand.
        if !state.queue.is_empty() {
            self.wake.notify_one();
        }
    }

    /// Requests in flight, at least the caller's own.
    fn busy(&self) -> usize {
        let state = self.lock();
        (state.threads.len() - state.idle.min(state.threads.len())).max(1)
    }

    /// Bounds on the requests of one device. While others are active, a third of its part: their requests share the line
    /// and the server with its.
    fn bounds(&self) -> Bounds {
        let bytes = MOST_BYTES.saturating_mul(self.most as u64).min(MOST_IN_FLIGHT);
        Bounds { threads: self.most, reserved: self.most / 4, divisor: 3, least: 2, bytes }
    }

    fn done(&self, taken: &Taken) {
        let mut state = self.lock();
        if taken.class < Class::Fill {
            state.shares.end(taken.flow, taken.bytes);
        }
        state.own -= 1;
        state.ended(taken.blob.way());
        state.ahead -= usize::from(taken.class > Class::Demand);
        if taken.class == Class::Fill {
            state.fills.remove(&taken.blob.key(taken.chunks.start));
        }
        self.freed(&state);
    }
}

/// Adds wanted chunks, all at once; returns them at the end or when there is no thread.
pub(super) fn want(
    shared: &Arc<FetchShared>,
    wanted: Vec<WantedChunk>,
) -> Result<(), Vec<WantedChunk>> {
    let crew = &shared.crew;
    let mut state = crew.lock();
    if state.ending || (state.threads.is_empty() && !add_thread(shared, &mut state)) {
        return Err(wanted);
    }
    let filled = super::filled(&wanted);
    for wanted in wanted {
        state.queue.push(wanted);
    }
    drop(state);
    crew.wake.notify_one();
    filled.into_iter().for_each(|(key, flow)| shared.urge_awaited(key, flow));
    Ok(())
}

/// Starts a thread if none is idle: this thread may wait for its server for long, and chunks wanted meanwhile
/// need another thread.
fn grow(shared: &Arc<FetchShared>) {
    let mut state = shared.crew.lock();
    let most = shared.crew.most + MOST_BEYOND;
    if state.idle == 0 && state.threads.len() < most && !state.ending {
        add_thread(shared, &mut state);
    }
}

fn add_thread(shared: &Arc<FetchShared>, state: &mut CrewState) -> bool {
    let own = shared.clone();
    state.threads.spawn_or_log("fetch", move || run(&own))
}

/// Body of a fetch thread.
fn run(shared: &Arc<FetchShared>) {
    threads::mark_io_thread();
    while let Some(taken) = shared.crew.next(&shared.pace) {
        grow(shared);
        // The fill has a bound of its own, and what it has fetched may wait long.
        if taken.class < Class::Fill {
            shared.workers.wait_for_room(taken.flow);
        }
        fetch(shared, &taken);
        if taken.class < Class::Fill {
            shared.pace.demand().note();
        }
        shared.crew.done(&taken);
    }
}

/// Runs one request.
fn fetch(shared: &Arc<FetchShared>, taken: &Taken) {
    let keys = || taken.chunks.clone().map(|chunk| taken.blob.key(chunk));
    if !keys().any(|key| shared.delivery.is_loading(key)) {
        // Another way has brought them.
        keys().for_each(|key| shared.fill.ended(key, true));
        return;
    }
    let source = taken.blob.source();
    let places: Result<Vec<EncodedRange>, ChunkError> =
        taken.chunks.clone().map(|chunk| source.encoded(chunk)).collect();
    let places = match places {
        Ok(places) => places,
        Err(error) => {
            let error = Arc::new(error);
            for (chunk, (class, tries)) in taken.chunks.clone().zip(&taken.wanted) {
                let wanted = WantedChunk {
                    blob: taken.blob.clone(),
                    chunk,
                    class: *class,
                    tries: *tries,
                    flow: taken.flow,
                };
                shared.fail(&wanted, error.clone());
            }
            return;
        }
    };
    let counters = &shared.counters;
    let requests = match taken.class {
        Class::Demand => &counters.demand_requests,
        Class::Prefetch => &counters.ahead_requests,
        Class::Fill => &counters.fill_requests,
    };
    requests.add(1);
    let (Some(first), Some(last)) = (places.first(), places.last()) else { return };
    let range = first.range.start..last.range.end;
    let bytes = range.end - range.start;
    let begun = Instant::now();
    let mut run = ChunkRun::new(shared, taken, &places);
    match source.blob().read_run(range, taken.class, &mut run) {
        Ok(()) => {
            // Chunks that consist only of the shared byte are complete by now; `room` notices that.
            let _ = run.room();
            let wait = run.first_byte().map_or(begun.elapsed(), |first| first - begun);
            let whole = begun.elapsed();
            counters.first_byte.add(wait);
            counters.whole.add(whole);
            let beside = shared.crew.busy() - 1;
            taken.blob.measured(bytes, wait, whole, beside);
            shared.pace.measured(&taken.blob);
        }
        Err(error) => {
            let error = Arc::new(ChunkError::from(error));
            let rest: Vec<WantedChunk> = run.rest().collect();
            for wanted in rest {
                shared.fail(&wanted, error.clone());
            }
        }
    }
}
