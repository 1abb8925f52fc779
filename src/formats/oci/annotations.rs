//! The annotations that mark a layer as an overlaybd layer (spec turbooci 3.5).
//!
//! The media type does not tell the kind of a layer: a TurboOCI layer has the media type of an ordinary gzip
//! layer, so that every registry stores it. Its annotations say what it is, and which original layer holds
//! its data.

use thiserror::Error;

use crate::oci::digest::{Digest, DigestError};
use crate::oci::manifest::{Descriptor, media};

/// Version of the layer format: [`VERSION_NATIVE`] or [`VERSION_TURBO`].
pub const VERSION: &str = "containerd.io/snapshot/overlaybd/version";
/// Digest of the layer blob itself.
pub const BLOB_DIGEST: &str = "containerd.io/snapshot/overlaybd/blob-digest";
/// Size of the layer blob itself, decimal.
pub const BLOB_SIZE: &str = "containerd.io/snapshot/overlaybd/blob-size";
/// Filesystem on a native layer that is not ext4.
pub const BLOB_FS_TYPE: &str = "containerd.io/snapshot/overlaybd/blob-fs-type";
/// Digest of the original layer that holds the data of a TurboOCI layer.
pub const TARGET_DIGEST: &str = "containerd.io/snapshot/overlaybd/turbo-oci/target-digest";
/// Media type of the original layer; it says if the layer is gzip.
pub const TARGET_MEDIA_TYPE: &str = "containerd.io/snapshot/overlaybd/turbo-oci/target-media-type";
/// `yes` on a topmost entry of the layers that is not a layer but a trace, the list of what a start reads
/// (spec runtime 8).
pub const ACCELERATION_LAYER: &str = "containerd.io/snapshot/overlaybd/acceleration-layer";
/// [`TARGET_DIGEST`] under the format's old name.
pub const LEGACY_TARGET_DIGEST: &str = "containerd.io/snapshot/overlaybd/fastoci/target-digest";
/// [`TARGET_MEDIA_TYPE`] under the format's old name.
pub const LEGACY_TARGET_MEDIA_TYPE: &str =
    "containerd.io/snapshot/overlaybd/fastoci/target-media-type";

/// Reference name of a manifest in an image layout (OCI image specification).
pub const REF_NAME: &str = "org.opencontainers.image.ref.name";
/// The full image name, added by containerd's export.
pub const CONTAINERD_IMAGE_NAME: &str = "io.containerd.image.name";
/// Marks a manifest of an index as a statement about an image (a build attestation), not an image.
pub const DOCKER_REFERENCE_TYPE: &str = "vnd.docker.reference.type";
/// Digest of the manifest that the statement is about.
pub const DOCKER_REFERENCE_DIGEST: &str = "vnd.docker.reference.digest";

/// [`VERSION`] of a layer that contains all its data.
pub const VERSION_NATIVE: &str = "0.1.0";
/// This project's key, on a manifest: the repository of the original layers, if the meta image was written to
/// another one.
pub const ORIGIN: &str = "dev.turbobd.origin";
/// `artifactType` of a TurboOCI image that names its original as `subject` (spec turbooci 2).
pub const ARTIFACT_TYPE_TURBO: &str = "application/vnd.containerd.overlaybd.turbo.v1+json";
/// `artifactType` of a native image that names its original as `subject` (spec turbooci 2).
pub const ARTIFACT_TYPE_NATIVE: &str = "application/vnd.containerd.overlaybd.native.v1+json";

/// [`VERSION`] of a layer that contains metadata only.
pub const VERSION_TURBO: &str = "0.1.0-turbo.ociv1";
/// [`VERSION_TURBO`] under the format's old name.
pub const LEGACY_VERSION_TURBO: &str = "0.1.0-fastoci";

