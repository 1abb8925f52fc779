//! What holds for the cache as a whole.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Condvar, Mutex};
use std::time::Duration;

use super::*;
use crate::chunk::ChunkSpan;
use crate::source::SourceError;

/// A source whose chunks are `LEN` bytes of their number, which can be held up and can fail.
#[derive(Default)]
struct Numbers {
    id: String,
    /// How often each load was asked for.
    loads: AtomicU32,
    /// Chunks that fail, that many times.
    failures: Mutex<HashMap<u32, u32>>,
    /// Loads wait while this is set.
    closed: Mutex<bool>,
    opened: Condvar,
    len: usize,
}

const LEN: usize = 1000;

impl Numbers {
    fn new(id: &str) -> Arc<Self> {
        Arc::new(Self { id: id.into(), len: LEN, ..Self::default() })
    }

    fn hold(&self, closed: bool) {
        *self.closed.lock().unwrap() = closed;
        self.opened.notify_all();
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
    fn load(&self, index: u32) -> Result<ChunkBytes, ChunkError> {
        self.loads.fetch_add(1, Ordering::SeqCst);
        let mut closed = self.closed.lock().unwrap();
        while *closed {
            closed = self.opened.wait(closed).unwrap();
        }
        drop(closed);
        if let Some(left) = self.failures.lock().unwrap().get_mut(&index).filter(|left| **left > 0)
        {
            *left -= 1;
            return Err(
                SourceError::PastEnd { name: self.id.clone(), offset: 0, end: 1, size: 0 }.into()
            );
        }
        assert_ne!(index, 66_666, "a decoder's bug");
        Ok(vec![index as u8; self.len].into())
    }
}

type Answer = Result<Arc<ChunkBytes>, Arc<ChunkError>>;

fn ask(cache: &Cache, source: &Arc<dyn ChunkSource>, index: u32, answers: &Sender<Answer>) -> bool {
    let lookup = cache.get(source, index, &mut || {
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

fn next(answers: &Receiver<Answer>) -> Answer {
    answers.recv_timeout(Duration::from_secs(20)).expect("an answer")
}

#[test]
fn many_who_wait_for_one_chunk_cause_one_load() {
    let (cache, numbers) = (Cache::new(1 << 20, 4), Numbers::new("a"));
    let source: Arc<dyn ChunkSource> = numbers.clone();
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
    assert_eq!(numbers.loads.load(Ordering::SeqCst), 1);
    let expected = CacheStats {
        hits: 1,
        misses: 50,
        loads: 1,
        errors: 0,
        bytes: 1000,
        chunks: 1,
        evictions: 0,
    };
    assert_eq!(cache.stats(), expected);
}

#[test]
fn sources_with_one_identity_share_and_others_do_not() {
    let cache = Cache::new(1 << 20, 1);
    let (give, take) = channel();
    let sources: [Arc<dyn ChunkSource>; 3] =
        [Numbers::new("a"), Numbers::new("a"), Numbers::new("b")];
    assert!(!ask(&cache, &sources[0], 1, &give));
    next(&take).unwrap();
    assert!(ask(&cache, &sources[1], 1, &give));
    assert!(!ask(&cache, &sources[2], 1, &give));
}

#[test]
fn a_failure_reaches_all_who_waited_and_is_then_forgotten() {
    let (cache, numbers) = (Cache::new(1 << 20, 2), Numbers::new("a"));
    numbers.failures.lock().unwrap().insert(3, 1);
    let source: Arc<dyn ChunkSource> = numbers.clone();
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
    let source: Arc<dyn ChunkSource> = Numbers::new("a");
    let (give, take) = channel();
    ask(&cache, &source, 66_666, &give);
    assert!(next(&take).is_err());
    ask(&cache, &source, 1, &give);
    assert!(next(&take).is_ok());
}

#[test]
fn the_budget_is_never_exceeded_and_what_is_read_twice_stays() {
    let cache = Cache::new(10 * LEN as u64 + 999, 2);
    let source: Arc<dyn ChunkSource> = Numbers::new("a");
    let (give, take) = channel();
    // A pass over cold data, with one chunk that is read again and again.
    for index in 0..2000 {
        for index in [index, 5000] {
            ask(&cache, &source, index, &give);
            assert_eq!(next(&take).unwrap()[0], index as u8);
        }
        let stats = cache.stats();
        assert!(stats.bytes <= 10_999 && stats.bytes == stats.chunks * LEN as u64, "{stats:?}");
    }
    let stats = cache.stats();
    assert_eq!(stats.chunks, 10);
    assert!(stats.evictions >= 1990);
    // The first time, and hardly ever after: between two evictions it is always used.
    assert!(stats.hits > 1990, "{stats:?}");
}

#[test]
fn a_chunk_larger_than_the_budget_is_served_and_not_kept() {
    let cache = Cache::new(LEN as u64 - 1, 1);
    let source: Arc<dyn ChunkSource> = Numbers::new("a");
    let (give, take) = channel();
    for _ in 0..3 {
        assert!(!ask(&cache, &source, 9, &give));
        assert_eq!(next(&take).unwrap().len(), LEN);
    }
    assert_eq!((cache.stats().bytes, cache.stats().loads, cache.stats().evictions), (0, 3, 0));
}

#[test]
fn threads_come_as_loads_overlap_and_are_never_too_many() {
    let (cache, numbers) = (Cache::new(1 << 20, 3), Numbers::new("a"));
    assert_eq!(cache.loaders.threads(), 1);
    let source: Arc<dyn ChunkSource> = numbers.clone();
    let (answers, take) = channel();
    numbers.hold(true);
    for index in 0..5 {
        ask(&cache, &source, index, &answers);
    }
    while numbers.loads.load(Ordering::SeqCst) < 3 {
        std::thread::yield_now();
    }
    assert_eq!(cache.loaders.threads(), 3);
    numbers.hold(false);
    (0..5).for_each(|_| drop(next(&take).unwrap()));
    assert_eq!(cache.loaders.threads(), 3);
}

#[test]
fn the_end_of_the_cache_answers_everyone() {
    let (cache, numbers) = (Cache::new(1 << 20, 2), Numbers::new("a"));
    let source: Arc<dyn ChunkSource> = numbers.clone();
    let (give, take) = channel();
    numbers.hold(true);
    for index in 0..100 {
        ask(&cache, &source, index, &give);
    }
    while numbers.loads.load(Ordering::SeqCst) < 2 {
        std::thread::yield_now();
    }
    let opener = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(50));
        numbers.hold(false);
    });
    drop(cache);
    opener.join().unwrap();
    let answers: Vec<Answer> = (0..100).map(|_| next(&take)).collect();
    assert_eq!(answers.iter().filter(|answer| answer.is_ok()).count(), 2);
    assert_eq!(numbers_left(&take), 0);
}

fn numbers_left(take: &Receiver<Answer>) -> usize {
    take.try_iter().count()
}

#[test]
fn the_last_reference_may_be_dropped_by_a_waiter() {
    let cache = Cache::new(1 << 20, 2);
    let source: Arc<dyn ChunkSource> = Numbers::new("a");
    let (give, take) = channel();
    let numbers = Numbers::new("b");
    let held: Arc<dyn ChunkSource> = numbers.clone();
    numbers.hold(true);
    let own = cache.clone();
    let mut own = Some(own);
    cache.get(&held, 1, &mut || {
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
    let sources: Vec<Arc<dyn ChunkSource>> = vec![Numbers::new("a"), Numbers::new("b")];
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
