//! The second kind of writable layer: one sparse file in which sector `n` of the disk lies at byte `4096 +
//! 512 n` (spec lsmt 2 and 7, upstream `LSMTSparseFile`).
//!
//! There is no index. The filesystem's data ranges of the file are the sectors of the layer; a hole was never
//! written. This has two consequences, which upstream's implementation ignores.
//!
//! * The filesystem tracks whole blocks. A sector written alone makes its neighbours in the block zeros, at
//!   the latest when the layer is opened again. So a write must cover whole blocks ([`SparseLayer::block`]);
//!   a caller with less must fill in the present content.
//! * Zeros that hide data of the layers below cannot be a hole. So there is no discard: zeros are written.
//!
//! Data is overwritten in place: bytes that were read are valid only until the next write to the same
//! position.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use parking_lot::RwLock;
use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;

use super::{
    Extents, Named, RunContent, WritableError, WrittenRun, runs, seal, view, whole_sectors,
};
use crate::DiskRange;
use formats::lsmt::layer::{FLAG_DATA, FLAG_HEADER, LsmtHeader};
use formats::lsmt::{FIRST_SECTOR, RECORD};
use formats::units::{Bytes, SECTOR, Sectors};

/// Set in addition to the other flags in the header of a sparse layer (spec lsmt 2, bit 4).
const FLAG_SPARSE: u32 = 1 << 4;

/// Largest block size that is accepted from a filesystem: a smaller write grows to this size.
const MAX_BLOCK: u64 = 1 << 20;

/// True if a data file with this header is that of a writable sparse layer.
pub(super) fn is_sparse(header: &LsmtHeader) -> bool {
    header.flags == FLAG_HEADER | FLAG_DATA | FLAG_SPARSE
}

/// True if the data file at `path` is that of a sparse layer.
///
/// # Errors
/// [`WritableError`].
pub fn is_sparse_file(path: &Path) -> Result<bool, WritableError> {
    Named::open_to_read(path)?.header().map(|header| is_sparse(&header))
}

/// The data file of an empty sparse layer, equal to the start of one from upstream's `overlaybd-create -s`.
#[cfg(test)]
pub(crate) fn empty_file(virtual_size: Bytes) -> Vec<u8> {
    use formats::lsmt::Uuid;
    let record = LsmtHeader {
        flags: 0x13, // the spec's literal value, not this program's constants
        index_offset: 0,
        index_size: 0,
        virtual_size: virtual_size.get(),
        uuid: Uuid::NULL,
        parent: Uuid::NULL,
        user_tag: Vec::new(),
    };
    record.encode()
}

/// The written runs of a file of `end` sectors, by its filesystem.
pub(super) fn written(data: &Named, end: u64) -> Result<Extents, WritableError> {
    let mut extents = Extents::default();
    let mut at = RECORD;
    while let Some(from) = next(&data.file, SeekFrom::Data(at)).map_err(data.error("look at"))? {
        let to = next(&data.file, SeekFrom::Hole(from)).map_err(data.error("look at"))?;
        let Some(to) = to.filter(|to| *to > from) else { break };
        let (first, last) = (from / SECTOR, to.div_ceil(SECTOR).min(end));
        if first >= last {
            break;
        }
        extents.insert(first - FIRST_SECTOR.0, last - first, RunContent::At(first));
        at = to;
    }
    Ok(extents)
}

/// Position of the next data or hole; `None` behind the last.
fn next(file: &File, from: SeekFrom) -> io::Result<Option<u64>> {
    match seek(file, from) {
        Ok(at) => Ok(Some(at)),
        Err(Errno::NXIO) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// A sparse layer for many threads.
pub struct SparseLayer {
    data: Named,
    header: LsmtHeader,
    block: u64,
    written: RwLock<Extents>,
}

impl SparseLayer {
    /// Opens the data file at `path`. A layer without a disk size gets `below`, the size of the disk below,
    /// as in upstream's stacking.
    ///
    /// # Errors
    /// [`WritableError`].
    pub fn open(path: &Path, below: Bytes) -> Result<Self, WritableError> {
        let data = Named::open_to_write(path)?;
        data.lock()?;
        let mut header = data.header()?;
        if !is_sparse(&header) {
            return Err(data.invalid("its header is not that of a sparse layer"));
        }
        seal::check_unsealed(&data)?;
        if header.virtual_size == 0 {
            header.virtual_size = below.get();
            let written = data.file.write_all_at(&header.encode(), 0);
            written.map_err(data.error("write"))?;
        }
        let len = RECORD.saturating_add(header.virtual_size);
        if data.len()? != len {
            data.file.set_len(len).map_err(data.error("lengthen"))?;
        }
        let block = data.file.metadata().map_err(data.error("look at"))?.blksize();
        let block = block.clamp(RECORD, MAX_BLOCK);
        let written = written(&data, len / SECTOR)?;
        Ok(Self { data, header, block, written: RwLock::new(written) })
    }

    /// Size of the disk.
    #[must_use]
    pub fn virtual_size(&self) -> Bytes {
        Bytes(self.header.virtual_size)
    }

    /// True if the layer was never written to.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.written.read().is_empty()
    }

    /// Alignment of writes, in bytes of the disk. A write must begin and end at a multiple of it, unless the
    /// layer contains the surrounding sectors, or the disk ends there.
    #[must_use]
    pub fn block(&self) -> u64 {
        self.block
    }

    /// Writes whole sectors at byte `offset` of the disk. Durable after the next [`flush`](Self::flush).
    ///
    /// # Errors
    /// [`WritableError`]; the content of the range is then unspecified.
    pub fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), WritableError> {
        let (lba, count) =
            whole_sectors(self.header.virtual_size, DiskRange::new(offset, bytes.len() as u64))?;
        self.data.file.write_all_at(bytes, RECORD + offset).map_err(self.data.error("write"))?;
        let place = RunContent::At(FIRST_SECTOR.0 + lba.0);
        let mut written = self.written.write();
        written.insert(lba.0, count, place);
        Ok(())
    }

    /// Makes all writes up to now durable.
    ///
    /// # Errors
    /// [`WritableError::Io`].
    pub fn flush(&self) -> Result<(), WritableError> {
        self.data.file.sync_data().map_err(self.data.error("flush"))
    }

    /// The runs of `count` sectors from `lba` on, as in
    /// [`WritableLayer::look_up`](super::WritableLayer::look_up).
    #[must_use]
    pub fn look_up(&self, lba: Sectors, count: Sectors) -> Vec<WrittenRun> {
        runs(&self.written.read(), lba, count)
    }

    /// Reads payload from sector `at` of the data file on; can wait for the disk.
    ///
    /// # Errors
    /// [`WritableError::Io`].
    pub fn read_data(&self, at: Sectors, buf: &mut [u8]) -> Result<(), WritableError> {
        self.data.read(at, buf)
    }

    /// Reads payload if the page cache has all of it, as
    /// [`SharedLayer::read_cached`](super::SharedLayer::read_cached) does.
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
        let end = RECORD + self.header.virtual_size;
        let mappings = {
            let written = self.written.read();
            view::mappings(&written, end / SECTOR)
        };
        seal::seal(&self.data, &self.header, end, &mappings)
    }

    /// Removes the seal.
    ///
    /// # Errors
    /// [`WritableError::Io`].
    pub fn unseal(&self) -> Result<(), WritableError> {
        seal::unseal(&self.data, RECORD + self.header.virtual_size)
    }
}
