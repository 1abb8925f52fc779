//! Decoded chunks in memory: bounded, and each loaded by one thread however many wait for it.
//!
//! [`Cache::get`] never blocks. It answers at once with the chunk, or puts the caller on the list of
//! those who wait for it; the first of them makes a job for the loader threads, who fetch, verify and
//! decode (all of that is the [`ChunkSource`]'s doing), keep the result if the budget allows, and
//! call everybody back. A failure is delivered to all who waited and then forgotten, so that the next
//! request tries again. Nobody is left without an answer: not by an error, not by a decoder that
//! panics, not by the end of the cache.
//!
//! The budget is in bytes of [`ChunkBytes::footprint`] and is never exceeded by what the cache
//! holds. Room is made *before* a chunk is kept, by the CLOCK rule: each shard has a ring of its
//! chunks; the hand passes over those that were used since it last came by, and takes the first that
//! was not. A new chunk begins as unused, so a scan of cold data passes through without displacing
//! what is read twice. What no room can be made for is served and not kept.
//!
//! Contents: `shard` one lock's worth of chunks, `loader` the threads.

mod loader;
mod shard;

use std::collections::HashMap;
use std::hash::{BuildHasher as _, RandomState};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use crate::chunk::{ChunkBytes, ChunkError, ChunkSource};
use loader::{Job, Loaders};
use shard::{Found, Shard};

/// Called once with the chunk or the reason why there is none, from any thread.
pub type ChunkWaiter = Box<dyn FnOnce(Result<Arc<ChunkBytes>, Arc<ChunkError>>) + Send>;

/// Answer to [`Cache::get`].
pub enum Lookup {
    /// The chunk.
    Hit(Arc<ChunkBytes>),
    /// The waiter will be called.
    Pending,
}

/// What a cache did so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CacheStats {
    /// Look-ups answered at once.
    pub hits: u64,
    /// Look-ups that had to wait, whoever had the chunk loaded.
    pub misses: u64,
    /// Chunks asked of their sources.
    pub loads: u64,
    /// Loads that failed.
    pub errors: u64,
    /// Bytes held now.
    pub bytes: u64,
    /// Chunks held now.
    pub chunks: u64,
    /// Chunks given up for others.
    pub evictions: u64,
}

/// Locks in the map of chunks: enough that the queues of many devices rarely meet at one.
const SHARDS: usize = 32;

/// A blob (by a number for its identity) and a chunk of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Key {
    blob: u32,
    chunk: u32,
}

/// The cache. Dropping it ends the loader threads; who still waits gets an error.
pub struct Cache {
    chunks: Arc<Chunks>,
    loaders: Loaders,
}

impl Cache {
    /// A cache that holds at most `budget_bytes` of decoded chunks, loaded by up to `loader_threads`
    /// threads (at least one), which are started as they are needed.
    #[must_use]
    pub fn new(budget_bytes: u64, loader_threads: usize) -> Arc<Self> {
        let chunks = Arc::new(Chunks::new(budget_bytes));
        let loaders = Loaders::start(&chunks, loader_threads.max(1));
        Arc::new(Self { chunks, loaders })
    }

    /// The chunk, or a promise to call a waiter. `waiter` is called to make one only if the answer is
    /// [`Lookup::Pending`]; it must not use the cache, one of whose locks is held meanwhile.
    pub fn get(
        &self,
        source: &Arc<dyn ChunkSource>,
        index: u32,
        waiter: &mut dyn FnMut() -> ChunkWaiter,
    ) -> Lookup {
        let chunks = &self.chunks;
        let key = Key { blob: chunks.number_of(source.id()), chunk: index };
        let found = chunks.shard(key).look_up(key, waiter);
        match found {
            Found::Held(bytes) => {
                chunks.hits.fetch_add(1, Ordering::Relaxed);
                return Lookup::Hit(bytes);
            }
            Found::Joined => {}
            Found::Claimed => {
                chunks.loads.fetch_add(1, Ordering::Relaxed);
                if let Err(job) = self.loaders.send(Job { source: source.clone(), key }) {
                    chunks.deliver(job.key, &Err(loader::ended(&*job.source)));
                }
            }
        }
        chunks.misses.fetch_add(1, Ordering::Relaxed);
        Lookup::Pending
    }

