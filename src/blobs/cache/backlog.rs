//! What will be wanted, for when there is room.
//!
//! A trace may list more than the cache should give to what nobody has asked for yet. What is too much waits
//! here, in the trace's order, and follows as what came before is read. Chunks that are fetched together
//! stay together: if one of them is asked for early, the others come with it.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use crate::fetch::Blob;

/// Bytes that are read before as much follows, 32 MiB: many chunks at once, so that neighbours among them come
/// by one request.
const STEP: u64 = 32 << 20;

/// Chunks in the order in which they will be read.
#[derive(Default)]
pub(super) struct Backlog {
    /// Whether there is anything: looked at by every first read of a chunk that was fetched ahead.
    waiting: AtomicBool,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    waiting: VecDeque<Together>,
    /// Bytes that were read since the last step.
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
    /// Adds chunks at the end, of which so many bytes will be read.
    pub(super) fn add(&self, blob: &Arc<Blob>, chunks: Range<u32>, read: u64) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.waiting.push_back(Together { blob: Arc::downgrade(blob), chunks, read });
        self.waiting.store(true, Ordering::Relaxed);
    }

    /// A chunk that was fetched ahead and takes `bytes` is read for the first time: what may follow now.
    pub(super) fn read(&self, bytes: u64) -> Vec<(Arc<Blob>, Range<u32>)> {
        if !self.waiting.load(Ordering::Relaxed) {
            return Vec::new();
        }
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.read += bytes;
        let mut follow = Vec::new();
        if state.read < STEP {
            return follow;
        }
        while state.read > 0
            && let Some(Together { blob, chunks, read }) = state.waiting.pop_front()
        {
            // A device that is gone wants nothing any more.
            let Some(blob) = blob.upgrade() else { continue };
            state.read = state.read.saturating_sub(read);
            follow.push((blob, chunks));
        }
        self.settle(&mut state);
        follow
    }

    /// A chunk that nobody has asked for yet is asked for: what comes with it, itself included.
    pub(super) fn taken(&self, blob: &Arc<Blob>, chunk: u32) -> Option<Range<u32>> {
        if !self.waiting.load(Ordering::Relaxed) {
            return None;
        }
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let at = state.waiting.iter().position(|together| {
            together.chunks.contains(&chunk) && together.blob.as_ptr() == Arc::as_ptr(blob)
        })?;
        let together = state.waiting.remove(at)?;
        self.settle(&mut state);
        Some(together.chunks)
    }

    fn settle(&self, state: &mut State) {
        if state.waiting.is_empty() {
            state.read = 0;
            self.waiting.store(false, Ordering::Relaxed);
        }
    }
}
