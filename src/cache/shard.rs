//! One lock's worth of chunks, and the ring in which the CLOCK hand goes round.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use super::{ChunkWaiter, Key};
use crate::chunk::ChunkBytes;

/// A chunk that is here, or on its way.
enum Slot {
    Held { bytes: Arc<ChunkBytes>, used: bool },
    Loading { waiters: Vec<ChunkWaiter> },
}

/// Answer to [`Shard::look_up`].
pub(super) enum Found {
    /// Here it is.
    Held(Arc<ChunkBytes>),
    /// Somebody loads it; the waiter was added.
    Joined,
    /// Nobody loads it; the waiter was added and the caller must see to the load.
    Claimed,
}

/// Part of a cache.
#[derive(Default)]
pub(super) struct Shard {
    slots: HashMap<Key, Slot>,
    /// Keys of the held chunks; the hand is at the front.
    ring: VecDeque<Key>,
}

impl Shard {
    /// Number of chunks held.
    pub(super) fn len(&self) -> usize {
        self.ring.len()
    }

    /// Finds a chunk, or registers who waits for it.
    pub(super) fn look_up(&mut self, key: Key, waiter: &mut dyn FnMut() -> ChunkWaiter) -> Found {
        match self.slots.get_mut(&key) {
            Some(Slot::Held { bytes, used }) => {
                *used = true;
                Found::Held(bytes.clone())
            }
            Some(Slot::Loading { waiters }) => {
                waiters.push(waiter());
                Found::Joined
            }
            None => {
                let waiters = vec![waiter()];
                self.slots.insert(key, Slot::Loading { waiters });
                Found::Claimed
            }
        }
    }

    /// Puts the loaded chunk, if any, in the place of those who waited for it, and returns them.
    pub(super) fn end_load(
        &mut self,
        key: Key,
        bytes: Option<Arc<ChunkBytes>>,
    ) -> Vec<ChunkWaiter> {
        let before = match bytes {
            Some(bytes) => {
                self.ring.push_back(key);
                self.slots.insert(key, Slot::Held { bytes, used: false })
            }
            None => self.slots.remove(&key),
        };
        match before {
            Some(Slot::Loading { waiters }) => waiters,
            // Only the loader that claimed the key ends the load.
            Some(Slot::Held { .. }) | None => Vec::new(),
        }
    }

    /// Takes out the first chunk from the hand on that was not used since the hand last passed it;
    /// none if all were, which are then all taken for unused.
    pub(super) fn evict(&mut self) -> Option<Arc<ChunkBytes>> {
        for _ in 0..self.ring.len() {
            let key = self.ring.pop_front()?;
            if let Some(Slot::Held { used, .. }) = self.slots.get_mut(&key)
                && *used
            {
                *used = false;
                self.ring.push_back(key);
                continue;
            }
            if let Some(Slot::Held { bytes, .. }) = self.slots.remove(&key) {
                return Some(bytes);
            }
        }
        None
    }
}
