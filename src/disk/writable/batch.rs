//! A flush in progress: records on their way from memory to the index file.

use std::os::unix::fs::FileExt;
use std::sync::Arc;

use super::{ENTRY, Mapping, Named, RECORD, WritableError};

/// Records in the order in which they were noted.
pub(super) struct MappingBatch {
    pub(super) data: Arc<Named>,
    pub(super) index: Arc<Named>,
    /// Number of the first record in the index file.
    pub(super) first: u64,
    pub(super) records: Vec<Mapping>,
}

/// Error of writing a batch.
pub(super) enum BatchFailure {
    /// The batch can be written again, to the same position.
    Passing(WritableError),
    /// The kernel could not make bytes durable. It reports this once, and does not know later which bytes
    /// they were.
    Lasting(WritableError),
}

impl BatchFailure {
    pub(super) fn is_lasting(&self) -> bool {
        matches!(self, Self::Lasting(_))
    }
}

impl From<BatchFailure> for WritableError {
    fn from(failure: BatchFailure) -> Self {
        let (BatchFailure::Passing(error) | BatchFailure::Lasting(error)) = failure;
        error
    }
}

impl MappingBatch {
    /// Makes the data durable, then the records, so that a record on disk never points at bytes that are not
    /// there.
    pub(super) fn write(&self) -> Result<(), BatchFailure> {
        let durable = |named: &Named| {
            named.file.sync_data().map_err(named.error("flush")).map_err(BatchFailure::Lasting)
        };
        durable(&self.data)?;
        let bytes: Vec<u8> = self.records.iter().flat_map(Mapping::encode).collect();
        let at = RECORD + self.first * ENTRY;
        let written = self.index.file.write_all_at(&bytes, at);
        written.map_err(self.index.error("write")).map_err(BatchFailure::Passing)?;
        durable(&self.index)
    }
}
