//! The folders below a snapshot, which its mount names as lower ones: files of layers, and the mount of a device.
//!
//! From records to folders in three steps: the chain of parents says what is shown ([`chain`](super::chain)), the device is opened if it is
//! not ([`devices`](super::devices)), and a container in a user namespace gets clones with its owners
//! ([`idmap`](super::idmap)). Everything is derived from records at each call, so what a crash or a reboot took is made
//! again.
//!
//! A layer that containerd unpacks, and that is a file of blocks by its labels, is unpacked into an empty folder: nothing
//! in it refers to a layer below.

use std::collections::HashSet;
use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use source::failure::with_causes;

use super::chain::{ChainLink, ChainOptions, DeviceKey, LayerStack, stack};
use super::config::SnapshotterConfig;
use super::devices::host::DeviceHost;
use super::devices::{ContentDevices, DeviceError};
use super::error::{SnapshotError, step};
use super::folders::Folders;
use super::idmap::{clone_lowers, is_remapped};
use super::lazy::{LazyLayers, PullAnswer, WantedLayer};
use super::pulls::{Pulls, QUIET};
use super::store::SnapshotStore;
use super::store::record::{Record, SnapshotKind};
use crate::labels::{Labels, LayerLabels, OwnerMap, PullLabels, REF};

/// Name of the folder of devices in the root.
const DEVICES_NAME: &str = "devices";

/// Time that Prepare waits for a device. containerd holds a lock meanwhile; Mounts, which comes next, waits longer.
const PREPARE_PATIENCE: Duration = Duration::from_secs(2);

/// Beginning of the key of every snapshot that containerd's clients unpack a layer into (`core/unpack`, `rootfs`).
const EXTRACTION: &str = "extract-";

/// What lies below the snapshots of a root.
#[derive(Debug)]
pub struct Lowers {
    devices: Arc<ContentDevices>,
    options: ChainOptions,
    lazy: LazyLayers,
    pulls: Pulls,
}

impl Lowers {
    /// The folders of the configuration's root, with devices of `host`.
    ///
    /// # Errors
    /// [`SnapshotError::Device`] if their folder cannot be made.
    pub fn open(
        config: &SnapshotterConfig,
        host: Arc<dyn DeviceHost>,
    ) -> Result<Self, SnapshotError> {
        let devices = ContentDevices::open(config.root.join(DEVICES_NAME), host)?;
        let options = config.chain_options();
        let lazy = LazyLayers::new(config.plain, options.clone(), devices.clone());
        Ok(Self { devices, options, lazy, pulls: Pulls::new(&config.root) })
    }

    /// The pulls.
    #[must_use]
    pub fn pulls(&self) -> &Pulls {
        &self.pulls
    }

    /// The answer to a pull's Prepare on the layers `parents`, the topmost first.
    #[must_use]
    pub fn answer(
        &self,
        pull: &PullLabels,
        labels: &Labels,
        parents: &[Arc<Record>],
        until: Instant,
    ) -> PullAnswer {
        let parent = parents.first().map(|parent| &parent.content);
        self.lazy.answer(&WantedLayer { pull, labels, parent, below: parents.len() }, until)
    }

