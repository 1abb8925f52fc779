//! From a plain image to the meta image that it is read through.
//!
//! People attach `app:v3`, not the name of some converted copy of it. So for a plain image the meta image
//! is looked for, where it costs least to look first:
//!
//! 1. the *local store*: an image layout directory of this host, with meta images that were built here,
//!    each under the tag `sha256-<digest of the plain manifest>` (the one of OCI's fallback);
//! 2. the image's own *index*, if it has one: an entry of our artifact type beside the plain manifest;
//! 3. the repository's *referrers* of the plain manifest (OCI 1.1), or, in a registry that has no such
//!    list, the index under the fallback tag `sha256-<digest>`;
//! 4. the *tag* that people give to a converted image: the plain tag with one of [`TAG_SUFFIXES`].
//!
//! If there is none, it is built: the layers are streamed once, as by `turbobd convert`, and the result,
//! one percent of them, is kept in the local store. With [`MetaImages::publish`] it is pushed as a
//! referrer of the plain image too, and the next host finds it.
//!
//! Whatever is found must fit: each of its layers names the plain layer that holds its data, and all of
//! them must be the plain image's layers in their order. A tag that moved on, or an index that lists
//! another build, is passed over.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{FlockOperation, flock};
use thiserror::Error;

use crate::image::{ConvertedImage, convert_image};
use crate::{ConvertError, ConvertOptions, KnownLayers, Progress};
use formats::oci::annotations::{ARTIFACT_TYPE_TURBO, LayerKind};
use formats::oci::{Descriptor, Digest, Document, Index, Manifest};
use registry::store::referrers::{self, fallback_tag};
use registry::store::{ImageStore, LayoutStore, Selector, StoreError, StoredManifest};

/// What people put behind a tag for its converted form: upstream's documentation and ours.
pub const TAG_SUFFIXES: [&str; 3] = ["_turbo", "-turbo", "_obd"];

/// Why a plain image has no meta image.
#[derive(Debug, Error)]
pub enum MetaError {
    /// Building it failed.
    #[error("Cannot build the meta image")]
    Build(#[source] Box<ConvertError>),
    /// The local store, or the place to publish to, did not take it.
    #[error("Cannot keep the meta image (see --meta-dir)")]
    Keep(#[source] Box<StoreError>),
    /// The directory of the local store cannot be used.
    #[error("Cannot use {dir} for meta images (see --meta-dir)", dir = dir.display())]
    Local {
        /// The directory.
        dir: PathBuf,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
}

/// Where a meta image came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// It was built here before.
    Local,
    /// An entry of the image's index.
    Index,
    /// A referrer of the plain manifest.
    Referrer,
    /// The tag of a converted image.
    Tag,
    /// It was not found, but built just now.
    Built,
}

/// A meta image for a plain image.
pub struct MetaImage {
    /// Where its manifest and layers are.
    pub store: Arc<dyn ImageStore>,
    /// Its manifest as stored.
    pub stored: StoredManifest,
    /// The same, parsed.
    pub manifest: Manifest,
    /// How it was come by.
    pub found: Found,
}

/// A plain image that was asked for.
pub struct Plain<'a> {
    /// Where it is.
    pub store: &'a Arc<dyn ImageStore>,
    /// The tag it was asked for by, if it was.
    pub tag: Option<&'a str>,
    /// The index that its manifest was chosen from, if any.
    pub index: Option<&'a Index>,
    /// Its manifest as stored.
    pub stored: &'a StoredManifest,
    /// The same, parsed.
    pub manifest: &'a Manifest,
}

/// Whether a manifest is that of a plain image: none of its layers is an overlaybd layer.
#[must_use]
pub fn is_plain(manifest: &Manifest) -> bool {
    !manifest.layers.is_empty()
        && manifest.layers.iter().all(|layer| matches!(LayerKind::of(layer), Ok(LayerKind::Plain)))
}

/// How meta images are come by on this host.
#[derive(Clone, Debug)]
pub struct MetaImages {
    /// Directory of the local store; made when something is kept.
    pub local: PathBuf,
    /// Whether what is built is pushed as a referrer.
    pub publish: bool,
    /// How to build.
    pub options: ConvertOptions,
}

impl MetaImages {
    /// The meta image of `plain`: found, or built.
    ///
    /// # Errors
    /// [`MetaError`]. That one place cannot be looked at is no error, only a line in the log: the
    /// meta image can always be built.
    pub fn of(&self, plain: &Plain<'_>, progress: &dyn Progress) -> Result<MetaImage, MetaError> {
        if let Some(image) = self.find(plain) {
            tracing::info!(found = ?image.found, digest = %image.stored.digest, "meta image");
            if self.publish && image.found == Found::Local {
                publish(plain, &image).map_err(|error| MetaError::Keep(Box::new(error)))?;
            }
            return Ok(image);
        }
        let keep = |error| MetaError::Keep(Box::new(error));
        let store = LayoutStore::open_or_create(&self.local).map_err(keep)?;
        // Whoever builds the same image at the same time is waited for; then it is here.
        let _lock = Lock::take(&self.local, &plain.stored.digest)
            .map_err(|source| MetaError::Local { dir: self.local.clone(), source })?;
        match self.in_local_store(plain) {
            Some(image) => Ok(image),
            None => self.build(plain, &(Arc::new(store) as Arc<dyn ImageStore>), progress),
        }
    }

    fn find(&self, plain: &Plain<'_>) -> Option<MetaImage> {
        self.in_local_store(plain)
            .or_else(|| in_index(plain))
            .or_else(|| among_referrers(plain))
            .or_else(|| by_tag(plain))
    }

