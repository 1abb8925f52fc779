//! What a call may change. Order and kinds of refusals are those of containerd's reference, `core/snapshots/storage/bolt.go`
//! and `plugins/snapshots/overlay/overlay.go` (v2.4.2).

use std::collections::BTreeMap;
use std::sync::Arc;

use serde_json::Map;

use super::Change;
use super::record::{Moment, Record, SnapshotKind};
use crate::snapshotter::error::SnapshotError;
use crate::snapshotter::layer::LayerContent;

/// Longest key or name, in bytes: that of a key in containerd's bolt database.
pub const LONGEST_NAME: usize = 32_768;

/// Longest label, key and value together, in bytes (containerd's `pkg/labels/validate.go`).
pub const LONGEST_LABEL: usize = 4096;

/// A record that does not exist yet.
#[derive(Clone, Debug)]
pub struct NewRecord<'a> {
    /// Its number, from [`SnapshotStore::new_id`](super::SnapshotStore::new_id).
    pub id: u64,
    /// Name of the snapshotter.
    pub snapshotter: &'a str,
    /// Key or name.
    pub name: &'a str,
    /// Name of its parent.
    pub parent: Option<&'a str>,
    /// What it is.
    pub kind: SnapshotKind,
    /// Labels; those with an empty value are left out.
    pub labels: &'a BTreeMap<String, String>,
    /// What it holds.
    pub content: LayerContent,
}

/// Adds a record of any kind. `created` and `updated` are one instant.
///
/// # Errors
/// [`SnapshotError::ParentNotFound`], [`SnapshotError::ParentNotCommitted`], [`SnapshotError::Exists`],
/// [`SnapshotError::Invalid`].
pub fn create(change: &mut Change<'_>, new: NewRecord<'_>) -> Result<Arc<Record>, SnapshotError> {
    check_name(new.name)?;
    check_labels(new.labels)?;
    if let Some(parent) = new.parent {
        let parent = change
            .get(new.snapshotter, parent)
            .ok_or_else(|| SnapshotError::ParentNotFound(parent.to_owned()))?;
        if parent.kind != SnapshotKind::Committed {
            return Err(SnapshotError::ParentNotCommitted(parent.name.clone()));
        }
    }
    if change.get(new.snapshotter, new.name).is_some() {
        return Err(SnapshotError::Exists(new.name.to_owned()));
    }
    let now = Moment::now();
    Ok(change.put(Record {
        id: new.id,
        snapshotter: new.snapshotter.to_owned(),
        name: new.name.to_owned(),
        parent: new.parent.map(str::to_owned),
        kind: new.kind,
        labels: without_empty(new.labels),
        created: now,
        updated: now,
        content: new.content,
        committed_from: None,
        usage: None,
        more: Map::new(),
    }))
}

/// A request to commit.
#[derive(Clone, Debug)]
pub struct NewCommit<'a> {
    /// Name of the snapshotter.
    pub snapshotter: &'a str,
    /// Key of the active snapshot.
    pub key: &'a str,
    /// Name of the committed one.
    pub name: &'a str,
    /// Labels in place of those of the active one.
    pub labels: &'a BTreeMap<String, String>,
    /// Parent of a snapshot that was prepared without one; any other must have this one.
    pub parent: Option<&'a str>,
}

