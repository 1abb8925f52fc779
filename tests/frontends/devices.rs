//! The two front ends serve exactly the bytes of a volume, and leave nothing behind.
//!
//! The loop tests need root, FUSE and loop devices, and run on every machine that has them. The ublk tests
//! need a kernel with ublk: without one, the test `ublk_in_a_guest` runs this same binary inside
//! `scripts/vm`. If no guest is available, it prints that and passes, or fails with `TURBOBD_GUEST=1`.

#![allow(clippy::unwrap_used)]

use crate::block;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::block::{
    MIB, Random, alone, content, loop_here, mounts, open, random_reads, read, soon, sys_block,
    threads, ublk_here,
};
use disk::DiskRange;
use disk::testing::{FaultyVolume, MemoryVolume};
use disk::volume::{Located, Piece, Volume, VolumeError, Waiter};
use turbobd_frontends::looped::LoopedDevice;
use turbobd_frontends::ublk::{UblkDevice, UblkOptions};

/// Answers every read in pieces of uneven length, each in memory of its own, with holes.
struct Scattered {
    bytes: Vec<u8>,
    piece: usize,
    /// Bytes `[a, b)` that are a hole.
    hole: std::ops::Range<usize>,
}

impl Volume for Scattered {
    fn size(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn locate(
        &self,
        range: DiskRange,
        _: &mut dyn FnMut() -> Waiter,
    ) -> Result<Located, VolumeError> {
        let (mut at, end) = (range.offset as usize, range.end() as usize);
        let mut pieces = Vec::new();
        while at < end {
            let in_hole = self.hole.contains(&at);
            let border = if in_hole {
                self.hole.end
            } else if at < self.hole.start {
                self.hole.start.min((at / self.piece + 1) * self.piece)
            } else {
                (at / self.piece + 1) * self.piece
            };
            let stop = border.min(end);
            pieces.push(if in_hole {
                Piece::Zero(stop - at)
            } else {
                let guard = Arc::new(self.bytes[at..stop].to_vec());
                Piece::Memory { guard, range: 0..stop - at }
            });
            at = stop;
        }
        Ok(Located::Ready(pieces))
    }
}

/// A device of either kind.
enum Device {
    Ublk(UblkDevice),
    Looped(LoopedDevice, tempfile::TempDir),
}

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Ublk,
    Looped,
}

impl Device {
    fn start(kind: Kind, volume: Arc<dyn Volume>) -> Self {
        match kind {
            Kind::Ublk => Self::Ublk(UblkDevice::start(volume, &UblkOptions::default()).unwrap()),
            Kind::Looped => {
                let dir = tempfile::tempdir().unwrap();
                let device = LoopedDevice::start(volume, &dir.path().join("mount")).unwrap();
                Self::Looped(device, dir)
            }
        }
    }

    fn path(&self) -> &Path {
        match self {
            Self::Ublk(device) => device.path(),
            Self::Looped(device, _) => device.path(),
        }
    }

    /// Stops it and checks that nothing remains.
    fn stop(self) {
        match self {
            Self::Ublk(device) => {
                let id = device.id();
                device.stop().unwrap();
                for left in [
                    format!("/dev/ublkb{id}"),
                    format!("/dev/ublkc{id}"),
                    format!("/sys/block/ublkb{id}"),
                ] {
                    let gone = soon(|| !Path::new(&left).exists());
                    assert!(gone, "{left} is left");
                }
                assert_eq!(threads("ublk"), Vec::<String>::new());
            }
            Self::Looped(device, dir) => {
                let (path, mount) = (device.path().to_owned(), dir.path().join("mount"));
                device.stop().unwrap();
                assert!(
                    !sys_block(&path).join("loop").exists(),
                    "{} is still attached",
                    path.display()
                );
                assert!(
                    !mounts().contains(mount.to_str().unwrap()),
                    "{} is still mounted",
                    mount.display()
                );
                assert!(!mount.exists());
                assert_eq!(threads("disk-answer"), Vec::<String>::new());
                assert_eq!(threads("fuser"), Vec::<String>::new());
            }
        }
    }
}

