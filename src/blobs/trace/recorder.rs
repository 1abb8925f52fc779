//! The first touches of one disk.
//!
//! A bit for each chunk tells if it was touched. A look-up of a chunk reads its bit, and continues if it is
//! set: a load from a cache line that is no longer written. Only the first touch takes a lock, and a first
//! touch is about to wait for the network anyway, or was just spared that.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use parking_lot::{Mutex, MutexGuard, RwLock};

use crate::fetch::{Blob, Flow};
use formats::trace::{MAX_TOUCHES, Touch, Trace};
use source::chunk::ChunkSource;

/// Limit on the chunks of a blob that are watched, 16 million: a TB in chunks of 64 KiB.
const MAX_CHUNKS: u32 = 1 << 24;

/// Called once with the trace at the end of a recording.
type OnEnd = Box<dyn FnOnce(Trace) + Send>;

/// The touches of one disk.
pub struct Recorder {
    layers: Vec<Option<RecordedLayer>>,
    state: Mutex<RecordedTouches>,
}

struct RecordedLayer {
    source: Arc<dyn ChunkSource>,
    /// One bit a chunk.
    touched: Vec<AtomicU64>,
}

struct RecordedTouches {
    /// Layer, chunk and time of each first touch.
    firsts: Vec<(u8, u32, Duration)>,
    /// Time of the first of them.
    begun: Option<Instant>,
    last: Instant,
    on_end: Option<OnEnd>,
}

impl Recorder {
    /// Creates a recorder for a disk of these layers, the lowest first. `on_end` gets the trace when the
    /// recording [ends](Self::end), or when this is dropped.
    #[must_use]
    pub fn new(layers: &[Option<Arc<Blob>>], on_end: impl FnOnce(Trace) + Send + 'static) -> Self {
        let watch = |blob: &Arc<Blob>| {
            let source = blob.source().clone();
            let words = source.chunk_count().min(MAX_CHUNKS).div_ceil(64);
            RecordedLayer { source, touched: (0..words).map(|_| AtomicU64::new(0)).collect() }
        };
        let layers = layers.iter().map(|blob| blob.as_ref().map(watch)).collect();
        let state = RecordedTouches {
            firsts: Vec::new(),
            begun: None,
            last: Instant::now(),
            on_end: Some(Box::new(on_end)),
        };
        Self { layers, state: Mutex::new(state) }
    }

    /// Records a look-up of a chunk of a layer.
    #[inline]
    pub fn touched(&self, layer: u8, chunk: u32) {
        let Some(Some(RecordedLayer { touched, .. })) = self.layers.get(usize::from(layer)) else {
            return;
        };
        let Some(word) = touched.get((chunk / 64) as usize) else { return };
        let bit = 1 << (chunk % 64);
        if word.load(Ordering::Relaxed) & bit == 0
            && word.fetch_or(bit, Ordering::Relaxed) & bit == 0
        {
            self.first(layer, chunk);
        }
    }

    #[cold]
    fn first(&self, layer: u8, chunk: u32) {
        let now = Instant::now();
        let mut state = self.lock();
        if state.on_end.is_none() || state.firsts.len() >= MAX_TOUCHES {
            return;
        }
        state.last = now;
        let begun = *state.begun.get_or_insert(now);
        state.firsts.push((layer, chunk, now.saturating_duration_since(begun)));
    }

