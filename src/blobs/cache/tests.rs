//! Promises of the cache as a whole.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use parking_lot::{Condvar, Mutex};

use super::*;
use source::chunk::{ChunkSpan, EncodedChunk, EncodedRange};
use source::{ByteSource, Run, SourceError};

/// A blob whose chunks are `LEN` bytes of their number; its reads can be held up and can fail.
struct Numbers {
    id: String,
    blob: Arc<dyn ByteSource>,
    bytes: Arc<NumberBytes>,
}

/// The bytes of [`Numbers`].
struct NumberBytes {
    near: bool,
    /// Number of reads.
    reads: AtomicU32,
    /// Chunks in the order in which their reads began.
    order: Mutex<Vec<u32>>,
    /// Chunks that fail, with the number of times.
    failures: Mutex<HashMap<u32, u32>>,
    /// Chunks that come damaged, with the number of times.
    damages: Mutex<HashMap<u32, u32>>,
    distrusted: AtomicU32,
    /// Reads wait while this is set.
    closed: Mutex<bool>,
    opened: Condvar,
}

const LEN: usize = 4096;

impl Numbers {
    /// Numbers that a decode thread reads itself.
    fn new(id: &str) -> Arc<Self> {
        Self::at(id, true)
    }

    /// Numbers behind a network.
    fn far(id: &str) -> Arc<Self> {
        Self::at(id, false)
    }

    fn at(id: &str, near: bool) -> Arc<Self> {
        let bytes = Arc::new(NumberBytes {
            near,
            reads: AtomicU32::new(0),
            order: Mutex::default(),
            failures: Mutex::default(),
            damages: Mutex::default(),
            distrusted: AtomicU32::new(0),
            closed: Mutex::default(),
            opened: Condvar::new(),
        });
        Arc::new(Self { id: id.into(), blob: bytes.clone(), bytes })
    }

    fn hold(&self, closed: bool) {
        *self.bytes.closed.lock() = closed;
        self.bytes.opened.notify_all();
    }

    fn reads(&self) -> u32 {
        self.bytes.reads.load(Ordering::SeqCst)
    }
}

impl ByteSource for NumberBytes {
    fn name(&self) -> &str {
        "numbers"
    }
    fn len(&self) -> u64 {
        1 << 40
    }
    fn is_local(&self) -> bool {
        self.near
    }
    fn distrust(&self, _: Range<u64>) {
        self.distrusted.fetch_add(1, Ordering::SeqCst);
    }
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> Result<(), SourceError> {
        self.reads.fetch_add(1, Ordering::SeqCst);
        let index = (offset / LEN as u64) as u32;
        self.order.lock().push(index);
        let mut closed = self.closed.lock();
        while *closed {
            self.opened.wait(&mut closed);
        }
        drop(closed);
        let falls = |which: &Mutex<HashMap<u32, u32>>| {
            let mut which = which.lock();
            which.get_mut(&index).filter(|left| **left > 0).map(|left| *left -= 1).is_some()
        };
        if falls(&self.failures) {
            return Err(SourceError::PastEnd { name: "a".into(), offset: 0, end: 1, size: 0 });
        }
        buf.fill(index as u8);
        buf[0] ^= u8::from(falls(&self.damages));
        Ok(())
    }
    /// One request, counted as one read.
    fn read_run(&self, range: Range<u64>, _: Class, run: &mut dyn Run) -> Result<(), SourceError> {
        let before = self.reads.load(Ordering::SeqCst);
        let mut at = range.start;
        while let Some(room) = run.room() {
            let len = room.len();
            self.read_exact_at(room, at)?;
            run.filled(len);
            at += len as u64;
        }
        self.reads.store(before + 1, Ordering::SeqCst);
        Ok(())
    }
}

impl ChunkSource for Numbers {
    fn id(&self) -> &str {
        &self.id
    }
    fn decoded_len(&self) -> u64 {
        u64::MAX
    }
    fn chunk_count(&self) -> u32 {
        u32::MAX
    }
    fn chunk_at(&self, _: u64) -> Option<ChunkSpan> {
        None
    }
    fn blob(&self) -> &Arc<dyn ByteSource> {
        &self.blob
    }
    fn encoded(&self, index: u32) -> Result<EncodedRange, ChunkError> {
        let start = u64::from(index) * LEN as u64;
        Ok(EncodedRange { range: start..start + LEN as u64, head: 3, tail: 5 })
    }
    fn room(&self, _: u32) -> usize {
        LEN
    }
    fn decode(
        &self,
        index: u32,
        encoded: &mut EncodedChunk,
        room: &mut [u8],
    ) -> Result<Range<usize>, ChunkError> {
        assert_ne!(index, 66_666, "a decoder's bug");
        room.copy_from_slice(encoded.bytes());
        if room[0] != index as u8 {
            let (blob, reason) = (self.id.clone(), "it is another number".to_owned());
            return Err(ChunkError::Damaged { blob, chunk: index, start: 0, end: 1, reason });
        }
        Ok(0..LEN)
    }
}

