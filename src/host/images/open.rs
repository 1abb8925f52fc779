//! From an [`ImageSpec`] to an opened image.

use std::path::Path;
use std::sync::Arc;

use blobs::cache::Cache;
use blobs::tier::TierBlob;
use client::{Code, ImageSource, ImageSpec, RegistrySpec};
use convert::child::Builder;
use convert::meta::{MetaError, MetaImages, Plain, is_plain};
use convert::{ConvertOptions, Silent};
use disk::config::{self, DeviceDownload, Purpose, TargetOpener};
use disk::image::{
    HostManifest, ImageError, IndexedTargets, LayerInfo, OpenedImage, choose_manifest, open_image,
};
use disk::volume::VolumeSource;
use disk::writable::{WritableError, WritableFiles};
use disk::{Disk, DiskError};
use formats::ext4::{MountableError, check_mountable};
use formats::oci::{Digest, ImageName, Manifest, ReferenceError, RepositoryName, annotations};
use formats::trace::Trace;
use formats::units::Bytes;
use registry::store::{self, ImageStore, Selector, StoreError, StoredManifest};
use registry::{RegistryClient, RegistryError};
use source::ByteSource;
use source::chunk::{ChunkSource, SerialChunks};
use source::failure::with_causes;
use thiserror::Error;

use super::live::{FoundImage, LiveImages, LiveName};
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
    /// The device config, or a layer that it names, cannot be used.
    #[error(transparent)]
    Config(#[from] DiskError),
    /// The kernel must not mount the filesystem.
    #[error(transparent)]
    Filesystem(#[from] MountableError),
    /// The writable layer cannot be used.
    #[error(transparent)]
    Upper(#[from] WritableError),
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
            Self::TwoUppers | Self::BlobUrl(_) => return Code::Invalid,
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
        let (disk, trace, upper) = (opened.disk, opened.trace, opened.upper);
        let (layers, digest, targets, named) = (Vec::new(), None, None, None);
        let download = opened.download;
        Ok(OpenImage { disk, layers, digest, targets, trace, named, upper, download })
    }

    fn open_reference(&self, name: &str) -> Result<OpenImage, OpenError> {
        let image: ImageName = name.parse()?;
        let client = self.registries.client(&self.spec.registry)?;
        let (store, selector) = store::open(&image, &client)?;
        let chosen = choose_manifest(&*store, &selector)?;
        let named = Some((store.clone(), chosen.stored.digest));
        let opened = if is_plain(&chosen.manifest) {
            self.open_plain(store, &selector, &chosen, &client)?
        } else {
            let HostManifest { stored, manifest, .. } = chosen;
            let own = store.clone();
            self.open_converted((&*own, &stored, &manifest), store, &client)?
        };
        Ok(OpenImage { named, ..opened })
    }

    /// Opens a plain image through its meta image, which is built if there is none.
    fn open_plain(
        &self,
        store: Arc<dyn ImageStore>,
        selector: &Selector,
        chosen: &HostManifest,
        client: &RegistryClient,
    ) -> Result<OpenImage, OpenError> {
        let local = self.spec.meta_dir.as_ref();
        let images = MetaImages {
            local: local.unwrap_or(&self.registries.service().turbobd.meta_dir).clone(),
            publish: self.spec.publish,
            options: ConvertOptions::default(),
            builder: self.builder.clone(),
        };
        let plain = Plain {
            store: &store,
            tag: match selector {
                Selector::Tag(tag) => Some(tag),
                Selector::Digest(_) | Selector::Default => None,
            },
            index: chosen.index.as_ref(),
            stored: &chosen.stored,
            manifest: &chosen.manifest,
        };
        let meta = images.of(&plain, &Silent)?;
        let converted = (&*meta.store, &meta.stored, &meta.manifest);
        self.open_converted(converted, store, client)
    }

    /// Opens a converted image (its store, its manifest, the same parsed) whose original layers are in
    /// `originals` unless it says otherwise.
    fn open_converted(
        &self,
        (store, stored, manifest): (&dyn ImageStore, &StoredManifest, &Manifest),
        originals: Arc<dyn ImageStore>,
        client: &RegistryClient,
    ) -> Result<OpenImage, OpenError> {
        let targets = match manifest.annotations.get(annotations::ORIGIN) {
            None => originals,
            Some(origin) => {
                let origin: RepositoryName = origin.parse()?;
                store::open_repository(&origin, client)?
            }
        };
        let digest = Some(stored.digest);
        // A device must not depend on another's credentials: the way to the registry is part of the name.
        let name = LiveName {
            digest: stored.digest,
            store: store.name().to_owned(),
            targets: targets.name().to_owned(),
            way: self.spec.registry.clone(),
        };
        let (disk, layers, trace) = match self.live.find(&name) {
            Some(FoundImage { parts, layers, trace }) => {
                (Disk::of(parts, self.cache.clone()), layers, trace)
            }
            None => {
                let OpenedImage { layers, disk, trace } =
                    open_image(store, &*targets, manifest, self.cache.clone())?;
                self.live.note(name, &disk, &layers, trace.as_ref());
                (disk, layers, trace)
            }
        };
        let targets = Some(targets);
        let (named, upper, download) = (None, None, None);
        Ok(OpenImage { disk, layers, digest, targets, trace, named, upper, download })
    }
}

/// Refuses a meta image whose filesystem the kernel must not be given. The filesystem of a native image is read from its
/// layers as the kernel mounts it: it is not held back for that.
fn check_filesystem(disk: &Disk) -> Result<(), OpenError> {
    if disk.has_metadata() {
        check_mountable(&VolumeSource(disk))?;
    }
    Ok(())
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
