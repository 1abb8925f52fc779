//! Content of a layer's snapshot: how its files are to be had.
//!
//! A layer's kind is known in one of two ways. A pull whose labels say it, and that can be served lazily, makes a record with the
//! content before any byte of it is fetched. All else is unpacked into the folder of the snapshot and recognised at Commit, by
//! the files that are there: overlaybd's layers are tars that hold `overlaybd.commit`, or `.turbo.ociv1` and `*.fs.meta`.

use std::fs;
use std::io::{self, Read as _};
use std::num::NonZeroUsize;
use std::path::Path;

use formats::archive::{EROFS_META_NAME, FS_META_NAME, GZIP_META_NAME, MARKER_NAME, SIDECAR_NAME};
use formats::oci::{Digest, ImageName, RegistryName};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use thiserror::Error;

use crate::labels::{LabelError, Labels, LayerLabels, PullLabels};

/// File of a native layer that was unpacked.
pub const COMMIT_NAME: &str = "overlaybd.commit";
/// File of a trace.
pub const TRACE_NAME: &str = "trace";

/// First bytes of the files that overlaybd puts into `overlaybd.commit`: a ZFile, and an LSMT layer.
const MAGICS: [&[u8; 8]; 2] = [b"ZFile\0\x01\0", b"LSMT\0\x01\x02\0"];

/// How the files of a layer are to be had.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum LayerContent {
    /// They are in the snapshot's folder, as overlayfs wants them.
    #[default]
    Plain,
    /// The blob of a native layer: in the snapshot's folder, or in a repository.
    Native {
        /// The blob in the repository; `None`: the folder has it.
        blob: Option<RepositoryBlob>,
    },
    /// File system metadata in the snapshot's folder; the data is in a blob of the repository.
    TurboOci {
        /// Repository of the data.
        repository: BlobRepository,
        /// Digest of the metadata's own blob, which names the content; `None`: the labels had none.
        blob: Option<Digest>,
        /// Digest of the blob with the data.
        target: Digest,
        /// True if that is gzip.
        is_gzip: bool,
    },
    /// A trace in the snapshot's folder, of the layers below.
    Acceleration,
    /// The daemon streams a plain image: this layer and all below it.
    Streamed(StreamedImage),
    /// Anything that this release does not know. It is kept as it is.
    #[serde(untagged)]
    Unknown(Map<String, Value>),
}

/// A repository of a registry.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct BlobRepository {
    /// Host with port, as in the image's name.
    pub host: String,
    /// Path of the repository.
    pub path: String,
}

/// A blob in a repository.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RepositoryBlob {
    /// Its repository.
    pub repository: BlobRepository,
    /// Its digest.
    pub digest: Digest,
    /// Its length in bytes.
    pub size: u64,
}

/// The lowest layers of an image that the daemon streams.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct StreamedImage {
    /// Name of the image, as the user wrote it.
    pub reference: String,
    /// Its manifest.
    pub manifest: Digest,
    /// Number of its lowest layers; `None`: all of them.
    pub layers: Option<NonZeroUsize>,
}

impl LayerContent {
    /// Name of the kind in messages, metrics and names of snapshots.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Plain => "plain",
            Self::Native { .. } => "native",
            Self::TurboOci { .. } => "turbo-oci",
            Self::Acceleration => "acceleration",
            Self::Streamed(_) => "streamed",
            Self::Unknown(_) => "unknown",
        }
    }

    /// Name of a kind that this release does not know.
    #[must_use]
    pub fn unknown_kind(&self) -> Option<&str> {
        match self {
            Self::Unknown(object) => {
                Some(object.get("kind").and_then(Value::as_str).unwrap_or("without a name"))
            }
            _ => None,
        }
    }

    /// True if the layer's files are shown by a device, and not by a folder.
    #[must_use]
    pub fn needs_device(&self) -> bool {
        !matches!(self, Self::Plain)
    }
}

