//! Chunks on disk: a chunk that was fetched once need not be fetched again, by any device, after a restart.
//!
//! There is one kind of store, used twice. The *encoded* tier (overlaybd's `cacheConfig`) keeps a blob's
//! bytes as they were fetched; they are verified by their SHA-256 or by decoding them. The *decoded* tier
//! (`gzipCacheConfig`) keeps the decoded bytes, about three times as large and ready to be read; they are
//! verified by their CRC-32. For an image without checksums, the tier's own are compared.
//!
//! Each blob has a sparse file, named by what proves its chunks, or by the origin that answers for them
//! (`identity`): no image decides what another reads. Every chunk has a place
//! in it that follows from its number, in whole pages that no other chunk shares. Beside it is a [presence
//! map](presence). Each chunk is evicted alone, by punching a hole, and the capacity is a hard limit on the
//! size of the files.
//!
//! # State after a crash
//!
//! A chunk's record is appended to the map when its bytes are durable, and the record of its removal is
//! durable before its hole is punched. So data that was not durable before a crash is only missing.
//! Correctness does not depend on that, though: every chunk is verified at every read, and a wrong one,
//! whatever the cause, is forgotten, counted, and fetched again.
//!
//! # Waiting
//!
//! Readers never wait for a write: a chunk that is [offered](TierBlob::offer) goes into a queue of bounded
//! size, and is dropped when that is full. One thread writes batches from it: evictions, data, sync, records.
//! It holds no lock while it waits for the disk.
//!
//! Nor do they compete with one: the thread writes when it is [quiet](crate::quiet), and its accesses are of the idle class of
//! the disk. While there is demand it waits for some seconds, and then writes one batch; the queue's second half is
//! not waited for, so that what is read is kept rather than dropped. Its class of the processor is the ordinary one: it holds
//! locks of the map and of the filesystem that readers take too, and has little to compute.
//!
//! Two processes cannot share a tier: the second one runs without it, and logs that.
//!
//! # Page cache or `O_DIRECT`
//!
//! The page cache, by measurement; the figures are in `perf/README.md`. Written data is dropped from it at
//! once: it has just been in memory as a chunk.
//!
//! # Contents
//!
//! * [`store`]    the interface to a directory; the real one
//! * `memory`     a directory in memory, whose power can fail, and a faulty one: for tests, by the feature
//!   `testing`
//! * `presence`   the map, on disk
//! * `fifo`       the order of eviction
//! * `state`      the map of all files, in memory
//! * `opening`    reading a directory, after a crash or not
//! * `writer`     the thread that writes
//! * `uring`      its `io_uring`

mod fifo;
#[cfg(any(test, feature = "testing"))]
pub mod memory;
mod opening;
mod presence;
mod state;
pub mod store;
#[cfg(test)]
mod tests;
mod uring;
mod writer;

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::thread::JoinHandle;

use parking_lot::Mutex;
use thiserror::Error;

use crate::identity::{self, BlobIdentity};
use crate::quiet::Demand;
use presence::Subject;
use source::chunk::ChunkSource;
use state::TierShared;
use store::{ChunkPayload, DirStore, Store};
use threads::Counter;
use writer::{Offer, WriterCommand};

/// Unit of allocation in the data files: the filesystem's page.
const PAGE: u64 = 4096;

/// Limit on the bytes that wait to be written. A disk that writes 100 MB/s takes a third of a second for
/// them.
pub const QUEUE: u64 = 32 << 20;

/// Form of the chunks that a tier keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TierKind {
    /// Encoded bytes, as they were fetched.
    Encoded,
    /// Decoded bytes, as they are read.
    Decoded,
}

impl TierKind {
    fn number(self) -> u8 {
        match self {
            Self::Encoded => 1,
            Self::Decoded => 2,
        }
    }

    fn of(number: u8) -> Option<Self> {
        match number {
            1 => Some(Self::Encoded),
            2 => Some(Self::Decoded),
            _ => None,
        }
    }

    /// Name of the kind, and suffix of its files' names.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Encoded => "encoded",
            Self::Decoded => "decoded",
        }
    }
}

/// Place and size of a tier.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TierOptions {
    /// Its directory; created if it does not exist.
    pub dir: PathBuf,
    /// Limit on the bytes of its files.
    pub capacity: u64,
    /// Bytes to leave free on the filesystem: with less free space, the tier shrinks and takes no more
    /// chunks.
    pub floor: u64,
}

