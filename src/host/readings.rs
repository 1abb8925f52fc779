//! Figures of a device, of its image and of the audit log: plain data, counted by [`daemon`](crate::daemon), named by
//! [`metrics`](crate::metrics).

use std::time::Duration;

use blobs::histogram::Times;
use frontends::FrontTotals;
use threads::Counter;

/// Counters of a device at one moment.
#[derive(Clone, Copy, Debug)]
pub struct DeviceReading {
    /// Size of the disk in bytes.
    pub size: u64,
    /// Counters of its front end.
    pub front: FrontTotals,
    /// Its reads that waited, and those that wait.
    pub waits: WaitReading,
    /// Counters of its image's blobs.
    pub image: IoCounters,
}

/// State of a device's waits at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WaitReading {
    /// Number of reads that wait now.
    pub waiting: u64,
    /// Age of the oldest of them.
    pub oldest: Option<Duration>,
    /// Durations of the waits that have ended.
    pub times: Times,
    /// Reads that were ended by their deadline.
    pub expired: u64,
    /// Reads that failed and were repeated.
    pub repeated: u64,
}

/// Counters of an image's blobs since it was attached. Blobs that images share count for each of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct IoCounters {
    /// Bytes fetched from a registry.
    pub fetched: u64,
    /// Requests made for them.
    pub requests: u64,
    /// Requests among those that repeat a failed one.
    pub retries: u64,
    /// Bytes of the memory cache that the blobs take now.
    pub cached: u64,
    /// Reads of a blob that failed for good.
    pub errors: u64,
}

/// Counters of the audit log.
#[derive(Debug, Default)]
pub struct AuditCounters {
    /// Lines written.
    pub lines: Counter,
    /// Lines dropped: the queue was full, or the file could not be written.
    pub dropped: Counter,
}

/// Counts of comparisons of meta images with their layers.
#[derive(Debug, Default)]
pub struct ComparisonCounters {
    /// Meta images that show what their layers contain.
    pub equal: Counter,
    /// Meta images that do not.
    pub different: Counter,
    /// Meta images that could not be compared.
    pub failed: Counter,
}
