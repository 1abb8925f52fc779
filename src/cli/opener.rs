//! From what the user named to an opened image.

use std::path::PathBuf;
use std::sync::Arc;

use super::{Failure, registry};
use crate::cache::Cache;
use crate::disk::image::{OpenedImage, open_image, platform_manifest};
use crate::disk::{Disk, config};
use crate::oci::{Manifest, Reference, annotations};
use crate::store::{self, ImageStore};

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

/// Memory for decoded chunks, 256 MiB: a few hundred segments, the working set of a starting program.
pub(super) const CACHE_BUDGET: u64 = 256 << 20;

/// What was opened.
pub(super) struct Opened {
    /// The virtual disk.
    pub(super) disk: Disk,
    /// The image behind it; none for a device config.
    pub(super) image: Option<OpenedImage<()>>,
    /// Where the meta image and the original blobs come from.
    pub(super) stores: Vec<Arc<dyn ImageStore>>,
}

impl Args {
    /// What to call it: the name with the directory made absolute, since a daemon has another one.
    pub(super) fn absolute(&self) -> Result<Self, Failure> {
        let mut args = self.clone();
        if let Some(config) = &self.config {
            args.config = Some(std::path::absolute(config).map_err(Failure::because)?);
        }
        if let Some(image) = &self.image {
            let reference = Reference::parse(image).map_err(Failure::because)?;
            args.image = Some(reference.absolute().map_err(Failure::because)?.to_string());
        }
        Ok(args)
    }

    /// Opens it over `cache`.
    pub(super) fn open(&self, cache: Arc<Cache>) -> Result<Opened, Failure> {
        match (&self.image, &self.config) {
            (Some(image), _) => self.open_image(image, cache),
            (None, Some(path)) => {
                let disk = config::open(path, cache).map_err(Failure::because)?;
                Ok(Opened { disk, image: None, stores: Vec::new() })
            }
            (None, None) => Err(Failure::Usage("name an IMAGE, or a device config with --config FILE".into())),
        }
    }

    fn open_image(&self, image: &str, cache: Arc<Cache>) -> Result<Opened, Failure> {
        let client = self.registry.client()?;
        let reference = Reference::parse(image).map_err(Failure::because)?;
        let (store, selector) = store::open(&reference, &client).map_err(Failure::because)?;
        let targets = self.origin(&*store, &selector, &client)?.unwrap_or_else(|| store.clone());
        let image = open_image(&*store, &*targets, &selector, cache).map_err(Failure::because)?;
        let (disk, image) = image.into_parts();
        Ok(Opened { disk, image: Some(image), stores: vec![store, targets] })
    }

    /// Where the original blobs are, when the manifest says that it is not here.
    fn origin(
        &self,
        store: &dyn ImageStore,
        selector: &store::Selector,
        client: &crate::registry::Client,
    ) -> Result<Option<Arc<dyn ImageStore>>, Failure> {
        let stored = platform_manifest(store, selector).map_err(Failure::because)?;
        let manifest = Manifest::parse(&stored.bytes).map_err(Failure::because)?;
        let Some(origin) = manifest.annotations.get(annotations::ORIGIN) else { return Ok(None) };
        let origin = Reference::parse_repository(origin).map_err(Failure::because)?;
        Ok(Some(store::open_repository(&origin, client).map_err(Failure::because)?.0))
    }
}
