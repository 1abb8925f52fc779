//! From "this chunk is wanted" to decoded, verified bytes.
//!
//! Two things take time, and different ones: a range request waits for the network, inflating needs
//! a core. So they have threads of their own. A *fetch thread* takes wanted chunks out of the
//! [`queue`], always the most urgent first, and with them whatever of the same blob is wanted beside
//! them: neighbours come by one request. As soon as one chunk's bytes are whole, and while the rest of
//! the request still arrives, an *inflate worker* takes them over: there is one for each core, and
//! demand goes first there too. It decodes straight into the cache's memory, after the checksums have
//! been compared; then everyone who waits is told.
//!
//! What is near needs no fetch thread: a chunk of a local file, or one that a [disk tier](crate::tier)
//! has, goes to the workers at once, who read it themselves. What the tier turns out not to have, or
//! not whole, is fetched like anything else. What was fetched is offered to the tier once everyone who
//! waited is told.
//!
//! A long zstd frame decodes only from its beginning, so its chunks go another way: what the tier does not have is
//! decoded by the frame's own thread, for everyone who wants some of it ([`serial`]).
//!
//! Bytes that fail their checksum are not an error yet. The tier forgets them, the source is told not
//! to trust whoever sent them, and they are fetched again; only the third damage of a chunk is given
//! to those who wait. A failed prefetch for which somebody waits by now is repeated as demand.
//!
//! # Contents
//!
//! * [`ahead`]   which chunks will probably be asked for next
//! * `streams`   what is read in order
//! * [`depth`]   how much to keep on its way
//! * [`blob`]    a blob with everything that is known of where its bytes are
//! * [`queue`]   what is wanted, and what goes together
//! * `recent`    the last failures of a blob
//! * [`fill`]    whole layers, with what is to spare
//! * `pace`      who has to stand back for whom
//! * `crew`      the fetch threads
//! * `run`       the buffers of one request
//! * `inflate`   the workers
//! * `serial`    frames that decode only from their beginning

pub mod ahead;
pub mod blob;
mod crew;
pub mod depth;
pub mod fill;
mod inflate;
mod pace;
pub mod queue;
mod recent;
mod run;
mod serial;
mod streams;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use crate::chunk::{ChunkBytes, ChunkError, Room};
use crate::metrics::Histogram;
use crate::source::{Class, SourceError};
use crate::tier::Kind;

pub use blob::{Blob, Key};
use crew::Crew;
pub(crate) use crew::MOST_BYTES;
pub use fill::{FillOptions, FillProgress, Filling};
use inflate::{Input, Job, Workers};
use pace::Pace;
pub use queue::Wanted;
pub use recent::{Failure, Recent};
use serial::Serials;

/// Where decoded chunks go: the cache.
pub trait Delivery: Send + Sync {
    /// Memory to decode `len` bytes into.
    fn room(&self, len: usize) -> Box<dyn Room>;

    /// The same if there is some that nothing has to be given up for.
    fn spare_room(&self, len: usize) -> Option<Box<dyn Room>>;

    /// Bytes that nothing has to be given up for.
    fn spare(&self) -> u64;

    /// Takes it upon the caller to load a chunk, if it is neither there nor on its way.
    fn claim(&self, blob: &Blob, chunk: u32) -> Claim;

    /// Ends the load of a chunk without delivering it. False when somebody waits for it by now: then it
    /// must be delivered.
    fn abandon(&self, key: Key) -> bool;

    /// Ends the wait for a chunk.
    fn deliver(&self, key: Key, result: Result<Arc<ChunkBytes>, Arc<ChunkError>>);

    /// Whether somebody waits for a chunk that was wanted ahead of time.
    fn is_awaited(&self, key: Key) -> bool;
}

/// Answer to [`Delivery::claim`].
pub enum Claim {
    /// The caller must see to the load.
    Claimed,
    /// Somebody else does.
    Loading,
    /// It is there.
    Held(Arc<ChunkBytes>),
}

/// How much is done at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FetchOptions {
    /// Inflate workers: one for each core that may be used.
    pub workers: usize,
    /// Most range requests under way.
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

/// Range requests under way at most. One request brings a gigabit line 2.5 MB in 20 ms, so a few of
/// them fill it; more are for many devices at once, and for object stores that give each connection
/// 50 MB/s.
pub const CONNECTIONS: usize = 24;

/// Damaged deliveries of one chunk after which it is an error.
const MOST_TRIES: u8 = 3;

/// What was fetched so far.
#[derive(Debug, Default)]
pub struct FetchCounters {
    /// Range requests made for demand.
    pub demand_requests: AtomicU64,
    /// Range requests made ahead of demand.
    pub ahead_requests: AtomicU64,
    /// Chunks that those requests brought; more than requests where neighbours came together.
    pub chunks: AtomicU64,
    /// Encoded bytes of those.
    pub bytes: AtomicU64,
    /// Chunks read from local files.
    pub local: AtomicU64,
    /// Chunks read from the disk tiers.
    pub stored: AtomicU64,
    /// Chunks whose bytes did not match their checksum.
    pub damaged: AtomicU64,
    /// Chunks that could not be had.
    pub failed: AtomicU64,
    /// Range requests made by the background fill.
    pub fill_requests: AtomicU64,
    /// Chunks filled in the background.
    pub filled: AtomicU64,
    /// Encoded bytes of those.
    pub filled_bytes: AtomicU64,
    /// From a request to its first byte.
    pub first_byte: Histogram,
    /// From a request to its last byte.
    pub whole: Histogram,
    /// Encoded bytes that were decoded.
    pub inflate_in: AtomicU64,
    /// Decoded bytes that came out.
    pub inflate_out: AtomicU64,
    /// How long a chunk took to verify and decode.
    pub inflate: Histogram,
    /// Long zstd frames begun to be decoded, the same one perhaps several times.
    pub frames: AtomicU64,
}

