//! One request that waits for several chunks.

use std::sync::Arc;

use parking_lot::Mutex;

use super::leases::{ChunkKey, Leases};
use crate::DiskRange;
use crate::volume::{VolumeError, Waiter};
use blobs::cache::ChunkWaiter;
use source::chunk::ChunkBytes;

/// Counts the missing chunks, and calls the request's waiter once: after the last chunk, or at the first
/// error.
pub(super) struct Gather {
    state: Mutex<GatherState>,
    leases: Arc<Leases>,
    range: DiskRange,
}

struct GatherState {
    /// Number of missing chunks, plus one for the request itself until it has requested all of them;
    /// otherwise the first to arrive could be taken for the last.
    missing: usize,
    waiter: Option<Waiter>,
    chunks: Vec<(ChunkKey, Arc<ChunkBytes>)>,
}

impl Gather {
    pub(super) fn new(waiter: Waiter, leases: Arc<Leases>, range: DiskRange) -> Arc<Self> {
        let state = GatherState { missing: 1, waiter: Some(waiter), chunks: Vec::new() };
        Arc::new(Self { state: Mutex::new(state), leases, range })
    }

    /// Waits for one more chunk, needed at byte `offset` of the disk.
    pub(super) fn expect(self: &Arc<Self>, key: ChunkKey, offset: u64) -> ChunkWaiter {
        self.state.lock().missing += 1;
        let gather = self.clone();
        Box::new(move |result| match result {
            Ok(chunk) => gather.arrived(vec![(key, chunk)], Ok(())),
            Err(source) => {
                let layer = usize::from(key.0);
                gather.arrived(Vec::new(), Err(VolumeError::Chunk { offset, layer, source }));
            }
        })
    }

    /// All chunks are requested; `present` are those that were in the cache.
    pub(super) fn asked(
        &self,
        present: Vec<(ChunkKey, Arc<ChunkBytes>)>,
        result: Result<(), VolumeError>,
    ) {
        self.arrived(present, result);
    }

    fn arrived(
        &self,
        mut chunks: Vec<(ChunkKey, Arc<ChunkBytes>)>,
        result: Result<(), VolumeError>,
    ) {
        let mut state = self.state.lock();
        state.missing -= 1;
        state.chunks.append(&mut chunks);
        if result.is_ok() && state.missing > 0 {
            return;
        }
        let Some(waiter) = state.waiter.take() else { return };
        let chunks = std::mem::take(&mut state.chunks);
        drop(state);
        if result.is_ok() {
            self.leases.keep(self.range, chunks);
        }
        waiter(result);
    }
}
