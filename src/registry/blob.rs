//! Range reads of one blob.
//!
//! A read is one `GET` with a `Range`. An answer is accepted only when it states exactly that
//! range: status 206, `Content-Range` with the requested first and last byte and the blob's size,
//! and exactly that many bytes. The size comes from the descriptor, so no request is needed before
//! the first read.
//!
//! `way` chooses the source, `race` runs one read. This file repeats reads until they are whole or
//! the budget is used up, and remembers which source sent which bytes, in case they turn out to be
//! wrong.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use parking_lot::Mutex;

use super::downloads::Download;
use super::error::RegistryError;
use super::race::RacedRead;
use super::retry::Budget;
use super::way::{BlobAddress, BlobPlaces, CoveredBy};
use formats::oci::Digest;
use source::{ByteSource, Class, OneBuffer, Origin, Retries, Run, SourceError, Traffic};
use threads::Counter;

/// Counters of one blob's fetches.
#[derive(Debug, Default)]
pub struct RemoteStats {
    /// Range requests made; a request with all its redirects counts as one.
    pub requests: Counter,
    /// Bytes of bodies that arrived.
    pub bytes: Counter,
    /// Reads that failed at every source and were tried again.
    pub retries: Counter,
    /// Reads that failed for good.
    pub failures: Counter,
    /// Reads that have failed and wait for their next try.
    pub trying_again: Retries,
    /// Second requests, for reads that took unusually long.
    pub hedges: Counter,
    /// Second requests that finished first.
    pub hedges_won: Counter,
}

/// Number of deliveries remembered: more than are between the network and the checksums at any
/// time.
const REMEMBERED: usize = 256;

/// Recent byte ranges with their source.
#[derive(Default)]
pub(super) struct Deliveries(Mutex<VecDeque<RangeDelivery>>);

struct RangeDelivery {
    range: Range<u64>,
    way: usize,
    by_peer: bool,
}

impl Deliveries {
    /// Adds a range that arrived; a range that continues the previous one from the same source
    /// extends that delivery.
    pub(super) fn add(&self, range: Range<u64>, way: usize, by_peer: bool) {
        let mut all = self.0.lock();
        let same = |last: &&mut RangeDelivery| {
            last.range.end == range.start && (last.way, last.by_peer) == (way, by_peer)
        };
        if let Some(last) = all.iter_mut().rev().take(32).find(same) {
            last.range.end = range.end;
            return;
        }
        if all.len() == REMEMBERED {
            all.pop_front();
        }
        all.push_back(RangeDelivery { range, way, by_peer });
    }

    /// Name of the source of the last bytes; before any arrived, of the source that is asked first.
    fn last(&self, blob: &BlobAddress) -> String {
        let all = self.0.lock();
        let last = all.back().map(|last| (last.way, last.by_peer));
        drop(all);
        let (way, by_peer) = last.unwrap_or_else(|| (blob.order()[0], false));
        blob.ways[way].sender(by_peer)
    }

    /// Name of the sender of the byte `at`; if that is not known, of the last bytes.
    fn sender(&self, at: u64, blob: &BlobAddress) -> String {
        let all = self.0.lock();
        let found = all.iter().rev().find(|delivery| delivery.range.contains(&at));
        let Some((way, by_peer)) = found.map(|delivery| (delivery.way, delivery.by_peer)) else {
            drop(all);
            return self.last(blob);
        };
        drop(all);
        blob.ways[way].sender(by_peer)
    }

    /// Forgets the sources of the bytes of `range`, and returns them.
    fn take(&self, range: &Range<u64>) -> Vec<(usize, bool)> {
        let mut all = self.0.lock();
        let meets = |other: &Range<u64>| other.start < range.end && range.start < other.end;
        let mut found = Vec::new();
        all.retain(|delivery| {
            let meets = meets(&delivery.range);
            if meets && !found.contains(&(delivery.way, delivery.by_peer)) {
                found.push((delivery.way, delivery.by_peer));
            }
            !meets
        });
        found
    }
}

/// A blob in a registry, readable at any position by many threads.
pub struct RemoteBlob {
    blob: BlobAddress,
    digest: Digest,
    name: String,
    stats: Arc<RemoteStats>,
    deliveries: Deliveries,
}

