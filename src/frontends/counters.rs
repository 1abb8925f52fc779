//! Counters of a device's requests, the same for each front end.

use threads::Counter;

/// Counters of one device with the fields of [`FrontTotals`], written by the threads that serve it without ordering among each other. A front end
/// leaves those at 0 that it does not have.
#[derive(Debug, Default)]
pub(crate) struct FrontCounters {
    pub reads: Counter,
    pub bytes: Counter,
    pub direct: Counter,
    pub zero: Counter,
    pub gathered: Counter,
    pub pending: Counter,
    pub writes: Counter,
    pub written: Counter,
    pub zeroed: Counter,
    pub flushes: Counter,
    pub errors: Counter,
    pub refused: Counter,
    pub wakes: Counter,
    pub submissions: Counter,
    pub completions: Counter,
    pub lost_queues: Counter,
}

/// The counters of a device at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FrontTotals {
    /// READ requests answered in full.
    pub reads: u64,
    /// Bytes of those.
    pub bytes: u64,
    /// Reads committed directly from the address of their bytes.
    pub direct: u64,
    /// Reads committed from the zero area.
    pub zero: u64,
    /// Reads gathered in a scratch buffer first, the only case with a second copy.
    pub gathered: u64,
    /// Times a read had to wait for the volume.
    pub pending: u64,
    /// WRITE requests stored in full.
    pub writes: u64,
    /// Bytes of those.
    pub written: u64,
    /// DISCARD and WRITE_ZEROES requests done.
    pub zeroed: u64,
    /// FLUSH requests done, and writes that were made durable at once (FUA).
    pub flushes: u64,
    /// Requests that ended with an error of the volume.
    pub errors: u64,
    /// Writes, discards and unknown operations that were refused.
    pub refused: u64,
    /// Times a waiter had to wake a sleeping queue thread (one system call each).
    pub wakes: u64,
    /// Commands given to the ublk driver: one for each tag at the start, then one for each request.
    pub submissions: u64,
    /// Completions of those.
    pub completions: u64,
    /// Queue threads that ended although the device was not stopped.
    pub lost_queues: u64,
}

impl FrontCounters {
    /// The counters now.
    #[must_use]
    pub fn totals(&self) -> FrontTotals {
        let get = Counter::get;
        FrontTotals {
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
