//! From a trace to requests for chunks.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::sync::Arc;

use super::clusters::clusters;
use crate::cache::Cache;
use crate::fetch::{Blob, Flow};
use formats::oci::Digest;
use formats::trace::Trace;

/// Result of a replay.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Replayed {
    /// Chunks requested, including those that were in memory already and those between them.
    pub chunks: u64,
    /// Bytes of the cache that they take.
    pub bytes: u64,
    /// Touches of blobs that the disk does not have.
    pub foreign: u64,
    /// Chunks that follow as the others are read, because the cache should not hold them all at once.
    pub later: u64,
}

impl fmt::Display for Replayed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { chunks, later, foreign, .. } = self;
        write!(f, "{chunks} chunks are fetched ahead, {later} more follow; ")?;
        write!(f, "{foreign} pieces belong to other blobs")
    }
}

/// Requests the chunks of `trace` ahead of demand, in its order, near ones [together](super::clusters). Up to
/// `most` bytes of the cache they are all requested at once, and demand overtakes them; the rest follows as
/// these are read. Returns at once.
pub fn replay(trace: &Trace, cache: &Cache, blobs: &[Option<Arc<Blob>>], most: u64) -> Replayed {
    replay_for(Flow::default(), trace, cache, blobs, most)
}

/// As [`replay`], for a device.
pub(super) fn replay_for(
    flow: Flow,
    trace: &Trace,
    cache: &Cache,
    blobs: &[Option<Arc<Blob>>],
    most: u64,
) -> Replayed {
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
            // A source may return one chunk after another, or none at all.
            at = (span.start + u64::from(span.len)).max(at + 1);
            if listed.insert(blob.key(span.index)) {
                order.push((*blob, span.index));
            }
        }
    }
    let mut batch = cache.batch_for(flow);
    let mut full = false;
    for cluster in clusters(&order) {
        let blob = &cluster.blob;
        blob.foresee();
        let room = cluster.room();
        full |= done.bytes + room > most;
        if full {
            done.later += u64::from(cluster.listed);
            let read = room * u64::from(cluster.listed) / cluster.chunks.len() as u64;
            batch.prefetch_later(blob, cluster.chunks, read);
        } else {
            done.bytes += room;
            done.chunks += cluster.chunks.len() as u64;
            batch.prefetch(blob, cluster.chunks);
        }
    }
    done
}

#[cfg(test)]
mod tests {
    use std::ops::Range;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use parking_lot::Mutex;

    use super::*;
    use crate::cache::{CacheOptions, Lookup};
    use crate::fetch::FetchOptions;
    use formats::trace::Touch;
    use source::chunk::{
        ChunkError, ChunkSource, ChunkSpan, EncodedChunk, EncodedRange, PlainChunks, SerialChunks,
        SerialDecoder,
    };
    use source::{ByteSource, SourceError};

    /// Zeros behind a network.
    struct FarZeros(u64);

    impl ByteSource for FarZeros {
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
        let fetch = FetchOptions { workers: 2, connections: 1, ahead: None };
        let cache = Cache::with(CacheOptions { budget: 64 * CHUNK, fetch });
        let blob = cache.open(Arc::new(PlainChunks::new(name, Arc::new(FarZeros(100 * CHUNK)))));
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
        // In another division than the blob's, twice the same, in no order, and past the end.
        let touches =
            [(20 * CHUNK + 5, 3 * CHUNK), (CHUNK, 1), (0, 10), (21 * CHUNK, 9), (200 * CHUNK, 1)];
        let done = replay(&trace(&blob, &touches), &cache, &[None, Some(blob.clone())], 50 * CHUNK);
        assert_eq!((done.chunks, done.foreign, done.later), (6, 0, 0));
        wait(&cache, &blob, &[0, 1, 20, 21, 22, 23]);
        let fetched = cache.fetched();
        assert_eq!(fetched.chunks.get(), 6);
        assert_eq!(fetched.ahead_requests.get(), 2);
        assert_eq!(fetched.demand_requests.get(), 0);
    }

    #[test]
    fn no_more_is_asked_for_than_may_be_and_nothing_of_other_blobs() {
        let (cache, blob) = cache_and_blob("a");
        let (_, other) = cache_and_blob("b");
        let mut trace = trace(&blob, &[(50 * CHUNK, 4 * CHUNK), (3 * CHUNK, 1)]);
        trace.blob(super::super::blob_name(&**other.source()));
        trace.touches.push(Touch { blob: 1, ..trace.touches[0] });
        let done = replay(&trace, &cache, &[Some(blob.clone())], 4 * CHUNK);
        let expected = Replayed { chunks: 4, bytes: 4 * CHUNK, foreign: 1, later: 1 };
        assert_eq!(done, expected);
        wait(&cache, &blob, &[50, 51, 52, 53]);
        assert!(!cache.holds(&blob, 3));
    }

    #[test]
    fn what_is_read_before_its_turn_brings_along_what_comes_with_it() {
        let (cache, blob) = cache_and_blob("a");
        let trace = trace(&blob, &[(0, 1), (30 * CHUNK, 4 * CHUNK), (60 * CHUNK, 2 * CHUNK)]);
        let done = replay(&trace, &cache, &[Some(blob.clone())], CHUNK);
        assert_eq!((done.chunks, done.later), (1, 6));
        wait(&cache, &blob, &[0]);
        let asked = cache.batch().get(&blob, 32, &mut || Box::new(|_| ()));
        assert!(matches!(asked, Lookup::Pending));
        wait(&cache, &blob, &[30, 31, 32, 33]);
        assert!(!cache.holds(&blob, 60));
        // All of them by one request more than the first chunk took; demand goes ahead of it.
        let fetched = cache.fetched();
        assert!(fetched.demand_requests.get() == 1 && fetched.ahead_requests.get() <= 2);
    }

