//! From what the user named to an opened image.

use std::path::PathBuf;
use std::sync::Arc;

use super::live::{Found, LiveImages};
use super::registry::Clients;
use super::{Failure, registry, sentence};
use crate::cache::Cache;
use crate::chunk::ChunkSource;
use crate::convert::{ConvertOptions, Silent};
use crate::disk::config::{Download, Purpose, TargetOpener};
use crate::disk::image::{
    HostManifest, IndexedTargets, LayerInfo, OpenedImage, choose_manifest, open_image,
};
use crate::disk::{Disk, DiskError, config};
use crate::lsmt::WritableFiles;
use crate::meta::{MetaImages, Plain, is_plain};
use crate::oci::{Digest, ImageName, Manifest, RepositoryName, annotations};
use crate::registry::Client;
use crate::source::ByteSource;
use crate::store::{self, ImageStore, Selector, StoredManifest};
use crate::tier::Stored;
use crate::trace::Trace;

/// An image, by name or by upstream's device config.
#[derive(Clone, Debug, clap::Args, serde::Serialize, serde::Deserialize)]
#[group(skip)]
pub(super) struct Args {
    /// `[host[:port]/]name[:tag|@digest]`, or `oci:DIR[:TAG]`.
    #[arg(required_unless_present = "config")]
    pub(super) image: Option<String>,
    /// Upstream's device config (`config.v1.json`) instead of an image.
    #[arg(long, value_name = "FILE", conflicts_with = "image")]
    pub(super) config: Option<PathBuf>,
    /// Where meta images of plain images are kept on this host; else the service configuration's
    /// `turbobd.metaDir`, which is /var/lib/turbobd/meta by default.
    #[arg(long, value_name = "DIR", conflicts_with = "config")]
    #[serde(default)]
    pub(super) meta_dir: Option<PathBuf>,
    /// Push the meta image that was built for a plain image, as a referrer of it: other hosts find it then.
    #[arg(long, conflicts_with = "config")]
    #[serde(default)]
    pub(super) publish: bool,
    #[command(flatten)]
    pub(super) registry: registry::Args,
}

/// What was opened.
pub(super) struct Opened {
    /// The virtual disk.
    pub(super) disk: Disk,
    /// What the layers are; empty for a device config.
    pub(super) layers: Vec<LayerInfo>,
    /// Digest of the manifest; none for a device config.
    pub(super) digest: Option<Digest>,
    /// Where the original blobs come from; none for a device config.
    pub(super) targets: Option<Arc<dyn ImageStore>>,
    /// What a start reads, if the image brought a trace with it.
    pub(super) trace: Option<Trace>,
    /// The manifest that was named, and where it is; none for a device config. It may be a plain image's.
    pub(super) named: Option<(Arc<dyn ImageStore>, Digest)>,
    /// The writable layer that the device config names for a device, which is not in the disk.
    pub(super) upper: Option<WritableFiles>,
    /// What the device config says of background download, in the place of the host's settings.
    pub(super) download: Option<Download>,
}

impl Args {
    /// What to call it.
    pub(super) fn name(&self) -> String {
        match (&self.image, &self.config) {
            (Some(image), _) => image.clone(),
            (None, Some(config)) => config.display().to_string(),
            (None, None) => String::new(),
        }
    }

    /// Whether all of it is in a layout on this host. A device config may name layers of registries.
    pub(super) fn is_local(&self) -> bool {
        let name = self.image.as_ref().and_then(|image| image.parse().ok());
        matches!(name, Some(ImageName::Layout(_)))
    }

    /// The same with absolute paths, for a daemon whose working directory is another.
    pub(super) fn absolute(&self) -> Result<Self, Failure> {
        let mut args = self.clone();
        if let Some(config) = &self.config {
            args.config = Some(std::path::absolute(config).map_err(Failure::because)?);
        }
        if let Some(image) = &self.image {
            let image: ImageName = image.parse().map_err(Failure::usage)?;
            args.image = Some(image.absolute().map_err(Failure::because)?.to_string());
        }
        if let Some(dir) = &self.meta_dir {
            args.meta_dir = Some(std::path::absolute(dir).map_err(Failure::because)?);
        }
        args.registry = args.registry.absolute()?;
        Ok(args)
    }

