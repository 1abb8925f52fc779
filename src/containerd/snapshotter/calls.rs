//! The ten calls of the service, without gRPC. Each may block, and is called on a thread that may.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::config::SnapshotterConfig;
use super::devices::host::{DaemonHost, DeviceHost};
use super::error::{SnapshotError, SnapshotterError, step};
use super::filter::Filter;
use super::folders::Folders;
use super::layer::{LayerContent, recognise};
use super::lazy::{PullAnswer, lazy_name};
use super::lowers::{Lowers, is_extraction};
use super::mounts::{MountPlan, OverlayOptions};
use super::pulls::LayerOutcome;
use super::store::record::{DiskUsage, Record, SnapshotKind};
use super::store::rules::{self, NewCommit, NewRecord};
use super::store::{RecordsError, SnapshotStore};
use super::usage::UsageCache;
use super::{failpoint, idmap, sweep};
use crate::api::types::Mount;
use crate::labels::{OwnerMap, PullLabels, REF};

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
    lowers: Lowers,
    options: OverlayOptions,
    usages: UsageCache,
}

impl Snapshotter {
    /// Opens the root, makes what is missing of it, and sweeps away what a killed process left.
    ///
    /// # Errors
    /// Returns [`SnapshotterError`]. Nothing in a root that another snapshotter has made is touched.
    pub fn open(config: SnapshotterConfig) -> Result<Self, SnapshotterError> {
        let host = Arc::new(DaemonHost::new(config.run_dir.clone()));
        Self::open_on(config, host)
    }