/// Reasons why a tier cannot be opened.
#[derive(Debug, Error)]
pub enum TierError {
    /// An operation on the directory failed.
    #[error("Cannot {what} {dir}", dir = dir.display())]
    Io {
        /// The operation.
        what: &'static str,
        /// The directory.
        dir: PathBuf,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// Another process uses it.
    #[error("Another process uses the {kind} cache in {dir}", dir = dir.display())]
    InUse {
        /// Kind of the tier.
        kind: &'static str,
        /// The directory.
        dir: PathBuf,
    },
    /// The filesystem cannot punch holes.
    #[error("The filesystem of {dir} cannot free parts of a file: choose another for the cache", dir = dir.display())]
    NoHoles {
        /// The directory.
        dir: PathBuf,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// It lies on a device that this process serves.
    #[error("{dir} lies on {device}, which turbobd itself serves: choose another place for the cache", dir = dir.display())]
    OwnDevice {
        /// The directory.
        dir: PathBuf,
        /// The device.
        device: String,
    },
}

/// Counters of a tier.
#[derive(Debug, Default)]
pub struct TierCounters {
    /// Chunks read and verified.
    pub reads: Counter,
    /// Bytes of those.
    pub read_bytes: Counter,
    /// Chunks written.
    pub writes: Counter,
    /// Bytes of those.
    pub written_bytes: Counter,
    /// Chunks not written because the queue was full.
    pub dropped: Counter,
    /// Chunks not written for lack of space: the floor, a full disk, or a chunk longer than the capacity.
    pub refused: Counter,
    /// Chunks evicted for others or for the floor.
    pub evicted: Counter,
    /// Chunks that failed verification, and are fetched again.
    pub damaged: Counter,
    /// Files that were removed, truncated or of another version, and are created anew.
    pub resets: Counter,
    /// Reads, writes and syncs that the system refused.
    pub failures: Counter,
}

/// Present contents of a tier.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Usage {
    /// Bytes that it takes on the disk.
    pub bytes: u64,
    /// Bytes that it may take.
    pub capacity: u64,
    /// Number of blobs.
    pub blobs: usize,
    /// Number of chunks.
    pub chunks: usize,
}

/// Result of [`Tier::verify`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Verified {
    /// Chunks that are good.
    pub good: u64,
    /// Bytes of them.
    pub bytes: u64,
    /// Chunks that are damaged, and now forgotten.
    pub damaged: u64,
}

/// A tier. Dropping it writes the queue's chunks, and releases its directory.
pub struct Tier {
    shared: Arc<TierShared>,
    writer: Mutex<Option<JoinHandle<()>>>,
    _lock: Option<File>,
}

/// The tiers of a host.
#[derive(Clone, Default)]
pub struct Tiers {
    /// Tier of encoded chunks, as they were fetched.
    pub encoded: Option<Arc<Tier>>,
    /// Tier of decoded chunks, as they are read.
    pub decoded: Option<Arc<Tier>>,
}

/// The chunks of one blob in the tiers.
#[derive(Default)]
pub struct StoredBlob {
    /// Encoded chunks.
    pub encoded: Option<TierBlob>,
    /// Decoded chunks.
    pub decoded: Option<TierBlob>,
    /// Encoded chunks of the whole blob, whose digest was compared: of any origin.
    pub whole: Option<TierBlob>,
    /// Tier for new chunks of it: each chunk is kept once.
    pub target: Option<TierKind>,
}

impl Tiers {
    /// The stored chunks of the blob of `source`. A blob that is costly to decode goes to the decoded tier,
    /// every other to the encoded one; to the other tier if the preferred one is missing.
    #[must_use]
    pub fn blob(&self, source: &dyn ChunkSource) -> StoredBlob {
        let local = source.blob().is_local();
        if local && !source.is_costly() {
            return StoredBlob::default();
        }
        let file = |tier: &Option<Arc<Tier>>| tier.as_ref().and_then(|tier| tier.file(source));
        let encoded = file(&self.encoded).filter(|_| !local);
        let decoded = file(&self.decoded);
        let whole = self.encoded.as_ref().filter(|_| !local).and_then(|tier| tier.whole(source));
        let target = match (&encoded, &decoded) {
            (_, Some(_)) if source.is_costly() => Some(TierKind::Decoded),
            (Some(_), _) => Some(TierKind::Encoded),
            (None, Some(_)) => Some(TierKind::Decoded),
            (None, None) => None,
        };
        StoredBlob { encoded, decoded, whole, target }
    }
}

impl Tiers {
    /// Lets the tiers' writers yield to this demand. Only the first call counts.
    pub(crate) fn yield_to(&self, demand: &Arc<Demand>) {
        for tier in [&self.encoded, &self.decoded].into_iter().flatten() {
            tier.shared.yield_to(demand.clone());
        }
    }
}

