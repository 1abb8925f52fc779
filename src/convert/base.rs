//! Converted layers of somebody else's making, as the lower part of a new image.
//!
//! The lowest layers of an image are often those of another that was converted already, by this program or
//! by upstream's, to either format or to a mixture. Then only the layers on top are read and converted:
//! the filesystem is read back from the stack of the lower ones ([`formats::ext4::read`]) and goes on from
//! there. The converted lower layers become part of the result as they are.
//!
//! That a converted layer stands for a source layer is not taken on trust. A TurboOCI layer names its
//! source's digest; a native one bears the first half of its source's OCI chain id as its LSMT identity
//! (spec turbooci 4), which covers all layers below as well. One without identity says nothing, and is
//! accepted only of an image that the user named.

use std::sync::Arc;

use thiserror::Error;

use blobs::cache::Cache;
use disk::Disk;
use disk::image::{ImageError, native_identity, open_layers};
use disk::volume::VolumeSource;
use formats::ext4::{Image, ReadError, Tree};
use formats::lsmt::Uuid;
use formats::oci::annotations::{AnnotationError, LayerKind, split_acceleration};
use formats::oci::{ConfigError, Descriptor, Digest, ImageConfig, Manifest};
use registry::store::{ImageStore, StoreError};

/// Annotation of a converted manifest: how many of its lowest layers were taken from elsewhere.
pub const BASE: &str = "dev.turbobd.base";

/// Upstream's shared base layer, an empty ext4 that `convertor --mkfs=false` puts below all others: as a bare
/// `ZFile` and in a tar (spec turbooci 3.5 and 4).
const SHARED_BASE: [&str; 2] = [
    "sha256:c3a417552a6cf9ffa959b541850bab7d7f08f4255425bf8b48c85f7b36b378d9",
    "sha256:a8b5fca80efae55088290f3da8110d7742de55c2a378d5ab53226a483f390e21",
];

/// Decoded data while a filesystem is read back, bytes.
const CACHE: u64 = 64 << 20;

/// Why an image's layers cannot lie below new ones.
#[derive(Debug, Error)]
pub enum BaseError {
    /// It could not be read.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Its config is none.
    #[error("Its config cannot be used")]
    Config(#[source] ConfigError),
    /// A layer contradicts itself.
    #[error(transparent)]
    Annotation(#[from] AnnotationError),
    /// Its layers make no disk.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The disk's filesystem cannot be continued.
    #[error(transparent)]
    Ext4(#[from] ReadError),
    /// Another image.
    #[error("It has no layer in common with the image: {0}")]
    Other(String),
}

/// A converted image whose layers may be used.
#[derive(Clone)]
pub struct BaseImage {
    store: Arc<dyn ImageStore>,
    manifest: Manifest,
    /// Layers that may be used, from the lowest on.
    usable: usize,
    /// Whether the user named it: then what is wrong with it is an error.
    asked: bool,
}

/// A layer of a base, as it goes into the new manifest.
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
    /// Source layers that these are.
    pub(super) covered: usize,
}

impl BaseImage {
    /// An image that the user named; all its layers may be used.
    pub(super) fn asked(store: Arc<dyn ImageStore>, manifest: Manifest) -> Self {
        Self { store, usable: manifest.layers.len(), manifest, asked: true }
    }

    /// An image that was found. Of one made here, only those layers may be used by their looks that
    /// are not made here: the others are known by their chains, options included.
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
                            "Layer {} does not say what it was made of; taken for {source}",
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

/// The best of these images for a new one of `sources`; `uuids` are the identities of native layers of
/// those. One that is not `asked` for must cover more than `least` layers.
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
