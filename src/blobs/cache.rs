//! Decoded chunks in memory: bounded, and each loaded once for any number of waiters.
//!
//! [`ChunkBatch::get`] never blocks. It returns the chunk at once, or adds the caller to the chunk's list of
//! waiters; the first waiter starts the load ([`fetch`](crate::fetch)), and when the chunk is there, all
//! waiters are called. A failure is delivered to all waiters and then forgotten, so that the next request
//! tries again. Every waiter gets an answer: after an error, after a decoder's panic, and at the end of the
//! cache.
//!
//! Chunks are decoded directly into the cache's own memory, its `arena`, which is exactly as large as the
//! budget. Room is made *before* a chunk is decoded, by evicting the chunks that are least worth keeping; a
//! chunk without room is decoded on the heap, served, and not kept. The memory of an evicted chunk that still
//! has readers is freed when the last reader drops it.
//!
//! A blob is [opened](Cache::open) before its chunks are requested. Two images with a common layer have its chunks
//! once, if both bring the same proof of their bytes; bytes that nothing proves are shared within one origin only
//! (`identity`). The *way* to the bytes is never shared: each origin has a [`Blob`] of its own, with its own loads. The
//! first load that has a chunk serves the waiters of all ways, but a way that fails, or is slow, fails and waits alone.
//!
//! Contents: `arena` the memory, `shard` the chunks under one lock, `queues` the order of eviction, `backlog`
//! the chunks to load later, `heap` chunks without room in the arena, `resident` memory of open images outside the budget.

mod arena;
mod backlog;
mod heap;
mod queues;
mod resident;
mod shard;

use std::collections::{HashMap, HashSet};
use std::hash::{BuildHasher as _, RandomState};
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use parking_lot::{Mutex, MutexGuard};

use crate::fetch::{
    Blob, CONNECTIONS, Claim, Delivery, FetchCounters, FetchOptions, Fetcher, FillOptions, Filling,
    Flow, Key, SharedChunk, WantedChunk,
};
use crate::identity::BlobIdentity;
use crate::quiet::Demand;
use crate::tier::Tiers;
use arena::Arena;
use backlog::Backlog;
use heap::Heap;
use queues::{Clock, Queues};
pub use resident::Residents;
use shard::{FoundChunk, LoadEnd, Shard};
use source::chunk::{ChunkBytes, ChunkError, ChunkSource, Room};
use source::{Class, MemoryBudget, Origin};
use threads::Counter;

/// Callback of one request: called once, from any thread, with the chunk or the reason why there is none.
pub type ChunkWaiter = Box<dyn FnOnce(Result<Arc<ChunkBytes>, Arc<ChunkError>>) + Send>;

/// Answer to [`ChunkBatch::get`].
pub enum Lookup {
    /// The chunk.
    Hit(Arc<ChunkBytes>),
    /// The waiter will be called.
    Pending,
}

/// Counters of a cache.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CacheStats {
    /// Look-ups answered at once.
    pub hits: u64,
    /// Look-ups that had to wait, including those for a chunk that was loading already.
    pub misses: u64,
    /// Chunks requested from their sources, on demand or ahead of it.
    pub loads: u64,
    /// Loads that failed.
    pub errors: u64,
    /// Bytes held now, in whole pages.
    pub bytes: u64,
    /// Chunks held now.
    pub chunks: u64,
    /// Chunks evicted for others.
    pub evictions: u64,
    /// Chunks not kept for lack of room.
    pub unkept: u64,
}

/// Size and threads of a cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CacheOptions {
    /// Limit on decoded chunks in bytes.
    pub budget: u64,
    /// The threads that load chunks.
    pub fetch: FetchOptions,
}

/// Number of locks in the map of chunks: enough that the queues of many devices rarely meet at one.
const SHARDS: usize = 32;

/// Number of known blobs, open or not, above which those without any chunk are forgotten.
const MANY_BLOBS: usize = 1024;

/// Share of the budget that one reader's read-ahead may take: several readers fit beside the chunks in use.
const AHEAD_SHARE: u64 = 8;

