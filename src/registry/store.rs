//! Places that hold images.
//!
//! Conversion and attachment need few operations of such a place: a manifest by tag or digest, a blob as a
//! stream or by range, and a way to add blobs and manifests. [`ImageStore`] defines them; an OCI image layout
//! directory ([`LayoutStore`]) and a repository of a registry ([`RepositoryStore`]) are the two
//! implementations; for tests, `testing::MemoryStore` is one in memory and `testing::FaultyStore` one that
//! fails. A blob's source counts the bytes that were read of it ([`ByteSource::traffic`]).
//!
//! All content is checked: a blob or manifest requested by digest is verified against it here, and a stream
//! is verified by the code that reads it to its end.

mod layout;
pub mod referrers;
mod repository;

use std::io::Read;
use std::sync::Arc;

use thiserror::Error;

use crate::{RegistryClient, RegistryError};
use formats::oci::{Descriptor, Digest, ImageName, ManifestError, RepositoryName};
use source::{ByteSource, SourceError};

pub use layout::LayoutStore;
pub use repository::RepositoryStore;

/// Largest config or meta blob read into memory at once, 1 GiB: the meta image of a 100 GB layer.
const MAX_BLOB_IN_MEMORY: u64 = 1 << 30;

/// Reasons why a store did not deliver.
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
        /// The requested digest.
        digest: Digest,
        /// The digest of the bytes.
        got: Digest,
    },
    /// A stream broke before its end.
    #[error("The stream of blob {digest} of {store} broke")]
    Broken {
        /// The store's name.
        store: String,
        /// The blob.
        digest: Digest,
        /// Reason of the failure.
        #[source]
        source: std::io::Error,
    },
    /// A descriptor states a size that is too large to hold in memory.
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
    /// The document is not a manifest.
    #[error("Document {digest} of {store} is not a manifest")]
    Document {
        /// The store's name.
        store: String,
        /// The document.
        digest: Digest,
        /// Reason.
        #[source]
        source: ManifestError,
    },
    /// The store has no manifest or blob of that name.
    #[error("{store} has no {what}")]
    NotFound {
        /// The store's name.
        store: String,
        /// Tag or digest.
        what: String,
    },
}

/// Ways to name a manifest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Selector {
    /// By tag.
    Tag(String),
    /// By digest.
    Digest(Digest),
    /// The default when no name is given: the only manifest, or `latest`.
    Default,
}

/// A manifest or index as stored.
#[derive(Clone, Debug)]
pub struct StoredManifest {
    /// Its media type, from the store or else from the document itself.
    pub media_type: String,
    /// Digest of `bytes`.
    pub digest: Digest,
    /// The document.
    pub bytes: Vec<u8>,
}

/// A place that holds images.
pub trait ImageStore: Send + Sync {
    /// Name in messages: `oci:DIR` or `host/repository`.
    fn name(&self) -> &str;

    /// Returns a manifest or index.
    ///
    /// # Errors
    /// Returns [`StoreError`]; by digest, the bytes are verified.
    fn manifest(&self, selector: &Selector) -> Result<StoredManifest, StoreError>;

    /// Opens a blob for reading from its first byte to its last. The reader's bytes are not verified yet.
    ///
    /// # Errors
    /// Returns [`StoreError`] when it cannot be opened.
    fn open_blob(&self, blob: &Descriptor) -> Result<Box<dyn Read + Send>, StoreError>;

    /// Opens a blob for reading at any position; `size` is its length in bytes if known.
    ///
    /// # Errors
    /// Returns [`StoreError`] when there is no such blob, or when the store must be asked for the size and
    /// fails.
    fn blob_source(
        &self,
        digest: &Digest,
        size: Option<u64>,
    ) -> Result<Arc<dyn ByteSource>, StoreError>;

    /// As [`blob_source`](Self::blob_source), for a caller that checks each byte against a digest: such bytes may
    /// come over any way, also from a redirect that leaves TLS.
    ///
    /// # Errors
    /// As [`blob_source`](Self::blob_source).
    fn covered_source(
        &self,
        digest: &Digest,
        size: u64,
    ) -> Result<Arc<dyn ByteSource>, StoreError> {
        self.blob_source(digest, Some(size))
    }

