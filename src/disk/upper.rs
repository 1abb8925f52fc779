//! A disk that can be written: a writable layer over one that cannot.
//!
//! What was written is read from the layer's data file: at once if the page cache has it, else by a thread
//! that may wait for the disk (`cold`). The rest comes from the disk below, as it would without the layer.
//! Payload is never overwritten in place, so a read needs the layer's lock only to find where its bytes are, and
//! nobody holds that lock over file I/O ([`SharedLayer`]).

mod cold;

use std::path::Path;
use std::sync::Arc;

use self::cold::{ColdReads, Part};
use crate::lsmt::writable::{DATA_NAME, WrittenPlace, WrittenRun};
use crate::lsmt::writer::Identity;
use crate::lsmt::{SharedLayer, Uuid, WritableError, WritableLayer};
use crate::units::{Bytes, SECTOR, Sectors};
use crate::volume::{Located, Piece, Volume, VolumeError, Waiter, WritableVolume};

/// A writable disk.
pub struct UpperVolume {
    lower: Arc<dyn Volume>,
    // Before the layer: its threads read from it.
    cold: ColdReads,
    layer: Arc<SharedLayer>,
}

impl UpperVolume {
    /// The layer in the folder `dir`, made if there is none, over `lower`.
    ///
    /// # Errors
    /// [`WritableError`], also when the layer is of a disk of another size.
    pub fn open(dir: &Path, lower: Arc<dyn Volume>) -> Result<Self, WritableError> {
        let size = lower.size();
        let layer = if dir.join(DATA_NAME).exists() {
            WritableLayer::open(dir)?
        } else {
            let identity = Identity { uuid: random_uuid(), ..Identity::default() };
            WritableLayer::create(dir, Bytes(size), identity)?
        };
        let own = layer.virtual_size();
        if own != Bytes::ZERO && own != Bytes(size) {
            let rule = "its disk has another size than the image's: it belongs to another image";
            return Err(WritableError::Invalid { path: dir.join(DATA_NAME), rule });
        }
        if layer.cut() > 0 {
            tracing::warn!(
                "{}: {} bytes at the end of the index were never flushed and are left out",
                dir.display(),
                layer.cut()
            );
        }
        let layer = Arc::new(SharedLayer::new(layer));
        let cold = ColdReads::start(&layer).map_err(|source| WritableError::Io {
            what: "start a thread for",
            path: dir.join(DATA_NAME),
            source,
        })?;
        Ok(Self { lower, cold, layer })
    }
}

fn failed(offset: u64) -> impl FnOnce(WritableError) -> VolumeError {
    move |source| VolumeError::Upper { offset, source: Arc::new(source) }
}

/// Version 4, as upstream gives a new layer.
fn random_uuid() -> Uuid {
    use std::hash::{BuildHasher as _, RandomState};
    let halves = [RandomState::new().hash_one(0), RandomState::new().hash_one(1)];
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&halves[0].to_le_bytes());
    bytes[8..].copy_from_slice(&halves[1].to_le_bytes());
    bytes[6] = bytes[6] & 0x0f | 0x40;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    Uuid(bytes)
}

impl Volume for UpperVolume {
    fn size(&self) -> u64 {
        self.lower.size()
    }

