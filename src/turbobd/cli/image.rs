//! The image that a command names.

use std::path::PathBuf;

use client::{ImageSource, ImageSpec};
use formats::oci::ImageName;

use super::{Failure, registry_flags};

/// An image, by name or by overlaybd's device config.
#[derive(Clone, Debug, clap::Args)]
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
    pub(super) meta_dir: Option<PathBuf>,
    /// Push the meta image that was built for a plain image, as a referrer of it: other hosts find it then.
    #[arg(long, conflicts_with = "config")]
    pub(super) publish: bool,
    #[command(flatten)]
    pub(super) registry: registry_flags::Args,
}

impl Args {
    /// Name of the image in messages.
    pub(super) fn name(&self) -> String {
        match (&self.image, &self.config) {
            (Some(image), _) => image.clone(),
            (None, Some(config)) => config.display().to_string(),
            (None, None) => String::new(),
        }
    }

    /// True if all of the image is in a layout on this host. A device config may name layers of registries.
    pub(super) fn is_local(&self) -> bool {
        let name = self.image.as_ref().and_then(|image| image.parse().ok());
        matches!(name, Some(ImageName::Layout(_)))
    }

    /// The image as a spec, with absolute paths: a daemon has another working directory.
    pub(super) fn spec(&self) -> Result<ImageSpec, Failure> {
        let source = match (&self.image, &self.config) {
            (Some(image), _) => {
                let image: ImageName = image.parse().map_err(Failure::usage)?;
                let image = image.absolute().map_err(Failure::because)?;
                ImageSource::Reference(image.to_string())
            }
            (None, Some(config)) => {
                let config = std::path::absolute(config).map_err(Failure::because)?;
                ImageSource::DeviceConfig(config)
            }
            (None, None) => {
                let text = "name an IMAGE, or a device config with --config FILE";
                return Err(Failure::Usage(text.into()));
            }
        };
        let meta_dir = self.meta_dir.as_ref().map(std::path::absolute).transpose();
        Ok(ImageSpec {
            source,
            registry: self.registry.spec()?,
            meta_dir: meta_dir.map_err(Failure::because)?,
            publish: self.publish,
        })
    }
}
