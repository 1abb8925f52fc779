//! Counters of a device's queues.

use std::sync::atomic::{AtomicU64, Ordering};

/// Counters of one device, written by its queue threads without ordering among each other.
#[derive(Debug, Default)]
pub struct QueueCounters {
    /// READ requests answered in full.
    pub reads: AtomicU64,
    /// Bytes of those.
    pub bytes: AtomicU64,
    /// Reads committed directly from the address of their bytes.
    pub direct: AtomicU64,
    /// Reads committed from the zero area.
    pub zero: AtomicU64,
    /// Reads gathered in a scratch buffer first, the only case with a second copy.
    pub gathered: AtomicU64,
    /// Times a read had to wait for the volume.
    pub pending: AtomicU64,
    /// WRITE requests stored in full.
    pub writes: AtomicU64,
    /// Bytes of those.
    pub written: AtomicU64,
    /// DISCARD and WRITE_ZEROES requests done.
    pub zeroed: AtomicU64,
    /// FLUSH requests done, and writes that were made durable at once (FUA).
    pub flushes: AtomicU64,
    /// Requests that ended with an error of the volume.
    pub errors: AtomicU64,
    /// Writes, discards and unknown operations that were refused.
    pub refused: AtomicU64,
    /// Times a waiter had to wake a sleeping queue thread (one system call each).
    pub wakes: AtomicU64,
    /// Commands given to the ublk driver: one for each tag at the start, then one for each request.
    pub submissions: AtomicU64,
    /// Completions of those.
    pub completions: AtomicU64,
    /// Queue threads that ended although the device was not stopped.
    pub lost_queues: AtomicU64,
}

/// A copy of [`QueueCounters`] at one moment, with the same fields.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[allow(missing_docs)] // each has the name and the meaning of the counter
pub struct QueueTotals {
    pub reads: u64,
    pub bytes: u64,
    pub direct: u64,
    pub zero: u64,
    pub gathered: u64,
    pub pending: u64,
    #[serde(default)]
    pub writes: u64,
    #[serde(default)]
    pub written: u64,
    #[serde(default)]
    pub zeroed: u64,
    #[serde(default)]
    pub flushes: u64,
    pub errors: u64,
    pub refused: u64,
    pub wakes: u64,
    pub submissions: u64,
    pub completions: u64,
    pub lost_queues: u64,
}

impl QueueCounters {
    /// The counters now.
    #[must_use]
    pub fn totals(&self) -> QueueTotals {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        QueueTotals {
            reads: get(&self.reads),
            bytes: get(&self.bytes),
            direct: get(&self.direct),
            zero: get(&self.zero),
            gathered: get(&self.gathered),
            pending: get(&self.pending),
            writes: get(&self.writes),
            written: get(&self.written),
            zeroed: get(&self.zeroed),
            flushes: get(&self.flushes),
            errors: get(&self.errors),
            refused: get(&self.refused),
            wakes: get(&self.wakes),
            submissions: get(&self.submissions),
            completions: get(&self.completions),
            lost_queues: get(&self.lost_queues),
        }
    }
}

/// Adds `n` to a counter.
pub(super) fn count(counter: &AtomicU64, n: u64) {
    counter.fetch_add(n, Ordering::Relaxed);
}