    /// Opens it over `cache`.
    pub(super) fn open(&self, clients: &Clients, cache: Arc<Cache>) -> Result<Opened, Failure> {
        self.open_beside(clients, cache, &LiveImages::default(), Purpose::Read)
    }

    /// The same for one device of several: what another has open already is shared.
    fn open_beside(
        &self,
        clients: &Clients,
        cache: Arc<Cache>,
        live: &LiveImages,
        purpose: Purpose,
    ) -> Result<Opened, Failure> {
        match (&self.image, &self.config) {
            (Some(image), _) => self.open_image(image, clients, cache, live),
            (None, Some(path)) => {
                let targets = ConfigTargets { clients, registry: &self.registry };
                let opened =
                    config::open_all(path, cache, &targets, purpose).map_err(Failure::because)?;
                if let Some(file) = opened.record {
                    tracing::warn!(
                        "{} is empty and stays so: record with `turbobd trace record`",
                        file.display()
                    );
                }
                let (disk, trace, upper) = (opened.disk, opened.trace, opened.upper);
                let (layers, digest, targets, named) = (Vec::new(), None, None, None);
                let download = opened.download;
                Ok(Opened { disk, layers, digest, targets, trace, named, upper, download })
            }
            (None, None) => {
                Err(Failure::Usage("name an IMAGE, or a device config with --config FILE".into()))
            }
        }
    }

    /// Opens it for a device: a device config is told how that went, in its `resultFile`.
    pub(super) fn open_for_device(
        &self,
        clients: &Clients,
        cache: Arc<Cache>,
        live: &LiveImages,
    ) -> Result<Opened, Failure> {
        let opened = self.open_beside(clients, cache, live, Purpose::Serve);
        if let Ok(opened) = &opened {
            warn_of_long_frames(&self.name(), &opened.disk);
        }
        if let Some(path) = &self.config {
            let reason = opened.as_ref().err().map(|error| sentence(error));
            config::tell_result(path, reason.as_deref().map_or(Ok(()), Err));
        }
        opened
    }

    fn open_image(
        &self,
        image: &str,
        clients: &Clients,
        cache: Arc<Cache>,
        live: &LiveImages,
    ) -> Result<Opened, Failure> {
        let client = clients.of(&self.registry)?;
        let image: ImageName = image.parse().map_err(Failure::usage)?;
        let (store, selector) = store::open(&image, &client).map_err(Failure::because)?;
        let chosen = choose_manifest(&*store, &selector).map_err(Failure::because)?;
        let named = Some((store.clone(), chosen.stored.digest));
        let opened = if is_plain(&chosen.manifest) {
            self.open_plain(store, &selector, &chosen, clients, cache, live)?
        } else {
            let HostManifest { stored, manifest, .. } = chosen;
            let own = store.clone();
            self.open_converted((&*own, &stored, &manifest), store, &client, cache, live)?
        };
        Ok(Opened { named, ..opened })
    }

