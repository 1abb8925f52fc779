//! The fetch threads: they wait for the network, so that no other thread has to.
//!
//! There is one at first, and another starts whenever all are busy, up to a limit. New ones are started by
//! fetch threads, never by the thread that wants a chunk: a thread inherits the CPUs that it may run on, and
//! a ublk queue thread is bound to its own. A quarter of the threads is reserved for demand.
//!
//! A request to a registry that is down, or slow, keeps its thread until a deadline. So a way (see [`Key`]) without any
//! request in flight gets a thread for its demand even when all are busy, beyond the limit: the readers of one
//! repository never wait for another's.
//!
//! The background fill gets the remaining capacity, limited by [`Pace`](super::pace): large requests, and as
//! many as fill the line, while there is no demand; else small ones and few.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex, MutexGuard};

use super::pace::Pace;
use super::queue::{Limit, Queue, Taken, Wanted};
use super::run::ChunkRun;
use super::{Key, Shared};
use source::chunk::{ChunkError, Encoded};
use source::{Class, Run as _};
use threads::{Pool, count};

/// Limit on the encoded bytes of one request, 4 MiB: at a gigabit 32 ms, longer than a round trip across a
/// continent, so larger requests save nothing, while a broken connection loses no more than this.
pub(crate) const MOST_BYTES: u64 = 4 << 20;

/// Encoded bytes below which a request is not divided between connections, 1 MiB: half a round trip at an
/// object store's rate for one connection. Below it more requests only cost more.
const LEAST_BYTES: u64 = 1 << 20;

/// Limit on requests in flight beyond those, one for each way that has no other: more repositories are seldom in use at
/// once, and far fewer are down.
const MOST_BEYOND: usize = 32;

/// Interval at which a fill that is held back is checked again.
const HELD_BACK: Duration = Duration::from_millis(50);

/// The threads and their work.
pub(super) struct Crew {
    state: Mutex<State>,
    wake: Condvar,
    most: usize,
    /// Requests of [`Class::Prefetch`] under way at most.
    prefetches: usize,
}

#[derive(Default)]
struct State {
    queue: Queue,
    /// Number of threads that wait for work.
    idle: usize,
    /// Requests in flight.
    requests: usize,
    /// The same by way.
    requests_of: HashMap<u32, usize>,
    /// Requests in flight without a waiter, those of the fill included.
    ahead: usize,
    /// Requests of the fill in flight.
    fill: usize,
    threads: Pool,
    ending: bool,
}

impl State {
    /// Requests in flight for demand or ahead of it.
    fn threads_at_work(&self) -> usize {
        self.requests.saturating_sub(self.fill)
    }

    fn begun(&mut self, taken: &Taken) {
        self.requests += 1;
        *self.requests_of.entry(taken.blob.way()).or_default() += 1;
        self.ahead += usize::from(taken.class > Class::Demand);
        self.fill += usize::from(taken.class == Class::Fill);
    }

    fn ended(&mut self, taken: &Taken) {
        self.requests -= 1;
        if let Some(requests) = self.requests_of.get_mut(&taken.blob.way()) {
            *requests -= 1;
            if *requests == 0 {
                self.requests_of.remove(&taken.blob.way());
            }
        }
        self.ahead -= usize::from(taken.class > Class::Demand);
        self.fill -= usize::from(taken.class == Class::Fill);
    }
}

impl Crew {
    pub(super) fn new(most: usize, prefetches: Option<usize>) -> Self {
        let prefetches = prefetches.unwrap_or(usize::MAX).max(1);
        Self { state: Mutex::default(), wake: Condvar::new(), most, prefetches }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }

    pub(super) fn urge(&self, key: Key) {
        self.lock().queue.urge(key);
        self.wake.notify_one();
    }

    pub(super) fn is_ending(&self) -> bool {
        self.lock().ending
    }

