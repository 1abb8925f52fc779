//! One manifest and its layers → a converted manifest.

use std::collections::BTreeMap;

use super::layer::{LayerSizes, TargetEncoding, build_layer};
use super::{ConvertError, ConvertOptions, Progress};
use crate::ext4::{Geometry, Identity, Image, Tree};
use crate::oci::manifest::media;
use crate::oci::{Descriptor, Digest, Document, ImageConfig, Manifest, annotations};
use crate::store::{ImageStore, StoredManifest};

/// A converted image, complete in memory and not yet published.
pub struct ConvertedImage {
    /// Media type of the new manifest.
    pub media_type: &'static str,
    /// The new manifest, as bytes to store.
    pub manifest: Vec<u8>,
    /// The edited config.
    pub config: Vec<u8>,
    /// The new layer blobs, bottom first.
    pub layers: Vec<Vec<u8>>,
    /// What happened, layer by layer.
    pub report: Vec<LayerReport>,
}

/// One layer of a conversion, for people.
#[derive(Clone, Debug, serde::Serialize)]
pub struct LayerReport {
    /// The original blob.
    pub source: String,
    /// The new blob.
    pub digest: String,
    /// Sizes in bytes.
    pub sizes: LayerSizes,
    /// Wall time of the pass in milliseconds.
    pub millis: u64,
}

/// Converts the image of `source`, bottom to top.
///
/// # Errors
/// [`ConvertError`], naming the layer.
pub fn convert_image(
    store: &dyn ImageStore,
    source: &StoredManifest,
    options: &ConvertOptions,
    progress: &dyn Progress,
) -> Result<ConvertedImage, ConvertError> {
    let broken = |what, digest, reason: String| ConvertError::Manifest { what, digest, reason };
    let manifest = match Document::parse(&source.bytes, Some(&source.media_type)) {
        Ok(Document::Manifest(manifest)) => manifest,
        Ok(Document::Index(_)) => {
            return Err(broken("Manifest", source.digest, "it is an index".into()));
        }
        Err(error) => return Err(broken("Manifest", source.digest, error.to_string())),
    };
    let config = store.read_blob(&manifest.config)?;

    let mut tree = Tree::new();
    let mut image = Image::new(Geometry { size: options.disk_size }, Identity::default())
        .map_err(ConvertError::Disk)?;
    let mut built = Vec::new();
    let mut report = Vec::new();
    for (number, layer) in manifest.layers.iter().enumerate() {
        let blob = store.open_blob(layer)?;
        let start = std::time::Instant::now();
        let layer_built = build_layer(blob, layer, &mut tree, &mut image, options, progress)
            .map_err(|error| ConvertError::Layer {
                number,
                digest: layer.digest,
                source: Box::new(error),
            })?;
        report.push(LayerReport {
            source: layer.digest.to_string(),
            digest: Digest::of(&layer_built.archive).to_string(),
            sizes: layer_built.sizes,
            millis: start.elapsed().as_millis() as u64,
        });
        built.push(layer_built);
    }

    let diff_ids: Vec<Digest> = built.iter().map(|layer| layer.diff_id).collect();
    let config = ImageConfig::parse(&config)
        .map_err(|error| broken("Config", manifest.config.digest, error.to_string()))?
        .with_diff_ids(&diff_ids);
    let types = Types::of(options);
    let descriptors = manifest
        .layers
        .iter()
        .zip(&built)
        .map(|(source, layer)| layer_descriptor(source, &layer.archive, layer.target, types))
        .collect();
    let manifest =
        write_manifest(source, manifest.annotations, types, &config, descriptors, options);
    Ok(ConvertedImage {
        media_type: types.manifest,
        manifest,
        config,
        layers: built.into_iter().map(|layer| layer.archive).collect(),
        report,
    })
}

/// Media types of the result.
#[derive(Clone, Copy)]
struct Types {
    manifest: &'static str,
    config: &'static str,
    layer: &'static str,
}

impl Types {
    fn of(options: &ConvertOptions) -> Self {
        if options.oci_types || options.referrer {
            Self {
                manifest: media::OCI_MANIFEST,
                config: media::OCI_CONFIG,
                layer: media::OCI_LAYER_GZIP,
            }
        } else {
            Self {
                manifest: media::DOCKER_MANIFEST,
                config: media::DOCKER_CONFIG,
                layer: media::DOCKER_LAYER_GZIP,
            }
        }
    }
}

/// The new layer's descriptor (spec turbooci 3.5).
fn layer_descriptor(
    source: &Descriptor,
    archive: &[u8],
    target: TargetEncoding,
    types: Types,
) -> Descriptor {
    let target_type = match (media::is_docker(&source.media_type), target) {
        (true, TargetEncoding::Gzip) => media::DOCKER_LAYER_GZIP,
        (true, TargetEncoding::Plain) => media::DOCKER_LAYER,
        (false, TargetEncoding::Gzip) => media::OCI_LAYER_GZIP,
        (false, TargetEncoding::Plain) => media::OCI_LAYER,
    };
    let mut layer = Descriptor::of(types.layer, archive);
    layer.annotations = annotations::turbo(&layer.digest, layer.size, &source.digest, target_type)
        .into_iter()
        .collect();
    layer
}

/// The new manifest.
fn write_manifest(
    source: &StoredManifest,
    mut notes: BTreeMap<String, String>,
    types: Types,
    config: &[u8],
    layers: Vec<Descriptor>,
    options: &ConvertOptions,
) -> Vec<u8> {
    if let Some(origin) = &options.origin {
        notes.insert(annotations::ORIGIN.to_owned(), origin.clone());
    }
    let manifest = Manifest {
        schema_version: 2,
        media_type: Some(types.manifest.to_owned()),
        artifact_type: options.referrer.then(|| annotations::ARTIFACT_TYPE_TURBO.to_owned()),
        config: Descriptor::of(types.config, config),
        layers,
        subject: options.referrer.then(|| subject(source)),
        annotations: notes,
        other: serde_json::Map::new(),
    };
    manifest.to_bytes()
}

/// The descriptor of what was converted.
pub(super) fn subject(source: &StoredManifest) -> Descriptor {
    Descriptor::new(&source.media_type, source.digest, source.bytes.len() as u64)
}
