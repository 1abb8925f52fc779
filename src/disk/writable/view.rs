//! A read-only view of a writable layer: the topmost of a stack, for exporting or examining a disk.
//!
//! Nothing is locked, cut off or changed: upstream's daemon may have the files open and continue to write.
//! The view shows the present state of the index.

use super::log::Log;
use super::place::records;
use super::sparse::{self, is_sparse};
use super::{Extents, Named, WritableError, WritableFiles};
use formats::lsmt::LsmtLayer;
use formats::lsmt::layer::{FLAG_DATA, FLAG_SEALED, LsmtHeader, Uuid};
use formats::lsmt::mapping::Mapping;
use formats::units::SECTOR;
use source::Reserved;

/// The layer in `files`; its payload lies in the data file.
///
/// Its parent is omitted: upstream does not check the parent of a writable layer (spec runtime 2).
///
/// # Errors
/// [`WritableError`].
pub fn view(files: &WritableFiles) -> Result<LsmtLayer, WritableError> {
    let data = Named::open_to_read(&files.data)?;
    let header = data.header()?;
    let end = data.len()? / SECTOR;
    let (extents, end) = if is_sparse(&header) {
        super::seal::check_unsealed(&data)?;
        (sparse::written(&data, end)?, end)
    } else {
        super::check_appended(&data, &header)?;
        let memory = &mut Reserved::unbounded();
        let log = Log::read(&Named::open_to_read(&files.index)?, &data, memory)?;
        (log.extents, log.position)
    };
    let mappings = mappings(&extents, end);
    let trailer = LsmtHeader {
        flags: FLAG_DATA | FLAG_SEALED,
        index_offset: end * SECTOR,
        index_size: mappings.len() as u64,
        parent: Uuid::NULL,
        ..header
    };
    let name = files.data.display().to_string();
    LsmtLayer::of_mappings(name, trailer, mappings).map_err(WritableError::Commit)
}

/// The runs as entries of an index, in the order of the disk; `end` is the end of the payload.
pub(super) fn mappings(extents: &Extents, end: u64) -> Vec<Mapping> {
    let runs = extents.iter();
    runs.flat_map(|(lba, count, content)| records(lba, count, content, end)).collect()
}
