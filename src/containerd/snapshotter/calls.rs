//! The ten calls of the service, without gRPC. Each may block, and is called on a thread that may.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use super::config::SnapshotterConfig;
use super::error::{SnapshotError, SnapshotterError, step};
use super::filter::Filter;
use super::folders::Folders;
use super::layer::LayerContent;
use super::mounts::{MountPlan, OverlayOptions};
use super::store::record::{DiskUsage, Record, SnapshotKind};
use super::store::rules::{self, NewCommit, NewRecord};
use super::store::{RecordsError, SnapshotStore};
use super::usage::UsageCache;
use super::{failpoint, sweep};
use crate::api::types::Mount;

/// Name of the store's file in the root.
const RECORDS_FILE: &str = "records.redb";

/// What overlaybd's and containerd's own snapshotters have in their root.
const FOREIGN: &str = "metadata.db";

/// Characters that separate options, or folders in an option, of an overlay mount.
const SEPARATORS: [char; 3] = [',', ':', '\\'];

/// A snapshot that Prepare or View shall make.
#[derive(Clone, Debug, Default)]
pub struct NewSnapshot {
    /// Snapshotter, as containerd's configuration calls it.
    pub snapshotter: String,
    /// Key of the snapshot.
    pub key: String,
    /// Name of its parent, or empty.
    pub parent: String,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
}

/// Snapshots in a root, which belongs to this process alone.
#[derive(Debug)]
pub struct Snapshotter {
    config: SnapshotterConfig,
    store: SnapshotStore,
    folders: Folders,
    options: OverlayOptions,
    usages: UsageCache,
}

impl Snapshotter {
    /// Opens the root, makes what is missing of it, and sweeps away what a killed process left.
    ///
    /// # Errors
    /// Returns [`SnapshotterError`]. Nothing in a root that another snapshotter has made is touched.
    pub fn open(config: SnapshotterConfig) -> Result<Self, SnapshotterError> {
        let root = config.root.clone();
        let text = root.display().to_string();
        if let Some(character) = SEPARATORS.into_iter().find(|c| text.contains(*c)) {
            return Err(SnapshotterError::RootName { root, character });
        }
        sys::private::folder(&root)
            .map_err(|source| SnapshotterError::Start { what: "use the root folder", source })?;
        let file = root.join(RECORDS_FILE);
        if !file.exists() {
            refuse_foreign(&root)?;
        }
        let failed = |source: RecordsError| SnapshotterError::Store { root: root.clone(), source };
        let store = SnapshotStore::open(&file).map_err(failed)?;
        let folders = Folders::open(&root)?;
        sweep::folders(&store, &folders)?;
        let options = OverlayOptions::of_this_host();
        Ok(Self { config, store, folders, options, usages: UsageCache::default() })
    }

    /// The configuration.
    #[must_use]
    pub fn config(&self) -> &SnapshotterConfig {
        &self.config
    }

    /// Makes a snapshot for writing, and says how it is mounted.
    ///
    /// # Errors
    /// Those of [`rules::create`]; [`SnapshotError::Folder`], [`SnapshotError::Store`].
    pub fn prepare(&self, new: &NewSnapshot, until: Instant) -> Result<Vec<Mount>, SnapshotError> {
        self.create(new, SnapshotKind::Active, until)
    }

    /// Makes a snapshot for reading, and says how it is mounted.
    ///
    /// # Errors
    /// As [`prepare`](Self::prepare).
    pub fn view(&self, new: &NewSnapshot, until: Instant) -> Result<Vec<Mount>, SnapshotError> {
        self.create(new, SnapshotKind::View, until)
    }

    fn create(
        &self,
        new: &NewSnapshot,
        kind: SnapshotKind,
        until: Instant,
    ) -> Result<Vec<Mount>, SnapshotError> {
        let id = self.store.new_id();
        let record = || NewRecord {
            id,
            snapshotter: &new.snapshotter,
            name: &new.key,
            parent: named(&new.parent),
            kind,
            labels: &new.labels,
            content: LayerContent::Plain,
        };
        // A refusal costs no folder.
        self.store.check(|change| rules::create(change, record()).map(drop))?;
        self.folders.create(id, kind == SnapshotKind::Active, self.owner(new)?)?;
        match self.store.change(|change| rules::create(change, record())) {
            Ok(record) => self.mounts_of(&record, until),
            Err(error) => {
                let _ = self.folders.discard(id);
                Err(error)
            }
        }
    }

    /// User and group of the root folder of the parent, which those of a new snapshot are too.
    fn owner(&self, new: &NewSnapshot) -> Result<Option<(u32, u32)>, SnapshotError> {
        let Some(parent) = named(&new.parent) else { return Ok(None) };
        let parent = self.store.get(&new.snapshotter, parent)?;
        let upper = self.folders.upper(parent.id);
        let meta = std::fs::symlink_metadata(&upper).map_err(step("examine the folder", upper))?;
        Ok(Some((meta.uid(), meta.gid())))
    }

    /// How an active snapshot or a view is mounted. The answer is the same at every call.
    ///
    /// # Errors
    /// Returns [`SnapshotError::NotFound`], [`SnapshotError::Committed`], [`SnapshotError::Folder`].
    pub fn mounts(
        &self,
        snapshotter: &str,
        key: &str,
        until: Instant,
    ) -> Result<Vec<Mount>, SnapshotError> {
        let record = self.store.get(snapshotter, key)?;
        if record.kind == SnapshotKind::Committed {
            return Err(SnapshotError::Committed(key.to_owned()));
        }
        self.mounts_of(&record, until)
    }

