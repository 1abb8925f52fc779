//! Tests of a writable layer: against a plain array of sectors, and across crashes.

use std::sync::Arc;

use proptest::prelude::*;

use super::*;
use formats::lsmt::{LsmtLayer, RunPlace, Stack, TagMeaning};
use source::{ByteSource as _, MemoryBudget, MemorySource};

const SIZE: u64 = 1 << 20;

fn files(dir: &Path) -> WritableFiles {
    WritableFiles::in_dir(dir)
}

fn layer(dir: &Path) -> WritableLayer {
    WritableLayer::create(&files(dir), Bytes(SIZE), LayerIdentity::default()).unwrap()
}

/// Reads the whole disk, with no layer below.
fn read_all(layer: &WritableLayer) -> Vec<u8> {
    let mut disk = vec![0; SIZE as usize];
    for run in layer.look_up(Sectors(0), Sectors(SIZE / SECTOR)) {
        let at = (run.lba.0 * SECTOR) as usize;
        let part = &mut disk[at..at + (run.len.0 * SECTOR) as usize];
        match run.place {
            WrittenPlace::Below | WrittenPlace::Zero => part.fill(0),
            WrittenPlace::Data(at) => layer.read_data(at, part).unwrap(),
        }
    }
    disk
}

fn committed(layer: &mut WritableLayer) -> Vec<u8> {
    layer.commit(Vec::new(), Bytes(SIZE), LayerIdentity::default()).unwrap()
}

/// Reads the whole disk of a committed layer through the reading half of this module.
fn read_committed(bytes: &[u8]) -> Vec<u8> {
    let source = Arc::new(MemorySource::new("committed", bytes.to_vec()));
    let layer = LsmtLayer::open(&*source, TagMeaning::Plain).unwrap();
    let stack = Stack::merge(&[&layer]).unwrap();
    let mut disk = vec![0; SIZE as usize];
    for run in stack.look_up(Sectors(0), Sectors(SIZE / SECTOR)) {
        let at = (run.lba.0 * SECTOR) as usize;
        let part = &mut disk[at..at + (run.len.0 * SECTOR) as usize];
        if let RunPlace::Own(at) = run.place {
            source.read_exact_at(part, at.0 * SECTOR).unwrap();
        }
    }
    disk
}

/// Reads the whole disk through a read-only view of the files.
fn read_viewed(files: &WritableFiles) -> Vec<u8> {
    let source = MemorySource::new("viewed", fs::read(&files.data).unwrap());
    let layer = view(files).unwrap();
    let mut disk = vec![0; SIZE as usize];
    for mapping in layer.mappings().iter().filter(|mapping| !mapping.zeroed) {
        let at = (mapping.lba.0 * SECTOR) as usize;
        let part = &mut disk[at..at + usize::from(mapping.len) * SECTOR as usize];
        source.read_exact_at(part, mapping.moffset.0 * SECTOR).unwrap();
    }
    disk
}

/// Makes a sparse layer as upstream does: a header, and a hole behind it.
fn sparse_layer(dir: &Path, size: u64) -> SparseLayer {
    fs::write(dir.join(DATA_NAME), sparse::empty_file(Bytes::ZERO)).unwrap();
    fs::write(dir.join(INDEX_NAME), b"").unwrap();
    SparseLayer::open(&dir.join(DATA_NAME), Bytes(size)).unwrap()
}

#[derive(Clone, Debug)]
enum WriteStep {
    Write(u64, u64, u8),
    Discard(u64, u64),
    Flush,
    Reopen,
}

