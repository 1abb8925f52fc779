//! Snapshots of an image's layers.
//!
//! The snapshotter is asked for each layer in order, with the labels that let it serve the layer lazily. What it answers decides:
//!
//! * "exists already", and the snapshot has the layer's chain ID: the layer is lazy, or was pulled before;
//! * mounts: the layer's blob is fetched, containerd unpacks it there, and the tar's digest is compared with the config;
//! * mounts that end read-only: the snapshotter has the layer's files already, and the snapshot is only committed
//!   (since containerd 2.4).
//!
//! When one layer has to be unpacked, those above it of the same kind are fetched too while it is.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use tonic::Code;

use formats::oci::annotations::LayerKind;
use formats::oci::{Descriptor, Digest};
use registry::store::ImageStore;

use super::connection::ContainerdClient;
use super::content::ContentStore;
use super::documents::Documents;
use super::error::RpullError;
use super::fetches::Fetches;
use super::labels::LayerPlace;
use super::{PullOutcome, PullTarget, PulledLayer, Report};
use crate::api::diff::ApplyRequest;
use crate::api::snapshots::{
    CommitSnapshotRequest, PrepareSnapshotRequest, RemoveSnapshotRequest, StatSnapshotRequest,
};
use crate::api::types::{BlobDescriptor, Mount};
use crate::labels::Labels;

/// Tries of a Prepare that finds a snapshot which is gone at the next look, as in containerd's own pulls.
const TRIES: u32 = 3;

/// The layers of an image, to be made snapshots.
pub(super) struct Layers<'a> {
    pub(super) containerd: &'a ContainerdClient,
    pub(super) content: &'a ContentStore,
    pub(super) store: &'a Arc<dyn ImageStore>,
    pub(super) documents: &'a Documents,
    pub(super) image_ref: &'a str,
    pub(super) target: &'a PullTarget,
    pub(super) report: &'a Report,
}

/// The snapshotter's answer.
enum Prepared {
    /// The snapshot is there.
    Exists,
    /// An active snapshot of this key, to be filled.
    Empty(String, Vec<Mount>),
    /// An active snapshot of this key that has the layer's files.
    Staged(String),
}