    fn lock(&self) -> MutexGuard<'_, RecordedTouches> {
        self.state.lock()
    }

    /// Time since the last new touch, and time since the first touch; `None` before the first touch and after
    /// the end.
    #[must_use]
    pub fn quiet(&self) -> Option<(Duration, Duration)> {
        let state = self.lock();
        let begun = state.begun.filter(|_| state.on_end.is_some())?;
        Some((state.last.elapsed(), begun.elapsed()))
    }

    /// Number of chunks touched so far.
    #[must_use]
    pub fn len(&self) -> usize {
        self.lock().firsts.len()
    }

    /// True if no chunk was touched yet.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The trace so far.
    #[must_use]
    pub fn trace(&self) -> Trace {
        let firsts = self.lock().firsts.clone();
        let mut trace = Trace { starts: 1, ..Trace::default() };
        for (layer, chunk, at) in firsts {
            let Some(Some(RecordedLayer { source, .. })) = self.layers.get(usize::from(layer))
            else {
                continue;
            };
            let Some(blob) = trace.blob(super::blob_name(&**source)) else { continue };
            let Some((start, len)) = span(&**source, chunk) else { continue };
            let at = u32::try_from(at.as_millis()).unwrap_or(u32::MAX) / 10 * 10;
            trace.touches.push(Touch { blob, start, len, at, weight: 1 });
        }
        // Threads record their touches in turns, and not always in the order of the times.
        trace.touches.sort_by_key(|touch| touch.at);
        trace
    }

    /// Ends the recording; later touches are not recorded.
    pub fn end(&self) {
        let on_end = self.lock().on_end.take();
        if let Some(on_end) = on_end {
            on_end(self.trace());
        }
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        self.end();
    }
}

/// The recorders of a disk: the one for learning, and those that were requested.
pub struct Recorders {
    flow: Flow,
    blobs: Vec<Option<Arc<Blob>>>,
    learning: OnceLock<Arc<Recorder>>,
    /// True if `others` has any, so that a look-up need not lock it.
    has_others: AtomicBool,
    others: RwLock<Vec<Arc<Recorder>>>,
}

impl Recorders {
    /// Creates the list without recorders for a disk of these layers, the lowest first.
    #[must_use]
    pub fn new(blobs: Vec<Option<Arc<Blob>>>) -> Arc<Self> {
        Self::of(Flow::default(), blobs)
    }

    /// As [`new`](Self::new), for a device.
    #[must_use]
    pub fn of(flow: Flow, blobs: Vec<Option<Arc<Blob>>>) -> Arc<Self> {
        Arc::new(Self {
            flow,
            blobs,
            learning: OnceLock::new(),
            has_others: AtomicBool::new(false),
            others: RwLock::default(),
        })
    }

    /// The device.
    #[must_use]
    pub fn flow(&self) -> Flow {
        self.flow
    }

    /// The layers.
    #[must_use]
    pub fn blobs(&self) -> &[Option<Arc<Blob>>] {
        &self.blobs
    }

    /// Records a look-up of a chunk of a layer.
    #[inline]
    pub fn touched(&self, layer: u8, chunk: u32) {
        if let Some(recorder) = self.learning.get() {
            recorder.touched(layer, chunk);
        }
        if self.has_others.load(Ordering::Relaxed) {
            let others = self.others.read();
            others.iter().for_each(|recorder| recorder.touched(layer, chunk));
        }
    }

    /// Begins the recording for learning; only at the first call.
    pub fn learn(&self, on_end: impl FnOnce(Trace) + Send + 'static) -> Option<Arc<Recorder>> {
        let recorder = Arc::new(Recorder::new(&self.blobs, on_end));
        self.learning.set(recorder.clone()).is_ok().then_some(recorder)
    }

    /// Begins a recording from now on.
    #[must_use]
    pub fn begin(&self) -> Arc<Recorder> {
        let recorder = Arc::new(Recorder::new(&self.blobs, |_| {}));
        let mut others = self.others.write();
        others.push(recorder.clone());
        self.has_others.store(true, Ordering::Relaxed);
        recorder
    }

    /// Ends a recording.
    pub fn end(&self, recorder: &Arc<Recorder>) -> Trace {
        let mut others = self.others.write();
        others.retain(|other| !Arc::ptr_eq(other, recorder));
        self.has_others.store(!others.is_empty(), Ordering::Relaxed);
        drop(others);
        recorder.end();
        recorder.trace()
    }
}