    /// What the cache did so far.
    #[must_use]
    pub fn stats(&self) -> CacheStats {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let chunks = &self.chunks;
        CacheStats {
            hits: read(&chunks.hits),
            misses: read(&chunks.misses),
            loads: read(&chunks.loads),
            errors: read(&chunks.errors),
            bytes: read(&chunks.held),
            chunks: (0..SHARDS).map(|number| chunks.lock(number).len() as u64).sum(),
            evictions: read(&chunks.evictions),
        }
    }
}

/// What the threads share. They do not hold the [`Cache`], so that it can end.
struct Chunks {
    shards: Vec<Mutex<Shard>>,
    hasher: RandomState,
    /// Numbers for the identities of blobs: a few hundred in the life of a host.
    blobs: RwLock<HashMap<Box<str>, u32>>,
    budget: u64,
    held: AtomicU64,
    /// Shard where the next eviction begins to look.
    hand: AtomicUsize,
    hits: AtomicU64,
    misses: AtomicU64,
    loads: AtomicU64,
    errors: AtomicU64,
    evictions: AtomicU64,
}

impl Chunks {
    fn new(budget: u64) -> Self {
        Self {
            shards: (0..SHARDS).map(|_| Mutex::default()).collect(),
            hasher: RandomState::new(),
            blobs: RwLock::default(),
            budget,
            held: AtomicU64::new(0),
            hand: AtomicUsize::new(0),
            hits: AtomicU64::new(0),
            misses: AtomicU64::new(0),
            loads: AtomicU64::new(0),
            errors: AtomicU64::new(0),
            evictions: AtomicU64::new(0),
        }
    }

    /// The number of a blob's identity; a new one for a new blob.
    fn number_of(&self, id: &str) -> u32 {
        if let Some(&number) = self.blobs.read().unwrap_or_else(PoisonError::into_inner).get(id) {
            return number;
        }
        let mut blobs = self.blobs.write().unwrap_or_else(PoisonError::into_inner);
        let next = blobs.len() as u32;
        *blobs.entry(id.into()).or_insert(next)
    }

    /// No code panics while it holds a shard, except a waiter's maker; a shard is whole even then.
    fn lock(&self, number: usize) -> MutexGuard<'_, Shard> {
        self.shards[number].lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn shard(&self, key: Key) -> MutexGuard<'_, Shard> {
        self.lock(self.hasher.hash_one(key) as usize % SHARDS)
    }

    /// Ends a load: keeps the chunk if there is room, and tells everyone who waits for it.
    fn deliver(&self, key: Key, result: &Result<Arc<ChunkBytes>, Arc<ChunkError>>) {
        if result.is_err() {
            self.errors.fetch_add(1, Ordering::Relaxed);
        }
        let kept = result.as_ref().ok().filter(|bytes| self.make_room(bytes.footprint() as u64));
        let waiters = self.shard(key).end_load(key, kept.cloned());
        for waiter in waiters {
            let result = result.clone();
            loader::guarded(|| waiter(result));
        }
    }

    /// Counts `bytes` as held after giving up as much else as that takes; or says that it cannot.
    fn make_room(&self, bytes: u64) -> bool {
        if bytes > self.budget {
            return false;
        }
        loop {
            let add = |held: u64| held.checked_add(bytes).filter(|&sum| sum <= self.budget);
            if self.held.try_update(Ordering::Relaxed, Ordering::Relaxed, add).is_ok() {
                return true;
            }
            if !self.evict_one() {
                return false;
            }
        }
    }

    /// Gives up one chunk. Never holds two locks. A second round over the shards finds as unused what
    /// the first has passed; so a chunk in use does not fall because it is alone in its shard.
    fn evict_one(&self) -> bool {
        let first = self.hand.fetch_add(1, Ordering::Relaxed);
        for number in 0..2 * SHARDS {
            let Some(bytes) = self.lock(first.wrapping_add(number) % SHARDS).evict() else {
                continue;
            };
            self.held.fetch_sub(bytes.footprint() as u64, Ordering::Relaxed);
            self.evictions.fetch_add(1, Ordering::Relaxed);
            return true;
        }
        false
    }
}

#[cfg(test)]
mod tests;
