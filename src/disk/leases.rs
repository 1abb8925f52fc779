//! Chunks kept for a woken request until it is repeated.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use parking_lot::Mutex;

use crate::DiskRange;
use source::chunk::ChunkBytes;

/// A layer and a chunk of its file.
pub(super) type ChunkKey = (u8, u32);

/// Largest number of requests with kept chunks: more than a device has tags. Above it, the oldest request
/// loses its chunks and may have to wait once more.
const MAX_LEASES: usize = 4096;

/// The chunks of woken requests, by the range of the request.
#[derive(Default)]
pub(super) struct Leases {
    /// Number of leases, so that a disk without leases does not lock.
    count: AtomicUsize,
    table: Mutex<LeaseTable>,
}

#[derive(Default)]
struct LeaseTable {
    leases: HashMap<DiskRange, Lease>,
    /// Ranges in the order of their waking; some may be taken already.
    order: VecDeque<DiskRange>,
}

struct Lease {
    /// Number of woken requests for this range that were not repeated yet.
    takers: usize,
    chunks: Vec<(ChunkKey, Arc<ChunkBytes>)>,
}

impl Leases {
    /// Keeps `chunks` until the next request for `range`.
    pub(super) fn keep(&self, range: DiskRange, chunks: Vec<(ChunkKey, Arc<ChunkBytes>)>) {
        let mut table = self.table.lock();
        if let Some(lease) = table.leases.get_mut(&range) {
            lease.takers += 1;
            return;
        }
        while table.order.len() >= MAX_LEASES {
            let Some(oldest) = table.order.pop_front() else { break };
            table.leases.remove(&oldest);
        }
        table.leases.insert(range, Lease { takers: 1, chunks });
        table.order.push_back(range);
        self.count.store(table.leases.len(), Ordering::Release);
    }

    /// The chunks kept for `range`, if any.
    pub(super) fn take(&self, range: DiskRange) -> Vec<(ChunkKey, Arc<ChunkBytes>)> {
        if self.count.load(Ordering::Acquire) == 0 {
            return Vec::new();
        }
        let mut table = self.table.lock();
        let Some(lease) = table.leases.get_mut(&range) else { return Vec::new() };
        lease.takers -= 1;
        if lease.takers > 0 {
            return lease.chunks.clone();
        }
        let chunks = table.leases.remove(&range).map(|lease| lease.chunks).unwrap_or_default();
        // Requests are repeated nearly in order, so this examines few.
        if let Some(at) = table.order.iter().position(|kept| *kept == range) {
            table.order.remove(at);
        }
        self.count.store(table.leases.len(), Ordering::Release);
        chunks
    }
}
