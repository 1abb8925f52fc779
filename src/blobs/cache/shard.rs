//! The chunks under one lock, with their marks of use.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::ChunkWaiter;
use super::queues::{Clock, EvictionTry, MOST_USES};
use crate::fetch::{Blob, Flow, Key};
use source::chunk::ChunkBytes;

/// A chunk that is in memory, or loading.
struct ChunkSlot {
    /// Bytes that the chunks of the blob take together.
    blob_held: Arc<AtomicU64>,
    state: LoadState,
}

enum LoadState {
    Held(HeldChunk),
    /// `flow` is the device that waited first.
    Loading {
        waiters: Vec<ChunkWaiter>,
        ahead: bool,
        flow: Flow,
    },
}

/// A chunk in memory.
struct HeldChunk {
    bytes: Arc<ChunkBytes>,
    /// Time of its arrival.
    came: u64,
    /// Uses since its last turn in the queue.
    uses: u8,
    /// True if it is in the main queue.
    main: bool,
    /// True until its first read, for a chunk that was loaded ahead.
    ahead: bool,
}

impl HeldChunk {
    fn touched(&mut self, clock: &Clock) {
        // A chunk that was loaded ahead belongs to the burst that begins now.
        if std::mem::take(&mut self.ahead) {
            self.came = clock.now();
        } else if self.main || clock.is_over(self.came) {
            self.uses = (self.uses + 1).min(MOST_USES);
        }
    }
}

/// Answer to [`Shard::look_up`].
pub(super) enum FoundChunk {
    /// The chunk is in memory.
    Held {
        /// The chunk.
        bytes: Arc<ChunkBytes>,
        /// True if it was loaded ahead, and this is its first reader.
        first: bool,
    },
    /// It is loading; the waiter was added.
    Joined {
        /// True if it was loading ahead, and this is its first waiter.
        ahead: bool,
        /// True if another device waits for it.
        foreign: bool,
    },
    /// It is not loading; the waiter was added and the caller must start the load.
    Claimed,
}

/// One part of a cache's chunks.
#[derive(Default)]
pub(super) struct Shard {
    slots: HashMap<Key, ChunkSlot>,
    held: usize,
}

impl Shard {
    /// Number of chunks held.
    pub(super) fn len(&self) -> usize {
        self.held
    }

    /// Finds a chunk, or adds a waiter for it.
    pub(super) fn look_up(
        &mut self,
        blob: &Blob,
        (index, flow): (u32, Flow),
        clock: &Clock,
        waiter: &mut dyn FnMut() -> ChunkWaiter,
    ) -> FoundChunk {
        match self.slots.get_mut(&blob.key(index)).map(|slot| &mut slot.state) {
            Some(LoadState::Held(held)) => {
                let first = held.ahead;
                held.touched(clock);
                FoundChunk::Held { bytes: held.bytes.clone(), first }
            }
            Some(LoadState::Loading { waiters, ahead, flow: first }) => {
                waiters.push(waiter());
                FoundChunk::Joined { ahead: std::mem::take(ahead), foreign: *first != flow }
            }
            None => {
                self.load(blob, (index, flow), vec![waiter()], false);
                FoundChunk::Claimed
            }
        }
    }

    /// Claims a chunk for a load without a waiter. True if the caller must load it: it is neither in memory
    /// nor loading.
    pub(super) fn claim(&mut self, blob: &Blob, index: u32, flow: Flow) -> bool {
        let claimed = !self.slots.contains_key(&blob.key(index));
        if claimed {
            self.load(blob, (index, flow), Vec::new(), true);
        }
        claimed
    }

    fn load(
        &mut self,
        blob: &Blob,
        (index, flow): (u32, Flow),
        waiters: Vec<ChunkWaiter>,
        ahead: bool,
    ) {
        let state = LoadState::Loading { waiters, ahead, flow };
        self.slots
            .insert(blob.key(index), ChunkSlot { blob_held: blob.held_counter().clone(), state });
    }

    /// True if a chunk is in memory.
    pub(super) fn holds(&self, key: Key) -> bool {
        self.slots.get(&key).is_some_and(|slot| matches!(slot.state, LoadState::Held(_)))
    }

    /// A chunk in memory, without counting a use.
    pub(super) fn peek(&self, key: Key) -> Option<Arc<ChunkBytes>> {
        match self.slots.get(&key).map(|slot| &slot.state) {
            Some(LoadState::Held(held)) => Some(held.bytes.clone()),
            _ => None,
        }
    }

    /// Ends the load of a chunk without waiters; false if it has some.
    pub(super) fn abandon(&mut self, key: Key) -> bool {
        if self.is_awaited(key) {
            return false;
        }
        if self.slots.get(&key).is_some_and(|slot| matches!(slot.state, LoadState::Loading { .. }))
        {
            self.slots.remove(&key);
        }
        true
    }

    /// The device that loads a chunk.
    pub(super) fn flow(&self, key: Key) -> Flow {
        match self.slots.get(&key).map(|slot| &slot.state) {
            Some(LoadState::Loading { flow, .. }) => *flow,
            _ => Flow::default(),
        }
    }

    /// True if a chunk has waiters.
    pub(super) fn is_awaited(&self, key: Key) -> bool {
        self.slots.get(&key).is_some_and(
            |slot| matches!(&slot.state, LoadState::Loading { waiters, .. } if !waiters.is_empty()),
        )
    }

    /// Ends a load: stores the chunk, if any, and returns the waiters. `came` and `main`: its time, and its
    /// queue.
    pub(super) fn end_load(
        &mut self,
        key: Key,
        bytes: Option<Arc<ChunkBytes>>,
        came: u64,
        main: bool,
    ) -> Vec<ChunkWaiter> {
        let Some(slot) = self.slots.get_mut(&key) else { return Vec::new() };
        let ahead =
            !matches!(&slot.state, LoadState::Loading { waiters, .. } if !waiters.is_empty());
        let before = match bytes {
            Some(bytes) => {
                self.held += 1;
                slot.blob_held.fetch_add(bytes.held(), Ordering::Relaxed);
                let held = HeldChunk { bytes, came, uses: 0, main, ahead };
                Some(std::mem::replace(&mut slot.state, LoadState::Held(held)))
            }
            None => self.slots.remove(&key).map(|slot| slot.state),
        };
        match before {
            Some(LoadState::Loading { waiters, .. }) => waiters,
            // Only the loader that claimed the key ends the load.
            Some(LoadState::Held(_)) | None => Vec::new(),
        }
    }

    /// Evicts a chunk, unless it was used or has a reader.
    pub(super) fn evict(&mut self, key: Key) -> EvictionTry {
        let (held, blob_held) = match self.slots.get_mut(&key) {
            Some(ChunkSlot { state: LoadState::Held(held), blob_held }) => (held, blob_held),
            // A chunk is in the queues a moment before it is here.
            Some(_) => return EvictionTry::InUse,
            None => return EvictionTry::Evicted,
        };
        if Arc::strong_count(&held.bytes) > 1 {
            return EvictionTry::InUse;
        }
        if held.uses > 0 || std::mem::take(&mut held.ahead) {
            held.uses = if held.main { held.uses.saturating_sub(1) } else { 0 };
            held.main = true;
            return EvictionTry::Used;
        }
        blob_held.fetch_sub(held.bytes.held(), Ordering::Relaxed);
        self.held -= 1;
        self.slots.remove(&key);
        EvictionTry::Evicted
    }
}