type Loaded = Result<Arc<ChunkBytes>, Arc<ChunkError>>;

fn ask(cache: &Cache, source: &Arc<Blob>, index: u32, answers: &Sender<Loaded>) -> bool {
    let lookup = cache.batch().get(source, index, &mut || {
        let answers = answers.clone();
        Box::new(move |answer| answers.send(answer).unwrap())
    });
    match lookup {
        Lookup::Hit(bytes) => {
            answers.send(Ok(bytes)).unwrap();
            true
        }
        Lookup::Pending => false,
    }
}

fn next(answers: &Receiver<Loaded>) -> Loaded {
    answers.recv_timeout(Duration::from_secs(20)).expect("an answer")
}

#[test]
fn many_who_wait_for_one_chunk_cause_one_load() {
    let (cache, numbers) = (Cache::new(1 << 20, 4), Numbers::new("a"));
    let source = cache.open(numbers.clone());
    let (give, take) = channel();
    numbers.hold(true);
    for _ in 0..50 {
        assert!(!ask(&cache, &source, 7, &give));
    }
    numbers.hold(false);
    for _ in 0..50 {
        assert_eq!(next(&take).unwrap()[0], 7);
    }
    assert!(ask(&cache, &source, 7, &give));
    assert_eq!(numbers.reads(), 1);
    let expected = CacheStats {
        hits: 1,
        misses: 50,
        loads: 1,
        errors: 0,
        bytes: 4096,
        chunks: 1,
        evictions: 0,
        unkept: 0,
    };
    assert_eq!(cache.stats(), expected);
}

#[test]
fn sources_with_one_identity_share_and_others_do_not() {
    let cache = Cache::new(1 << 20, 1);
    let (give, take) = channel();
    let sources =
        [Numbers::new("a"), Numbers::new("a"), Numbers::new("b")].map(|source| cache.open(source));
    assert!(!ask(&cache, &sources[0], 1, &give));
    next(&take).unwrap();
    assert!(ask(&cache, &sources[1], 1, &give));
    assert!(!ask(&cache, &sources[2], 1, &give));
}

#[test]
fn a_failure_reaches_all_who_waited_and_is_then_forgotten() {
    let (cache, numbers) = (Cache::new(1 << 20, 2), Numbers::new("a"));
    numbers.bytes.failures.lock().insert(3, 1);
    let source = cache.open(numbers.clone());
    let (give, take) = channel();
    numbers.hold(true);
    for _ in 0..5 {
        ask(&cache, &source, 3, &give);
    }
    numbers.hold(false);
    for _ in 0..5 {
        assert_eq!(
            next(&take).unwrap_err().to_string(),
            "Bytes 0..1 of a do not exist: it has 0 bytes"
        );
    }
    assert_eq!((cache.stats().errors, cache.stats().bytes), (1, 0));
    assert!(!ask(&cache, &source, 3, &give));
    assert_eq!(next(&take).unwrap()[0], 3);
}

#[test]
fn a_decoder_that_panics_is_an_error_and_the_thread_lives_on() {
    let cache = Cache::new(1 << 20, 1);
    let source = cache.open(Numbers::new("a"));
    let (give, take) = channel();
    ask(&cache, &source, 66_666, &give);
    assert!(next(&take).is_err());
    ask(&cache, &source, 1, &give);
    assert!(next(&take).is_ok());
}

#[test]
fn the_budget_is_never_exceeded_and_what_is_read_twice_stays() {
    let cache = Cache::new(10 * LEN as u64 + 999, 2);
    let source = cache.open(Numbers::new("a"));
    let (give, take) = channel();
    // A pass over cold data, with one chunk that is read again and again.
    for index in 0..2000 {
        for index in [index, 5000] {
            ask(&cache, &source, index, &give);
            assert_eq!(next(&take).unwrap()[0], index as u8);
        }
        let stats = cache.stats();
        assert!(stats.bytes <= 10 * 4096, "{stats:?}");
    }
    let stats = cache.stats();
    assert_eq!(stats.chunks, 10);
    assert!(stats.evictions >= 1990);
    // The first time, and rarely after: between two evictions it is always used.
    assert!(stats.hits > 1990, "{stats:?}");
}

