//! Promises of the fill: it costs a reader nothing, and it ends.

use std::sync::mpsc::{Receiver, Sender, channel};

use super::*;
use crate::cache::{Cache, CacheOptions, Lookup};
use crate::fetch::FetchOptions;
use crate::quiet;
use crate::tier::{Tier, TierOptions, Tiers};
use source::chunk::{ChunkSource, ChunkSpan, EncodedRange, PlainChunks};
use source::{ByteSource, Run, SourceError};

/// Longest wait of a test for what must come: a busy machine has little time for the idle class.
const LONG: Duration = Duration::from_secs(60);

/// A door that a test opens.
#[derive(Default)]
struct Door {
    open: Mutex<bool>,
    opened: Condvar,
}

impl Door {
    fn pass(&self) {
        let mut open = self.open.lock();
        while !*open {
            self.opened.wait(&mut open);
        }
    }

    fn open(&self) {
        *self.open.lock() = true;
        self.opened.notify_all();
    }
}

/// Where the requests of the fill wait.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Holds {
    Nowhere,
    BeforeTheAnswer,
    WithinTheAnswer,
}

/// A far blob of zeros whose requests for the fill wait at a door, and which tells each request.
struct Guarded {
    chunks: u64,
    holds: Holds,
    door: Door,
    requests: Mutex<Sender<(Class, u32)>>,
}

impl ByteSource for Guarded {
    fn name(&self) -> &'static str {
        "guarded"
    }
    fn len(&self) -> u64 {
        self.chunks * PlainChunks::CHUNK
    }
    fn is_local(&self) -> bool {
        false
    }
    fn read_exact_at(&self, buf: &mut [u8], _: u64) -> Result<(), SourceError> {
        buf.fill(0);
        Ok(())
    }
    fn read_run(
        &self,
        range: std::ops::Range<u64>,
        class: Class,
        run: &mut dyn Run,
    ) -> Result<(), SourceError> {
        let chunk = (range.start / PlainChunks::CHUNK) as u32;
        let tell = || self.requests.lock().send((class, chunk));
        let is_fill = class == Class::Fill;
        if is_fill && self.holds == Holds::WithinTheAnswer {
            run.put(&[0]);
        }
        let _ = tell();
        if is_fill && self.holds != Holds::Nowhere {
            self.door.pass();
        }
        while let Some(room) = run.room() {
            room.fill(0);
            let len = room.len();
            run.filled(len);
        }
        Ok(())
    }
}

/// A cache with a tier, a blob of it, and what is requested.
struct FilledHost {
    source: Arc<Guarded>,
    cache: Arc<Cache>,
    blob: Arc<Blob>,
    requests: Receiver<(Class, u32)>,
    _dir: tempfile::TempDir,
}

impl FilledHost {
    fn new(chunks: u64, holds: Holds) -> Self {
        Self::of(chunks, holds, |source| Arc::new(PlainChunks::new(id(), source)))
    }

    fn of(
        chunks: u64,
        holds: Holds,
        made: impl FnOnce(Arc<Guarded>) -> Arc<dyn ChunkSource>,
    ) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let options = TierOptions { dir: dir.path().to_owned(), capacity: 1 << 30, floor: 0 };
        let tier = Arc::new(Tier::open(TierKind::Encoded, &options).unwrap());
        let tiers = Tiers { encoded: Some(tier), decoded: None };
        // One decode thread: the one more must be there for demand.
        let fetch = FetchOptions { workers: 1, connections: 8, ahead: None };
        let cache = Cache::over(CacheOptions { budget: 64 << 20, fetch }, tiers);
        let (requests, told) = channel();
        let (door, requests) = (Door::default(), Mutex::new(requests));
        let source = Arc::new(Guarded { chunks, holds, door, requests });
        let blob = cache.open(made(source.clone()));
        Self { source, cache, blob, requests: told, _dir: dir }
    }

    fn fill(&self) -> Filling {
        self.cache.fill(vec![self.blob.clone()], FillOptions::default())
    }

    /// Asks for a chunk; the answer comes through the channel.
    fn ask(&self, chunk: u32) -> Receiver<bool> {
        let (sender, answer) = channel();
        let mut waiter = || -> crate::cache::ChunkWaiter {
            let sender = sender.clone();
            Box::new(move |result| _ = sender.send(result.is_ok()))
        };
        if let Lookup::Hit(_) = self.cache.batch().get(&self.blob, chunk, &mut waiter) {
            sender.send(true).unwrap();
        }
        answer
    }

    /// The first chunk of the next request of the fill.
    fn next_of_fill(&self) -> u32 {
        loop {
            if let (Class::Fill, chunk) = self.requests.recv_timeout(LONG).unwrap() {
                return chunk;
            }
        }
    }
}

fn id() -> String {
    format!("plain:sha256:{}", "7".repeat(64))
}

