//! From a wanted chunk to its decoded, verified bytes.
//!
//! Two kinds of work take time: a range request waits for the network, and decoding needs a core. So each has
//! threads of its own. A *fetch thread* takes wanted chunks out of the [`queue`], always the most urgent
//! first, together with wanted chunks beside them in the same blob: neighbours are fetched by one request. As
//! soon as one chunk's bytes are complete, and while the rest of the request still arrives, a *decode thread*
//! takes them over: there is one for each core, and demand goes first there too. It decodes directly into the
//! cache's memory, after the checksums have been compared; then all waiters are called.
//!
//! A near chunk needs no fetch thread: a chunk of a local file, or one that a [disk tier](crate::tier) has,
//! goes to the decode threads at once, which read it themselves. A chunk that the tier turns out not to have,
//! or has damaged, is fetched like any other. A fetched chunk is offered to the tier after all its waiters
//! are called.
//!
//! A long zstd frame can be decoded only from its beginning, so its chunks are handled differently: a chunk
//! that the tier does not have is decoded by the frame's own thread, for all waiters of the frame
//! ([`serial`]).
//!
//! Bytes that fail their checksum are not an error yet. The tier forgets them, the source marks their sender
//! as bad, and they are fetched again; only the third damage of a chunk is reported to its waiters. A failed
//! prefetch that has a waiter by then is repeated as demand.
//!
//! # Contents
//!
//! * [`fair`]    turns between devices
//! * [`ahead`]   guesses of the chunks that are read next
//! * `streams`   sequential reads
//! * [`depth`]   number of bytes to keep in flight
//! * [`blob`]    a blob with the state of its fetches
//! * [`queue`]   wanted chunks, and their division into requests
//! * `recent`    the last failures of a blob
//! * [`fill`]    whole layers, with spare capacity
//! * [`front`]   a blob from front to end
//! * `pace`      size and number of the fill's requests
//! * `crew`      the fetch threads
//! * `run`       the buffers of one request
//! * `inflate`   the decode threads
//! * `serial`    frames that decode only from their beginning

pub mod ahead;
pub mod blob;
mod crew;
pub mod depth;
mod fair;
pub mod fill;
pub mod front;
mod inflate;
mod pace;
pub mod queue;
mod recent;
mod run;
mod serial;
mod streams;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Instant;

use crate::Histogram;
use crate::quiet::Demand;
use crate::tier::TierKind;
use source::chunk::{ChunkBytes, ChunkError, Room};
use source::{Class, SourceError};

pub use blob::{Blob, Key, SharedChunk};
use crew::Crew;
pub(crate) use crew::MOST_BYTES;
pub use fair::Flow;
pub use fill::{FillOptions, FillProgress, Filling};
pub use front::WholeBlob;
use inflate::{DecodeJob, Input, Workers};
use pace::Pace;
pub use queue::WantedChunk;
pub use recent::{Recent, RecentFailure};
pub(crate) use serial::MOST_MEMORY as FRAMES_MEMORY;
use serial::Serials;
use threads::Counter;

/// Receiver of decoded chunks: the cache.
pub trait Delivery: Send + Sync {
    /// Memory to decode `len` bytes for a device into; `None` if it holds as much as it may, or all memory is in use.
    fn room(&self, len: usize, flow: Flow) -> Option<Box<dyn Room>>;

    /// Memory to decode `len` bytes into, if some is free without an eviction.
    fn spare_room(&self, len: usize) -> Option<Box<dyn Room>>;

    /// Bytes that are free without an eviction.
    fn spare(&self) -> u64;

    /// Claims the load of a chunk for the caller, if the chunk is neither in memory nor loading.
    fn claim(&self, blob: &Blob, chunk: u32) -> Claim;

    /// Ends the load of a chunk without delivering it. False when it has a waiter by now: then it must be
    /// delivered.
    fn abandon(&self, key: Key) -> bool;

    /// Ends the load of a chunk and calls its waiters: with bytes those of all ways, with an error those of its own.
    fn deliver(&self, key: Key, result: Result<Arc<ChunkBytes>, Arc<ChunkError>>);

    /// True if a chunk that was wanted ahead of time has a waiter of this way.
    fn is_awaited(&self, key: Key) -> bool;

    /// True if a chunk is still wanted this way: no other way has brought it meanwhile.
    fn is_loading(&self, key: Key) -> bool;
}

/// Answer to [`Delivery::claim`].
pub enum Claim {
    /// The caller must load it.
    Claimed,
    /// It is loading already.
    Loading,
    /// It is in memory.
    Held(Arc<ChunkBytes>),
}

/// Limits on parallel work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FetchOptions {
    /// Number of decode threads: one for each core that may be used.
    pub workers: usize,
    /// Limit on range requests in flight.
    pub connections: usize,
    /// Of those, most that are made ahead of demand: for a trace that is replayed, and reading ahead. A quarter of
    /// all is kept for demand in any case.
    pub ahead: Option<usize>,
}

