//! A writable disk: a writable layer over a read-only disk.
//!
//! Written data is read from the layer's data file: at once if the page cache has it, or else by a thread
//! that can wait for the disk (`cold`). The rest comes from the disk below, as without the layer. A read
//! needs the layer's lock only to find the positions of its bytes, and no thread holds that lock during file
//! I/O ([`SharedLayer`](crate::writable::SharedLayer)).
//!
//! The layer has one of two kinds (`layer`). A sparse one takes whole blocks: for a block that the layer does
//! not have yet, the part outside the write is read from below and written with it. Such a write runs alone,
//! so that two writes to one block do not undo each other.
//!
//! During its use, such a disk can be continued on a new layer ([`live`]).

mod cold;
mod layer;
pub mod live;

use std::path::Path;
use std::sync::Arc;

use parking_lot::RwLock;

use self::cold::{ColdReads, DataPart};
use self::layer::UpperLayer;
use crate::DiskRange;
use crate::volume::{Located, Piece, Volume, VolumeError, Waiter, WritableVolume};
use crate::writable::{SparseLayer, WritableError, WritableFiles};
use crate::writable::{WrittenPlace, WrittenRun};
use formats::units::{Bytes, SECTOR, Sectors};
pub use live::{LiveError, LiveVolume};
use source::MemoryBudget;

/// A writable disk.
pub struct UpperVolume {
    lower: Arc<dyn Volume>,
    size: u64,
    // Declared before the layer, because its threads read from it.
    cold: ColdReads,
    layer: Arc<UpperLayer>,
    files: WritableFiles,
    budget: MemoryBudget,
    /// Held exclusively by a write that also writes bytes that it has read.
    completing: RwLock<()>,
}

impl UpperVolume {
    /// Opens the layer in the folder `dir` over `lower`; makes it if there is none. The index of what is written takes memory
    /// of `budget`: a write for which there is none fails as on a full disk.
    ///
    /// # Errors
    /// [`WritableError`], also if the layer belongs to a disk of another size.
    pub fn open(
        dir: &Path,
        lower: Arc<dyn Volume>,
        budget: MemoryBudget,
    ) -> Result<Self, WritableError> {
        let (files, size) = (WritableFiles::in_dir(dir), Bytes(lower.size()));
        let layer = if files.data.exists() {
            UpperLayer::open(&files, size, &budget)?
        } else {
            UpperLayer::create(&files, size, &budget)?
        };
        let own = layer.virtual_size();
        if own != Bytes::ZERO && own != size {
            let rule = "its disk has another size than the image's: it belongs to another image";
            return Err(WritableError::Invalid { path: files.data, rule });
        }
        Self::over(lower, layer, files, budget)
    }

    /// Opens the layer in `files`, which must exist, over `lower`, with memory as in [`open`](Self::open). The disk has the size in the layer, if it
    /// has one: a layer may enlarge the disk, with zeros, or make it smaller.
    ///
    /// # Errors
    /// [`WritableError`].
    pub fn open_files(
        files: WritableFiles,
        lower: Arc<dyn Volume>,
        budget: MemoryBudget,
    ) -> Result<Self, WritableError> {
        let layer = UpperLayer::open(&files, Bytes(lower.size()), &budget)?;
        Self::over(lower, layer, files, budget)
    }

    fn over(
        lower: Arc<dyn Volume>,
        layer: UpperLayer,
        files: WritableFiles,
        budget: MemoryBudget,
    ) -> Result<Self, WritableError> {
        let size = match layer.virtual_size() {
            Bytes::ZERO => lower.size(),
            Bytes(size) => size / SECTOR * SECTOR,
        };
        let layer = Arc::new(layer);
        let cold = ColdReads::start(&layer).map_err(|source| WritableError::Io {
            what: "start a thread for",
            path: files.data.clone(),
            source,
        })?;
        Ok(Self { lower, size, cold, layer, files, budget, completing: RwLock::default() })
    }

    /// Position of bytes of the disk below, which may be shorter.
    fn locate_below(
        &self,
        range: DiskRange,
        waiter: &mut dyn FnMut() -> Waiter,
    ) -> Result<Located, VolumeError> {
        let there = range.end().min(self.lower.size()).saturating_sub(range.offset);
        let mut located = match there {
            0 => Located::Ready(Vec::new()),
            there => self.lower.locate(DiskRange::new(range.offset, there), waiter)?,
        };
        let behind = (range.len - there) as usize;
        if let Located::Ready(pieces) = &mut located
            && behind > 0
        {
            pieces.push(Piece::Zero(behind));
        }
        Ok(located)
    }

    /// Writes whole blocks to a sparse layer.
    fn write_blocks(
        &self,
        layer: &SparseLayer,
        bytes: &[u8],
        offset: u64,
    ) -> Result<(), VolumeError> {
        let end = offset.saturating_add(bytes.len() as u64);
        let (first, last) =
            (offset - offset % layer.block(), end.next_multiple_of(layer.block()).min(self.size));
        let has = |from: u64, to: u64| {
            let runs = layer.look_up(Sectors(from / SECTOR), Sectors((to - from) / SECTOR));
            runs.iter().all(|run| run.place != WrittenPlace::Below)
        };
        let whole = end > self.size || (has(first, offset) && has(end, last));
        if whole {
            let _shared = self.completing.read();
            layer.write(offset, bytes).map_err(failed(offset))?;
        } else {
            let _alone = self.completing.write();
            let mut blocks = vec![0; (last - first) as usize];
            let (head, tail) = ((offset - first) as usize, (end - first) as usize);
            self.read_at(&mut blocks[..head], first)?;
            self.read_at(&mut blocks[tail..], end)?;
            blocks[head..tail].copy_from_slice(bytes);
            layer.write(first, &blocks).map_err(failed(first))?;
        }
        self.cold.overwritten(first..last);
        Ok(())
    }
}

