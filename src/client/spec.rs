//! What to open, and how to serve it: plain data, the same for a command, a device config and a snapshotter.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use formats::oci::Digest;
use serde::{Deserialize, Serialize};

/// The image behind a device. Paths are absolute: the daemon has another working directory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageSpec {
    /// Name of the image, or its device config.
    pub source: ImageSource,
    /// The way to its registry.
    #[serde(default)]
    pub registry: RegistrySpec,
    /// Folder in which meta images of plain images are kept; `None`: the service configuration's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub meta_dir: Option<PathBuf>,
    /// Push a meta image that is built for a plain image beside it, as a referrer.
    #[serde(default)]
    pub publish: bool,
    /// Repository of the original layers, if the image says that they are there; `None`: its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub origin: Option<String>,
    /// Manifest, or index, that the reference meant when a program resolved it; `None`: what it means now. A tag may
    /// have moved since. The digest decides what is opened; the reference still decides which meta image may serve it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub manifest: Option<Digest>,
    /// Only so many lowest layers of the image of a reference; `None`: all. Another image may share only these.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub layers: Option<NonZeroUsize>,
}

/// Name of an image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ImageSource {
    /// `[host[:port]/]name[:tag|@digest]`, or `oci:DIR[:TAG|@DIGEST]`.
    Reference(String),
    /// Path of an overlaybd device config (`config.v1.json`).
    DeviceConfig(PathBuf),
}

impl ImageSpec {
    /// The image of this reference, reached with the host's settings.
    #[must_use]
    pub fn of_reference(reference: impl Into<String>) -> Self {
        Self::new(ImageSource::Reference(reference.into()))
    }

    /// The image that a device config describes, reached with the host's settings.
    #[must_use]
    pub fn of_device_config(path: impl Into<PathBuf>) -> Self {
        Self::new(ImageSource::DeviceConfig(path.into()))
    }

    fn new(source: ImageSource) -> Self {
        Self {
            source,
            registry: RegistrySpec::default(),
            meta_dir: None,
            publish: false,
            origin: None,
            manifest: None,
            layers: None,
        }
    }

    /// Name of the image in listings and messages.
    #[must_use]
    pub fn name(&self) -> String {
        match &self.source {
            ImageSource::Reference(name) => name.clone(),
            ImageSource::DeviceConfig(path) => path.display().to_string(),
        }
    }
}

/// The way to a registry, where it differs from the host's settings.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(default)]
pub struct RegistrySpec {
    /// Credentials as `user:password`; `None`: those that the host finds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub credential: Option<String>,
    /// Speak HTTP without TLS.
    pub plain_http: bool,
    /// Accept any certificate.
    pub any_certificate: bool,
    /// Authorities to accept besides the platform's: PEM files, or folders of them.
    pub authorities: Vec<PathBuf>,
    /// Certificate to show to the registry.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub certificate: Option<CertificateSpec>,
}

/// A client certificate: two PEM files.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct CertificateSpec {
    /// The certificate, with the chain up to its authority.
    pub certificate: PathBuf,
    /// Its private key.
    pub key: PathBuf,
}

/// A device to make.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceSpec {
    /// Image behind the device.
    pub image: ImageSpec,
    /// Front end that makes the device.
    #[serde(default)]
    pub frontend: Frontend,
    /// Folder of the writable layer; `None`: the device is read-only, unless a device config names a layer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub upper: Option<PathBuf>,
    /// Name of the device in requests for snapshots, besides its node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dev_id: Option<String>,
}

impl DeviceSpec {
    /// A read-only device of an image, by the best front end of the host.
    #[must_use]
    pub fn of(image: ImageSpec) -> Self {
        Self { image, frontend: Frontend::Auto, upper: None, dev_id: None }
    }
}

/// Front end of a device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Frontend {
    /// ublk, or loop on a host without ublk.
    #[default]
    Auto,
    /// ublk, or an error.
    Ublk,
    /// FUSE and a loop device.
    Loop,
}
