//! What a killed process has left behind: folders that no record names, and records whose folder was lost.

use std::collections::HashSet;
use std::fs;

use super::error::{SnapshotError, step};
use super::folders::Folders;
use super::idmap;
use super::store::SnapshotStore;
use super::store::record::SnapshotKind;

/// Moves folders without a record to the trash, and makes missing folders of active snapshots and views again, empty. Nothing
/// else uses the root yet.
///
/// A folder can be missing after a loss of power: it was made, its name was not yet on disk, and the record was. Nothing
/// durable was in it. A committed snapshot whose folder is missing is reported, and its mounts fail with a text that says so.
///
/// # Errors
/// Returns [`SnapshotError::Folder`].
pub fn folders(store: &SnapshotStore, folders: &Folders) -> Result<(), SnapshotError> {
    let mut found = HashSet::new();
    let place = folders.snapshots();
    for entry in fs::read_dir(&place).map_err(step("read the folder", &place))? {
        let entry = entry.map_err(step("read the folder", &place))?;
        let name = entry.file_name();
        let id = name.to_str().and_then(|name| name.parse::<u64>().ok());
        match id.filter(|id| store.read().by_id(*id).is_some()) {
            Some(id) => _ = found.insert(id),
            None => {
                tracing::info!("{} belongs to no snapshot: it is removed", entry.path().display());
                if let Err(error) = idmap::remove_clones(&entry.path()) {
                    tracing::warn!("{}", source::failure::with_causes(&error));
                }
                folders.discard_path(&entry.path())?;
            }
        }
    }
    let missing: Vec<_> =
        store.read().all().filter(|record| !found.contains(&record.id)).cloned().collect();
    for record in missing {
        let place = folders.folder(record.id);
        match record.kind {
            SnapshotKind::Committed => tracing::error!(
                "{} is missing, with the files of the snapshot {:?}: remove its image and pull it again",
                place.display(),
                record.name
            ),
            SnapshotKind::Active | SnapshotKind::View => {
                tracing::warn!(
                    "{} of the snapshot {:?} was lost before it was on disk: it is made again, empty",
                    place.display(),
                    record.name
                );
                folders.create(record.id, record.kind == SnapshotKind::Active, None)?;
            }
        }
    }
    Ok(())
}
