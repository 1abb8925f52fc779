//! OCI images: names, documents, and the folder that holds them.
//!
//! An image is a *manifest*: a small JSON document that lists a config and layers by digest. Several
//! manifests, one per platform, are joined by an *index*. Whether the documents lie in a registry or in
//! an image layout directory makes no difference to their bytes, and the digest of those
//! bytes is their name. So what is rewritten here is rewritten with care: unknown fields stay, and the
//! config is edited as text ([`config`]), because an image must not lose what this program has never
//! heard of.
//!
//! * [`mod@reference`] what a user calls an image: in a registry or in a directory
//! * [`digest`]      what the image calls its parts
//! * [`manifest`]    manifest, index, descriptor, and choosing a platform
//! * [`annotations`] the keys by which a layer says that it is an overlaybd layer
//! * [`config`]      the image config, of which only the layers' digests are ever changed

pub mod annotations;
pub mod config;
pub mod digest;
pub mod manifest;
pub mod reference;

pub use config::{ConfigError, ImageConfig};
pub use digest::{Digest, DigestError};
pub use manifest::{Descriptor, Document, Index, Manifest, ManifestError, Platform};
pub use reference::{ImageName, LayoutName, ReferenceError, RegistryName, RepositoryName};
