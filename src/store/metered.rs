//! What is read of a store on behalf of one device.

use std::io::Read;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::{ImageStore, Selector, StoreError, StoredManifest};
use crate::oci::{Descriptor, Digest};
use crate::source::{ByteSource, Class, Run, SourceError};

/// Counters of a [`Metered`] store.
#[derive(Debug, Default)]
pub struct Meter {
    /// Bytes of blobs read by range: from a registry, these came over the network.
    pub bytes: AtomicU64,
    /// Ranges read.
    pub reads: AtomicU64,
    /// Reads that failed for good.
    pub errors: AtomicU64,
}

/// A store that counts what is read of its blobs by range.
pub struct Metered {
    inner: Arc<dyn ImageStore>,
    meter: Arc<Meter>,
}

impl Metered {
    /// `inner`, counted by `meter`.
    pub fn new(inner: Arc<dyn ImageStore>, meter: Arc<Meter>) -> Self {
        Self { inner, meter }
    }
}

impl ImageStore for Metered {
    fn name(&self) -> &str {
        self.inner.name()
    }

    fn manifest(&self, selector: &Selector) -> Result<StoredManifest, StoreError> {
        self.inner.manifest(selector)
    }

    fn referrers(&self, digest: &Digest) -> Result<Option<StoredManifest>, StoreError> {
        self.inner.referrers(digest)
    }

    fn open_blob(&self, blob: &Descriptor) -> Result<Box<dyn Read + Send>, StoreError> {
        self.inner.open_blob(blob)
    }

    fn blob_source(
        &self,
        digest: &Digest,
        size: Option<u64>,
    ) -> Result<Arc<dyn ByteSource>, StoreError> {
        let inner = self.inner.blob_source(digest, size)?;
        Ok(Arc::new(MeteredSource { inner, meter: self.meter.clone() }))
    }

    fn put_blob(&self, bytes: &[u8]) -> Result<(), StoreError> {
        self.inner.put_blob(bytes)
    }

    fn put_blob_from(
        &self,
        digest: &Digest,
        size: u64,
        open: &mut dyn FnMut() -> Result<Box<dyn Read + Send>, StoreError>,
    ) -> Result<(), StoreError> {
        self.inner.put_blob_from(digest, size, open)
    }

    fn has_blob(&self, digest: &Digest, size: u64) -> Result<bool, StoreError> {
        self.inner.has_blob(digest, size)
    }

    fn mount_blob(&self, digest: &Digest, from: &dyn ImageStore) -> Result<bool, StoreError> {
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
        self.inner.put_manifest(tag, media_type, bytes)
    }
}

struct MeteredSource {
    inner: Arc<dyn ByteSource>,
    meter: Arc<Meter>,
}

impl MeteredSource {
    fn count(&self, bytes: u64, result: Result<(), SourceError>) -> Result<(), SourceError> {
        match &result {
            Ok(()) => {
                self.meter.reads.fetch_add(1, Ordering::Relaxed);
                self.meter.bytes.fetch_add(bytes, Ordering::Relaxed);
            }
            Err(_) => {
                self.meter.errors.fetch_add(1, Ordering::Relaxed);
            }
        }
        result
    }
}

impl ByteSource for MeteredSource {
    fn len(&self) -> u64 {
        self.inner.len()
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> Result<(), SourceError> {
        let result = self.inner.read_exact_at(buf, offset);
        self.count(buf.len() as u64, result)
    }

    fn read_run(
        &self,
        range: Range<u64>,
        class: Class,
        run: &mut dyn Run,
    ) -> Result<(), SourceError> {
        let bytes = range.end.saturating_sub(range.start);
        self.count(bytes, self.inner.read_run(range, class, run))
    }

    fn is_local(&self) -> bool {
        self.inner.is_local()
    }

    fn distrust(&self, range: Range<u64>) {
        self.inner.distrust(range);
    }

    fn name(&self) -> &str {
        self.inner.name()
    }
}
