//! Manifest, index and descriptor, in the media types of OCI and of Docker (schema 2).
//!
//! The two families differ only in their media types. A document may omit its media type (OCI once told
//! writers to do so); then its fields decide. A document that is both a manifest and an index is refused,
//! whatever its media type: two readers could see two images.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use thiserror::Error;

use crate::oci::annotations::DOCKER_REFERENCE_TYPE;
use crate::oci::digest::Digest;

/// Largest manifest, index or config that is read: 4 MiB, the size that the distribution specification asks
/// registries to accept.
pub const DOCUMENT_LIMIT: u64 = 4 << 20;

/// Media types.
#[allow(missing_docs)]
pub mod media {
    pub const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
    pub const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
    pub const OCI_CONFIG: &str = "application/vnd.oci.image.config.v1+json";
    pub const OCI_LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
    pub const OCI_LAYER_GZIP: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
    pub const OCI_LAYER_ZSTD: &str = "application/vnd.oci.image.layer.v1.tar+zstd";
    pub const OCI_EMPTY: &str = "application/vnd.oci.empty.v1+json";
    pub const DOCKER_INDEX: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
    pub const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
    pub const DOCKER_SCHEMA1: &str = "application/vnd.docker.distribution.manifest.v1+json";
    pub const DOCKER_SCHEMA1_SIGNED: &str =
        "application/vnd.docker.distribution.manifest.v1+prettyjws";
    pub const DOCKER_CONFIG: &str = "application/vnd.docker.container.image.v1+json";
    pub const DOCKER_LAYER: &str = "application/vnd.docker.image.rootfs.diff.tar";
    pub const DOCKER_LAYER_GZIP: &str = "application/vnd.docker.image.rootfs.diff.tar.gzip";
    pub const DOCKER_LAYER_ZSTD: &str = "application/vnd.docker.image.rootfs.diff.tar.zstd";

    /// The media types to request from a registry: every document that this program reads.
    pub const ACCEPTED: [&str; 4] = [OCI_INDEX, OCI_MANIFEST, DOCKER_INDEX, DOCKER_MANIFEST];

    /// True for a media type of Docker.
    #[must_use]
    pub fn is_docker(media_type: &str) -> bool {
        media_type.starts_with("application/vnd.docker.")
    }
}

/// Reasons to refuse a document.
#[derive(Debug, Error)]
pub enum ManifestError {
    /// Larger than [`DOCUMENT_LIMIT`].
    #[error("The document has {0} bytes; at most {DOCUMENT_LIMIT} are read")]
    Large(u64),
    /// A document that is not JSON, or lacks the fields of its kind.
    #[error("The document is not a valid {what}")]
    Json {
        /// Manifest or index.
        what: &'static str,
        /// Position and reason.
        #[source]
        source: serde_json::Error,
    },
    /// Docker's first format, which has no digests of layers.
    #[error(
        "The image has a manifest of Docker's schema 1, which no registry should serve any more; push it again with a current tool"
    )]
    Schema1,
    /// Neither a manifest nor an index, or both.
    #[error("The document is {0}")]
    Kind(String),
    /// No manifest of the index matches.
    #[error("The image has no manifest for {wanted}; it has {found}")]
    NoPlatform {
        /// The requested platform.
        wanted: String,
        /// The platforms of the index.
        found: String,
    },
}

/// A reference to a blob in another document.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Descriptor {
    /// Media type of the blob.
    pub media_type: String,
    /// Digest of the blob.
    #[serde(with = "digest_text")]
    pub digest: Digest,
    /// Length of the blob in bytes.
    pub size: u64,
    /// Other addresses of the blob.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub urls: Vec<String>,
    /// Annotations.
    #[serde(
        default,
        skip_serializing_if = "BTreeMap::is_empty",
        deserialize_with = "null_is_empty"
    )]
    pub annotations: BTreeMap<String, String>,
    /// The platform of an image in an index.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub platform: Option<Platform>,
    /// Kind of artifact that the manifest describes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub artifact_type: Option<String>,
    /// Fields that this program does not know.
    #[serde(flatten)]
    pub other: Map<String, Value>,
}

