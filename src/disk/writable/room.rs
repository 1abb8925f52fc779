//! Space for records, allocated before they are written.
//!
//! A write is acknowledged once its bytes are in the data file and its record is in memory. Without space for
//! the record at the next flush, an acknowledged write would be lost. So the space is allocated first, some
//! thousand records at a time, without making the file longer: a reader sees no difference. If the filesystem
//! does not support this, there is no such guarantee.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;
use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::Errno;

use super::{ENTRY, Named, RECORD, WritableError};

/// Bytes allocated at a time: 4096 records.
const STEP: u64 = 4096 * ENTRY;

/// Room in the index file.
pub(super) struct IndexRoom {
    index: Arc<Named>,
    /// Byte of the file up to which space is allocated.
    until: AtomicU64,
    growing: Mutex<()>,
}

impl IndexRoom {
    /// Starts without allocated space.
    pub(super) fn new(index: Arc<Named>) -> Self {
        Self { index, until: AtomicU64::new(RECORD), growing: Mutex::default() }
    }

    /// Makes room up to byte `end` of the file.
    ///
    /// # Errors
    /// [`WritableError::Io`] if the filesystem is full.
    pub(super) fn make(&self, end: u64) -> Result<(), WritableError> {
        if end <= self.until.load(Ordering::Acquire) {
            return Ok(());
        }
        let _one = self.growing.lock();
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
