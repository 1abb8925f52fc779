//! A pull without layer data: what `turbobd rpull` does.
//!
//! containerd's own pulls can be lazy too, but only with settings that differ by release and by the program that asks, and
//! `ctr images pull` has no such setting before 2.0. This pull needs none of them. It does what containerd's client does,
//! over the services that have not changed since 1.6:
//!
//! 1. A *lease* ([`lease`]) keeps what is written from the garbage collection until the image has a name. It ends with the
//!    pull, also with a failed or interrupted one; then containerd collects what the pull has left.
//! 2. The index, the manifest of this platform and the config go into the content store ([`content`]), with labels that
//!    tell the garbage collection what belongs to what.
//! 3. Each layer is prepared in the snapshotter ([`layers`]) with labels that say which layer of which image it is. A snapshotter
//!    that serves the layer lazily answers "exists already", and nothing is fetched. For any other answer the layer's blob is
//!    fetched into the content store, and containerd unpacks it.
//! 4. The config gets a label that keeps the topmost snapshot, and the image its name.
//!
//! Everything comes from the registry by this program, with its credentials. The digest of each blob is verified:
//! of documents here, of layers by containerd when it commits them, and of unpacked layers by comparison with the config.
//! If containerd has the image already, with all of this, the pull ends before step 1.
//!
//! The registry is read by blocking calls in threads of their own; all else runs in one thread.
//!
//! * [`connection`] containerd's socket, and the headers of each call
//! * [`documents`]  index, manifest and config of an image
//! * [`content`]    writing blobs
//! * [`lease`]      the lease, and leases of pulls that died
//! * [`layers`]     snapshots of the layers; [`labels`] what they are told; [`fetches`] blobs on their way
//! * [`error`]      [`RpullError`]

mod connection;
mod content;
mod documents;
mod error;
mod fetches;
mod labels;
mod layers;
mod lease;

use std::path::PathBuf;
use std::sync::Arc;

use prost_types::FieldMask;
use tokio::signal::unix::{SignalKind, signal};
use tonic::Code;

use formats::oci::{Descriptor, Digest, RegistryName};
use registry::store::ImageStore;

use crate::api::images::{CreateImageRequest, GetImageRequest, ImageRecord, UpdateImageRequest};
use crate::api::types::BlobDescriptor;
use connection::ContainerdClient;
use content::ContentStore;
use documents::Documents;
use layers::Layers;
use lease::PullLease;

pub use error::{CallError, RpullError};

/// Where a pull goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PullTarget {
    /// containerd's socket.
    pub socket: PathBuf,
    /// containerd's namespace: `default`, `k8s.io`.
    pub namespace: String,
    /// Name of the snapshotter in containerd's configuration.
    pub snapshotter: String,
    /// Fetch the blobs of all layers into the content store, also of those that are lazy.
    pub download: bool,
}

/// What a layer has become.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PullOutcome {
    /// Its snapshot was there.
    Present,
    /// The snapshotter serves it; its data is fetched when it is read.
    Lazy,
    /// containerd has unpacked it.
    Unpacked,
}

/// A layer that was pulled.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PulledLayer {
    /// Digest of its blob.
    pub digest: Digest,
    /// Size of its blob in bytes.
    pub size: u64,
    /// What has become of it.
    pub outcome: PullOutcome,
}

/// An image that was pulled.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PulledImage {
    /// Its name in containerd.
    pub name: String,
    /// Digest of the manifest or index that the name stands for.
    pub digest: Digest,
    /// Its layers, lowest first.
    pub layers: Vec<PulledLayer>,
    /// Number of blob bytes of layers that came from the registry.
    pub fetched: u64,
}

/// Progress of a pull: fetches of layers' blobs. They overlap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PullEvent {
    /// The blob of this layer is fetched now; its size in bytes.
    Begun(Digest, u64),
    /// So many more bytes of it are in the content store.
    Advanced(Digest, u64),
    /// The blob is complete.
    Done(Digest),
}

/// Receiver of progress.
pub type Report = Arc<dyn Fn(PullEvent) + Send + Sync>;

/// Pulls `image` out of `store`, the repository that it names.
///
/// SIGINT and SIGTERM end the pull; containerd then collects what it has written.
///
/// # Errors
/// [`RpullError`].
pub fn rpull(
    image: &RegistryName,
    store: Arc<dyn ImageStore>,
    target: &PullTarget,
    report: Report,
) -> Result<PulledImage, RpullError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(RpullError::Start)?;
    let outcome = runtime.block_on(pull(image, store, target, report));
    // After an interruption a thread may wait for the registry still.
    runtime.shutdown_background();
    outcome
}

