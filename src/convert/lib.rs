//! Conversion of a layer stream to a meta image or native image, beside the original.
//!
//! For each layer, bottom to top, the compressed blob passes through this program **once**:
//!
//! ```text
//! store ── pieces ──▶ scan (gzip, zstd) ──▶ tar ──▶ apply ──▶ tree    one thread: layer.rs
//!                       │ boundaries
//!                       ▼
//!                     SHA-256 of the blob and of each segment         a scoped thread
//! ```
//!
//! A TurboOCI image keeps no data of the layer: only the in-memory tree of files ([`formats::ext4`]) and the
//! index of the layer's segments remain. The tree is kept from layer to layer, so that each layer's ext4
//! image is the merged filesystem that a container would see. It is written as *only the blocks that this
//! layer changed*, with file data as mappings into the layer's own tar.
//!
//! The results are archives of about one percent of the layers. They stay in memory until the whole image is
//! built and are only then published, so a failure leaves no partial image.
//!
//! A **native** image contains the file data too. It is made in the same pass, from the same tree and the
//! same ext4: as the data passes, it goes to the compressors and into a work file. A layer that was converted
//! before on the same lower layers is reused.
//!
//! * [`apply`]    tar entries → tree, with the result of an unpack into overlayfs
//! * [`layer`]    one pass over one layer
//! * [`native`]   the data of a layer into a blob of its own
//! * [`chain`]    layers that were converted before
//! * [`base`]     converted layers of other images below new ones
//! * [`child`]    a meta image that is built in a process of its own, within limits
//! * [`image`]    a manifest and its layers → a converted manifest
//! * [`index`]    images of many platforms; skipped entries; publishing
//! * [`compare`]  a meta image and the layers that it names
//! * [`meta`]     the meta image of a plain image: found, or built and kept
//! * [`progress`] receiver of progress reports
//! * `zfile_parallel` a ZFile that is written by all cores
//!
//! ```
//! use formats::oci::{Digest, Manifest};
//! let text = format!(
//!     r#"{{"schemaVersion": 2, "config": {{"mediaType": "c", "digest": "{0}", "size": 0}},
//!         "layers": [{{"mediaType": "l", "digest": "{0}", "size": 0}}]}}"#,
//!     Digest::of(b"")
//! );
//! let manifest: Manifest = serde_json::from_str(&text)?;
//! assert!(turbobd_convert::meta::is_plain(&manifest)); // so it needs a meta image
//! # Ok::<(), serde_json::Error>(())
//! ```

pub mod apply;
pub mod base;
pub mod chain;
pub mod child;
pub mod compare;
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

/// Forms of a converted image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ImageFormat {
    /// Metadata, and mappings into the original layers.
    Turbo,
    /// Metadata and file data.
    Native,
}

impl ImageFormat {
    /// `artifactType` of a manifest or index of this form that names its original (spec turbooci 2).
    #[must_use]
    pub fn artifact_type(self) -> &'static str {
        match self {
            ImageFormat::Turbo => formats::oci::annotations::ARTIFACT_TYPE_TURBO,
            ImageFormat::Native => formats::oci::annotations::ARTIFACT_TYPE_NATIVE,
        }
    }
}

/// Options of a conversion.
#[derive(Clone, Debug)]
pub struct ConvertOptions {
    /// Size of the virtual disk.
    pub disk_size: Bytes,
    /// Span of gzip layers: target distance of checkpoints in uncompressed bytes.
    pub span: Bytes,
    /// Use OCI media types in the result; otherwise Docker's, which upstream's converter writes even for an
    /// OCI source (spec turbooci 2).
    pub oci_types: bool,
    /// Name the source as `subject`, so that a registry lists the result among its referrers.
    pub referrer: bool,
    /// Number of manifests of a multi-platform index that are converted at the same time.
    pub concurrency: usize,
    /// Place of the original blobs if the result is written elsewhere; recorded in the manifest.
    pub origin: Option<String>,
    /// True if a TurboOCI image is built.
    pub turbo: bool,
    /// Compression of the native image's layers, if one is built.
    pub native: Option<formats::zfile::Options>,
    /// Folder of the native layers until they are stored; `None` for the system's folder for temporary files.
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
    pub fn formats(&self) -> impl Iterator<Item = ImageFormat> + use<> {
        let turbo = self.turbo.then_some(ImageFormat::Turbo);
        let native = self.native.is_some().then_some(ImageFormat::Native);
        turbo.into_iter().chain(native)
    }
}

/// Error of converting an image.
#[derive(Debug, Error)]
pub enum ConvertError {
    /// The image could not be read, or the result not written.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A manifest, index or config that is invalid.
    #[error("{what} {digest} cannot be converted: {reason}")]
    Manifest {
        /// `Manifest`, `Index` or `Config`.
        what: &'static str,
        /// Its digest.
        digest: Digest,
        /// The broken rule.
        reason: String,
    },
    /// The local store of converted layers cannot be written.
    #[error("Cannot keep a converted layer in the local store")]
    Keep(#[source] std::io::Error),
    /// The requested base image for new layers cannot be used.
    #[error("The base image cannot be used for manifest {digest}")]
    Base {
        /// The manifest to convert.
        digest: Digest,
        /// The fault.
        #[source]
        source: Box<BaseError>,
    },
    /// The virtual disk cannot have the requested size.
    #[error(transparent)]
    Disk(formats::ext4::Ext4Error),
    /// A layer could not be converted.
    #[error("Layer {number} ({digest})")]
    Layer {
        /// Position in the manifest, 0 lowest.
        number: usize,
        /// The layer blob.
        digest: Digest,
        /// The fault.
        #[source]
        source: Box<ConvertLayerError>,
    },
}

/// Error of converting one layer.
#[derive(Debug, Error)]
pub enum ConvertLayerError {
    /// The stream failed.
    #[error("Cannot read the blob")]
    Read(#[source] std::io::Error),
    /// The bytes of the stream do not match the manifest.
    #[error(
        "The blob arrived with {got_size} bytes and digest {got}, but the manifest says {want_size} bytes"
    )]
    Mismatch {
        /// Digest of the received bytes.
        got: Digest,
        /// Length of the received bytes.
        got_size: u64,
        /// Length in the manifest, in bytes.
        want_size: u64,
    },
    /// A compression that the conversion cannot read.
    #[error(
        "The layer is compressed with {0}, which no image specification allows: rebuild the image with gzip or zstd layers"
    )]
    Compression(&'static str),
    /// The zstd stream is damaged, or needs an unsupported feature.
    #[error(transparent)]
    Zstd(#[from] formats::zstandard::ZstdError),
    /// The segments of the layer cannot be indexed.
    #[error(transparent)]
    Segments(#[from] formats::segments::SegmentsError),
    /// A work file cannot be made.
    #[error("Cannot make a work file in {dir} (see --dir)", dir = dir.display())]
    WorkFile {
        /// The directory.
        dir: PathBuf,
        /// The system's reason.
        #[source]
        source: std::io::Error,
    },
    /// The gzip stream is damaged.
    #[error(transparent)]
    Gzip(#[from] GzipError),
    /// The tar stream is damaged or contains an entry that a layer must not contain.
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
