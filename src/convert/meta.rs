//! From a plain image to its meta image.
//!
//! Users attach `app:v3`, not the name of a converted copy of it. So the meta image of a plain image is
//! searched in these places, the cheapest first:
//!
//! 1. the *local store*: an image layout directory of this host with meta images that were built here. Each
//!    has the tag `sha256-<digest of the plain manifest>`, the form of OCI's fallback tag;
//! 2. the image's own *index*, if it has one: an entry with this program's artifact type beside the plain
//!    manifest;
//! 3. the repository's *referrers* of the plain manifest (OCI 1.1), or, in a registry without that list, the
//!    index under the fallback tag `sha256-<digest>`;
//! 4. the usual *tag* of a converted image: the plain tag with one of [`TAG_SUFFIXES`].
//!
//! If there is none, it is built: the layers are streamed once, as by `turbobd convert`, and the result, one
//! percent of their size, is kept in the local store. With [`MetaImages::publish`] it is also pushed as a
//! referrer of the plain image, so that the next host finds it.
//!
//! A found image must match: each of its layers names the plain layer with its data, and all of them must be
//! the plain image's layers in their order. A tag that has moved, or an index that lists another build, is
//! skipped.
//!
//! That it matches is its own claim. Whether it is used at all is decided by the policy of the host, by what the user's
//! reference names, and by who vouches for the image ([`trust`]): a reference by digest shows exactly what the layers
//! contain. What is found and not used is reported with the result, and the image is built.
//!
//! * [`trust`]  the policy, as a table
//! * `places`   the places above
//! * `built`    records of what this host has built

mod built;
mod places;
pub mod trust;

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{FlockOperation, flock};
use thiserror::Error;

use crate::child::{self, Builder, Built, ChildError, meta_options};
use crate::image::convert_image;
use crate::{ConvertError, ConvertOptions, KnownLayers, Progress};
use formats::oci::annotations::{ARTIFACT_TYPE_TURBO, LayerKind};
use formats::oci::{Descriptor, Digest, ImageIndex, Manifest};
pub use places::TAG_SUFFIXES;
use places::{MetaCandidate, candidates};
use registry::signatures::Signers;
use registry::store::referrers::{self, fallback_tag};
use registry::store::{ImageStore, LayoutStore, StoreError, StoredManifest};
pub use trust::{MetaPlace, MetaReason, MetaTrust, NamedImage};

/// Reasons why a plain image has no meta image.
#[derive(Debug, Error)]
pub enum MetaError {
    /// Building it failed.
    #[error("Cannot build the meta image")]
    Build(#[source] Box<ConvertError>),
    /// Building it in a process of its own failed.
    #[error("Cannot build the meta image")]
    Child(#[source] Box<ChildError>),
    /// The local store, or the place to publish to, did not accept it.
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

/// Origin of a meta image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MetaOrigin {
    /// Built on this host before.
    Local,
    /// An entry of the image's index.
    Index,
    /// A referrer of the plain manifest.
    Referrer,
    /// The tag of a converted image.
    Tag,
    /// Built just now, because none was found.
    Built,
}

/// A meta image for a plain image.
pub struct MetaImage {
    /// The store of its manifest and layers.
    pub store: Arc<dyn ImageStore>,
    /// Its manifest as stored.
    pub stored: StoredManifest,
    /// The parsed manifest.
    pub manifest: Manifest,
    /// Its origin.
    pub found: MetaOrigin,
    /// Why it is used.
    pub reason: MetaReason,
    /// Others that were found before this one was built, and that nothing vouches for.
    pub passed_over: Vec<PassedOver>,
}

/// A meta image that was found, fits the plain image by its own claim, and is not used.
pub struct PassedOver {
    /// The store of its manifest and layers.
    pub store: Arc<dyn ImageStore>,
    /// Digest of its manifest.
    pub digest: Digest,
    /// The parsed manifest.
    pub manifest: Manifest,
}

/// Most images that are remembered as passed over: each is compared with the layers, which costs reading its metadata.
const MOST_PASSED_OVER: usize = 4;

/// A requested plain image.
pub struct Plain<'a> {
    /// The store of the image.
    pub store: &'a Arc<dyn ImageStore>,
    /// The requested tag, if any.
    pub tag: Option<&'a str>,
    /// True if the user's own reference is a digest. A digest that a program got for the user's tag is none.
    pub pinned: bool,
    /// The index from which its manifest was chosen, if any.
    pub index: Option<&'a ImageIndex>,
    /// Digests of that index and of those above it, the named one first.
    pub indexes: &'a [Digest],
    /// Its manifest as stored.
    pub stored: &'a StoredManifest,
    /// The parsed manifest.
    pub manifest: &'a Manifest,
}

/// True if a manifest is that of a plain image: none of its layers is an overlaybd layer.
#[must_use]
pub fn is_plain(manifest: &Manifest) -> bool {
    !manifest.layers.is_empty()
        && manifest.layers.iter().all(|layer| matches!(LayerKind::of(layer), Ok(LayerKind::Plain)))
}

/// True if a manifest has a layer whose data is elsewhere: then it is a meta image, or a mixture with one.
#[must_use]
pub fn is_meta(manifest: &Manifest) -> bool {
    manifest.layers.iter().any(|layer| matches!(LayerKind::of(layer), Ok(LayerKind::Turbo { .. })))
}

/// Search and building of meta images on this host.
#[derive(Clone, Debug)]
pub struct MetaImages {
    /// Directory of the local store; made with the first image.
    pub local: PathBuf,
    /// True if built images are pushed as referrers.
    pub publish: bool,
    /// Options of the conversion in this process; a child takes the defaults.
    pub options: ConvertOptions,
    /// The place of the conversion.
    pub builder: Builder,
    /// Which found images are used.
    pub trust: MetaTrust,
    /// The keys whose signatures count.
    pub signers: Signers,
}

impl MetaImages {
    /// The meta image of `plain`: found, or built.
    ///
    /// # Errors
    /// [`MetaError`]. A place that cannot be searched is only logged, because the meta image can always be
    /// built.
    pub fn of(&self, plain: &Plain<'_>, progress: &dyn Progress) -> Result<MetaImage, MetaError> {
        let mut passed_over = Vec::new();
        if let Some(image) = self.find(plain, &mut passed_over) {
            let MetaImage { found, reason, stored, .. } = &image;
            tracing::info!(?found, %reason, digest = %stored.digest, "meta image");
            if self.publish && image.found == MetaOrigin::Local {
                publish(plain, &image).map_err(|error| MetaError::Keep(Box::new(error)))?;
            }
            return Ok(image);
        }
        let built = self.build_from(plain, &**plain.store, progress)?;
        Ok(MetaImage { passed_over, ..built })
    }

