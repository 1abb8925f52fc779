//! The writable layer: two files of this host.
//!
//! A reader of the disk gets it as the topmost layer of the stack and does not change it. A server of the
//! disk opens it itself, above the others.

use std::path::Path;
use std::sync::Arc;

use super::lowers::identity;
use super::{UpperConfig, WritableFiles};
use crate::writable::WritableError;
use crate::writable::view;
use crate::{DiskError, DiskLayer, LayerData};
use formats::lsmt::LsmtLayer;
use source::chunk::PlainChunks;
use source::{FileSource, MemorySource};

/// The files of the writable layer; `None` if the configuration does not name both, which upstream treats as
/// none.
///
/// # Errors
/// The broken rule.
pub(super) fn files(
    upper: &UpperConfig,
    folder: &Path,
) -> Result<Option<WritableFiles>, &'static str> {
    if !upper.target.is_empty() {
        return Err("a TurboOCI layer under construction is not a disk: commit it first");
    }
    match (upper.data.as_str(), upper.index.as_str()) {
        ("", "") => Ok(None),
        ("", _) | (_, "") => {
            tracing::warn!(
                "Only one of upper.data and upper.index is given: the disk is read-only"
            );
            Ok(None)
        }
        (data, index) => {
            Ok(Some(WritableFiles { data: folder.join(data), index: folder.join(index) }))
        }
    }
}

fn opened(files: &WritableFiles) -> Result<LsmtLayer, DiskError> {
    view(files).map_err(|source: WritableError| DiskError::Upper(Arc::new(source)))
}

/// Opens the layer as one of those that are read.
pub(super) fn as_layer(files: &WritableFiles) -> Result<DiskLayer, DiskError> {
    let index = opened(files)?;
    let source = Arc::new(FileSource::open(&files.data)?);
    let id = format!("upper:{}", identity(&files.data)?);
    let data = LayerData::Native { chunks: Arc::new(PlainChunks::new(id, source)) };
    Ok(DiskLayer { index, data })
}

/// A disk of zeros with the size of the layer, as the disk below a layer without lower layers.
pub(super) fn below_nothing(files: &WritableFiles) -> Result<DiskLayer, DiskError> {
    let index = opened(files)?.emptied();
    let nothing = Arc::new(MemorySource::new("nothing", Vec::new()));
    let chunks = Arc::new(PlainChunks::new("nothing".to_owned(), nothing));
    Ok(DiskLayer { index, data: LayerData::Native { chunks } })
}
