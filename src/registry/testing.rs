//! Doubles for tests of the code above: the feature `testing`.

use std::collections::HashMap;
use std::io::{self, Cursor, Read};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use parking_lot::{Mutex, MutexGuard};

use crate::store::{ImageStore, Selector, StoreError, StoredManifest, referrers};
use formats::oci::{Descriptor, Digest};
use source::testing::{FaultySource, ReadFault};
use source::{ByteSource, MemorySource};

/// Images in memory.
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
        Ok(self.manifest(&Selector::Tag(referrers::fallback_tag(digest))).ok())
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

/// A store that fails at one call, and whose blobs have faults when they are read at a position.
pub struct FaultyStore<S> {
    inner: S,
    calls: AtomicUsize,
    fails_at: Option<usize>,
    faults: Vec<ReadFault>,
}

impl<S: ImageStore> FaultyStore<S> {
    /// `inner`, of which the call number `fails_at` fails, counted from 0 over all calls that may fail.
    pub fn failing(inner: S, fails_at: Option<usize>) -> Self {
        Self { inner, calls: AtomicUsize::new(0), fails_at, faults: Vec::new() }
    }

    /// `inner`, with these faults in the [source](ImageStore::blob_source) of each blob.
    pub fn with_faults(inner: S, faults: Vec<ReadFault>) -> Self {
        Self { inner, calls: AtomicUsize::new(0), fails_at: None, faults }
    }

    /// Number of calls so far that could fail.
    pub fn calls(&self) -> usize {
        self.calls.load(Ordering::Relaxed)
    }

    /// The store below.
    pub fn inner(&self) -> &S {
        &self.inner
    }

    fn call(&self, digest: Digest) -> Result<(), StoreError> {
        if Some(self.calls.fetch_add(1, Ordering::Relaxed)) != self.fails_at {
            return Ok(());
        }
        let source = io::Error::other("an injected failure");
        Err(StoreError::Broken { store: self.name().to_owned(), digest, source })
    }
}

impl<S: ImageStore> ImageStore for FaultyStore<S> {
    fn name(&self) -> &str {
        self.inner.name()
    }

    fn manifest(&self, selector: &Selector) -> Result<StoredManifest, StoreError> {
        self.call(Digest::of(b""))?;
        self.inner.manifest(selector)
    }

    fn open_blob(&self, blob: &Descriptor) -> Result<Box<dyn Read + Send>, StoreError> {
        self.call(blob.digest)?;
        self.inner.open_blob(blob)
    }

    fn blob_source(
        &self,
        digest: &Digest,
        size: Option<u64>,
    ) -> Result<Arc<dyn ByteSource>, StoreError> {
        self.call(*digest)?;
        let source = self.inner.blob_source(digest, size)?;
        Ok(Arc::new(FaultySource::new(source, self.faults.clone())))
    }

    fn put_blob(&self, bytes: &[u8]) -> Result<(), StoreError> {
        self.call(Digest::of(bytes))?;
        self.inner.put_blob(bytes)
    }

    fn put_blob_from(
        &self,
        digest: &Digest,
        size: u64,
        open: &mut dyn FnMut() -> Result<Box<dyn Read + Send>, StoreError>,
    ) -> Result<(), StoreError> {
        self.call(*digest)?;
        self.inner.put_blob_from(digest, size, open)
    }

    fn has_blob(&self, digest: &Digest, size: u64) -> Result<bool, StoreError> {
        self.call(*digest)?;
        self.inner.has_blob(digest, size)
    }

    fn mount_blob(&self, digest: &Digest, from: &dyn ImageStore) -> Result<bool, StoreError> {
        self.call(*digest)?;
        self.inner.mount_blob(digest, from)
    }

    fn repository(&self) -> Option<(&str, &str)> {
        self.inner.repository()
    }

    fn put_manifest(
        &self,
        tag: Option<&str>,
        media_type: &str,
        bytes: &[u8],
    ) -> Result<(), StoreError> {
        self.call(Digest::of(bytes))?;
        self.inner.put_manifest(tag, media_type, bytes)
    }

    fn referrers(&self, digest: &Digest) -> Result<Option<StoredManifest>, StoreError> {
        self.call(*digest)?;
        self.inner.referrers(digest)
    }
}
