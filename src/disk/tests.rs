//! Tests of disks as a whole.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::channel;
use std::time::Duration;

use proptest::prelude::*;

use super::*;
use formats::lsmt::{LayerIdentity, LsmtLayer, NativeWriter, WarpWriter};
use formats::units::Bytes;
use source::chunk::PlainChunks;
use source::testing::{FaultySource, ReadFault};
use source::{ByteSource, MemorySource};

const DISK: u64 = 4096;

fn plain_chunks(id: &str, bytes: Vec<u8>) -> Arc<dyn ChunkSource> {
    Arc::new(PlainChunks::new(id, Arc::new(MemorySource::new(id, bytes))))
}

/// Bytes in which no two sectors are equal.
fn tar(len: usize) -> Vec<u8> {
    (0..len).map(|at| (at / 512 % 251) as u8 ^ (at as u8)).collect()
}

fn turbo(target: Option<Arc<dyn ChunkSource>>, fill: impl FnOnce(&mut WarpWriter)) -> DiskLayer {
    let mut writer = WarpWriter::new(Bytes(DISK * 512)).unwrap();
    fill(&mut writer);
    let mut bytes = Vec::new();
    writer.finish(&mut bytes).unwrap();
    let index =
        LsmtLayer::open(&MemorySource::new("meta", bytes.clone()), TagMeaning::Warp).unwrap();
    DiskLayer { index, data: LayerData::Turbo { meta: Arc::new(bytes), target } }
}

fn native(id: &str, runs: &[(u64, Vec<u8>)]) -> DiskLayer {
    let mut writer =
        NativeWriter::new(Vec::new(), Bytes(DISK * 512), LayerIdentity::default()).unwrap();
    for (lba, bytes) in runs {
        writer.data(Sectors(*lba), bytes).unwrap();
    }
    let bytes = writer.finish().unwrap();
    let index = LsmtLayer::open(&MemorySource::new(id, bytes.clone()), TagMeaning::Plain).unwrap();
    DiskLayer { index, data: LayerData::Native { chunks: plain_chunks(id, bytes) } }
}

#[test]
fn a_request_over_metadata_data_zeros_and_holes_is_cut_into_pieces_of_each() {
    let target = tar(20_000);
    let layer = turbo(Some(plain_chunks("t", target.clone())), |writer| {
        writer.metadata(Sectors(0), &[7; 1024]).unwrap();
        writer.remote(Sectors(2), Sectors(3), Sectors(5)).unwrap();
        writer.zeroed(Sectors(5), Sectors(2)).unwrap();
        writer.metadata(Sectors(9), &[8; 512]).unwrap();
    });
    let disk = Disk::new(vec![layer], Cache::new(1 << 20, 1)).unwrap();
    let mut bytes = vec![0xff; 12 * 512];
    disk.read_at(&mut bytes, 0).unwrap();
    assert_eq!(bytes[..1024], [7; 1024]);
    assert_eq!(bytes[1024..2560], target[2560..4096]);
    assert_eq!(bytes[2560..4608], [0; 2048]);
    assert_eq!(bytes[4608..5120], [8; 512]);
    assert_eq!(bytes[5120..], [0; 1024]);
    // Reads also at offsets inside sectors.
    let mut few = [0; 700];
    disk.read_at(&mut few, 900).unwrap();
    assert_eq!(few[..], bytes[900..1600]);
    let Located::Ready(pieces) =
        disk.locate(DiskRange::new(0, 12 * 512), &mut || unreachable!()).unwrap()
    else {
        panic!()
    };
    let kinds: Vec<_> =
        pieces.iter().map(|piece| (matches!(piece, Piece::Zero(_)), piece.len())).collect();
    assert_eq!(kinds, [(false, 1024), (false, 1536), (true, 2048), (false, 512), (true, 1024)]);
    assert_eq!(
        disk.mapped().collect::<Vec<_>>(),
        [(Sectors(0), Sectors(5)), (Sectors(9), Sectors(1))]
    );
    assert!(disk.locate(DiskRange::new(DISK * 512, 1), &mut || unreachable!()).is_err());
}

