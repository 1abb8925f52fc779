//! The workers that verify and decode: one for each core, demand first.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use crossbeam_queue::ArrayQueue;

use super::blob::{Blob, Key};
use super::queue::Wanted;
use super::{MOST_TRIES, Shared, count, failure};
use crate::chunk::{ChunkBytes, ChunkError, EncodedChunk};
use crate::source::Class;

/// Buffers for encoded chunks that wait to be used again, at most: as many as are usually under way.
const SPARE_BUFFERS: usize = 32;

/// A chunk to be decoded.
pub(super) struct Job {
    pub(super) blob: Arc<Blob>,
    pub(super) chunk: u32,
    pub(super) class: Class,
    /// Damaged deliveries so far.
    pub(super) tries: u8,
    pub(super) input: Input,
}

/// Where its encoded bytes are.
pub(super) enum Input {
    /// They came from a server.
    Fetched(EncodedChunk),
    /// In a local file or the disk tier: the worker reads them.
    Near,
}

impl Job {
    pub(super) fn wanted(&self) -> Wanted {
        let Self { chunk, class, tries, .. } = *self;
        Wanted { blob: self.blob.clone(), chunk, class, tries }
    }

    fn key(&self) -> Key {
        self.blob.key(self.chunk)
    }
}

/// The threads and what they have to do.
pub(super) struct Workers {
    state: Mutex<State>,
    wake: Condvar,
    most: usize,
    spare: ArrayQueue<Vec<u8>>,
}

#[derive(Default)]
struct State {
    demand: VecDeque<Job>,
    ahead: VecDeque<Job>,
    idle: usize,
    threads: Vec<JoinHandle<()>>,
    ending: bool,
}

impl Workers {
    pub(super) fn new(most: usize) -> Self {
        let spare = ArrayQueue::new(SPARE_BUFFERS);
        Self { state: Mutex::default(), wake: Condvar::new(), most, spare }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a job; or gives it back, at the end or when there is no worker.
    pub(super) fn push(&self, job: Job) -> Result<(), Job> {
        let mut state = self.lock();
        if state.ending || state.threads.is_empty() {
            return Err(job);
        }
        if job.class == Class::Demand {
            state.demand.push_back(job);
        } else {
            state.ahead.push_back(job);
        }
        drop(state);
        self.wake.notify_one();
        Ok(())
    }

    pub(super) fn urge(&self, key: Key) {
        let mut state = self.lock();
        let at = state.ahead.iter().position(|job| job.key() == key);
        if let Some(mut job) = at.and_then(|at| state.ahead.remove(at)) {
            job.class = Class::Demand;
            state.demand.push_back(job);
        }
    }

    /// A buffer that was used before, or a new one.
    pub(super) fn buffer(&self) -> Vec<u8> {
        self.spare.pop().unwrap_or_default()
    }

    fn give_back(&self, encoded: EncodedChunk) {
        let _ = self.spare.push(encoded.into_buffer());
    }

    /// Takes no more; returns what was not begun.
    pub(super) fn end(&self) -> Vec<Job> {
        let mut state = self.lock();
        state.ending = true;
        self.wake.notify_all();
        let mut left: Vec<Job> = state.demand.drain(..).collect();
        left.extend(state.ahead.drain(..));
        left
    }

    /// Waits for the threads.
    pub(super) fn join(&self) {
        loop {
            let Some(thread) = self.lock().threads.pop() else { return };
            if thread.thread().id() != thread::current().id() {
                let _ = thread.join();
            }
        }
    }

    fn next(&self) -> Option<Job> {
        let mut state = self.lock();
        loop {
            if let Some(job) = state.demand.pop_front() {
                return Some(job);
            }
            if let Some(job) = state.ahead.pop_front() {
                return Some(job);
            }
            if state.ending {
                return None;
            }
            state.idle += 1;
            state = self.wake.wait(state).unwrap_or_else(PoisonError::into_inner);
            state.idle -= 1;
        }
    }
}

/// Starts the first worker. The others are started by workers; see [`Crew`](super::crew).
pub(super) fn start(shared: &Arc<Shared>) {
    add_thread(shared, &mut shared.workers.lock());
}

/// Starts a worker if there is work that no idle one will take.
fn grow(shared: &Arc<Shared>) {
    let workers = &shared.workers;
    let mut state = workers.lock();
    let needed = state.idle == 0 && !(state.demand.is_empty() && state.ahead.is_empty());
    if needed && state.threads.len() < workers.most && !state.ending {
        add_thread(shared, &mut state);
    }
}

fn add_thread(shared: &Arc<Shared>, state: &mut State) {
    let number = state.threads.len();
    let own = shared.clone();
    let body = move || {
        super::mark_io_thread();
        while let Some(job) = own.workers.next() {
            grow(&own);
            work(&own, job);
        }
    };
    match thread::Builder::new().name(format!("inflate-{number}")).spawn(body) {
        Ok(thread) => state.threads.push(thread),
        Err(error) => tracing::error!("Cannot start inflate worker {number}: {error}"),
    }
}

/// One chunk, from its encoded bytes to everyone who waits for it.
fn work(shared: &Arc<Shared>, mut job: Job) {
    // A panic is a bug of the decoder; the reader gets an error and the thread lives on.
    let result = catch_unwind(AssertUnwindSafe(|| decode(shared, &mut job)));
    let result = result.unwrap_or_else(|_| {
        job.tries = MOST_TRIES;
        Err(failure(&job.blob, "The decoder of this chunk panicked"))
    });
    let error = match result {
        Ok(bytes) => {
            let key = job.key();
            shared.deliver(key, Ok(bytes));
            if let Input::Fetched(encoded) = job.input {
                shared.workers.give_back(encoded);
            }
            return;
        }
        Err(error) => error,
    };
    let damaged = matches!(*error, ChunkError::Damaged { .. });
    if damaged {
        count(&shared.counters.damaged, 1);
        if job.tries + 1 < MOST_TRIES && !shared.crew.is_ending() {
            tracing::warn!(%error, "A chunk is fetched again");
            job.blob.failures().note(job.chunk, true, &*error);
            if let Ok(place) = job.blob.source().encoded(job.chunk) {
                job.blob.source().blob().distrust(place.range);
            }
            let wanted = job.wanted();
            shared.want(vec![Wanted { tries: wanted.tries + 1, ..wanted }]);
            return;
        }
    }
    let wanted = Wanted { tries: MOST_TRIES, ..job.wanted() };
    shared.fail(&wanted, error);
}

/// Reads what is near, verifies and decodes.
fn decode(shared: &Arc<Shared>, job: &mut Job) -> Result<ChunkBytes, Arc<ChunkError>> {
    let source = job.blob.source();
    if let Input::Near = job.input {
        let place = source.encoded(job.chunk).map_err(Arc::new)?;
        let mut encoded = EncodedChunk::new(&place, shared.workers.buffer());
        let read = source.blob().read_exact_at(encoded.bytes_mut(), place.range.start);
        read.map_err(|error| Arc::new(ChunkError::from(error)))?;
        count(&shared.counters.local, 1);
        job.input = Input::Fetched(encoded);
    }
    let Input::Fetched(encoded) = &mut job.input else {
        return Err(failure(&job.blob, "The chunk has no bytes"));
    };
    let mut room = shared.delivery.room(source.room(job.chunk));
    let begun = Instant::now();
    let data = source.decode(job.chunk, encoded, room.bytes_mut()).map_err(Arc::new)?;
    shared.counters.inflated(encoded.bytes().len(), data.len(), begun);
    Ok(ChunkBytes::new(room, data))
}
