//! State of an image beside its bytes: its blobs' traffic, their part in the cache, their problems, and the
//! source of each byte.

use std::sync::Arc;
use std::time::{Instant, UNIX_EPOCH};

use crate::readings::IoCounters;
use blobs::fetch::{Blob, FillProgress, Filling};
use blobs::identity::Verification;
use client::protocol::{
    BlobRecord, ChunkRecord, ChunkState, FailureRecord, PartKind, PlacedRecord, RetryRecord,
};
use disk::explain::{BytesPlace, Placed, What};
use disk::{Disk, DiskRange};
use source::{Traffic, TryingAgain};

/// Facts about an image that only its opener has.
pub trait ImageView: Send + Sync {
    /// Its counters now.
    fn counters(&self) -> IoCounters;

    /// Sources of bytes of its disk, in at most `most` parts.
    fn explain(&self, range: DiskRange, most: usize) -> Vec<Placed> {
        let _ = (range, most);
        Vec::new()
    }

    /// The blobs of the image.
    fn blobs(&self) -> Vec<BlobRecord> {
        Vec::new()
    }

    /// The present problem, as a sentence without a full stop.
    fn trouble(&self) -> Option<String> {
        None
    }
}

impl<F: Fn() -> IoCounters + Send + Sync> ImageView for F {
    fn counters(&self) -> IoCounters {
        self()
    }
}

/// The view of a [`Disk`].
pub struct DiskView {
    disk: Arc<Disk>,
    /// Each blob once, even if several layers have it.
    blobs: Vec<Arc<Blob>>,
    /// Counters of the blobs at the start.
    before: IoCounters,
    /// Fetches the rest of it, as long as the disk is served.
    filling: Option<Arc<Filling>>,
    /// Compares it with its layers.
    _comparing: Option<Box<dyn Send + Sync>>,
}

impl DiskView {
    /// Creates a view that counts from now on.
    #[must_use]
    pub fn new(disk: Arc<Disk>) -> Self {
        let mut blobs: Vec<Arc<Blob>> = disk.blobs().into_iter().flatten().collect();
        blobs.sort_by_key(|blob| blob.key(0));
        blobs.dedup_by_key(|blob| blob.key(0));
        let mut view =
            Self { disk, blobs, before: IoCounters::default(), filling: None, _comparing: None };
        view.before = view.total();
        view
    }

    /// Adds a background fill that ends with this view.
    #[must_use]
    pub fn filled(mut self, filling: Option<Arc<Filling>>) -> Self {
        self.filling = filling;
        self
    }

    /// Adds a comparison with the layers, which ends when it is dropped with this view.
    #[must_use]
    pub fn compared(mut self, comparing: Option<Box<dyn Send + Sync>>) -> Self {
        self._comparing = comparing;
        self
    }

    /// Progress of the background fill, if there is one.
    #[must_use]
    pub fn fill_progress(&self) -> Option<FillProgress> {
        self.filling.as_ref().map(|filling| filling.progress())
    }

    fn total(&self) -> IoCounters {
        let mut total = IoCounters::default();
        for blob in &self.blobs {
            let traffic = blob.source().blob().traffic();
            total.fetched += traffic.bytes;
            total.requests += traffic.requests;
            total.retries += traffic.retries;
            total.errors += traffic.failures;
            total.cached += blob.held();
        }
        total
    }
}

impl ImageView for DiskView {
    fn counters(&self) -> IoCounters {
        let now = self.total();
        let since = |now: u64, before: u64| now.saturating_sub(before);
        IoCounters {
            fetched: since(now.fetched, self.before.fetched),
            requests: since(now.requests, self.before.requests),
            retries: since(now.retries, self.before.retries),
            errors: since(now.errors, self.before.errors),
            cached: now.cached,
        }
    }

    fn explain(&self, range: DiskRange, most: usize) -> Vec<Placed> {
        self.disk.explain(range, most)
    }

    fn blobs(&self) -> Vec<BlobRecord> {
        let now = Instant::now();
        self.blobs.iter().map(|blob| record(blob, now)).collect()
    }

    fn trouble(&self) -> Option<String> {
        if let Some(reason) = self.disk.parts().refused() {
            return Some(format!("The image does not show what its layers contain: {reason}"));
        }
        let trying = self.blobs.iter().flat_map(|blob| blob.source().blob().traffic().trying_again);
        trying.max_by_key(|read| read.tries).map(|read| read.error)
    }
}

fn record(blob: &Blob, now: Instant) -> BlobRecord {
    let source = blob.source();
    let Traffic { bytes, requests, retries, host, trying_again, .. } = source.blob().traffic();
    let retry = |read: TryingAgain| RetryRecord {
        start_bytes: read.range.start,
        end_bytes: read.range.end,
        waits_ms: super::table::milliseconds(now.saturating_duration_since(read.since)),
        tries: read.tries,
        error: read.error,
        next_ms: super::table::milliseconds(read.next.saturating_duration_since(now)),
    };
    let Verification { verified_by, shared_by } = blob.verification();
    let failures = blob.failures().now().into_iter().map(|failure| FailureRecord {
        at_unix_ms: failure.at.duration_since(UNIX_EPOCH).map_or(0, super::table::milliseconds),
        chunk: failure.chunk,
        again: failure.again,
        reason: failure.reason,
    });
    BlobRecord {
        blob: source.id().to_owned(),
        source: source.blob().name().to_owned(),
        verified_by: verified_by.name().to_owned(),
        shared_by,
        host,
        fetched_bytes: bytes,
        requests,
        retries,
        cached_bytes: blob.held(),
        trying_again: trying_again.into_iter().map(retry).collect(),
        failures: failures.collect(),
    }
}

/// The places of a disk, as they are told.
pub(super) fn placed(places: Vec<Placed>) -> impl Iterator<Item = PlacedRecord> {
    places.into_iter().map(|place| PlacedRecord {
        offset_bytes: place.range.offset,
        length_bytes: place.range.len,
        what: match place.what {
            What::Hole => PartKind::Hole,
            What::Metadata => PartKind::Metadata,
            What::Data => PartKind::Data,
            What::Padding => PartKind::Padding,
        },
        layer: place.layer,
        chunk: place.chunk.map(|chunk| ChunkRecord {
            blob: chunk.blob,
            at_bytes: chunk.at,
            index: chunk.index,
            decoded_from: chunk.decoded_from,
            start_bytes: chunk.start,
            end_bytes: chunk.end,
            decoded_bytes: chunk.decoded,
            held: match chunk.held {
                BytesPlace::Memory => ChunkState::Memory,
                BytesPlace::Disk => ChunkState::Disk,
                BytesPlace::Remote => ChunkState::Remote,
            },
        }),
    })
}
