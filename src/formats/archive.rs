//! Names of the files in a layer archive.
//!
//! A TurboOCI layer is a tar archive of two or three files: the metadata of the layer's filesystem, and the index into
//! the original layer. The first two names are upstream's (spec turbooci 2); the sidecar is turbobd's own, and upstream
//! passes over it.

pub use crate::gzip::{GZIP_META_NAME, SIDECAR_NAME};

/// An LSMT layer in a ZFile: the ext4 metadata of the layer (spec turbooci 3.1).
pub const FS_META_NAME: &str = "ext4.fs.meta";

/// Name of the empty member that marks a TurboOCI layer.
pub const MARKER_NAME: &str = ".turbo.ociv1";

/// Metadata in erofs, upstream's other form. It is read here and not written.
pub const EROFS_META_NAME: &str = "erofs.fs.meta";