    fn in_local_store(&self, plain: &Plain<'_>) -> Option<MetaImage> {
        if !self.local.join("index.json").exists() {
            return None;
        }
        let store = LayoutStore::open(&self.local)
            .inspect_err(|error| tracing::warn!(%error, "The local store is passed over"))
            .ok()?;
        let store: Arc<dyn ImageStore> = Arc::new(store);
        let stored = store.manifest(&Selector::Tag(fallback_tag(&plain.stored.digest))).ok()?;
        fitting(plain, &store, stored, Found::Local)
    }

    fn build(
        &self,
        plain: &Plain<'_>,
        store: &Arc<dyn ImageStore>,
        progress: &dyn Progress,
    ) -> Result<MetaImage, MetaError> {
        let keep = |error| MetaError::Keep(Box::new(error));
        let options = ConvertOptions {
            oci_types: true,
            referrer: true,
            // The data are where the plain image is, wherever that is copied to.
            origin: None,
            turbo: true,
            native: None,
            ..self.options.clone()
        };
        let known = KnownLayers::default();
        let built = convert_image(&**plain.store, plain.stored, &options, &known, progress)
            .map_err(|error| MetaError::Build(Box::new(error)))?;
        let unfit = || MetaError::Local {
            dir: self.local.clone(),
            source: io::Error::other("what was built does not fit the image"),
        };
        let built = built.turbo.ok_or_else(unfit)?;
        put(&**store, Some(&fallback_tag(&plain.stored.digest)), &built).map_err(keep)?;
        let stored = StoredManifest {
            media_type: built.media_type.to_owned(),
            digest: Digest::of(&built.manifest),
            bytes: built.manifest,
        };
        let image = fitting(plain, store, stored, Found::Built).ok_or_else(unfit)?;
        if self.publish {
            publish(plain, &image).map_err(keep)?;
        }
        Ok(image)
    }
}

/// Says that an image is being built here.
struct Lock {
    path: PathBuf,
    _file: File,
}

impl Lock {
    fn take(dir: &Path, digest: &Digest) -> io::Result<Self> {
        let path = dir.join(format!("{}.lock", digest.hex()));
        let file = File::create(&path)?;
        flock(&file, FlockOperation::LockExclusive)?;
        Ok(Self { path, _file: file })
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

/// A manifest as a meta image of `plain`, if it is one.
fn fitting(
    plain: &Plain<'_>,
    store: &Arc<dyn ImageStore>,
    stored: StoredManifest,
    found: Found,
) -> Option<MetaImage> {
    let Ok(Document::Manifest(manifest)) = Document::parse(&stored.bytes, Some(&stored.media_type))
    else {
        return None;
    };
    let targets = manifest.layers.iter().map(|layer| match LayerKind::of(layer) {
        Ok(LayerKind::Turbo { target, .. }) => Some(target),
        _ => None,
    });
    let fits = targets.eq(plain.manifest.layers.iter().map(|layer| Some(layer.digest)));
    fits.then(|| MetaImage { store: store.clone(), stored, manifest, found })
}

/// Looks at those entries of an index that call themselves meta images.
fn among(plain: &Plain<'_>, entries: &[Descriptor], found: Found) -> Option<MetaImage> {
    let turbo = entries.iter().filter(|entry| {
        entry.artifact_type.as_deref() == Some(ARTIFACT_TYPE_TURBO)
            && entry.digest != plain.stored.digest
    });
    turbo
        .filter_map(|entry| plain.store.manifest(&Selector::Digest(entry.digest)).ok())
        .find_map(|stored| fitting(plain, plain.store, stored, found))
}

fn in_index(plain: &Plain<'_>) -> Option<MetaImage> {
    among(plain, &plain.index?.manifests, Found::Index)
}

fn among_referrers(plain: &Plain<'_>) -> Option<MetaImage> {
    let listed = referrers::list(&**plain.store, &plain.stored.digest)
        .inspect_err(|error| tracing::debug!(%error, "The referrers cannot be listed"))
        .ok()?;
    among(plain, &listed, Found::Referrer)
}

fn by_tag(plain: &Plain<'_>) -> Option<MetaImage> {
    let tag = plain.tag?;
    TAG_SUFFIXES.iter().find_map(|suffix| {
        let stored = plain.store.manifest(&Selector::Tag(format!("{tag}{suffix}"))).ok()?;
        let stored = match Document::parse(&stored.bytes, Some(&stored.media_type)).ok()? {
            Document::Manifest(_) => stored,
            Document::Index(index) => {
                let host = index.select(&formats::oci::Platform::host()).ok()?.digest;
                plain.store.manifest(&Selector::Digest(host)).ok()?
            }
        };
        fitting(plain, plain.store, stored, Found::Tag)
    })
}

/// Blobs first, the manifest last: whoever sees it sees a whole image.
fn put(
    store: &dyn ImageStore,
    tag: Option<&str>,
    built: &ConvertedImage,
) -> Result<(), StoreError> {
    built.put_blobs(store)?;
    store.put_manifest(tag, built.media_type, &built.manifest)
}

/// Pushes what was built here beside the plain image, as a referrer of it.
fn publish(plain: &Plain<'_>, built: &MetaImage) -> Result<(), StoreError> {
    let store = &**plain.store;
    for blob in built.manifest.layers.iter().chain([&built.manifest.config]) {
        store.put_blob(&built.store.read_blob(blob)?)?;
    }
    store.put_manifest(None, &built.stored.media_type, &built.stored.bytes)?;
    let mut entry = Descriptor::of(&built.stored.media_type, &built.stored.bytes);
    entry.artifact_type = Some(ARTIFACT_TYPE_TURBO.to_owned());
    referrers::add(store, &plain.stored.digest, entry, |_| false)
}

/// The local store's place when nobody names one.
#[must_use]
pub fn default_dir() -> &'static Path {
    Path::new("/var/lib/turbobd/meta")
}