impl Descriptor {
    /// A descriptor with the required fields only.
    #[must_use]
    pub fn new(media_type: &str, digest: Digest, size: u64) -> Self {
        Self {
            media_type: media_type.to_owned(),
            digest,
            size,
            urls: Vec::new(),
            annotations: BTreeMap::new(),
            platform: None,
            artifact_type: None,
            other: Map::new(),
        }
    }

    /// The descriptor of these bytes.
    #[must_use]
    pub fn of(media_type: &str, bytes: &[u8]) -> Self {
        Self::new(media_type, Digest::of(bytes), bytes.len() as u64)
    }

    /// True for a statement about an image (a build attestation). Such manifests stand in an index beside the
    /// images, with the platform unknown/unknown.
    #[must_use]
    pub fn is_attestation(&self) -> bool {
        self.annotations.contains_key(DOCKER_REFERENCE_TYPE)
    }

    /// True if this names an index or list of manifests.
    #[must_use]
    pub fn is_index(&self) -> bool {
        matches!(self.media_type.as_str(), media::OCI_INDEX | media::DOCKER_INDEX)
    }
}

/// The manifest of one image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Manifest {
    /// Always 2.
    pub schema_version: u32,
    /// Media type, if present.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub media_type: Option<String>,
    /// Kind of artifact, if this is not an image.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub artifact_type: Option<String>,
    /// The image config.
    pub config: Descriptor,
    /// The layers, lowest first.
    pub layers: Vec<Descriptor>,
    /// The manifest that this one is about (a referrer).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subject: Option<Descriptor>,
    /// Annotations.
    #[serde(
        default,
        skip_serializing_if = "BTreeMap::is_empty",
        deserialize_with = "null_is_empty"
    )]
    pub annotations: BTreeMap<String, String>,
    /// Fields that this program does not know.
    #[serde(flatten)]
    pub other: Map<String, Value>,
}

/// Several images under one name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ImageIndex {
    /// Always 2.
    pub schema_version: u32,
    /// Media type, if present.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub media_type: Option<String>,
    /// Kind of artifact, if the index holds no images.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub artifact_type: Option<String>,
    /// The images.
    pub manifests: Vec<Descriptor>,
    /// The manifest that this index is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subject: Option<Descriptor>,
    /// Annotations.
    #[serde(
        default,
        skip_serializing_if = "BTreeMap::is_empty",
        deserialize_with = "null_is_empty"
    )]
    pub annotations: BTreeMap<String, String>,
    /// Fields that this program does not know.
    #[serde(flatten)]
    pub other: Map<String, Value>,
}

/// Documents that a name can lead to.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(clippy::large_enum_variant)] // only one exists at a time
pub enum Document {
    /// One image.
    Manifest(Manifest),
    /// Several images.
    Index(ImageIndex),
}

impl Document {
    /// Reads a manifest or an index. `media_type` is the type given by the descriptor or the registry, if
    /// any.
    ///
    /// # Errors
    /// [`ManifestError`].
    pub fn parse(bytes: &[u8], media_type: Option<&str>) -> Result<Self, ManifestError> {
        if bytes.len() as u64 > DOCUMENT_LIMIT {
            return Err(ManifestError::Large(bytes.len() as u64));
        }
        let value: Value = serde_json::from_slice(bytes)
            .map_err(|source| ManifestError::Json { what: "JSON text", source })?;
        let own = value.get("mediaType").and_then(Value::as_str).filter(|text| !text.is_empty());
        // A registry may add parameters: `…+json; charset=utf-8`.
        let given = media_type.and_then(|text| text.split(';').next()).map(str::trim);
        let is_index = match own.or(given.filter(|given| is_known(given))) {
            Some(media::OCI_INDEX | media::DOCKER_INDEX) => true,
            Some(media::OCI_MANIFEST | media::DOCKER_MANIFEST) => false,
            Some(media::DOCKER_SCHEMA1 | media::DOCKER_SCHEMA1_SIGNED) => {
                return Err(ManifestError::Schema1);
            }
            Some(other) => {
                return Err(ManifestError::Kind(format!(
                    "of the media type {other:?}, which is not an image"
                )));
            }
            None if value.get("schemaVersion") == Some(&Value::from(1)) => {
                return Err(ManifestError::Schema1);
            }
            None => value.get("manifests").is_some(),
        };
        let has = |field: &str| value.get(field).is_some();
        if has("fsLayers") && value.get("schemaVersion") == Some(&Value::from(1)) {
            return Err(ManifestError::Schema1);
        }
        if has("manifests") && (has("layers") || has("config")) || has("fsLayers") {
            return Err(ManifestError::Kind("a manifest and an index at once".to_owned()));
        }
        let json = |what| move |source| ManifestError::Json { what, source };
        let (document, version) = if is_index {
            let index: ImageIndex = serde_json::from_value(value).map_err(json("index"))?;
            let version = index.schema_version;
            (Self::Index(index), version)
        } else {
            let manifest: Manifest = serde_json::from_value(value).map_err(json("manifest"))?;
            let version = manifest.schema_version;
            (Self::Manifest(manifest), version)
        };
        match version {
            2 => Ok(document),
            version => Err(ManifestError::Kind(format!("of the unknown schema version {version}"))),
        }
    }
}