fn serves_every_byte(kind: Kind) {
    // Not a multiple of 4 KiB: the last page of the disk is short.
    let bytes = content(5 * MIB + 1536);
    let device = Device::start(kind, Arc::new(MemoryVolume::new(bytes.clone())));
    assert_eq!(std::fs::read(device.path()).unwrap(), bytes);
    random_reads(device.path(), &bytes, 60);
    if let Device::Ublk(device) = &device {
        let totals = device.counters();
        assert_eq!(totals.direct, totals.reads, "no read was copied in user space: {totals:?}");
        assert_eq!((totals.errors, totals.gathered, totals.lost_queues), (0, 0, 0));
    }
    let sysfs = sys_block(device.path());
    let attribute =
        |name: &str| std::fs::read_to_string(sysfs.join(name)).unwrap().trim().to_owned();
    assert_eq!(attribute("ro"), "1");
    assert_eq!(attribute("size"), (bytes.len() / 512).to_string());
    assert_eq!(attribute("queue/logical_block_size"), "512");
    assert_eq!(attribute("queue/read_ahead_kb"), "512");
    if kind != Kind::Looped {
        assert_eq!(attribute("queue/physical_block_size"), "4096");
        assert_eq!(attribute("queue/chunk_sectors"), "512");
        assert_eq!(attribute("queue/write_cache"), "write through");
    }
    device.stop();
}

fn gathers_pieces_and_holes(kind: Kind) {
    let mut bytes = content(3 * MIB);
    let hole = MIB + 300..2 * MIB + 77;
    bytes[hole.clone()].fill(0);
    let device =
        Device::start(kind, Arc::new(Scattered { bytes: bytes.clone(), piece: 5000, hole }));
    assert_eq!(std::fs::read(device.path()).unwrap(), bytes);
    random_reads(device.path(), &bytes, 40);
    match &device {
        Device::Ublk(device) => {
            let totals = device.counters();
            assert!(totals.gathered > 0 && totals.zero > 0, "{totals:?}");
            assert_eq!(totals.gathered + totals.zero + totals.direct, totals.reads);
        }
        Device::Looped(device, _) => assert!(device.counters().gathered > 0),
    }
    device.stop();
}

fn waits_without_blocking(kind: Kind) {
    let bytes = content(4 * MIB);
    let delay = Duration::from_millis(if kind == Kind::Looped { 100 } else { 150 });
    let volume = FaultyVolume::new(MemoryVolume::new(bytes.clone()), delay, None);
    let device = Device::start(kind, Arc::new(volume));
    let begun = Instant::now();
    std::thread::scope(|scope| {
        for reader in 0..16_usize {
            let (path, bytes) = (device.path(), &bytes);
            scope.spawn(move || {
                let offset = reader * 256 * 1024 + 4096;
                assert_eq!(
                    read(&open(path, true), offset as u64, 4096).unwrap(),
                    bytes[offset..][..4096]
                );
            });
        }
    });
    let took = begun.elapsed();
    assert!(took < delay * 8, "16 late reads took {took:?}: they waited for each other");
    assert_eq!(std::fs::read(device.path()).unwrap(), bytes);
    match &device {
        Device::Ublk(device) => assert!(device.counters().pending >= 16, "{:?}", device.counters()),
        Device::Looped(device, _) => {
            assert!(device.counters().pending >= 16, "{:?}", device.counters());
        }
    }
    device.stop();
}

fn fails_where_the_volume_fails_and_only_there(kind: Kind) {
    let bytes = content(2 * MIB);
    let bad = MIB + 4096 + 17;
    let volume =
        FaultyVolume::new(MemoryVolume::new(bytes.clone()), Duration::ZERO, Some(bad as u64));
    let device = Device::start(kind, Arc::new(volume));
    let file = open(device.path(), true);
    for _ in 0..3 {
        let sector = bad / 512 * 512;
        let error = read(&file, sector as u64, 512).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EIO));
        for good in [sector - 512, sector + 512, 0, 2 * MIB - 512] {
            assert_eq!(read(&file, good as u64, 512).unwrap(), bytes[good..][..512]);
        }
    }
    drop(file);
    device.stop();
}

