//! A store in memory.

use std::collections::HashMap;
use std::io::{Cursor, Read};
use std::sync::Arc;

use parking_lot::{Mutex, MutexGuard};

use super::{ImageStore, Selector, StoreError, StoredManifest};
use formats::oci::{Descriptor, Digest};
use source::{ByteSource, MemorySource};

/// Images in memory: for tests, and for an image that is built and attached in one go.
#[derive(Default)]
pub struct MemoryStore {
    contents: Mutex<Contents>,
}

#[derive(Default)]
struct Contents {
    blobs: HashMap<Digest, Arc<[u8]>>,
    manifests: HashMap<Digest, String>,
    tags: HashMap<String, Digest>,
}

impl MemoryStore {
    /// An empty store.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    fn contents(&self) -> MutexGuard<'_, Contents> {
        self.contents.lock()
    }

    fn blob(&self, digest: &Digest) -> Result<Arc<[u8]>, StoreError> {
        self.contents()
            .blobs
            .get(digest)
            .cloned()
            .ok_or_else(|| self.missing(format!("blob {digest}")))
    }

    fn missing(&self, what: String) -> StoreError {
        StoreError::NotFound { store: self.name().to_owned(), what }
    }
}

impl ImageStore for MemoryStore {
    fn name(&self) -> &'static str {
        "memory"
    }

    fn manifest(&self, selector: &Selector) -> Result<StoredManifest, StoreError> {
        let digest = match selector {
            Selector::Digest(digest) => *digest,
            Selector::Default => {
                return self
                    .manifest(&Selector::Tag(formats::oci::reference::DEFAULT_TAG.to_owned()));
            }
            Selector::Tag(tag) => {
                *self.contents().tags.get(tag).ok_or_else(|| self.missing(format!("tag {tag}")))?
            }
        };
        let media_type = self.contents().manifests.get(&digest).cloned();
        let media_type = media_type.ok_or_else(|| self.missing(format!("manifest {digest}")))?;
        Ok(StoredManifest { media_type, digest, bytes: self.blob(&digest)?.to_vec() })
    }

    /// Referrers by the fallback tag, as in a registry without the list.
    fn referrers(&self, digest: &Digest) -> Result<Option<StoredManifest>, StoreError> {
        Ok(self.manifest(&Selector::Tag(super::referrers::fallback_tag(digest))).ok())
    }

    fn open_blob(&self, blob: &Descriptor) -> Result<Box<dyn Read + Send>, StoreError> {
        Ok(Box::new(Cursor::new(self.blob(&blob.digest)?)))
    }

    fn blob_source(
        &self,
        digest: &Digest,
        _: Option<u64>,
    ) -> Result<Arc<dyn ByteSource>, StoreError> {
        Ok(Arc::new(MemorySource::new(digest.to_string(), self.blob(digest)?)))
    }

    fn put_blob(&self, bytes: &[u8]) -> Result<(), StoreError> {
        self.contents().blobs.insert(Digest::of(bytes), bytes.into());
        Ok(())
    }

    fn put_blob_from(
        &self,
        digest: &Digest,
        size: u64,
        open: &mut dyn FnMut() -> Result<Box<dyn Read + Send>, StoreError>,
    ) -> Result<(), StoreError> {
        let (store, digest) = (self.name().to_owned(), *digest);
        let mut bytes = Vec::new();
        if let Err(source) = open()?.take(size + 1).read_to_end(&mut bytes) {
            return Err(StoreError::Broken { store, digest, source });
        }
        let got = Digest::of(&bytes);
        if got != digest {
            return Err(StoreError::Damaged { store, digest, got });
        }
        self.put_blob(&bytes)
    }

    fn has_blob(&self, digest: &Digest, _: u64) -> Result<bool, StoreError> {
        Ok(self.contents().blobs.contains_key(digest))
    }

    fn put_manifest(
        &self,
        tag: Option<&str>,
        media_type: &str,
        bytes: &[u8],
    ) -> Result<(), StoreError> {
        let digest = Digest::of(bytes);
        let mut contents = self.contents();
        contents.blobs.insert(digest, bytes.into());
        contents.manifests.insert(digest, media_type.to_owned());
        if let Some(tag) = tag {
            contents.tags.insert(tag.to_owned(), digest);
        }
        Ok(())
    }
}