fn is_known(media_type: &str) -> bool {
    media::ACCEPTED.contains(&media_type)
        || matches!(media_type, media::DOCKER_SCHEMA1 | media::DOCKER_SCHEMA1_SIGNED)
}

impl Manifest {
    /// The bytes to store: compact JSON, always equal for equal manifests.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        compact(self)
    }

    /// The media type; if the manifest has none, that of the config's family.
    #[must_use]
    pub fn media_type(&self) -> &str {
        let guess = || {
            if self.config.media_type == media::DOCKER_CONFIG {
                media::DOCKER_MANIFEST
            } else {
                media::OCI_MANIFEST
            }
        };
        self.media_type.as_deref().unwrap_or_else(guess)
    }
}

impl ImageIndex {
    /// An OCI index of these manifests.
    #[must_use]
    pub fn of(manifests: Vec<Descriptor>) -> Self {
        Self {
            schema_version: 2,
            media_type: Some(media::OCI_INDEX.to_owned()),
            artifact_type: None,
            manifests,
            subject: None,
            annotations: BTreeMap::new(),
            other: Map::new(),
        }
    }

    /// The bytes to store: compact JSON, always equal for equal indexes.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        compact(self)
    }

    /// The media type; OCI's if the index has none.
    #[must_use]
    pub fn media_type(&self) -> &str {
        self.media_type.as_deref().unwrap_or(media::OCI_INDEX)
    }

    /// The images: all manifests that are not attestations.
    pub fn images(&self) -> impl Iterator<Item = &Descriptor> {
        self.manifests.iter().filter(|manifest| !manifest.is_attestation())
    }

    /// The manifest for a machine of this platform. Of the manifests that it can run, the closest; of several
    /// equally close ones, the first.
    ///
    /// A single image without a platform is accepted for every platform: no other choice exists.
    ///
    /// # Errors
    /// [`ManifestError::NoPlatform`], which lists the platforms of the index.
    pub fn select(&self, wanted: &Platform) -> Result<&Descriptor, ManifestError> {
        let rank =
            |image: &&Descriptor| image.platform.as_ref().and_then(|offer| wanted.distance(offer));
        let ranked = self.images().filter_map(|image| Some((rank(&image)?, image)));
        if let Some((_, image)) = ranked.min_by_key(|(rank, _)| *rank) {
            return Ok(image);
        }
        let images: Vec<_> = self.images().collect();
        if let [only] = images[..]
            && only.platform.is_none()
        {
            return Ok(only);
        }
        let names: Vec<String> = images
            .iter()
            .map(|image| image.platform.as_ref().map_or("unnamed".to_owned(), Platform::to_string))
            .collect();
        let found = if names.is_empty() { "no image".to_owned() } else { names.join(", ") };
        Err(ManifestError::NoPlatform { wanted: wanted.to_string(), found })
    }
}

/// Strings and numbers always have a JSON form, so this cannot fail.
fn compact(document: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(document).unwrap_or_default()
}

/// Platform that an image runs on.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Platform {
    /// Processor, in Go's spelling.
    pub architecture: String,
    /// Operating system, in Go's spelling.
    pub os: String,
    /// Version of the processor: `v8` of arm64, `v3` of amd64.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub variant: Option<String>,
    /// Fields that this program does not know (`os.version`, `os.features`).
    #[serde(flatten)]
    pub other: Map<String, Value>,
}