/// Kinds of layers in a manifest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LayerKind {
    /// An ordinary tar, compressed or not.
    Plain,
    /// A native overlaybd layer.
    Native,
    /// A TurboOCI layer.
    Turbo {
        /// The original layer, in the same repository.
        target: Digest,
        /// Its media type.
        target_media_type: String,
        /// True if the media type of the original is not a plain tar; it then counts as gzip: see
        /// [`segments`](crate::segments).
        is_gzip: bool,
    },
}

/// Annotations that contradict themselves.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum AnnotationError {
    /// A TurboOCI layer without the digest of its original layer.
    #[error("Layer {layer} is a TurboOCI layer but has no annotation {key}")]
    Missing {
        /// The layer.
        layer: Digest,
        /// The missing key.
        key: &'static str,
    },
    /// A target that is not a digest.
    #[error("Layer {layer} has a bad annotation {TARGET_DIGEST}")]
    Target {
        /// The layer.
        layer: Digest,
        /// The fault in the digest.
        #[source]
        source: DigestError,
    },
    /// A target of a media type that the format does not know.
    #[error(
        "Layer {layer} has a target of the media type {media_type:?}, which is neither a tar nor a gzip layer"
    )]
    TargetMediaType {
        /// The layer.
        layer: Digest,
        /// The media type.
        media_type: String,
    },
    /// The annotation of a blob digest names another blob.
    #[error("Layer {layer} has the annotation {BLOB_DIGEST} of another blob: {found:?}")]
    BlobDigest {
        /// The layer.
        layer: Digest,
        /// Value of the annotation.
        found: String,
    },
}

/// The topmost layer if it is a trace to prefetch by and not a layer, and all other layers.
#[must_use]
pub fn split_acceleration(layers: &[Descriptor]) -> (Option<&Descriptor>, &[Descriptor]) {
    match layers.split_last() {
        Some((last, rest))
            if last.annotations.get(ACCELERATION_LAYER).is_some_and(|value| value == "yes") =>
        {
            (Some(last), rest)
        }
        _ => (None, layers),
    }
}

impl LayerKind {
    /// Kind of `layer` by its annotations.
    ///
    /// A target makes a TurboOCI layer. Otherwise a blob digest, which upstream's snapshotter looks for,
    /// makes a native one.
    ///
    /// # Errors
    /// [`AnnotationError`] if they contradict each other.
    pub fn of(layer: &Descriptor) -> Result<Self, AnnotationError> {
        let get = |key: &str| layer.annotations.get(key).map(String::as_str);
        let this = layer.digest;
        if let Some(found) = get(BLOB_DIGEST)
            && found != this.to_string()
        {
            return Err(AnnotationError::BlobDigest {
                layer: this,
                found: found.chars().take(100).collect(),
            });
        }
        let is_turbo = matches!(get(VERSION), Some(VERSION_TURBO | LEGACY_VERSION_TURBO));
        let target = get(TARGET_DIGEST).or_else(|| get(LEGACY_TARGET_DIGEST));
        let Some(target) = target else {
            return match (is_turbo, get(BLOB_DIGEST)) {
                (true, _) => Err(AnnotationError::Missing { layer: this, key: TARGET_DIGEST }),
                (false, Some(_)) => Ok(Self::Native),
                (false, None) => Ok(Self::Plain),
            };
        };
        let target =
            target.parse().map_err(|source| AnnotationError::Target { layer: this, source })?;
        let media_type = get(TARGET_MEDIA_TYPE).or_else(|| get(LEGACY_TARGET_MEDIA_TYPE));
        let media_type =
            media_type.ok_or(AnnotationError::Missing { layer: this, key: TARGET_MEDIA_TYPE })?;
        let is_gzip = match media_type {
            media::DOCKER_LAYER_GZIP | media::OCI_LAYER_GZIP => true,
            media::DOCKER_LAYER | media::OCI_LAYER => false,
            _ => {
                let media_type = media_type.chars().take(100).collect();
                return Err(AnnotationError::TargetMediaType { layer: this, media_type });
            }
        };
        Ok(Self::Turbo { target, target_media_type: media_type.to_owned(), is_gzip })
    }
}

