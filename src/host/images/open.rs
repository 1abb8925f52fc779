//! From an [`ImageSpec`] to an opened image.

use std::num::NonZeroUsize;
use std::path::Path;
use std::sync::Arc;

use blobs::cache::Cache;
use blobs::tier::TierBlob;
use client::{Code, ImageSource, ImageSpec, RegistrySpec};
use convert::child::Builder;
use convert::meta::{
    MetaError, MetaImages, MetaPlace, MetaReason, MetaTrust, NamedImage, Plain, is_meta, is_plain,
};
use convert::{ConvertOptions, Silent};
use disk::config::{self, DeviceDownload, Purpose, TargetOpener};
use disk::image::{
    HostManifest, ImageError, IndexedTargets, LayerInfo, OpenedImage, choose_manifest, open_image,
};
use disk::volume::VolumeSource;
use disk::writable::{WritableError, WritableFiles};
use disk::{Disk, DiskError};
use formats::ext4::{ImageKind, MountableError, check_mountable};
use formats::oci::annotations::{self, split_acceleration};
use formats::oci::{Digest, ImageName, Manifest, ReferenceError, RepositoryName};
use formats::trace::Trace;
use formats::units::Bytes;
use registry::store::{self, ImageStore, Selector, StoreError, StoredManifest};
use registry::{RegistryClient, RegistryError};
use source::ByteSource;
use source::chunk::{ChunkSource, SerialChunks};
use source::failure::with_causes;
use thiserror::Error;

use super::comparing::{ShownUnproved, Unproved};
use super::live::{FoundImage, LiveImages, LiveName};
use super::origin::{self, OriginError};
use super::registries::Registries;

/// Failure to open an image.
#[derive(Debug, Error)]
pub enum OpenError {
    /// The name is no name of an image.
    #[error(transparent)]
    Name(#[from] ReferenceError),
    /// The way to the registry cannot be set up.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// The registry or the layout does not deliver.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The image cannot be opened.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The image is a plain one, and has no meta image that can be used.
    #[error(transparent)]
    Meta(#[from] MetaError),
    /// The named meta image may not be used.
    #[error(
        "{digest} in {store} is a meta image that no key of turbobd.metaKeys has signed, and turbobd.metaTrust is signed: sign it with cosign, or name the plain image, from which this host builds its own"
    )]
    Unsigned {
        /// The named image.
        digest: Digest,
        /// Its store.
        store: String,
    },
    /// The meta image was compared with its layers, and a device still uses it.
    #[error("Meta image {digest} does not show what its layers contain: {reason}")]
    Different {
        /// The meta image.
        digest: Digest,
        /// The differences.
        reason: Arc<str>,
    },
    /// The device config, or a layer that it names, cannot be used.
    #[error(transparent)]
    Config(#[from] DiskError),
    /// The kernel must not mount the filesystem.
    #[error(transparent)]
    Filesystem(#[from] MountableError),
    /// The writable layer cannot be used.
    #[error(transparent)]
    Upper(#[from] WritableError),
    /// The image names a place for its original layers that is not followed.
    #[error(transparent)]
    Origin(#[from] OriginError),
    /// The image has fewer layers than are wanted of it.
    #[error(
        "The image has {has} layers, and its lowest {wanted} are wanted: another image is meant"
    )]
    FewLayers {
        /// Number of its layers.
        has: usize,
        /// Number of the wanted ones.
        wanted: NonZeroUsize,
    },
    /// Two writable layers are named.
    #[error("The device config names a writable layer, and --upper another: name one")]
    TwoUppers,
    /// A device config names blobs by something else than the URL of a repository.
    #[error("{0:?} is not the URL of a repository's blobs: https://host/v2/<name>/blobs")]
    BlobUrl(String),
}

impl OpenError {
    /// Kind of the failure.
    #[must_use]
    pub fn code(&self) -> Code {
        let inner: &(dyn std::error::Error + 'static) = match self {
            Self::Name(error) => error,
            Self::Registry(error) => error,
            Self::Store(error) => error,
            Self::Image(error) => error,
            Self::Meta(error) => error,
            Self::Config(error) => error,
            Self::Filesystem(error) => error,
            Self::Upper(error) => error,
            Self::Unsigned { .. } | Self::Origin(_) => return Code::Denied,
            Self::Different { .. } => return Code::Damaged,
            Self::TwoUppers | Self::BlobUrl(_) | Self::FewLayers { .. } => return Code::Invalid,
        };
        crate::failure::code_of(inner)
    }
}

/// An opened image.
pub struct OpenImage {
    /// The virtual disk.
    pub disk: Disk,
    /// Its layers; empty for a device config.
    pub layers: Vec<LayerInfo>,
    /// Digest of the manifest; none for a device config.
    pub digest: Option<Digest>,
    /// Its manifest; none for a device config.
    pub manifest: Option<Manifest>,
    /// Place of the original blobs; none for a device config.
    pub targets: Option<Arc<dyn ImageStore>>,
    /// Trace that the image brought with it.
    pub trace: Option<Trace>,
    /// The manifest that was named, and its store; none for a device config. It may be a plain image's.
    pub named: Option<(Arc<dyn ImageStore>, Digest)>,
    /// The writable layer that the device config names for a device, which is not in the disk.
    pub upper: Option<WritableFiles>,
    /// Settings of the background download in the device config; they replace the host's.
    pub download: Option<DeviceDownload>,
    /// Meta images that were found and that nothing has proved: the one that it shows, or others.
    pub unproved: Option<Unproved>,
    /// Why its meta image is used; none for a device config, and for an image that holds all its data itself.
    pub reason: Option<MetaReason>,
}

impl OpenImage {
    /// A disk of which nothing else is known.
    fn of(disk: Disk, trace: Option<Trace>) -> Self {
        Self {
            disk,
            layers: Vec::new(),
            digest: None,
            manifest: None,
            targets: None,
            trace,
            named: None,
            upper: None,
            download: None,
            unproved: None,
            reason: None,
        }
    }
}

/// Opens an image over `cache`.
///
/// # Errors
/// [`OpenError`].
pub fn open(
    spec: &ImageSpec,
    registries: &Registries,
    cache: Arc<Cache>,
) -> Result<OpenImage, OpenError> {
    let (live, builder) = (&LiveImages::default(), &Builder::Here);
    Opening { spec, registries, cache, live, builder }.open(Purpose::Read)
}

/// Opens an image for a device: what another device has open is shared, and a device config is told the outcome in
/// its `resultFile`.
pub(super) fn open_for_device(
    spec: &ImageSpec,
    registries: &Registries,
    cache: Arc<Cache>,
    live: &LiveImages,
    builder: &Builder,
) -> Result<OpenImage, OpenError> {
    let opened = Opening { spec, registries, cache, live, builder }.open(Purpose::Serve);
    let opened = opened.and_then(|opened| check_filesystem(&opened.disk).map(|()| opened));
    if let Ok(opened) = &opened {
        warn_of_long_frames(&spec.name(), &opened.disk);
    }
    if let ImageSource::DeviceConfig(path) = &spec.source {
        let reason = opened.as_ref().err().map(|error| with_causes(error));
        config::tell_result(path, reason.as_deref().map_or(Ok(()), Err));
    }
    opened
}

/// An image that is being opened.
struct Opening<'a> {
    spec: &'a ImageSpec,
    registries: &'a Registries,
    cache: Arc<Cache>,
    live: &'a LiveImages,
    builder: &'a Builder,
}

impl Opening<'_> {
    fn open(&self, purpose: Purpose) -> Result<OpenImage, OpenError> {
        match &self.spec.source {
            ImageSource::Reference(name) => self.open_reference(name),
            ImageSource::DeviceConfig(path) => self.open_config(path, purpose),
        }
    }