    /// Form of [`open`](Self::open) with another host for the devices.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn open_on(
        config: SnapshotterConfig,
        host: Arc<dyn DeviceHost>,
    ) -> Result<Self, SnapshotterError> {
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
        // The names of the store and of the folders, if they are new.
        std::fs::File::open(&root)
            .and_then(|folder| folder.sync_all())
            .map_err(|source| SnapshotterError::Start { what: "write the root to disk", source })?;
        let lowers = Lowers::open(&config, host)?;
        let options = OverlayOptions::of_this_host();
        Ok(Self { config, store, folders, lowers, options, usages: UsageCache::default() })
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
        if let Some(pull) = PullLabels::of(&new.labels) {
            self.pull(new, &pull, until)?;
        }
        self.create(new, SnapshotKind::Active, until)
    }

    /// Makes a snapshot for reading, and says how it is mounted.
    ///
    /// # Errors
    /// As [`prepare`](Self::prepare).
    pub fn view(&self, new: &NewSnapshot, until: Instant) -> Result<Vec<Mount>, SnapshotError> {
        self.create(new, SnapshotKind::View, until)
    }

    /// Answers a pull by [`SnapshotError::Exists`] if its layer need not be fetched.
    fn pull(
        &self,
        new: &NewSnapshot,
        pull: &PullLabels,
        until: Instant,
    ) -> Result<(), SnapshotError> {
        let parent = named(&new.parent);
        let record = |name, kind, id, content| NewRecord {
            id,
            snapshotter: &new.snapshotter,
            name,
            parent,
            kind,
            labels: &new.labels,
            content,
        };
        // What is wrong with the request comes before what is known of the layer.
        let active = || record(&new.key, SnapshotKind::Active, 0, LayerContent::Plain);
        self.store.check(|change| rules::create(change, active()).map(drop))?;
        let exists = || SnapshotError::Exists(new.key.clone());
        let parents = match parent {
            Some(parent) => {
                let parent = self.store.get(&new.snapshotter, parent)?;
                self.store.read().chain(&parent).map_err(SnapshotError::ParentNotFound)?
            }
            None => Vec::new(),
        };
        if self.has_layer(new, pull) {
            self.lowers.pulls().layer(pull, LayerOutcome::Known);
            return Err(exists());
        }
        let content = match self.lowers.answer(pull, &new.labels, &parents, until) {
            PullAnswer::Ordinary(reason) => {
                self.lowers.pulls().layer(pull, LayerOutcome::Unpacked(reason));
                return Ok(());
            }
            PullAnswer::Lazy(content) => content,
        };
        let (id, kind) = (self.store.new_id(), content.name());
        let name = lazy_name(parent, &pull.chain, &content);
        self.folders.create(id, false, None)?;
        let committed = record(&name, SnapshotKind::Committed, id, content);
        if let Err(error) = self.store.change(|change| rules::create(change, committed)) {
            let _ = self.folders.discard(id);
            // Another call for the same layer was faster.
            if !matches!(error, SnapshotError::Exists(_)) {
                return Err(error);
            }
        }
        self.lowers.pulls().layer(pull, LayerOutcome::Lazy(kind));
        Err(exists())
    }

    /// True if a layer that containerd need not fetch is here, on the parent that the request names.
    fn has_layer(&self, new: &NewSnapshot, pull: &PullLabels) -> bool {
        let parent = named(&new.parent);
        // Without its parent it would be taken for one that has none.
        if parent.is_none() && pull.parent_chain.is_some() {
            return false;
        }
        self.store.read().of(&new.snapshotter).any(|record| {
            record.kind == SnapshotKind::Committed
                && record.content.needs_device()
                && record.parent.as_deref() == parent
                && record.labels.get(REF) == Some(&pull.chain)
        })
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
        let made = match self.store.change(|change| rules::create(change, record())) {
            Ok(made) => made,
            Err(error) => {
                let _ = self.folders.discard(id);
                return Err(error);
            }
        };
        let mounts = self.mounts_of(&made, until, true);
        if mounts.is_err() {
            // A device that is not there is said now. The caller knows of no snapshot, and may ask for the same key again.
            let _ = self.remove(&new.snapshotter, &new.key);
        }
        mounts
    }

    /// User and group of the root folder of the parent, which those of a new snapshot are too.
    fn owner(&self, new: &NewSnapshot) -> Result<Option<(u32, u32)>, SnapshotError> {
        let Some(parent) = named(&new.parent) else { return Ok(None) };
        let parent = self.store.get(&new.snapshotter, parent)?;
        let remapped = parent.committed_from.as_deref().is_some_and(idmap::is_remapped);
        if !remapped && let Some(map) = OwnerMap::of(&new.labels)? {
            return Ok(map.root());
        }
        // The root folder of a device is not looked at: it may not be there yet.
        if parent.content.needs_device() {
            return Ok(None);
        }
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
        self.mounts_of(&record, until, false)
    }

    fn mounts_of(
        &self,
        record: &Arc<Record>,
        until: Instant,
        late_is_fine: bool,
    ) -> Result<Vec<Mount>, SnapshotError> {
        let chain = self.store.read().chain(record).map_err(SnapshotError::ParentNotFound)?;
        let lowers =
            self.lowers.folders(record, &chain[1..], &self.folders, until, late_is_fine)?;
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

    /// Turns an active snapshot into a committed one.
    ///
    /// # Errors
    /// Those of [`rules::commit`]; [`SnapshotError::Store`].
    pub fn commit(&self, commit: &NewCommit<'_>) -> Result<(), SnapshotError> {
        let active = self.store.get(commit.snapshotter, commit.key)?;
        let content = if is_extraction(&active) {
            recognise(&self.folders.upper(active.id), &active.labels, commit.labels)?
        } else {
            LayerContent::Plain
        };
        let committed = self.store.change(|change| rules::commit(change, commit, content))?;
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
        // Clones of its lower folders would keep its folder from being moved.
        if let Err(error) = idmap::remove_clones(&self.folders.folder(removed.id)) {
            tracing::warn!("{}", source::failure::with_causes(&error));
        }
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

    /// Removes devices that no container has had for a while, and ends the account of pulls. To be called every few seconds.
    pub fn tidy(&self) {
        let idle = Duration::from_secs(self.config.idle_seconds);
        self.lowers.tidy(&self.store, &self.folders, idle);
    }

    /// Removes devices that were left behind and that no record names.
    pub fn sweep_devices(&self) {
        self.lowers.sweep(&self.store, &self.folders);
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
