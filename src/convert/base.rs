//! Converted layers from other conversions, as the lower part of a new image.
//!
//! The lowest layers of an image often belong to another image that was converted already, by this program or
//! by upstream's, to either format or to a mixture. Then only the layers on top are read and converted: the
//! filesystem is read back from the stack of the lower ones ([`formats::ext4::read`]) and continued. The
//! converted lower layers become part of the result unchanged.
//!
//! A check establishes that a converted layer stands for a source layer. A TurboOCI layer names its source's
//! digest. A native layer has the first half of its source's OCI chain id as its LSMT identity (spec turbooci
//! 4), which covers all layers below as well. A layer without identity cannot be checked, and is accepted
//! only from an image that the user named.

use std::sync::Arc;

use thiserror::Error;

use blobs::cache::Cache;
use disk::Disk;
use disk::image::{ImageError, native_identity, open_layers};
use disk::volume::VolumeSource;
use formats::ext4::{Image, ReadError, Tree};
use formats::lsmt::Uuid;
use formats::oci::annotations::{AnnotationError, LayerKind, split_acceleration};
use formats::oci::{Descriptor, Digest, ImageConfig, ImageConfigError, Manifest};
use registry::store::{ImageStore, StoreError};

/// Annotation of a converted manifest: the number of its lowest layers that were taken from another image.
pub const BASE: &str = "dev.turbobd.base";

/// Upstream's shared base layer, an empty ext4 that `convertor --mkfs=false` puts below all others: as a bare
/// `ZFile` and in a tar (spec turbooci 3.5 and 4).
const SHARED_BASE: [&str; 2] = [
    "sha256:c3a417552a6cf9ffa959b541850bab7d7f08f4255425bf8b48c85f7b36b378d9",
    "sha256:a8b5fca80efae55088290f3da8110d7742de55c2a378d5ab53226a483f390e21",
];

/// Cache of decoded data for reading back a filesystem, in bytes.
const CACHE: u64 = 64 << 20;