fn wait_for_end(filling: &Filling) {
    let begun = Instant::now();
    while !filling.ended() {
        assert!(begun.elapsed() < LONG, "{:?}", filling.progress());
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// A blob of one chunk that cannot be had, and how often it was asked for.
#[derive(Default)]
struct Unreachable(AtomicU64);

impl ByteSource for Unreachable {
    fn name(&self) -> &'static str {
        "unreachable"
    }
    fn len(&self) -> u64 {
        PlainChunks::CHUNK
    }
    fn is_local(&self) -> bool {
        false
    }
    fn read_exact_at(&self, _: &mut [u8], _: u64) -> Result<(), SourceError> {
        self.0.fetch_add(1, Ordering::SeqCst);
        let (name, reason) = ("unreachable".to_owned(), "no route".to_owned());
        Err(SourceError::Remote { name, offset: 0, end: 1, reason, lasting: false })
    }
}

#[test]
fn what_cannot_be_had_is_tried_in_as_many_rounds_as_the_options_say() {
    for tries in [1, 2] {
        let dir = tempfile::tempdir().unwrap();
        let options = TierOptions { dir: dir.path().to_owned(), capacity: 1 << 30, floor: 0 };
        let tier = Arc::new(Tier::open(TierKind::Encoded, &options).unwrap());
        let tiers = Tiers { encoded: Some(tier), decoded: None };
        let fetch = FetchOptions { workers: 1, connections: 4, ahead: None };
        let cache = Cache::over(CacheOptions { budget: 1 << 20, fetch }, tiers);
        let source = Arc::new(Unreachable::default());
        let blob = cache.open(Arc::new(PlainChunks::new(id(), source.clone())));
        let filling = cache.fill(vec![blob], FillOptions { tries, ..FillOptions::default() });
        wait_for_end(&filling);
        assert_eq!(source.0.load(Ordering::SeqCst), tries);
    }
}

/// Reads for `most`, or longer until no pause between two reads was as long as what counts as quiet. False if there was a
/// pause: then nothing can be concluded.
fn read_on(host: &FilledHost, most: Duration, mut chunk: impl FnMut() -> u32) -> bool {
    let (begun, mut last) = (Instant::now(), Instant::now());
    while begun.elapsed() < most {
        assert!(host.ask(chunk()).recv_timeout(LONG).unwrap());
        if last.elapsed() >= quiet::LEAST / 2 {
            return false;
        }
        last = Instant::now();
        std::thread::sleep(Duration::from_millis(20));
    }
    true
}

#[test]
fn nothing_is_filled_while_reads_come_and_all_is_there_soon_after() {
    // On a machine that stops for half a second, the reads do not come; then once more.
    for _ in 0..20 {
        let host = FilledHost::new(600, Holds::Nowhere);
        let filling = host.fill();
        // Of other chunks each time, and of one that is in memory.
        let mut next = 0;
        let far = || {
            next += 3;
            next % 600
        };
        if !read_on(&host, quiet::LEAST * 3 / 2, far) || !read_on(&host, quiet::LEAST * 3 / 2, || 3)
        {
            continue;
        }
        let (fetched, ended) = (host.cache.fetched(), Instant::now());
        assert_eq!(fetched.fill_requests.get(), 0, "the fill took a part of the start");
        assert!(fetched.demand_requests.get() > 10);
        wait_for_end(&filling);
        assert!(ended.elapsed() > quiet::LEAST / 2);
        assert_eq!(filling.progress(), FillProgress { chunks: 600, near: 600, ended: true });
        return;
    }
    panic!("the machine never reads for three seconds without a pause");
}

#[test]
fn a_read_takes_over_a_chunk_that_the_fill_has_begun_to_fetch() {
    let host = FilledHost::new(40, Holds::BeforeTheAnswer);
    let filling = host.fill();
    let chunk = host.next_of_fill();
    // The request of the fill has no answer, and gets none before the read has one.
    let answers = [host.ask(chunk), host.ask(chunk)];
    for answer in answers {
        assert!(answer.recv_timeout(LONG).unwrap());
    }
    let fetched = host.cache.fetched();
    assert_eq!((fetched.demand_requests.get(), fetched.taken_over.get()), (1, 1), "for both");
    host.source.door.open();
    wait_for_end(&filling);
    assert_eq!(filling.progress().near, 40);
}

#[test]
fn a_read_waits_for_a_request_of_the_fill_whose_answer_has_begun() {
    let host = FilledHost::new(40, Holds::WithinTheAnswer);
    let filling = host.fill();
    let chunk = host.next_of_fill();
    let answer = host.ask(chunk);
    host.source.door.open();
    assert!(answer.recv_timeout(LONG).unwrap());
    assert_eq!(host.cache.fetched().demand_requests.get(), 0, "its bytes are not fetched twice");
    wait_for_end(&filling);
}

#[test]
fn chunks_that_arrive_for_the_fill_wait_for_quiet_but_not_their_readers() {
    for _ in 0..20 {
        let host = FilledHost::new(40, Holds::WithinTheAnswer);
        let filling = host.fill();
        let chunk = host.next_of_fill();
        // Demand comes, and the chunk of the fill arrives.
        assert!(host.ask(39).recv_timeout(LONG).unwrap());
        host.source.door.open();
        if !read_on(&host, quiet::LEAST * 3 / 2, || 39) {
            continue;
        }
        assert_eq!(host.cache.fetched().filled.get(), 0, "it is not worked on");
        assert_eq!(filling.progress().near, 0, "and nothing is written");
        let answer = host.ask(chunk);
        // The reads go on, so it never gets quiet.
        let begun = Instant::now();
        while answer.try_recv().is_err() {
            assert!(begun.elapsed() < LONG, "the reader waits for quiet");
            read_on(&host, Duration::from_millis(1), || 39);
        }
        wait_for_end(&filling);
        return;
    }
    panic!("the machine never reads for two seconds without a pause");
}

/// Chunks whose check waits at a door, and tells the scheduling class that it has before and behind.
struct Checked {
    chunks: PlainChunks,
    door: Arc<Door>,
    classes: Mutex<Sender<String>>,
}

/// The scheduling class of the calling thread, as the kernel shows it (`proc_pid_stat(5)`, field 41).
fn class() -> String {
    let stat = std::fs::read_to_string("/proc/thread-self/stat").unwrap();
    let behind_the_name = stat.rsplit_once(") ").unwrap().1;
    behind_the_name.split(' ').nth(41 - 3).unwrap().to_owned()
}

const ORDINARY: &str = "0"; // SCHED_OTHER
const IDLE: &str = "5"; // SCHED_IDLE

impl ChunkSource for Checked {
    fn id(&self) -> &str {
        self.chunks.id()
    }
    fn decoded_len(&self) -> u64 {
        self.chunks.decoded_len()
    }
    fn chunk_count(&self) -> u32 {
        self.chunks.chunk_count()
    }
    fn chunk_at(&self, offset: u64) -> Option<ChunkSpan> {
        self.chunks.chunk_at(offset)
    }
    fn span(&self, index: u32) -> Option<ChunkSpan> {
        self.chunks.span(index)
    }
    fn blob(&self) -> &Arc<dyn ByteSource> {
        self.chunks.blob()
    }
    fn encoded(&self, index: u32) -> Result<EncodedRange, ChunkError> {
        self.chunks.encoded(index)
    }
    fn room(&self, index: u32) -> usize {
        self.chunks.room(index)
    }
    fn decode(
        &self,
        index: u32,
        encoded: &mut EncodedChunk,
        room: &mut [u8],
    ) -> Result<std::ops::Range<usize>, ChunkError> {
        self.chunks.decode(index, encoded, room)
    }
    fn verify(&self, _: u32, _: &[u8]) -> Option<bool> {
        let _ = self.classes.lock().send(class());
        self.door.pass();
        let _ = self.classes.lock().send(class());
        Some(true)
    }
}

#[test]
fn a_read_raises_the_thread_that_verifies_its_chunk_for_the_fill_and_others_have_a_thread() {
    let (sender, classes) = channel();
    let door = Arc::<Door>::default();
    let own = door.clone();
    let host = FilledHost::of(40, Holds::Nowhere, |source| {
        let classes = Mutex::new(sender);
        Arc::new(Checked { chunks: PlainChunks::new(id(), source), door: own, classes })
    });
    let filling = host.fill();
    let chunk = host.next_of_fill();
    let before = classes.recv_timeout(LONG).unwrap();
    assert_eq!(before, if sys::idle::can_return() { IDLE } else { ORDINARY });
    // The only thread of this cache is busy with it, and one more serves another read.
    assert!(host.ask(39).recv_timeout(LONG).unwrap());
    let answer = host.ask(chunk);
    door.open();
    assert_eq!(classes.recv_timeout(LONG).unwrap(), ORDINARY);
    assert!(answer.recv_timeout(LONG).unwrap());
    wait_for_end(&filling);
}

#[test]
fn a_blob_is_read_from_front_to_end_only_while_it_is_quiet() {
    for _ in 0..20 {
        let host = FilledHost::new(40, Holds::Nowhere);
        let stop = Arc::<AtomicBool>::default();
        let (blob, demand) = (host.blob.clone(), host.cache.demand().clone());
        demand.attached();
        let mut whole = super::super::WholeBlob::new(blob, demand, stop);
        let reader = std::thread::spawn(move || {
            let mut sink = std::io::sink();
            std::io::copy(&mut whole, &mut sink).unwrap()
        });
        let clean = read_on(&host, quiet::LEAST * 3 / 2, || 3);
        let classes: Vec<_> = host.requests.try_iter().map(|(class, _)| class).collect();
        assert_eq!(reader.join().unwrap(), host.source.len());
        if clean {
            assert!(!classes.contains(&Class::Fill), "{classes:?}");
            return;
        }
    }
    panic!("the machine never reads for a second and a half without a pause");
}
