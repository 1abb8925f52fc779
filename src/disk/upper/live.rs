//! Continuing on a new layer while the disk is in use: a snapshot (spec lsmt 10, upstream `LSMTFile::restack`).
//!
//! The layer that was written is sealed where it is, and from then on it is the uppermost of the layers that cannot
//! change; what is written goes to a new one. Readers notice nothing: they find the old layer below the new
//! one. Writers wait meanwhile, as long as it takes to make the old layer durable.
//!
//! Who asks for it notes the change somewhere, so that the disk is opened in the same way next time. That is
//! done between the seal and the first write to the new layer: if it cannot be done, the seal is taken off and all is
//! as before.

use std::path::Path;
use std::sync::{Arc, PoisonError, RwLock};

use thiserror::Error;

use super::UpperVolume;
use crate::volume::{Located, Volume, VolumeError, Waiter, WritableVolume};
use crate::writable::{WritableError, WritableFiles};

/// Why a disk cannot be continued on a new layer. It goes on with the one that it has.
#[derive(Debug, Error)]
pub enum LiveError {
    /// The new layer cannot be had, or the old one not be sealed.
    #[error(transparent)]
    Layer(#[from] WritableError),
    /// The new layer is not new.
    #[error("{path} cannot be the next writable layer: {rule}", path = path.display())]
    Next {
        /// Its data file.
        path: std::path::PathBuf,
        /// What should hold.
        rule: &'static str,
    },
    /// The change could not be noted.
    #[error("The new writable layer cannot be noted")]
    Note(#[source] std::io::Error),
}

/// A writable disk whose layer can be changed for another.
pub struct LiveVolume {
    size: u64,
    current: RwLock<Arc<UpperVolume>>,
    /// Shared by the changes under way, held alone while the layer changes.
    writing: RwLock<()>,
}

impl LiveVolume {
    /// Begins with `upper`.
    #[must_use]
    pub fn new(upper: UpperVolume) -> Self {
        let size = upper.size();
        Self { size, current: RwLock::new(Arc::new(upper)), writing: RwLock::default() }
    }

    fn current(&self) -> Arc<UpperVolume> {
        self.current.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Seals the layer and continues on the one in `files`, which exists and is empty. `note` is given the data
    /// file of the layer that was sealed.
    ///
    /// # Errors
    /// [`LiveError`].
    pub fn continue_on(
        &self,
        files: &WritableFiles,
        note: impl FnOnce(&Path) -> std::io::Result<()>,
    ) -> Result<(), LiveError> {
        let _alone = self.writing.write().unwrap_or_else(PoisonError::into_inner);
        let old = self.current();
        let refuse = |rule| LiveError::Next { path: files.data.clone(), rule };
        if is_same(&files.data, &old.files.data) || is_same(&files.index, &old.files.index) {
            return Err(refuse("it is the one that is in use"));
        }
        let next = UpperVolume::open_files(files.clone(), old.clone())?;
        if !next.layer.is_empty() {
            return Err(refuse("something was written to it already"));
        }
        if next.size() != self.size {
            return Err(refuse("its disk has another size"));
        }
        old.layer.seal()?;
        if let Err(error) = note(&old.files.data) {
            old.layer.unseal()?;
            return Err(LiveError::Note(error));
        }
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(next);
        Ok(())
    }

    fn change(
        &self,
        work: impl FnOnce(&UpperVolume) -> Result<(), VolumeError>,
    ) -> Result<(), VolumeError> {
        let _shared = self.writing.read().unwrap_or_else(PoisonError::into_inner);
        work(&self.current())
    }
}

/// Whether two paths lead to one file.
fn is_same(one: &Path, other: &Path) -> bool {
    let found = |path: &Path| std::fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    found(one) == found(other)
}

impl Volume for LiveVolume {
    fn size(&self) -> u64 {
        self.size
    }

    fn locate(
        &self,
        offset: u64,
        len: usize,
        waiter: &mut dyn FnMut() -> Waiter,
    ) -> Result<Located, VolumeError> {
        self.current().locate(offset, len, waiter)
    }

    fn writable(&self) -> Option<&dyn WritableVolume> {
        Some(self)
    }
}

impl WritableVolume for LiveVolume {
    fn write_at(&self, bytes: &[u8], offset: u64) -> Result<(), VolumeError> {
        self.change(|upper| upper.write_at(bytes, offset))
    }

    /// As the first layer does: a device cannot lose what its kernel was told.
    fn discards(&self) -> bool {
        self.current().discards()
    }

    fn discard(&self, offset: u64, len: u64) -> Result<(), VolumeError> {
        self.change(|upper| upper.discard(offset, len))
    }

    fn flush(&self) -> Result<(), VolumeError> {
        self.change(WritableVolume::flush)
    }
}
