//! Promises of a writable ublk device.
//!
//! Without ublk on this machine, [`in_a_guest_with_ublk`] runs these tests inside `scripts/vm`.

#![allow(clippy::unwrap_used, clippy::panic)]

use crate::block;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::block::{MIB, Random, alone, content, open, read, soon, sys_block, threads, ublk_here};
use disk::DiskRange;
use disk::testing::{FaultyVolume, MemoryVolume};
use disk::upper::UpperVolume;
use disk::volume::{Located, Piece, Volume, VolumeError, Waiter, WritableVolume};
use rustix::fs::{FallocateFlags, fallocate};
use turbobd_frontends::ublk::{UblkDevice, UblkOptions};

/// Runs a test if there is ublk, and checks that no thread remains.
fn with_ublk(test: impl Fn()) {
    let _alone = alone();
    if !ublk_here() {
        return; // in_a_guest_with_ublk runs it
    }
    test();
    assert_eq!(threads("ublk"), Vec::<String>::new());
    assert_eq!(threads("upper"), Vec::<String>::new());
}

fn start(volume: Arc<dyn Volume>) -> UblkDevice {
    UblkDevice::start(volume, &UblkOptions::default()).unwrap()
}

/// Opens for writing past the page cache; with `durable`, each write waits until it is durable (FUA).
fn open_for_writing(path: &Path, durable: bool) -> File {
    let flags = libc::O_DIRECT | if durable { libc::O_DSYNC } else { 0 };
    OpenOptions::new().read(true).write(true).custom_flags(flags).open(path).unwrap()
}

/// Writes from a buffer that direct I/O accepts.
fn write(file: &File, offset: u64, bytes: &[u8]) -> io::Result<()> {
    let mut buffer = vec![0; bytes.len() + 4096];
    let start = buffer.as_ptr().align_offset(4096);
    buffer[start..start + bytes.len()].copy_from_slice(bytes);
    file.write_all_at(&buffer[start..start + bytes.len()], offset)
}

/// The layer in `dir` over a disk that is slow at first.
fn upper(dir: &Path, lower: &[u8]) -> Arc<UpperVolume> {
    let lower = MemoryVolume::new(lower.to_vec());
    let lower = FaultyVolume::new(lower, Duration::from_millis(1), None);
    Arc::new(UpperVolume::open(dir, Arc::new(lower), source::MemoryBudget::default()).unwrap())
}

fn whole(volume: &dyn Volume) -> Vec<u8> {
    let mut bytes = vec![0; volume.size() as usize];
    volume.read_at(&mut bytes, 0).unwrap();
    bytes
}

/// A disk in memory that records its changes, delays them, and fails where the test says.
struct Noted {
    bytes: Mutex<Vec<u8>>,
    changes: Mutex<Vec<String>>,
    delay: Duration,
    fail_at: Option<u64>,
}

impl Noted {
    fn new(len: usize, delay: Duration, fail_at: Option<u64>) -> Arc<Self> {
        let (bytes, changes) = (Mutex::new(content(len)), Mutex::default());
        Arc::new(Self { bytes, changes, delay, fail_at })
    }

    fn change(&self, offset: u64, len: u64, text: String) -> Result<(), VolumeError> {
        std::thread::sleep(self.delay);
        if self.fail_at.is_some_and(|at| (offset..offset + len).contains(&at)) {
            return Err(VolumeError::Injected { offset });
        }
        self.changes.lock().unwrap().push(text);
        Ok(())
    }

    fn changes(&self) -> Vec<String> {
        std::mem::take(&mut self.changes.lock().unwrap())
    }
}

impl Volume for Noted {
    fn size(&self) -> u64 {
        self.bytes.lock().unwrap().len() as u64
    }

    fn locate(
        &self,
        range: DiskRange,
        _: &mut dyn FnMut() -> Waiter,
    ) -> Result<Located, VolumeError> {
        let guard = Arc::new(
            self.bytes.lock().unwrap()[range.offset as usize..][..range.buffer_len()].to_vec(),
        );
        Ok(Located::Ready(vec![Piece::Memory { guard, range: 0..range.buffer_len() }]))
    }

    fn writable(&self) -> Option<&dyn WritableVolume> {
        Some(self)
    }
}