/// The annotations of a new TurboOCI layer blob with this digest and size.
#[must_use]
pub fn turbo(
    blob: &Digest,
    size: u64,
    target: &Digest,
    target_media_type: &str,
) -> Vec<(String, String)> {
    let mut annotations = of_blob(VERSION_TURBO, blob, size);
    annotations.push((TARGET_DIGEST.to_owned(), target.to_string()));
    annotations.push((TARGET_MEDIA_TYPE.to_owned(), target_media_type.to_owned()));
    annotations
}

/// The annotations of a new native layer blob with this digest and size.
#[must_use]
pub fn native(blob: &Digest, size: u64) -> Vec<(String, String)> {
    of_blob(VERSION_NATIVE, blob, size)
}

fn of_blob(version: &str, blob: &Digest, size: u64) -> Vec<(String, String)> {
    let pairs = [
        (VERSION, version.to_owned()),
        (BLOB_DIGEST, blob.to_string()),
        (BLOB_SIZE, size.to_string()),
    ];
    pairs.map(|(key, value)| (key.to_owned(), value)).to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layer(annotations: Vec<(String, String)>) -> Descriptor {
        Descriptor {
            annotations: annotations.into_iter().collect(),
            ..Descriptor::new(media::OCI_LAYER_GZIP, Digest::of(b"l"), 1)
        }
    }

    #[test]
    fn a_layer_is_what_its_annotations_say() {
        let (blob, target) = (Digest::of(b"l"), Digest::of(b"t"));
        assert_eq!(LayerKind::of(&layer(vec![])), Ok(LayerKind::Plain));
        assert_eq!(LayerKind::of(&layer(native(&blob, 1))), Ok(LayerKind::Native));
        let turbo_kind = LayerKind::Turbo {
            target,
            target_media_type: media::DOCKER_LAYER_GZIP.to_owned(),
            is_gzip: true,
        };
        assert_eq!(
            LayerKind::of(&layer(turbo(&blob, 1, &target, media::DOCKER_LAYER_GZIP))),
            Ok(turbo_kind.clone())
        );
        let legacy = [
            (VERSION, LEGACY_VERSION_TURBO.to_owned()),
            (LEGACY_TARGET_DIGEST, target.to_string()),
            (LEGACY_TARGET_MEDIA_TYPE, media::DOCKER_LAYER_GZIP.to_owned()),
        ];
        assert_eq!(
            LayerKind::of(&layer(legacy.map(|(key, value)| (key.to_owned(), value)).to_vec())),
            Ok(turbo_kind)
        );
    }

    #[test]
    fn only_the_topmost_layer_can_be_a_trace() {
        let accelerates = |value: &str| layer(vec![(ACCELERATION_LAYER.into(), value.into())]);
        let (plain, trace) = (layer(vec![]), accelerates("yes"));
        let layers = [plain.clone(), trace.clone()];
        assert_eq!(split_acceleration(&layers), (Some(&trace), &layers[..1]));
        for layers in [vec![trace, plain.clone()], vec![plain, accelerates("no")], vec![]] {
            assert_eq!(split_acceleration(&layers), (None, &layers[..]));
        }
    }

    #[test]
    fn annotations_that_contradict_themselves_are_refused() {
        let (blob, target) = (Digest::of(b"l"), Digest::of(b"t"));
        let turbo = || turbo(&blob, 1, &target, media::OCI_LAYER_ZSTD);
        assert!(matches!(
            LayerKind::of(&layer(turbo())),
            Err(AnnotationError::TargetMediaType { .. })
        ));
        assert!(matches!(
            LayerKind::of(&layer(turbo()[..4].to_vec())),
            Err(AnnotationError::Missing { .. })
        ));
        assert!(matches!(
            LayerKind::of(&layer(turbo()[..3].to_vec())),
            Err(AnnotationError::Missing { .. })
        ));
        assert!(matches!(
            LayerKind::of(&layer(native(&target, 1))),
            Err(AnnotationError::BlobDigest { .. })
        ));
    }
}
