//! One manifest and its layers → a converted manifest.

use serde_json::{Map, Value, json};

use super::layer::{LayerSizes, TargetEncoding, build_layer};
use super::{ConvertError, ConvertOptions, Progress};
use crate::ext4::{Geometry, Identity, Image, Tree};
use crate::oci::{self, Descriptor, Digest, Manifest, annotations, media_type};
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
    let manifest =
        Manifest::parse(&source.bytes).map_err(|error| broken("Manifest", source.digest, error.to_string()))?;
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
            .map_err(|source| ConvertError::Layer { number, digest: layer.digest, source })?;
        report.push(LayerReport {
            source: layer.digest.to_string(),
            digest: Digest::of(&layer_built.archive).to_string(),
            sizes: layer_built.sizes,
            millis: start.elapsed().as_millis() as u64,
        });
        built.push(layer_built);
    }

    let diff_ids: Vec<Digest> = built.iter().map(|layer| layer.diff_id).collect();
    let config = oci::config::with_diff_ids(&config, &diff_ids)
        .map_err(|error| broken("Config", manifest.config.digest, error.to_string()))?;
    let descriptors: Vec<Value> = manifest
        .layers
        .iter()
        .zip(&built)
        .map(|(source, layer)| layer_descriptor(source, &layer.archive, layer.target, options))
        .collect();
    let types = Types::of(options);
    let manifest = write_manifest(source, &manifest, types, &config, descriptors, options);
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
                manifest: media_type::OCI_MANIFEST,
                config: media_type::OCI_CONFIG,
                layer: media_type::OCI_LAYER_GZIP,
            }
        } else {
            Self {
                manifest: media_type::DOCKER_MANIFEST,
                config: media_type::DOCKER_CONFIG,
                layer: media_type::DOCKER_LAYER_GZIP,
            }
        }
    }
}

/// The new layer's descriptor (spec turbooci 3.5).
fn layer_descriptor(source: &Descriptor, archive: &[u8], target: TargetEncoding, options: &ConvertOptions) -> Value {
    let digest = Digest::of(archive).to_string();
    let docker_source = media_type::is_docker(&source.media_type);
    let target_type = match (docker_source, target) {
        (true, TargetEncoding::Gzip) => media_type::DOCKER_LAYER_GZIP,
        (true, TargetEncoding::Plain) => media_type::DOCKER_LAYER_TAR,
        (false, TargetEncoding::Gzip) => media_type::OCI_LAYER_GZIP,
        (false, TargetEncoding::Plain) => media_type::OCI_LAYER_TAR,
    };
    json!({
        "mediaType": Types::of(options).layer,
        "digest": digest,
        "size": archive.len(),
        "annotations": {
            annotations::VERSION: annotations::VERSION_TURBO,
            annotations::BLOB_DIGEST: digest,
            annotations::BLOB_SIZE: archive.len().to_string(),
            annotations::TARGET_DIGEST: source.digest.to_string(),
            annotations::TARGET_MEDIA_TYPE: target_type,
        },
    })
}

/// The new manifest: field order as upstream's converter writes it (spec turbooci 2).
fn write_manifest(
    source: &StoredManifest,
    manifest: &Manifest,
    types: Types,
    config: &[u8],
    layers: Vec<Value>,
    options: &ConvertOptions,
) -> Vec<u8> {
    let mut out = Map::new();
    out.insert("schemaVersion".into(), json!(2));
    out.insert("mediaType".into(), json!(types.manifest));
    if options.referrer {
        out.insert("artifactType".into(), json!(annotations::ARTIFACT_TYPE_TURBO));
    }
    out.insert(
        "config".into(),
        json!({"mediaType": types.config, "digest": Digest::of(config).to_string(), "size": config.len()}),
    );
    out.insert("layers".into(), Value::Array(layers));
    if options.referrer {
        out.insert("subject".into(), subject(source));
    }
    let mut notes = manifest.annotations.clone();
    if let Some(origin) = &options.origin {
        notes.insert(annotations::ORIGIN.into(), origin.clone());
    }
    if !notes.is_empty() {
        out.insert("annotations".into(), json!(notes));
    }
    Value::Object(out).to_string().into_bytes()
}

/// The descriptor of what was converted.
pub(super) fn subject(source: &StoredManifest) -> Value {
    json!({"mediaType": source.media_type, "digest": source.digest.to_string(), "size": source.bytes.len()})
}