impl WritableVolume for Noted {
    fn write_at(&self, bytes: &[u8], offset: u64) -> Result<(), VolumeError> {
        self.change(offset, bytes.len() as u64, format!("write {offset} {}", bytes.len()))?;
        self.bytes.lock().unwrap()[offset as usize..][..bytes.len()].copy_from_slice(bytes);
        Ok(())
    }

    fn discard(&self, range: DiskRange) -> Result<(), VolumeError> {
        let DiskRange { offset, len } = range;
        self.change(offset, len, format!("zero {offset} {len}"))?;
        self.bytes.lock().unwrap()[offset as usize..][..len as usize].fill(0);
        Ok(())
    }

    fn flush(&self) -> Result<(), VolumeError> {
        self.change(u64::MAX, 0, "flush".into())
    }
}

#[test]
fn over_ublk_the_kernel_knows_what_a_device_can_and_each_request_is_passed_on() {
    with_ublk(|| {
        let noted = Noted::new(4 * MIB, Duration::ZERO, None);
        let device = start(noted.clone());
        let sysfs = sys_block(device.path());
        let attribute =
            |name: &str| std::fs::read_to_string(sysfs.join(name)).unwrap().trim().to_owned();
        assert_eq!(attribute("ro"), "0");
        assert_eq!(attribute("queue/write_cache"), "write back");
        assert_eq!(attribute("queue/fua"), "1");
        assert_eq!(attribute("queue/discard_max_bytes"), (1_u64 << 30).to_string());
        assert_eq!(attribute("queue/write_zeroes_max_bytes"), (1_u64 << 30).to_string());

        let file = open_for_writing(device.path(), false);
        write(&file, 4096, &[1; 8192]).unwrap();
        assert_eq!(noted.changes(), ["write 4096 8192"]);
        file.sync_all().unwrap();
        assert_eq!(noted.changes(), ["flush"]);
        // A write ends at the border of a chunk, like a read.
        write(&file, 255 * 1024, &[2; 2048]).unwrap();
        let mut changes = noted.changes();
        changes.sort();
        assert_eq!(changes, ["write 261120 1024", "write 262144 1024"]);
        write(&open_for_writing(device.path(), true), 512, &[3; 512]).unwrap();
        // The kernel's O_DSYNC is a write with FUA, and then a flush for the file itself.
        assert_eq!(noted.changes(), ["write 512 512", "flush", "flush"]);
        let zeros = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        fallocate(&file, zeros, MIB as u64, MIB as u64).unwrap();
        // 7.3 cuts it at the borders of chunks, too.
        let zeroed: u64 = noted
            .changes()
            .iter()
            .map(|change| change.strip_prefix("zero ").unwrap().split_once(' ').unwrap().1)
            .map(|len| len.parse::<u64>().unwrap())
            .sum();
        assert_eq!(zeroed, MIB as u64);
        assert_eq!(read(&file, MIB as u64, MIB).unwrap(), vec![0; MIB]);
        let discard = Command::new("blkdiscard")
            .args(["-f", "-o", "8192", "-l", "4096"])
            .arg(device.path())
            .status();
        assert!(discard.unwrap().success());
        assert_eq!(noted.changes(), ["zero 8192 4096"]);

        let totals = device.counters();
        assert_eq!((totals.writes, totals.written), (4, 8192 + 2048 + 512), "{totals:?}");
        assert!(totals.zeroed >= 2 && totals.flushes == 3, "{totals:?}");
        assert_eq!((totals.errors, totals.refused), (0, 0), "{totals:?}");
        drop(file);
        device.stop().unwrap();
    });
}

#[test]
fn over_ublk_a_change_fails_where_the_volume_fails_and_only_there() {
    with_ublk(|| {
        let noted = Noted::new(MIB, Duration::ZERO, Some(70_000));
        let bytes = content(MIB);
        let device = start(noted.clone());
        let file = open_for_writing(device.path(), false);
        for _ in 0..3 {
            let error = write(&file, 69_632, &[7; 4096]).unwrap_err();
            assert_eq!(error.raw_os_error(), Some(libc::EIO));
            write(&file, 65_536, &[8; 4096]).unwrap();
        }
        assert_eq!(read(&file, 69_632, 4096).unwrap(), bytes[69_632..][..4096]);
        assert_eq!(read(&file, 65_536, 4096).unwrap(), [8; 4096]);
        let totals = device.counters();
        assert_eq!((totals.errors, totals.writes), (3, 3), "{totals:?}");
        drop(file);
        device.stop().unwrap();
    });
}