/// Limit on the bytes evicted for one chunk, as a multiple of its length: the need for more only means that
/// readers hold pieces everywhere, and then the heap costs less than an empty cache.
const WORTH: u64 = 8;

/// The cache. Dropping it ends its threads; remaining waiters get an error.
pub struct Cache {
    chunks: Arc<Chunks>,
    fetcher: Fetcher,
    demand: Arc<Demand>,
    /// Declared after the fetcher, whose threads write to them.
    tiers: Tiers,
    budget: u64,
    /// Limit on bytes decoded ahead of a reader.
    ahead: u64,
    backlog: Backlog,
    residents: Residents,
    /// Number of devices that were given a flow.
    flows: AtomicU32,
}

impl Cache {
    /// Creates a cache that holds at most `budget` bytes, and decodes chunks with `workers` threads.
    #[must_use]
    pub fn new(budget: u64, workers: usize) -> Arc<Self> {
        let fetch = FetchOptions { workers, connections: CONNECTIONS, ahead: None };
        Self::with(CacheOptions { budget, fetch })
    }

    /// Creates a cache with these options. Its threads start when they are needed.
    #[must_use]
    pub fn with(options: CacheOptions) -> Arc<Self> {
        Self::over(options, Tiers::default())
    }

    /// Creates a cache with these options and with chunks on disk behind it.
    #[must_use]
    pub fn over(options: CacheOptions, tiers: Tiers) -> Arc<Self> {
        Self::within(options, tiers, MemoryBudget::default())
    }

    /// As [`over`](Self::over), with `images` as the memory that open images may take beside the cache.
    #[must_use]
    pub fn within(options: CacheOptions, tiers: Tiers, images: MemoryBudget) -> Arc<Self> {
        let chunks = Arc::new(Chunks::new(options.budget, images.clone()));
        let fetcher = Fetcher::start(chunks.clone(), options.fetch);
        let demand = fetcher.demand().clone();
        tiers.yield_to(&demand);
        let budget = options.budget;
        let residents = Residents::within(images);
        let (ahead, backlog) = (budget / AHEAD_SHARE, Backlog::default());
        let flows = AtomicU32::new(0);
        Arc::new(Self { chunks, fetcher, demand, tiers, budget, ahead, residents, backlog, flows })
    }

    /// Opens the blob whose chunks `source` makes; returns the open blob of the same identity and origin if there
    /// is one.
    #[must_use]
    pub fn open(&self, source: Arc<dyn ChunkSource>) -> Arc<Blob> {
        let mut blobs = self.chunks.blobs.lock();
        blobs.open(source, &self.tiers)
    }

    /// The tiers behind this cache.
    #[must_use]
    pub fn tiers(&self) -> &Tiers {
        &self.tiers
    }

    /// Fetches all chunks of these blobs, in this order, with spare capacity, until the returned value is
    /// dropped.
    #[must_use]
    pub fn fill(&self, blobs: Vec<Arc<Blob>>, options: FillOptions) -> Filling {
        self.fetcher.fill(blobs, options)
    }