impl RemoteBlob {
    pub(super) fn new(
        places: BlobPlaces<'_>,
        size: u64,
        covered: CoveredBy<'_>,
    ) -> Result<Self, RegistryError> {
        let digest = *places.digest;
        let name = places.registry.describe(&digest.to_string());
        // The reader's error names the blob; the errors below need not repeat it.
        let blob = BlobAddress::new(places, size, covered, "this blob")?;
        let (stats, deliveries) = Default::default();
        Ok(Self { blob, digest, name, stats, deliveries })
    }

    /// Counts into `stats`, which other blobs may share.
    #[must_use]
    pub fn with_stats(mut self, stats: Arc<RemoteStats>) -> Self {
        self.stats = stats;
        self
    }

    /// Counters of the fetches so far.
    #[must_use]
    pub fn stats(&self) -> &Arc<RemoteStats> {
        &self.stats
    }

    /// Records a read that began at `begun` in the log of downloads, if there is one.
    fn note(&self, range: Range<u64>, class: Class, begun: Instant, error: Option<&RegistryError>) {
        let network = &self.blob.registry().services.network;
        if let Some(log) = network.log() {
            log.downloaded(Download {
                blob: self.digest,
                host: self.deliveries.sender(range.end - 1, &self.blob),
                range,
                class,
                took: begun.elapsed(),
                error: error.map(ToString::to_string),
            });
        }
    }

    /// Fetches `range` with as many requests as it takes, like [`ByteSource::read_run`] but with a matchable
    /// error. The bytes that arrived before a break are kept, and only the rest is requested again.
    ///
    /// # Errors
    /// See [`RegistryError`]. The caller has checked that the range lies in the blob.
    fn fetch(
        &self,
        range: Range<u64>,
        class: Class,
        run: &mut dyn Run,
    ) -> Result<(), RegistryError> {
        let services = &self.blob.registry().services;
        services.network.limits().pace(class, range.end - range.start);
        let mut budget = Budget::new(services.read_retry, self.blob.registry());
        let mut attempts = self.stats.trying_again.read(range.clone());
        let mut reading = RacedRead {
            blob: &self.blob,
            network: &services.network,
            stats: &self.stats,
            deliveries: &self.deliveries,
            at: range.start,
            end: range.end,
            class,
            run,
        };
        loop {
            let Err(error) = reading.once(budget.deadline()) else { return Ok(()) };
            let told = budget.pause_telling(error, |error, wait| attempts.failed(error, wait));
            if let Err(error) = told {
                self.stats.failures.add(1);
                return Err(error);
            }
            self.stats.retries.add(1);
        }
    }
}

impl ByteSource for RemoteBlob {
    fn len(&self) -> u64 {
        self.blob.size
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> Result<(), SourceError> {
        let range = offset..offset.saturating_add(buf.len() as u64);
        self.read_run(range, Class::Demand, &mut OneBuffer::new(buf))
    }

    fn read_run(
        &self,
        range: Range<u64>,
        class: Class,
        run: &mut dyn Run,
    ) -> Result<(), SourceError> {
        let (offset, end, size) = (range.start, range.end, self.blob.size);
        if offset > end || end > size {
            return Err(SourceError::PastEnd { name: self.name.clone(), offset, end, size });
        }
        if range.is_empty() {
            return Ok(());
        }
        let begun = Instant::now();
        let read = self.fetch(range.clone(), class, run);
        self.note(range, class, begun, read.as_ref().err());
        read.map_err(|error| SourceError::Remote {
            name: self.name.clone(),
            offset,
            end,
            reason: error.to_string(),
            lasting: !error.root().is_transient(),
        })
    }

    fn traffic(&self) -> Traffic {
        let get = Counter::get;
        Traffic {
            bytes: get(&self.stats.bytes),
            requests: get(&self.stats.requests),
            retries: get(&self.stats.retries),
            failures: get(&self.stats.failures),
            host: Some(self.deliveries.last(&self.blob)),
            trying_again: self.stats.trying_again.now(),
        }
    }

    fn is_local(&self) -> bool {
        false
    }

    fn origin(&self) -> Origin {
        self.blob.registry().origin_of_blobs()
    }

    fn distrust(&self, range: Range<u64>) {
        for (way, by_peer) in self.deliveries.take(&range) {
            let way = &self.blob.ways[way];
            let sender = way.sender(by_peer);
            tracing::warn!(
                "Bytes {}..{} of {} that {sender} sent are wrong: asking other sources first",
                range.start,
                range.end,
                self.name
            );
            way.lied(by_peer);
        }
    }

    fn name(&self) -> &str {
        &self.name
    }
}
