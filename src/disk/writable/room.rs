//! Space for records, taken before they are needed.
//!
//! A write is acknowledged when its bytes are in the data file and its record is in memory. Were there no
//! space for the record at the next flush, the write would be lost although it was acknowledged. So the
//! space is allocated first, some thousand records at a time, without making the file longer: a reader
//! sees no difference. Where the filesystem cannot do that, nothing is promised.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::Errno;

use super::{ENTRY, Named, RECORD, WritableError};

/// Bytes allocated at a time: 4096 records.
const STEP: u64 = 4096 * ENTRY;

/// Room in the index file.
pub(super) struct Room {
    index: Arc<Named>,
    /// Byte of the file up to which there is room.
    until: AtomicU64,
    growing: Mutex<()>,
}

impl Room {
    /// No room yet.
    pub(super) fn new(index: Arc<Named>) -> Self {
        Self { index, until: AtomicU64::new(RECORD), growing: Mutex::default() }
    }

    /// Makes room up to byte `end` of the file.
    ///
    /// # Errors
    /// [`WritableError::Io`], when the filesystem is full.
    pub(super) fn make(&self, end: u64) -> Result<(), WritableError> {
        if end <= self.until.load(Ordering::Acquire) {
            return Ok(());
        }
        let _one = self.growing.lock().unwrap_or_else(PoisonError::into_inner);
        let from = self.until.load(Ordering::Acquire);
        if end <= from {
            return Ok(());
        }
        let to = end.next_multiple_of(STEP);
        let allocated = rustix::io::retry_on_intr(|| {
            fallocate(&self.index.file, FallocateFlags::KEEP_SIZE, from, to - from)
        });
        let until = match allocated {
            Ok(()) => to,
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => u64::MAX,
            Err(error) => return Err(self.index.error("make room in")(error.into())),
        };
        self.until.store(until, Ordering::Release);
        Ok(())
    }
}