impl FetchCounters {
    /// A chunk was decoded.
    fn inflated(&self, encoded: usize, decoded: usize, begun: Instant) {
        count(&self.inflate_in, encoded as u64);
        count(&self.inflate_out, decoded as u64);
        self.inflate.add(begun.elapsed());
    }
}

/// The threads. Dropping this ends them; what is still wanted gets an error.
pub struct Fetcher {
    shared: Arc<Shared>,
}

/// What the threads share.
struct Shared {
    delivery: Arc<dyn Delivery>,
    counters: Arc<FetchCounters>,
    crew: Crew,
    workers: Workers,
    serials: Serials,
    fill: fill::Queue,
    pace: Pace,
}

impl Fetcher {
    /// Starts the first threads; more come as they are needed.
    pub fn start(delivery: Arc<dyn Delivery>, options: FetchOptions) -> Self {
        let shared = Arc::new(Shared {
            delivery,
            counters: Arc::default(),
            crew: Crew::new(options.connections.max(1), options.ahead),
            workers: Workers::new(options.workers.max(1)),
            serials: Serials::default(),
            fill: fill::Queue::default(),
            pace: Pace::default(),
        });
        inflate::start(&shared);
        Self { shared }
    }

    /// What was fetched so far.
    #[must_use]
    pub fn counters(&self) -> &Arc<FetchCounters> {
        &self.shared.counters
    }

    /// Has chunks fetched and decoded; neighbours among them together. The caller has made sure that
    /// nobody else does.
    pub fn want(&self, wanted: Vec<Wanted>) {
        self.shared.want(wanted);
    }

    /// Has whole blobs fetched with what is to spare, until the answer is dropped.
    #[must_use]
    pub fn fill(&self, blobs: Vec<Arc<Blob>>, options: FillOptions) -> Filling {
        fill::begin(&self.shared, blobs, options)
    }

    /// Somebody waits now for a chunk that was wanted ahead of time.
    pub fn urge(&self, key: Key) {
        self.shared.pace.demand();
        self.shared.crew.urge(key);
        self.shared.workers.urge(key);
        self.shared.serials.urge(key);
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

impl Shared {
    /// To the workers what is near or perhaps is, else to the fetch threads.
    fn want(self: &Arc<Self>, wanted: Vec<Wanted>) {
        if wanted.iter().any(|wanted| wanted.class == Class::Demand) {
            self.pace.demand();
        }
        // A worker looks for a chunk of a long frame in the tier first, and passes it on if it is not there.
        let is_near = |wanted: &Wanted| {
            let Wanted { blob, chunk, .. } = wanted;
            blob.is_near(*chunk) || blob.source().is_serial(*chunk)
        };
        let (near, far): (Vec<_>, Vec<_>) = wanted.into_iter().partition(is_near);
        let mut refused = Vec::new();
        for wanted in near {
            let Wanted { blob, chunk, class, tries } = wanted;
            let job = Job { blob, chunk, class, tries, input: Input::Near };
            refused.extend(self.workers.push(job).err().map(|job| job.wanted()));
        }
        for wanted in refused {
            self.fail(&wanted, ended(&wanted.blob));
        }
        self.want_far(far);
    }

    /// To the fetch threads, or to those of long frames.
    fn want_far(self: &Arc<Self>, wanted: Vec<Wanted>) {
        // To be kept as it comes, a chunk need not be decoded.
        let is_serial = |wanted: &Wanted| {
            let encoded = matches!(wanted.blob.stored().target(), Some((Kind::Encoded, _)));
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

    /// A chunk could not be had. Nobody waits for most of what is fetched ahead; where somebody does,
    /// it gets the care of demand.
    fn fail(self: &Arc<Self>, wanted: &Wanted, error: Arc<ChunkError>) {
        let key = wanted.key();
        if wanted.class > Class::Demand
            && wanted.tries < MOST_TRIES
            && self.delivery.is_awaited(key)
            && !self.crew.is_ending()
        {
            self.want(vec![Wanted {
                class: Class::Demand,
                tries: wanted.tries + 1,
                ..wanted.clone()
            }]);
            return;
        }
        count(&self.counters.failed, 1);
        wanted.blob.failures().note(wanted.chunk, false, &*error);
        self.deliver(key, Err(error));
    }

    /// A waiter that panics must not take a thread with it.
    fn deliver(&self, key: Key, result: Result<Arc<ChunkBytes>, Arc<ChunkError>>) {
        self.fill.ended(key, result.is_ok());
        if catch_unwind(AssertUnwindSafe(|| self.delivery.deliver(key, result))).is_err() {
            tracing::error!("The delivery of a chunk panicked");
        }
    }
}

/// Marks the calling thread as one that serves I/O: memory that it allocates must not wait for I/O that
/// it would itself have to serve. Only root may; others serve no block device.
pub(crate) fn mark_io_thread() {
    let _ = rustix::process::configure_io_flusher_behavior(true);
}

fn count(counter: &AtomicU64, n: u64) {
    counter.fetch_add(n, Ordering::Relaxed);
}

/// What everyone gets who still waits at the end.
fn ended(blob: &Blob) -> Arc<ChunkError> {
    failure(blob, "The cache was closed before this chunk was loaded")
}

fn failure(blob: &Blob, reason: &'static str) -> Arc<ChunkError> {
    let source = Arc::new(std::io::Error::other(reason));
    let name = blob.source().id().to_owned();
    Arc::new(SourceError::Io { name, offset: 0, len: 0, source }.into())
}