/// Range of a chunk in the decoded bytes. Sources map a byte to its chunk, not the other way round, so a
/// binary search finds it.
pub(super) fn span(source: &dyn ChunkSource, chunk: u32) -> Option<(u64, u64)> {
    let (mut low, mut high) = (0, source.decoded_len());
    while low < high {
        let middle = low + (high - low) / 2;
        let found = source.chunk_at(middle)?;
        match found.index.cmp(&chunk) {
            std::cmp::Ordering::Equal => return Some((found.start, u64::from(found.len))),
            std::cmp::Ordering::Less => low = middle.max(found.start + u64::from(found.len)),
            std::cmp::Ordering::Greater => high = middle.min(found.start),
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::Cache;
    use source::MemorySource;
    use source::chunk::PlainChunks;

    fn blob(cache: &Cache, name: &str, chunks: u64) -> Arc<Blob> {
        let bytes = vec![0; (chunks * PlainChunks::CHUNK) as usize - 7];
        cache.open(Arc::new(PlainChunks::new(name, Arc::new(MemorySource::new(name, bytes)))))
    }

    #[test]
    fn each_chunk_is_noted_once_in_the_order_of_first_touches() {
        let cache = Cache::new(1 << 20, 1);
        let layers = [Some(blob(&cache, "low", 70)), None, Some(blob(&cache, "high", 3))];
        let (give, take) = std::sync::mpsc::channel();
        let recorder = Recorder::new(&layers, move |trace| give.send(trace).unwrap());
        assert!(recorder.quiet().is_none() && recorder.is_empty());
        for (layer, chunk) in
            [(2, 1), (0, 69), (2, 1), (0, 5), (0, 69), (1, 0), (7, 0), (2, 64), (2, 2)]
        {
            recorder.touched(layer, chunk);
        }
        assert_eq!(recorder.len(), 4);
        recorder.end();
        recorder.touched(0, 1);
        let trace = take.recv().unwrap();
        let names: Vec<_> = [2, 0]
            .map(|layer: usize| {
                super::super::blob_name(&**layers[layer].as_ref().unwrap().source())
            })
            .into();
        assert_eq!(trace.blobs, names);
        let chunk = PlainChunks::CHUNK;
        let places: Vec<_> =
            trace.touches.iter().map(|touch| (touch.blob, touch.start, touch.len)).collect();
        let expected = [
            (0, chunk, chunk),
            (1, 69 * chunk, chunk - 7),
            (1, 5 * chunk, chunk),
            (0, 2 * chunk, chunk - 7),
        ];
        assert_eq!(places, expected);
        drop(recorder);
        assert!(take.recv().is_err(), "the end comes once");
    }

    #[test]
    fn several_may_watch_a_disk_each_from_its_own_beginning() {
        let cache = Cache::new(1 << 20, 1);
        let recorders = Recorders::new(vec![Some(blob(&cache, "a", 9))]);
        recorders.touched(0, 1);
        let learning = recorders.learn(|_| {}).unwrap();
        assert!(recorders.learn(|_| {}).is_none(), "a disk starts once");
        recorders.touched(0, 2);
        let asked = recorders.begin();
        recorders.touched(0, 2);
        recorders.touched(0, 3);
        let trace = recorders.end(&asked);
        recorders.touched(0, 4);
        assert_eq!((learning.len(), trace.touches.len(), asked.len()), (3, 2, 2));
    }

    #[test]
    fn threads_that_touch_the_same_chunks_note_each_once() {
        let cache = Cache::new(1 << 20, 1);
        let layers = [Some(blob(&cache, "a", 200))];
        let recorder = Recorder::new(&layers, |_| {});
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let recorder = &recorder;
                scope.spawn(move || {
                    (0..1000_u32).for_each(|step| recorder.touched(0, (step * 7 + thread) % 200));
                });
            }
        });
        assert_eq!(recorder.len(), 200);
        let mut starts: Vec<_> = recorder.trace().touches.iter().map(|touch| touch.start).collect();
        starts.sort_unstable();
        starts.dedup();
        assert_eq!(starts.len(), 200);
    }
}
