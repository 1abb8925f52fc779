//! The fetch threads: they wait for the network, so that no other thread has to.
//!
//! There is one at first, and another starts whenever all are busy, up to a limit. New ones are started by
//! fetch threads, never by the thread that wants a chunk: a thread inherits the CPUs that it may run on, and
//! a ublk queue thread is bound to its own. A quarter of the threads is reserved for demand, and a quarter for other
//! devices than the one that has the most ([`fair`](super::fair)).
//!
//! The background fill gets the remaining capacity, limited by [`Pace`](super::pace): large requests, and as
//! many as fill the line, while there is no demand; else small ones and few.

use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex, MutexGuard};

use super::fair::{Bounds, Flow, Shares};
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

/// Limit on the encoded bytes of all requests in flight, 256 MiB: a line of 10 Gbit/s brings as many in 200 ms. A segment
/// can be longer than a request ([`MAX_SEGMENT`](formats::segments::MAX_SEGMENT)), so the number of requests is no bound.
const MOST_IN_FLIGHT: u64 = 256 << 20;

/// Encoded bytes below which a request is not divided between connections, 1 MiB: half a round trip at an
/// object store's rate for one connection. Below it more requests only cost more.
const LEAST_BYTES: u64 = 1 << 20;

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
    /// Requests in flight without a waiter, those of the fill included.
    ahead: usize,
    /// Requests of the fill in flight.
    fill: usize,
    /// Requests of each device in flight, those of the fill excluded.
    shares: Shares,
    threads: Pool,
    ending: bool,
}

impl State {
    /// Requests in flight for demand or ahead of it.
    fn threads_at_work(&self) -> usize {
        (self.threads.len() - self.idle.min(self.threads.len())).saturating_sub(self.fill + 1)
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

    pub(super) fn urge(&self, key: Key, flow: Flow) {
        self.lock().queue.urge(key, flow);
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
            let free = state.idle + 1 + self.most.saturating_sub(state.threads.len());
            let fill = pace.fill(state.threads_at_work(), state.fill);
            let limit = Limit { most: MOST_BYTES, least: LEAST_BYTES, free, demand_only, fill };
            let State { queue, shares, .. } = &mut *state;
            let (active, bounds) = (shares.active(), self.bounds());
            let may = |flow, bytes| shares.may_begin(flow, bytes, active, bounds);
            if let Some(taken) = queue.take(limit, &may) {
                if taken.class < Class::Fill {
                    state.shares.begin(taken.flow, taken.bytes);
                }
                state.ahead += usize::from(taken.class > Class::Demand);
                state.fill += usize::from(taken.class == Class::Fill);
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
        let class = taken.class;
        let mut state = self.lock();
        if class < Class::Fill {
            state.shares.end(taken.flow, taken.bytes);
        }
        state.ahead -= usize::from(class > Class::Demand);
        state.fill -= usize::from(class == Class::Fill);
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
    if state.idle == 0 && state.threads.len() < shared.crew.most && !state.ending {
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
        shared.workers.wait_for_room(taken.flow);
        fetch(shared, &taken);
        if taken.class == Class::Demand {
            shared.pace.demand();
        }
        shared.crew.done(&taken);
    }
}

/// Runs one request.
fn fetch(shared: &Arc<Shared>, taken: &Taken) {
    let source = taken.blob.source();
    let places: Result<Vec<Encoded>, ChunkError> =
        taken.chunks.clone().map(|chunk| source.encoded(chunk)).collect();
    let places = match places {
        Ok(places) => places,
        Err(error) => {
            let error = Arc::new(error);
            for (chunk, (class, tries)) in taken.chunks.clone().zip(&taken.wanted) {
                let wanted = Wanted {
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