#[test]
fn a_mapping_past_its_target_reads_as_zeros_only_inside_the_last_block() {
    let open = |size: usize, target: u64, count: u64| {
        let layer = turbo(Some(plain_chunks("t", tar(size))), |writer| {
            writer.metadata(Sectors(0), &[7; 512]).unwrap();
            writer.remote(Sectors(8), Sectors(count), Sectors(target)).unwrap();
        });
        Disk::new(vec![layer], Cache::new(1 << 20, 1))
    };
    // The last file of a tar that was cut off after 1000 bytes of it.
    let disk = open(10_240 + 1000, 20, 8).unwrap();
    let mut bytes = vec![0xff; 4096];
    disk.read_at(&mut bytes, 8 * 512).unwrap();
    assert_eq!(bytes[..1000], tar(11_240)[10_240..]);
    assert_eq!(bytes[1000..], [0; 3096]);
    // A whole missing block, a run that begins past the end, and no end at all.
    for (size, target, count) in
        [(10_240, 20, 8), (10_240, 21, 1), (10_240, 19, 9), (10_240, (1 << 55) - 9, 8)]
    {
        let error = open(size, target, count).map(|_| ()).unwrap_err();
        assert!(matches!(error, DiskError::PastTarget { layer: 0, end: 10_240, .. }), "{error}");
    }
    let message = open(10_240, 100, 1).map(|_| ()).unwrap_err().to_string();
    assert_eq!(
        message,
        "Layer 0 (meta) maps disk sectors 8..9 at sector 100 of file 1, but t ends at byte 10240: \
         a mapping may exceed it only by less than a block of 4096 bytes"
    );
}

#[test]
fn a_layer_whose_parts_do_not_belong_together_is_refused() {
    let fill = |writer: &mut WarpWriter| {
        writer.metadata(Sectors(0), &[7; 512]).unwrap();
        writer.remote(Sectors(8), Sectors(1), Sectors(0)).unwrap();
    };
    let cache = Cache::new(1 << 20, 1);
    let refused =
        |layer| Disk::new(vec![layer], cache.clone()).map(|_| ()).unwrap_err().to_string();
    assert!(refused(turbo(None, fill)).contains("which is missing"));
    let mut short = turbo(Some(plain_chunks("t", tar(5000))), fill);
    short.data = LayerData::Turbo { meta: Arc::new(vec![0_u8; 4096]), target: None };
    assert!(refused(short).contains("must lie inside it"));
    let mut other = turbo(None, |writer| writer.metadata(Sectors(0), &[7; 512]).unwrap());
    other.data = LayerData::Native { chunks: plain_chunks("t", vec![0; 5000]) };
    assert!(refused(other).contains("different kinds"));
}

/// A blob behind a network that counts the reads in progress.
struct Slow {
    inner: MemorySource,
    now: AtomicUsize,
    most: AtomicUsize,
}

