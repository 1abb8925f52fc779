//! One lock's worth of chunks, and the ring in which the CLOCK hand goes round.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::ChunkWaiter;
use crate::chunk::ChunkBytes;
use crate::fetch::{Blob, Key};

/// A chunk that is here, or on its way.
struct Slot {
    /// Bytes that the chunks of the blob take together.
    blob_held: Arc<AtomicU64>,
    state: State,
}

enum State {
    Held { bytes: Arc<ChunkBytes>, used: bool },
    Loading { waiters: Vec<ChunkWaiter>, ahead: bool },
}

/// Answer to [`Shard::look_up`].
pub(super) enum Found {
    /// Here it is.
    Held(Arc<ChunkBytes>),
    /// It is on its way; the waiter was added.
    Joined {
        /// Whether this is the first who waits for what was asked for ahead of time.
        ahead: bool,
    },
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
    pub(super) fn look_up(
        &mut self,
        blob: &Blob,
        index: u32,
        waiter: &mut dyn FnMut() -> ChunkWaiter,
    ) -> Found {
        match self.slots.get_mut(&blob.key(index)).map(|slot| &mut slot.state) {
            Some(State::Held { bytes, used }) => {
                *used = true;
                Found::Held(bytes.clone())
            }
            Some(State::Loading { waiters, ahead }) => {
                waiters.push(waiter());
                Found::Joined { ahead: std::mem::take(ahead) }
            }
            None => {
                self.load(blob, index, vec![waiter()], false);
                Found::Claimed
            }
        }
    }

    /// Whether the caller must load a chunk that nobody asks for yet: it is neither here nor on its way.
    pub(super) fn claim(&mut self, blob: &Blob, index: u32) -> bool {
        let claimed = !self.slots.contains_key(&blob.key(index));
        if claimed {
            self.load(blob, index, Vec::new(), true);
        }
        claimed
    }

    fn load(&mut self, blob: &Blob, index: u32, waiters: Vec<ChunkWaiter>, ahead: bool) {
        let state = State::Loading { waiters, ahead };
        self.slots.insert(blob.key(index), Slot { blob_held: blob.held_counter().clone(), state });
    }

    /// Whether a chunk is here.
    pub(super) fn holds(&self, key: Key) -> bool {
        self.slots.get(&key).is_some_and(|slot| matches!(slot.state, State::Held { .. }))
    }

    /// A chunk that is here, without any trace that it was asked for.
    pub(super) fn peek(&self, key: Key) -> Option<Arc<ChunkBytes>> {
        match self.slots.get(&key).map(|slot| &slot.state) {
            Some(State::Held { bytes, .. }) => Some(bytes.clone()),
            _ => None,
        }
    }

    /// Ends the load of a chunk that nobody waits for; false if somebody does.
    pub(super) fn abandon(&mut self, key: Key) -> bool {
        if self.is_awaited(key) {
            return false;
        }
        if self.slots.get(&key).is_some_and(|slot| matches!(slot.state, State::Loading { .. })) {
            self.slots.remove(&key);
        }
        true
    }

    /// Whether somebody waits for a chunk.
    pub(super) fn is_awaited(&self, key: Key) -> bool {
        self.slots.get(&key).is_some_and(
            |slot| matches!(&slot.state, State::Loading { waiters, .. } if !waiters.is_empty()),
        )
    }

    /// Puts the loaded chunk, if any, in the place of those who waited for it, and returns them.
    pub(super) fn end_load(
        &mut self,
        key: Key,
        bytes: Option<Arc<ChunkBytes>>,
    ) -> Vec<ChunkWaiter> {
        let Some(slot) = self.slots.get_mut(&key) else { return Vec::new() };
        let before = match bytes {
            Some(bytes) => {
                self.ring.push_back(key);
                slot.blob_held.fetch_add(bytes.held(), Ordering::Relaxed);
                Some(std::mem::replace(&mut slot.state, State::Held { bytes, used: false }))
            }
            None => self.slots.remove(&key).map(|slot| slot.state),
        };
        match before {
            Some(State::Loading { waiters, .. }) => waiters,
            // Only the loader that claimed the key ends the load.
            Some(State::Held { .. }) | None => Vec::new(),
        }
    }

    /// Takes out the first chunk from the hand on that was not used since the hand last passed it;
    /// none if all were, which are then all taken for unused. A chunk that somebody reads is passed:
    /// its memory would not come free.
    pub(super) fn evict(&mut self) -> Option<Arc<ChunkBytes>> {
        for _ in 0..self.ring.len() {
            let key = self.ring.pop_front()?;
            if let Some(Slot { state: State::Held { bytes, used }, .. }) = self.slots.get_mut(&key)
                && (std::mem::take(used) || Arc::strong_count(bytes) > 1)
            {
                self.ring.push_back(key);
                continue;
            }
            if let Some(Slot { state: State::Held { bytes, .. }, blob_held }) =
                self.slots.remove(&key)
            {
                blob_held.fetch_sub(bytes.held(), Ordering::Relaxed);
                return Some(bytes);
            }
        }
        None
    }
}
