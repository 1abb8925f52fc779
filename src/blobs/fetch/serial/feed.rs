//! The encoded bytes for a pass through a frame: fetched ahead, and verified before the decoder reads them.
//!
//! While one batch is decoded, the next one is fetched: a frame uses one line and one core at the same time.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Instant;

use super::super::blob::{Blob, Key};
use super::super::crew::Permit;
use super::super::{FetchShared, MOST_TRIES, ended, failure};
use source::chunk::{ChunkError, EncodedChunk, EncodedRange};
use source::{Class, Run};
use threads::Counter;

/// Encoded bytes of a batch, 4 MiB; a batch always takes at least one chunk.
pub(super) const BATCH: u64 = 4 << 20;

type Fetched = Result<VecDeque<EncodedChunk>, Arc<ChunkError>>;

/// The next chunks, as far as they have arrived.
#[derive(Default)]
pub(super) struct Feed {
    ready: VecDeque<EncodedChunk>,
    /// The next batch, in flight.
    ahead: Option<JoinHandle<Fetched>>,
}

impl Feed {
    /// Returns chunk `at`, which follows the one returned before; chunks up to `goal` are fetched ahead.
    pub(super) fn next(
        &mut self,
        shared: &Arc<FetchShared>,
        blob: &Arc<Blob>,
        at: u32,
        goal: u32,
        class: Class,
    ) -> Result<EncodedChunk, Arc<ChunkError>> {
        if self.ready.is_empty() {
            self.ready = match self.ahead.take() {
                Some(ahead) => ahead
                    .join()
                    .unwrap_or_else(|_| Err(failure(blob, "Fetching a frame panicked")))?,
                None => fetch(shared, blob, batch(blob, at, goal), class)?,
            };
            let next = at + self.ready.len() as u32;
            if next <= goal && !blob.source().blob().is_local() {
                self.ahead = fetch_ahead(shared, blob, batch(blob, next, goal), class);
            }
        }
        self.ready.pop_front().ok_or_else(|| failure(blob, "A batch of a frame was empty"))
    }
}

/// Chunks from `first` to `goal`, as many as fit into a batch.
fn batch(blob: &Blob, first: u32, goal: u32) -> Range<u32> {
    let size = |chunk| blob.source().encoded(chunk).map_or(0, |place| place.len() as u64);
    let mut bytes = size(first);
    let mut end = first + 1;
    while end <= goal && bytes + size(end) <= BATCH {
        bytes += size(end);
        end += 1;
    }
    first..end
}

/// Fetches a batch on a thread of its own; without one, it is fetched at its turn.
fn fetch_ahead(
    shared: &Arc<FetchShared>,
    blob: &Arc<Blob>,
    chunks: Range<u32>,
    class: Class,
) -> Option<JoinHandle<Fetched>> {
    let (shared, blob) = (shared.clone(), blob.clone());
    let body = move || {
        threads::mark_io_thread();
        fetch(&shared, &blob, chunks, class)
    };
    std::thread::Builder::new().name("frame-ahead".into()).spawn(body).ok()
}

/// Reads chunks from their place: a local file, the encoded tier, or their server.
fn fetch(shared: &Arc<FetchShared>, blob: &Arc<Blob>, chunks: Range<u32>, class: Class) -> Fetched {
    let source = blob.source();
    let places: Result<Vec<EncodedRange>, ChunkError> =
        chunks.clone().map(|chunk| source.encoded(chunk)).collect();
    let places = places.map_err(Arc::new)?;
    let mut batch: VecDeque<EncodedChunk> =
        places.iter().map(|place| EncodedChunk::new(place, shared.workers.buffer())).collect();
    let frame = blob.key(source.frame(chunks.start).start);
    let mut far = 0..0;
    for (number, chunk) in chunks.clone().enumerate() {
        if read_stored(shared, blob, chunk, &mut batch[number]) {
            read_far(shared, blob, &places, &mut batch, far, frame, class)?;
            far = number + 1..number + 1;
        } else {
            far.end = number + 1;
        }
    }
    read_far(shared, blob, &places, &mut batch, far, frame, class)?;
    for ((chunk, place), encoded) in chunks.zip(&places).zip(&mut batch) {
        verify(shared, blob, chunk, place, frame, encoded)?;
    }
    Ok(batch)
}

/// Reads a chunk from the encoded tier.
fn read_stored(
    shared: &Arc<FetchShared>,
    blob: &Blob,
    chunk: u32,
    encoded: &mut EncodedChunk,
) -> bool {
    let stored = blob.stored().encoded.as_ref().filter(|stored| stored.has(chunk));
    let source = blob.source();
    let len = encoded.bytes().len();
    let read = stored.is_some_and(|stored| {
        stored.len_of(chunk) == Some(len)
            && stored.read(chunk, encoded.bytes_mut(), &|bytes| source.verify(chunk, bytes))
    });
    if read {
        shared.counters.stored.add(1);
    }
    read
}