impl ByteSource for Slow {
    fn name(&self) -> &str {
        "slow"
    }
    fn len(&self) -> u64 {
        self.inner.len()
    }
    fn is_local(&self) -> bool {
        false
    }
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> Result<(), SourceError> {
        self.most.fetch_max(self.now.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
        std::thread::sleep(Duration::from_millis(30));
        self.now.fetch_sub(1, Ordering::SeqCst);
        self.inner.read_exact_at(buf, offset)
    }
}

#[test]
fn all_missing_chunks_of_a_request_are_loaded_at_once_and_the_waiter_is_called_once() {
    let bytes = tar(4 * 262_144);
    let slow = Arc::new(Slow {
        inner: MemorySource::new("t", bytes.clone()),
        now: AtomicUsize::new(0),
        most: AtomicUsize::new(0),
    });
    let layer = turbo(Some(Arc::new(PlainChunks::new("t", slow.clone()))), |writer| {
        writer.metadata(Sectors(0), &[7; 512]).unwrap();
        writer.remote(Sectors(8), Sectors(2048), Sectors(0)).unwrap();
    });
    // There is no room for even one chunk: loaded chunks must come from the lease.
    let disk = Disk::new(vec![layer], Cache::new(1000, 4)).unwrap();
    let (called, calls) = channel();
    let mut waiter = || -> Waiter {
        let called = called.clone();
        Box::new(move |result| called.send(result).unwrap())
    };
    let range = DiskRange::new(8 * 512, 4 * 262_144);
    assert!(matches!(disk.locate(range, &mut waiter).unwrap(), Located::Pending));
    calls.recv_timeout(Duration::from_secs(10)).unwrap().unwrap();
    // They are neighbours: one request, and no other at the same time.
    assert_eq!(disk.cache.fetched().demand_requests.get(), 1);
    assert_eq!(slow.most.load(Ordering::SeqCst), 1);
    let Located::Ready(pieces) = disk.locate(range, &mut waiter).unwrap() else {
        panic!("pending again")
    };
    let read: Vec<u8> = pieces.iter().flat_map(|piece| piece.bytes().unwrap().to_vec()).collect();
    assert!(read == bytes);
    drop(pieces);
    // The lease is used up.
    assert!(matches!(disk.locate(range, &mut waiter).unwrap(), Located::Pending));
    calls.recv_timeout(Duration::from_secs(10)).unwrap().unwrap();
    assert!(calls.try_recv().is_err());
}

#[test]
fn an_error_comes_once_and_names_the_layer_and_the_place() {
    let source: Arc<dyn ByteSource> = Arc::new(MemorySource::new("t", tar(600_000)));
    let faulty = Arc::new(FaultySource::new(source, vec![ReadFault::FailAt(300_000)]));
    let layer = turbo(Some(Arc::new(PlainChunks::new("t", faulty))), |writer| {
        writer.metadata(Sectors(0), &[7; 512]).unwrap();
        writer.remote(Sectors(8), Sectors(1100), Sectors(0)).unwrap();
    });
    let disk =
        Disk::new(vec![native("n", &[(0, vec![1; 512])]), layer], Cache::new(1 << 20, 3)).unwrap();
    let mut bytes = vec![0; 1100 * 512];
    for _ in 0..3 {
        let error = disk.read_at(&mut bytes, 8 * 512).unwrap_err();
        // The second chunk begins at byte 262144 of the target, 4096 further on the disk.
        let VolumeError::Chunk { offset, layer, .. } = error else { panic!("{error}") };
        assert_eq!((offset, layer), (262_144 + 4096, 1));
    }
    disk.read_at(&mut bytes[..512], 8 * 512).unwrap();
}

#[test]
fn threads_that_fight_over_a_tiny_cache_all_end_with_right_bytes() {
    let bytes = tar(8 * 262_144);
    let layer = turbo(Some(plain_chunks("t", bytes.clone())), |writer| {
        writer.metadata(Sectors(0), &[7; 512]).unwrap();
        writer.remote(Sectors(8), Sectors(4000), Sectors(0)).unwrap();
    });
    let disk = Disk::new(vec![layer], Cache::new(300_000, 2)).unwrap();
    std::thread::scope(|scope| {
        for thread in 0..4_usize {
            let (disk, bytes) = (&disk, &bytes);
            scope.spawn(move || {
                for step in 0..40_usize {
                    let at = (step * 7919 + thread * 131) % 3000 * 512;
                    let mut read = vec![0; 500_000];
                    disk.read_at(&mut read, (8 * 512 + at) as u64).unwrap();
                    assert!(read == bytes[at..at + 500_000]);
                }
            });
        }
    });
    assert!(disk.cache.stats().bytes <= 300_000);
}

#[test]
fn a_content_digest_skips_zero_blocks_and_counts_none_twice() {
    let runs = [(3, vec![9; 512]), (5, vec![8; 512]), (16, vec![0; 4096]), (4088, vec![1; 4096])];
    let disk = Disk::new(vec![native("n", &runs)], Cache::new(1 << 20, 1)).unwrap();
    let mut block = vec![0; 4096];
    block[1536..2048].fill(9);
    block[2560..3072].fill(8);
    let mut fed = 0_u64.to_le_bytes().to_vec();
    fed.extend_from_slice(&block);
    fed.extend_from_slice(&(4088_u64 * 512).to_le_bytes());
    fed.extend_from_slice(&[1; 4096]);
    let expected = (formats::oci::digest::Digest::of(&fed), DISK * 512);
    assert_eq!(digest::content_digest(&disk, disk.mapped()).unwrap(), expected);
    let everything = std::iter::once((Sectors(0), Sectors(DISK)));
    assert_eq!(digest::content_digest(&disk, everything).unwrap(), expected);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(30))]
    #[test]
    fn a_disk_of_mixed_layers_reads_as_bytes_laid_over_bytes(
        layers in prop::collection::vec((any::<bool>(), prop::collection::vec((0_u64..200, 1_u64..150, 0_u8..3), 1..10)), 1..5),
        budget in prop_oneof![Just(0_u64), Just(300_000), Just(1 << 24)],
        reads in prop::collection::vec((0..DISK * 512, 0_u64..200_000), 10),
    ) {
        let target = tar(1 << 20);
        let mut expected = vec![0; DISK as usize * 512];
        let mut opened = Vec::new();
        for (number, (is_native, calls)) in layers.iter().enumerate() {
            let mut lba = 1;
            let mut runs = Vec::new();
            for &(gap, len, kind) in calls {
                lba += gap;
                runs.push((lba, len, kind));
                lba += len;
            }
            let payload = |lba: u64, len: u64| -> Vec<u8> {
                (0..len * 512).map(|at| ((lba * 512 + at) / 300) as u8 ^ number as u8).collect()
            };
            let mut put = |lba: u64, bytes: &[u8]| expected[lba as usize * 512..][..bytes.len()].copy_from_slice(bytes);
            if *is_native {
                let runs: Vec<_> = runs.iter().map(|&(lba, len, _)| (lba, payload(lba, len))).collect();
                runs.iter().for_each(|(lba, bytes)| put(*lba, bytes));
                opened.push(native(&format!("n{number}"), &runs));
                continue;
            }
            opened.push(turbo(Some(plain_chunks("t", target.clone())), |writer| {
                writer.metadata(Sectors(0), &[3; 512]).unwrap();
                put(0, &[3; 512]);
                for (lba, len, kind) in runs {
                    let bytes = match kind {
                        0 => payload(lba, len),
                        1 => target[lba as usize % 1000 * 512..][..len as usize * 512].to_vec(),
                        _ => vec![0; len as usize * 512],
                    };
                    match kind {
                        0 => writer.metadata(Sectors(lba), &bytes).unwrap(),
                        1 => writer.remote(Sectors(lba), Sectors(len), Sectors(lba % 1000)).unwrap(),
                        _ => writer.zeroed(Sectors(lba), Sectors(len)).unwrap(),
                    }
                    put(lba, &bytes);
                }
            }));
        }
        let disk = Disk::new(opened, Cache::new(budget, 2)).unwrap();
        for (offset, len) in reads {
            let len = len.min(DISK * 512 - offset) as usize;
            let mut read = vec![0xaa; len];
            disk.read_at(&mut read, offset).unwrap();
            prop_assert!(read == expected[offset as usize..][..len]);
        }
        let mut unmapped = expected;
        for (lba, len) in disk.mapped() {
            unmapped[lba.bytes().0 as usize..][..len.bytes().0 as usize].fill(0);
        }
        prop_assert!(unmapped.iter().all(|&byte| byte == 0));
    }
}