impl Default for FetchOptions {
    fn default() -> Self {
        let workers = std::thread::available_parallelism().map_or(2, std::num::NonZero::get);
        Self { workers, connections: CONNECTIONS, ahead: None }
    }
}

/// Default limit on range requests in flight. One request fetches 2.5 MB over a gigabit line in 20 ms, so a
/// few of them fill it; more are for many devices at once, and for object stores that give each connection 50
/// MB/s.
pub const CONNECTIONS: usize = 24;

/// Damaged deliveries of one chunk after which it is an error.
const MOST_TRIES: u8 = 3;

/// Counters of fetches.
#[derive(Debug, Default)]
pub struct FetchCounters {
    /// Range requests made for demand.
    pub demand_requests: Counter,
    /// Range requests made ahead of demand.
    pub ahead_requests: Counter,
    /// Chunks that those requests fetched; more than requests when neighbours were fetched together.
    pub chunks: Counter,
    /// Encoded bytes of those.
    pub bytes: Counter,
    /// Chunks read from local files.
    pub local: Counter,
    /// Chunks read from the disk tiers.
    pub stored: Counter,
    /// Chunks whose bytes did not match their checksum.
    pub damaged: Counter,
    /// Chunks that could not be fetched.
    pub failed: Counter,
    /// Range requests made by the background fill.
    pub fill_requests: Counter,
    /// Chunks filled in the background.
    pub filled: Counter,
    /// Encoded bytes of those.
    pub filled_bytes: Counter,
    /// Chunks that the fill had requested and that were fetched again, for a reader.
    pub taken_over: Counter,
    /// Blobs without a table of checksums that were fetched whole and have their digest.
    pub whole_blobs: Counter,
    /// Blobs that were fetched whole and have another digest.
    pub whole_wrong: Counter,
    /// Time from a request to its first byte.
    pub first_byte: Histogram,
    /// Time from a request to its last byte.
    pub whole: Histogram,
    /// Encoded bytes that were decoded.
    pub inflate_in: Counter,
    /// Decoded bytes produced.
    pub inflate_out: Counter,
    /// Time to verify and decode a chunk.
    pub inflate: Histogram,
    /// Passes begun through long zstd frames, possibly several through the same frame.
    pub frames: Counter,
}

impl FetchCounters {
    /// Records that a chunk was decoded.
    fn inflated(&self, encoded: usize, decoded: usize, begun: Instant) {
        self.inflate_in.add(encoded as u64);
        self.inflate_out.add(decoded as u64);
        self.inflate.add(begun.elapsed());
    }
}

/// The threads. Dropping this ends them; remaining waiters get an error.
pub struct Fetcher {
    shared: Arc<FetchShared>,
}

/// State shared by the threads.
struct FetchShared {
    delivery: Arc<dyn Delivery>,
    counters: Arc<FetchCounters>,
    crew: Crew,
    workers: Workers,
    serials: Serials,
    fill: fill::FillQueue,
    pace: Pace,
}

impl Fetcher {
    /// Starts the first threads; more start when they are needed.
    pub fn start(delivery: Arc<dyn Delivery>, options: FetchOptions) -> Self {
        let shared = Arc::new(FetchShared {
            delivery,
            counters: Arc::default(),
            crew: Crew::new(options.connections.max(1), options.ahead),
            workers: Workers::new(options.workers.max(1)),
            serials: Serials::default(),
            fill: fill::FillQueue::default(),
            pace: Pace::default(),
        });
        inflate::start(&shared);
        Self { shared }
    }

    /// Counters of fetches.
    #[must_use]
    pub fn counters(&self) -> &Arc<FetchCounters> {
        &self.shared.counters
    }

    /// Fetches and decodes chunks, neighbours among them together. The caller has claimed their loads.
    pub fn want(&self, wanted: Vec<WantedChunk>) {
        self.shared.want(wanted);
    }

    /// Fetches whole blobs with spare capacity, until the returned value is dropped.
    #[must_use]
    pub fn fill(&self, blobs: Vec<Arc<Blob>>, options: FillOptions) -> Filling {
        fill::begin(&self.shared, blobs, options)
    }

    /// Makes demand of a chunk that was wanted ahead of time, or by another device: this one has a waiter now.
    pub fn urge(&self, key: Key, flow: Flow) {
        self.shared.pace.demand().note();
        self.shared.urge(key, flow);
    }

    /// The demand that all work yields to which no process waits for.
    #[must_use]
    pub fn demand(&self) -> &Arc<Demand> {
        self.shared.pace.demand()
    }
}

impl Drop for Fetcher {
    fn drop(&mut self) {
        self.shared.fill.end();
        let mut left = self.shared.crew.end();
        left.extend(self.shared.serials.end());
        let rest = self.shared.workers.end();
        for wanted in left {
            self.shared.fail(&wanted, ended(&wanted.blob));
        }
        for job in rest {
            let wanted = job.wanted();
            self.shared.fail(&wanted, ended(&wanted.blob));
        }
        self.shared.crew.join();
        self.shared.serials.join();
        self.shared.workers.join();
        self.shared.fill.join();
    }
}

