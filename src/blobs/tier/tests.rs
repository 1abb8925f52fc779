//! Promises of a tier as a whole.

use std::collections::HashMap;
use std::os::unix::fs::FileExt as _;
use std::sync::atomic::{AtomicU64, Ordering};

use proptest::prelude::*;

use super::memory::{FaultyTierStore, MemoryTierStore, Plan, StoreFault};
use super::store::Store;
use super::*;
use source::chunk::PlainChunks;
use source::{ByteSource, SourceError};

/// A blob with a length and no bytes.
struct LengthOnly(u64);

impl ByteSource for LengthOnly {
    fn name(&self) -> &'static str {
        "length"
    }
    fn len(&self) -> u64 {
        self.0
    }
    fn read_exact_at(&self, _: &mut [u8], _: u64) -> Result<(), SourceError> {
        unreachable!("nothing is read here")
    }
}

/// A blob of `chunks` chunks of 256 KiB, which are filled to a small part only.
fn blob(number: u32, chunks: u64) -> PlainChunks {
    let id = format!("plain:sha256:{number:064x}");
    PlainChunks::new(id, Arc::new(LengthOnly(chunks * PlainChunks::CHUNK)))
}

fn options(capacity: u64, floor: u64) -> TierOptions {
    TierOptions { dir: PathBuf::from("memory"), capacity, floor }
}

fn tier(store: Arc<dyn Store>, capacity: u64, floor: u64) -> Tier {
    Tier::with_store(TierKind::Encoded, store, &options(capacity, floor)).unwrap()
}

/// Contents of chunk `chunk` of blob `number`; some KiB, and no whole pages.
fn bytes(number: u32, chunk: u32) -> Vec<u8> {
    let len = 3000 + (number * 7919 + chunk * 1237) % 9000;
    (0..len).map(|i| (i * 31 + chunk * 17 + number * 101) as u8 | 1).collect()
}

fn offer(file: &TierBlob, number: u32, chunk: u32) -> bool {
    let start = u64::from(chunk) * PlainChunks::CHUNK;
    file.offer(chunk, start, bytes(number, chunk).into())
}

/// True if the chunk is present; then it must be right.
fn reads(file: &TierBlob, number: u32, chunk: u32) -> bool {
    let mut buf = bytes(number, chunk);
    buf.fill(0);
    let good = file.len_of(chunk) == Some(buf.len()) && file.read(chunk, &mut buf, &|_| None);
    assert!(!good || buf == bytes(number, chunk), "chunk {chunk} of {number} is wrong");
    good
}

#[test]
fn what_was_offered_is_there_after_a_restart_and_is_shared_by_identity() {
    let store = MemoryTierStore::new(1 << 30);
    let first = tier(Arc::new(store.clone()), 1 << 30, 0);
    let (one, same, other) =
        (first.file(&blob(1, 64)), first.file(&blob(1, 64)), first.file(&blob(2, 64)));
    let (one, same, other) = (one.unwrap(), same.unwrap(), other.unwrap());
    for chunk in 0..40 {
        assert!(offer(&one, 1, chunk));
    }
    first.flush();
    assert!((0..40).all(|chunk| reads(&same, 1, chunk)));
    assert!((0..40).all(|chunk| !other.has(chunk)));
    assert_eq!(first.usage().bytes, store.allocated(), "counted to the byte");
    drop((one, same, other, first));

    let again = tier(Arc::new(store.clone()), 1 << 30, 0);
    let one = again.file(&blob(1, 64)).unwrap();
    assert!((0..40).all(|chunk| reads(&one, 1, chunk)));
    assert_eq!(again.usage().bytes, store.allocated());
    assert_eq!(again.usage().chunks, 40);
}

#[test]
fn a_blob_without_a_digest_has_no_file() {
    let tier = tier(Arc::new(MemoryTierStore::new(1 << 20)), 1 << 20, 0);
    let source = PlainChunks::new("plain:/some/path", Arc::new(LengthOnly(100)));
    assert!(tier.file(&source).is_none());
}

