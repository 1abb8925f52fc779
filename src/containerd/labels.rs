//! Labels of snapshots: their names, and what they say.
//!
//! containerd turns the annotations of a layer's descriptor that begin with `containerd.io/snapshot/` into labels of the
//! request, and adds its own. They come from an image, so from strangers: a label that lies must lead to an error or to a layer
//! that is unpacked in the ordinary way, and to nothing else. Values are bounded by containerd (4096 bytes with the key).
//!
//! [`PullLabels`] is what a pull says of itself, [`LayerLabels`] what the layer is, [`OwnerMap`] who its files belong to in a
//! container. Sources of the names: containerd's `pkg/labels` and `core/snapshots`, overlaybd's `pkg/label`.

use std::collections::BTreeMap;

use formats::oci::Digest;
use formats::oci::annotations::{self, LEGACY_TARGET_DIGEST, LEGACY_TARGET_MEDIA_TYPE};
use formats::oci::manifest::media;
use sys::idmap::{IdRange, MOST_RANGES};
use thiserror::Error;

/// Labels of a snapshot or of a request.
pub type Labels = BTreeMap<String, String>;

/// Chain ID of the layer that a request is for; only a pull has it.
pub const REF: &str = "containerd.io/snapshot.ref";
/// Chain ID of the layer below (containerd 2.3).
pub const PARENT_CHAIN: &str = "containerd.io/snapshot/parent-chain-id";
/// Digest of the layer's uncompressed tar (containerd 2.4).
pub const DIFF_ID: &str = "containerd.io/snapshot/diff-id";
/// Name of the image, from turbobd's and overlaybd's `rpull`.
pub const IMAGE_REF: &str = "containerd.io/snapshot/image-ref";
/// Name of the image, from CRI, nerdctl and the transfer service.
pub const CRI_IMAGE_REF: &str = "containerd.io/snapshot/cri.image-ref";
/// Digest of the image's manifest.
pub const CRI_MANIFEST: &str = "containerd.io/snapshot/cri.manifest-digest";
/// Digest of the layer's blob.
pub const CRI_LAYER: &str = "containerd.io/snapshot/cri.layer-digest";
/// Digests of the layers from this one to the topmost, by commas; containerd cuts it where a label would be too long.
pub const CRI_LAYERS: &str = "containerd.io/snapshot/cri.image-layers";
/// Users of a container in a user namespace: `inside:outside:count`, by commas.
pub const UID_MAPPING: &str = "containerd.io/snapshot/uidmapping";
/// Its groups.
pub const GID_MAPPING: &str = "containerd.io/snapshot/gidmapping";
/// Kind of a container's writable layer: `dir` or `dev`; anything else is a folder of an overlay.
pub const WRITABLE: &str = "containerd.io/snapshot/overlaybd.writable";
/// `image`: the snapshot is a layer, although no pull made it.
pub const TYPE: &str = "containerd.io/snapshot/type";
/// Marks a snapshot whose data is not on this host.
pub const REMOTE: &str = "containerd.io/snapshot/remote";

/// Longest value of [`CRI_LAYERS`] that is certainly whole: containerd cuts at 4096 bytes together with the key, and a digest
/// with its comma has 72.
const WHOLE_LIST: usize = 4096 - CRI_LAYERS.len() - 72;

/// A label that contradicts itself.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum LabelError {
    /// A value that is not what its key promises.
    #[error("label {key} is {value:?}, which is no {what}")]
    Value {
        /// Key of the label.
        key: &'static str,
        /// Its value, or the beginning of it.
        value: String,
        /// What it should be.
        what: &'static str,
    },
    /// A key without the key that it needs.
    #[error("label {key} needs {missing} beside it")]
    Missing {
        /// Key of the label.
        key: &'static str,
        /// The key that is missing.
        missing: &'static str,
    },
}

fn wrong(key: &'static str, value: &str, what: &'static str) -> LabelError {
    LabelError::Value { key, value: value.chars().take(100).collect(), what }
}

/// The value of a label; an empty one is none.
fn text<'l>(labels: &'l Labels, key: &str) -> Option<&'l str> {
    labels.get(key).map(String::as_str).filter(|value| !value.is_empty())
}

fn digest(labels: &Labels, key: &'static str) -> Result<Option<Digest>, LabelError> {
    let parse = |value: &str| value.parse().map_err(|_| wrong(key, value, "digest"));
    text(labels, key).map(parse).transpose()
}

/// What a pull says about the layer that it wants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PullLabels {
    /// Chain ID of the layer and all below it.
    pub chain: String,
    /// Chain ID of the layer below, if containerd says it.
    pub parent_chain: Option<String>,
    /// Name of the image in its registry.
    pub image_ref: Option<String>,
    /// Digest of its manifest.
    pub manifest: Option<Digest>,
    /// Number of the layers from this one to the topmost, this one included, if it is known.
    pub remaining: Option<usize>,
}

