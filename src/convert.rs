//! Layer stream → meta image, beside the original.
//!
//! For each layer, bottom to top, the compressed blob passes through this program **once**:
//!
//! ```text
//! store ── pieces ──▶ scan (gzip) ──▶ tar ──▶ apply ──▶ tree          one thread: layer.rs
//!                       │ boundaries
//!                       ▼
//!                     SHA-256 of the blob and of each segment         another
//! ```
//!
//! Nothing of the layer is kept: what remains is the in-memory tree of files ([`crate::ext4`]) and the
//! gzip index. The tree lives on from layer to layer, so that each layer's ext4 image is the merged
//! filesystem a container would see, written as *only the blocks that this layer changed*, with file
//! data as mappings into the layer's own tar.
//!
//! The results are archives of about one percent of the layers. They are held in memory until the
//! whole image is built and only then published, so a failure leaves nothing behind.
//!
//! * [`apply`]    tar entries → tree, with the result that an unpack into overlayfs would show
//! * [`layer`]    one pass over one layer
//! * [`image`]    a manifest and its layers → a converted manifest
//! * [`index`]    many platforms; what is passed over; publishing
//! * [`progress`] who is told how far it is

pub mod apply;
pub mod image;
pub mod index;
pub mod layer;
pub mod progress;

use thiserror::Error;

use crate::gzip::GzipError;
use crate::oci::Digest;
use crate::store::StoreError;
use crate::tar::TarError;
use crate::units::Bytes;

pub use image::{ConvertedImage, LayerReport};
pub use index::{Conversion, ConvertedPlatform, convert};
pub use progress::{Progress, Silent};

/// What to build, and how.
#[derive(Clone, Debug)]
pub struct ConvertOptions {
    /// Size of the virtual disk.
    pub disk_size: Bytes,
    /// Distance of gzip checkpoints in uncompressed bytes.
    pub span: Bytes,
    /// OCI media types in the result; else Docker's, as upstream's converter writes even for an OCI
    /// source (spec turbooci 2).
    pub oci_types: bool,
    /// Name the source as `subject`, so that a registry lists the result among its referrers.
    pub referrer: bool,
    /// Manifests of a multi-platform index converted at the same time.
    pub concurrency: usize,
    /// Where the original blobs stay, when the result is written elsewhere: noted in the manifest.
    pub origin: Option<String>,
}

impl Default for ConvertOptions {
    fn default() -> Self {
        Self {
            disk_size: Bytes(64 << 30),
            span: crate::gzip::DEFAULT_SPAN,
            oci_types: false,
            referrer: false,
            concurrency: 4,
            origin: None,
        }
    }
}

/// Why an image could not be converted.
#[derive(Debug, Error)]
pub enum ConvertError {
    /// The image could not be read, or the result not written.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A manifest, index or config is not what it should be.
    #[error("{what} {digest} cannot be converted: {reason}")]
    Manifest {
        /// `Manifest`, `Index` or `Config`.
        what: &'static str,
        /// Which one.
        digest: Digest,
        /// The rule it breaks.
        reason: String,
    },
    /// The virtual disk cannot have the size that was asked for.
    #[error(transparent)]
    Disk(crate::ext4::Ext4Error),
    /// A layer could not be converted.
    #[error("Layer {number} ({digest})")]
    Layer {
        /// Position in the manifest, 0 lowest.
        number: usize,
        /// The layer blob.
        digest: Digest,
        /// What is wrong with it.
        #[source]
        source: Box<LayerError>,
    },
}

/// Why one layer could not be converted.
#[derive(Debug, Error)]
pub enum LayerError {
    /// The stream broke.
    #[error("Cannot read the blob")]
    Read(#[source] std::io::Error),
    /// The stream delivered other bytes than the manifest promises.
    #[error(
        "The blob arrived with {got_size} bytes and digest {got}, but the manifest says {want_size} bytes"
    )]
    Mismatch {
        /// Digest of what arrived.
        got: Digest,
        /// Length of what arrived, in bytes.
        got_size: u64,
        /// Length in the manifest, in bytes.
        want_size: u64,
    },
    /// Neither gzip nor a plain tar.
    #[error(
        "The layer is compressed with {0}, which TurboOCI cannot index: rebuild the image with gzip layers"
    )]
    Compression(&'static str),
    /// The gzip stream is broken.
    #[error(transparent)]
    Gzip(#[from] GzipError),
    /// The tar stream is broken or has what a layer may not have.
    #[error(transparent)]
    Tar(#[from] TarError),
    /// An entry cannot be applied to the tree.
    #[error(transparent)]
    Apply(#[from] apply::ApplyError),
    /// The tree cannot be written as ext4.
    #[error(transparent)]
    Ext4(#[from] crate::ext4::Ext4Error),
    /// The result breaks a limit of LSMT.
    #[error(transparent)]
    Lsmt(#[from] crate::lsmt::LsmtError),
    /// The result breaks a limit of `ZFile`.
    #[error(transparent)]
    ZFile(#[from] crate::zfile::ZFileError),
}
