//! Layer stream → meta image or native image, beside the original.
//!
//! For each layer, bottom to top, the compressed blob passes through this program **once**:
//!
//! ```text
//! store ── pieces ──▶ scan (gzip, zstd) ──▶ tar ──▶ apply ──▶ tree    one thread: layer.rs
//!                       │ boundaries
//!                       ▼
//!                     SHA-256 of the blob and of each segment         another
//! ```
//!
//! For a TurboOCI image nothing of the layer is kept: what remains is the in-memory tree of files ([`formats::ext4`]) and the
//! index of its segments. The tree lives on from layer to layer, so that each layer's ext4 image is the merged
//! filesystem a container would see, written as *only the blocks that this layer changed*, with file
//! data as mappings into the layer's own tar.
//!
//! The results are archives of about one percent of the layers. They are held in memory until the
//! whole image is built and only then published, so a failure leaves nothing behind.
//!
//! A **native** image carries the file data too. It is made in the same pass, of the same tree and the
//! same ext4: the data goes to the compressors as it passes, and into a work file. A layer that was
//! converted before, on the same lower layers, is used again.
//!
//! * [`apply`]    tar entries → tree, with the result that an unpack into overlayfs would show
//! * [`layer`]    one pass over one layer
//! * [`native`]   the data of a layer into a blob of its own
//! * [`chain`]    what was converted before
//! * [`base`]     converted layers of others below new ones
//! * [`image`]    a manifest and its layers → a converted manifest
//! * [`index`]    many platforms; what is passed over; publishing
//! * [`progress`] who is told how far it is

pub mod apply;
pub mod base;
pub mod chain;
pub mod image;
pub mod index;
pub mod layer;
pub mod meta;
pub mod native;
pub mod progress;
mod zfile_parallel;

use std::path::PathBuf;

use thiserror::Error;

use formats::gzip::GzipError;
use formats::oci::Digest;
use formats::tar::TarError;
use formats::units::Bytes;
use registry::store::StoreError;

pub use base::BaseError;
pub use chain::{KnownLayers, LocalLayers};
pub use image::{ConvertedImage, LayerReport};
pub use index::{Conversion, ConvertedPlatform, Tags, convert};
pub use progress::{Progress, Silent};
pub use zfile_parallel::ParallelWriter;

/// A form of converted image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Format {
    /// Metadata, and mappings into the original layers.
    Turbo,
    /// Everything.
    Native,
}

impl Format {
    /// `artifactType` of a manifest or index of this form that names its original (spec turbooci 2).
    #[must_use]
    pub fn artifact_type(self) -> &'static str {
        match self {
            Format::Turbo => formats::oci::annotations::ARTIFACT_TYPE_TURBO,
            Format::Native => formats::oci::annotations::ARTIFACT_TYPE_NATIVE,
        }
    }
}

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
    /// Whether the TurboOCI image is built.
    pub turbo: bool,
    /// Whether a native image is built, and how its layers are compressed.
    pub native: Option<formats::zfile::Options>,
    /// Where the native layers lie until they are stored; else the system's folder for such files.
    pub work_dir: Option<PathBuf>,
}

impl Default for ConvertOptions {
    fn default() -> Self {
        Self {
            disk_size: Bytes(64 << 30),
            span: formats::gzip::DEFAULT_SPAN,
            oci_types: false,
            referrer: false,
            concurrency: 4,
            origin: None,
            turbo: true,
            native: None,
            work_dir: None,
        }
    }
}

impl ConvertOptions {
    /// The forms to build.
    pub fn formats(&self) -> impl Iterator<Item = Format> + use<> {
        let turbo = self.turbo.then_some(Format::Turbo);
        let native = self.native.is_some().then_some(Format::Native);
        turbo.into_iter().chain(native)
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
    /// The local store of converted layers cannot be written.
    #[error("Cannot keep a converted layer in the local store")]
    Keep(#[source] std::io::Error),
    /// The image that new layers were to go on top of.
    #[error("The base image cannot be used for manifest {digest}")]
    Base {
        /// The manifest to convert.
        digest: Digest,
        /// What is wrong with it.
        #[source]
        source: Box<BaseError>,
    },
    /// The virtual disk cannot have the size that was asked for.
    #[error(transparent)]
    Disk(formats::ext4::Ext4Error),
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
    /// A compression that this conversion cannot read.
    #[error(
        "The layer is compressed with {0}, which no image specification knows: rebuild the image with gzip or zstd layers"
    )]
    Compression(&'static str),
    /// The zstd stream is broken, or needs what it may not.
    #[error(transparent)]
    Zstd(#[from] formats::zstandard::ZstdError),
    /// The segments of the layer cannot be indexed.
    #[error(transparent)]
    Segments(#[from] formats::segments::SegmentsError),
    /// There is no room for work files.
    #[error("Cannot make a work file in {dir} (see --dir)", dir = dir.display())]
    WorkFile {
        /// The directory.
        dir: PathBuf,
        /// The system's reason.
        #[source]
        source: std::io::Error,
    },
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
    Ext4(#[from] formats::ext4::Ext4Error),
    /// A writable layer cannot be committed.
    #[error(transparent)]
    Writable(#[from] Box<disk::writable::WritableError>),
    /// The result breaks a limit of LSMT.
    #[error(transparent)]
    Lsmt(#[from] formats::lsmt::LsmtError),
    /// The result breaks a limit of `ZFile`.
    #[error(transparent)]
    ZFile(#[from] formats::zfile::ZFileError),
}
