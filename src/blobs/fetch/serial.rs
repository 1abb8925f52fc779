//! Long zstd frames: decoded from their beginning, once for all waiters.
//!
//! A chunk of such a frame decodes only after all chunks before it
//! ([`SerialChunks`](source::chunk::SerialChunks)). So any decode thread cannot take it: each
//! frame with a wanted chunk has *one* thread at a time, and two readers of a frame never decode it twice at
//! once. A request for a chunk adds it to the frame's list; the thread decodes the frame from its beginning,
//! and passes each chunk to its waiters, and to the tier that keeps it:
//!
//! * with a *decoded* tier that holds the whole frame, the thread continues to the frame's end, like the
//!   background fill, at most at the disk's speed: then the frame need never be decoded again;
//! * with an *encoded* tier, the fetched bytes are kept, and need not be fetched again;
//! * with neither, chunks that are passed without a waiter are kept in free memory, and lost otherwise.
//!
//! A wanted chunk that the thread has passed is in the tier, or on its way there; else the frame is begun
//! again, after the wanted chunks ahead have been reached. A thread without work keeps its decoder and waits
//! [`PARKED`] for a reader that continues, unless another frame needs the thread.
//!
//! A thread may wait for its registry for long. So a way (see [`Key`]) without any thread, or without any window, gets one
//! beyond the limits: a registry that is down holds up its own readers only.
//!
//! Memory: windows of [`MOST_WINDOWS`] together (one is 2 to 8 MiB at usual levels, 128 MiB at most), two
//! requests of bytes for each of at most [`MOST_THREADS`] frames, and the tier's queue. The lists hold only
//! chunks that the cache has claimed.
//!
//! # Contents
//!
//! * `pass`  the pass of one thread through one frame
//! * `feed`  its encoded bytes, fetched ahead and verified

mod feed;
mod pass;

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex, MutexGuard};

use super::FetchShared;
use super::blob::{Blob, Key};
use super::queue::WantedChunk;
use source::Class;
use threads::Pool;

/// Limit on frames that are decoded at the same time: images have ten layers, and a start reads from most of
/// them.
const MOST_THREADS: usize = 16;

/// Limit on threads beyond those, each for a way that has none at work.
const MOST_BEYOND: usize = 16;

/// Limit on the bytes of windows of the frames that are decoded at the same time.
const MOST_WINDOWS: u64 = 128 << 20;

/// Most memory of all frames: their windows, and two batches for each. Reserved while an image with such a frame is open.
pub(crate) const MOST_MEMORY: u64 = MOST_WINDOWS + MOST_THREADS as u64 * 2 * feed::BATCH;

/// Time that a thread which another frame needs still waits for its reader to continue: a reader asks for the
/// next piece when it has got one.
const LINGER: Duration = Duration::from_millis(100);

/// Time that a decoder waits at its position for a reader that continues there.
const PARKED: Duration = Duration::from_secs(20);

/// The threads and their work.
#[derive(Default)]
pub(super) struct Serials {
    state: Mutex<FrameQueue>,
    wake: Condvar,
}

#[derive(Default)]
struct FrameQueue {
    /// Frames by their first chunk.
    frames: HashMap<Key, WantedFrame>,
    threads: Pool,
    /// Number of threads without a frame.
    idle: usize,
    /// Bytes of windows.
    windows: u64,
    /// The same by way.
    windows_of: HashMap<u32, u64>,
    /// Number of threads that wait until others release windows.
    starved: usize,
    ending: bool,
}

/// A frame with wanted chunks, or that had some a moment ago.
struct WantedFrame {
    blob: Arc<Blob>,
    chunks: Range<u32>,
    wanted: BTreeMap<u32, WantedChunk>,
    /// True if a thread has it.
    taken: bool,
}

/// Work of a frame's thread at one position.
struct Orders {
    /// Chunks that are wanted, but passed.
    behind: Vec<WantedChunk>,
    /// The last chunk that is wanted ahead.
    last: Option<u32>,
    /// The highest urgency among those ahead.
    class: Class,
    /// True if another frame needs the thread.
    contested: bool,
    ending: bool,
}