impl BlobRepository {
    /// The repository of an image's name; `None` if it names no registry, or nothing.
    #[must_use]
    pub fn of(image: &str) -> Option<Self> {
        // containerd's clients write a digest behind the tag at times, which the parser accepts too.
        match image.parse().ok()? {
            ImageName::Registry(RegistryName { host, repository, .. }) => {
                Some(Self { host, path: repository })
            }
            ImageName::Layout(_) => None,
        }
    }
}

/// A layer that was unpacked and cannot be used.
#[derive(Debug, Error)]
pub enum LayerError {
    /// A file of the layer cannot be read.
    #[error("Cannot read {name} of the layer")]
    Read {
        /// Name of the file.
        name: &'static str,
        /// Answer of the system.
        #[source]
        source: io::Error,
    },
    /// Labels that contradict themselves.
    #[error("The layer has wrong labels")]
    Labels(#[source] LabelError),
    /// File system metadata came without its labels.
    #[error(
        "The layer is metadata of a TurboOCI image, and containerd did not say where its data is: no {missing}. \
         Let containerd pass annotations on (CRI: disable_snapshot_annotations = false; other clients: \
         exports.enable_remote_snapshot_annotations = \"true\" of the plugin), remove the image and pull it again; \
         or use turbobd rpull"
    )]
    Unlabelled {
        /// What is missing.
        missing: &'static str,
    },
}

/// Recognises what was unpacked into `files`; `prepared` are the labels that the pull began with, `committed` those that it
/// ended with.
///
/// # Errors
/// [`LayerError`]; the snapshot must not be committed then.
pub fn recognise(
    files: &Path,
    prepared: &Labels,
    committed: &Labels,
) -> Result<LayerContent, LayerError> {
    let mut labels = prepared.clone();
    labels.extend(committed.iter().map(|(key, value)| (key.clone(), value.clone())));
    let said = LayerLabels::of(&labels);
    let has = |name: &str| files.join(name).symlink_metadata().is_ok_and(|meta| meta.is_file());
    if let Ok(LayerLabels::Acceleration) = said
        && has(TRACE_NAME)
    {
        return Ok(LayerContent::Acceleration);
    }
    if has(MARKER_NAME) && (has(FS_META_NAME) || has(EROFS_META_NAME)) {
        return turbo(said.map_err(LayerError::Labels)?, &labels);
    }
    if has(COMMIT_NAME) && begins_as_layer(&files.join(COMMIT_NAME))? {
        return Ok(LayerContent::Native { blob: None });
    }
    // What the labels say and the files do not hold is an ordinary layer: its files are there.
    Ok(LayerContent::Plain)
}

fn turbo(said: LayerLabels, labels: &Labels) -> Result<LayerContent, LayerError> {
    let LayerLabels::TurboOci { blob, target, is_gzip } = said else {
        return Err(LayerError::Unlabelled { missing: "digest of the original layer" });
    };
    let image = PullLabels::of(labels).and_then(|pull| pull.image_ref);
    let repository = image.as_deref().and_then(BlobRepository::of);
    let repository = repository.ok_or(LayerError::Unlabelled { missing: "name of the image" })?;
    Ok(LayerContent::TurboOci { repository, blob, target, is_gzip })
}

/// True if a file has the beginning of a ZFile or of an LSMT layer.
fn begins_as_layer(path: &Path) -> Result<bool, LayerError> {
    let mut first = [0; 8];
    let read = fs::File::open(path).and_then(|mut file| file.read_exact(&mut first));
    match read {
        Ok(()) => Ok(MAGICS.iter().any(|magic| first == **magic)),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
        Err(source) => Err(LayerError::Read { name: COMMIT_NAME, source }),
    }
}

/// File system metadata of a TurboOCI layer that lies in `files`: erofs first if `erofs` is true.
#[must_use]
pub fn metadata_name(files: &Path, erofs: bool) -> Option<&'static str> {
    let order =
        if erofs { [EROFS_META_NAME, FS_META_NAME] } else { [FS_META_NAME, EROFS_META_NAME] };
    order.into_iter().find(|name| files.join(name).is_file())
}

