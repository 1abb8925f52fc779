//! A writable layer of either kind.

use crate::writable::{SharedLayer, SparseLayer, WritableError, WritableFiles, WritableLayer};
use crate::writable::{WrittenRun, sparse};
use formats::lsmt::Uuid;
use formats::lsmt::writer::LayerIdentity;
use formats::units::{Bytes, Sectors};
use source::MemoryBudget;

/// A writable layer of either kind; see the module.
pub(super) enum UpperLayer {
    /// Payload in the order of the writes, never overwritten, with an index.
    Appended(SharedLayer),
    /// Payload at its position on the disk.
    Sparse(SparseLayer),
}

impl UpperLayer {
    /// Opens the layer in `files`; `below` is the size of the disk in bytes if the layer has none. Its index takes memory of
    /// `budget`.
    pub(super) fn open(
        files: &WritableFiles,
        below: Bytes,
        budget: &MemoryBudget,
    ) -> Result<Self, WritableError> {
        if sparse::is_sparse_file(&files.data)? {
            return SparseLayer::open(&files.data, below).map(Self::Sparse);
        }
        Self::appended(WritableLayer::open_within(files, budget.part())?, files)
    }

    /// Makes a new layer of the append-only kind.
    pub(super) fn create(
        files: &WritableFiles,
        size: Bytes,
        budget: &MemoryBudget,
    ) -> Result<Self, WritableError> {
        let identity = LayerIdentity { uuid: random_uuid(), ..LayerIdentity::default() };
        let layer = WritableLayer::create(files, size, identity)?.within(budget.part());
        Self::appended(layer, files)
    }

    fn appended(layer: WritableLayer, files: &WritableFiles) -> Result<Self, WritableError> {
        if layer.cut() > 0 {
            tracing::warn!(
                "{}: {} bytes at the end were never flushed and are left out",
                files.index.display(),
                layer.cut()
            );
        }
        Ok(Self::Appended(SharedLayer::new(layer)))
    }

    /// Size of its disk, or 0.
    pub(super) fn virtual_size(&self) -> Bytes {
        match self {
            Self::Appended(layer) => layer.virtual_size(),
            Self::Sparse(layer) => layer.virtual_size(),
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        match self {
            Self::Appended(layer) => layer.is_empty(),
            Self::Sparse(layer) => layer.is_empty(),
        }
    }

    pub(super) fn look_up(&self, lba: Sectors, count: Sectors) -> Vec<WrittenRun> {
        match self {
            Self::Appended(layer) => layer.look_up(lba, count),
            Self::Sparse(layer) => layer.look_up(lba, count),
        }
    }

    /// Reads payload from sector `at` of the data file on; can wait for the disk.
    pub(super) fn read_data(&self, at: Sectors, buf: &mut [u8]) -> Result<(), WritableError> {
        match self {
            Self::Appended(layer) => layer.read_data(at, buf),
            Self::Sparse(layer) => layer.read_data(at, buf),
        }
    }

    /// Reads payload if the page cache has all of it.
    pub(super) fn read_cached(&self, at: Sectors, buf: &mut [u8]) -> bool {
        match self {
            Self::Appended(layer) => layer.read_cached(at, buf),
            Self::Sparse(layer) => layer.read_cached(at, buf),
        }
    }

    pub(super) fn flush(&self) -> Result<(), WritableError> {
        match self {
            Self::Appended(layer) => layer.flush(),
            Self::Sparse(layer) => layer.flush(),
        }
    }

    /// Turns the layer into one of the layers below.
    pub(super) fn seal(&self) -> Result<(), WritableError> {
        match self {
            Self::Appended(layer) => layer.seal(),
            Self::Sparse(layer) => layer.seal(),
        }
    }

    /// Removes the seal.
    pub(super) fn unseal(&self) -> Result<(), WritableError> {
        match self {
            Self::Appended(layer) => layer.unseal(),
            Self::Sparse(layer) => layer.unseal(),
        }
    }
}

/// A UUID of version 4, like those of upstream's new layers.
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
