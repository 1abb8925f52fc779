//! A blob, with everything that is known of where its bytes are.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::ahead::{Ahead, Touch};
use super::depth::Depth;
use super::recent::Recent;
use crate::tier::StoredBlob;
use source::chunk::ChunkSource;

/// A chunk of a blob, where the blob has a number for its identity.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key {
    /// The blob's number, good as long as a [`Blob`] or a cached chunk has it.
    pub blob: u32,
    /// The chunk, from 0.
    pub chunk: u32,
}

/// A blob opened in a cache. Whoever opens a blob of the same identity gets the same one.
pub struct Blob {
    number: u32,
    source: Arc<dyn ChunkSource>,
    /// What the disk tiers have of it.
    stored: StoredBlob,
    /// Bytes of the cache that its chunks take, kept beyond the blob's end.
    held: Arc<AtomicU64>,
    /// The chunk that was asked for last.
    last: AtomicU32,
    /// Whether a trace says what will be read.
    foreseen: AtomicBool,
    /// What was touched of it.
    ahead: Mutex<Ahead>,
    /// What the line to it is like.
    depth: Mutex<Depth>,
    /// What went wrong with it last.
    failures: Recent,
}

impl Blob {
    pub(crate) fn new(
        number: u32,
        source: Arc<dyn ChunkSource>,
        stored: StoredBlob,
        held: Arc<AtomicU64>,
    ) -> Self {
        Self {
            number,
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

    /// What its chunks are made of.
    #[must_use]
    pub fn source(&self) -> &Arc<dyn ChunkSource> {
        &self.source
    }

    /// Its chunk's key.
    #[must_use]
    pub fn key(&self, chunk: u32) -> Key {
        Key { blob: self.number, chunk }
    }

    /// Bytes of the cache's budget that its chunks take now.
    #[must_use]
    pub fn held(&self) -> u64 {
        self.held.load(Ordering::Relaxed)
    }

    pub(crate) fn held_counter(&self) -> &Arc<AtomicU64> {
        &self.held
    }

    /// What went wrong with it last.
    #[must_use]
    pub fn failures(&self) -> &Recent {
        &self.failures
    }

    /// Whether a chunk can be had without a request to a server.
    #[must_use]
    pub fn is_near(&self, chunk: u32) -> bool {
        self.source.blob().is_local() || self.stored.has(chunk)
    }

    /// What the disk tiers have of it.
    #[must_use]
    pub fn stored(&self) -> &StoredBlob {
        &self.stored
    }

    /// Encoded bytes to keep on their way to it.
    pub(super) fn depth(&self) -> u64 {
        lock(&self.depth).bytes()
    }

    /// Encoded bytes that come sooner with what is asked for than by a request of their own.
    pub(super) fn worth_a_request(&self) -> u64 {
        lock(&self.depth).worth_a_request()
    }

    /// What will be read of it is known, and asked for already: nothing needs to be guessed, as long as what is
    /// read is among it.
    pub fn foresee(&self) {
        self.foreseen.store(true, Ordering::Relaxed);
    }

    pub(crate) fn is_foreseen(&self) -> bool {
        self.foreseen.load(Ordering::Relaxed)
    }

    /// Notes which chunk is asked for, and whether it has to be fetched for that. Says which others will
    /// probably be next, if they are not all asked for already; `room` is what the cache can spare for
    /// them in bytes.
    pub(crate) fn touched(&self, chunk: u32, missed: bool, room: u64) -> Range<u32> {
        // A read first: the cache line stays shared between cores as long as nothing moves.
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
            let depth = lock(&self.depth);
            ((depth.bytes() / encoded).max(1), depth.worth_a_request() / encoded)
        };
        let fit = |chunks: u64| u32::try_from(chunks.min(room / decoded)).unwrap_or(u32::MAX);
        let count = self.source.chunk_count();
        let touch = Touch { chunk, missed, most: fit(most), worth: fit(worth), count };
        lock(&self.ahead).touched(touch)
    }

    /// A request for this blob has ended.
    pub(super) fn measured(&self, bytes: u64, wait: Duration, whole: Duration, beside: usize) {
        lock(&self.depth).measured(bytes, wait, whole, beside);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Chunks ahead in a local file: there is no delay to hide, but a second core to use.
const AHEAD_LOCALLY: u64 = 4;