    /// Opens a plain image through its meta image, which is built if there is none.
    fn open_plain(
        &self,
        store: Arc<dyn ImageStore>,
        selector: &Selector,
        chosen: &HostManifest,
        clients: &Clients,
        cache: Arc<Cache>,
        live: &LiveImages,
    ) -> Result<Opened, Failure> {
        let client = clients.of(&self.registry)?;
        let local = self.meta_dir.clone();
        let images = MetaImages {
            local: local.unwrap_or_else(|| clients.service().turbobd.meta_dir.clone()),
            publish: self.publish,
            options: ConvertOptions::default(),
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
        let meta = images.of(&plain, &Silent).map_err(Failure::because)?;
        let converted = (&*meta.store, &meta.stored, &meta.manifest);
        self.open_converted(converted, store, &client, cache, live)
    }

    /// Opens a converted image (its store, its manifest, the same parsed) whose original layers are in
    /// `originals` unless it says otherwise.
    fn open_converted(
        &self,
        (store, stored, manifest): (&dyn ImageStore, &StoredManifest, &Manifest),
        originals: Arc<dyn ImageStore>,
        client: &Client,
        cache: Arc<Cache>,
        live: &LiveImages,
    ) -> Result<Opened, Failure> {
        let targets = match manifest.annotations.get(annotations::ORIGIN) {
            None => originals,
            Some(origin) => {
                let origin: RepositoryName = origin.parse().map_err(Failure::because)?;
                store::open_repository(&origin, client).map_err(Failure::because)?
            }
        };
        let digest = Some(stored.digest);
        // Reached in the same way, too: a device must not depend on another's credentials.
        let flags = serde_json::to_string(&self.registry).map_err(Failure::because)?;
        let name = format!("{} {} {} {flags}", stored.digest, store.name(), targets.name());
        let (disk, layers, trace) = match live.find(&name) {
            Some(Found { parts, layers, trace }) => (Disk::of(parts, cache), layers, trace),
            None => {
                let OpenedImage { layers, disk, trace } =
                    open_image(store, &*targets, manifest, cache).map_err(Failure::because)?;
                live.note(name, &disk, &layers, trace.as_ref());
                (disk, layers, trace)
            }
        };
        let targets = Some(targets);
        let (named, upper, download) = (None, None, None);
        Ok(Opened { disk, layers, digest, targets, trace, named, upper, download })
    }
}

/// Says which layers of a device have a zstd frame that no tier on this host holds once it is decoded.
fn warn_of_long_frames(image: &str, disk: &Disk) {
    for (number, blob) in disk.blobs().into_iter().enumerate() {
        let Some(blob) = blob else { continue };
        let longest = blob.source().longest_serial();
        let kept = blob.stored().decoded.as_ref().map_or(0, Stored::capacity);
        if longest > 0 && kept <= longest {
            tracing::warn!(
                layer = number,
                "{image} has a zstd frame of {}, which decodes only from its beginning, and no disk tier holds \
                 it: reads may be very slow. Enable gzipCacheConfig with more than that, or rebuild the layer as \
                 zstd:chunked, seekable zstd or gzip",
                super::table::size(longest)
            );
        }
    }
}

/// What a device config names and this host must fetch: with the credentials of this host.
struct ConfigTargets<'a> {
    clients: &'a Clients,
    registry: &'a registry::Args,
}

impl ConfigTargets<'_> {
    /// The repository whose blobs are at `url`: `https://host/v2/<name>/blobs`.
    fn repository(&self, url: &str) -> Result<Arc<dyn ImageStore>, Failure> {
        let wrong = || {
            Failure::Failed(format!(
                "{url:?} is not the URL of a repository's blobs: https://host/v2/<name>/blobs"
            ))
        };
        let (scheme, rest) = url.split_once("://").ok_or_else(wrong)?;
        let (host, path) = rest.split_once("/v2/").ok_or_else(wrong)?;
        let path = path.trim_end_matches('/');
        let repository = path.strip_suffix("/blobs").ok_or_else(wrong)?.to_owned();
        let mut args = self.registry.clone();
        match scheme {
            "https" => {}
            "http" => args.plain = true,
            _ => return Err(wrong()),
        }
        let client = self.clients.of(&args)?;
        let place = RepositoryName::Registry { host: host.to_owned(), repository };
        store::open_repository(&place, &client).map_err(Failure::because)
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
        let open = || -> Result<_, Failure> {
            self.repository(blobs)?.blob_source(digest, size).map_err(Failure::because)
        };
        open().map_err(|error| DiskError::Remote {
            name: format!("{digest} of {blobs}"),
            source: Arc::new(error),
        })
    }
}
