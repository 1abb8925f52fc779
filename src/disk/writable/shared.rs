//! A writable layer that many threads use at once.
//!
//! No file I/O is done under a lock that a look-up needs, so a reader never waits for a write or for a
//! flush, which may take as long as the disk wants. Flushes take turns: whoever has waited for one
//! finds its records gone with it, most often, and need not do its own.

use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use super::place::Place;
use super::{Named, WritableError, WritableLayer, WrittenRun, seal, view};
use formats::units::{Bytes, SECTOR, Sectors};

/// See the module.
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
        self.layer.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self) -> RwLockWriteGuard<'_, WritableLayer> {
        self.layer.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// As [`WritableLayer::write`].
    ///
    /// # Errors
    /// [`WritableError`].
    pub fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), WritableError> {
        let place = self.change().take_place(offset, bytes.len() as u64)?;
        let written = place.write(bytes);
        self.settle(&place, written)
    }

    /// As [`WritableLayer::discard`].
    ///
    /// # Errors
    /// [`WritableError`].
    pub fn discard(&self, offset: u64, len: u64) -> Result<(), WritableError> {
        let place = self.change().take_zeros(offset, len)?;
        let made = place.make_room();
        self.settle(&place, made)
    }

    fn settle(
        &self,
        place: &Place,
        written: Result<(), WritableError>,
    ) -> Result<(), WritableError> {
        if let Err(error) = written {
            self.change().give_back(place);
            return Err(error);
        }
        let due = self.change().note_place(place);
        if due { self.flush() } else { Ok(()) }
    }

    /// Makes everything durable whose write had returned before the call. As [`WritableLayer::flush`].
    ///
    /// # Errors
    /// [`WritableError`].
    pub fn flush(&self) -> Result<(), WritableError> {
        let _one = self.flushing.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(batch) = self.change().take_batch()? else { return Ok(()) };
        let written = batch.write();
        self.change().end_batch(batch, written)
    }

    /// As [`WritableLayer::look_up`].
    #[must_use]
    pub fn look_up(&self, lba: Sectors, count: Sectors) -> Vec<WrittenRun> {
        self.read().look_up(lba, count)
    }

    /// As [`WritableLayer::read_data`]; may wait for the disk.
    ///
    /// # Errors
    /// [`WritableError::Io`].
    pub fn read_data(&self, at: Sectors, buf: &mut [u8]) -> Result<(), WritableError> {
        self.data.read(at, buf)
    }

    /// The same, if the page cache has all of it. `false`: it has not, or the filesystem cannot tell; `buf`
    /// is then unspecified.
    #[must_use]
    pub fn read_cached(&self, at: Sectors, buf: &mut [u8]) -> bool {
        self.data.read_cached(at, buf)
    }

    /// Makes the layer one of the layers below: see `seal`. Nobody writes meanwhile, nor afterwards.
    ///
    /// # Errors
    /// [`WritableError`]; the layer is then as it was.
    pub fn seal(&self) -> Result<(), WritableError> {
        self.flush()?;
        let layer = self.read();
        let mappings = view::mappings(&layer.extents, layer.position);
        seal::seal(&self.data, &layer.header, layer.position * SECTOR, &mappings)
    }

    /// Takes the seal off again.
    ///
    /// # Errors
    /// [`WritableError::Io`].
    pub fn unseal(&self) -> Result<(), WritableError> {
        seal::unseal(&self.data, self.read().position * SECTOR)
    }

    /// As [`WritableLayer::virtual_size`].
    #[must_use]
    pub fn virtual_size(&self) -> Bytes {
        self.read().virtual_size()
    }

    /// As [`WritableLayer::is_empty`].
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.read().is_empty()
    }
}