impl Layers<'_> {
    /// Makes all snapshots; returns what became of each layer, and the bytes that came from the registry.
    pub(super) async fn pull(&self) -> Result<(Vec<PulledLayer>, u64), RpullError> {
        let layers = &self.documents.layers;
        let (content, store) = (self.content.clone(), self.store.clone());
        let mut fetches = Fetches::new(content, store, self.report.clone());
        if self.target.download {
            layers.iter().for_each(|layer| fetches.begin(layer));
        }
        let (mut pulled, mut fetched) = (Vec::new(), 0);
        for (number, layer) in layers.iter().enumerate() {
            let (outcome, bytes) = self.layer(number, &mut fetches).await?;
            fetched += bytes;
            pulled.push(PulledLayer { digest: layer.digest, size: layer.size, outcome });
        }
        fetched += fetches.finish_all().await?;
        Ok((pulled, fetched))
    }

    async fn layer(
        &self,
        number: usize,
        fetches: &mut Fetches,
    ) -> Result<(PullOutcome, u64), RpullError> {
        let layer = &self.documents.layers[number];
        let chain = self.documents.chains[number];
        let labels = self.place(number).labels();
        let was_there = self.is_there(&chain).await?;
        let (key, mounts) = match self.prepare(number, &labels).await? {
            Prepared::Exists if was_there => return Ok((PullOutcome::Present, 0)),
            Prepared::Exists => return Ok((PullOutcome::Lazy, 0)),
            Prepared::Staged(key) => {
                self.commit(&chain, &key, labels).await?;
                return Ok((PullOutcome::Lazy, 0));
            }
            Prepared::Empty(key, mounts) => (key, mounts),
        };
        for above in self.documents.layers[number..].iter().filter(|above| alike(layer, above)) {
            fetches.begin(above);
        }
        let filled = self.fill(number, &key, mounts, fetches).await;
        let fetched = match filled {
            Ok(fetched) => fetched,
            Err(error) => {
                self.abandon(&key).await;
                return Err(error);
            }
        };
        self.commit(&chain, &key, labels).await?;
        self.content.note_tar(&layer.digest, &self.documents.tars[number]).await?;
        Ok((PullOutcome::Unpacked, fetched))
    }

    fn place(&self, number: usize) -> LayerPlace<'_> {
        LayerPlace {
            image_ref: self.image_ref,
            manifest: self.documents.manifest,
            layers: &self.documents.layers,
            tars: &self.documents.tars,
            chains: &self.documents.chains,
            number,
        }
    }

    fn snapshotter(&self) -> String {
        self.target.snapshotter.clone()
    }

    fn failed(&self, what: String, status: &tonic::Status) -> RpullError {
        self.containerd.snapshot_failed(&self.target.snapshotter, what, status)
    }

    /// True if the image's topmost snapshot is there, and with `download` all blobs.
    pub(super) async fn are_there(&self) -> Result<bool, RpullError> {
        if self.target.download {
            for layer in &self.documents.layers {
                if self.content.info(&layer.digest).await?.is_none() {
                    return Ok(false);
                }
            }
        }
        match self.documents.chains.last() {
            // A snapshot keeps those below it.
            Some(top) => self.is_there(top).await,
            None => Ok(true),
        }
    }

    /// The layers, all of them there.
    pub(super) fn present(&self) -> Vec<PulledLayer> {
        let layers = self.documents.layers.iter();
        let present = |layer: &Descriptor| PulledLayer {
            digest: layer.digest,
            size: layer.size,
            outcome: PullOutcome::Present,
        };
        layers.map(present).collect()
    }

    async fn is_there(&self, chain: &Digest) -> Result<bool, RpullError> {
        let stat = StatSnapshotRequest { snapshotter: self.snapshotter(), key: chain.to_string() };
        match self.containerd.snapshots().stat(self.containerd.request(stat)).await {
            Ok(_) => Ok(true),
            Err(status) if status.code() == Code::NotFound => Ok(false),
            Err(status) => Err(self.failed(format!("look for snapshot {chain}"), &status)),
        }
    }

    /// Asks for an active snapshot of the layer. One that is there belongs to the lease then.
    async fn prepare(&self, number: usize, labels: &Labels) -> Result<Prepared, RpullError> {
        let chain = &self.documents.chains[number];
        let below = number.checked_sub(1).map(|below| self.documents.chains[below].to_string());
        for _ in 0..TRIES {
            let key = format!("extract-{} {chain}", unique());
            let request = PrepareSnapshotRequest {
                snapshotter: self.snapshotter(),
                key: key.clone(),
                parent: below.clone().unwrap_or_default(),
                labels: labels.clone(),
            };
            match self.containerd.snapshots().prepare(self.containerd.request(request)).await {
                Ok(reply) => {
                    let mounts = reply.into_inner().mounts;
                    let is_staged = mounts.last().is_some_and(is_read_only);
                    return Ok(if is_staged {
                        Prepared::Staged(key)
                    } else {
                        Prepared::Empty(key, mounts)
                    });
                }
                Err(status) if status.code() == Code::AlreadyExists => {
                    if self.is_there(chain).await? {
                        return Ok(Prepared::Exists);
                    }
                }
                Err(status) => {
                    return Err(
                        self.failed(format!("prepare a snapshot of layer {chain}"), &status)
                    );
                }
            }
        }
        let status = tonic::Status::unknown("it exists already, and is not there");
        Err(self.failed(format!("prepare a snapshot of layer {chain}"), &status))
    }

    /// Fetches the layer and unpacks it into the mounts; returns the bytes that came from the registry.
    async fn fill(
        &self,
        number: usize,
        key: &str,
        mounts: Vec<Mount>,
        fetches: &mut Fetches,
    ) -> Result<u64, RpullError> {
        let layer = &self.documents.layers[number];
        let listed = self.documents.tars[number];
        let fetched = fetches.finish(layer).await?;
        let apply = ApplyRequest { diff: Some(BlobDescriptor::of(layer)), mounts };
        // Without a deadline: a layer may have any size.
        let applied = self.containerd.diff().apply(self.containerd.long_request(apply)).await;
        let applied = applied.map_err(|status| {
            self.failed(format!("unpack layer {} into snapshot {key:?}", layer.digest), &status)
        })?;
        let got = applied.into_inner().applied.unwrap_or_default().digest;
        if got == listed.to_string() {
            Ok(fetched)
        } else {
            Err(RpullError::WrongTar { layer: layer.digest, got, listed })
        }
    }

    /// Makes the active snapshot the layer's. Another pull may have been faster.
    async fn commit(&self, chain: &Digest, key: &str, labels: Labels) -> Result<(), RpullError> {
        let request = CommitSnapshotRequest {
            snapshotter: self.snapshotter(),
            name: chain.to_string(),
            key: key.to_owned(),
            labels,
            parent: String::new(),
        };
        match self.containerd.snapshots().commit(self.containerd.request(request)).await {
            Ok(_) => Ok(()),
            Err(status) => {
                self.abandon(key).await;
                if status.code() == Code::AlreadyExists {
                    return Ok(());
                }
                Err(self.failed(format!("commit the snapshot of layer {chain}"), &status))
            }
        }
    }

    /// Removes an active snapshot. If that fails, it goes with the lease.
    async fn abandon(&self, key: &str) {
        let remove = RemoveSnapshotRequest { snapshotter: self.snapshotter(), key: key.to_owned() };
        if let Err(status) =
            self.containerd.snapshots().remove(self.containerd.request(remove)).await
        {
            tracing::debug!(key, error = status.message(), "an active snapshot stays for now");
        }
    }
}