#[test]
fn a_chunk_larger_than_the_budget_is_served_and_not_kept() {
    let cache = Cache::new(LEN as u64 - 1, 1);
    let source = cache.open(Numbers::new("a"));
    let (give, take) = channel();
    for _ in 0..3 {
        assert!(!ask(&cache, &source, 9, &give));
        assert_eq!(next(&take).unwrap().len(), LEN);
    }
    assert_eq!((cache.stats().bytes, cache.stats().loads, cache.stats().evictions), (0, 3, 0));
}

#[test]
fn the_end_of_the_cache_answers_everyone() {
    let (cache, numbers) = (Cache::new(1 << 20, 2), Numbers::new("a"));
    let source = cache.open(numbers.clone());
    let (give, take) = channel();
    numbers.hold(true);
    for index in 0..100 {
        ask(&cache, &source, index, &give);
    }
    while numbers.reads() < 2 {
        std::thread::yield_now();
    }
    let opener = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(50));
        numbers.hold(false);
    });
    drop(cache);
    opener.join().unwrap();
    let answers: Vec<Loaded> = (0..100).map(|_| next(&take)).collect();
    assert_eq!(answers.iter().filter(|answer| answer.is_ok()).count(), 2);
    assert_eq!(numbers_left(&take), 0);
}

fn numbers_left(take: &Receiver<Loaded>) -> usize {
    take.try_iter().count()
}

#[test]
fn the_last_reference_may_be_dropped_by_a_waiter() {
    let cache = Cache::new(1 << 20, 2);
    let source = cache.open(Numbers::new("a"));
    let (give, take) = channel();
    let numbers = Numbers::new("b");
    let held = cache.open(numbers.clone());
    numbers.hold(true);
    let own = cache.clone();
    let mut own = Some(own);
    cache.batch().get(&held, 1, &mut || {
        let (own, give) = (own.take(), give.clone());
        Box::new(move |_| {
            drop(own);
            give.send(Ok(Arc::new(vec![].into()))).unwrap();
        })
    });
    ask(&cache, &source, 2, &give);
    next(&take).unwrap();
    drop(cache);
    numbers.hold(false);
    next(&take).unwrap();
}

#[test]
fn many_threads_get_right_bytes_from_a_cache_that_is_too_small() {
    let cache = Cache::new(20 * LEN as u64, 3);
    let sources = [Numbers::new("a"), Numbers::new("b")].map(|source| cache.open(source));
    std::thread::scope(|scope| {
        for thread in 0..4_u32 {
            let (cache, sources) = (&cache, &sources);
            scope.spawn(move || {
                let (give, take) = channel();
                for step in 0..2000_u32 {
                    let index = step.wrapping_mul(2654435761).wrapping_add(thread) >> 24;
                    ask(cache, &sources[(step % 2) as usize], index % 60, &give);
                    assert_eq!(next(&take).unwrap()[..], [(index % 60) as u8; LEN]);
                }
            });
        }
    });
    let stats = cache.stats();
    assert!(stats.bytes <= 20 * LEN as u64 && stats.bytes == stats.chunks * LEN as u64);
    assert_eq!(stats.hits + stats.misses, 8000);
}

#[test]
fn neighbours_that_are_wanted_together_come_by_one_request() {
    let (cache, numbers) = (Cache::with(one_connection(1 << 20)), Numbers::far("a"));
    let source = cache.open(numbers.clone());
    let (give, take) = channel();
    numbers.hold(true);
    ask(&cache, &source, 100, &give);
    while numbers.reads() < 1 {
        std::thread::yield_now();
    }
    // While the only connection is busy: one alone, and ten that lie together, backwards.
    for index in [50, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0] {
        ask(&cache, &source, index, &give);
    }
    numbers.hold(false);
    for _ in 0..12 {
        next(&take).unwrap();
    }
    let fetched = cache.fetched();
    assert_eq!(fetched.demand_requests.get(), 3);
    assert_eq!(fetched.chunks.get(), 12);
}

fn one_connection(budget: u64) -> CacheOptions {
    CacheOptions { budget, fetch: FetchOptions { workers: 2, connections: 1, ahead: None } }
}