#[test]
fn over_ublk_no_reader_waits_while_changes_wait_for_the_disk() {
    with_ublk(|| {
        let noted = Noted::new(MIB, Duration::from_millis(1500), None);
        // One queue: the reader's and the writers' requests go to the same thread.
        let options = UblkOptions { queues: 1, ..UblkOptions::default() };
        let device = UblkDevice::start(noted, &options).unwrap();
        let begun = Instant::now();
        std::thread::scope(|scope| {
            for number in 0..3 {
                let path = device.path();
                scope.spawn(move || {
                    let file = open_for_writing(path, false);
                    write(&file, number * 8192, &[1; 4096]).unwrap();
                });
            }
            scope.spawn(|| open_for_writing(device.path(), false).sync_all().unwrap());
            std::thread::sleep(Duration::from_millis(100));
            let file = open(device.path(), true);
            for at in 0..50 {
                read(&file, at * 4096 + 512 * 1024, 4096).unwrap();
            }
            let took = begun.elapsed();
            assert!(took < Duration::from_millis(1200), "50 reads took {took:?}");
        });
        device.stop().unwrap();
    });
}

#[test]
fn over_ublk_the_writers_of_a_device_that_is_stopped_are_answered() {
    with_ublk(|| {
        let noted = Noted::new(MIB, Duration::from_millis(400), None);
        let device = start(noted);
        let file = open_for_writing(device.path(), false);
        let writer = std::thread::spawn(move || write(&file, 0, &[1; 4096]));
        std::thread::sleep(Duration::from_millis(100));
        let begun = Instant::now();
        device.stop().unwrap();
        assert!(begun.elapsed() < Duration::from_secs(5));
        let _ = writer.join().unwrap(); // either answer, but an answer
    });
}

#[test]
fn over_ublk_reads_see_every_acknowledged_write() {
    with_ublk(|| {
        let dir = tempfile::tempdir().unwrap();
        let device = start(upper(dir.path(), &content(MIB)));
        let acknowledged = AtomicU64::new(0);
        std::thread::scope(|scope| {
            let (path, acknowledged) = (device.path(), &acknowledged);
            write(&open_for_writing(path, false), 4096, &[0; 4096]).unwrap();
            scope.spawn(move || {
                let file = open_for_writing(path, false);
                for number in 1..=400_u64 {
                    let bytes = number.to_le_bytes().repeat(512);
                    write(&file, 4096, &bytes).unwrap();
                    acknowledged.store(number, Ordering::SeqCst);
                }
            });
            for _ in 0..2 {
                scope.spawn(move || {
                    let file = open(path, true);
                    loop {
                        let known = acknowledged.load(Ordering::SeqCst);
                        let bytes = read(&file, 4096, 4096).unwrap();
                        for word in bytes.as_chunks::<8>().0 {
                            assert!(u64::from_le_bytes(*word) >= known);
                        }
                        if known == 400 {
                            return;
                        }
                    }
                });
            }
        });
        device.stop().unwrap();
    });
}

/// One thread's part of a disk, with its expected contents.
struct Part<'a> {
    file: File,
    path: &'a Path,
    base: u64,
    model: &'a mut [u8],
    random: Random,
}

impl Part<'_> {
    /// A range in sectors, as bytes of the part.
    fn range(&mut self, most: u64) -> (u64, u64) {
        let sectors = self.model.len() as u64 / 512;
        let at = self.random.below(sectors);
        let len = (self.random.below(most) + 1).min(sectors - at);
        (at * 512, len * 512)
    }

    fn step(&mut self) {
        let (at, len) = self.range(1200);
        let range = at as usize..(at + len) as usize;
        match self.random.below(20) {
            0..8 => {
                let bytes: Vec<u8> = content(len as usize + 8)[self.random.below(8) as usize..]
                    [..len as usize]
                    .to_vec();
                write(&self.file, self.base + at, &bytes).unwrap();
                self.model[range].copy_from_slice(&bytes);
            }
            8..16 => {
                let found = read(&self.file, self.base + at, len as usize).unwrap();
                assert!(found == self.model[range], "{len} bytes at {at} of {}", self.base);
            }
            16..18 => {
                let zeros = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                fallocate(&self.file, zeros, self.base + at, len).unwrap();
                self.model[range].fill(0);
            }
            18 if self.random.below(4) == 0 => {
                let discard = Command::new("blkdiscard")
                    // Forced, otherwise it wants the device for itself.
                    .args(["-f", "-o", &(self.base + at).to_string(), "-l", &len.to_string()])
                    .arg(self.path)
                    .status();
                assert!(discard.unwrap().success());
                self.model[range].fill(0);
            }
            _ => self.file.sync_all().unwrap(),
        }
    }
}