#[test]
fn another_length_or_version_begins_the_file_anew() {
    let store = MemoryTierStore::new(1 << 30);
    let first = tier(Arc::new(store.clone()), 1 << 30, 0);
    let file = first.file(&blob(1, 64)).unwrap();
    assert!(offer(&file, 1, 3));
    drop((file, first));

    let second = tier(Arc::new(store.clone()), 1 << 30, 0);
    let file = second.file(&blob(1, 65)).unwrap();
    assert!(!file.has(3));
    assert_eq!(second.counters().resets.get(), 1);
    assert!(offer(&file, 1, 3));
    second.flush();
    assert!(reads(&file, 1, 3));
    assert_eq!(second.usage().bytes, store.allocated());
    drop((file, second));

    let map = store.names().unwrap().into_iter().find(|name| name.ends_with(".map")).unwrap();
    let map = store.open(&map).unwrap();
    uring::block_on(map.write(Arc::new(vec![9].into()), 8)).unwrap();
    let third = tier(Arc::new(store.clone()), 1 << 30, 0);
    assert_eq!((third.counters().resets.get(), third.usage().chunks), (1, 0));
    assert_eq!(store.allocated(), 0);
}

#[test]
fn the_capacity_is_never_exceeded_and_is_used() {
    const CAPACITY: u64 = 200 << 10;
    let store = MemoryTierStore::new(1 << 30);
    let tier = tier(Arc::new(store.clone()), CAPACITY, 0);
    let files: Vec<_> = (0..3).map(|number| tier.file(&blob(number, 512)).unwrap()).collect();
    for chunk in 0..400 {
        for (number, file) in files.iter().enumerate() {
            offer(file, number as u32, chunk);
        }
        // A chunk that is offered faster than the disk writes is dropped.
        tier.flush();
        if chunk % 7 == 0 {
            let usage = tier.usage();
            assert_eq!(usage.bytes, store.allocated());
            assert!(usage.bytes <= CAPACITY, "{usage:?}");
        }
    }
    tier.flush();
    assert!(tier.usage().bytes > CAPACITY * 8 / 10, "{:?}", tier.usage());
    assert!(tier.counters().evicted.get() > 1000);
    let there: usize = files
        .iter()
        .zip(0..)
        .map(|(file, number)| (0..400).filter(|chunk| reads(file, number, *chunk)).count())
        .sum();
    assert_eq!(there, tier.usage().chunks);
    assert_eq!(tier.counters().damaged.get(), 0);
}

#[test]
fn a_smaller_capacity_is_kept_after_a_restart_and_prune_goes_to_any_size() {
    let store = MemoryTierStore::new(1 << 30);
    let first = tier(Arc::new(store.clone()), 1 << 30, 0);
    let file = first.file(&blob(1, 512)).unwrap();
    (0..200).for_each(|chunk| assert!(offer(&file, 1, chunk)));
    drop((file, first));
    let second = tier(Arc::new(store.clone()), 300 << 10, 0);
    let file = second.file(&blob(1, 512)).unwrap();
    second.flush();
    assert!(store.allocated() <= 300 << 10);
    assert!(second.prune(100 << 10) <= 100 << 10);
    assert_eq!(second.usage().bytes, store.allocated());
    assert!(second.usage().bytes > 50 << 10);
    drop(file);
    assert_eq!((second.prune(0), store.allocated()), (0, 0));
    assert!(store.names().unwrap().is_empty());
}

#[test]
fn below_the_floor_the_tier_shrinks_and_takes_no_more_until_there_is_space_again() {
    let store = MemoryTierStore::new(10 << 20);
    let tier = tier(Arc::new(store.clone()), 8 << 20, 2 << 20);
    let file = tier.file(&blob(1, 512)).unwrap();
    (0..100).for_each(|chunk| assert!(offer(&file, 1, chunk)));
    tier.flush();
    let before = tier.usage().bytes;
    assert!(before > 500 << 10 && !tier.is_full());
    // Another program fills the disk: 300 KiB are missing.
    store.resize(before + (2 << 20) - (300 << 10));
    offer(&file, 1, 200);
    tier.flush();
    assert!(tier.is_full() && !file.has(200));
    let after = tier.usage().bytes;
    assert!(after <= before - (292 << 10) && after >= before - (340 << 10), "{before} → {after}");
    assert_eq!(after, store.allocated());
    store.resize(10 << 20);
    offer(&file, 1, 200);
    tier.flush();
    assert!(!tier.is_full() && reads(&file, 1, 200));
}

#[test]
fn a_full_disk_is_no_error_and_no_wrong_data() {
    let store = MemoryTierStore::new(256 << 10);
    let tier = tier(Arc::new(store.clone()), 1 << 30, 0);
    let file = tier.file(&blob(1, 512)).unwrap();
    for chunk in 0..200 {
        offer(&file, 1, chunk);
        if chunk % 10 == 0 {
            tier.flush();
        }
    }
    tier.flush();
    assert!(tier.counters().refused.get() > 100 && tier.is_full());
    let there = (0..200).filter(|chunk| reads(&file, 1, *chunk)).count();
    assert!(there > 10);
    assert_eq!(tier.usage().bytes, store.allocated());
}