    /// Begins a request for chunks that belong together, of no device.
    #[must_use]
    pub fn batch(&self) -> ChunkBatch<'_> {
        self.batch_for(Flow::default())
    }

    /// Begins a request of a device: devices take turns.
    #[must_use]
    pub fn batch_for(&self, flow: Flow) -> ChunkBatch<'_> {
        ChunkBatch { cache: self, wanted: Vec::new(), flow }
    }

    /// The flow of a new device.
    #[must_use]
    pub fn flow(&self) -> Flow {
        Flow(self.flows.fetch_add(1, Ordering::Relaxed).wrapping_add(1))
    }

    /// True if the chunk is in memory.
    #[must_use]
    pub fn holds(&self, blob: &Blob, index: u32) -> bool {
        let key = blob.shared(index);
        self.chunks.shard(key).holds(key)
    }

    /// Limit on decoded chunks in bytes.
    #[must_use]
    pub fn budget(&self) -> u64 {
        self.budget
    }

    /// Bytes that open images keep in memory while they are open.
    #[must_use]
    pub fn residents(&self) -> &Residents {
        &self.residents
    }

    /// The demand that all work yields to which no process waits for.
    #[must_use]
    pub fn demand(&self) -> &Arc<Demand> {
        &self.demand
    }

    /// Counters of fetches.
    #[must_use]
    pub fn fetched(&self) -> &Arc<FetchCounters> {
        self.fetcher.counters()
    }

    /// Counters of the cache.
    #[must_use]
    pub fn stats(&self) -> CacheStats {
        let chunks = &self.chunks;
        CacheStats {
            hits: chunks.hits.get(),
            misses: chunks.misses.get(),
            loads: chunks.loads.get(),
            errors: chunks.errors.get(),
            bytes: chunks.held.load(Ordering::Relaxed),
            chunks: (0..SHARDS).map(|number| chunks.lock(number).len() as u64).sum(),
            evictions: chunks.evictions.get(),
            unkept: chunks.unkept.get(),
        }
    }
}

/// Chunks requested together, so that neighbours are fetched by one request. Missing chunks are fetched when
/// this is dropped.
pub struct ChunkBatch<'a> {
    cache: &'a Cache,
    wanted: Vec<WantedChunk>,
    flow: Flow,
}

impl ChunkBatch<'_> {
    /// Returns the chunk, or a promise to call a waiter. `waiter` is called to create one only if the answer
    /// is [`Lookup::Pending`]; it must not use the cache, because one of the cache's locks is held during the
    /// call.
    pub fn get(
        &mut self,
        blob: &Arc<Blob>,
        index: u32,
        waiter: &mut dyn FnMut() -> ChunkWaiter,
    ) -> Lookup {
        // A read that the trace does not list is a reason to guess the next one.
        let mut guess = !blob.is_foreseen();
        let before = self.wanted.len();
        let lookup = self.look_up(blob, index, waiter, &mut guess);
        if guess {
            let missed = self.wanted.len() > before;
            let ahead = blob.touched(index, missed, self.cache.ahead);
            self.prefetch(blob, ahead);
        }
        lookup
    }

    fn look_up(
        &mut self,
        blob: &Arc<Blob>,
        index: u32,
        waiter: &mut dyn FnMut() -> ChunkWaiter,
        guess: &mut bool,
    ) -> Lookup {
        let chunks = &self.cache.chunks;
        let key = blob.key(index);
        let found =
            chunks.shard(key.chunk).look_up(blob, (index, self.flow), &chunks.clock, waiter);
        match found {
            FoundChunk::Held { bytes, first } => {
                if first {
                    self.follow(bytes.held());
                }
                chunks.hits.add(1);
                self.cache.demand.note();
                return Lookup::Hit(bytes);
            }
            FoundChunk::Joined { ahead: false, foreign: false } => {}
            FoundChunk::Joined { ahead: false, foreign: true } => {
                self.cache.fetcher.urge(key, self.flow)
            }
            FoundChunk::Joined { ahead: true, .. } => {
                self.cache.fetcher.urge(key, self.flow);
                self.follow(blob.source().room(index) as u64);
            }
            FoundChunk::Claimed => {
                self.want(blob, index, Class::Demand);
                match self.cache.backlog.taken(blob, index) {
                    Some(together) => self.prefetch(blob, together),
                    None => *guess = true,
                }
            }
        }
        chunks.misses.add(1);
        Lookup::Pending
    }

    /// Loads those of `indices` that are neither in memory nor loading, without a waiter.
    pub fn prefetch(&mut self, blob: &Arc<Blob>, indices: Range<u32>) {
        for index in indices {
            if self.cache.chunks.shard(blob.shared(index)).claim(blob, index, self.flow) {
                self.want(blob, index, Class::Prefetch);
            }
        }
    }

    /// Loads chunks, all together, when there is room for them: when the chunks loaded ahead before have been
    /// read. `read`: bytes of them that will probably be read.
    pub fn prefetch_later(&mut self, blob: &Arc<Blob>, chunks: Range<u32>, read: u64) {
        self.cache.backlog.add(blob, chunks, read);
    }

    /// Records that a chunk of so many bytes, loaded ahead, is read now.
    fn follow(&mut self, bytes: u64) {
        for (blob, chunks) in self.cache.backlog.read(bytes) {
            self.prefetch(&blob, chunks);
        }
    }

    fn want(&mut self, blob: &Arc<Blob>, chunk: u32, class: Class) {
        self.cache.chunks.loads.add(1);
        self.wanted.push(WantedChunk {
            blob: blob.clone(),
            chunk,
            class,
            tries: 0,
            flow: self.flow,
        });
    }
}