    fn open_config(&self, path: &Path, purpose: Purpose) -> Result<OpenImage, OpenError> {
        let targets = ConfigTargets { registries: self.registries, way: &self.spec.registry };
        let opened = config::open_all(path, self.cache.clone(), &targets, purpose)?;
        if let Some(file) = opened.record {
            tracing::warn!(
                "{} is empty and stays so: record with `turbobd trace record`",
                file.display()
            );
        }
        let (upper, download) = (opened.upper, opened.download);
        Ok(OpenImage { upper, download, ..OpenImage::of(opened.disk, opened.trace) })
    }

    fn open_reference(&self, name: &str) -> Result<OpenImage, OpenError> {
        let image: ImageName = name.parse()?;
        let client = self.registries.client(&self.spec.registry)?;
        let (store, selector) = store::open(&image, &client)?;
        let chosen = self.choose(&*store, &selector)?;
        let store = store.with_urls(&chosen.manifest.layers).unwrap_or(store);
        let named = Some((store.clone(), chosen.stored.digest));
        let opened = if is_plain(&chosen.manifest) {
            self.open_plain(store, &image.repository(), &selector, &chosen, &client)?
        } else {
            let reason = self.reason_of_named(&*store, &chosen)?;
            let HostManifest { stored, manifest, .. } = chosen;
            let own = store.clone();
            let place = image.repository();
            let opened =
                self.open_converted((&*own, &stored, &manifest), store, &place, &client)?;
            OpenImage { reason, ..opened }
        };
        Ok(OpenImage { named, ..opened })
    }