#[test]
fn a_wrong_byte_a_short_file_and_a_dying_disk_are_forgotten_and_not_served() {
    let store = MemoryTierStore::new(1 << 30);
    let plan = Plan::new();
    let tier =
        tier(Arc::new(FaultyTierStore::new(Arc::new(store.clone()), plan.clone())), 1 << 30, 0);
    let file = tier.file(&blob(1, 512)).unwrap();
    (0..50).for_each(|chunk| assert!(offer(&file, 1, chunk)));
    tier.flush();
    let data = store.names().unwrap().into_iter().find(|name| name.ends_with(".data")).unwrap();
    let data = store.open(&data).unwrap();
    let at = place(7 * PlainChunks::CHUNK, 7);
    uring::block_on(data.write(Arc::new(vec![0].into()), at + 100)).unwrap();
    assert!(!reads(&file, 1, 7) && !file.has(7) && reads(&file, 1, 8));
    data.set_len(place(40 * PlainChunks::CHUNK, 40)).unwrap();
    assert!(!reads(&file, 1, 45) && reads(&file, 1, 39));
    assert_eq!(tier.counters().damaged.get(), 2);
    // The next write notices it, and creates the files anew.
    assert!(offer(&file, 1, 7));
    tier.flush();
    assert_eq!(tier.counters().resets.get(), 1);
    assert!(reads(&file, 1, 7) && !file.has(39));
    assert_eq!(tier.usage().bytes, store.allocated());
    plan.deaf.store(true, Ordering::SeqCst);
    assert!(!reads(&file, 1, 7) && !file.has(7));
}

#[test]
fn verify_forgets_what_is_damaged_and_nothing_else() {
    let store = MemoryTierStore::new(1 << 30);
    let tier = tier(Arc::new(store.clone()), 1 << 30, 0);
    let file = tier.file(&blob(1, 512)).unwrap();
    (0..50).for_each(|chunk| assert!(offer(&file, 1, chunk)));
    tier.flush();
    drop(file);
    assert_eq!(tier.verify().good, 50);
    let data = store.names().unwrap().into_iter().find(|name| name.ends_with(".data")).unwrap();
    let data = store.open(&data).unwrap();
    for chunk in [3_u32, 30] {
        let at = place(u64::from(chunk) * PlainChunks::CHUNK, chunk);
        uring::block_on(data.write(Arc::new(vec![0].into()), at)).unwrap();
    }
    let verified = tier.verify();
    assert_eq!((verified.good, verified.damaged), (48, 2));
    assert_eq!(tier.verify().damaged, 0);
    assert_eq!(tier.usage().bytes, store.allocated());
}