    /// A far source that counts how many reads it has at once.
    #[derive(Default)]
    struct Counted {
        now: AtomicUsize,
        most: AtomicUsize,
        /// Held up by a test: the read of the first chunk.
        first: Mutex<()>,
    }

    impl ByteSource for Counted {
        fn name(&self) -> &'static str {
            "counted"
        }
        fn len(&self) -> u64 {
            100 * CHUNK
        }
        fn is_local(&self) -> bool {
            false
        }
        fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> Result<(), SourceError> {
            let now = self.now.fetch_add(1, Ordering::SeqCst) + 1;
            self.most.fetch_max(now, Ordering::SeqCst);
            std::thread::sleep(std::time::Duration::from_millis(20));
            drop((offset == 0).then(|| self.first.lock()));
            buf.fill(0);
            self.now.fetch_sub(1, Ordering::SeqCst);
            Ok(())
        }
    }

    /// Chunks in frames of [`FRAME`] chunks, each decoded only after those before it.
    struct Framed(PlainChunks);

    const FRAME: u32 = 4;

    impl ChunkSource for Framed {
        fn id(&self) -> &str {
            self.0.id()
        }
        fn decoded_len(&self) -> u64 {
            self.0.decoded_len()
        }
        fn chunk_count(&self) -> u32 {
            self.0.chunk_count()
        }
        fn chunk_at(&self, offset: u64) -> Option<ChunkSpan> {
            self.0.chunk_at(offset)
        }
        fn span(&self, index: u32) -> Option<ChunkSpan> {
            self.0.span(index)
        }
        fn blob(&self) -> &Arc<dyn ByteSource> {
            self.0.blob()
        }
        fn encoded(&self, index: u32) -> Result<EncodedRange, ChunkError> {
            self.0.encoded(index)
        }
        fn room(&self, index: u32) -> usize {
            self.0.room(index)
        }
        fn decode(
            &self,
            _: u32,
            _: &mut EncodedChunk,
            _: &mut [u8],
        ) -> Result<Range<usize>, ChunkError> {
            unreachable!("no chunk decodes alone")
        }
        fn serial(&self) -> Option<&dyn SerialChunks> {
            Some(self)
        }
    }

    impl SerialChunks for Framed {
        fn long_frame(&self, index: u32) -> Range<u32> {
            let first = index / FRAME * FRAME;
            first..first + FRAME
        }
        fn longest_frame(&self) -> u64 {
            u64::from(FRAME) * CHUNK
        }
        fn window(&self, _: &[u8]) -> u64 {
            1
        }
        fn begin_frame(&self, _: u32) -> Result<Box<dyn SerialDecoder>, ChunkError> {
            Ok(Box::new(Copied))
        }
    }

    struct Copied;

    impl SerialDecoder for Copied {
        fn decode_next(
            &mut self,
            encoded: &EncodedChunk,
            room: &mut [u8],
        ) -> Result<(), ChunkError> {
            room.copy_from_slice(encoded.bytes());
            Ok(())
        }
    }

    #[test]
    fn no_more_requests_are_under_way_ahead_than_may_be() {
        most_ahead(|chunks| Arc::new(chunks));
    }

    #[test]
    fn requests_for_long_frames_are_bounded_as_all_others_are() {
        most_ahead(|chunks| Arc::new(Framed(chunks)));
    }

    #[test]
    fn a_reader_of_a_long_frame_does_not_wait_for_what_is_fetched_ahead() {
        let fetch = FetchOptions { workers: 2, connections: 8, ahead: Some(1) };
        let cache = Cache::with(CacheOptions { budget: 64 * CHUNK, fetch });
        let source = Arc::new(Counted::default());
        let held = source.first.lock();
        let blob = cache.open(Arc::new(Framed(PlainChunks::new("counted", source.clone()))));
        let ahead = |chunk: u64| {
            replay(&trace(&blob, &[(chunk * CHUNK, 1)]), &cache, &[Some(blob.clone())], CHUNK)
        };
        ahead(0);
        while source.now.load(Ordering::SeqCst) == 0 {
            std::thread::yield_now();
        }
        // It is next ahead of demand, until it is read.
        ahead(56);
        let asked = cache.batch().get(&blob, 56, &mut || Box::new(|_| ()));
        assert!(matches!(asked, Lookup::Pending));
        wait(&cache, &blob, &[56]);
        assert!(!cache.holds(&blob, 0));
        drop(held);
        wait(&cache, &blob, &[0]);
    }

    /// Bounds of the requests under way for chunks of `chunked`.
    fn most_ahead(chunked: impl Fn(PlainChunks) -> Arc<dyn ChunkSource>) {
        let most = |ahead| {
            let fetch = FetchOptions { workers: 2, connections: 8, ahead };
            let cache = Cache::with(CacheOptions { budget: 64 * CHUNK, fetch });
            let source = Arc::new(Counted::default());
            let blob = cache.open(chunked(PlainChunks::new("counted", source.clone())));
            // Too far from each other to come together.
            let chunks: Vec<u32> = (0..96).step_by(8).collect();
            let touches: Vec<_> =
                chunks.iter().map(|&chunk| (u64::from(chunk) * CHUNK, 1)).collect();
            replay(&trace(&blob, &touches), &cache, &[Some(blob.clone())], 50 * CHUNK);
            wait(&cache, &blob, &chunks);
            source.most.load(Ordering::SeqCst)
        };
        assert_eq!(most(Some(1)), 1);
        assert_eq!(most(Some(2)), 2);
        assert!((3..=6).contains(&most(None)), "three quarters of the connections");
    }
}
