//! Devices take turns: one that reads cold without end does not hold up another.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use blobs::cache::{Cache, CacheOptions, Lookup};
use blobs::fetch::{Blob, FetchOptions, Flow};
use source::chunk::{ChunkError, ChunkSource, ChunkSpan, EncodedChunk, EncodedRange};
use source::{ByteSource, MemorySource, SourceError};

const LEN: usize = 4096;
const CHUNKS: usize = 4096;

/// A blob whose chunks take a while to decode, and count themselves.
struct SlowChunks {
    id: String,
    blob: Arc<dyn ByteSource>,
    made: AtomicUsize,
}

/// Bytes behind a network, or in memory.
struct SlowBytes {
    bytes: MemorySource,
    far: bool,
}

impl ByteSource for SlowBytes {
    fn name(&self) -> &str {
        self.bytes.name()
    }
    fn len(&self) -> u64 {
        self.bytes.len()
    }
    fn is_local(&self) -> bool {
        !self.far
    }
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> Result<(), SourceError> {
        if self.far {
            std::thread::sleep(Duration::from_millis(2));
        }
        self.bytes.read_exact_at(buf, offset)
    }
}

impl SlowChunks {
    fn new(id: &str, far: bool) -> Arc<Self> {
        let bytes = MemorySource::new(id, vec![7; LEN * CHUNKS]);
        let blob = Arc::new(SlowBytes { bytes, far });
        Arc::new(Self { id: id.into(), blob, made: AtomicUsize::new(0) })
    }
}

impl ChunkSource for SlowChunks {
    fn id(&self) -> &str {
        &self.id
    }
    fn decoded_len(&self) -> u64 {
        (LEN * CHUNKS) as u64
    }
    fn chunk_count(&self) -> u32 {
        CHUNKS as u32
    }
    fn chunk_at(&self, offset: u64) -> Option<ChunkSpan> {
        let index = (offset / LEN as u64) as u32;
        Some(ChunkSpan { index, start: u64::from(index) * LEN as u64, len: LEN as u32 })
    }
    fn blob(&self) -> &Arc<dyn ByteSource> {
        &self.blob
    }
    fn encoded(&self, index: u32) -> Result<EncodedRange, ChunkError> {
        let start = u64::from(index) * LEN as u64;
        Ok(EncodedRange { range: start..start + LEN as u64, head: 0, tail: 0 })
    }
    fn room(&self, _: u32) -> usize {
        LEN
    }
    fn decode(
        &self,
        _: u32,
        encoded: &mut EncodedChunk,
        room: &mut [u8],
    ) -> Result<Range<usize>, ChunkError> {
        std::thread::sleep(Duration::from_millis(1));
        room.copy_from_slice(encoded.bytes());
        self.made.fetch_add(1, Ordering::SeqCst);
        Ok(0..LEN)
    }
}

/// Requests a chunk of a device; its arrival is told.
fn ask(cache: &Cache, flow: Flow, blob: &Arc<Blob>, chunk: u32) -> Receiver<()> {
    let (tell, told) = channel();
    let lookup = cache.batch_for(flow).get(blob, chunk, &mut || {
        let tell = tell.clone();
        Box::new(move |result| {
            result.unwrap();
            let _ = tell.send(());
        })
    });
    if let Lookup::Hit(_) = lookup {
        tell.send(()).unwrap();
    }
    told
}

/// Number of chunks of a hostile device with hundreds of waiting reads that are decoded while another device waits for
/// each of ten single reads: the median. The number, unlike a time, does not depend on the load of this machine.
fn decoded_meanwhile(far: bool, shared: bool) -> usize {
    let fetch = FetchOptions { workers: 2, connections: 8, ahead: None };
    let cache = Cache::with(CacheOptions { budget: 64 << 20, fetch });
    let (hostile, innocent) = (SlowChunks::new("hostile", far), SlowChunks::new("innocent", far));
    let other = cache.open(hostile.clone());
    let own = if shared { other.clone() } else { cache.open(innocent) };
    let (bad, good) = (cache.flow(), cache.flow());
    // Every second chunk, so that no two are fetched together.
    let waiting: Vec<_> = (0..1500).map(|number| ask(&cache, bad, &other, number * 2)).collect();
    let mut counts: Vec<usize> = (0..10)
        .map(|number| {
            let before = hostile.made.load(Ordering::SeqCst);
            // A shared chunk is one that waits at the end of the hostile device's line.
            let chunk = if shared { 2998 - number * 2 } else { number * 20 };
            let told = ask(&cache, good, &own, chunk);
            told.recv_timeout(Duration::from_secs(60)).expect("the read is answered");
            hostile.made.load(Ordering::SeqCst) - before
        })
        .collect();
    drop(waiting);
    counts.sort_unstable();
    counts[counts.len() / 2]
}

#[test]
fn a_read_waits_for_a_few_pieces_of_another_device_and_not_for_its_hundreds() {
    for far in [false, true] {
        let count = decoded_meanwhile(far, false);
        assert!(count <= 12, "far {far}: {count}");
    }
}

#[test]
fn a_chunk_that_another_device_has_at_the_end_of_its_line_comes_with_the_turn_of_who_waits() {
    for far in [false, true] {
        let count = decoded_meanwhile(far, true);
        assert!(count <= 14, "far {far}: {count}");
    }
}
