//! From a trace to chunks that are asked for.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use super::format::Trace;
use crate::cache::Cache;
use crate::fetch::{Blob, Key};
use crate::oci::Digest;

/// What became of a trace.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Replayed {
    /// Chunks asked for, those that were here already included.
    pub chunks: u64,
    /// Bytes of the cache that they take.
    pub bytes: u64,
    /// Touches of blobs that the disk does not have.
    pub foreign: u64,
    /// Chunks that follow as the others are read, since the cache should not hold them all at once.
    pub later: u64,
}

/// Asks for the chunks of `trace` ahead of demand, in its order. Up to `most` bytes of the cache they are
/// all wanted at once, so that neighbours come by one request, and demand overtakes them; the rest
/// follows as these are read. Returns at once.
pub fn replay(trace: &Trace, cache: &Cache, blobs: &[Option<Arc<Blob>>], most: u64) -> Replayed {
    let named: HashMap<Digest, &Arc<Blob>> =
        blobs.iter().flatten().map(|blob| (super::blob_name(&**blob.source()), blob)).collect();
    let known: Vec<Option<&Arc<Blob>>> =
        trace.blobs.iter().map(|digest| named.get(digest).copied()).collect();
    let mut done = Replayed::default();
    let mut listed = HashSet::new();
    let mut order = Vec::new();
    for touch in &trace.touches {
        let Some(Some(blob)) = known.get(touch.blob as usize) else {
            done.foreign += 1;
            continue;
        };
        let source = blob.source();
        let mut at = touch.start;
        while at < touch.end()
            && let Some(span) = source.chunk_at(at)
        {
            // A source that gives chunk after chunk, or nothing at all.
            at = (span.start + u64::from(span.len)).max(at + 1);
            if listed.insert(blob.key(span.index)) {
                order.push((*blob, span.index));
            }
        }
    }
    let mut batch = cache.batch();
    let mut full = false;
    for (blob, chunk) in bridged(order, &listed) {
        blob.foresee();
        let room = blob.source().room(chunk) as u64;
        full |= done.bytes + room > most;
        if full {
            done.later += 1;
            batch.prefetch_later(blob, chunk);
        } else {
            done.bytes += room;
            done.chunks += 1;
            batch.prefetch(blob, chunk..chunk + 1);
        }
    }
    done
}

/// Adds single chunks between others, so that one request brings both sides: a chunk of some 300 KB comes
/// sooner than the answer to another request. No more than one for [`BRIDGES`] that are listed.
fn bridged<'b>(
    order: Vec<(&'b Arc<Blob>, u32)>,
    listed: &HashSet<Key>,
) -> Vec<(&'b Arc<Blob>, u32)> {
    let mut left = order.len() / BRIDGES;
    let mut all = Vec::with_capacity(order.len() + left);
    for (blob, chunk) in order {
        all.push((blob, chunk));
        let has = |chunk: u32| listed.contains(&blob.key(chunk));
        if left > 0 && chunk < u32::MAX - 1 && !has(chunk + 1) && has(chunk + 2) {
            all.push((blob, chunk + 1));
            left -= 1;
        }
    }
    all
}

/// One bridge for so many chunks at most.
const BRIDGES: usize = 5;

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;

    use super::super::Touch;
    use super::*;
    use crate::cache::CacheOptions;
    use crate::chunk::PlainChunks;
    use crate::fetch::FetchOptions;
    use crate::source::{ByteSource, SourceError};

    /// Zeros behind a network.
    struct Far(u64);

    impl ByteSource for Far {
        fn name(&self) -> &'static str {
            "far"
        }
        fn len(&self) -> u64 {
            self.0
        }
        fn is_local(&self) -> bool {
            false
        }
        fn read_exact_at(&self, buf: &mut [u8], _: u64) -> Result<(), SourceError> {
            buf.fill(0);
            Ok(())
        }
    }

    const CHUNK: u64 = PlainChunks::CHUNK;

    fn cache_and_blob(name: &str) -> (Arc<Cache>, Arc<Blob>) {
        let fetch = FetchOptions { workers: 2, connections: 1 };
        let cache = Cache::with(CacheOptions { budget: 64 * CHUNK, fetch });
        let blob = cache.open(Arc::new(PlainChunks::new(name, Arc::new(Far(100 * CHUNK)))));
        (cache, blob)
    }

    fn trace(name: &Blob, ranges: &[(u64, u64)]) -> Trace {
        let mut trace = Trace::default();
        trace.blob(super::super::blob_name(&**name.source()));
        trace.touches = ranges
            .iter()
            .map(|&(start, len)| Touch { blob: 0, start, len, at: 0, weight: 1 })
            .collect();
        trace
    }

    fn wait(cache: &Cache, blob: &Blob, chunks: &[u32]) {
        for _ in 0..2000 {
            if chunks.iter().all(|&chunk| cache.holds(blob, chunk)) {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        panic!("they do not come: {:?}", cache.stats());
    }

    #[test]
    fn what_a_trace_lists_is_here_before_it_is_asked_for_and_by_few_requests() {
        let (cache, blob) = cache_and_blob("a");
        // Cut otherwise than the blob is now, twice the same, in no order, and past the end.
        let touches =
            [(20 * CHUNK + 5, 3 * CHUNK), (CHUNK, 1), (0, 10), (21 * CHUNK, 9), (200 * CHUNK, 1)];
        let done = replay(&trace(&blob, &touches), &cache, &[None, Some(blob.clone())], 50 * CHUNK);
        assert_eq!((done.chunks, done.foreign, done.later), (6, 0, 0));
        wait(&cache, &blob, &[0, 1, 20, 21, 22, 23]);
        let fetched = cache.fetched();
        assert_eq!(fetched.chunks.load(Ordering::Relaxed), 6);
        assert_eq!(fetched.ahead_requests.load(Ordering::Relaxed), 2);
        assert_eq!(fetched.demand_requests.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn no_more_is_asked_for_than_may_be_and_nothing_of_other_blobs() {
        let (cache, blob) = cache_and_blob("a");
        let (_, other) = cache_and_blob("b");
        let mut trace = trace(&blob, &[(50 * CHUNK, 4 * CHUNK), (3 * CHUNK, 1)]);
        trace.blob(super::super::blob_name(&**other.source()));
        trace.touches.push(Touch { blob: 1, ..trace.touches[0] });
        let done = replay(&trace, &cache, &[Some(blob.clone())], 3 * CHUNK);
        let expected = Replayed { chunks: 3, bytes: 3 * CHUNK, foreign: 1, later: 2 };
        assert_eq!(done, expected);
        wait(&cache, &blob, &[50, 51, 52]);
        assert!(!cache.holds(&blob, 53) && !cache.holds(&blob, 3));
    }
}
