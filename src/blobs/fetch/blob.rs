//! A blob, with the state of its fetches.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;

use super::ahead::{Ahead, ChunkTouch};
use super::depth::Depth;
use super::recent::Recent;
use crate::identity::{self, Verification, VerifiedBy};
use crate::tier::StoredBlob;
use source::chunk::ChunkSource;

/// A chunk, with a number for the identity of its blob. Chunks of one key have the same bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SharedChunk {
    /// Number of the blob's identity, valid while a [`Blob`] or a cached chunk has it.
    pub blob: u32,
    /// Number of the chunk, from 0.
    pub number: u32,
}

/// A chunk that is fetched one way. Images that share its bytes do not share the way: each reads with its own
/// credentials from its own registry, and the failure of one way is no failure of another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key {
    /// The chunk.
    pub chunk: SharedChunk,
    /// Number of the origin that it is fetched from.
    pub way: u32,
}

/// A blob opened in a cache, with the way to its bytes. Opening a blob of the same identity and origin again gives the
/// same value.
pub struct Blob {
    number: u32,
    /// Number of its origin.
    way: u32,
    source: Arc<dyn ChunkSource>,
    /// Its chunks in the disk tiers.
    stored: StoredBlob,
    /// Bytes of the cache that its chunks take, kept beyond the blob's end.
    held: Arc<AtomicU64>,
    /// The chunk of the last request.
    last: AtomicU32,
    /// True if a trace lists the chunks that will be read.
    foreseen: AtomicBool,
    /// Touches and guesses.
    ahead: Mutex<Ahead>,
    /// Measurements of the line to its host.
    depth: Mutex<Depth>,
    /// Its last failures.
    failures: Recent,
}

impl Blob {
    pub(crate) fn new(
        number: u32,
        way: u32,
        source: Arc<dyn ChunkSource>,
        stored: StoredBlob,
        held: Arc<AtomicU64>,
    ) -> Self {
        Self {
            number,
            way,
            source,
            stored,
            held,
            last: AtomicU32::new(u32::MAX),
            foreseen: AtomicBool::new(false),
            ahead: Mutex::default(),
            depth: Mutex::default(),
            failures: Recent::default(),
        }
    }

    /// The source of its chunks.
    #[must_use]
    pub fn source(&self) -> &Arc<dyn ChunkSource> {
        &self.source
    }

    /// The key of a chunk that is fetched this blob's way.
    #[must_use]
    pub fn key(&self, chunk: u32) -> Key {
        Key { chunk: self.shared(chunk), way: self.way }
    }

    /// The key of a chunk, whatever its way.
    #[must_use]
    pub fn shared(&self, chunk: u32) -> SharedChunk {
        SharedChunk { blob: self.number, number: chunk }
    }

    /// Number of the origin that its bytes are fetched from: the same for all blobs of one repository that are reached
    /// in the same way.
    #[must_use]
    pub fn way(&self) -> u32 {
        self.way
    }

    /// Bytes of the cache's budget that its chunks take now.
    #[must_use]
    pub fn held(&self) -> u64 {
        self.held.load(Ordering::Relaxed)
    }

    pub(crate) fn held_counter(&self) -> &Arc<AtomicU64> {
        &self.held
    }

    /// Its last failures.
    #[must_use]
    pub fn failures(&self) -> &Recent {
        &self.failures
    }

    /// True if a chunk can be read without a request to a server.
    #[must_use]
    pub fn is_near(&self, chunk: u32) -> bool {
        self.source.blob().is_local() || self.stored.has(chunk)
    }

    /// True if all its chunks are in the disk tier as those of a whole blob whose digest was compared.
    #[must_use]
    pub fn is_whole(&self) -> bool {
        let (whole, chunks) = (self.stored.whole.as_ref(), self.source.chunk_count() as usize);
        chunks > 0 && whole.is_some_and(|stored| stored.count() == chunks)
    }

    /// What verifies its chunks now.
    #[must_use]
    pub fn verification(&self) -> Verification {
        match identity::claimed(self.source.id()) {
            Some(digest) if self.is_whole() => {
                Verification { verified_by: VerifiedBy::Blob, shared_by: digest.to_string() }
            }
            _ => Verification::of(&*self.source),
        }
    }

    /// Its chunks in the disk tiers.
    #[must_use]
    pub fn stored(&self) -> &StoredBlob {
        &self.stored
    }

    /// Encoded bytes that the line to its host brings in two round trips, and one round trip; `None` before it is measured.
    pub(super) fn line(&self) -> Option<(u64, Duration)> {
        let depth = self.depth.lock();
        Some((depth.worth_a_request(), depth.round_trip()?))
    }

    /// Encoded bytes that arrive sooner within a pending request than by a request of their own.
    pub(super) fn worth_a_request(&self) -> u64 {
        self.depth.lock().worth_a_request()
    }

    /// Declares that the chunks to be read are known and requested already: no guess is made while reads stay
    /// among them.
    pub fn foresee(&self) {
        self.foreseen.store(true, Ordering::Relaxed);
    }

    pub(crate) fn is_foreseen(&self) -> bool {
        self.foreseen.load(Ordering::Relaxed)
    }

    /// Records a touch of a chunk; `missed` tells if it has to be fetched for it. Returns the chunks that are
    /// probably next, unless they are all requested already; `room` is the number of bytes that the cache can
    /// spare for them.
    pub(crate) fn touched(&self, chunk: u32, missed: bool, room: u64) -> Range<u32> {
        // A read comes first: the cache line stays shared between cores while the chunk is the same.
        if self.last.load(Ordering::Relaxed) == chunk
            || self.last.swap(chunk, Ordering::Relaxed) == chunk
        {
            return 0..0;
        }
        let decoded = self.source.room(chunk).max(1) as u64;
        let (most, worth) = if self.source.blob().is_local() {
            (AHEAD_LOCALLY, 0)
        } else {
            let encoded = self.source.encoded(chunk).map_or(1, |place| place.len().max(1)) as u64;
            let depth = self.depth.lock();
            ((depth.bytes() / encoded).max(1), depth.worth_a_request() / encoded)
        };
        let fit = |chunks: u64| u32::try_from(chunks.min(room / decoded)).unwrap_or(u32::MAX);
        let count = self.source.chunk_count();
        let touch = ChunkTouch { chunk, missed, most: fit(most), worth: fit(worth), count };
        self.ahead.lock().touched(touch)
    }

    /// Records the end of a request for this blob.
    pub(super) fn measured(&self, bytes: u64, wait: Duration, whole: Duration, beside: usize) {
        self.depth.lock().measured(bytes, wait, whole, beside);
    }
}

/// Chunks read ahead in a local file: there is no delay to hide, but a second core to use.
const AHEAD_LOCALLY: u64 = 4;