/// Indexes of a TurboOCI layer's data that lie in `files`: overlaybd's, and turbobd's own.
#[must_use]
pub fn index_names(files: &Path) -> [Option<&'static str>; 2] {
    [GZIP_META_NAME, SIDECAR_NAME].map(|name| files.join(name).is_file().then_some(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_of_a_newer_release_survives_unchanged() {
        let text = r#"{"kind":"hologram","depth":3}"#;
        let content: LayerContent = serde_json::from_str(text).unwrap();
        assert_eq!(content.unknown_kind(), Some("hologram"));
        assert_eq!(serde_json::to_string(&content).unwrap(), text);
        let image = StreamedImage {
            reference: "reg.example/a:1".into(),
            manifest: Digest::of(b"m"),
            layers: NonZeroUsize::new(2),
        };
        for content in [LayerContent::Plain, LayerContent::Streamed(image)] {
            let text = serde_json::to_string(&content).unwrap();
            assert_eq!(serde_json::from_str::<LayerContent>(&text).unwrap(), content, "{text}");
        }
    }
    use crate::labels::{CRI_IMAGE_REF, REF};
    use formats::oci::annotations;
    use formats::oci::manifest::media;

    fn turbo_labels(target: &Digest) -> Labels {
        let pairs = [
            (annotations::TARGET_DIGEST, target.to_string()),
            (annotations::TARGET_MEDIA_TYPE, media::OCI_LAYER_GZIP.to_owned()),
        ];
        pairs.map(|(key, value)| (key.to_owned(), value)).into()
    }

    fn folder(files: &[(&str, &[u8])]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (name, bytes) in files {
            fs::write(dir.path().join(name), bytes).unwrap();
        }
        dir
    }

    #[test]
    fn a_meta_layer_is_recognised_by_its_files_and_tells_what_is_missing() {
        let dir = folder(&[(MARKER_NAME, b""), (FS_META_NAME, b"x")]);
        let target = Digest::of(b"t");
        let none = recognise(dir.path(), &Labels::new(), &Labels::new()).unwrap_err();
        assert!(none.to_string().contains("no digest of the original layer"), "{none}");
        let labels = turbo_labels(&target);
        let no_image = recognise(dir.path(), &labels, &Labels::new()).unwrap_err();
        assert!(no_image.to_string().contains("no name of the image"), "{no_image}");
        let mut prepared = labels.clone();
        prepared.insert(CRI_IMAGE_REF.into(), "reg.example:5000/team/app:1".into());
        prepared.insert(REF.into(), "sha256:0".into());
        // The labels of Prepare count where Commit repeats only some.
        let content = recognise(dir.path(), &prepared, &Labels::new()).unwrap();
        let repository =
            BlobRepository { host: "reg.example:5000".into(), path: "team/app".into() };
        let wanted = LayerContent::TurboOci { repository, blob: None, target, is_gzip: true };
        assert_eq!(content, wanted);
    }

    #[test]
    fn a_native_layer_is_recognised_by_the_beginning_of_its_file() {
        let none = Labels::new();
        for (bytes, native) in [
            (&b"ZFile\0\x01\0rest"[..], true),
            (b"LSMT\0\x01\x02\0rest", true),
            (b"a text of this name", false),
            (b"LSMT", false),
        ] {
            let dir = folder(&[(COMMIT_NAME, bytes)]);
            let content = recognise(dir.path(), &none, &none).unwrap();
            assert_eq!(content == LayerContent::Native { blob: None }, native, "{bytes:?}");
        }
    }

    #[test]
    fn an_ordinary_layer_stays_one_whatever_its_labels_claim() {
        let dir = folder(&[("etc", b"")]);
        let labels = turbo_labels(&Digest::of(b"t"));
        assert_eq!(recognise(dir.path(), &labels, &labels).unwrap(), LayerContent::Plain);
    }

    #[test]
    fn a_link_in_a_layer_is_no_file_of_overlaybd() {
        let outside = folder(&[("f", b"ZFile\0\x01\0")]);
        let dir = folder(&[]);
        std::os::unix::fs::symlink(outside.path().join("f"), dir.path().join(COMMIT_NAME)).unwrap();
        let none = Labels::new();
        assert_eq!(recognise(dir.path(), &none, &none).unwrap(), LayerContent::Plain);
    }
}
