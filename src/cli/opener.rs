//! From what the user named to an opened image.

use std::path::PathBuf;
use std::sync::Arc;

use super::live::{Found, LiveImages};
use super::registry::Clients;
use super::{Failure, registry};
use crate::cache::Cache;
use crate::disk::image::{GzipTargets, LayerInfo, OpenedImage, host_manifest, open_image};
use crate::disk::{Disk, config};
use crate::oci::{Digest, ImageName, RepositoryName, annotations};
use crate::store::{self, ImageStore};
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
        args.registry = args.registry.absolute()?;
        Ok(args)
    }

    /// Opens it over `cache`.
    pub(super) fn open(&self, clients: &Clients, cache: Arc<Cache>) -> Result<Opened, Failure> {
        self.open_beside(clients, cache, &LiveImages::default())
    }

    /// The same for one device of several: what another has open already is shared.
    pub(super) fn open_beside(
        &self,
        clients: &Clients,
        cache: Arc<Cache>,
        live: &LiveImages,
    ) -> Result<Opened, Failure> {
        match (&self.image, &self.config) {
            (Some(image), _) => self.open_image(image, clients, cache, live),
            (None, Some(path)) => {
                let disk = config::open(path, cache, &GzipTargets).map_err(Failure::because)?;
                Ok(Opened { disk, layers: Vec::new(), digest: None, targets: None, trace: None })
            }
            (None, None) => {
                Err(Failure::Usage("name an IMAGE, or a device config with --config FILE".into()))
            }
        }
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
        let (stored, manifest) = host_manifest(&*store, &selector).map_err(Failure::because)?;
        let targets = match manifest.annotations.get(annotations::ORIGIN) {
            None => store.clone(),
            Some(origin) => {
                let origin: RepositoryName = origin.parse().map_err(Failure::because)?;
                store::open_repository(&origin, &client).map_err(Failure::because)?
            }
        };
        let digest = Some(stored.digest);
        // Reached in the same way, too: a device must not depend on another's credentials.
        let flags = serde_json::to_string(&self.registry).map_err(Failure::because)?;
        let name = format!("{} {} {} {flags}", stored.digest, store.name(), targets.name());
        if let Some(Found { parts, layers, trace }) = live.find(&name) {
            let disk = Disk::of(parts, cache);
            return Ok(Opened { disk, layers, digest, targets: Some(targets), trace });
        }
        let OpenedImage { layers, disk, trace } =
            open_image(&*store, &*targets, &manifest, cache).map_err(Failure::because)?;
        live.note(name, &disk, &layers, trace.as_ref());
        Ok(Opened { disk, layers, digest, targets: Some(targets), trace })
    }
}