impl Drop for ChunkBatch<'_> {
    fn drop(&mut self) {
        if !self.wanted.is_empty() {
            self.cache.fetcher.want(std::mem::take(&mut self.wanted));
        }
    }
}

/// The blobs by their identities.
#[derive(Default)]
struct Blobs {
    known: HashMap<Box<str>, Known>,
    ways: HashMap<Origin, u32>,
    next: u32,
    next_way: u32,
}

/// A blob that is open, or that has chunks left in memory.
struct Known {
    number: u32,
    /// One a way.
    open: Vec<Weak<Blob>>,
    held: Arc<AtomicU64>,
}

impl Blobs {
    fn open(&mut self, source: Arc<dyn ChunkSource>, tiers: &Tiers) -> Arc<Blob> {
        if self.known.len() >= MANY_BLOBS {
            self.known.retain(|_, known| {
                known.open.iter().any(|blob| blob.strong_count() > 0)
                    || known.held.load(Ordering::Relaxed) > 0
            });
        }
        let way = self.way(source.blob().origin());
        let known = self.known.entry(BlobIdentity::of(&*source).here.into());
        let known = known.or_insert_with(|| {
            let number = self.next;
            self.next = self.next.wrapping_add(1);
            Known { number, open: Vec::new(), held: Arc::default() }
        });
        known.open.retain(|blob| blob.strong_count() > 0);
        let open = known.open.iter().filter_map(Weak::upgrade).find(|blob| blob.way() == way);
        open.unwrap_or_else(|| {
            let stored = tiers.blob(&*source);
            let blob = Arc::new(Blob::new(known.number, way, source, stored, known.held.clone()));
            known.open.push(Arc::downgrade(&blob));
            blob
        })
    }

    /// The number of an origin: the same as long as a blob of it is open.
    fn way(&mut self, origin: Origin) -> u32 {
        if self.ways.len() >= MANY_BLOBS && !self.ways.contains_key(&origin) {
            let open = self.known.values().flat_map(|known| &known.open).filter_map(Weak::upgrade);
            let used: HashSet<u32> = open.map(|blob| blob.way()).collect();
            self.ways.retain(|_, way| used.contains(way));
        }
        *self.ways.entry(origin).or_insert_with(|| {
            let way = self.next_way;
            self.next_way = self.next_way.wrapping_add(1);
            way
        })
    }
}

/// State shared by the threads. They do not hold the [`Cache`], so that it can end.
struct Chunks {
    shards: Vec<Mutex<Shard>>,
    hasher: RandomState,
    blobs: Mutex<Blobs>,
    arena: Arc<Arena>,
    /// Chunks that fit nowhere in it.
    heap: Arc<Heap>,
    budget: u64,
    held: AtomicU64,
    /// The order of eviction.
    queues: Mutex<Queues>,
    clock: Clock,
    hits: Counter,
    misses: Counter,
    loads: Counter,
    errors: Counter,
    evictions: Counter,
    unkept: Counter,
}