fn steps() -> impl Strategy<Value = Vec<WriteStep>> {
    let range = (0_u64..2000, 1_u64..48);
    let step = prop_oneof![
        6 => (range.clone(), any::<u8>()).prop_map(|((at, len), fill)| WriteStep::Write(at, len, fill)),
        2 => range.prop_map(|(at, len)| WriteStep::Discard(at, len)),
        1 => Just(WriteStep::Flush),
        1 => Just(WriteStep::Reopen),
    ];
    prop::collection::vec(step, 1..60)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn a_layer_reads_as_a_disk_would_and_its_commit_too(steps in steps()) {
        let dir = tempfile::tempdir().unwrap();
        let mut layer = layer(dir.path());
        let mut model = vec![0_u8; SIZE as usize];
        for step in steps {
            match step {
                WriteStep::Write(at, len, fill) => {
                    let bytes = vec![fill; (len * SECTOR) as usize];
                    layer.write(at * SECTOR, &bytes).unwrap();
                    model[(at * SECTOR) as usize..][..bytes.len()].copy_from_slice(&bytes);
                }
                WriteStep::Discard(at, len) => {
                    layer.discard(DiskRange::new(at * SECTOR, len * SECTOR)).unwrap();
                    model[(at * SECTOR) as usize..][..(len * SECTOR) as usize].fill(0);
                }
                WriteStep::Flush => layer.flush().unwrap(),
                WriteStep::Reopen => {
                    layer.flush().unwrap();
                    drop(layer);
                    layer = WritableLayer::open(&files(dir.path())).unwrap();
                    prop_assert_eq!(layer.cut(), 0);
                }
            }
            prop_assert!(read_all(&layer) == model);
        }
        layer.flush().unwrap();
        prop_assert!(read_viewed(&files(dir.path())) == model);
        let once = committed(&mut layer);
        prop_assert!(read_committed(&once) == model);
        // The same content written in another way yields the same layer.
        prop_assert!(committed(&mut layer) == once);
        // So does sealing in place.
        SharedLayer::new(layer).seal().unwrap();
        prop_assert!(read_committed(&fs::read(dir.path().join(DATA_NAME)).unwrap()) == model);
    }

    #[test]
    fn a_sparse_layer_reads_as_a_disk_would_and_so_when_it_is_sealed(
        writes in prop::collection::vec((0_u64..250, 1_u64..6, 1_u8..), 1..30),
    ) {
        let dir = tempfile::tempdir().unwrap();
        let layer = sparse_layer(dir.path(), SIZE);
        let mut model = vec![0_u8; SIZE as usize];
        let block = layer.block();
        prop_assume!(block == 4096);
        let mut layer = layer;
        for (at, len, fill) in writes {
            let bytes = vec![fill; (len * block) as usize];
            layer.write(at * block, &bytes).unwrap();
            model[(at * block) as usize..][..bytes.len()].copy_from_slice(&bytes);
            drop(layer);
            let again = SparseLayer::open(&dir.path().join(DATA_NAME), Bytes::ZERO).unwrap();
            // A sector that was never written does not belong to the layer.
            for run in again.look_up(Sectors(0), Sectors(SIZE / SECTOR)) {
                let place = (run.lba.0 * SECTOR) as usize;
                let part = &model[place..][..(run.len.0 * SECTOR) as usize];
                let expected = match run.place {
                    WrittenPlace::Data(at) => {
                        let mut found = vec![0; part.len()];
                        again.read_data(at, &mut found).unwrap();
                        found
                    }
                    WrittenPlace::Below => vec![0; part.len()],
                    WrittenPlace::Zero => panic!("a hole is no zeros"),
                };
                prop_assert!(part == expected);
            }
            layer = again;
        }
        prop_assert!(read_viewed(&files(dir.path())) == model);
        layer.seal().unwrap();
        prop_assert!(read_committed(&fs::read(dir.path().join(DATA_NAME)).unwrap()) == model);
        // A sealed layer is refused as a writable one.
        let refused = view(&files(dir.path())).err().unwrap().to_string();
        prop_assert!(refused.contains("sealed: name it as the last of the lowers"), "{refused}");
        layer.unseal().unwrap();
        prop_assert!(read_viewed(&files(dir.path())) == model);
    }
}

#[test]
fn a_sealed_layer_takes_no_writes_and_one_whose_seal_was_taken_off_does() {
    let dir = tempfile::tempdir().unwrap();
    let mut first = layer(dir.path());
    first.write(0, &[1; 8192]).unwrap();
    let shared = SharedLayer::new(first);
    shared.seal().unwrap();
    let bytes = fs::read(dir.path().join(DATA_NAME)).unwrap();
    drop(shared);
    let error = WritableLayer::open(&files(dir.path())).err().unwrap().to_string();
    assert!(error.contains("sealed: name it as the last of the lowers"), "{error}");
    assert!(fs::read(dir.path().join(DATA_NAME)).unwrap() == bytes, "it was changed");

    let dir = tempfile::tempdir().unwrap();
    let mut first = layer(dir.path());
    first.write(0, &[1; 8192]).unwrap();
    let shared = SharedLayer::new(first);
    shared.seal().unwrap();
    shared.unseal().unwrap();
    shared.write(4096, &[2; 512]).unwrap();
    shared.flush().unwrap();
    drop(shared);
    let found = read_all(&WritableLayer::open(&files(dir.path())).unwrap());
    assert!(found[..4096] == [1; 4096] && found[4096..4608] == [2; 512]);
}