fn failed(offset: u64) -> impl FnOnce(WritableError) -> VolumeError {
    move |source| VolumeError::Upper { offset, source: Arc::new(source) }
}

impl Volume for UpperVolume {
    fn size(&self) -> u64 {
        self.size
    }

    fn locate(
        &self,
        range: DiskRange,
        waiter: &mut dyn FnMut() -> Waiter,
    ) -> Result<Located, VolumeError> {
        range.check(self.size())?;
        let (first, count) = range.sectors();
        let runs = self.layer.look_up(first, count);
        let bytes = |run: &WrittenRun| range.part_in(run.lba, run.len);
        // The parts below come first: the request may have to wait for them, and is then repeated as a whole.
        let mut below = Vec::new();
        let mut parts = Vec::new();
        for run in &runs {
            match run.place {
                WrittenPlace::Zero => {}
                WrittenPlace::Data(at) => parts.push(DataPart { at, len: run.len }),
                WrittenPlace::Below => match self.locate_below(bytes(run), waiter)? {
                    Located::Ready(pieces) => below.push(pieces),
                    Located::Pending => return Ok(Located::Pending),
                },
            }
        }
        let Some(read) = self.cold.read(&parts, range.offset, waiter) else {
            return Ok(Located::Pending);
        };
        let (mut below, mut read) = (below.into_iter(), read.into_iter());
        let mut pieces = Vec::new();
        for run in &runs {
            let part = bytes(run);
            let len = part.buffer_len();
            match run.place {
                WrittenPlace::Zero => pieces.push(Piece::Zero(len)),
                WrittenPlace::Below => pieces.extend(below.next().into_iter().flatten()),
                WrittenPlace::Data(_) => {
                    let from = (part.offset - run.lba.bytes().0) as usize;
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
        match &*self.layer {
            UpperLayer::Appended(layer) => layer.write(offset, bytes).map_err(failed(offset)),
            UpperLayer::Sparse(layer) => self.write_blocks(layer, bytes, offset),
        }
    }

    fn discards(&self) -> bool {
        matches!(*self.layer, UpperLayer::Appended(_))
    }

    fn discard(&self, range: DiskRange) -> Result<(), VolumeError> {
        match &*self.layer {
            UpperLayer::Appended(layer) => layer.discard(range).map_err(failed(range.offset)),
            UpperLayer::Sparse(_) => Err(VolumeError::NoDiscards { offset: range.offset }),
        }
    }

    fn flush(&self) -> Result<(), VolumeError> {
        self.layer.flush().map_err(failed(0))
    }
}

impl Drop for UpperVolume {
    /// A device that is removed in order loses no data.
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
    use crate::testing::{FaultyVolume, MemoryVolume};

    const SIZE: usize = 1 << 20;

    fn unbounded() -> MemoryBudget {
        MemoryBudget::default()
    }

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
        let volume = UpperVolume::open(dir.path(), slow(), unbounded()).unwrap();
        volume.write_at(&[0xee; 1024], 4096).unwrap();
        volume.discard(DiskRange::new(8192, 512)).unwrap();
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
        // Dropped in order, so no data is lost although there was no flush.
        drop(volume);
        check(&UpperVolume::open(dir.path(), slow(), unbounded()).unwrap());
    }

    #[test]
    fn a_layer_of_another_disk_and_writes_past_the_end_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let volume =
            UpperVolume::open(dir.path(), Arc::new(MemoryVolume::new(below())), unbounded())
                .unwrap();
        let past = volume.write_at(&[0; 1024], SIZE as u64 - 512);
        assert!(matches!(past, Err(VolumeError::Upper { .. })));
        drop(volume);
        let other = Arc::new(MemoryVolume::new(vec![0; 4096]));
        let error = UpperVolume::open(dir.path(), other, unbounded()).err().unwrap().to_string();
        assert!(error.contains("another size"), "{error}");
    }

    #[test]
    fn small_writes_to_a_sparse_layer_hide_nothing_of_what_is_around_them() {
        use crate::writable::sparse;
        let dir = tempfile::tempdir().unwrap();
        let files = WritableFiles::in_dir(dir.path());
        let empty = sparse::empty_file(Bytes(2 * SIZE as u64));
        std::fs::write(&files.data, empty).unwrap();
        let lower = || Arc::new(MemoryVolume::new(below()));
        let volume = UpperVolume::open_files(files.clone(), lower(), unbounded()).unwrap();
        // Larger than the disk below: the rest is zeros.
        let mut expected = [below(), vec![0; SIZE]].concat();
        assert_eq!(volume.size(), expected.len() as u64);
        let places =
            [(512, 512), (4096 * 5 - 1024, 2048), (SIZE - 512, 1024), (2 * SIZE - 512, 512)];
        for (at, len) in places {
            volume.write_at(&vec![0xee; len], at as u64).unwrap();
            expected[at..at + len].fill(0xee);
        }
        assert!(matches!(
            volume.discard(DiskRange::new(0, 512)),
            Err(VolumeError::NoDiscards { .. })
        ));
        let check = |volume: &UpperVolume| {
            let mut found = vec![0x55; expected.len()];
            volume.read_at(&mut found, 0).unwrap();
            assert!(found == expected);
        };
        check(&volume);
        drop(volume);
        check(&UpperVolume::open_files(files, lower(), unbounded()).unwrap());
    }
}
