//! The image arguments of a command.

use std::path::PathBuf;

use client::{ImageSource, ImageSpec};
use formats::oci::{ImageName, RepositoryName};

use super::{Failure, registry_flags};

/// Heading of the options of the image.
const IMAGE: &str = "Image";

/// An image, by name or by overlaybd's device config.
#[derive(Clone, Debug, clap::Args)]
#[group(skip)]
pub(super) struct Args {
    /// Image in a registry: `[host[:port]/]name[:tag|@digest]`; or in an OCI image layout: `oci:DIR[:TAG|@DIGEST]`.
    #[arg(required_unless_present = "config")]
    pub(super) image: Option<String>,
    /// Device config of overlaybd (`config.v1.json`), instead of an IMAGE.
    #[arg(long, value_name = "FILE", conflicts_with = "image", help_heading = IMAGE)]
    pub(super) config: Option<PathBuf>,
    /// Directory for meta images that this host builds for plain images [default: `turbobd.metaDir` of the service
    /// configuration, or /var/lib/turbobd/meta].
    #[arg(long, value_name = "DIR", conflicts_with = "config", help_heading = IMAGE)]
    pub(super) meta_dir: Option<PathBuf>,
    /// Push the meta image that this host builds for a plain image, as a referrer of the image. Other hosts find it there.
    #[arg(long, conflicts_with = "config", help_heading = IMAGE)]
    pub(super) publish: bool,
    /// Repository of the original layers, of an image that says they are not in its own: `convert --to` makes such images.
    /// An image is followed elsewhere only if this option or `turbobd.origins` of the service configuration names the place.
    #[arg(long, value_name = "REPO", conflicts_with = "config", help_heading = IMAGE)]
    pub(super) origin: Option<String>,
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

    /// True if the image is in a layout on this host. The layers of a device config may be in registries.
    pub(super) fn is_local(&self) -> bool {
        let name = self.image.as_ref().and_then(|image| image.parse().ok());
        matches!(name, Some(ImageName::Layout(_)))
    }

    /// The image as a spec, with absolute paths: the daemon has another working directory.
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
        let origin = self.origin.as_ref().map(|origin| {
            let place: RepositoryName = origin.parse().map_err(Failure::usage)?;
            let place = place.absolute().map_err(Failure::because)?;
            Ok::<_, Failure>(place.to_string())
        });
        let meta_dir = self.meta_dir.as_ref().map(std::path::absolute).transpose();
        Ok(ImageSpec {
            source,
            registry: self.registry.spec()?,
            meta_dir: meta_dir.map_err(Failure::because)?,
            publish: self.publish,
            origin: origin.transpose()?,
            manifest: None,
            layers: None,
        })
    }
}