/// Turns an active record into a committed one with another name and the same folder, which holds `content`.
///
/// # Errors
/// [`SnapshotError::NotFound`], [`SnapshotError::Exists`], [`SnapshotError::NotActive`], [`SnapshotError::WrongParent`],
/// [`SnapshotError::ParentNotFound`], [`SnapshotError::CommitOnUncommitted`], [`SnapshotError::Invalid`].
pub fn commit(
    change: &mut Change<'_>,
    commit: &NewCommit<'_>,
    content: LayerContent,
) -> Result<Arc<Record>, SnapshotError> {
    check_name(commit.name)?;
    check_labels(commit.labels)?;
    let active = change
        .get(commit.snapshotter, commit.key)
        .ok_or_else(|| SnapshotError::NotFound(commit.key.to_owned()))?;
    if change.get(commit.snapshotter, commit.name).is_some() {
        return Err(SnapshotError::Exists(commit.name.to_owned()));
    }
    if active.kind != SnapshotKind::Active {
        return Err(SnapshotError::NotActive(commit.key.to_owned()));
    }
    let parent = match (&active.parent, commit.parent) {
        (Some(parent), Some(wanted)) if parent != wanted => {
            return Err(SnapshotError::WrongParent {
                key: commit.key.to_owned(),
                parent: parent.clone(),
                wanted: wanted.to_owned(),
            });
        }
        (Some(parent), _) => Some(parent.clone()),
        (None, wanted) => wanted.map(str::to_owned),
    };
    if let Some(parent) = &parent {
        let parent = change
            .get(commit.snapshotter, parent)
            .ok_or_else(|| SnapshotError::ParentNotFound(parent.clone()))?;
        if parent.kind != SnapshotKind::Committed {
            return Err(SnapshotError::CommitOnUncommitted(parent.name.clone()));
        }
    }
    let now = Moment::now();
    Ok(change.put(Record {
        name: commit.name.to_owned(),
        parent,
        kind: SnapshotKind::Committed,
        labels: without_empty(commit.labels),
        created: now,
        updated: now,
        committed_from: Some(commit.key.to_owned()),
        content,
        usage: None,
        ..(*active).clone()
    }))
}

/// Removes a record without children.
///
/// # Errors
/// [`SnapshotError::NotFound`], [`SnapshotError::HasChildren`].
pub fn remove(
    change: &mut Change<'_>,
    snapshotter: &str,
    name: &str,
) -> Result<Arc<Record>, SnapshotError> {
    let record =
        change.get(snapshotter, name).ok_or_else(|| SnapshotError::NotFound(name.to_owned()))?;
    match change.children(&record) {
        0 => change.delete(&record),
        children => return Err(SnapshotError::HasChildren { name: name.to_owned(), children }),
    }
    Ok(record)
}

/// Changes labels: all of them without a mask or with `labels`, else each that the mask names (`labels.KEY`). A value that is
/// empty or absent deletes the label.
///
/// # Errors
/// [`SnapshotError::NotFound`], [`SnapshotError::Immutable`], [`SnapshotError::Invalid`].
pub fn update(
    change: &mut Change<'_>,
    snapshotter: &str,
    name: &str,
    labels: &BTreeMap<String, String>,
    mask: &[String],
) -> Result<Arc<Record>, SnapshotError> {
    check_labels(labels)?;
    let record =
        change.get(snapshotter, name).ok_or_else(|| SnapshotError::NotFound(name.to_owned()))?;
    let mut record = (*record).clone();
    if mask.is_empty() {
        record.labels.clone_from(labels);
    }
    for path in mask {
        match path.strip_prefix("labels.") {
            Some(key) => {
                let value = labels.get(key).cloned().unwrap_or_default();
                record.labels.insert(key.to_owned(), value);
            }
            None if path == "labels" => record.labels.clone_from(labels),
            None => return Err(SnapshotError::Immutable(path.clone())),
        }
    }
    record.labels.retain(|_, value| !value.is_empty());
    // A clock that was set back must not make an update older than the creation.
    record.updated = Moment::now().max(record.updated);
    Ok(change.put(record))
}

fn without_empty(labels: &BTreeMap<String, String>) -> BTreeMap<String, String> {
    let stated = labels.iter().filter(|(_, value)| !value.is_empty());
    stated.map(|(key, value)| (key.clone(), value.clone())).collect()
}

fn check_name(name: &str) -> Result<(), SnapshotError> {
    match name.len() {
        0 => Err(SnapshotError::Invalid("The request names no snapshot".to_owned())),
        1..=LONGEST_NAME => Ok(()),
        length => Err(SnapshotError::Invalid(format!(
            "The name of the snapshot has {length} bytes, and at most {LONGEST_NAME} are allowed"
        ))),
    }
}

fn check_labels(labels: &BTreeMap<String, String>) -> Result<(), SnapshotError> {
    let long = labels.iter().find(|(key, value)| key.len() + value.len() > LONGEST_LABEL);
    long.map_or(Ok(()), |(key, _)| {
        let key: String = key.chars().take(64).collect();
        Err(SnapshotError::Invalid(format!(
            "The label {key:?} and its value have more than {LONGEST_LABEL} bytes"
        )))
    })
}
