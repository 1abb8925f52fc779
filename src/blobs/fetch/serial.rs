//! Long zstd frames: decoded from their beginning, once for everyone who wants some of them.
//!
//! A chunk of such a frame decodes only behind all those before it
//! ([`ChunkSource::serial`](source::chunk::ChunkSource::serial)). So it is not a job for any worker: each frame of
//! which something is wanted has *one* thread at a time, and two readers of a frame never decode it twice
//! at once. Whoever wants a chunk puts it on the frame's list; the thread goes through the frame, and what
//! it passes goes to those who wait for it, and to the tier that keeps it:
//!
//! * with a *decoded* tier that holds the whole frame, it goes on to the frame's end, as the background fill
//!   would, and no slower than the disk takes it: then the frame is done with for ever;
//! * with an *encoded* tier, what was fetched is kept as it came, and need not be fetched again;
//! * with neither, what is passed and not wanted is kept in memory where that is free, and lost otherwise.
//!
//! What is wanted but was passed is in the tier, or on its way there; else the frame is begun again, when
//! what is wanted ahead has been reached. A thread with nothing to do waits [`PARKED`] with its decoder for a
//! reader that goes on, unless another frame needs the thread.
//!
//! Memory: windows of [`MOST_WINDOWS`] together (one is 2 to 8 MiB at usual levels, 128 MiB at most), two requests of
//! bytes for each of at most [`MOST_THREADS`] frames, and the tier's queue. The lists hold what the cache has
//! claimed.
//!
//! # Contents
//!
//! * `pass`  one thread's way through one frame
//! * `feed`  the encoded bytes for it, fetched ahead and verified

mod feed;
mod pass;

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::Shared;
use super::blob::{Blob, Key};
use super::queue::Wanted;
use source::Class;

/// Frames that are decoded at the same time at most: images have ten layers, and a start reads of most.
const MOST_THREADS: usize = 16;

/// Bytes of windows of the frames that are decoded at the same time, at most.
const MOST_WINDOWS: u64 = 256 << 20;

/// How long a thread that another frame needs still waits for somebody who goes on: a reader asks for the next
/// piece when it has got one.
const LINGER: Duration = Duration::from_millis(100);

/// How long a decoder waits for somebody who goes on where it stands.
const PARKED: Duration = Duration::from_secs(20);

/// The threads and what they have to do.
#[derive(Default)]
pub(super) struct Serials {
    state: Mutex<State>,
    wake: Condvar,
}

#[derive(Default)]
struct State {
    /// By their first chunk.
    frames: HashMap<Key, Frame>,
    threads: Vec<JoinHandle<()>>,
    /// Threads that have no frame.
    idle: usize,
    /// Bytes of windows.
    windows: u64,
    /// Threads that wait until others give windows back.
    starved: usize,
    ending: bool,
}

/// A frame of which something is wanted, or was a moment ago.
struct Frame {
    blob: Arc<Blob>,
    chunks: Range<u32>,
    wanted: BTreeMap<u32, Wanted>,
    /// Whether a thread has it.
    taken: bool,
}

/// What a thread is to do.
struct Orders {
    /// Wanted, but passed.
    behind: Vec<Wanted>,
    /// The last chunk that is wanted ahead.
    last: Option<u32>,
    /// How urgent the most urgent of those ahead is.
    class: Class,
    /// Another frame needs the thread.
    contested: bool,
    ending: bool,
}

impl State {
    /// Whether a frame that somebody waits for has no thread or no memory, and gets none.
    fn is_contested(&self) -> bool {
        let waits = |frame: &Frame| !frame.taken && !frame.wanted.is_empty();
        let full = self.idle == 0 && self.threads.len() >= MOST_THREADS;
        self.starved > 0 || full && self.frames.values().any(waits)
    }
}

