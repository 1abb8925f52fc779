//! Choice of the chunk to evict: S3-FIFO, adapted to bursts of uses.
//!
//! New chunks wait in a small queue, a quarter of the budget, and chunks that are used there move on to the
//! main queue; so a scan evicts only chunks that it loaded itself. A chunk that recently left the small queue
//! unused is remembered, and goes to the main queue at once if it comes back.
//!
//! A chunk is a mebibyte, and a file is read by requests of at most a quarter of that: every chunk is touched
//! several times when it comes, and a plain count of uses would rank a scan above all other chunks. So a use
//! counts only after half a small queue of other chunks has come since ([`Clock::is_over`]).
//!
//! The algorithm is chosen by measurement of real starts at several budgets: `perf/eviction.rs`, figures in
//! `perf/README.md`. CLOCK, the earlier algorithm, fetches up to 1.8 times as much again at the default
//! budget, and hardly less anywhere.
//!
//! The small queue is one a device, and the device with the most bytes in it gives up its oldest: a device that reads cold
//! without end evicts its own chunks, not those that another is about to read.
//!
//! The queues have one lock, taken when a chunk comes or goes. A hit takes only the lock of its shard, which
//! holds the marks of use.

use std::collections::{HashSet, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};

use crate::fetch::{Flow, SharedChunk};

/// Divisor of the budget for the small queue. A tenth, as in the paper, is only a few chunks here.
const SMALL: u64 = 4;

/// Largest count of uses: the number of turns in the main queue that they are worth.
pub(super) const MOST_USES: u8 = 3;

/// Number of chunks that have come, and number of chunks in a burst: read at every hit, so kept outside the
/// lock.
#[derive(Debug, Default)]
pub(super) struct Clock {
    came: AtomicU64,
    burst: AtomicU64,
}

impl Clock {
    /// The time now, in chunks.
    pub(super) fn now(&self) -> u64 {
        self.came.load(Ordering::Relaxed)
    }

    /// True if the burst of reads that loaded a chunk at `came` is over.
    pub(super) fn is_over(&self, came: u64) -> bool {
        self.now().saturating_sub(came) > self.burst.load(Ordering::Relaxed)
    }
}

/// Result of a test of the chunk at a queue's head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum EvictionTry {
    /// It was evicted.
    Evicted,
    /// It was used; one use is subtracted.
    Used,
    /// It has a reader: its memory would not become free.
    InUse,
}

/// The order of the chunks that are held.
#[derive(Debug, Default)]
pub(super) struct Queues {
    small: Vec<SmallQueue>,
    main: VecDeque<(SharedChunk, u64)>,
    /// Chunks in all small queues, and their bytes.
    small_len: usize,
    small_bytes: u64,
    ghosts: HashSet<SharedChunk>,
    ghost_order: VecDeque<SharedChunk>,
}

/// The small queue of a device.
#[derive(Debug)]
struct SmallQueue {
    flow: Flow,
    bytes: u64,
    chunks: VecDeque<(SharedChunk, u64)>,
}

impl Queues {
    /// Adds a chunk that a device loaded; returns true if it goes to the main queue.
    pub(super) fn insert(
        &mut self,
        key: SharedChunk,
        flow: Flow,
        bytes: u64,
        clock: &Clock,
    ) -> bool {
        clock.came.fetch_add(1, Ordering::Relaxed);
        let main = self.ghosts.remove(&key);
        if main {
            self.main.push_back((key, bytes));
        } else {
            self.push_small(key, flow, bytes);
        }
        clock.burst.store(self.small_len as u64 / 2, Ordering::Relaxed);
        main
    }

    fn push_small(&mut self, key: SharedChunk, flow: Flow, bytes: u64) {
        self.small_len += 1;
        self.small_bytes += bytes;
        if let Some(small) = self.small.iter_mut().find(|small| small.flow == flow) {
            small.bytes += bytes;
            small.chunks.push_back((key, bytes));
            return;
        }
        self.small.retain(|small| !small.chunks.is_empty());
        self.small.push(SmallQueue { flow, bytes, chunks: VecDeque::from([(key, bytes)]) });
    }

    /// Takes the oldest chunk of the device that has the most bytes in its small queue.
    fn pop_small(&mut self) -> Option<(SharedChunk, Flow, u64)> {
        let small = self.small.iter_mut().filter(|small| !small.chunks.is_empty());
        let small = small.max_by_key(|small| small.bytes)?;
        let (key, bytes) = small.chunks.pop_front()?;
        small.bytes -= bytes;
        self.small_len -= 1;
        self.small_bytes -= bytes;
        Some((key, small.flow, bytes))
    }