impl PullLabels {
    /// What `labels` say; `None` if the request is no pull. A value that cannot be understood counts as absent: a pull must
    /// not fail because of it.
    #[must_use]
    pub fn of(labels: &Labels) -> Option<Self> {
        let own = |key| text(labels, key).map(str::to_owned);
        let layers = text(labels, CRI_LAYERS).filter(|list| list.len() <= WHOLE_LIST);
        Some(Self {
            chain: own(REF)?,
            parent_chain: own(PARENT_CHAIN),
            image_ref: own(IMAGE_REF).or_else(|| own(CRI_IMAGE_REF)),
            manifest: digest(labels, CRI_MANIFEST).ok().flatten(),
            remaining: layers.map(|list| list.split(',').count()),
        })
    }
}

/// What the annotations of a layer say it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LayerLabels {
    /// An ordinary tar.
    Plain,
    /// A layer of overlaybd with all its data.
    Native {
        /// Digest of its blob.
        blob: Digest,
        /// Bytes of its blob.
        size: u64,
    },
    /// File system metadata; the data is in another blob.
    TurboOci {
        /// Digest of the metadata's own blob, if it is given.
        blob: Option<Digest>,
        /// Digest of the blob with the data.
        target: Digest,
        /// True if that is gzip.
        is_gzip: bool,
    },
    /// A trace to prefetch by, and no layer.
    Acceleration,
}

impl LayerLabels {
    /// What `labels` say.
    ///
    /// # Errors
    /// [`LabelError`] if they contradict themselves.
    pub fn of(labels: &Labels) -> Result<Self, LabelError> {
        if text(labels, annotations::ACCELERATION_LAYER) == Some("yes") {
            return Ok(Self::Acceleration);
        }
        let blob = digest(labels, annotations::BLOB_DIGEST)?;
        let pairs = [
            (annotations::TARGET_DIGEST, annotations::TARGET_MEDIA_TYPE),
            (LEGACY_TARGET_DIGEST, LEGACY_TARGET_MEDIA_TYPE),
        ];
        for (key, media_key) in pairs {
            let Some(target) = digest(labels, key)? else { continue };
            let missing = LabelError::Missing { key, missing: media_key };
            let is_gzip = match text(labels, media_key).ok_or(missing)? {
                media::DOCKER_LAYER_GZIP | media::OCI_LAYER_GZIP => true,
                media::DOCKER_LAYER | media::OCI_LAYER => false,
                other => {
                    return Err(wrong(media_key, other, "media type of a tar or a gzip layer"));
                }
            };
            return Ok(Self::TurboOci { blob, target, is_gzip });
        }
        let version = text(labels, annotations::VERSION);
        if let Some(annotations::VERSION_TURBO | annotations::LEGACY_VERSION_TURBO) = version {
            let (key, missing) = (annotations::VERSION, annotations::TARGET_DIGEST);
            return Err(LabelError::Missing { key, missing });
        }
        let Some(blob) = blob else { return Ok(Self::Plain) };
        let key = annotations::BLOB_SIZE;
        let missing = LabelError::Missing { key: annotations::BLOB_DIGEST, missing: key };
        let size = text(labels, key).ok_or(missing)?;
        let size = size.parse().map_err(|_| wrong(key, size, "number of bytes"))?;
        Ok(Self::Native { blob, size })
    }
}

/// Owners of files as a container in a user namespace sees them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OwnerMap {
    /// Users.
    pub users: Vec<IdRange>,
    /// Groups.
    pub groups: Vec<IdRange>,
}

impl OwnerMap {
    /// The map that `labels` ask for; `None` if they ask for none.
    ///
    /// # Errors
    /// [`LabelError`] if one of the two is missing or is no mapping.
    pub fn of(labels: &Labels) -> Result<Option<Self>, LabelError> {
        let (key, missing) = match (text(labels, UID_MAPPING), text(labels, GID_MAPPING)) {
            (None, None) => return Ok(None),
            (Some(users), Some(groups)) => {
                let (users, groups) = (ranges(UID_MAPPING, users)?, ranges(GID_MAPPING, groups)?);
                return Ok(Some(Self { users, groups }));
            }
            (Some(_), None) => (UID_MAPPING, GID_MAPPING),
            (None, Some(_)) => (GID_MAPPING, UID_MAPPING),
        };
        Err(LabelError::Missing { key, missing })
    }

    /// User and group on the host that are 0 in the container; `None` if it has no such user or group.
    #[must_use]
    pub fn root(&self) -> Option<(u32, u32)> {
        let root = |ranges: &[IdRange]| {
            ranges.iter().find(|range| range.inside == 0).map(|range| range.outside)
        };
        Some((root(&self.users)?, root(&self.groups)?))
    }
}