fn refuses_writers(kind: Kind) {
    let bytes = content(MIB);
    let device = Device::start(kind, Arc::new(MemoryVolume::new(bytes.clone())));
    let written = OpenOptions::new()
        .write(true)
        .open(device.path())
        .and_then(|file| file.write_all_at(b"no", 0));
    let error = written.unwrap_err().raw_os_error();
    assert!([libc::EPERM, libc::EACCES, libc::EROFS].contains(&error.unwrap()), "{error:?}");
    assert_eq!(std::fs::read(device.path()).unwrap(), bytes);
    device.stop();
}

fn serves_two_devices_at_once(kind: Kind) {
    let (one, two) = (content(2 * MIB), content(2 * MIB).into_iter().rev().collect::<Vec<_>>());
    let first = Device::start(kind, Arc::new(MemoryVolume::new(one.clone())));
    let second = Device::start(kind, Arc::new(MemoryVolume::new(two.clone())));
    std::thread::scope(|scope| {
        scope.spawn(|| random_reads(first.path(), &one, 20));
        scope.spawn(|| random_reads(second.path(), &two, 20));
    });
    // The second still serves after the first is gone.
    match first {
        Device::Ublk(device) => device.stop().unwrap(),
        Device::Looped(device, _dir) => device.stop().unwrap(),
    }
    assert_eq!(std::fs::read(second.path()).unwrap(), two);
    second.stop();
}

/// Takes file descriptors away, so that the start fails at every step that needs one.
fn leaves_nothing_behind_when_the_start_fails(kind: Kind) {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let volume = Arc::new(MemoryVolume::new(content(MIB)));
    let dir = tempfile::tempdir().unwrap();
    let mount = dir.path().join("mount");
    let before = getrlimit(Resource::Nofile);
    // The host may have devices of other programs.
    let devices = || {
        let all = std::fs::read_dir("/sys/block").unwrap().flatten().map(|entry| entry.path());
        all.filter(|path| path.to_str().unwrap().contains("ublkb") || path.join("loop").exists())
            .collect::<std::collections::BTreeSet<_>>()
    };
    let others = devices();
    let mut failures = 0;
    for spare in 0..40 {
        let open = std::fs::read_dir("/proc/self/fd").unwrap().count() as u64 - 1;
        setrlimit(Resource::Nofile, Rlimit { current: Some(open + spare), ..before }).unwrap();
        let result = match kind {
            Kind::Ublk => UblkDevice::start(volume.clone(), &UblkOptions::default())
                .map(UblkDevice::stop)
                .is_ok(),
            Kind::Looped => {
                LoopedDevice::start(volume.clone(), &mount).map(LoopedDevice::stop).is_ok()
            }
        };
        setrlimit(Resource::Nofile, before).unwrap();
        failures += usize::from(!result);
        assert!(
            soon(|| std::fs::read_dir("/proc/self/fd").unwrap().count() as u64 - 1 == open),
            "descriptors leak"
        );
        assert_eq!(threads("ublk"), Vec::<String>::new());
        assert_eq!(threads("disk-answer"), Vec::<String>::new());
        assert!(!mounts().contains(mount.to_str().unwrap()) && !mount.exists());
        assert_eq!(devices(), others, "{spare} spare descriptors");
    }
    assert!((3..40).contains(&failures), "{failures} starts failed");
}

fn carries_an_ext4(kind: Kind) {
    let dir = tempfile::tempdir().unwrap();
    let (tree, image, target) =
        (dir.path().join("tree"), dir.path().join("image"), dir.path().join("mounted"));
    std::fs::create_dir_all(tree.join("a/b")).unwrap();
    std::fs::create_dir(&target).unwrap();
    std::fs::write(tree.join("a/b/big"), content(3 * MIB)).unwrap();
    File::create(&image).unwrap().set_len(16 * MIB as u64).unwrap();
    let made = Command::new("mkfs.ext4").args(["-q", "-F", "-d"]).arg(&tree).arg(&image).status();
    if !made.is_ok_and(|status| status.success()) {
        println!("SKIPPED: mkfs.ext4 cannot be run");
        return;
    }
    let device = Device::start(kind, Arc::new(MemoryVolume::new(std::fs::read(&image).unwrap())));
    let mount = |args: &[&str]| Command::new(args[0]).args(&args[1..]).status().unwrap().success();
    assert!(mount(&[
        "mount",
        "-t",
        "ext4",
        "-o",
        "ro,noload",
        device.path().to_str().unwrap(),
        target.to_str().unwrap()
    ]));
    assert!(std::fs::read(target.join("a/b/big")).unwrap() == content(3 * MIB));
    assert!(mount(&["umount", target.to_str().unwrap()]));
    device.stop();
}

