//! Choice of the chunk to evict: S3-FIFO over the chunks of all files.
//!
//! Most chunks written here are never read again: a background fill, a layer that was scanned once. So new
//! chunks wait in a small queue, a tenth of the capacity, and only chunks that are read there move on to the
//! main queue; a flood of new chunks evicts only its own. A chunk that recently left the small queue is
//! remembered, and goes to the main queue if it comes back.
//!
//! Pure: no I/O, no lock.

use std::collections::{HashMap, HashSet, VecDeque};

/// A file and a chunk of it.
pub(super) type FifoKey = (u32, u32);

/// Divisor of the capacity for the small queue.
const SMALL: u64 = 10;
/// Largest count of reads.
const MOST_USED: u8 = 3;
/// Limit on the remembered keys that left the small queue.
const MOST_GHOSTS: usize = 1 << 16;

#[derive(Clone, Copy, Debug)]
struct QueuedChunk {
    bytes: u64,
    used: u8,
    main: bool,
    /// Number of this chunk's place in the queues: a key may have left and come back.
    turn: u64,
}

/// The queues.
#[derive(Debug, Default)]
pub(super) struct Fifo {
    entries: HashMap<FifoKey, QueuedChunk>,
    small: VecDeque<(FifoKey, u64)>,
    main: VecDeque<(FifoKey, u64)>,
    small_bytes: u64,
    ghosts: HashSet<FifoKey>,
    ghost_order: VecDeque<FifoKey>,
    turn: u64,
}

impl Fifo {
    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    /// Adds a new chunk.
    pub(super) fn insert(&mut self, key: FifoKey, bytes: u64) {
        let main = self.ghosts.remove(&key);
        self.put(key, bytes, main);
    }

    /// Adds a chunk found when the tier was opened, whose past is unknown.
    pub(super) fn insert_old(&mut self, key: FifoKey, bytes: u64) {
        self.put(key, bytes, true);
    }

    fn put(&mut self, key: FifoKey, bytes: u64, main: bool) {
        self.remove(key);
        self.turn += 1;
        let turn = self.turn;
        self.entries.insert(key, QueuedChunk { bytes, used: 0, main, turn });
        if main {
            self.main.push_back((key, turn));
        } else {
            self.small.push_back((key, turn));
            self.small_bytes += bytes;
        }
    }

    /// Counts a read of a chunk.
    pub(super) fn touch(&mut self, key: FifoKey) {
        if let Some(entry) = self.entries.get_mut(&key) {
            entry.used = (entry.used + 1).min(MOST_USED);
        }
    }

    /// Removes a chunk. Its place in a queue is skipped when it is reached.
    pub(super) fn remove(&mut self, key: FifoKey) {
        if let Some(entry) = self.entries.remove(&key)
            && !entry.main
        {
            self.small_bytes -= entry.bytes;
        }
    }

    /// Takes out the chunk that is least worth keeping in `capacity` bytes.
    pub(super) fn pop(&mut self, capacity: u64) -> Option<FifoKey> {
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

    fn remember(&mut self, key: FifoKey) {
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
        // All other new chunks go first.
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