impl Chunks {
    fn new(budget: u64, images: MemoryBudget) -> Self {
        Self {
            heap: Heap::new(images),
            shards: (0..SHARDS).map(|_| Mutex::default()).collect(),
            hasher: RandomState::new(),
            blobs: Mutex::default(),
            arena: Arena::new(budget),
            budget,
            held: AtomicU64::new(0),
            queues: Mutex::default(),
            clock: Clock::default(),
            hits: Counter::default(),
            misses: Counter::default(),
            loads: Counter::default(),
            errors: Counter::default(),
            evictions: Counter::default(),
            unkept: Counter::default(),
        }
    }

    /// No code panics while it holds a shard, except the function that creates a waiter; a shard is
    /// consistent even then.
    fn lock(&self, number: usize) -> MutexGuard<'_, Shard> {
        self.shards[number].lock()
    }

    fn shard(&self, key: SharedChunk) -> MutexGuard<'_, Shard> {
        self.lock(self.hasher.hash_one(key) as usize % SHARDS)
    }

    fn queues(&self) -> MutexGuard<'_, Queues> {
        self.queues.lock()
    }

    /// Evicts one chunk, and returns its bytes; `None` if there is none to evict. Lock order: the queues'
    /// lock is never taken by a thread that holds a shard's lock.
    fn evict_one(&self) -> Option<u64> {
        let bytes = self.queues().evict(self.budget, &mut |key, _| self.shard(key).evict(key))?;
        self.held.fetch_sub(bytes, Ordering::Relaxed);
        self.evictions.add(1);
        Some(bytes)
    }
}

impl Delivery for Chunks {
    fn room(&self, len: usize, flow: Flow) -> Option<Box<dyn Room>> {
        let mut given_up = 0;
        while self.arena.could_hold(len) && given_up <= len as u64 * WORTH {
            if let Some(run) = self.arena.take(len) {
                return Some(Box::new(run));
            }
            let Some(more) = self.evict_one() else { break };
            given_up += more;
        }
        self.unkept.add(1);
        Some(Box::new(self.heap.take(len, flow)?))
    }

    fn spare_room(&self, len: usize) -> Option<Box<dyn Room>> {
        Some(Box::new(self.arena.take(len)?))
    }

    fn spare(&self) -> u64 {
        self.budget.saturating_sub(self.held.load(Ordering::Relaxed))
    }

    fn claim(&self, blob: &Blob, chunk: u32) -> Claim {
        let mut shard = self.shard(blob.shared(chunk));
        match shard.peek(blob.shared(chunk)) {
            Some(bytes) => Claim::Held(bytes),
            None if shard.claim(blob, chunk, Flow::default()) => Claim::Claimed,
            None => Claim::Loading,
        }
    }

    fn abandon(&self, key: Key) -> bool {
        self.shard(key.chunk).abandon(key)
    }

    fn deliver(&self, key: Key, result: Result<Arc<ChunkBytes>, Arc<ChunkError>>) {
        if result.is_err() {
            self.errors.add(1);
        }
        let end = match &result {
            Ok(bytes) if bytes.held() > 0 && self.shard(key.chunk).arrive(key) => {
                self.held.fetch_add(bytes.held(), Ordering::Relaxed);
                let flow = self.shard(key.chunk).flow(key);
                // Into the queues first: a chunk that is only in a shard could never be evicted.
                let main = self.queues().insert(key.chunk, flow, bytes.held(), &self.clock);
                LoadEnd::Kept { bytes: bytes.clone(), came: self.clock.now(), main }
            }
            Ok(_) => LoadEnd::Served,
            Err(_) => LoadEnd::Failed,
        };
        let waiters = self.shard(key.chunk).end_load(key, end);
        for waiter in waiters {
            let result = result.clone();
            if catch_unwind(AssertUnwindSafe(|| waiter(result))).is_err() {
                tracing::error!("A waiter for a chunk panicked");
            }
        }
    }

    fn is_awaited(&self, key: Key) -> bool {
        self.shard(key.chunk).is_awaited(key)
    }

    fn is_loading(&self, key: Key) -> bool {
        self.shard(key.chunk).is_loading(key)
    }
}

#[cfg(test)]
mod tests;
