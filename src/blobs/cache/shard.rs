//! The chunks under one lock, with their marks of use.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::ChunkWaiter;
use super::queues::{Clock, EvictionTry, MOST_USES};
use crate::fetch::{Blob, Flow, Key, SharedChunk};
use source::chunk::ChunkBytes;

/// A chunk that is in memory, or loading. It is one for all images that share it; each of them loads it in its own way.
struct ChunkSlot {
    /// Bytes that the chunks of the blob take together.
    blob_held: Arc<AtomicU64>,
    state: LoadState,
}

enum LoadState {
    Held(HeldChunk),
    Loading(Loading),
}

/// The loads of a chunk: one a way, and usually only one.
#[derive(Default)]
struct Loading {
    loads: Vec<Load>,
    /// True while the bytes that one of them brought are put in order: bytes that come meanwhile are not kept.
    arriving: bool,
}

/// A load by one way.
struct Load {
    way: u32,
    waiters: Vec<ChunkWaiter>,
    /// True until its first waiter, for a load ahead of demand.
    ahead: bool,
    /// The device that began it.
    flow: Flow,
}

impl Loading {
    fn of(&mut self, way: u32) -> Option<&mut Load> {
        self.loads.iter_mut().find(|load| load.way == way)
    }

    /// Takes out the load of a way, and returns its waiters.
    fn end(&mut self, way: u32) -> Vec<ChunkWaiter> {
        let at = self.loads.iter().position(|load| load.way == way);
        at.map_or_else(Vec::new, |at| self.loads.swap_remove(at).waiters)
    }

    /// The waiters of all loads.
    fn end_all(self) -> Vec<ChunkWaiter> {
        self.loads.into_iter().flat_map(|load| load.waiters).collect()
    }

    fn is_over(&self) -> bool {
        self.loads.is_empty() && !self.arriving
    }
}

/// End of a load.
pub(super) enum LoadEnd {
    /// With bytes that are kept: [`Shard::arrive`] was true for them.
    Kept {
        /// The bytes.
        bytes: Arc<ChunkBytes>,
        /// Time of their arrival.
        came: u64,
        /// True if they are in the main queue.
        main: bool,
    },
    /// With bytes that are not kept.
    Served,
    /// Without bytes.
    Failed,
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
    /// It is loading this way; the waiter was added.
    Joined {
        /// True if it was loading ahead, and this is its first waiter.
        ahead: bool,
        /// True if another device waits for it.
        foreign: bool,
    },
    /// It is not loading this way; the waiter was added and the caller must start the load. Another way may load it
    /// too, and then the first that has it serves all.
    Claimed,
}

