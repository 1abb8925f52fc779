//! A change in progress: the place of its bytes, before the layer knows of it.

use std::os::unix::fs::FileExt;
use std::sync::Arc;

use super::room::IndexRoom;
use super::{MAX_LEN, Mapping, Named, RunContent, WritableError};
use formats::units::{SECTOR, Sectors};

/// A run of disk sectors and its new content.
pub(super) struct RunWrite {
    pub(super) data: Arc<Named>,
    pub(super) room: Arc<IndexRoom>,
    /// Byte of the index file up to which room is needed.
    pub(super) index_end: u64,
    /// First disk sector.
    pub(super) lba: u64,
    /// Number of sectors.
    pub(super) count: u64,
    /// Number of records for the run.
    pub(super) needs: u64,
    pub(super) content: RunContent,
}

impl RunWrite {
    /// Writes the bytes to their place, and makes room for the records. No read uses that place before the
    /// change is noted.
    pub(super) fn write(&self, bytes: &[u8]) -> Result<(), WritableError> {
        if let RunContent::At(at) = self.content {
            self.data.file.write_all_at(bytes, at * SECTOR).map_err(self.data.error("write"))?;
        }
        self.make_room()
    }

    /// Makes room for the records.
    pub(super) fn make_room(&self) -> Result<(), WritableError> {
        self.room.make(self.index_end)
    }

    /// The records.
    pub(super) fn records(&self, position: u64) -> impl Iterator<Item = Mapping> + use<> {
        records(self.lba, self.count, self.content, position)
    }
}

/// The records of a run, each as long as possible. Records of zeros point to `position`, the end of the
/// payload: once the layer is sealed, upstream refuses zeros that point outside the payload.
pub(super) fn records(
    lba: u64,
    count: u64,
    content: RunContent,
    position: u64,
) -> impl Iterator<Item = Mapping> {
    (0..count).step_by(MAX_LEN as usize).map(move |done| {
        let (zeroed, moffset) = match content {
            RunContent::Zero => (true, position),
            RunContent::At(at) => (false, at + done),
        };
        let len = (count - done).min(MAX_LEN) as u16;
        Mapping { lba: Sectors(lba + done), len, zeroed, tag: 0, moffset: Sectors(moffset) }
    })
}