impl StoredBlob {
    /// True if a chunk is there, in either form.
    #[must_use]
    pub fn has(&self, chunk: u32) -> bool {
        let files = [&self.decoded, &self.encoded, &self.whole];
        files.into_iter().flatten().any(|stored| stored.has(chunk))
    }

    /// The files with encoded chunks, the better verified first.
    pub fn all_encoded(&self) -> impl Iterator<Item = &TierBlob> {
        [&self.whole, &self.encoded].into_iter().flatten()
    }

    /// The tier for new chunks of the blob.
    #[must_use]
    pub fn target(&self) -> Option<(TierKind, &TierBlob)> {
        match self.target? {
            TierKind::Encoded => self.encoded.as_ref().map(|stored| (TierKind::Encoded, stored)),
            TierKind::Decoded => self.decoded.as_ref().map(|stored| (TierKind::Decoded, stored)),
        }
    }
}

impl Tier {
    /// Opens the tier in a directory and finds the chunks that an earlier process left there.
    ///
    /// # Errors
    /// Returns [`TierError`]: the directory is unusable, or another process uses it.
    pub fn open(kind: TierKind, options: &TierOptions) -> Result<Self, TierError> {
        let dir = &options.dir;
        let lock = opening::lock(kind, dir)?;
        opening::refuse_own_device(dir)?;
        opening::probe_holes(kind, dir)?;
        Self::over(kind, Arc::new(DirStore::new(dir)), options, Some(lock))
    }

    /// Opens a tier in a store.
    ///
    /// # Errors
    /// Returns [`TierError::Io`].
    pub fn with_store(
        kind: TierKind,
        store: Arc<dyn Store>,
        options: &TierOptions,
    ) -> Result<Self, TierError> {
        Self::over(kind, store, options, None)
    }

    fn over(
        kind: TierKind,
        store: Arc<dyn Store>,
        options: &TierOptions,
        lock: Option<File>,
    ) -> Result<Self, TierError> {
        let io = |what| move |source| TierError::Io { what, dir: options.dir.clone(), source };
        let (sender, receiver) = channel();
        let shared = Arc::new(TierShared::new(kind, store, options.clone(), sender));
        opening::read_directory(&shared).map_err(io("read"))?;
        let own = shared.clone();
        let name = format!("tier-{}", kind.name());
        let writer = std::thread::Builder::new().name(name).spawn(move || {
            sys::privilege::become_clerk();
            writer::run(own, receiver);
        });
        let writer = Mutex::new(Some(writer.map_err(io("start the writer of"))?));
        Ok(Self { shared, writer, _lock: lock })
    }

    /// Form of the chunks that it keeps.
    #[must_use]
    pub fn kind(&self) -> TierKind {
        self.shared.kind
    }

    /// Its directory.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.shared.options.dir
    }

    /// Counters so far.
    #[must_use]
    pub fn counters(&self) -> &Arc<TierCounters> {
        &self.shared.counters
    }

    /// Present contents.
    #[must_use]
    pub fn usage(&self) -> Usage {
        self.shared.usage()
    }

    /// True if the disk has no space for more; it may have again later.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.shared.is_full()
    }

    /// Bytes that wait to be written.
    #[must_use]
    pub fn waiting(&self) -> u64 {
        self.shared.queued()
    }

    /// The file for the chunks of `source`. It belongs to all blobs with the same proof; without one, to those of the
    /// same origin that have the same name. `None` when they have no permanent name: only a digest is one.
    #[must_use]
    pub fn file(&self, source: &dyn ChunkSource) -> Option<TierBlob> {
        let has_digest = source
            .id()
            .split(['#', ':'])
            .any(|part| part.len() == 64 && part.bytes().all(|byte| byte.is_ascii_hexdigit()));
        if !has_digest {
            return None;
        }
        self.file_of(source, BlobIdentity::of(source).lasting)
    }

    /// The file for the chunks of `source` as those of a whole blob whose digest was compared, whatever its origin. `None`
    /// for a blob that brings a proof itself.
    #[must_use]
    pub fn whole(&self, source: &dyn ChunkSource) -> Option<TierBlob> {
        self.file_of(source, identity::of_whole(source)?)
    }

    fn file_of(&self, source: &dyn ChunkSource, id: String) -> Option<TierBlob> {
        let len = match self.shared.kind {
            TierKind::Encoded => source.blob().len(),
            TierKind::Decoded => source.decoded_len(),
        };
        let (kind, chunks) = (self.shared.kind, source.chunk_count());
        let subject = Subject { kind, id, len, chunks };
        if !subject.fits() {
            return None;
        }
        let file = self.shared.register(&subject);
        Some(TierBlob { shared: self.shared.clone(), file })
    }

    /// Waits until every chunk offered so far is written and durable.
    pub fn flush(&self) {
        let (sender, receiver) = channel();
        if self.shared.send(WriterCommand::Flush(sender)) {
            let _ = receiver.recv();
        }
    }

    /// Evicts chunks until at most `bytes` are taken. Returns the bytes that are taken then.
    #[must_use]
    pub fn prune(&self, bytes: u64) -> u64 {
        let (sender, receiver) = channel();
        if self.shared.send(WriterCommand::Prune(bytes, sender)) {
            let _ = receiver.recv();
        }
        self.usage().bytes
    }

    /// Reads every chunk and forgets those that are damaged.
    #[must_use]
    pub fn verify(&self) -> Verified {
        let mut verified = Verified::default();
        let mut buffer = Vec::new();
        for (file, chunk, len) in self.shared.all() {
            let stored = self.shared.hold(file);
            buffer.resize(len, 0);
            if stored.is_some_and(|file| file.read(chunk, &mut buffer, &|_| None)) {
                verified.good += 1;
                verified.bytes += len as u64;
            } else {
                verified.damaged += 1;
            }
        }
        self.flush();
        verified
    }
}