async fn pull(
    image: &RegistryName,
    store: Arc<dyn ImageStore>,
    target: &PullTarget,
    report: Report,
) -> Result<PulledImage, RpullError> {
    let mut interrupt = signal(SignalKind::interrupt()).map_err(RpullError::Start)?;
    let mut terminate = signal(SignalKind::terminate()).map_err(RpullError::Start)?;
    let mut lease = None;
    let pull = Pull { image, name: image.to_string(), store, target, report };
    let outcome = tokio::select! {
        outcome = pull.run(&mut lease) => outcome,
        _ = interrupt.recv() => Err(RpullError::Interrupted),
        _ = terminate.recv() => Err(RpullError::Interrupted),
    };
    let ended = match lease {
        // What a failed pull has written goes at once.
        Some(lease) => lease.end(outcome.is_err()).await,
        None => Ok(()),
    };
    let image = outcome?;
    ended?;
    Ok(image)
}

/// A pull under way.
struct Pull<'a> {
    image: &'a RegistryName,
    /// Name of the image in containerd.
    name: String,
    store: Arc<dyn ImageStore>,
    target: &'a PullTarget,
    report: Report,
}

impl Pull<'_> {
    /// Pulls. A lease that was begun is left in `lease`.
    async fn run(&self, lease: &mut Option<PullLease>) -> Result<PulledImage, RpullError> {
        let containerd =
            ContainerdClient::open(&self.target.socket, &self.target.namespace).await?;
        containerd.need_snapshotter(&self.target.snapshotter).await?;
        let source = labels::distribution_source(self.image);
        let content = ContentStore::new(containerd.clone(), source.clone());
        let documents = Documents::read(self.image, &self.store, &content).await?;
        if let Some(layers) = self.present(&containerd, &content, &documents).await? {
            return Ok(self.pulled(&documents, layers, 0));
        }
        let lease = lease.insert(PullLease::begin(&containerd).await?);
        let containerd = containerd.with_lease(lease.id())?;
        let content = ContentStore::new(containerd.clone(), source);
        documents.write(&content).await?;
        let layers = self.layers(&containerd, &content, &documents);
        let (layers, fetched) = layers.pull().await?;
        documents.keep_snapshots(&content, &self.target.snapshotter).await?;
        name_image(&containerd, &self.name, &documents.target).await?;
        Ok(self.pulled(&documents, layers, fetched))
    }

    /// The layers of an image that is there, with all that a pull would make.
    async fn present(
        &self,
        containerd: &ContainerdClient,
        content: &ContentStore,
        documents: &Documents,
    ) -> Result<Option<Vec<PulledLayer>>, RpullError> {
        let named = named_image(containerd, &self.name).await?.and_then(|record| record.target);
        if named.is_none_or(|target| target.digest != documents.target.digest.to_string())
            || !documents.are_written(content, &self.target.snapshotter).await?
        {
            return Ok(None);
        }
        let layers = self.layers(containerd, content, documents);
        Ok(layers.are_there().await?.then(|| layers.present()))
    }

    fn layers<'p>(
        &'p self,
        containerd: &'p ContainerdClient,
        content: &'p ContentStore,
        documents: &'p Documents,
    ) -> Layers<'p> {
        Layers {
            containerd,
            content,
            store: &self.store,
            documents,
            image_ref: &self.name,
            target: self.target,
            report: &self.report,
        }
    }

    fn pulled(&self, documents: &Documents, layers: Vec<PulledLayer>, fetched: u64) -> PulledImage {
        PulledImage { name: self.name.clone(), digest: documents.target.digest, layers, fetched }
    }
}

/// The image of this name, if there is one.
async fn named_image(
    containerd: &ContainerdClient,
    name: &str,
) -> Result<Option<ImageRecord>, RpullError> {
    let get = containerd.request(GetImageRequest { name: name.to_owned() });
    match containerd.images().get(get).await {
        Ok(reply) => Ok(reply.into_inner().image),
        Err(status) if status.code() == Code::NotFound => Ok(None),
        Err(status) => Err(containerd.failed(format!("look for image {name}"), &status)),
    }
}

/// Points the name at the image. Labels of a name that is there stay.
async fn name_image(
    containerd: &ContainerdClient,
    name: &str,
    target: &Descriptor,
) -> Result<(), RpullError> {
    let target = Some(BlobDescriptor::of(target));
    loop {
        // Which of the two it is may change in between.
        let (status, expected) = match named_image(containerd, name).await? {
            Some(known) => {
                let update = UpdateImageRequest {
                    image: Some(ImageRecord { target: target.clone(), ..known }),
                    update_mask: Some(FieldMask { paths: vec!["target".to_owned()] }),
                };
                match containerd.images().update(containerd.request(update)).await {
                    Ok(_) => return Ok(()),
                    Err(status) => (status, Code::NotFound),
                }
            }
            None => {
                let record = ImageRecord {
                    name: name.to_owned(),
                    target: target.clone(),
                    ..ImageRecord::default()
                };
                let create = CreateImageRequest { image: Some(record) };
                match containerd.images().create(containerd.request(create)).await {
                    Ok(_) => return Ok(()),
                    Err(status) => (status, Code::AlreadyExists),
                }
            }
        };
        if status.code() != expected {
            return Err(containerd.failed(format!("give the image the name {name}"), &status));
        }
    }
}
