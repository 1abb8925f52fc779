//! Which chunk to give up: S3-FIFO, with an eye on bursts.
//!
//! New chunks wait in a small queue, a quarter of the budget, and those that are used there move on to the main
//! one; so a scan pushes out only what it brought itself. What left the small queue unused lately is
//! remembered, and goes to the main one at once if it comes back.
//!
//! A chunk is a mebibyte, and a file is read by requests of a quarter of that at most: every chunk is touched
//! several times when it comes, and plain counts of uses would take a scan for the hottest thing there is.
//! So a use counts only once half a small queue of others has come since ([`Clock::is_over`]).
//!
//! Chosen by what real starts read, at several budgets: `perf/eviction.rs`, figures in `perf/README.md`. CLOCK,
//! which was here before, fetches up to 1.8 times as much again at the default budget, and hardly less anywhere.
//!
//! The queues have one lock, taken when a chunk comes or goes. A hit takes only its shard's, where the marks of
//! use are.

use std::collections::{HashSet, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};

use crate::fetch::Key;

/// The small queue's part of the budget. A tenth, as in the paper, is a handful of chunks here.
const SMALL: u64 = 4;

/// Uses that count: turns in the main queue that they are worth.
pub(super) const MOST_USES: u8 = 3;

/// How many chunks have come, and how many are a burst: read at every hit, so apart from the lock.
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

    /// Whether the burst of reads that brought a chunk at `came` is over.
    pub(super) fn is_over(&self, came: u64) -> bool {
        self.now().saturating_sub(came) > self.burst.load(Ordering::Relaxed)
    }
}

/// What a look at a chunk at a queue's head said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It was given up.
    Evicted,
    /// It was used, and that use is spent.
    Used,
    /// Somebody reads it: its memory would not come free.
    InUse,
}

/// The order of the chunks that are held.
#[derive(Debug, Default)]
pub(super) struct Queues {
    small: VecDeque<(Key, u64)>,
    main: VecDeque<(Key, u64)>,
    small_bytes: u64,
    ghosts: HashSet<Key>,
    ghost_order: VecDeque<Key>,
}

impl Queues {
    /// A chunk is there now. Whether it goes to the main queue.
    pub(super) fn insert(&mut self, key: Key, bytes: u64, clock: &Clock) -> bool {
        clock.came.fetch_add(1, Ordering::Relaxed);
        let main = self.ghosts.remove(&key);
        if main {
            self.main.push_back((key, bytes));
        } else {
            self.small.push_back((key, bytes));
            self.small_bytes += bytes;
        }
        clock.burst.store(self.small.len() as u64 / 2, Ordering::Relaxed);
        main
    }

    /// Takes out the chunk that is least worth keeping, of `budget` bytes. `look` is asked of one chunk after
    /// the other, with the queue that it comes from (main?). Its bytes, if one was given up.
    pub(super) fn evict(
        &mut self,
        budget: u64,
        look: &mut dyn FnMut(Key, bool) -> Verdict,
    ) -> Option<u64> {
        // Every use is spent in so many rounds, and what remains is being read.
        let most = (self.small.len() + self.main.len()) * (usize::from(MOST_USES) + 2);
        for _ in 0..most {
            let from_main = self.small_bytes <= budget / SMALL && !self.main.is_empty();
            let queue = if from_main { &mut self.main } else { &mut self.small };
            let (key, bytes) = queue.pop_front()?;
            match look(key, from_main) {
                Verdict::Evicted => {
                    if !from_main {
                        self.small_bytes -= bytes;
                        self.remember(key);
                    }
                    return Some(bytes);
                }
                Verdict::InUse if !from_main => self.small.push_back((key, bytes)),
                Verdict::Used | Verdict::InUse => {
                    if !from_main {
                        self.small_bytes -= bytes;
                    }
                    self.main.push_back((key, bytes));
                }
            }
        }
        None
    }

    /// As many are remembered as are held.
    fn remember(&mut self, key: Key) {
        self.ghosts.insert(key);
        self.ghost_order.push_back(key);
        while self.ghost_order.len() > self.small.len() + self.main.len()
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
                    let (uses, _, main) = held.get_mut(&key.chunk).unwrap();
                    if *uses == 0 {
                        held.remove(&key.chunk);
                        return Verdict::Evicted;
                    }
                    *uses = if *main { *uses - 1 } else { 0 };
                    *main = true;
                    Verdict::Used
                });
                assert_eq!(evicted, Some(1));
            }
            let main = self.queues.insert(Key { blob: 0, chunk }, 1, &self.clock);
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
        // Chunk 0 goes, and comes back.
        model.touch(100);
        assert!(!model.held.contains_key(&0));
        model.touch(0);
        (200..400).for_each(|chunk| model.touch(chunk));
        assert!(model.held.contains_key(&0), "a scan pushed it out");
    }

    #[test]
    fn when_everything_is_being_read_nothing_is_given_up() {
        let (mut queues, clock) = (Queues::default(), Clock::default());
        for chunk in 0..10 {
            queues.insert(Key { blob: 0, chunk }, 1, &clock);
        }
        assert_eq!(queues.evict(10, &mut |_, _| Verdict::InUse), None);
        assert_eq!(queues.evict(10, &mut |_, _| Verdict::Evicted), Some(1));
        assert_eq!(Queues::default().evict(10, &mut |_, _| Verdict::Evicted), None);
    }
}
