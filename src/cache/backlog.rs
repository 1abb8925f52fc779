//! What will be wanted, for when there is room.
//!
//! A trace may list more than the cache should give to what nobody has asked for yet. What is too much waits
//! here, in the trace's order, and follows as what came before is read.

use std::collections::VecDeque;
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
    chunks: VecDeque<(Weak<Blob>, u32)>,
    /// Bytes that were read since the last step.
    read: u64,
}

impl Backlog {
    /// Adds a chunk at the end.
    pub(super) fn add(&self, blob: &Arc<Blob>, chunk: u32) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.chunks.push_back((Arc::downgrade(blob), chunk));
        self.waiting.store(true, Ordering::Relaxed);
    }

    /// A chunk that was fetched ahead and takes `bytes` is read for the first time: what may follow now.
    pub(super) fn read(&self, bytes: u64) -> Vec<(Arc<Blob>, u32)> {
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
            && let Some((blob, chunk)) = state.chunks.pop_front()
        {
            // A device that is gone wants nothing any more.
            let Some(blob) = blob.upgrade() else { continue };
            state.read = state.read.saturating_sub(blob.source().room(chunk) as u64);
            follow.push((blob, chunk));
        }
        if state.chunks.is_empty() {
            state.read = 0;
            self.waiting.store(false, Ordering::Relaxed);
        }
        follow
    }
}