impl Serials {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>, most: Duration) -> MutexGuard<'a, State> {
        let waited = self.wake.wait_timeout(state, most);
        waited.map_or_else(|poisoned| poisoned.into_inner().0, |(state, _)| state)
    }

    /// Somebody waits now for a chunk that was wanted ahead of time.
    pub(super) fn urge(&self, key: Key) {
        let mut state = self.lock();
        let frames = state.frames.iter_mut().filter(|(first, _)| first.blob == key.blob);
        for (_, frame) in frames {
            if let Some(wanted) = frame.wanted.get_mut(&key.chunk) {
                wanted.class = Class::Demand;
                self.wake.notify_all();
            }
        }
    }

    /// Takes no more; returns what was not delivered.
    pub(super) fn end(&self) -> Vec<Wanted> {
        let mut state = self.lock();
        state.ending = true;
        self.wake.notify_all();
        let frames = state.frames.values_mut();
        frames.flat_map(|frame| std::mem::take(&mut frame.wanted).into_values()).collect()
    }

    /// Waits for the threads.
    pub(super) fn join(&self) {
        loop {
            let Some(thread) = self.lock().threads.pop() else { return };
            // A waiter may hold the last reference to the cache, and drop it on one of these threads.
            if thread.thread().id() != thread::current().id() {
                let _ = thread.join();
            }
        }
    }

    /// The next frame that needs a thread; waits for one. `None` at the end.
    fn next(&self) -> Option<(Arc<Blob>, Range<u32>)> {
        let mut state = self.lock();
        loop {
            if state.ending {
                return None;
            }
            let urgency = |frame: &&mut Frame| frame.wanted.values().map(|one| one.class).min();
            let free = state.frames.values_mut().filter(|frame| !frame.taken);
            let free = free.filter(|frame| !frame.wanted.is_empty());
            if let Some(frame) = free.min_by_key(urgency) {
                frame.taken = true;
                return Some((frame.blob.clone(), frame.chunks.clone()));
            }
            state.idle += 1;
            state = self.wake.wait(state).unwrap_or_else(PoisonError::into_inner);
            state.idle -= 1;
        }
    }

    /// What the thread of frame `first` is to do at chunk `at`.
    fn orders(&self, first: Key, at: u32) -> Orders {
        let state = self.lock();
        let (contested, ending) = (state.is_contested(), state.ending);
        let mut orders =
            Orders { behind: Vec::new(), last: None, class: Class::Fill, contested, ending };
        if let Some(frame) = state.frames.get(&first) {
            orders.behind = frame.wanted.range(..at).map(|(_, wanted)| wanted.clone()).collect();
            for (chunk, wanted) in frame.wanted.range(at..) {
                orders.last = Some(*chunk);
                orders.class = orders.class.min(wanted.class);
            }
        }
        orders
    }

    /// Takes a chunk off the list of frame `first`.
    fn remove(&self, first: Key, chunk: u32) -> Option<Wanted> {
        self.lock().frames.get_mut(&first)?.wanted.remove(&chunk)
    }

    /// Puts a chunk on the list of frame `first` again; or gives it back, at the end.
    fn put_back(&self, first: Key, wanted: Wanted) -> Option<Wanted> {
        let mut state = self.lock();
        if state.ending {
            return Some(wanted);
        }
        match state.frames.get_mut(&first) {
            Some(frame) => {
                frame.wanted.entry(wanted.chunk).or_insert(wanted);
                None
            }
            None => Some(wanted),
        }
    }

    /// Whether somebody waits for something of frame `first`, or everything ends.
    fn is_urgent(&self, first: Key) -> bool {
        let state = self.lock();
        let demands = |frame: &Frame| frame.wanted.values().any(|one| one.class == Class::Demand);
        state.ending || state.frames.get(&first).is_some_and(demands)
    }

    /// Waits until a window of so many bytes fits beside the others. One alone always does. False at the end.
    fn reserve(&self, window: u64) -> bool {
        let mut state = self.lock();
        let mut waits = false;
        let fits = loop {
            if state.ending {
                break false;
            }
            if state.windows == 0 || state.windows + window <= MOST_WINDOWS {
                state.windows += window;
                break true;
            }
            if !waits {
                waits = true;
                state.starved += 1;
                self.wake.notify_all();
            }
            state = self.wait(state, LINGER);
        };
        state.starved -= usize::from(waits);
        fits
    }

    /// Gives back what was reserved.
    fn release(&self, window: u64) {
        if window > 0 {
            self.lock().windows -= window;
            self.wake.notify_all();
        }
    }

    /// Gives a frame up, with everything on its list.
    fn give_up(&self, first: Key) -> Vec<Wanted> {
        let frame = self.lock().frames.remove(&first);
        frame.map_or_else(Vec::new, |frame| frame.wanted.into_values().collect())
    }

    /// Waits until something is wanted of frame `first`, for `most` or until `is_over`. True if something is; else
    /// the frame is given up.
    fn park(&self, first: Key, most: Duration, is_over: &mut dyn FnMut() -> bool) -> bool {
        let begun = Instant::now();
        let mut state = self.lock();
        loop {
            let wanted = state.frames.get(&first).is_some_and(|frame| !frame.wanted.is_empty());
            if state.ending || wanted {
                return !state.ending;
            }
            let left = most.saturating_sub(begun.elapsed());
            let yields = state.is_contested() && begun.elapsed() >= LINGER;
            if left.is_zero() || yields || is_over() {
                state.frames.remove(&first);
                return false;
            }
            state = self.wait(state, left.min(Duration::from_millis(50)));
        }
    }
}

/// Adds to what is wanted, all at once; or gives it back, at the end or when there is no thread.
pub(super) fn want(shared: &Arc<Shared>, wanted: Vec<Wanted>) -> Result<(), Vec<Wanted>> {
    let serials = &shared.serials;
    let mut state = serials.lock();
    if state.ending || (state.threads.is_empty() && !add_thread(shared, &mut state)) {
        return Err(wanted);
    }
    for wanted in wanted {
        let chunks = wanted.blob.source().serial(wanted.chunk);
        let first = wanted.blob.key(chunks.start);
        let frame = state.frames.entry(first).or_insert_with(|| Frame {
            blob: wanted.blob.clone(),
            chunks,
            wanted: BTreeMap::new(),
            taken: false,
        });
        frame.wanted.insert(wanted.chunk, wanted);
    }
    let waiting = state.frames.values().filter(|frame| !frame.taken).count();
    if waiting > state.idle && state.threads.len() < MOST_THREADS {
        add_thread(shared, &mut state);
    }
    drop(state);
    serials.wake.notify_all();
    Ok(())
}

fn add_thread(shared: &Arc<Shared>, state: &mut State) -> bool {
    let number = state.threads.len();
    let own = shared.clone();
    let body = move || {
        sys::thread::mark_io_thread();
        while let Some((blob, chunks)) = own.serials.next() {
            pass::run(&own, &blob, chunks);
        }
    };
    match thread::Builder::new().name(format!("frame-{number}")).spawn(body) {
        Ok(thread) => {
            state.threads.push(thread);
            true
        }
        Err(error) => {
            tracing::error!("Cannot start frame thread {number}: {error}");
            false
        }
    }
}
