//! Where an image lives.
//!
//! Conversion and attachment need few things of a place that holds images: a manifest by tag or
//! digest, a blob as a stream or by range, and a way to add blobs and manifests. [`ImageStore`] is
//! that; an OCI image layout directory ([`LayoutStore`]) and a repository of a registry
//! ([`RepositoryStore`]) are the two real ones, [`MemoryStore`] serves tests and images that are
//! built and attached in one go. What a blob brought is counted by its source ([`ByteSource::traffic`]).
//!
//! Nothing is believed: a blob or manifest asked for by digest is checked against it here, and
//! streams are checked by whoever reads them to the end.

mod layout;
mod memory;
pub mod referrers;
mod repository;

use std::io::Read;
use std::sync::Arc;

use thiserror::Error;

use crate::{Client, RegistryError};
use formats::oci::{Descriptor, Digest, ImageName, ManifestError, RepositoryName};
use source::{ByteSource, SourceError};

pub use layout::LayoutStore;
pub use memory::MemoryStore;
pub use repository::RepositoryStore;

/// Largest config or meta blob read into memory at once, 1 GiB: the meta image of a 100 GB layer.
const MAX_BLOB_IN_MEMORY: u64 = 1 << 30;

/// Why a store did not deliver.
#[derive(Debug, Error)]
pub enum StoreError {
    /// Reading or writing the layout directory failed.
    #[error(transparent)]
    Layout(#[from] crate::layout::LayoutError),
    /// The registry refused or broke.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// Reading a blob failed.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// The bytes of a blob are not those that its digest names.
    #[error("Blob {digest} of {store} is damaged: its bytes have digest {got}")]
    Damaged {
        /// The store's name.
        store: String,
        /// What was asked for.
        digest: Digest,
        /// What was found.
        got: Digest,
    },
    /// A stream broke before its end.
    #[error("Blob {digest} of {store} broke off")]
    Broken {
        /// The store's name.
        store: String,
        /// The blob.
        digest: Digest,
        /// How.
        #[source]
        source: std::io::Error,
    },
    /// A descriptor promises more than is reasonable to hold in memory.
    #[error(
        "Blob {digest} of {store} claims {size} bytes, more than the {limit} that are read at once"
    )]
    TooLarge {
        /// The store's name.
        store: String,
        /// The blob.
        digest: Digest,
        /// Its claimed size in bytes.
        size: u64,
        /// The limit in bytes.
        limit: u64,
    },
    /// A manifest that is none.
    #[error("Document {digest} of {store} is no manifest")]
    Document {
        /// The store's name.
        store: String,
        /// The document.
        digest: Digest,
        /// Why not.
        #[source]
        source: ManifestError,
    },
    /// Nothing of that name.
    #[error("{store} has no {what}")]
    NotFound {
        /// The store's name.
        store: String,
        /// Tag or digest.
        what: String,
    },
}

/// How a manifest is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Selector {
    /// By tag.
    Tag(String),
    /// By digest.
    Digest(Digest),
    /// The one that is meant when nobody says: the only one, or `latest`.
    Default,
}

/// A manifest or index as stored.
#[derive(Clone, Debug)]
pub struct StoredManifest {
    /// Its media type, as the store says or else the document itself.
    pub media_type: String,
    /// Digest of `bytes`.
    pub digest: Digest,
    /// The document.
    pub bytes: Vec<u8>,
}

/// A place that holds images.
pub trait ImageStore: Send + Sync {
    /// What to call it in messages: `oci:DIR` or `host/repository`.
    fn name(&self) -> &str;

    /// A manifest or index.
    ///
    /// # Errors
    /// [`StoreError`]; by digest, the bytes are verified.
    fn manifest(&self, selector: &Selector) -> Result<StoredManifest, StoreError>;

    /// A blob from its first byte to its last. The reader's bytes are not verified yet.
    ///
    /// # Errors
    /// [`StoreError`] when it cannot be opened.
    fn open_blob(&self, blob: &Descriptor) -> Result<Box<dyn Read + Send>, StoreError>;

    /// A blob to read at any position; `size` is its length in bytes if known.
    ///
    /// # Errors
    /// [`StoreError`] when there is no such blob, or a store that must be asked for the size fails.
    fn blob_source(
        &self,
        digest: &Digest,
        size: Option<u64>,
    ) -> Result<Arc<dyn ByteSource>, StoreError>;

    /// Adds a blob unless it is there already. Seen whole or not at all.
    ///
    /// # Errors
    /// [`StoreError`].
    fn put_blob(&self, bytes: &[u8]) -> Result<(), StoreError>;