/// One part of a cache's chunks.
#[derive(Default)]
pub(super) struct Shard {
    slots: HashMap<SharedChunk, ChunkSlot>,
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
        match self.slots.get_mut(&blob.shared(index)).map(|slot| &mut slot.state) {
            Some(LoadState::Held(held)) => {
                let first = held.ahead;
                held.touched(clock);
                FoundChunk::Held { bytes: held.bytes.clone(), first }
            }
            Some(LoadState::Loading(loading)) => {
                if let Some(load) = loading.of(blob.way()) {
                    load.waiters.push(waiter());
                    let foreign = load.flow != flow;
                    return FoundChunk::Joined { ahead: std::mem::take(&mut load.ahead), foreign };
                }
                let (way, waiters) = (blob.way(), vec![waiter()]);
                loading.loads.push(Load { way, waiters, ahead: false, flow });
                FoundChunk::Claimed
            }
            None => {
                self.load(blob, (index, flow), vec![waiter()], false);
                FoundChunk::Claimed
            }
        }
    }

    /// Claims a chunk for a load without a waiter. True if the caller must load it: it is neither in memory
    /// nor loading, in whatever way.
    pub(super) fn claim(&mut self, blob: &Blob, index: u32, flow: Flow) -> bool {
        let claimed = !self.slots.contains_key(&blob.shared(index));
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
        let loads = vec![Load { way: blob.way(), waiters, ahead, flow }];
        let state = LoadState::Loading(Loading { loads, arriving: false });
        let blob_held = blob.held_counter().clone();
        self.slots.insert(blob.shared(index), ChunkSlot { blob_held, state });
    }

    fn loading(&mut self, key: SharedChunk) -> Option<&mut Loading> {
        match self.slots.get_mut(&key).map(|slot| &mut slot.state) {
            Some(LoadState::Loading(loading)) => Some(loading),
            _ => None,
        }
    }

    /// True if a chunk is in memory.
    pub(super) fn holds(&self, key: SharedChunk) -> bool {
        self.slots.get(&key).is_some_and(|slot| matches!(slot.state, LoadState::Held(_)))
    }

    /// A chunk in memory, without counting a use.
    pub(super) fn peek(&self, key: SharedChunk) -> Option<Arc<ChunkBytes>> {
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
        if let Some(loading) = self.loading(key.chunk) {
            loading.end(key.way);
            if loading.is_over() {
                self.slots.remove(&key.chunk);
            }
        }
        true
    }

    /// The device that began a load.
    pub(super) fn flow(&mut self, key: Key) -> Flow {
        let loading = self.loading(key.chunk);
        loading.and_then(|loading| loading.of(key.way)).map_or_else(Flow::default, |load| load.flow)
    }

    /// True if a chunk has waiters of this way.
    pub(super) fn is_awaited(&self, key: Key) -> bool {
        self.load_of(key).is_some_and(|load| !load.waiters.is_empty())
    }

    /// True if a chunk is loading this way, and has not come another way meanwhile.
    pub(super) fn is_loading(&self, key: Key) -> bool {
        self.load_of(key).is_some()
    }

    fn load_of(&self, key: Key) -> Option<&Load> {
        match self.slots.get(&key.chunk).map(|slot| &slot.state) {
            Some(LoadState::Loading(loading)) => {
                loading.loads.iter().find(|load| load.way == key.way)
            }
            _ => None,
        }
    }

    /// Announces bytes that a load brought. True if they are to be kept, and then [`Self::end_load`] must follow; false
    /// if another way brought them first.
    pub(super) fn arrive(&mut self, key: Key) -> bool {
        let Some(loading) = self.loading(key.chunk) else { return false };
        let first = !loading.arriving && loading.of(key.way).is_some();
        loading.arriving |= first;
        first
    }

    /// Ends a load, and returns the waiters to answer. Bytes are for the waiters of all ways, because all would accept the
    /// same; a failure is for those of its own way.
    pub(super) fn end_load(&mut self, key: Key, end: LoadEnd) -> Vec<ChunkWaiter> {
        let Some(slot) = self.slots.get_mut(&key.chunk) else { return Vec::new() };
        // A chunk that came another way before: its waiters have it.
        let LoadState::Loading(loading) = &mut slot.state else { return Vec::new() };
        match end {
            LoadEnd::Kept { bytes, came, main } => {
                let loading = std::mem::take(loading);
                let ahead = loading.loads.iter().all(|load| load.waiters.is_empty());
                self.held += 1;
                slot.blob_held.fetch_add(bytes.held(), Ordering::Relaxed);
                slot.state = LoadState::Held(HeldChunk { bytes, came, uses: 0, main, ahead });
                loading.end_all()
            }
            LoadEnd::Served if !loading.arriving => {
                let loading = std::mem::take(loading);
                self.slots.remove(&key.chunk);
                loading.end_all()
            }
            LoadEnd::Served | LoadEnd::Failed => {
                let waiters = loading.end(key.way);
                if loading.is_over() {
                    self.slots.remove(&key.chunk);
                }
                waiters
            }
        }
    }

    /// Evicts a chunk, unless it was used or has a reader.
    pub(super) fn evict(&mut self, key: SharedChunk) -> EvictionTry {
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