    fn locate(
        &self,
        offset: u64,
        len: usize,
        waiter: &mut dyn FnMut() -> Waiter,
    ) -> Result<Located, VolumeError> {
        let end = offset.saturating_add(len as u64);
        if end > self.size() {
            return Err(VolumeError::PastEnd { offset, end, size: self.size() });
        }
        let first = offset / SECTOR;
        let count = end.div_ceil(SECTOR) - first;
        let runs = self.layer.look_up(Sectors(first), Sectors(count));
        // The request may begin and end within a sector.
        let bytes = |run: &WrittenRun| {
            let start = (run.lba.0 * SECTOR).max(offset);
            start..((run.lba.0 + run.len.0) * SECTOR).min(end)
        };
        // What is below first: it may have to be waited for, and the whole request is then asked for again.
        let mut below = Vec::new();
        let mut parts = Vec::new();
        for run in &runs {
            match run.place {
                WrittenPlace::Zero => {}
                WrittenPlace::Data(at) => parts.push(Part { at, len: run.len }),
                WrittenPlace::Below => {
                    let range = bytes(run);
                    let len = (range.end - range.start) as usize;
                    match self.lower.locate(range.start, len, waiter)? {
                        Located::Ready(pieces) => below.push(pieces),
                        Located::Pending => return Ok(Located::Pending),
                    }
                }
            }
        }
        let Some(read) = self.cold.read(&parts, offset, waiter) else {
            return Ok(Located::Pending);
        };
        let (mut below, mut read) = (below.into_iter(), read.into_iter());
        let mut pieces = Vec::new();
        for run in &runs {
            let range = bytes(run);
            let len = (range.end - range.start) as usize;
            match run.place {
                WrittenPlace::Zero => pieces.push(Piece::Zero(len)),
                WrittenPlace::Below => pieces.extend(below.next().into_iter().flatten()),
                WrittenPlace::Data(_) => {
                    let from = (range.start - run.lba.0 * SECTOR) as usize;
                    let sectors = read.next();
                    pieces.extend(
                        sectors.map(|guard| Piece::Memory { guard, range: from..from + len }),
                    );
                }
            }
        }
        Ok(Located::Ready(pieces))
    }

    fn writable(&self) -> Option<&dyn WritableVolume> {
        Some(self)
    }
}

impl WritableVolume for UpperVolume {
    fn write_at(&self, bytes: &[u8], offset: u64) -> Result<(), VolumeError> {
        self.layer.write(offset, bytes).map_err(failed(offset))
    }

    fn discard(&self, offset: u64, len: u64) -> Result<(), VolumeError> {
        self.layer.discard(offset, len).map_err(failed(offset))
    }

    fn flush(&self) -> Result<(), VolumeError> {
        self.layer.flush().map_err(failed(0))
    }
}

impl Drop for UpperVolume {
    /// A device that was removed in order loses nothing.
    fn drop(&mut self) {
        if let Err(error) = self.flush() {
            tracing::error!(
                error = &error as &dyn std::error::Error,
                "The last writes to a device could not be made durable"
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::volume::{FaultyVolume, MemoryVolume};

    const SIZE: usize = 1 << 20;

    fn below() -> Vec<u8> {
        (0..SIZE).map(|at| (at / 512) as u8 | 1).collect()
    }

    #[test]
    fn reads_see_writes_over_a_slow_disk_and_a_later_opening_sees_them_too() {
        let dir = tempfile::tempdir().unwrap();
        let slow = || -> Arc<dyn Volume> {
            let memory = MemoryVolume::new(below());
            Arc::new(FaultyVolume::new(memory, Duration::from_millis(2), None))
        };
        let mut expected = below();
        let volume = UpperVolume::open(dir.path(), slow()).unwrap();
        volume.write_at(&[0xee; 1024], 4096).unwrap();
        volume.discard(8192, 512).unwrap();
        volume.write_at(&[0xdd; 512], 4608).unwrap();
        expected[4096..5120].fill(0xee);
        expected[8192..8704].fill(0);
        expected[4608..5120].fill(0xdd);
        let check = |volume: &UpperVolume| {
            for (from, to) in [(0, SIZE), (4095, 4097), (4500, 5000), (5119, 8193), (8703, 8705)] {
                let mut found = vec![0x55; to - from];
                volume.read_at(&mut found, from as u64).unwrap();
                assert!(found == expected[from..to], "{from}..{to}");
            }
        };
        check(&volume);
        // Dropped in order, so nothing is lost although nobody flushed.
        drop(volume);
        check(&UpperVolume::open(dir.path(), slow()).unwrap());
    }

    #[test]
    fn a_layer_of_another_disk_and_writes_past_the_end_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let volume = UpperVolume::open(dir.path(), Arc::new(MemoryVolume::new(below()))).unwrap();
        let past = volume.write_at(&[0; 1024], SIZE as u64 - 512);
        assert!(matches!(past, Err(VolumeError::Upper { .. })));
        drop(volume);
        let other = Arc::new(MemoryVolume::new(vec![0; 4096]));
        let error = UpperVolume::open(dir.path(), other).err().unwrap().to_string();
        assert!(error.contains("another size"), "{error}");
    }
}