    /// The manifest that the name leads to; if the spec has one, that one. The name is followed then too: an index above the
    /// manifest may list a meta image of it.
    fn choose(
        &self,
        store: &dyn ImageStore,
        selector: &Selector,
    ) -> Result<HostManifest, OpenError> {
        let named = choose_manifest(store, selector);
        let Some(digest) = self.spec.manifest else { return Ok(named?) };
        match named {
            Ok(chosen) if chosen.stored.digest == digest || chosen.indexes.contains(&digest) => {
                Ok(chosen)
            }
            Err(error) if crate::failure::code_of(&error) != Code::NotFound => Err(error.into()),
            // The tag has moved, or is gone.
            Ok(_) | Err(_) => Ok(choose_manifest(store, &Selector::Digest(digest))?),
        }
    }

    /// Why the meta image that the user named is used; `None` if it is none and holds all its data itself.
    fn reason_of_named(
        &self,
        store: &dyn ImageStore,
        chosen: &HostManifest,
    ) -> Result<Option<MetaReason>, OpenError> {
        if !is_meta(&chosen.manifest) {
            return Ok(None);
        }
        let digest = chosen.stored.digest;
        let signed = || {
            let signers = &self.registries.service().turbobd.signers;
            std::iter::once(&digest)
                .chain(chosen.indexes.iter().rev())
                .find_map(|digest| signers.find(store, digest))
        };
        let trust: MetaTrust = self.registries.service().turbobd.meta_trust;
        match trust.reason(NamedImage::Meta, MetaPlace::Beside, signed) {
            Some(reason) => Ok(Some(reason)),
            None => Err(OpenError::Unsigned { digest, store: store.name().to_owned() }),
        }
    }

    /// Opens a plain image through its meta image, which is built if there is none.
    fn open_plain(
        &self,
        store: Arc<dyn ImageStore>,
        place: &RepositoryName,
        selector: &Selector,
        chosen: &HostManifest,
        client: &RegistryClient,
    ) -> Result<OpenImage, OpenError> {
        let local = self.spec.meta_dir.as_ref();
        let own = &self.registries.service().turbobd;
        let folder = local.unwrap_or(&own.meta_dir);
        if folder.exists() {
            // What is in it is taken for a meta image that was built here.
            sys::private::folder(folder)
                .map_err(|source| MetaError::Local { dir: folder.clone(), source })?;
        }
        let images = MetaImages {
            local: local.unwrap_or(&own.meta_dir).clone(),
            publish: self.spec.publish,
            options: ConvertOptions::default(),
            builder: self.builder.clone(),
            trust: own.meta_trust,
            signers: own.signers.clone(),
        };
        let plain = Plain {
            store: &store,
            tag: match selector {
                Selector::Tag(tag) => Some(tag),
                Selector::Digest(_) | Selector::Default => None,
            },
            pinned: matches!(selector, Selector::Digest(_)),
            index: chosen.index.as_ref(),
            indexes: &chosen.indexes,
            stored: &chosen.stored,
            manifest: &chosen.manifest,
        };
        let meta = images.of(&plain, &Silent)?;
        let converted = (&*meta.store, &meta.stored, &meta.manifest);
        let opened = self.open_converted(converted, store.clone(), place, client)?;
        let unproved = if meta.reason == MetaReason::Repository {
            Some(Unproved::Shown(Box::new(ShownUnproved {
                images,
                store,
                stored: chosen.stored.clone(),
                plain: chosen.manifest.clone(),
                found: meta.manifest,
            })))
        } else if own.meta_trust == MetaTrust::Verify && !meta.passed_over.is_empty() {
            let (found, built) = (meta.passed_over, Box::new(meta.manifest));
            Some(Unproved::PassedOver { store, found, built })
        } else {
            None
        };
        Ok(OpenImage { reason: Some(meta.reason), unproved, ..opened })
    }

    /// Opens a converted image (its store, its manifest, the same parsed) whose original layers are in
    /// `originals`, the repository `own`, unless it says otherwise and may.
    fn open_converted(
        &self,
        (store, stored, manifest): (&dyn ImageStore, &StoredManifest, &Manifest),
        originals: Arc<dyn ImageStore>,
        own: &RepositoryName,
        client: &RegistryClient,
    ) -> Result<OpenImage, OpenError> {
        let targets = match manifest.annotations.get(annotations::ORIGIN) {
            None => originals,
            Some(origin) => {
                origin::follow(origin, self.spec, (own, &originals), (self.registries, client))?
            }
        };
        let digest = Some(stored.digest);
        // A device must not depend on another's credentials: the way to the registry is part of the name.
        let name = LiveName {
            digest: stored.digest,
            store: store.name().to_owned(),
            targets: targets.name().to_owned(),
            way: self.spec.registry.clone(),
            origin: self.spec.origin.clone(),
            layers: self.spec.layers,
        };
        let (disk, layers, trace) = match self.live.find(&name) {
            Some(FoundImage { parts, layers, trace }) => {
                if let Some(reason) = parts.refused() {
                    return Err(OpenError::Different {
                        digest: stored.digest,
                        reason: reason.clone(),
                    });
                }
                (Disk::of(parts, self.cache.clone()), layers, trace)
            }
            None => {
                let lowest = self.spec.layers.map(|count| lowest(manifest, count)).transpose()?;
                let manifest = lowest.as_ref().unwrap_or(manifest);
                let OpenedImage { layers, disk, trace } =
                    open_image(store, &*targets, manifest, self.cache.clone())?;
                self.live.note(name, &disk, &layers, trace.as_ref());
                (disk, layers, trace)
            }
        };
        let (targets, manifest) = (Some(targets), Some(manifest.clone()));
        Ok(OpenImage { layers, digest, manifest, targets, ..OpenImage::of(disk, trace) })
    }
}