impl Drop for Tier {
    fn drop(&mut self) {
        self.shared.send(WriterCommand::End);
        let writer = self.writer.lock().take();
        if let Some(writer) = writer
            && writer.thread().id() != std::thread::current().id()
        {
            let _ = writer.join();
        }
    }
}

/// The chunks of a blob in a tier.
pub struct TierBlob {
    shared: Arc<TierShared>,
    file: u32,
}

impl TierBlob {
    /// Length of a chunk that is there.
    #[must_use]
    pub fn len_of(&self, chunk: u32) -> Option<usize> {
        self.shared.extent(self.file, chunk).map(|extent| extent.len as usize)
    }

    /// True if a chunk is there.
    #[must_use]
    pub fn has(&self, chunk: u32) -> bool {
        self.len_of(chunk).is_some()
    }

    /// True if a chunk waits to be written.
    #[must_use]
    pub fn is_offered(&self, chunk: u32) -> bool {
        self.shared.is_offered(self.file, chunk)
    }

    /// Number of chunks that are there.
    #[must_use]
    pub fn count(&self) -> usize {
        self.shared.count(self.file)
    }

    /// Reads a chunk into `buf`, which has the chunk's length. `verify` returns the result of its check, or
    /// `None` if only the tier's own checksum can check the chunk. False when the chunk is not there or
    /// damaged; a damaged one is forgotten.
    #[must_use]
    pub fn read(&self, chunk: u32, buf: &mut [u8], verify: &dyn Fn(&[u8]) -> Option<bool>) -> bool {
        self.shared.read(self.file, chunk, buf, verify)
    }

    /// Forgets a chunk that turned out to be wrong after it was read.
    pub fn forget(&self, chunk: u32) {
        self.shared.forget(self.file, chunk, "it does not decode");
    }

    /// Gives up a chunk that is kept elsewhere now.
    pub fn release(&self, chunk: u32) {
        self.shared.release(self.file, chunk);
    }

    /// Offers a verified chunk that begins at byte `start` of the blob or its decoded bytes. False when it is
    /// dropped, because the queue is full.
    pub fn offer(&self, chunk: u32, start: u64, payload: ChunkPayload) -> bool {
        if payload.bytes().is_empty() || self.has(chunk) {
            return true;
        }
        let offer =
            Offer { file: self.file, chunk, at: place(start, chunk), payload: Arc::new(payload) };
        self.shared.offer(offer)
    }

    /// Bytes that wait to be written to this tier.
    #[must_use]
    pub fn waiting(&self) -> u64 {
        self.shared.queued()
    }

    /// True if the disk has no space for more.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.shared.is_full()
    }

    /// Limit on the bytes of the whole tier.
    #[must_use]
    pub fn capacity(&self) -> u64 {
        self.shared.options.capacity
    }
}

impl Drop for TierBlob {
    fn drop(&mut self) {
        self.shared.let_go(self.file);
    }
}

/// Position of a chunk in its data file: in the order of the chunks, in pages of its own. Chunks begin
/// anywhere and may share a byte with their neighbour, so each is moved two pages further than the one
/// before.
fn place(start: u64, chunk: u32) -> u64 {
    start / PAGE * PAGE + u64::from(chunk) * 2 * PAGE
}

/// Bytes that so many bytes take in whole pages.
fn in_pages(len: u64) -> u64 {
    len.div_ceil(PAGE) * PAGE
}