    /// Accepts no more work; returns the work that was not begun.
    pub(super) fn end(&self) -> Vec<Wanted> {
        let mut state = self.lock();
        state.ending = true;
        self.wake.notify_all();
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
            let prefetches = state.ahead - state.fill.min(state.ahead);
            let demand_only = state.ahead >= self.most_ahead() || prefetches >= self.prefetches;
            let free = self.most.saturating_sub(state.requests).max(1);
            let fill = pace.fill(state.threads_at_work(), state.fill);
            let limit = Limit { most: MOST_BYTES, least: LEAST_BYTES, free, demand_only, fill };
            let State { queue, requests, requests_of, .. } = &mut *state;
            let taken = if *requests < self.most {
                queue.take(limit)
            } else {
                queue.take_of_idle(limit, &|way| requests_of.contains_key(&way))
            };
            if let Some(taken) = taken {
                state.begun(&taken);
                return Some(taken);
            }
            state.idle += 1;
            // A fill that is held back gets no signal when the pause is over, so it polls.
            let held_back = state.queue.has_fill();
            if held_back {
                self.wake.wait_for(&mut state, HELD_BACK);
            } else {
                self.wake.wait(&mut state);
            }
            state.idle -= 1;
        }
    }

    /// Requests in flight, at least the caller's own.
    fn busy(&self) -> usize {
        self.lock().requests.max(1)
    }

    fn done(&self, taken: &Taken) {
        let mut state = self.lock();
        state.ended(taken);
        // Work that this request held back may start now, on another thread if this one takes demand.
        if !state.queue.is_empty() {
            self.wake.notify_one();
        }
    }
}

/// Adds wanted chunks, all at once; returns them at the end or when there is no thread.
pub(super) fn want(shared: &Arc<Shared>, wanted: Vec<Wanted>) -> Result<(), Vec<Wanted>> {
    let crew = &shared.crew;
    let mut state = crew.lock();
    if state.ending || (state.threads.is_empty() && !add_thread(shared, &mut state)) {
        return Err(wanted);
    }
    for wanted in wanted {
        state.queue.push(wanted);
    }
    drop(state);
    crew.wake.notify_one();
    Ok(())
}

/// Starts a thread if none is idle: this thread may wait for its server for long, and chunks wanted meanwhile
/// need another thread.
fn grow(shared: &Arc<Shared>) {
    let mut state = shared.crew.lock();
    let most = shared.crew.most + MOST_BEYOND;
    if state.idle == 0 && state.threads.len() < most && !state.ending {
        add_thread(shared, &mut state);
    }
}

fn add_thread(shared: &Arc<Shared>, state: &mut State) -> bool {
    let own = shared.clone();
    state.threads.spawn_or_log("fetch", move || run(&own))
}

/// Body of a fetch thread.
fn run(shared: &Arc<Shared>) {
    threads::mark_io_thread();
    while let Some(taken) = shared.crew.next(&shared.pace) {
        grow(shared);
        fetch(shared, &taken);
        if taken.class == Class::Demand {
            shared.pace.demand();
        }
        shared.crew.done(&taken);
    }
}

/// Runs one request.
fn fetch(shared: &Arc<Shared>, taken: &Taken) {
    let keys = || taken.chunks.clone().map(|chunk| taken.blob.key(chunk));
    if !keys().any(|key| shared.delivery.is_loading(key)) {
        // Another way has brought them.
        keys().for_each(|key| shared.fill.ended(key, true));
        return;
    }
    let source = taken.blob.source();
    let places: Result<Vec<Encoded>, ChunkError> =
        taken.chunks.clone().map(|chunk| source.encoded(chunk)).collect();
    let places = match places {
        Ok(places) => places,
        Err(error) => {
            let error = Arc::new(error);
            for (chunk, (class, tries)) in taken.chunks.clone().zip(&taken.wanted) {
                let wanted =
                    Wanted { blob: taken.blob.clone(), chunk, class: *class, tries: *tries };
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
    count(requests, 1);
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
            shared.pace.line(taken.blob.depth());
        }
        Err(error) => {
            let error = Arc::new(ChunkError::from(error));
            let rest: Vec<Wanted> = run.rest().collect();
            for wanted in rest {
                shared.fail(&wanted, error.clone());
            }
        }
    }
}