/// Work on a tier: chunks come, are read, and are evicted.
fn work(tier: &Tier, steps: &[(u32, u32)]) {
    let files: Vec<_> = (0..2).map(|number| tier.file(&blob(number, 64)).unwrap()).collect();
    for (step, &(number, chunk)) in steps.iter().enumerate() {
        let file = &files[number as usize];
        if !reads(file, number, chunk) {
            offer(file, number, chunk);
        }
        if step % 5 == 4 {
            tier.flush();
        }
    }
    tier.flush();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// The power fails at any step, and any sectors of the unsynced data are kept: every chunk that the map
    /// lists is then right to the byte, the capacity holds, and the tier continues from there.
    #[test]
    fn whatever_a_crash_leaves_what_is_said_to_be_there_is_right(
        steps in proptest::collection::vec((0_u32..2, 0_u32..24), 10..50),
        seed in any::<u64>(),
        end in any::<prop::sample::Index>(),
    ) {
        const CAPACITY: u64 = 96 << 10;
        let count = {
            let plan = Plan::new();
            let store = FaultyTierStore::new(Arc::new(MemoryTierStore::new(1 << 30)), plan.clone());
            work(&tier(Arc::new(store), CAPACITY, 0), &steps);
            plan.steps()
        };
        let plan = Plan::new();
        plan.end_at(end.index(count as usize + 1) as u64);
        let disk = MemoryTierStore::new(1 << 30);
        work(&tier(Arc::new(FaultyTierStore::new(Arc::new(disk.clone()), plan)), CAPACITY, 0), &steps);
        let mut state = seed | 1;
        let disk = disk.crash(|| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state & 8 == 0
        });
        let after = tier(Arc::new(disk.clone()), CAPACITY, 0);
        for number in 0..2 {
            let file = after.file(&blob(number, 64)).unwrap();
            for chunk in 0..24 {
                prop_assert_eq!(file.has(chunk), reads(&file, number, chunk));
            }
        }
        prop_assert_eq!(after.counters().damaged.get(), 0);
        after.flush();
        prop_assert!(disk.allocated() <= CAPACITY);
        prop_assert_eq!(after.usage().bytes, disk.allocated());
        work(&after, &steps);
        prop_assert!(disk.allocated() <= CAPACITY);
        prop_assert_eq!(after.usage().bytes, disk.allocated());
    }

    /// Single faults of the disk at any steps: no wrong data, and the count stays right.
    #[test]
    fn whatever_the_disk_refuses_nobody_gets_wrong_data(
        steps in proptest::collection::vec((0_u32..2, 0_u32..24), 10..50),
        faults in proptest::collection::vec((0_u64..150, 0_usize..4), 1..12),
    ) {
        let plan = Plan::new();
        for (step, kind) in faults {
            plan.at(step, [StoreFault::NoSpace, StoreFault::Io, StoreFault::Short, StoreFault::Torn][kind]);
        }
        let disk = MemoryTierStore::new(1 << 30);
        let tier = tier(Arc::new(FaultyTierStore::new(Arc::new(disk.clone()), plan)), 96 << 10, 0);
        work(&tier, &steps);
        work(&tier, &steps);
        prop_assert!(tier.usage().bytes <= 96 << 10);
    }
}

#[test]
fn readers_beside_a_tier_that_gives_up_and_writes_anew_never_see_anything_wrong() {
    let store = MemoryTierStore::new(1 << 30);
    let tier = tier(Arc::new(store), 150 << 10, 0);
    let hits = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for thread in 0..3_u32 {
            let (tier, hits) = (&tier, &hits);
            scope.spawn(move || {
                let file = tier.file(&blob(1, 512)).unwrap();
                for step in 0..4000_u32 {
                    let chunk = (step * (thread * 2 + 1) * 7) % 60;
                    if reads(&file, 1, chunk) {
                        hits.fetch_add(1, Ordering::Relaxed);
                    } else {
                        offer(&file, 1, chunk);
                    }
                    if step % 64 == 0 {
                        tier.flush();
                    }
                }
            });
        }
    });
    assert!(hits.load(Ordering::SeqCst) > 100);
    assert_eq!(tier.counters().damaged.get(), 0, "what is given up is not damage");
}

/// Directories to try: one on this machine's disk, one in memory.
fn directories() -> Vec<tempfile::TempDir> {
    let mut dirs = vec![tempfile::tempdir().unwrap()];
    dirs.extend(tempfile::tempdir_in("/dev/shm"));
    dirs
}

fn on_disk(dir: &Path, capacity: u64) -> Result<Tier, TierError> {
    Tier::open(TierKind::Encoded, &TierOptions { dir: dir.to_owned(), capacity, floor: 0 })
}

fn allocated(dir: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt as _;
    let files = std::fs::read_dir(dir).unwrap();
    files.map(|entry| entry.unwrap().metadata().unwrap().blocks() * 512).sum()
}

#[test]
fn in_a_real_directory_the_capacity_holds_and_a_second_process_goes_without() {
    for dir in directories() {
        const CAPACITY: u64 = 512 << 10;
        let tier = on_disk(dir.path(), CAPACITY).unwrap();
        assert!(matches!(on_disk(dir.path(), CAPACITY), Err(TierError::InUse { .. })));
        let file = tier.file(&blob(1, 512)).unwrap();
        for chunk in 0..300 {
            offer(&file, 1, chunk);
            if chunk % 20 == 0 {
                tier.flush();
                assert!(allocated(dir.path()) <= CAPACITY);
            }
        }
        tier.flush();
        assert_eq!(tier.usage().bytes, allocated(dir.path()), "{}", dir.path().display());
        let there: Vec<u32> = (0..300).filter(|chunk| reads(&file, 1, *chunk)).collect();
        assert!(there.len() > 30 && tier.counters().damaged.get() == 0);
        drop((file, tier));
        let tier = on_disk(dir.path(), CAPACITY).unwrap();
        let file = tier.file(&blob(1, 512)).unwrap();
        assert_eq!(there, (0..300).filter(|chunk| reads(&file, 1, *chunk)).collect::<Vec<u32>>());
    }
}