#[test]
fn what_was_flushed_survives_any_cut_of_what_came_after() {
    let dir = tempfile::tempdir().unwrap();
    let mut first = layer(dir.path());
    first.write(0, &[1; 8192]).unwrap();
    first.write(4096, &[2; 4096]).unwrap();
    first.flush().unwrap();
    let flushed = read_all(&first);
    let (data, index) = (dir.path().join(DATA_NAME), dir.path().join(INDEX_NAME));
    let kept = [fs::metadata(&data).unwrap().len(), fs::metadata(&index).unwrap().len()];
    first.write(0, &[3; 4096]).unwrap();
    first.discard(DiskRange::new(4096, 512)).unwrap();
    first.write(1 << 19, &[4; 20 * 512]).unwrap();
    first.flush().unwrap();
    let after = read_all(&first);
    drop(first);
    let whole = [fs::read(&data).unwrap(), fs::read(&index).unwrap()];
    let mut seen = [0, 0];
    for index_len in kept[1]..=whole[1].len() as u64 {
        for data_len in [kept[0], kept[0] + 700, whole[0].len() as u64 - 1, whole[0].len() as u64] {
            fs::write(&data, &whole[0][..data_len as usize]).unwrap();
            fs::write(&index, &whole[1][..index_len as usize]).unwrap();
            let mut again = WritableLayer::open(&files(dir.path())).unwrap();
            let found = read_all(&again);
            // Each write is present as a whole or not at all, in their order.
            let mut steps = vec![flushed.clone()];
            let mut next = flushed.clone();
            next[..4096].fill(3);
            steps.push(next.clone());
            next[4096..4608].fill(0);
            steps.push(next);
            steps.push(after.clone());
            let step =
                steps.iter().position(|step| *step == found).expect("a state between two writes");
            seen[usize::from(step == 3)] += 1;
            // Writing continues after the reopening.
            again.write(8192, &[9; 512]).unwrap();
            again.flush().unwrap();
            let mut expected = found;
            expected[8192..8704].fill(9);
            drop(again);
            assert!(read_all(&WritableLayer::open(&files(dir.path())).unwrap()) == expected);
        }
    }
    assert!(seen[0] > 0 && seen[1] > 0);
}

#[test]
fn records_of_zeros_that_a_crash_leaves_behind_are_cut_off() {
    let dir = tempfile::tempdir().unwrap();
    let mut first = layer(dir.path());
    first.write(0, &[1; 512]).unwrap();
    first.flush().unwrap();
    let disk = read_all(&first);
    drop(first);
    let index = dir.path().join(INDEX_NAME);
    let mut log = fs::read(&index).unwrap();
    let record = log[4096..4112].to_vec();
    log.extend_from_slice(&[0; 32]);
    log.extend_from_slice(&record);
    fs::write(&index, &log).unwrap();
    let again = WritableLayer::open(&files(dir.path())).unwrap();
    assert_eq!((again.cut(), fs::metadata(&index).unwrap().len()), (48, 4112));
    assert!(read_all(&again) == disk);
}

#[test]
fn unflushed_writes_are_read_but_not_in_the_log() {
    let dir = tempfile::tempdir().unwrap();
    let mut first = layer(dir.path());
    first.write(512, &[7; 512]).unwrap();
    assert_eq!(read_all(&first)[512..1024], [7; 512]);
    assert_eq!(fs::metadata(dir.path().join(INDEX_NAME)).unwrap().len(), 4096);
    drop(first);
    assert!(WritableLayer::open(&files(dir.path())).unwrap().is_empty());
}

#[test]
fn a_layer_is_one_process_s_at_a_time_and_is_made_once() {
    let dir = tempfile::tempdir().unwrap();
    let first = layer(dir.path());
    assert!(matches!(WritableLayer::open(&files(dir.path())), Err(WritableError::Busy { .. })));
    drop(first);
    WritableLayer::open(&files(dir.path())).unwrap();
    let again = WritableLayer::create(&files(dir.path()), Bytes(SIZE), LayerIdentity::default());
    assert!(again.is_err_and(|error| error.to_string().contains(DATA_NAME)));
}

