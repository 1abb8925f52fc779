//! Reasons why a pull ends without an image.

use std::io;
use std::path::PathBuf;

use thiserror::Error;
use tonic::{Code, Status};

use formats::oci::{Digest, ImageConfigError, ManifestError};
use registry::store::StoreError;

use crate::snapshotter::config::ADDRESS;

/// A failed call to containerd.
#[derive(Debug, Error)]
#[error("{message}")]
pub struct CallError {
    /// Code of the failure.
    pub code: Code,
    /// containerd's text.
    pub message: String,
}

impl CallError {
    pub(super) fn of(status: &Status) -> Self {
        let text = match status.code() {
            Code::DeadlineExceeded | Code::Cancelled => "it did not answer in time",
            _ => status.message(),
        };
        let message = if text.is_empty() { status.code().description() } else { text };
        Self { code: status.code(), message: message.to_owned() }
    }
}

/// Reasons why a pull fails.
#[derive(Debug, Error)]
pub enum RpullError {
    /// The process lacks means: threads, signals.
    #[error("The pull cannot begin")]
    Start(#[source] io::Error),
    /// The name of the namespace is no text for a header.
    #[error("{name:?} is no name of a namespace of containerd")]
    Namespace {
        /// The name.
        name: String,
    },
    /// No containerd listens.
    #[error(
        "No containerd answers at {}: start it, or name its socket with --address", socket.display()
    )]
    NoContainerd {
        /// Path of the socket.
        socket: PathBuf,
        /// Reason.
        #[source]
        source: io::Error,
    },
    /// The socket belongs to another user.
    #[error("The socket {} of containerd is for root: run this as root", socket.display())]
    Forbidden {
        /// Path of the socket.
        socket: PathBuf,
        /// Reason.
        #[source]
        source: io::Error,
    },
    /// containerd's configuration does not name the snapshotter.
    #[error(
        "The containerd at {} has no snapshotter {name}: add to its config.toml a section [proxy_plugins.{name}] with \
         type = \"snapshot\" and address = \"{ADDRESS}\" (the socket of `turbobd snapshotter`), and restart it",
        socket.display()
    )]
    NoSnapshotter {
        /// Path of containerd's socket.
        socket: PathBuf,
        /// Name of the snapshotter.
        name: String,
    },
    /// containerd does not reach the snapshotter.
    #[error(
        "containerd does not reach its snapshotter {name}: start it, or correct its address in the section \
         [proxy_plugins.{name}] of containerd's config.toml"
    )]
    SnapshotterDown {
        /// Name of the snapshotter.
        name: String,
        /// containerd's text.
        #[source]
        source: CallError,
    },
    /// Another failure of a call.
    #[error("The containerd at {} cannot {what}", socket.display())]
    Call {
        /// Path of the socket.
        socket: PathBuf,
        /// What was asked for.
        what: String,
        /// containerd's text.
        #[source]
        source: CallError,
    },
    /// The registry failed, or sent something else than was asked for.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A document is not a manifest of an image, or has none for this platform.
    #[error("{name} cannot be pulled")]
    Document {
        /// The image.
        name: String,
        /// Reason.
        #[source]
        source: ManifestError,
    },
    /// An index in an index.
    #[error("{name} cannot be pulled: manifest {digest} of its index is an index again")]
    Nested {
        /// The image.
        name: String,
        /// The inner index.
        digest: Digest,
    },
    /// The config is not one of an image.
    #[error("{name} cannot be pulled: its config {digest} is not that of an image")]
    Config {
        /// The image.
        name: String,
        /// The config.
        digest: Digest,
        /// Reason.
        #[source]
        source: ImageConfigError,
    },
    /// Manifest and config list different numbers of layers.
    #[error("{name} cannot be pulled: it has {layers} layers, and its config lists {listed}")]
    LayerCount {
        /// The image.
        name: String,
        /// Layers of the manifest.
        layers: usize,
        /// Layers of the config.
        listed: usize,
    },
    /// The bytes of a blob are not those that its digest names.
    #[error("Blob {digest} is damaged: the registry sent other bytes than its digest names")]
    Damaged {
        /// The blob.
        digest: Digest,
        /// containerd's text.
        #[source]
        source: CallError,
    },
    /// The unpacked layer is not the one that the config lists.
    #[error("Layer {layer} is another tar than the image's config says: {got}, not {listed}")]
    WrongTar {
        /// The layer's blob.
        layer: Digest,
        /// Digest of its tar.
        got: String,
        /// Digest in the config.
        listed: Digest,
    },
    /// Another process writes the same blob and stands still.
    #[error(
        "Blob {digest} is written by another process, without progress for {seconds} s: end that pull, and try again"
    )]
    Locked {
        /// The blob.
        digest: Digest,
        /// Time without progress in seconds.
        seconds: u64,
    },
    /// A signal ended the pull.
    #[error("Interrupted; containerd removes what was pulled so far")]
    Interrupted,
}