fn ranges(key: &'static str, value: &str) -> Result<Vec<IdRange>, LabelError> {
    let fault = || wrong(key, value, "mapping inside:outside:count[,…]");
    let range = |part: &str| {
        let mut numbers = part.split(':').map(|number| number.parse::<u32>().ok());
        let mut next = || numbers.next().flatten();
        let (inside, outside, count) = (next()?, next()?, next().filter(|count| *count > 0)?);
        let fits = inside.checked_add(count).is_some() && outside.checked_add(count).is_some();
        (fits && numbers.next().is_none()).then_some(IdRange { inside, outside, count })
    };
    let found: Option<Vec<_>> = value.split(',').map(range).collect();
    found.filter(|found| found.len() <= MOST_RANGES).ok_or_else(fault)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(pairs: &[(&str, &str)]) -> Labels {
        pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn a_pull_names_its_image_by_either_label_and_prefers_the_one_of_rpull() {
        assert_eq!(PullLabels::of(&labels(&[(CRI_IMAGE_REF, "a/b:1")])), None);
        let pull = PullLabels::of(&labels(&[(REF, "sha256:1"), (CRI_IMAGE_REF, "a/b:1")])).unwrap();
        assert_eq!(pull.image_ref.as_deref(), Some("a/b:1"));
        let both = [(REF, "sha256:1"), (CRI_IMAGE_REF, "a/b:1"), (IMAGE_REF, "c/d:2")];
        let pull = PullLabels::of(&labels(&both)).unwrap();
        assert_eq!(pull.image_ref.as_deref(), Some("c/d:2"));
        assert_eq!((pull.manifest, pull.remaining), (None, None));
    }

    #[test]
    fn the_number_of_layers_is_known_only_of_a_list_that_was_not_cut() {
        let list = |count: usize| vec![Digest::of(b"x").to_string(); count].join(",");
        for (count, known) in [(1, Some(1)), (50, Some(50)), (56, None)] {
            let list = list(count);
            let pull = PullLabels::of(&labels(&[(REF, "c"), (CRI_LAYERS, &list)])).unwrap();
            assert_eq!(pull.remaining, known, "{count}");
        }
    }

    #[test]
    fn a_manifest_label_that_is_no_digest_is_as_none() {
        let pull = PullLabels::of(&labels(&[(REF, "c"), (CRI_MANIFEST, "md5:00")])).unwrap();
        assert_eq!(pull.manifest, None);
    }

    #[test]
    fn a_layer_is_what_its_labels_say_under_old_names_too() {
        let (blob, target) = (Digest::of(b"b").to_string(), Digest::of(b"t"));
        let of = |pairs: &[(&str, &str)]| LayerLabels::of(&labels(pairs));
        assert_eq!(of(&[]), Ok(LayerLabels::Plain));
        let native = [(annotations::BLOB_DIGEST, &*blob), (annotations::BLOB_SIZE, "77")];
        assert_eq!(of(&native), Ok(LayerLabels::Native { blob: Digest::of(b"b"), size: 77 }));
        assert_eq!(of(&[(annotations::ACCELERATION_LAYER, "yes")]), Ok(LayerLabels::Acceleration));
        let name = target.to_string();
        let keys = [
            (annotations::TARGET_DIGEST, annotations::TARGET_MEDIA_TYPE),
            (LEGACY_TARGET_DIGEST, LEGACY_TARGET_MEDIA_TYPE),
        ];
        for (key, media_key) in keys {
            let pairs = [(key, &*name), (media_key, media::OCI_LAYER_GZIP)];
            let turbo = LayerLabels::TurboOci { blob: None, target, is_gzip: true };
            assert_eq!(of(&pairs), Ok(turbo));
            let missing = LabelError::Missing { key, missing: media_key };
            assert_eq!(of(&pairs[..1]), Err(missing));
        }
    }

    #[test]
    fn labels_that_lie_are_refused() {
        let of = |pairs: &[(&str, &str)]| LayerLabels::of(&labels(pairs));
        let blob = Digest::of(b"b").to_string();
        for pairs in [
            vec![(annotations::BLOB_DIGEST, "sha256:xyz")],
            vec![(annotations::BLOB_DIGEST, &*blob)],
            vec![(annotations::BLOB_DIGEST, &*blob), (annotations::BLOB_SIZE, "-1")],
            vec![(annotations::VERSION, annotations::VERSION_TURBO)],
            vec![
                (annotations::TARGET_DIGEST, &*blob),
                (annotations::TARGET_MEDIA_TYPE, "text/html"),
            ],
        ] {
            assert!(of(&pairs).is_err(), "{pairs:?}");
        }
    }

    #[test]
    fn owners_are_mapped_by_whole_mappings_only() {
        let of = |users: &str, groups: &str| {
            OwnerMap::of(&labels(&[(UID_MAPPING, users), (GID_MAPPING, groups)]))
        };
        let map = of("0:65536:1000,1000:7:1", "0:70000:65536").unwrap().unwrap();
        assert_eq!(map.users[1], IdRange { inside: 1000, outside: 7, count: 1 });
        assert_eq!(map.root(), Some((65536, 70000)));
        assert_eq!(of("", ""), Ok(None));
        for bad in ["0:1", "0:1:0", "0:1:2:3", "a:b:c", "4294967295:0:2", "0:1:2,", ""] {
            assert!(of(bad, "0:1:1").is_err(), "{bad}");
        }
    }
}