#[test]
fn ranges_off_the_sectors_or_off_the_disk_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let mut layer = layer(dir.path());
    for (offset, len) in
        [(1, 512), (0, 511), (SIZE, 512), (SIZE - 512, 1024), (u64::MAX - 511, 512)]
    {
        let bytes = vec![0; len as usize];
        assert!(matches!(layer.write(offset, &bytes), Err(WritableError::Range { .. })));
        assert!(matches!(
            layer.discard(DiskRange::new(offset, len)),
            Err(WritableError::Range { .. })
        ));
    }
    assert!(layer.is_empty());
}

#[test]
fn files_that_are_no_writable_layer_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let (data, index) = (dir.path().join(DATA_NAME), dir.path().join(INDEX_NAME));
    assert!(WritableLayer::open(&files(dir.path())).is_err());
    drop(layer(dir.path()));
    let whole = [fs::read(&data).unwrap(), fs::read(&index).unwrap()];
    let refused = |data_bytes: &[u8], index_bytes: &[u8], needle: &str| {
        fs::write(&data, data_bytes).unwrap();
        fs::write(&index, index_bytes).unwrap();
        let error = WritableLayer::open(&files(dir.path())).err().unwrap().to_string();
        assert!(error.contains(needle), "{error}");
    };
    refused(&whole[0][..4000], &whole[1], "shorter than its header");
    refused(&whole[0], &[], "shorter than its header");
    refused(&whole[0], &whole[0], "index log");
    refused(&whole[1], &whole[1], "append-only");
    let mut sparse = whole[0].clone();
    sparse[28] = 0x13;
    refused(&sparse, &whole[1], "sparse");
    let mut other = whole[0].clone();
    other[0] ^= 1;
    refused(&other, &whole[1], "magic");
}

#[test]
fn a_commit_holds_no_garbage_and_its_entries_are_cut_as_upstreams_are() {
    let dir = tempfile::tempdir().unwrap();
    let mut layer = layer(dir.path());
    let noise: Vec<u8> = (0..100 * 4096_u32).map(|at| ((at * 7919) >> 5) as u8 | 1).collect();
    for _ in 0..5 {
        layer.write(0, &noise).unwrap();
    }
    layer.write(40 * 4096, &[0; 20 * 4096]).unwrap();
    let bytes = committed(&mut layer);
    assert_eq!(bytes.len() as u64, 4096 + 80 * 4096 + 4096 + 4096);
    let source = MemorySource::new("committed", bytes);
    let read = LsmtLayer::open(&source, TagMeaning::Plain).unwrap();
    let shape: Vec<(u64, u16, bool)> =
        read.mappings().iter().map(|entry| (entry.lba.0, entry.len, entry.zeroed)).collect();
    assert_eq!(shape, [(0, 320, false), (320, 160, true), (480, 320, false)]);
}

#[test]
fn threads_that_write_and_flush_at_once_lose_nothing() {
    const THREADS: u64 = 4;
    const PART: u64 = SIZE / THREADS;
    let dir = tempfile::tempdir().unwrap();
    let shared = SharedLayer::new(layer(dir.path()));
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let shared = &shared;
            scope.spawn(move || {
                for round in 0..60 {
                    let fill = (thread * 60 + round) as u8;
                    let at = thread * PART + round % 7 * 4096;
                    shared.write(at, &[fill; 8192]).unwrap();
                    if round % 5 == 0 {
                        shared.discard(DiskRange::new(thread * PART + 65_536, 4096)).unwrap();
                        shared.flush().unwrap();
                    }
                    // A read returns acknowledged writes.
                    let runs = shared.look_up(Sectors(at / SECTOR), Sectors(16));
                    for run in runs {
                        let WrittenPlace::Data(place) = run.place else { panic!("{run:?}") };
                        let mut found = vec![0; (run.len.0 * SECTOR) as usize];
                        shared.read_data(place, &mut found).unwrap();
                        assert!(found.iter().all(|&byte| byte == fill));
                    }
                }
            });
        }
    });
    shared.flush().unwrap();
    let before = shared.look_up(Sectors(0), Sectors(SIZE / SECTOR));
    drop(shared);
    let again = WritableLayer::open(&files(dir.path())).unwrap();
    assert_eq!(again.cut(), 0);
    let disk = read_all(&again);
    for run in before {
        let (at, len) = ((run.lba.0 * SECTOR) as usize, (run.len.0 * SECTOR) as usize);
        let mut expected = vec![0; len];
        if let WrittenPlace::Data(place) = run.place {
            again.read_data(place, &mut expected).unwrap();
        }
        assert!(disk[at..at + len] == expected);
    }
    for thread in 0..THREADS {
        let last = |round: u64| disk[(thread * PART + round % 7 * 4096) as usize];
        assert_eq!(last(59), (thread * 60 + 59) as u8);
        assert_eq!(disk[(thread * PART + 65_536) as usize], 0);
    }
}

