//! Continues a disk on a new layer during its use: a snapshot (spec lsmt 10, upstream `LSMTFile::restack`).
//!
//! The written layer is sealed in place and becomes the uppermost of the read-only layers; later writes go to
//! a new layer. Readers notice no change: they find the old layer below the new one. Writers wait until the
//! old layer is durable.
//!
//! The caller records the change, so that the disk is opened in the same way next time. It does so between
//! the seal and the first write to the new layer: if recording fails, the seal is removed and the disk stays
//! as before.

use std::path::Path;
use std::sync::Arc;

use parking_lot::RwLock;
use thiserror::Error;

use super::UpperVolume;
use crate::DiskRange;
use crate::volume::{Located, Volume, VolumeError, Waiter, WritableVolume};
use crate::writable::{WritableError, WritableFiles};

/// Reasons why a disk cannot be continued on a new layer. It continues with its present one.
#[derive(Debug, Error)]
pub enum LiveError {
    /// The new layer cannot be opened, or the old one cannot be sealed.
    #[error(transparent)]
    Layer(#[from] WritableError),
    /// The new layer is not usable as one.
    #[error("{path} cannot be the next writable layer: {rule}", path = path.display())]
    Next {
        /// Its data file.
        path: std::path::PathBuf,
        /// The broken rule.
        rule: &'static str,
    },
    /// The change could not be recorded.
    #[error("The new writable layer cannot be recorded")]
    Note(#[source] std::io::Error),
}

/// A writable disk with an exchangeable layer.
pub struct LiveVolume {
    size: u64,
    current: RwLock<Arc<UpperVolume>>,
    /// Held shared by writes in progress, exclusively during a change of the layer.
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
        self.current.read().clone()
    }

    /// Seals the layer and continues on the one in `files`, which must exist and be empty. `note` gets the
    /// data file of the sealed layer.
    ///
    /// # Errors
    /// [`LiveError`].
    pub fn continue_on(
        &self,
        files: &WritableFiles,
        note: impl FnOnce(&Path) -> std::io::Result<()>,
    ) -> Result<(), LiveError> {
        let _alone = self.writing.write();
        let old = self.current();
        let refuse = |rule| LiveError::Next { path: files.data.clone(), rule };
        if is_same(&files.data, &old.files.data) || is_same(&files.index, &old.files.index) {
            return Err(refuse("it is the layer in use"));
        }
        let next = UpperVolume::open_files(files.clone(), old.clone(), old.budget.clone())?;
        if !next.layer.is_empty() {
            return Err(refuse("it was written to already"));
        }
        if next.size() != self.size {
            return Err(refuse("its disk has another size"));
        }
        old.layer.seal()?;
        if let Err(error) = note(&old.files.data) {
            old.layer.unseal()?;
            return Err(LiveError::Note(error));
        }
        *self.current.write() = Arc::new(next);
        Ok(())
    }

    fn change(
        &self,
        work: impl FnOnce(&UpperVolume) -> Result<(), VolumeError>,
    ) -> Result<(), VolumeError> {
        let _shared = self.writing.read();
        work(&self.current())
    }
}

/// True if two paths lead to one file.
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
        range: DiskRange,
        waiter: &mut dyn FnMut() -> Waiter,
    ) -> Result<Located, VolumeError> {
        self.current().locate(range, waiter)
    }

    fn writable(&self) -> Option<&dyn WritableVolume> {
        Some(self)
    }
}

impl WritableVolume for LiveVolume {
    fn write_at(&self, bytes: &[u8], offset: u64) -> Result<(), VolumeError> {
        self.change(|upper| upper.write_at(bytes, offset))
    }

    /// Equal to that of the first layer: a device cannot withdraw a property that its kernel has seen.
    fn discards(&self) -> bool {
        self.current().discards()
    }

    fn discard(&self, range: DiskRange) -> Result<(), VolumeError> {
        self.change(|upper| upper.discard(range))
    }

    fn flush(&self) -> Result<(), VolumeError> {
        self.change(WritableVolume::flush)
    }
}