/// Waits until a request may be made for a frame. One that nothing waited for is not held back when a reader of the
/// frame has come meanwhile.
fn admit<'a>(
    shared: &'a FetchShared,
    blob: &Blob,
    frame: Key,
    class: Class,
) -> Result<Permit<'a>, Arc<ChunkError>> {
    let is_urgent = || shared.serials.is_needed(frame);
    let demand = shared.pace.demand();
    shared.crew.admit(blob.way(), class, &is_urgent, demand).ok_or_else(|| ended(blob))
}

/// Reads the neighbours `numbers` of a batch, by one request.
fn read_far(
    shared: &Arc<FetchShared>,
    blob: &Blob,
    places: &[EncodedRange],
    batch: &mut VecDeque<EncodedChunk>,
    numbers: Range<usize>,
    frame: Key,
    class: Class,
) -> Result<(), Arc<ChunkError>> {
    let Some([first, .., last] | [first @ last]) = places.get(numbers.clone()) else {
        return Ok(());
    };
    let source = blob.source().blob();
    let _permit = if source.is_local() { None } else { Some(admit(shared, blob, frame, class)?) };
    let range = first.range.start..last.range.end;
    let bytes = range.end - range.start;
    let counters = &shared.counters;
    let begun = Instant::now();
    let mut buffers = Buffers { batch, numbers: numbers.clone(), filled: 0, first: None };
    source.read_run(range, class, &mut buffers).map_err(ChunkError::from).map_err(Arc::new)?;
    if source.is_local() {
        counters.local.add(numbers.len() as u64);
        return Ok(());
    }
    let wait = buffers.first.map_or(begun.elapsed(), |first| first - begun);
    requests(shared, class).add(1);
    counters.chunks.add(numbers.len() as u64);
    counters.bytes.add(bytes);
    counters.first_byte.add(wait);
    counters.whole.add(begun.elapsed());
    blob.measured(bytes, wait, begun.elapsed(), 0);
    if class < Class::Fill {
        shared.pace.demand().note();
    }
    Ok(())
}

fn requests(shared: &FetchShared, class: Class) -> &Counter {
    match class {
        Class::Demand => &shared.counters.demand_requests,
        Class::Prefetch => &shared.counters.ahead_requests,
        Class::Fill => &shared.counters.fill_requests,
    }
}

/// Compares a chunk's checksum, and fetches it again if it is wrong.
fn verify(
    shared: &Arc<FetchShared>,
    blob: &Blob,
    chunk: u32,
    place: &EncodedRange,
    frame: Key,
    encoded: &mut EncodedChunk,
) -> Result<(), Arc<ChunkError>> {
    let source = blob.source();
    for tries in 1.. {
        if source.verify(chunk, encoded.bytes()) != Some(false) {
            break;
        }
        shared.counters.damaged.add(1);
        let error = ChunkError::Damaged {
            blob: source.blob().name().to_owned(),
            chunk,
            start: place.range.start,
            end: place.range.end,
            reason: "its compressed bytes do not match their SHA-256".to_owned(),
        };
        let again = tries < MOST_TRIES;
        blob.failures().note(chunk, again, &error);
        if !again {
            return Err(Arc::new(error));
        }
        tracing::warn!(%error, "A chunk is fetched again");
        source.blob().distrust(place.range.clone());
        let _permit = admit(shared, blob, frame, Class::Demand)?;
        let read = source.blob().read_exact_at(encoded.bytes_mut(), place.range.start);
        read.map_err(ChunkError::from).map_err(Arc::new)?;
    }
    Ok(())
}

/// Chunks of a batch as the buffers of one request.
struct Buffers<'a> {
    batch: &'a mut VecDeque<EncodedChunk>,
    /// Numbers of those that are not full.
    numbers: Range<usize>,
    /// Bytes of the first of them that are filled.
    filled: usize,
    /// Time of the first byte.
    first: Option<Instant>,
}

impl Run for Buffers<'_> {
    fn room(&mut self) -> Option<&mut [u8]> {
        let number = self.numbers.clone().next()?;
        self.batch.get_mut(number)?.bytes_mut().get_mut(self.filled..)
    }

    fn filled(&mut self, bytes: usize) {
        self.first.get_or_insert_with(Instant::now);
        self.filled += bytes;
        let len = self.batch.get(self.numbers.start).map_or(0, |chunk| chunk.bytes().len());
        if self.filled >= len {
            self.numbers.start += 1;
            self.filled = 0;
        }
    }
}
