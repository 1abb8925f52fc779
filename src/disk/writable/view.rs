//! A writable layer as one that is only read: the topmost of a stack, for who exports or examines a disk.
//!
//! Nothing is locked, cut off or changed: upstream's daemon may have the files open and go on writing. What is
//! seen is what the index says now.

use super::log::Log;
use super::place::records;
use super::sparse::{self, is_sparse};
use super::{Extents, Named, WritableError, WritableFiles};
use formats::lsmt::Layer;
use formats::lsmt::layer::{FLAG_DATA, FLAG_SEALED, Record, Uuid};
use formats::lsmt::mapping::Mapping;
use formats::units::SECTOR;

/// The layer in `files`, whose payload is found in the data file.
///
/// Its parent is left out: upstream does not check what a writable layer was made on (spec runtime 2).
///
/// # Errors
/// [`WritableError`].
pub fn view(files: &WritableFiles) -> Result<Layer, WritableError> {
    let data = Named::open_to_read(&files.data)?;
    let header = data.header()?;
    let end = data.len()? / SECTOR;
    let (extents, end) = if is_sparse(&header) {
        super::seal::check_unsealed(&data)?;
        (sparse::written(&data, end)?, end)
    } else {
        super::check_appended(&data, &header)?;
        let log = Log::read(&Named::open_to_read(&files.index)?, &data)?;
        (log.extents, log.position)
    };
    let mappings = mappings(&extents, end);
    let trailer = Record {
        flags: FLAG_DATA | FLAG_SEALED,
        index_offset: end * SECTOR,
        index_size: mappings.len() as u64,
        parent: Uuid::NULL,
        ..header
    };
    let name = files.data.display().to_string();
    Layer::of_mappings(name, trailer, mappings).map_err(WritableError::Commit)
}

/// The runs as entries of an index, in the order of the disk; `end` is the end of the payload.
pub(super) fn mappings(extents: &Extents, end: u64) -> Vec<Mapping> {
    let runs = extents.iter();
    runs.flat_map(|(lba, count, content)| records(lba, count, content, end)).collect()
}