    /// Adds a blob of `size` bytes that need not fit memory, unless it is there already. `open` is called for
    /// each try and gives the blob from its start.
    ///
    /// # Errors
    /// [`StoreError`]; [`StoreError::Damaged`] when the bytes have another digest.
    fn put_blob_from(
        &self,
        digest: &Digest,
        size: u64,
        open: &mut dyn FnMut() -> Result<Box<dyn Read + Send>, StoreError>,
    ) -> Result<(), StoreError>;

    /// Whether the blob is there.
    ///
    /// # Errors
    /// [`StoreError`] when that cannot be found out.
    fn has_blob(&self, digest: &Digest, size: u64) -> Result<bool, StoreError>;

    /// Takes over a blob that the store `from` has, without moving its bytes; says whether that worked. Only
    /// repositories of one registry can.
    ///
    /// # Errors
    /// [`StoreError`].
    fn mount_blob(&self, digest: &Digest, from: &dyn ImageStore) -> Result<bool, StoreError> {
        let _ = (digest, from);
        Ok(false)
    }

    /// Host and name of the repository that this store is, if it is one.
    fn repository(&self) -> Option<(&str, &str)> {
        None
    }

    /// Adds a manifest, and points `tag` at it.
    ///
    /// # Errors
    /// [`StoreError`].
    fn put_manifest(
        &self,
        tag: Option<&str>,
        media_type: &str,
        bytes: &[u8],
    ) -> Result<(), StoreError>;

    /// The index of manifests that name the manifest `digest` as their subject, if the store keeps one.
    ///
    /// # Errors
    /// [`StoreError`].
    fn referrers(&self, digest: &Digest) -> Result<Option<StoredManifest>, StoreError> {
        let _ = digest;
        Ok(None)
    }

    /// A small blob, whole and verified.
    ///
    /// # Errors
    /// [`StoreError`].
    fn read_blob(&self, blob: &Descriptor) -> Result<Vec<u8>, StoreError> {
        let store = || self.name().to_owned();
        let digest = blob.digest;
        if blob.size > MAX_BLOB_IN_MEMORY {
            return Err(StoreError::TooLarge {
                store: store(),
                digest,
                size: blob.size,
                limit: MAX_BLOB_IN_MEMORY,
            });
        }
        let mut bytes = Vec::new();
        self.open_blob(blob)?.take(blob.size + 1).read_to_end(&mut bytes).map_err(|error| {
            match error.downcast::<RegistryError>() {
                Ok(error) => error.into(), // names the blob and its place itself
                Err(source) => StoreError::Broken { store: store(), digest, source },
            }
        })?;
        let got = Digest::of(&bytes);
        if got != digest {
            return Err(StoreError::Damaged { store: store(), digest, got });
        }
        Ok(bytes)
    }
}

/// Opens the place of an image, and says which manifest of it is meant.
///
/// # Errors
/// [`StoreError`] when a layout directory is none; a registry is not contacted yet.
pub fn open(
    image: &ImageName,
    client: &Client,
) -> Result<(Arc<dyn ImageStore>, Selector), StoreError> {
    let selector = match image {
        ImageName::Layout(name) => name.tag.clone().map_or(Selector::Default, Selector::Tag),
        ImageName::Registry(name) => match (&name.digest, &name.tag) {
            (Some(digest), _) => Selector::Digest(*digest),
            (None, Some(tag)) => Selector::Tag(tag.clone()),
            (None, None) => Selector::Default,
        },
    };
    Ok((open_repository(&image.repository(), client)?, selector))
}

/// Opens a place that exists.
///
/// # Errors
/// [`StoreError`] when a layout directory is none; a registry is not contacted yet.
pub fn open_repository(
    place: &RepositoryName,
    client: &Client,
) -> Result<Arc<dyn ImageStore>, StoreError> {
    Ok(match place {
        RepositoryName::Layout(dir) => Arc::new(LayoutStore::open(dir)?),
        RepositoryName::Registry { host, repository } => {
            Arc::new(RepositoryStore::new(client, host, repository)?)
        }
    })
}

/// Opens a place to write to; a layout directory is made when there is none.
///
/// # Errors
/// [`StoreError`] when a directory holds something else.
pub fn create_repository(
    place: &RepositoryName,
    client: &Client,
) -> Result<Arc<dyn ImageStore>, StoreError> {
    match place {
        RepositoryName::Layout(dir) => Ok(Arc::new(LayoutStore::open_or_create(dir)?)),
        RepositoryName::Registry { .. } => open_repository(place, client),
    }
}