#[test]
fn a_flush_that_found_no_space_can_be_repeated_and_keeps_the_order() {
    let dir = tempfile::tempdir().unwrap();
    let mut first = layer(dir.path());
    first.write(0, &[1; 512]).unwrap();
    let batch = first.take_batch().unwrap().unwrap();
    first.write(0, &[2; 512]).unwrap();
    let full = io::Error::from_raw_os_error(libc::ENOSPC);
    let failure = BatchFailure::Passing(first.index.error("write")(full));
    let error = first.end_batch(batch, Err(failure)).unwrap_err();
    assert!(error.is_full(), "{error}");
    first.flush().unwrap();
    drop(first);
    let mut again = WritableLayer::open(&files(dir.path())).unwrap();
    assert_eq!(read_all(&again)[..512], [2; 512]);
    // A failure to make bytes durable is a different case.
    again.write(0, &[3; 512]).unwrap();
    let batch = again.take_batch().unwrap().unwrap();
    let lost = io::Error::from_raw_os_error(libc::EIO);
    let failure = BatchFailure::Lasting(again.data.error("flush")(lost));
    assert!(again.end_batch(batch, Err(failure)).is_err());
    assert!(matches!(again.flush(), Err(WritableError::Broken { .. })));
    assert!(matches!(again.write(0, &[4; 512]), Err(WritableError::Broken { .. })));
}

#[test]
fn a_write_that_fails_leaves_its_place_to_the_next() {
    let dir = tempfile::tempdir().unwrap();
    let mut first = layer(dir.path());
    let failed = first.take_place(DiskRange::new(0, 1024)).unwrap();
    let other = first.take_place(DiskRange::new(4096, 512)).unwrap();
    first.give_back(&failed);
    first.give_back(&other);
    let next = first.take_place(DiskRange::new(8192, 512)).unwrap();
    assert_eq!(next.content, other.content, "the last place is free again");
    assert_eq!((next.index_end, first.promised), (RECORD + ENTRY, 1));
}

#[test]
fn the_index_of_written_data_stays_within_its_budget_and_a_write_beyond_it_finds_a_full_disk() {
    let dir = tempfile::tempdir().unwrap();
    let budget = MemoryBudget::new(60_000);
    let mut first = layer(dir.path()).within(budget.part());
    // Every second sector, so that no two writes are one run.
    let mut written = 0;
    let error = loop {
        match first.write(written * 1024 % SIZE, &[written as u8 | 1; 512]) {
            Ok(()) => written += 1,
            Err(error) => break error,
        }
        assert!(budget.used() <= 60_000);
    };
    assert!(error.is_full(), "{error}");
    assert!(error.to_string().contains("turbobd.memoryBudgetMB"), "{error}");
    assert!((800..1000).contains(&written), "{written} runs in 60,000 bytes");
    // What is there stays, can be read and made durable.
    first.flush().unwrap();
    let disk = read_all(&first);
    assert!((0..written).all(|nth| disk[(nth * 1024) as usize] == nth as u8 | 1));
    drop(first);
    assert_eq!(budget.used(), 0);
    let little = MemoryBudget::new(10_000);
    let refused = WritableLayer::open_within(&files(dir.path()), little.part()).err().unwrap();
    assert!(matches!(refused, WritableError::Memory(_)), "{refused}");
    let again = WritableLayer::open_within(&files(dir.path()), MemoryBudget::new(200_000).part());
    assert_eq!(read_all(&again.unwrap()), disk);
}
