//! Chunks to load later, when there is room.
//!
//! A trace may list more chunks than the cache should hold before any of them is read. The excess waits here,
//! in the trace's order, and is loaded as the earlier chunks are read. Chunks that are fetched together stay
//! together: if one of them is requested early, the others are loaded with it.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};

use parking_lot::Mutex;

use crate::fetch::Blob;

/// Bytes that must be read before as many more are loaded, 32 MiB: many chunks at once, so that neighbours
/// among them are fetched by one request.
const STEP: u64 = 32 << 20;

/// Chunks in the order in which they will be read.
#[derive(Default)]
pub(super) struct Backlog {
    /// True if the backlog is not empty: tested at every first read of a chunk that was loaded ahead.
    waiting: AtomicBool,
    state: Mutex<BacklogQueue>,
}

#[derive(Default)]
struct BacklogQueue {
    waiting: VecDeque<Together>,
    /// Bytes read since the last step.
    read: u64,
}

/// Chunks that are fetched together.
struct Together {
    blob: Weak<Blob>,
    chunks: Range<u32>,
    /// Bytes of them that will probably be read.
    read: u64,
}

impl Backlog {
    /// Adds chunks at the end, with the number of their bytes that will be read.
    pub(super) fn add(&self, blob: &Arc<Blob>, chunks: Range<u32>, read: u64) {
        let mut state = self.state.lock();
        state.waiting.push_back(Together { blob: Arc::downgrade(blob), chunks, read });
        self.waiting.store(true, Ordering::Relaxed);
    }

    /// Records the first read of a chunk of `bytes` that was loaded ahead, and returns the chunks to load
    /// now.
    pub(super) fn read(&self, bytes: u64) -> Vec<(Arc<Blob>, Range<u32>)> {
        if !self.waiting.load(Ordering::Relaxed) {
            return Vec::new();
        }
        let mut state = self.state.lock();
        state.read += bytes;
        let mut follow = Vec::new();
        if state.read < STEP {
            return follow;
        }
        while state.read > 0
            && let Some(Together { blob, chunks, read }) = state.waiting.pop_front()
        {
            // A device that is gone needs no more chunks.
            let Some(blob) = blob.upgrade() else { continue };
            state.read = state.read.saturating_sub(read);
            follow.push((blob, chunks));
        }
        self.settle(&mut state);
        follow
    }

    /// Takes out a chunk that is requested now, with the chunks that are fetched together with it.
    pub(super) fn taken(&self, blob: &Arc<Blob>, chunk: u32) -> Option<Range<u32>> {
        if !self.waiting.load(Ordering::Relaxed) {
            return None;
        }
        let mut state = self.state.lock();
        let at = state.waiting.iter().position(|together| {
            together.chunks.contains(&chunk) && together.blob.as_ptr() == Arc::as_ptr(blob)
        })?;
        let together = state.waiting.remove(at)?;
        self.settle(&mut state);
        Some(together.chunks)
    }

    fn settle(&self, state: &mut BacklogQueue) {
        if state.waiting.is_empty() {
            state.read = 0;
            self.waiting.store(false, Ordering::Relaxed);
        }
    }
}
