//! A writable layer that many threads use at once.
//!
//! No file I/O happens under a lock that a look-up needs, so a reader never waits for a write or for a flush,
//! which can take any time on the disk. Flushes take turns. A caller that waited for another flush usually
//! finds its records written by it, and needs no flush of its own.

use std::sync::Arc;

use parking_lot::{Mutex, RwLock, RwLockReadGuard, RwLockWriteGuard};

use super::place::RunWrite;
use super::{Named, WritableError, WritableLayer, WrittenRun, seal, view};
use crate::DiskRange;
use formats::units::{Bytes, SECTOR, Sectors};

/// A writable layer for many threads; see the module.
pub struct SharedLayer {
    layer: RwLock<WritableLayer>,
    data: Arc<Named>,
    flushing: Mutex<()>,
}

impl SharedLayer {
    /// Shares `layer`.
    #[must_use]
    pub fn new(layer: WritableLayer) -> Self {
        let data = layer.data.clone();
        Self { layer: RwLock::new(layer), data, flushing: Mutex::default() }
    }

    fn read(&self) -> RwLockReadGuard<'_, WritableLayer> {
        self.layer.read()
    }

    fn change(&self) -> RwLockWriteGuard<'_, WritableLayer> {
        self.layer.write()
    }

    /// Writes whole sectors at byte `offset` of the disk, as [`WritableLayer::write`] does.
    ///
    /// # Errors
    /// [`WritableError`].
    pub fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), WritableError> {
        let place = self.change().take_place(DiskRange::new(offset, bytes.len() as u64))?;
        let written = place.write(bytes);
        self.settle(&place, written)
    }

    /// Makes whole sectors zero, as [`WritableLayer::discard`] does.
    ///
    /// # Errors
    /// [`WritableError`].
    pub fn discard(&self, range: DiskRange) -> Result<(), WritableError> {
        let place = self.change().take_zeros(range)?;
        let made = place.make_room();
        self.settle(&place, made)
    }

    fn settle(
        &self,
        place: &RunWrite,
        written: Result<(), WritableError>,
    ) -> Result<(), WritableError> {
        if let Err(error) = written {
            self.change().give_back(place);
            return Err(error);
        }
        let due = self.change().note_place(place);
        if due { self.flush() } else { Ok(()) }
    }

    /// Makes all writes durable that returned before the call, as [`WritableLayer::flush`] does.
    ///
    /// # Errors
    /// [`WritableError`].
    pub fn flush(&self) -> Result<(), WritableError> {
        let _one = self.flushing.lock();
        let Some(batch) = self.change().take_batch()? else { return Ok(()) };
        let written = batch.write();
        self.change().end_batch(batch, written)
    }

    /// The runs of `count` sectors from `lba` on, as in [`WritableLayer::look_up`].
    #[must_use]
    pub fn look_up(&self, lba: Sectors, count: Sectors) -> Vec<WrittenRun> {
        self.read().look_up(lba, count)
    }

    /// Reads payload from sector `at` of the data file on; can wait for the disk.
    ///
    /// # Errors
    /// [`WritableError::Io`].
    pub fn read_data(&self, at: Sectors, buf: &mut [u8]) -> Result<(), WritableError> {
        self.data.read(at, buf)
    }

    /// Reads payload if the page cache has all of it. Returns `false` if it has not, or if the filesystem
    /// cannot tell; `buf` is then unspecified.
    #[must_use]
    pub fn read_cached(&self, at: Sectors, buf: &mut [u8]) -> bool {
        self.data.read_cached(at, buf)
    }

    /// Turns the layer into one of the layers below: see `seal`. No write may happen during the call or after
    /// it.
    ///
    /// # Errors
    /// [`WritableError`]; the layer is then unchanged.
    pub fn seal(&self) -> Result<(), WritableError> {
        self.flush()?;
        let layer = self.read();
        let mappings = view::mappings(&layer.extents, layer.position);
        seal::seal(&self.data, &layer.header, layer.position * SECTOR, &mappings)
    }

    /// Removes the seal.
    ///
    /// # Errors
    /// [`WritableError::Io`].
    pub fn unseal(&self) -> Result<(), WritableError> {
        seal::unseal(&self.data, self.read().position * SECTOR)
    }

    /// Size of the disk by this layer, or 0.
    #[must_use]
    pub fn virtual_size(&self) -> Bytes {
        self.read().virtual_size()
    }

    /// True if the layer was never written to.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.read().is_empty()
    }
}