    /// This store, for the image with these layers: it reads them at the `urls` of their descriptors too, where each byte is
    /// checked against a digest. `None` if that changes nothing.
    fn with_urls(&self, layers: &[Descriptor]) -> Option<Arc<dyn ImageStore>> {
        let _ = layers;
        None
    }

    /// Adds a blob unless the store has it already. Readers see it whole or not at all.
    ///
    /// # Errors
    /// Returns [`StoreError`].
    fn put_blob(&self, bytes: &[u8]) -> Result<(), StoreError>;

    /// Adds a blob of `size` bytes that need not fit memory, unless the store has it already. `open` is
    /// called for each try and returns a reader of the blob from its start.
    ///
    /// # Errors
    /// Returns [`StoreError`]; [`StoreError::Damaged`] when the bytes have another digest.
    fn put_blob_from(
        &self,
        digest: &Digest,
        size: u64,
        open: &mut dyn FnMut() -> Result<Box<dyn Read + Send>, StoreError>,
    ) -> Result<(), StoreError>;

    /// True if the store has the blob.
    ///
    /// # Errors
    /// Returns [`StoreError`] when the store cannot answer.
    fn has_blob(&self, digest: &Digest, size: u64) -> Result<bool, StoreError>;

    /// Takes over a blob that the store `from` has, without moving its bytes; returns true if it did. Only
    /// repositories of one registry support it.
    ///
    /// # Errors
    /// Returns [`StoreError`].
    fn mount_blob(&self, digest: &Digest, from: &dyn ImageStore) -> Result<bool, StoreError> {
        let _ = (digest, from);
        Ok(false)
    }

    /// Host and name of the repository, if this store is one.
    fn repository(&self) -> Option<(&str, &str)> {
        None
    }

    /// Adds a manifest, and points `tag` at it.
    ///
    /// # Errors
    /// Returns [`StoreError`].
    fn put_manifest(
        &self,
        tag: Option<&str>,
        media_type: &str,
        bytes: &[u8],
    ) -> Result<(), StoreError>;

    /// The index of manifests that name the manifest `digest` as their subject, if the store keeps one.
    ///
    /// # Errors
    /// Returns [`StoreError`].
    fn referrers(&self, digest: &Digest) -> Result<Option<StoredManifest>, StoreError> {
        let _ = digest;
        Ok(None)
    }

    /// Reads a small blob whole and verifies it.
    ///
    /// # Errors
    /// Returns [`StoreError`].
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
                Ok(error) => error.into(), // the error names the blob and its place itself
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

/// Opens the store of an image, and returns it with the selector of the image's manifest.
///
/// # Errors
/// Returns [`StoreError`] when the directory is not a layout directory; a registry is not contacted yet.
pub fn open(
    image: &ImageName,
    client: &RegistryClient,
) -> Result<(Arc<dyn ImageStore>, Selector), StoreError> {
    let selector = match image {
        ImageName::Layout(name) => match (&name.digest, &name.tag) {
            (Some(digest), _) => Selector::Digest(*digest),
            (None, Some(tag)) => Selector::Tag(tag.clone()),
            (None, None) => Selector::Default,
        },
        ImageName::Registry(name) => match (&name.digest, &name.tag) {
            (Some(digest), _) => Selector::Digest(*digest),
            (None, Some(tag)) => Selector::Tag(tag.clone()),
            (None, None) => Selector::Default,
        },
    };
    Ok((open_repository(&image.repository(), client)?, selector))
}

/// Opens an existing store.
///
/// # Errors
/// Returns [`StoreError`] when the directory is not a layout directory; a registry is not contacted yet.
pub fn open_repository(
    place: &RepositoryName,
    client: &RegistryClient,
) -> Result<Arc<dyn ImageStore>, StoreError> {
    Ok(match place {
        RepositoryName::Layout(dir) => Arc::new(LayoutStore::open(dir)?),
        RepositoryName::Registry { host, repository } => {
            Arc::new(RepositoryStore::new(client, host, repository)?)
        }
    })
}

/// Opens a store to write to; a missing layout directory is created.
///
/// # Errors
/// Returns [`StoreError`] when a directory holds something else.
pub fn create_repository(
    place: &RepositoryName,
    client: &RegistryClient,
) -> Result<Arc<dyn ImageStore>, StoreError> {
    match place {
        RepositoryName::Layout(dir) => Ok(Arc::new(LayoutStore::open_or_create(dir)?)),
        RepositoryName::Registry { .. } => open_repository(place, client),
    }
}