    fn mounts_of(
        &self,
        record: &Arc<Record>,
        _until: Instant,
    ) -> Result<Vec<Mount>, SnapshotError> {
        let chain = self.store.read().chain(record).map_err(SnapshotError::ParentNotFound)?;
        let mut lowers: Vec<PathBuf> = Vec::with_capacity(chain.len() - 1);
        for parent in &chain[1..] {
            lowers.push(self.lower(parent)?);
        }
        let lowers: Vec<&Path> = lowers.iter().map(PathBuf::as_path).collect();
        let plan = MountPlan {
            kind: record.kind,
            upper: &self.folders.upper(record.id),
            work: &self.folders.work(record.id),
            lowers: &lowers,
            options: &self.options,
        };
        Ok(plan.mounts())
    }

    /// Folder of a committed snapshot in a mount.
    fn lower(&self, record: &Record) -> Result<PathBuf, SnapshotError> {
        if let Some(kind) = record.content.unknown_kind() {
            let (name, kind) = (record.name.clone(), kind.to_owned());
            return Err(SnapshotError::UnknownContent { name, kind });
        }
        let upper = self.folders.upper(record.id);
        match std::fs::symlink_metadata(&upper) {
            Ok(_) => Ok(upper),
            Err(error) => Err(step(
                "find the files of a layer (remove its image and pull it again) in",
                upper,
            )(error)),
        }
    }

    /// Turns an active snapshot into a committed one.
    ///
    /// # Errors
    /// Those of [`rules::commit`]; [`SnapshotError::Store`].
    pub fn commit(&self, commit: &NewCommit<'_>) -> Result<(), SnapshotError> {
        let committed = self
            .store
            .change(|change| rules::commit(change, commit, |_| Ok(LayerContent::Plain)))?;
        self.usages.forget(committed.id);
        Ok(())
    }

    /// Removes a snapshot. Its folder is out of the way when this returns; its files go later.
    ///
    /// # Errors
    /// Those of [`rules::remove`]; [`SnapshotError::Store`].
    pub fn remove(&self, snapshotter: &str, key: &str) -> Result<(), SnapshotError> {
        let removed = self.store.change(|change| rules::remove(change, snapshotter, key))?;
        self.usages.forget(removed.id);
        // The record is gone, so the answer is yes. What stays is swept at the next start.
        if let Err(error) = self.folders.discard(removed.id) {
            tracing::warn!("{}", source::failure::with_causes(&error));
        }
        Ok(())
    }

    /// A snapshot by its key or name.
    ///
    /// # Errors
    /// Returns [`SnapshotError::NotFound`].
    pub fn stat(&self, snapshotter: &str, key: &str) -> Result<Arc<Record>, SnapshotError> {
        self.store.get(snapshotter, key)
    }

    /// Changes labels of a snapshot.
    ///
    /// # Errors
    /// Those of [`rules::update`]; [`SnapshotError::Store`].
    pub fn update(
        &self,
        snapshotter: &str,
        name: &str,
        labels: &BTreeMap<String, String>,
        mask: &[String],
    ) -> Result<Arc<Record>, SnapshotError> {
        self.store.change(|change| rules::update(change, snapshotter, name, labels, mask))
    }

    /// Snapshots that match one of the filters, by name; all without a filter.
    ///
    /// # Errors
    /// Those of [`Filter::parse`].
    pub fn list(
        &self,
        snapshotter: &str,
        filters: &[String],
    ) -> Result<Vec<Arc<Record>>, SnapshotError> {
        let filter = Filter::parse(filters)?;
        let index = self.store.read();
        Ok(index.of(snapshotter).filter(|record| filter.matches(record)).cloned().collect())
    }

    /// What a snapshot occupies on disk, without its parents. Of a committed one it is found out once, when it is first asked for.
    ///
    /// # Errors
    /// Returns [`SnapshotError::NotFound`], [`SnapshotError::Folder`], [`SnapshotError::Deadline`], [`SnapshotError::Store`].
    pub fn usage(
        &self,
        snapshotter: &str,
        key: &str,
        until: Instant,
    ) -> Result<DiskUsage, SnapshotError> {
        let record = self.store.get(snapshotter, key)?;
        if let Some(usage) = record.usage {
            return Ok(usage);
        }
        let walked = self.usages.of(record.id, &self.folders.upper(record.id), until);
        if record.kind != SnapshotKind::Committed {
            return walked;
        }
        let usage = walked?;
        self.store.change(|change| {
            if let Some(now) = change.get(snapshotter, key).filter(|now| now.id == record.id) {
                change.put(Record { usage: Some(usage), ..(*now).clone() });
            }
            Ok(())
        })?;
        failpoint::reached("record-written");
        self.usages.forget(record.id);
        Ok(usage)
    }

    /// Waits until the files of removed snapshots are gone, at most until `until`; the rest goes on behind the answer.
    pub fn cleanup(&self, until: Instant) {
        if !self.folders.empty(until) {
            tracing::info!("Files of removed snapshots are still being removed");
        }
    }
}

/// Refuses a root that has folders of snapshots and no store of ours: the sweep would remove them.
fn refuse_foreign(root: &Path) -> Result<(), SnapshotterError> {
    let foreign = |found: String| SnapshotterError::Foreign { root: root.to_owned(), found };
    if root.join(FOREIGN).exists() {
        return Err(foreign(format!("the store {FOREIGN}")));
    }
    let snapshots = root.join("snapshots");
    let has_snapshots =
        std::fs::read_dir(&snapshots).is_ok_and(|mut entries| entries.next().is_some());
    if has_snapshots { Err(foreign("snapshots".to_owned())) } else { Ok(()) }
}

/// A name of the wire, where empty means none.
#[must_use]
pub fn named(name: &str) -> Option<&str> {
    Some(name).filter(|name| !name.is_empty())
}