/// Reasons why an image's layers cannot lie below new ones.
#[derive(Debug, Error)]
pub enum BaseError {
    /// The image could not be read.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Its config is invalid.
    #[error("Its config cannot be used")]
    Config(#[source] ImageConfigError),
    /// The annotations of a layer contradict each other.
    #[error(transparent)]
    Annotation(#[from] AnnotationError),
    /// Its layers do not form a disk.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The disk's filesystem cannot be continued.
    #[error(transparent)]
    Ext4(#[from] ReadError),
    /// It belongs to another image.
    #[error("It has no layer in common with the image: {0}")]
    Other(String),
}

/// A converted image with layers that may be used.
#[derive(Clone)]
pub struct BaseImage {
    store: Arc<dyn ImageStore>,
    manifest: Manifest,
    /// Number of layers that may be used, from the lowest on.
    usable: usize,
    /// True if the user named it: a fault of it is then an error.
    asked: bool,
}

/// A layer of a base, as it stands in the new manifest.
#[derive(Clone)]
pub(super) struct BaseLayer {
    pub(super) descriptor: Descriptor,
    pub(super) diff_id: Digest,
    pub(super) from: Arc<dyn ImageStore>,
}

/// The lower part of an image, converted.
pub(super) struct Base {
    /// Lowest first.
    pub(super) layers: Vec<BaseLayer>,
    /// Number of source layers that these stand for.
    pub(super) covered: usize,
}

impl BaseImage {
    /// An image that the user named; all its layers may be used.
    pub(super) fn asked(store: Arc<dyn ImageStore>, manifest: Manifest) -> Self {
        Self { store, usable: manifest.layers.len(), manifest, asked: true }
    }

    /// An image that was found. If it was made by this program, only its layers from other conversions may be
    /// used by these checks; the others are known by their chains, which include the options.
    pub(super) fn found(store: Arc<dyn ImageStore>, manifest: Manifest, made_here: bool) -> Self {
        let below = manifest.annotations.get(BASE).and_then(|count| count.parse().ok());
        let usable = match (below, made_here) {
            (Some(below), true) => manifest.layers.len().min(below),
            (None, true) => 0,
            (_, false) => manifest.layers.len(),
        };
        Self { store, usable, manifest, asked: false }
    }

    /// The part of it that stands for the lowest of these source layers.
    fn matching(&self, sources: &[Digest], uuids: &[Uuid]) -> Result<Base, BaseError> {
        let (_, layers) = split_acceleration(&self.manifest.layers);
        let layers = &layers[..self.usable.min(layers.len())];
        let shared = layers
            .first()
            .is_some_and(|layer| SHARED_BASE.contains(&layer.digest.to_string().as_str()));
        let shared = usize::from(shared);
        let mut covered = 0;
        let mut differs = "it has no converted layers".to_owned();
        for (layer, (source, &uuid)) in layers[shared..].iter().zip(sources.iter().zip(uuids)) {
            let (same, found) = match LayerKind::of(layer)? {
                LayerKind::Turbo { target, .. } => {
                    (target == *source, format!("was made of {target}"))
                }
                LayerKind::Native => {
                    let found = native_identity(&*self.store, layer)?;
                    let unnamed = found == Uuid::NULL;
                    if unnamed && self.asked {
                        tracing::warn!(
                            "Layer {} has no identity; it is assumed to be made of {source}",
                            layer.digest
                        );
                    }
                    (found == uuid || unnamed && self.asked, format!("has the identity {found}"))
                }
                LayerKind::Plain => (false, "is not converted".to_owned()),
            };
            if !same {
                differs = format!(
                    "its layer {} {found}, and layer {covered} of the image is {source} (identity {uuid})",
                    layer.digest
                );
                break;
            }
            covered += 1;
        }
        if covered == 0 {
            return Err(BaseError::Other(differs));
        }
        let config = self.store.read_blob(&self.manifest.config)?;
        let config = ImageConfig::parse(&config).map_err(BaseError::Config)?;
        let ids = config.diff_ids();
        if ids.len() != self.manifest.layers.len() {
            let text =
                format!("its config lists {} layers, its manifest {}", ids.len(), layers.len());
            return Err(BaseError::Other(text));
        }
        let layers = layers[..shared + covered].iter().zip(ids).map(|(layer, &diff_id)| {
            BaseLayer { descriptor: layer.clone(), diff_id, from: self.store.clone() }
        });
        Ok(Base { layers: layers.collect(), covered })
    }
}

/// The best of these images for a new one of `sources`; `uuids` are the identities of native layers of those.
/// An image that the user did not name must cover more than `least` layers.
pub(super) fn choose(
    images: &[BaseImage],
    sources: &[Digest],
    uuids: &[Uuid],
    least: usize,
) -> Result<Option<Base>, BaseError> {
    let mut best: Option<Base> = None;
    let mut refused = None;
    let any_asked = images.iter().any(|image| image.asked);
    for image in images.iter().filter(|image| image.asked || !any_asked) {
        match image.matching(sources, uuids) {
            Ok(base) if !image.asked && base.covered <= least => {}
            Ok(base) if best.as_ref().is_some_and(|best| best.covered >= base.covered) => {}
            Ok(base) => best = Some(base),
            Err(error) if image.asked => refused = Some(error),
            Err(error) => tracing::debug!(%error, "a converted image is of no use as a base"),
        }
    }
    match (best, refused) {
        (None, Some(error)) => Err(error),
        (best, _) => Ok(best),
    }
}

/// Reads the filesystem back from these converted layers; `targets` has the original ones.
pub(super) fn read_back(
    layers: &[BaseLayer],
    targets: &dyn ImageStore,
) -> Result<(Tree, Image), BaseError> {
    let cache = Cache::new(CACHE, 2);
    let stack = layers.iter().map(|layer| (&*layer.from, &layer.descriptor));
    let disk: Disk = open_layers(stack, targets, cache)?.disk;
    Ok(formats::ext4::read(&VolumeSource(&disk), disk.mapped())?)
}