impl FrameQueue {
    fn has_waiter(&self, first: Key) -> bool {
        let demands =
            |frame: &WantedFrame| frame.wanted.values().any(|one| one.class == Class::Demand);
        self.frames.get(&first).is_some_and(demands)
    }

    /// True if a frame with a waiter gets no thread or no memory.
    fn is_contested(&self) -> bool {
        let waits = |frame: &WantedFrame| !frame.taken && !frame.wanted.is_empty();
        let full = self.at_work().count() >= MOST_THREADS;
        self.starved > 0 || full && self.frames.values().any(waits)
    }

    /// Frames that have a thread.
    fn at_work(&self) -> impl Iterator<Item = &Key> {
        self.frames.iter().filter(|(_, frame)| frame.taken).map(|(first, _)| first)
    }

    /// The frame that gets the next thread: the most urgent one; when all threads are at work, of a way that has none.
    fn most_urgent(&mut self) -> Option<&mut WantedFrame> {
        let at_work: Vec<u32> = self.at_work().map(|first| first.way).collect();
        let full = at_work.len() >= MOST_THREADS;
        let free = self.frames.iter_mut().filter(|(first, frame)| {
            let waits = !frame.taken && !frame.wanted.is_empty();
            waits && !(full && at_work.contains(&first.way))
        });
        let urgency = |frame: &&mut WantedFrame| frame.wanted.values().map(|one| one.class).min();
        free.map(|(_, frame)| frame).min_by_key(urgency)
    }
}