#[test]
fn a_file_that_is_removed_or_cut_off_under_load_costs_only_a_fetch() {
    let dir = tempfile::tempdir().unwrap();
    let tier = on_disk(dir.path(), 64 << 20).unwrap();
    let file = tier.file(&blob(1, 512)).unwrap();
    let data = || {
        let files = std::fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().path());
        files.into_iter().find(|path| path.extension().is_some_and(|end| end == "data")).unwrap()
    };
    let mut missed = HashMap::new();
    for round in 0..60_u32 {
        for chunk in 0..40 {
            if !reads(&file, 1, chunk) {
                *missed.entry(round).or_insert(0) += 1;
                offer(&file, 1, chunk);
            }
        }
        tier.flush();
        match round {
            10 => std::fs::remove_file(data()).unwrap(),
            20 => {
                std::fs::OpenOptions::new().write(true).open(data()).unwrap().set_len(5000).unwrap()
            }
            30 => std::fs::remove_file(data().with_extension("map")).unwrap(),
            40 => {
                let file = std::fs::OpenOptions::new().write(true).open(data()).unwrap();
                file.write_all_at(&[0; 100], place(PlainChunks::CHUNK, 1)).unwrap();
            }
            _ => {}
        }
        // A new chunk, so that the writer looks at its files.
        offer(&file, 1, 100 + round);
        tier.flush();
    }
    assert_eq!((missed[&0], missed[&41]), (40, 1));
    assert!((50..60).all(|round| !missed.contains_key(&round)), "{missed:?}");
    assert_eq!(tier.counters().resets.get(), 3);
    drop((file, tier));
    let tier = on_disk(dir.path(), 64 << 20).unwrap();
    let file = tier.file(&blob(1, 512)).unwrap();
    assert!((0..40).all(|chunk| reads(&file, 1, chunk)));
}

/// A tier beside demand that never ends, as long as the returned value is not dropped.
struct Busy(Arc<std::sync::atomic::AtomicBool>, Option<JoinHandle<()>>);

impl Busy {
    fn beside(tier: &Tier) -> Self {
        let demand = Arc::<Demand>::default();
        tier.shared.yield_to(demand.clone());
        let over = Arc::<std::sync::atomic::AtomicBool>::default();
        let own = over.clone();
        let reader = std::thread::spawn(move || {
            while !own.load(Ordering::SeqCst) {
                demand.note();
                std::thread::sleep(std::time::Duration::from_millis(5));
            }
        });
        Self(over, Some(reader))
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
        self.1.take().unwrap().join().unwrap();
    }
}

fn wait_until(what: impl Fn() -> bool) {
    let begun = std::time::Instant::now();
    while !what() {
        assert!(begun.elapsed().as_secs() < 30, "it does not come");
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
}

#[test]
fn a_chunk_is_not_written_beside_reads_but_at_once_when_a_caller_waits_and_when_they_end() {
    let store = MemoryTierStore::new(1 << 30);
    let tier = tier(Arc::new(store), 64 << 20, 0);
    let file = tier.file(&blob(1, 40)).unwrap();
    let busy = Busy::beside(&tier);
    assert!(offer(&file, 1, 0));
    // Longer than a batch waits for more, shorter than the patience.
    std::thread::sleep(std::time::Duration::from_millis(300));
    assert_eq!(tier.usage().chunks, 0);
    tier.flush();
    assert!(reads(&file, 1, 0));
    assert!(offer(&file, 1, 1));
    drop(busy);
    wait_until(|| reads(&file, 1, 1));
}

#[test]
fn chunks_that_would_be_dropped_for_lack_of_room_are_written_beside_reads() {
    let store = MemoryTierStore::new(1 << 30);
    let tier = tier(Arc::new(store), 256 << 20, 0);
    let chunks = QUEUE / PlainChunks::CHUNK * 3 / 4;
    let file = tier.file(&blob(1, chunks)).unwrap();
    let _busy = Busy::beside(&tier);
    for chunk in 0..chunks {
        let bytes = vec![1; PlainChunks::CHUNK as usize];
        assert!(file.offer(chunk as u32, chunk * PlainChunks::CHUNK, bytes.into()));
    }
    wait_until(|| tier.waiting() <= QUEUE / 2);
    assert!(tier.usage().chunks > 0 && tier.counters().dropped.get() == 0);
}