/// The manifest with its `count` lowest layers alone, and without the trace of the whole image.
fn lowest(manifest: &Manifest, count: NonZeroUsize) -> Result<Manifest, OpenError> {
    let (trace, layers) = split_acceleration(&manifest.layers);
    let has = layers.len();
    let lowest = layers.get(..count.get()).ok_or(OpenError::FewLayers { has, wanted: count })?;
    let trace = trace.filter(|_| has == count.get());
    let layers = lowest.iter().chain(trace).cloned().collect();
    Ok(Manifest { layers, ..manifest.clone() })
}

/// Refuses an image whose filesystem the kernel must not be given. Of a native image, a chunk or two of its layers are
/// fetched for that, which the mount reads next.
fn check_filesystem(disk: &Disk) -> Result<(), OpenError> {
    let kind = if disk.has_metadata() { ImageKind::Meta } else { ImageKind::Native };
    Ok(check_mountable(&VolumeSource(disk), kind)?)
}

/// Says which layers of a device have a zstd frame that no tier on this host holds once it is decoded.
fn warn_of_long_frames(image: &str, disk: &Disk) {
    for (number, blob) in disk.blobs().into_iter().enumerate() {
        let Some(blob) = blob else { continue };
        let longest = blob.source().serial().map_or(0, SerialChunks::longest_frame);
        let kept = blob.stored().decoded.as_ref().map_or(0, TierBlob::capacity);
        if longest > 0 && kept <= longest {
            tracing::warn!(
                layer = number,
                "{image} has a zstd frame of {}, which decodes only from its beginning, and no disk tier holds \
                 it: reads may be very slow. Enable gzipCacheConfig with more than that, or rebuild the layer as \
                 zstd:chunked, seekable zstd or gzip",
                Bytes(longest)
            );
        }
    }
}

/// Opens what a device config names and this host must fetch, with the credentials of this host.
struct ConfigTargets<'a> {
    registries: &'a Registries,
    way: &'a RegistrySpec,
}

impl ConfigTargets<'_> {
    /// The repository whose blobs are at `url`: `https://host/v2/<name>/blobs`.
    fn repository(&self, url: &str) -> Result<Arc<dyn ImageStore>, OpenError> {
        let wrong = || OpenError::BlobUrl(url.to_owned());
        let (scheme, rest) = url.split_once("://").ok_or_else(wrong)?;
        let (host, path) = rest.split_once("/v2/").ok_or_else(wrong)?;
        let path = path.trim_end_matches('/');
        let repository = path.strip_suffix("/blobs").ok_or_else(wrong)?.to_owned();
        let mut way = self.way.clone();
        match scheme {
            "https" => {}
            "http" => way.plain_http = true,
            _ => return Err(wrong()),
        }
        let client = self.registries.client(&way)?;
        let place = RepositoryName::Registry { host: host.to_owned(), repository };
        Ok(store::open_repository(&place, &client)?)
    }
}

impl TargetOpener for ConfigTargets<'_> {
    fn open_indexed(
        &self,
        blob: Arc<dyn ByteSource>,
        index: Option<Vec<u8>>,
        sidecar: Option<Vec<u8>>,
        digest: Option<&str>,
    ) -> Result<Arc<dyn ChunkSource>, DiskError> {
        IndexedTargets.open_indexed(blob, index, sidecar, digest)
    }

    fn open_remote(
        &self,
        blobs: &str,
        digest: &Digest,
        size: Option<u64>,
    ) -> Result<Arc<dyn ByteSource>, DiskError> {
        let open =
            || -> Result<_, OpenError> { Ok(self.repository(blobs)?.blob_source(digest, size)?) };
        open().map_err(|error| DiskError::Remote {
            name: format!("{digest} of {blobs}"),
            source: Arc::new(error),
        })
    }
}