#[test]
fn over_ublk_a_disk_is_what_its_writers_wrote_and_so_is_its_layer_later() {
    with_ublk(|| {
        let lower = content(8 * MIB);
        let mut model = lower.clone();
        let dir = tempfile::tempdir().unwrap();
        let device = start(upper(dir.path(), &lower));
        std::thread::scope(|scope| {
            for (number, model) in model.chunks_mut(2 * MIB).enumerate() {
                let path = device.path();
                scope.spawn(move || {
                    let file = open_for_writing(path, number % 2 == 1);
                    let base = (number * 2 * MIB) as u64;
                    let random = Random(number as u64 + 1);
                    let mut part = Part { file, path, base, model, random };
                    for _ in 0..150 {
                        part.step();
                    }
                });
            }
        });
        assert!(std::fs::read(device.path()).unwrap() == model);
        // Through the page cache, written back at the end of the device.
        let file = OpenOptions::new().write(true).open(device.path()).unwrap();
        file.write_all_at(b"buffered", 3 * MIB as u64 + 77).unwrap();
        model[3 * MIB + 77..][..8].copy_from_slice(b"buffered");
        drop(file);
        let totals = device.counters();
        assert_eq!((totals.errors, totals.refused, totals.lost_queues), (0, 0, 0), "{totals:?}");
        assert!(totals.writes > 100 && totals.zeroed > 10 && totals.flushes > 10, "{totals:?}");
        device.stop().unwrap();
        assert!(whole(&*upper(dir.path(), &lower)) == model);
        // And over ublk again.
        let device = start(upper(dir.path(), &lower));
        assert!(std::fs::read(device.path()).unwrap() == model);
        device.stop().unwrap();
    });
}

#[test]
fn over_ublk_shapes_from_one_tag_to_many_can_be_written() {
    with_ublk(|| {
        for (queues, depth, chunk) in [(1, 1, 4096), (2, 7, 1 << 20), (1, 256, 64 * 1024)] {
            let lower = content(2 * MIB);
            let dir = tempfile::tempdir().unwrap();
            let options = UblkOptions { queues, depth, chunk, ..UblkOptions::default() };
            let device = UblkDevice::start(upper(dir.path(), &lower), &options).unwrap();
            let bytes: Vec<u8> = content(2 * MIB).into_iter().rev().collect();
            write(&open_for_writing(device.path(), false), 0, &bytes).unwrap();
            assert!(std::fs::read(device.path()).unwrap() == bytes);
            device.stop().unwrap();
        }
    });
}

/// A filesystem of a few MiB, unmounted when dropped.
struct Small {
    dir: tempfile::TempDir,
}

impl Small {
    fn new(kind: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let small = Self { dir };
        std::fs::create_dir(small.path()).unwrap();
        if kind == "tmpfs" {
            small.mount(&["-t", "tmpfs", "-o", "size=6M"], "small");
        } else {
            let image = small.dir.path().join("image");
            File::create(&image).unwrap().set_len(16 * MIB as u64).unwrap();
            let mut mkfs = Command::new("mkfs.ext4");
            assert!(mkfs.args(["-q", "-F"]).arg(&image).status().unwrap().success());
            small.mount(&["-o", "loop"], image.to_str().unwrap());
        }
        small
    }

    fn mount(&self, args: &[&str], what: &str) {
        let mounted = Command::new("mount").args(args).arg(what).arg(self.path()).status();
        assert!(mounted.unwrap().success());
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("mounted")
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.path()).status();
    }
}