macro_rules! device_tests {
    ($module:ident, $kind:expr, $here:expr) => {
        mod $module {
            use super::*;

            device_tests!(@one $kind, $here, serves_every_byte);
            device_tests!(@one $kind, $here, gathers_pieces_and_holes);
            device_tests!(@one $kind, $here, waits_without_blocking);
            device_tests!(@one $kind, $here, fails_where_the_volume_fails_and_only_there);
            device_tests!(@one $kind, $here, refuses_writers);
            device_tests!(@one $kind, $here, serves_two_devices_at_once);
            device_tests!(@one $kind, $here, leaves_nothing_behind_when_the_start_fails);
            device_tests!(@one $kind, $here, carries_an_ext4);
        }
    };
    (@one $kind:expr, $here:expr, $test:ident) => {
        #[test]
        fn $test() {
            let _alone = alone();
            if $here {
                super::$test($kind);
            } else {
                println!("SKIPPED: this host has no such devices (ublk runs in a guest instead)");
            }
        }
    };
}

device_tests!(looped, Kind::Looped, loop_here());
device_tests!(ublk, Kind::Ublk, ublk_here());

/// Tests for ublk only.
mod ublk_only {
    use super::*;

    #[test]
    fn a_write_that_reaches_the_server_is_refused_and_does_no_harm() {
        let _alone = alone();
        if !ublk_here() {
            return;
        }
        let bytes = content(MIB);
        let options = UblkOptions { read_only: false, ..UblkOptions::default() };
        let device =
            UblkDevice::start(Arc::new(MemoryVolume::new(bytes.clone())), &options).unwrap();
        // Leaves the address of this process's memory in every slot.
        assert_eq!(std::fs::read(device.path()).unwrap(), bytes);
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_DIRECT)
            .open(device.path())
            .unwrap();
        let junk = vec![0x55_u8; 12288];
        let start = junk.as_ptr().align_offset(4096);
        for round in 0..200 {
            let error = file.write_at(&junk[start..start + 4096], round % 16 * 4096).unwrap_err();
            assert!([libc::EIO, libc::EROFS].contains(&error.raw_os_error().unwrap()), "{error}");
        }
        assert!(file.sync_all().is_ok(), "nothing is dirty");
        assert_eq!(read(&file, 0, MIB).unwrap(), bytes);
        assert_eq!(device.counters().refused, 200);
        drop(file);
        device.stop().unwrap();
    }

    #[test]
    fn a_hot_read_costs_one_submission_one_completion_and_no_copy() {
        let _alone = alone();
        if !ublk_here() {
            return;
        }
        let bytes = content(4 * MIB);
        let volume = Arc::new(MemoryVolume::new(bytes.clone()));
        let device = UblkDevice::start(volume, &UblkOptions::default()).unwrap();
        let file = open(device.path(), true);
        read(&file, 0, 4096).unwrap();
        let before = device.counters();
        let mut random = Random(7);
        for _ in 0..500 {
            let at = random.below(1024) * 4096;
            assert!(read(&file, at, 4096).unwrap() == bytes[at as usize..at as usize + 4096]);
        }
        let after = device.counters();
        let reads = after.reads - before.reads;
        assert!(reads >= 500, "{after:?}");
        // The commit of one request arms the tag for the next: one of each, whatever other requests came.
        assert_eq!(after.submissions - before.submissions, reads);
        assert_eq!(after.completions - before.completions, reads);
        assert_eq!(after.direct - before.direct, reads);
        assert_eq!((after.gathered, after.pending), (0, 0));
        drop(file);
        device.stop().unwrap();
    }

    #[test]
    fn many_devices_share_few_threads_and_keep_their_bytes_apart() {
        let _alone = alone();
        if !ublk_here() {
            return;
        }
        const DEVICES: usize = 40;
        let all = content(DEVICES * 4096 + MIB);
        let start = |number: usize| {
            let bytes = all[number * 4096..][..MIB].to_vec();
            let volume =
                FaultyVolume::new(MemoryVolume::new(bytes.clone()), Duration::from_millis(2), None);
            (UblkDevice::start(Arc::new(volume), &UblkOptions::default()).unwrap(), bytes)
        };
        let devices: Vec<_> = (0..DEVICES).map(start).collect();
        let count = std::fs::read_dir("/proc/self/task")
            .unwrap()
            .filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("comm")).ok())
            .filter(|name| name.starts_with("ublk"))
            .count();
        assert!((1..=4).contains(&count), "{count} threads");
        std::thread::scope(|scope| {
            for part in devices.chunks(DEVICES / 4) {
                scope.spawn(move || {
                    for (device, bytes) in part {
                        random_reads(device.path(), bytes, 5);
                    }
                });
            }
        });
        // Every second one is removed; the others continue to serve, and new ones take the places.
        let mut rest = Vec::new();
        for (number, (device, bytes)) in devices.into_iter().enumerate() {
            if number % 2 == 0 {
                device.stop().unwrap();
            } else {
                rest.push((device, bytes));
            }
        }
        rest.extend((0..3).map(start));
        for (device, bytes) in &rest {
            random_reads(device.path(), bytes, 3);
        }
        for (device, _) in rest {
            device.stop().unwrap();
        }
        assert_eq!(threads("ublk"), Vec::<String>::new());
    }

    #[test]
    fn shapes_from_one_tag_to_many() {
        let _alone = alone();
        if !ublk_here() {
            return;
        }
        let bytes = content(2 * MIB);
        for (queues, depth, chunk) in
            [(1, 1, 4096), (1, 2, 65536), (2, 7, 1 << 20), (1, 256, 128 * 1024)]
        {
            let options = UblkOptions { queues, depth, chunk, ..UblkOptions::default() };
            let volume = MemoryVolume::new(bytes.clone());
            let volume = FaultyVolume::new(volume, Duration::from_millis(1), None);
            let device = UblkDevice::start(Arc::new(volume), &options).unwrap();
            assert_eq!(std::fs::read(device.path()).unwrap(), bytes);
            random_reads(device.path(), &bytes, 10);
            device.stop().unwrap();
        }
    }

    #[test]
    fn a_device_dropped_with_readers_waiting_answers_them() {
        let _alone = alone();
        if !ublk_here() {
            return;
        }
        let volume =
            FaultyVolume::new(MemoryVolume::new(content(MIB)), Duration::from_millis(400), None);
        let device = UblkDevice::start(Arc::new(volume), &UblkOptions::default()).unwrap();
        let path = device.path().to_owned();
        let file = open(&path, true);
        let reader = std::thread::spawn(move || read(&file, 512 * 1024, 4096).map(|_| ()));
        std::thread::sleep(Duration::from_millis(100));
        let begun = Instant::now();
        device.stop().unwrap();
        assert!(begun.elapsed() < Duration::from_secs(5));
        let _ = reader.join().unwrap(); // either answer, but an answer
    }

    #[test]
    fn the_driver_reports_features_with_names() {
        if !ublk_here() {
            return;
        }
        let findings = turbobd_frontends::ublk::probe::examine();
        assert!(findings.verdict().is_ok(), "{findings:?}");
        let names =
            turbobd_frontends::ublk::probe::feature_names(findings.features.unwrap_or_default());
        assert!(names.iter().any(|name| name == "need-get-data"), "{names:?}");
    }
}

/// Runs the ublk tests of this binary in a guest that has ublk.
#[test]
fn ublk_in_a_guest() {
    let _alone = alone();
    block::in_a_guest_with_ublk(module_path!(), &["ublk"], 14);
}