/// True if a snapshotter that does not serve `layer` lazily will not serve `other` either.
fn alike(layer: &Descriptor, other: &Descriptor) -> bool {
    let kind = |layer| LayerKind::of(layer).ok();
    match (kind(layer), kind(other)) {
        (Some(LayerKind::Native), _) | (_, Some(LayerKind::Native)) => layer.digest == other.digest,
        (a, b) => {
            a.map(|kind| std::mem::discriminant(&kind))
                == b.map(|kind| std::mem::discriminant(&kind))
        }
    }
}

/// True for a mount that cannot be written to (`core/mount/mount.go` of containerd, `ReadOnly`).
fn is_read_only(mount: &Mount) -> bool {
    let is_ro = mount.options.iter().any(|option| option == "ro");
    match mount.r#type.as_str() {
        "erofs" => true,
        "overlay" => is_ro || !mount.options.iter().any(|option| option.starts_with("upperdir=")),
        _ => is_ro,
    }
}

/// A text that no other snapshot of this host has in its key.
fn unique() -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    format!("{}-{}", now.as_nanos(), std::process::id())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mount_is_staged_if_nothing_can_be_unpacked_there() {
        let mount = |kind: &str, options: &[&str]| Mount {
            r#type: kind.to_owned(),
            options: options.iter().map(|&option| option.to_owned()).collect(),
            ..Mount::default()
        };
        assert!(is_read_only(&mount("bind", &["rbind", "ro"])));
        assert!(!is_read_only(&mount("bind", &["rbind", "rw"])));
        assert!(is_read_only(&mount("overlay", &["lowerdir=/a:/b"])));
        assert!(!is_read_only(&mount("overlay", &["lowerdir=/a", "upperdir=/u", "workdir=/w"])));
        assert!(is_read_only(&mount("erofs", &[])));
    }
}