/// Fills the device up to the first refusal of each size; returns the offsets that were refused.
fn fill(file: &File, model: &mut [u8], random: &mut Random) -> usize {
    let mut refused = 0;
    for size in [65_536_u64, 4096, 512] {
        let mut full = 0;
        while full < 3 {
            let at = random.below(model.len() as u64 / size) * size;
            let fill = random.next() as u8 | 1;
            match write(file, at, &vec![fill; size as usize]) {
                Ok(()) => model[at as usize..][..size as usize].fill(fill),
                Err(error) => {
                    assert_eq!(error.raw_os_error(), Some(libc::ENOSPC));
                    full += 1;
                }
            }
        }
        refused += full;
    }
    refused
}

#[test]
fn over_ublk_a_full_layer_is_told_as_such_and_nothing_acknowledged_is_lost() {
    with_ublk(|| {
        for kind in ["tmpfs", "ext4"] {
            let small = Small::new(kind);
            let dir = small.path().join("upper");
            let lower = content(8 * MIB);
            let mut model = lower.clone();
            let device = start(upper(&dir, &lower));
            let file = open_for_writing(device.path(), false);
            let refused = fill(&file, &mut model, &mut Random(5));
            assert_eq!(device.counters().errors, refused as u64, "{kind}");
            let check = |device: &UblkDevice| {
                let found = read(&open(device.path(), true), 0, 8 * MIB).unwrap();
                let wrong = found.iter().zip(&model).position(|(a, b)| a != b);
                assert_eq!(wrong, None, "{kind}");
            };
            check(&device);
            // The records of all writes find room, although no more data do.
            file.sync_all().unwrap();
            drop(file);
            device.stop().unwrap();
            if kind == "ext4" {
                std::fs::write("/proc/sys/vm/drop_caches", "3").unwrap();
            }
            let device = start(upper(&dir, &lower));
            check(&device);
            // With space it continues at its old position.
            if kind == "tmpfs" {
                small.mount(&["-o", "remount,size=64M"], "small");
                write(&open_for_writing(device.path(), true), 0, &[9; 65_536]).unwrap();
                assert_eq!(read(&open(device.path(), true), 0, 65_536).unwrap(), [9; 65_536]);
            }
            device.stop().unwrap();
            assert!(soon(|| threads("upper").is_empty()));
        }
    });
}

#[test]
fn over_ublk_an_ext4_is_made_filled_and_checked() {
    with_ublk(|| {
        let dir = tempfile::tempdir().unwrap();
        let (upper_dir, target) = (dir.path().join("upper"), dir.path().join("mounted"));
        std::fs::create_dir(&target).unwrap();
        let lower = vec![0; 32 * MIB];
        let run = |args: &[&str]| {
            let status = Command::new(args[0]).args(&args[1..]).status().unwrap();
            assert!(status.success(), "{args:?}");
        };
        let device = start(upper(&upper_dir, &lower));
        let (node, at) = (device.path().to_str().unwrap(), target.to_str().unwrap());
        run(&["mkfs.ext4", "-q", "-F", node]);
        run(&["mount", "-t", "ext4", "-o", "discard", node, at]);
        for number in 0..40 {
            std::fs::write(target.join(number.to_string()), content(number * 10_007)).unwrap();
        }
        for number in (0..40).step_by(3) {
            std::fs::remove_file(target.join(number.to_string())).unwrap();
        }
        run(&["umount", at]);
        run(&["e2fsck", "-fn", node]);
        device.stop().unwrap();

        let device = start(upper(&upper_dir, &lower));
        let node = device.path().to_str().unwrap();
        run(&["e2fsck", "-fn", node]);
        run(&["mount", "-t", "ext4", "-o", "ro", node, at]);
        for number in 0..40 {
            let found = std::fs::read(target.join(number.to_string())).ok();
            let expected = (number % 3 != 0).then(|| content(number * 10_007));
            assert!(found == expected, "{number}");
        }
        run(&["umount", at]);
        device.stop().unwrap();
    });
}

/// Runs the tests of this file in a guest that has ublk.
#[test]
fn in_a_guest_with_ublk() {
    let _alone = alone();
    block::in_a_guest_with_ublk(module_path!(), &["over_ublk"], 9);
}
