//! What to give up first: S3-FIFO over the chunks of all files.
//!
//! Most of what is written here is never read again: a background fill, a layer that was scanned once. So new
//! chunks wait in a small queue, a tenth of the capacity, and only those that are read there move on to
//! the main one; a flood of new ones pushes out only each other. What left the small queue lately is
//! remembered, and goes to the main one if it comes back.
//!
//! Pure: no I/O, no lock.

use std::collections::{HashMap, HashSet, VecDeque};

/// A file and a chunk of it.
pub(super) type Key = (u32, u32);

/// The small queue's part of the capacity.
const SMALL: u64 = 10;
/// Reads that count.
const MOST_USED: u8 = 3;
/// Keys remembered at most of what left the small queue.
const MOST_GHOSTS: usize = 1 << 16;

#[derive(Clone, Copy, Debug)]
struct Entry {
    bytes: u64,
    used: u8,
    main: bool,
    /// Which of the places in the queues is this one's: a key may have left and come back.
    turn: u64,
}

/// The queues.
#[derive(Debug, Default)]
pub(super) struct Fifo {
    entries: HashMap<Key, Entry>,
    small: VecDeque<(Key, u64)>,
    main: VecDeque<(Key, u64)>,
    small_bytes: u64,
    ghosts: HashSet<Key>,
    ghost_order: VecDeque<Key>,
    turn: u64,
}

impl Fifo {
    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    /// A chunk is there now.
    pub(super) fn insert(&mut self, key: Key, bytes: u64) {
        let main = self.ghosts.remove(&key);
        self.put(key, bytes, main);
    }

    /// A chunk was there when the tier was opened: nothing is known of its past.
    pub(super) fn insert_old(&mut self, key: Key, bytes: u64) {
        self.put(key, bytes, true);
    }

    fn put(&mut self, key: Key, bytes: u64, main: bool) {
        self.remove(key);
        self.turn += 1;
        let turn = self.turn;
        self.entries.insert(key, Entry { bytes, used: 0, main, turn });
        if main {
            self.main.push_back((key, turn));
        } else {
            self.small.push_back((key, turn));
            self.small_bytes += bytes;
        }
    }

    /// A chunk was read.
    pub(super) fn touch(&mut self, key: Key) {
        if let Some(entry) = self.entries.get_mut(&key) {
            entry.used = (entry.used + 1).min(MOST_USED);
        }
    }

    /// A chunk is no longer there. Its place in a queue is passed over when it is reached.
    pub(super) fn remove(&mut self, key: Key) {
        if let Some(entry) = self.entries.remove(&key)
            && !entry.main
        {
            self.small_bytes -= entry.bytes;
        }
    }

    /// Takes out the chunk that is least worth keeping in `capacity` bytes.
    pub(super) fn pop(&mut self, capacity: u64) -> Option<Key> {
        loop {
            let from_small = self.small_bytes > capacity / SMALL || self.main.is_empty();
            let queue = if from_small { &mut self.small } else { &mut self.main };
            let Some((key, turn)) = queue.pop_front() else {
                if self.entries.is_empty() {
                    return None;
                }
                continue;
            };
            let Some(entry) = self.entries.get_mut(&key).filter(|entry| entry.turn == turn) else {
                continue;
            };
            if entry.used > 0 {
                entry.used = if from_small { 0 } else { entry.used - 1 };
                if from_small {
                    entry.main = true;
                    self.small_bytes -= entry.bytes;
                }
                self.main.push_back((key, turn));
                continue;
            }
            self.remove(key);
            if from_small {
                self.remember(key);
            }
            return Some(key);
        }
    }

    fn remember(&mut self, key: Key) {
        if self.ghosts.insert(key) {
            self.ghost_order.push_back(key);
        }
        while self.ghost_order.len() > MOST_GHOSTS.min(self.entries.len() + 16) {
            let Some(oldest) = self.ghost_order.pop_front() else { break };
            self.ghosts.remove(&oldest);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_of_new_chunks_leaves_what_is_used() {
        let mut fifo = Fifo::default();
        for chunk in 0..100 {
            fifo.insert((0, chunk), 1);
            fifo.touch((0, chunk));
        }
        for chunk in 0..10_000 {
            if fifo.len() == 100 {
                fifo.pop(100).unwrap();
            }
            fifo.insert((1, chunk), 1);
        }
        let kept = (0..100).filter(|chunk| fifo.entries.contains_key(&(0, *chunk))).count();
        assert!(kept >= 85, "{kept} of 100");
    }

    #[test]
    fn what_comes_back_soon_is_kept_longer() {
        let mut fifo = Fifo::default();
        (0..20).for_each(|chunk| fifo.insert((0, chunk), 1));
        assert_eq!(fifo.pop(20), Some((0, 0)));
        fifo.insert((0, 0), 1);
        assert!(fifo.entries[&(0, 0)].main);
        // Everything else new goes first.
        let order: Vec<_> = std::iter::from_fn(|| fifo.pop(20)).collect();
        assert_eq!(order.len(), 20);
        assert!(order[..17].iter().all(|key| *key != (0, 0)), "{order:?}");
    }

    #[test]
    fn each_chunk_is_given_up_once_even_if_it_left_and_came_back() {
        let mut fifo = Fifo::default();
        for _ in 0..3 {
            fifo.insert((0, 1), 5);
            fifo.insert((0, 2), 5);
            fifo.remove((0, 1));
        }
        fifo.insert((0, 1), 5);
        let mut order: Vec<_> = std::iter::from_fn(|| fifo.pop(100)).collect();
        order.sort_unstable();
        assert_eq!(order, [(0, 1), (0, 2)]);
        assert_eq!((fifo.small_bytes, fifo.len()), (0, 0));
    }
}
