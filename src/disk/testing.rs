//! Doubles for tests of front ends: the feature `testing`.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;

use crate::DiskRange;
use crate::volume::{Located, Piece, Volume, VolumeError, Waiter};

/// A volume in memory.
pub struct MemoryVolume {
    bytes: Arc<Vec<u8>>,
}

impl MemoryVolume {
    /// A disk with these bytes; the length must be a multiple of 512.
    #[must_use]
    pub fn new(bytes: Vec<u8>) -> Self {
        Self { bytes: Arc::new(bytes) }
    }
}

impl Volume for MemoryVolume {
    fn size(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn locate(
        &self,
        range: DiskRange,
        _: &mut dyn FnMut() -> Waiter,
    ) -> Result<Located, VolumeError> {
        range.check(self.size())?;
        let guard = self.bytes.clone();
        Ok(Located::Ready(vec![Piece::Memory {
            guard,
            range: range.offset as usize..range.end() as usize,
        }]))
    }
}

/// A volume with a late first answer for each range, and failures at given offsets.
pub struct FaultyVolume<V> {
    inner: V,
    delay: Duration,
    fail_at: Option<u64>,
    asked: Mutex<HashSet<u64>>,
}

impl<V: Volume> FaultyVolume<V> {
    /// `inner`, with a delay of `delay` in every first read of an offset, and a failure of reads over
    /// `fail_at`.
    pub fn new(inner: V, delay: Duration, fail_at: Option<u64>) -> Self {
        Self { inner, delay, fail_at, asked: Mutex::default() }
    }
}

impl<V: Volume> Volume for FaultyVolume<V> {
    fn size(&self) -> u64 {
        self.inner.size()
    }

    fn locate(
        &self,
        range: DiskRange,
        waiter: &mut dyn FnMut() -> Waiter,
    ) -> Result<Located, VolumeError> {
        let fails = self.fail_at.filter(|&at| range.contains(at));
        let first = self.asked.lock().insert(range.offset);
        if first || fails.is_some() {
            let (waiter, delay) = (waiter(), self.delay);
            std::thread::spawn(move || {
                std::thread::sleep(delay);
                waiter(match fails {
                    Some(offset) => Err(VolumeError::Injected { offset }),
                    None => Ok(()),
                });
            });
            return Ok(Located::Pending);
        }
        self.inner.locate(range, waiter)
    }
}
