//! A repository of a registry as a store.

use std::collections::BTreeMap;
use std::io::Read;
use std::sync::Arc;

use super::{ImageStore, Selector, StoreError, StoredManifest};
use crate::{BlobReader, RegistryClient, Repository};
use formats::oci::reference::DEFAULT_TAG;
use formats::oci::{Descriptor, Digest};
use source::ByteSource;

/// `host/name`, over the distribution protocol.
pub struct RepositoryStore {
    name: String,
    repository: Repository,
    /// Layers of an image that are elsewhere too.
    elsewhere: BTreeMap<Digest, LayerElsewhere>,
}

/// Another place of a layer, by its descriptor.
struct LayerElsewhere {
    size: u64,
    urls: Vec<String>,
}

impl RepositoryStore {
    /// The repository `name` on `host`; it is not contacted yet.
    ///
    /// # Errors
    /// Returns [`StoreError::Registry`] when the two cannot be part of a URL.
    pub fn new(client: &RegistryClient, host: &str, name: &str) -> Result<Self, StoreError> {
        let repository = client.repository(host, name)?;
        Ok(Self { name: format!("{host}/{name}"), repository, elsewhere: BTreeMap::new() })
    }

    /// The URLs of a layer.
    fn urls(&self, digest: &Digest) -> &[String] {
        self.elsewhere.get(digest).map_or(&[], |layer| &layer.urls)
    }
}

impl ImageStore for RepositoryStore {
    fn name(&self) -> &str {
        &self.name
    }

    fn manifest(&self, selector: &Selector) -> Result<StoredManifest, StoreError> {
        let manifest = match selector {
            Selector::Tag(tag) => self.repository.manifest(tag)?,
            Selector::Default => self.repository.manifest(DEFAULT_TAG)?,
            Selector::Digest(digest) => self.repository.manifest(&digest.to_string())?,
        };
        Ok(StoredManifest {
            media_type: manifest.media_type,
            digest: manifest.digest,
            bytes: manifest.bytes,
        })
    }

    fn referrers(&self, digest: &Digest) -> Result<Option<StoredManifest>, StoreError> {
        let found = self.repository.referrers(digest)?;
        Ok(found.map(|manifest| StoredManifest {
            media_type: manifest.media_type,
            digest: manifest.digest,
            bytes: manifest.bytes,
        }))
    }

    fn open_blob(&self, blob: &Descriptor) -> Result<Box<dyn Read + Send>, StoreError> {
        let urls = if blob.urls.is_empty() { self.urls(&blob.digest) } else { &blob.urls };
        let reader: BlobReader = self.repository.blob_stream(&blob.digest, blob.size, urls)?;
        Ok(Box::new(reader))
    }

    fn blob_source(
        &self,
        digest: &Digest,
        size: Option<u64>,
    ) -> Result<Arc<dyn ByteSource>, StoreError> {
        let known = || self.elsewhere.get(digest).map(|layer| layer.size);
        let size = match size.or_else(known) {
            Some(size) => size,
            None => self.repository.blob_size(digest)?,
        };
        Ok(Arc::new(self.repository.blob(digest, size)?))
    }

    fn covered_source(
        &self,
        digest: &Digest,
        size: u64,
    ) -> Result<Arc<dyn ByteSource>, StoreError> {
        Ok(Arc::new(self.repository.covered_blob(digest, size, self.urls(digest))?))
    }

    fn with_urls(&self, layers: &[Descriptor]) -> Option<Arc<dyn ImageStore>> {
        let named = layers.iter().filter(|layer| !layer.urls.is_empty());
        let elsewhere: BTreeMap<_, _> = named
            .map(|layer| {
                (layer.digest, LayerElsewhere { size: layer.size, urls: layer.urls.clone() })
            })
            .collect();
        let (name, repository) = (self.name.clone(), self.repository.clone());
        (!elsewhere.is_empty()).then(|| Arc::new(Self { name, repository, elsewhere }) as _)
    }

    fn put_blob(&self, bytes: &[u8]) -> Result<(), StoreError> {
        let digest = Digest::of(bytes);
        self.repository.push_blob(&digest, &bytes::Bytes::copy_from_slice(bytes))?;
        Ok(())
    }

    fn put_blob_from(
        &self,
        digest: &Digest,
        size: u64,
        open: &mut dyn FnMut() -> Result<Box<dyn Read + Send>, StoreError>,
    ) -> Result<(), StoreError> {
        self.repository.push_blob_from(digest, size, &mut || match open() {
            Ok(reader) => Ok(reader),
            Err(error) => Err(std::io::Error::other(error)),
        })?;
        Ok(())
    }

    fn has_blob(&self, digest: &Digest, _: u64) -> Result<bool, StoreError> {
        Ok(self.repository.blob_exists(digest)?)
    }

    fn mount_blob(&self, digest: &Digest, from: &dyn ImageStore) -> Result<bool, StoreError> {
        match from.repository() {
            Some((host, name)) if host == self.repository.host() => {
                Ok(self.repository.mount_blob(digest, name)?)
            }
            _ => Ok(false),
        }
    }

    fn repository(&self) -> Option<(&str, &str)> {
        Some((self.repository.host(), self.repository.name()))
    }

    fn put_manifest(
        &self,
        tag: Option<&str>,
        media_type: &str,
        bytes: &[u8],
    ) -> Result<(), StoreError> {
        let digest = Digest::of(bytes).to_string();
        self.repository.put_manifest(tag.unwrap_or(&digest), media_type, bytes)?;
        Ok(())
    }
}