    /// The meta image that this host builds for `plain`, or has built before. Its layers are read from `from`.
    ///
    /// # Errors
    /// [`MetaError`].
    pub fn build_from(
        &self,
        plain: &Plain<'_>,
        from: &dyn ImageStore,
        progress: &dyn Progress,
    ) -> Result<MetaImage, MetaError> {
        let store = LayoutStore::open_or_create(&self.local)
            .map_err(|error| MetaError::Keep(Box::new(error)))?;
        // Waits for another process that builds the same image; then the image is present.
        let _lock = Lock::take(&self.local, &plain.stored.digest)
            .map_err(|source| MetaError::Local { dir: self.local.clone(), source })?;
        match places::in_local_store(plain, &self.local) {
            Some(candidate) if candidate.place == MetaPlace::Built => {
                Ok(MetaImage::of(candidate, MetaReason::Built))
            }
            _ => self.build(plain, from, &(Arc::new(store) as _), progress),
        }
    }

    /// The first meta image that may be used. Those before it that may not are added to `passed_over`.
    fn find(&self, plain: &Plain<'_>, passed_over: &mut Vec<PassedOver>) -> Option<MetaImage> {
        for candidate in candidates(plain, &self.local) {
            let signed = || candidate.signed(&self.signers);
            match self.trust.reason(candidate.named, candidate.place, signed) {
                Some(reason) => return Some(MetaImage::of(candidate, reason)),
                None => {
                    tracing::warn!(
                        found = ?candidate.found,
                        digest = %candidate.stored.digest,
                        "A meta image of {} is not used: no key of turbobd.metaKeys has signed it, and turbobd.metaTrust is {}",
                        plain.stored.digest,
                        self.trust
                    );
                    if passed_over.len() < MOST_PASSED_OVER {
                        let MetaCandidate { store, stored, manifest, .. } = candidate;
                        passed_over.push(PassedOver { store, digest: stored.digest, manifest });
                    }
                }
            }
        }
        None
    }

    fn build(
        &self,
        plain: &Plain<'_>,
        from: &dyn ImageStore,
        store: &Arc<dyn ImageStore>,
        progress: &dyn Progress,
    ) -> Result<MetaImage, MetaError> {
        let keep = |error| MetaError::Keep(Box::new(error));
        let unfit = || MetaError::Local {
            dir: self.local.clone(),
            source: io::Error::other("the built meta image does not match the image"),
        };
        let built = match &self.builder {
            Builder::Here => {
                let (options, known) = (meta_options(&self.options), KnownLayers::default());
                let built = convert_image(from, plain.stored, &options, &known, progress)
                    .map_err(|error| MetaError::Build(Box::new(error)))?;
                let built = built.turbo.ok_or_else(unfit)?;
                built.put_blobs(&**store).map_err(keep)?;
                Built { media_type: built.media_type.to_owned(), bytes: built.manifest }
            }
            Builder::Child(program) => {
                child::build(program, from, plain.stored, plain.manifest, &**store)
                    .map_err(|error| MetaError::Child(Box::new(error)))?
            }
        };
        let Built { media_type, bytes } = built;
        let tag = fallback_tag(&plain.stored.digest);
        store.put_manifest(Some(&tag), &media_type, &bytes).map_err(keep)?;
        let stored = StoredManifest { media_type, digest: Digest::of(&bytes), bytes };
        let manifest = places::fits(plain, &stored).ok_or_else(unfit)?;
        built::keep(&self.local, &plain.stored.digest, &stored.digest)
            .map_err(|source| MetaError::Local { dir: self.local.clone(), source })?;
        let (store, found, reason) = (store.clone(), MetaOrigin::Built, MetaReason::Built);
        let passed_over = Vec::new();
        let image = MetaImage { store, stored, manifest, found, reason, passed_over };
        if self.publish {
            publish(plain, &image).map_err(keep)?;
        }
        Ok(image)
    }
}

/// Lock for building an image on this host.
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

impl MetaImage {
    fn of(candidate: MetaCandidate, reason: MetaReason) -> Self {
        let MetaCandidate { store, stored, manifest, found, .. } = candidate;
        Self { store, stored, manifest, found, reason, passed_over: Vec::new() }
    }
}

/// Pushes an image built here as a referrer of the plain image.
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

/// Default directory of the local store.
#[must_use]
pub fn default_dir() -> &'static Path {
    Path::new("/var/lib/turbobd/meta")
}