#[test]
fn demand_overtakes_what_was_asked_for_ahead_of_time() {
    let (cache, numbers) = (Cache::with(one_connection(1 << 20)), Numbers::far("a"));
    let source = cache.open(numbers.clone());
    let (give, take) = channel();
    numbers.hold(true);
    cache.batch().prefetch(&source, 0..1);
    while numbers.reads() < 1 {
        std::thread::yield_now();
    }
    for index in [10, 20, 30] {
        cache.batch().prefetch(&source, index..index + 1);
    }
    // One that is not requested yet, and one that was loaded ahead.
    ask(&cache, &source, 90, &give);
    ask(&cache, &source, 30, &give);
    numbers.hold(false);
    // Two threads decode, so the answers come in any order; the requests do not.
    let mut answers = [(); 2].map(|()| next(&take).unwrap()[0]);
    answers.sort_unstable();
    assert_eq!(answers, [30, 90]);
    assert_eq!(numbers.bytes.order.lock()[..3], [0, 90, 30]);
    let fetched = cache.fetched();
    assert_eq!(fetched.demand_requests.get(), 2);
}

#[test]
fn what_was_fetched_ahead_is_there_when_it_is_asked_for() {
    let (cache, numbers) = (Cache::new(1 << 20, 2), Numbers::far("a"));
    let source = cache.open(numbers.clone());
    cache.batch().prefetch(&source, 5..9);
    while !(5..9).all(|index| cache.holds(&source, index)) {
        std::thread::yield_now();
    }
    assert_eq!(source.held(), 4 * LEN as u64);
    let (give, take) = channel();
    for index in 5..9 {
        assert!(ask(&cache, &source, index, &give));
        assert_eq!(next(&take).unwrap()[0], index as u8);
    }
    assert_eq!((cache.stats().hits, cache.stats().misses), (4, 0));
}

#[test]
fn damage_is_fetched_again_and_only_lasting_damage_is_an_error() {
    for numbers in [Numbers::new("a"), Numbers::far("a")] {
        let cache = Cache::new(1 << 20, 2);
        let source = cache.open(numbers.clone());
        let (give, take) = channel();
        numbers.bytes.damages.lock().extend([(7, 2), (8, 3)]);
        ask(&cache, &source, 7, &give);
        assert_eq!(next(&take).unwrap()[0], 7);
        assert_eq!(numbers.bytes.distrusted.load(Ordering::SeqCst), 2);
        ask(&cache, &source, 8, &give);
        assert!(matches!(*next(&take).unwrap_err(), ChunkError::Damaged { chunk: 8, .. }));
        ask(&cache, &source, 8, &give);
        assert_eq!(next(&take).unwrap()[0], 8, "a failure is forgotten");
        assert_eq!(cache.fetched().damaged.get(), 5);
    }
}

#[test]
fn a_failed_prefetch_is_repeated_for_those_who_wait_by_then() {
    let (cache, numbers) = (Cache::with(one_connection(1 << 20)), Numbers::far("a"));
    let source = cache.open(numbers.clone());
    numbers.bytes.failures.lock().insert(3, 1);
    let (give, take) = channel();
    numbers.hold(true);
    cache.batch().prefetch(&source, 3..4);
    while numbers.reads() < 1 {
        std::thread::yield_now();
    }
    ask(&cache, &source, 3, &give);
    numbers.hold(false);
    assert_eq!(next(&take).unwrap()[0], 3);
}

#[test]
fn chunks_that_are_being_read_are_not_given_up() {
    let cache = Cache::new(4 * LEN as u64, 1);
    let source = cache.open(Numbers::new("a"));
    let (give, take) = channel();
    ask(&cache, &source, 1, &give);
    let read = next(&take).unwrap();
    for index in 10..50 {
        ask(&cache, &source, index, &give);
        next(&take).unwrap();
    }
    assert!(ask(&cache, &source, 1, &give), "it is still here");
    assert!(read.iter().all(|&byte| byte == 1));
    assert!(cache.stats().bytes <= 4 * LEN as u64);
}

#[test]
fn a_blob_that_is_closed_keeps_its_chunks_for_the_next_who_opens_it() {
    let cache = Cache::new(1 << 20, 1);
    let (give, take) = channel();
    let first = cache.open(Numbers::new("a"));
    ask(&cache, &first, 1, &give);
    next(&take).unwrap();
    drop(first);
    let numbers = Numbers::new("a");
    let again = cache.open(numbers.clone());
    assert_eq!(again.held(), LEN as u64);
    assert!(ask(&cache, &again, 1, &give));
    assert_eq!(numbers.reads(), 0);
}