impl FetchShared {
    /// Sends chunks that are near, or may be, to the decode threads, and the others to the fetch threads.
    fn want(self: &Arc<Self>, wanted: Vec<WantedChunk>) {
        if wanted.iter().any(|wanted| wanted.class < Class::Fill) {
            self.pace.demand().note();
        }
        // A decode thread looks for a chunk of a long frame in the tier first, and passes it on if it is not
        // there.
        let is_near = |wanted: &WantedChunk| {
            let WantedChunk { blob, chunk, .. } = wanted;
            blob.is_near(*chunk) || blob.source().is_serial(*chunk)
        };
        let (near, far): (Vec<_>, Vec<_>) = wanted.into_iter().partition(is_near);
        let mut refused = Vec::new();
        for wanted in near {
            let WantedChunk { blob, chunk, class, tries, flow } = wanted;
            let job = DecodeJob { blob, chunk, class, tries, flow, input: Input::Near };
            refused.extend(self.workers.push(job).err().map(|job| job.wanted()));
        }
        for wanted in refused {
            self.fail(&wanted, ended(&wanted.blob));
        }
        self.want_far(far);
    }

    /// Makes demand of a chunk, wherever its load has got to.
    fn urge(&self, key: Key, flow: Flow) {
        self.counters.taken_over.add(self.crew.urge(key, flow).into());
        self.workers.urge(key, flow);
        if self.serials.urge(key) {
            self.crew.look_again();
        }
    }

    /// Makes demand of a chunk that was handed on for the fill, if a reader has come meanwhile: one that came while it was
    /// between two queues was not found by [`Self::urge`].
    fn urge_awaited(&self, key: Key, flow: Flow) {
        if self.delivery.is_awaited(key) {
            self.urge(key, flow);
        }
    }

    /// Sends chunks to the fetch threads, or to those of long frames.
    fn want_far(self: &Arc<Self>, wanted: Vec<WantedChunk>) {
        // A chunk that the fill stores encoded need not be decoded.
        let is_serial = |wanted: &WantedChunk| {
            let encoded = matches!(wanted.blob.stored().target(), Some((TierKind::Encoded, _)));
            wanted.blob.source().is_serial(wanted.chunk)
                && !(wanted.class == Class::Fill && encoded)
        };
        let (serial, far): (Vec<_>, Vec<_>) = wanted.into_iter().partition(is_serial);
        let mut refused = Vec::new();
        if !serial.is_empty() {
            refused.extend(serial::want(self, serial).err().unwrap_or_default());
        }
        if !far.is_empty() {
            refused.extend(crew::want(self, far).err().unwrap_or_default());
        }
        for wanted in refused {
            self.fail(&wanted, ended(&wanted.blob));
        }
    }

    /// Ends a load without success. Most chunks that are fetched ahead have no waiter; one that has is
    /// repeated as demand.
    fn fail(self: &Arc<Self>, wanted: &WantedChunk, error: Arc<ChunkError>) {
        let key = wanted.key();
        if wanted.class > Class::Demand
            && wanted.tries < MOST_TRIES
            && self.delivery.is_awaited(key)
            && !self.crew.is_ending()
        {
            self.want(vec![WantedChunk {
                class: Class::Demand,
                tries: wanted.tries + 1,
                ..wanted.clone()
            }]);
            return;
        }
        self.counters.failed.add(1);
        wanted.blob.failures().note(wanted.chunk, false, &*error);
        self.deliver(key, Err(error));
    }

    /// Delivers a chunk. A panic of a waiter must not end the thread.
    fn deliver(&self, key: Key, result: Result<Arc<ChunkBytes>, Arc<ChunkError>>) {
        self.fill.ended(key, result.is_ok());
        if catch_unwind(AssertUnwindSafe(|| self.delivery.deliver(key, result))).is_err() {
            tracing::error!("The delivery of a chunk panicked");
        }
    }
}

/// Those of these chunks that are wanted for the fill.
fn filled(wanted: &[WantedChunk]) -> Vec<(Key, Flow)> {
    let filled = wanted.iter().filter(|wanted| wanted.class == Class::Fill);
    filled.map(|wanted| (wanted.key(), wanted.flow)).collect()
}

/// The error for waiters that remain at the end.
fn ended(blob: &Blob) -> Arc<ChunkError> {
    failure(blob, "The cache was closed before this chunk was loaded")
}

/// The error of a chunk that there is no memory for.
fn no_room(blob: &Blob) -> Arc<ChunkError> {
    failure(
        blob,
        "There is no memory for this chunk: its device holds as much as it may (turbobd.memoryBudgetMB)",
    )
}

fn failure(blob: &Blob, reason: &'static str) -> Arc<ChunkError> {
    let source = Arc::new(std::io::Error::other(reason));
    let name = blob.source().id().to_owned();
    Arc::new(SourceError::Io { name, offset: 0, len: 0, source }.into())
}