impl Serials {
    fn lock(&self) -> MutexGuard<'_, FrameQueue> {
        self.state.lock()
    }

    fn wait<'a>(
        &self,
        mut state: MutexGuard<'a, FrameQueue>,
        most: Duration,
    ) -> MutexGuard<'a, FrameQueue> {
        self.wake.wait_for(&mut state, most);
        state
    }

    /// Makes demand of a chunk that was wanted ahead of time: it has a waiter now. True if it was found.
    pub(super) fn urge(&self, key: Key) -> bool {
        let mut state = self.lock();
        let mut found = false;
        let of_blob = |first: &Key| (first.chunk.blob, first.way) == (key.chunk.blob, key.way);
        for (_, frame) in state.frames.iter_mut().filter(|(first, _)| of_blob(first)) {
            if let Some(wanted) = frame.wanted.get_mut(&key.chunk.number) {
                wanted.class = Class::Demand;
                found = true;
            }
        }
        if found {
            self.wake.notify_all();
        }
        found
    }

    /// Accepts no more work; returns the chunks that were not delivered.
    pub(super) fn end(&self) -> Vec<WantedChunk> {
        let mut state = self.lock();
        state.ending = true;
        self.wake.notify_all();
        let frames = state.frames.values_mut();
        frames.flat_map(|frame| std::mem::take(&mut frame.wanted).into_values()).collect()
    }

    /// Waits for the threads.
    pub(super) fn join(&self) {
        // A waiter may hold the last reference to the cache, and drop it on one of these threads.
        let threads = self.lock().threads.take();
        threads.join();
    }

    /// Returns the next frame that needs a thread, and waits for one. `None` at the end.
    fn next(&self) -> Option<(Arc<Blob>, Range<u32>)> {
        let mut state = self.lock();
        loop {
            if state.ending {
                return None;
            }
            if let Some(frame) = state.most_urgent() {
                frame.taken = true;
                return Some((frame.blob.clone(), frame.chunks.clone()));
            }
            state.idle += 1;
            self.wake.wait(&mut state);
            state.idle -= 1;
        }
    }

    /// Work of the thread of frame `first` at chunk `at`.
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
    fn remove(&self, first: Key, chunk: u32) -> Option<WantedChunk> {
        self.lock().frames.get_mut(&first)?.wanted.remove(&chunk)
    }

    /// Puts a chunk on the list of frame `first` again; returns it at the end.
    fn put_back(&self, first: Key, wanted: WantedChunk) -> Option<WantedChunk> {
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

    /// True if frame `first` has a waiter, or everything ends.
    fn is_urgent(&self, first: Key) -> bool {
        let state = self.lock();
        state.ending || state.has_waiter(first)
    }

    /// True if frame `first` must not be held up: it has a waiter, or another frame needs its thread or its memory.
    fn is_needed(&self, first: Key) -> bool {
        let state = self.lock();
        let full = state.at_work().count() >= MOST_THREADS;
        let waits = |(first, frame): (&Key, &WantedFrame)| !frame.taken && state.has_waiter(*first);
        let contested = state.starved > 0 || full && state.frames.iter().any(waits);
        state.ending || state.has_waiter(first) || contested
    }

    /// Waits until a window of so many bytes fits beside the others. A single one of a way always does. False at
    /// the end.
    fn reserve(&self, way: u32, window: u64) -> bool {
        let mut state = self.lock();
        let mut waits = false;
        let fits = loop {
            if state.ending {
                break false;
            }
            let alone = state.windows_of.get(&way).is_none_or(|windows| *windows == 0);
            if alone || state.windows + window <= MOST_WINDOWS {
                state.windows += window;
                *state.windows_of.entry(way).or_default() += window;
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

    /// Releases a reservation.
    fn release(&self, way: u32, window: u64) {
        if window > 0 {
            let mut state = self.lock();
            state.windows -= window;
            if let Some(windows) = state.windows_of.get_mut(&way) {
                *windows -= window;
                if *windows == 0 {
                    state.windows_of.remove(&way);
                }
            }
            drop(state);
            self.wake.notify_all();
        }
    }

    /// Gives up a frame, and returns its list.
    fn give_up(&self, first: Key) -> Vec<WantedChunk> {
        let frame = self.lock().frames.remove(&first);
        frame.map_or_else(Vec::new, |frame| frame.wanted.into_values().collect())
    }

    /// Waits until a chunk of frame `first` is wanted, for `most` or until `is_over`. True if one is; else
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

/// Adds wanted chunks, all at once; returns them at the end or when there is no thread.
pub(super) fn want(
    shared: &Arc<FetchShared>,
    wanted: Vec<WantedChunk>,
) -> Result<(), Vec<WantedChunk>> {
    let serials = &shared.serials;
    let mut state = serials.lock();
    if state.ending || (state.threads.is_empty() && !add_thread(shared, &mut state)) {
        return Err(wanted);
    }
    let filled = super::filled(&wanted);
    for wanted in wanted {
        let chunks = wanted.blob.source().frame(wanted.chunk);
        let first = wanted.blob.key(chunks.start);
        let frame = state.frames.entry(first).or_insert_with(|| WantedFrame {
            blob: wanted.blob.clone(),
            chunks,
            wanted: BTreeMap::new(),
            taken: false,
        });
        frame.wanted.insert(wanted.chunk, wanted);
    }
    let waiting = state.frames.values().filter(|frame| !frame.taken).count();
    let limit = MOST_THREADS + if state.most_urgent().is_some() { MOST_BEYOND } else { 0 };
    if waiting > state.idle && state.threads.len() < limit {
        add_thread(shared, &mut state);
    }
    drop(state);
    serials.wake.notify_all();
    // A frame of the fill may wait for quiet, and have a waiter now.
    shared.crew.look_again();
    filled.into_iter().for_each(|(key, flow)| shared.urge_awaited(key, flow));
    Ok(())
}

fn add_thread(shared: &Arc<FetchShared>, state: &mut FrameQueue) -> bool {
    let own = shared.clone();
    state.threads.spawn_or_log("frame", move || {
        threads::mark_io_thread();
        threads::yield_to_short_work();
        while let Some((blob, chunks)) = own.serials.next() {
            pass::run(&own, &blob, chunks);
        }
    })
}
