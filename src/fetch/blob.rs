//! A blob, with everything that is known of where its bytes are.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use crate::chunk::ChunkSource;

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
    /// Bytes of the cache that its chunks take, kept beyond the blob's end.
    held: Arc<AtomicU64>,
    /// The chunk that was asked for last.
    last: AtomicU32,
}

impl Blob {
    pub(crate) fn new(number: u32, source: Arc<dyn ChunkSource>, held: Arc<AtomicU64>) -> Self {
        Self { number, source, held, last: AtomicU32::new(u32::MAX) }
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

    /// Whether a chunk can be had without a request to a server.
    #[must_use]
    pub fn is_near(&self, _chunk: u32) -> bool {
        self.source.blob().is_local()
    }

    /// Notes which chunk is asked for. Whether it is another one than before.
    pub(crate) fn moves_to(&self, chunk: u32) -> bool {
        // A read first: the cache line stays shared between cores as long as nothing moves.
        self.last.load(Ordering::Relaxed) != chunk
            && self.last.swap(chunk, Ordering::Relaxed) != chunk
    }
}