    /// Folders below a snapshot on the layers `parents`, from the top to the base. With `late_is_fine`, a device that is not open
    /// in a short time is no error: its folder does not exist then.
    ///
    /// # Errors
    /// [`SnapshotError::Device`], [`SnapshotError::Chain`], [`SnapshotError::UnknownContent`], [`SnapshotError::Folder`],
    /// [`SnapshotError::Labels`], [`SnapshotError::Owners`].
    pub fn folders(
        &self,
        record: &Record,
        parents: &[Arc<Record>],
        folders: &Folders,
        until: Instant,
        late_is_fine: bool,
    ) -> Result<Vec<PathBuf>, SnapshotError> {
        if is_self_contained(record) {
            return Ok(Vec::new());
        }
        let LayerStack { folders: mut lowers, device } = self.stack(parents, folders)?;
        for lower in &lowers {
            fs::symlink_metadata(lower).map_err(step(
                "find the files of a layer (remove its image and pull it again) in",
                lower.as_path(),
            ))?;
        }
        if let Some(source) = device {
            // What is unpacked over a folder that is missing gets wrong attributes in the folders that it implies.
            let late_is_fine = late_is_fine && !is_extraction(record);
            let patience = if late_is_fine { PREPARE_PATIENCE } else { Duration::MAX };
            let until = Instant::now().checked_add(patience).map_or(until, |end| end.min(until));
            match self.devices.ensure(&source, until) {
                Ok(mount) => lowers.push(mount),
                Err(DeviceError::Late { .. }) if late_is_fine => {
                    lowers.push(self.devices.mount_point(&source.key));
                    return Ok(lowers);
                }
                Err(error) => return Err(error.into()),
            }
        }
        let Some(map) = OwnerMap::of(&record.labels)? else { return Ok(lowers) };
        let above = parents.first().and_then(|parent| parent.committed_from.as_deref());
        if above.is_some_and(is_remapped) {
            return Ok(lowers);
        }
        clone_lowers(&folders.folder(record.id), &lowers, &map).map_err(SnapshotError::Owners)
    }

    fn stack(
        &self,
        parents: &[Arc<Record>],
        folders: &Folders,
    ) -> Result<LayerStack, SnapshotError> {
        let mut links = Vec::with_capacity(parents.len());
        for parent in parents {
            if let Some(kind) = parent.content.unknown_kind() {
                let (name, kind) = (parent.name.clone(), kind.to_owned());
                return Err(SnapshotError::UnknownContent { name, kind });
            }
            let (content, files) = (parent.content.clone(), folders.upper(parent.id));
            links.push(ChainLink { id: parent.id, content, files });
        }
        Ok(stack(&links, &self.options)?)
    }

    /// Contents that snapshots of containers show.
    fn needed(&self, store: &SnapshotStore, folders: &Folders) -> HashSet<DeviceKey> {
        let mounted: Vec<Arc<Record>> = store
            .read()
            .all()
            .filter(|record| record.kind != SnapshotKind::Committed)
            .cloned()
            .collect();
        let key = |record: Arc<Record>| {
            let chain = store.read().chain(&record).ok()?;
            // What cannot be shown needs nothing.
            self.stack(&chain[1..], folders).ok()?.device.map(|source| source.key)
        };
        mounted.into_iter().filter(|record| !is_self_contained(record)).filter_map(key).collect()
    }

    /// Removes devices that no container has, and that were not wanted for `idle`; ends the account of quiet pulls.
    pub fn tidy(&self, store: &SnapshotStore, folders: &Folders, idle: Duration) {
        self.pulls.end_quiet(QUIET);
        self.devices.remove_idle(&self.needed(store, folders), idle);
    }

    /// Removes devices and mounts of an earlier process that no container has.
    pub fn sweep(&self, store: &SnapshotStore, folders: &Folders) {
        if let Err(error) = self.devices.sweep(&self.needed(store, folders)) {
            tracing::warn!("{}", with_causes(&error));
        }
    }
}

/// True if a layer is unpacked into this snapshot.
#[must_use]
pub fn is_extraction(record: &Record) -> bool {
    // A key of containerd is NAMESPACE/NUMBER/KEY.
    let key = record.name.splitn(3, '/').last().unwrap_or_default();
    record.kind == SnapshotKind::Active
        && (record.labels.contains_key(REF) || key.starts_with(EXTRACTION))
}

/// True if a layer is unpacked into this snapshot that refers to no layer below.
fn is_self_contained(record: &Record) -> bool {
    let labels = || LayerLabels::of(&record.labels);
    is_extraction(record) && labels().is_ok_and(|labels| labels != LayerLabels::Plain)
}
