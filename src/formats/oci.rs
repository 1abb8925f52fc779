//! OCI images: names, documents, and the folder that stores them.
//!
//! An image is a *manifest*: a small JSON document that lists a config and layers by digest. Several
//! manifests, one per platform, are joined by an *index*. The documents have the same bytes in a registry and
//! in an image layout directory, and the digest of those bytes is their name. So a rewritten
//! document keeps its unknown fields, and the config is edited as text ([`config`]): an image must not lose
//! data that this program does not know.
//!
//! * [`mod@reference`] names that a user gives for images in a registry or in a directory
//! * [`digest`]      names of the parts of an image
//! * [`manifest`]    manifest, index, descriptor, and choosing a platform
//! * [`annotations`] the keys that mark a layer as an overlaybd layer
//! * [`config`]      the image config; only its layer digests are ever changed

pub mod annotations;
pub mod config;
pub mod digest;
pub mod manifest;
pub mod reference;

pub use config::{ImageConfig, ImageConfigError};
pub use digest::{Digest, DigestError};
pub use manifest::{Descriptor, Document, ImageIndex, Manifest, ManifestError, Platform};
pub use reference::{ImageName, LayoutName, ReferenceError, RegistryName, RepositoryName};