impl Platform {
    /// The platform that this program was built for, with the base variant.
    #[must_use]
    pub fn host() -> Self {
        let (architecture, variant) = match std::env::consts::ARCH {
            "x86_64" => ("amd64", None),
            "x86" => ("386", None),
            "aarch64" => ("arm64", None),
            "arm" => ("arm", Some("v7")),
            "powerpc64" if cfg!(target_endian = "little") => ("ppc64le", None),
            "powerpc64" => ("ppc64", None),
            "loongarch64" => ("loong64", None),
            other => (other, None),
        };
        Self::new("linux", architecture, variant)
    }

    /// A platform.
    #[must_use]
    pub fn new(os: &str, architecture: &str, variant: Option<&str>) -> Self {
        let (os, architecture) = (os.to_owned(), architecture.to_owned());
        Self { architecture, os, variant: variant.map(str::to_owned), other: Map::new() }
    }

    /// Distance between an offered platform and this machine: 0 is an exact match, `None` means that the
    /// image does not run. Images for older variants run; the newest of them is closest.
    fn distance(&self, offer: &Self) -> Option<u32> {
        if (&self.os, &self.architecture) != (&offer.os, &offer.architecture) {
            return None;
        }
        self.level()?.checked_sub(offer.level()?)
    }

    /// The variant as a number.
    fn level(&self) -> Option<u32> {
        match (self.architecture.as_str(), self.variant.as_deref()) {
            ("arm64", None | Some("")) => Some(8),
            ("arm", None | Some("")) => Some(7),
            (_, None | Some("")) => Some(1),
            (_, Some(variant)) => variant.strip_prefix('v')?.split('.').next()?.parse().ok(),
        }
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        self.variant.iter().try_for_each(|variant| write!(f, "/{variant}"))
    }
}

/// Writes and reads a digest as a JSON string.
mod digest_text {
    use serde::{Deserialize as _, Deserializer, Serializer, de};

    use crate::oci::digest::Digest;