    /// Takes out the chunk that is least worth keeping, with a budget of `budget` bytes. `look` tests one
    /// chunk after the other, and gets its queue (true: main). Returns the bytes of the evicted chunk, if
    /// any.
    pub(super) fn evict(
        &mut self,
        budget: u64,
        look: &mut dyn FnMut(SharedChunk, bool) -> EvictionTry,
    ) -> Option<u64> {
        // After so many rounds every use is subtracted, and the remaining chunks have readers.
        let most = (self.small_len + self.main.len()) * (usize::from(MOST_USES) + 2);
        for _ in 0..most {
            let from_main = self.small_bytes <= budget / SMALL && !self.main.is_empty();
            let (key, flow, bytes) = if from_main {
                self.main.pop_front().map(|(key, bytes)| (key, Flow::default(), bytes))?
            } else {
                self.pop_small()?
            };
            match look(key, from_main) {
                EvictionTry::Evicted => {
                    if !from_main {
                        self.remember(key);
                    }
                    return Some(bytes);
                }
                EvictionTry::InUse if !from_main => self.push_small(key, flow, bytes),
                EvictionTry::Used | EvictionTry::InUse => self.main.push_back((key, bytes)),
            }
        }
        None
    }

    /// As many keys are remembered as chunks are held.
    fn remember(&mut self, key: SharedChunk) {
        self.ghosts.insert(key);
        self.ghost_order.push_back(key);
        while self.ghost_order.len() > self.small_len + self.main.len()
            && let Some(old) = self.ghost_order.pop_front()
        {
            self.ghosts.remove(&old);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    /// A cache of chunks of one byte.
    #[derive(Default)]
    struct Model {
        queues: Queues,
        clock: Clock,
        held: HashMap<u32, (u8, u64, bool)>,
        misses: usize,
    }

    const BUDGET: u64 = 40;

    impl Model {
        fn touch(&mut self, chunk: u32) {
            self.touch_by(0, chunk);
        }

        /// A touch by a device.
        fn touch_by(&mut self, blob: u32, chunk: u32) {
            if let Some((uses, came, main)) = self.held.get_mut(&chunk) {
                if *main || self.clock.is_over(*came) {
                    *uses = (*uses + 1).min(MOST_USES);
                }
                return;
            }
            self.misses += 1;
            while self.held.len() as u64 >= BUDGET {
                let Self { queues, held, .. } = self;
                let evicted = queues.evict(BUDGET, &mut |key, _| {
                    let (uses, _, main) = held.get_mut(&key.number).unwrap();
                    if *uses == 0 {
                        held.remove(&key.number);
                        return EvictionTry::Evicted;
                    }
                    *uses = if *main { *uses - 1 } else { 0 };
                    *main = true;
                    EvictionTry::Used
                });
                assert_eq!(evicted, Some(1));
            }
            let key = SharedChunk { blob: 0, number: chunk };
            let main = self.queues.insert(key, Flow(blob), 1, &self.clock);
            self.held.insert(chunk, (0, self.clock.now(), main));
        }
    }

    #[test]
    fn a_scan_in_bursts_pushes_out_nothing_that_is_used() {
        let mut model = Model::default();
        let hot: Vec<u32> = (0..20).collect();
        for _ in 0..5 {
            hot.iter().for_each(|&chunk| model.touch(chunk));
        }
        for chunk in 1000..3000 {
            (0..8).for_each(|_| model.touch(chunk)); // a file, piece by piece
            if chunk % 50 == 0 {
                hot.iter().for_each(|&chunk| model.touch(chunk));
            }
        }
        assert!(model.misses <= 2000 + 20 + 20, "{} misses", model.misses);
    }

    #[test]
    fn what_comes_back_soon_after_it_was_given_up_is_kept() {
        let mut model = Model::default();
        (0..BUDGET as u32).for_each(|chunk| model.touch(chunk));
        // Chunk 0 is evicted, and comes back.
        model.touch(100);
        assert!(!model.held.contains_key(&0));
        model.touch(0);
        (200..400).for_each(|chunk| model.touch(chunk));
        assert!(model.held.contains_key(&0), "a scan pushed it out");
    }

    #[test]
    fn a_device_that_reads_cold_without_end_leaves_what_another_has_just_loaded() {
        let mut model = Model::default();
        (0..BUDGET as u32).for_each(|chunk| model.touch(chunk));
        for chunk in 100..103 {
            model.touch_by(1, chunk);
        }
        (200..400).for_each(|chunk| model.touch(chunk));
        assert!((100..103).all(|chunk| model.held.contains_key(&chunk)));
    }

    #[test]
    fn when_everything_is_being_read_nothing_is_given_up() {
        let (mut queues, clock) = (Queues::default(), Clock::default());
        for chunk in 0..10 {
            queues.insert(SharedChunk { blob: 0, number: chunk }, Flow::default(), 1, &clock);
        }
        assert_eq!(queues.evict(10, &mut |_, _| EvictionTry::InUse), None);
        assert_eq!(queues.evict(10, &mut |_, _| EvictionTry::Evicted), Some(1));
        assert_eq!(Queues::default().evict(10, &mut |_, _| EvictionTry::Evicted), None);
    }
}