    pub(super) fn serialize<S: Serializer>(
        digest: &Digest,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.collect_str(digest)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Digest, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

/// Go writes `null` for an empty map that was never allocated.
fn null_is_empty<'de, D: serde::Deserializer<'de>>(
    deserializer: D,
) -> Result<BTreeMap<String, String>, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn descriptor(media_type: &str, extra: &str) -> String {
        let digest = Digest::of(extra.as_bytes());
        format!(r#"{{"mediaType":"{media_type}","digest":"{digest}","size":7{extra}}}"#)
    }

    fn manifest(media_type: &str) -> String {
        let (config, layer) = (
            descriptor(media::DOCKER_CONFIG, ""),
            descriptor(media::DOCKER_LAYER_GZIP, r#","x":[1]"#),
        );
        format!(
            r#"{{"schemaVersion":2{media_type},"config":{config},"layers":[{layer}],"unknown":{{"big":12345678901234567890}}}}"#
        )
    }

    fn index(platforms: &[&str]) -> ImageIndex {
        let entry = |platform: &&str| match *platform {
            "" => descriptor(media::OCI_MANIFEST, ""),
            "attestation" => descriptor(
                media::OCI_MANIFEST,
                r#","annotations":{"vnd.docker.reference.type":"attestation-manifest"},"platform":{"architecture":"unknown","os":"unknown"}"#,
            ),
            text => {
                let mut parts = text.split('/');
                let (os, architecture) = (parts.next().unwrap(), parts.next().unwrap());
                let variant = parts
                    .next()
                    .map_or(String::new(), |variant| format!(r#","variant":"{variant}""#));
                descriptor(
                    media::OCI_MANIFEST,
                    &format!(
                        r#","platform":{{"architecture":"{architecture}","os":"{os}"{variant}}}"#
                    ),
                )
            }
        };
        let manifests: Vec<String> = platforms.iter().map(entry).collect();
        let text = format!(r#"{{"schemaVersion":2,"manifests":[{}]}}"#, manifests.join(","));
        match Document::parse(text.as_bytes(), None).unwrap() {
            Document::Index(index) => index,
            Document::Manifest(_) => panic!("not an index"),
        }
    }

    /// Found by fuzzing: such a number becomes a float, and must not change with each rewriting.
    #[test]
    fn a_number_beyond_64_bits_in_an_unknown_field_reads_back_as_it_was_written() {
        let text = r#"{"schemaVersion":2,"manifests":[],"x":4444444444444444444444444444444444444444444444444444444444444442}"#;
        let Ok(Document::Index(index)) = Document::parse(text.as_bytes(), None) else { panic!() };
        let bytes = index.to_bytes();
        let Ok(Document::Index(again)) = Document::parse(&bytes, None) else { panic!() };
        assert_eq!(again.to_bytes(), bytes);
    }

    #[test]
    fn a_document_is_known_by_its_type_or_its_shape_and_keeps_unknown_fields() {
        let typed = format!(r#","mediaType":"{}""#, media::DOCKER_MANIFEST);
        for text in [manifest(""), manifest(&typed)] {
            let Document::Manifest(parsed) =
                Document::parse(text.as_bytes(), Some("application/json")).unwrap()
            else {
                panic!()
            };
            assert_eq!(parsed.media_type(), media::DOCKER_MANIFEST);
            assert_eq!(parsed.layers[0].other["x"], serde_json::json!([1]));
            assert_eq!(String::from_utf8(parsed.to_bytes()).unwrap(), text);
        }
    }

    #[test]
    fn documents_of_no_known_kind_are_refused() {
        let both = manifest("").replacen('{', r#"{"manifests":[],"#, 1);
        let error =
            |text: &str, media_type| Document::parse(text.as_bytes(), media_type).unwrap_err();
        assert!(matches!(error(&both, None), ManifestError::Kind(_)));
        assert!(matches!(
            error(r#"{"schemaVersion":1,"fsLayers":[]}"#, None),
            ManifestError::Schema1
        ));
        assert!(matches!(error("{}", Some(media::DOCKER_SCHEMA1_SIGNED)), ManifestError::Schema1));
        assert!(matches!(error("{", None), ManifestError::Json { .. }));
        assert!(matches!(
            error(&manifest(r#","mediaType":"text/html""#), None),
            ManifestError::Kind(_)
        ));
        assert!(matches!(
            error(&manifest("").replace("sha256:", "sha255:"), None),
            ManifestError::Json { .. }
        ));
        assert!(matches!(
            error(&manifest("").replace(":7", ":-7"), None),
            ManifestError::Json { .. }
        ));
        assert!(matches!(
            error(&" ".repeat(DOCUMENT_LIMIT as usize + 1), None),
            ManifestError::Large(_)
        ));
    }

    #[test]
    fn the_closest_platform_that_runs_is_chosen() {
        let amd64 = Platform::new("linux", "amd64", None);
        let all = index(&[
            "attestation",
            "linux/arm64/v8",
            "linux/amd64/v3",
            "linux/amd64",
            "linux/arm/v6",
            "linux/arm/v7",
            "windows/amd64",
        ]);
        let chosen =
            |wanted: &Platform| all.select(wanted).unwrap().platform.as_ref().unwrap().to_string();
        assert_eq!(chosen(&amd64), "linux/amd64");
        assert_eq!(chosen(&Platform::new("linux", "amd64", Some("v4"))), "linux/amd64/v3");
        assert_eq!(chosen(&Platform::new("linux", "arm64", None)), "linux/arm64/v8");
        assert_eq!(chosen(&Platform::new("linux", "arm", Some("v7"))), "linux/arm/v7");
        assert_eq!(chosen(&Platform::new("linux", "arm", Some("v6"))), "linux/arm/v6");
        let error =
            index(&["linux/s390x", "attestation", "linux/amd64/v3"]).select(&amd64).unwrap_err();
        assert_eq!(
            error.to_string(),
            "The image has no manifest for linux/amd64; it has linux/s390x, linux/amd64/v3"
        );
        assert!(index(&["", "attestation"]).select(&amd64).is_ok());
        assert!(index(&["", ""]).select(&amd64).is_err());
        assert_eq!(Platform::host().os, "linux");
    }
}
