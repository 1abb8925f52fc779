//! `perf/ublk`: the cost of a read through ublk, against a null target of the same library; a thousand
//! devices.
//!
//! It runs on a machine with ublk; `perf/ublk` brings it into a guest.

#![allow(clippy::unwrap_used, reason = "a benchmark that cannot go on stops")]
#![allow(unsafe_code)] // the reader's ring, see `random_reads`

use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use blobs::cache::Cache;
use disk::testing::MemoryVolume;
use disk::volume::Volume;
use disk::{Disk, DiskLayer, LayerData};
use formats::lsmt::{LsmtLayer, TagMeaning, WarpWriter};
use formats::units::{Bytes, Sectors};
use io_uring::{IoUring, opcode, types};
use libublk::ctrl::{UblkCtrl, UblkCtrlBuilder};
use libublk::io::{BufDescList, UblkDev, UblkIOCtx, UblkQueue};
use libublk::{BufDesc, UblkFlags, UblkIORes};
use source::chunk::{ChunkSource, PlainChunks};
use source::{MemorySource, SharedBytes};
use turbobd_frontends::ServedDevice;
use turbobd_frontends::ublk::{UblkDevice, UblkOptions};

const MIB: u64 = 1 << 20;
/// Bytes of the range that is read, on every contestant: all of them fit into the cache.
const RANGE: u64 = 32 * MIB;
const WINDOW: Duration = Duration::from_millis(1000);
const ROUNDS: usize = 3;

/// libublk's null target: answers every request at once, from a buffer of the tag's own.
struct Null {
    path: PathBuf,
    stop: Sender<()>,
    thread: JoinHandle<()>,
}

impl Null {
    fn start() -> Self {
        let (tell, told) = channel();
        let (stop, stopped) = channel();
        let thread = std::thread::spawn(move || null(&tell, stopped));
        let id: u32 = told.recv().unwrap();
        let path = PathBuf::from(format!("/dev/ublkb{id}"));
        while !path.exists() {
            std::thread::sleep(Duration::from_millis(1));
        }
        Self { path, stop, thread }
    }

    fn stop(self) {
        drop(self.stop);
        self.thread.join().unwrap();
    }
}

fn null(tell: &Sender<u32>, stopped: Receiver<()>) {
    let ctrl = UblkCtrlBuilder::default()
        .name("null")
        .nr_queues(1)
        .depth(64)
        .io_buf_bytes(256 << 10)
        .dev_flags(UblkFlags::UBLK_DEV_F_ADD_DEV)
        .build()
        .unwrap();
    let init = |dev: &mut UblkDev| {
        dev.set_default_params(1 << 30);
        Ok(())
    };
    let queue = |qid: u16, dev: &UblkDev| {
        let bufs = dev.alloc_queue_io_bufs();
        let handler = |q: &UblkQueue, tag: u16, _: &UblkIOCtx| {
            let bytes = (q.get_iod(tag).nr_sectors << 9) as i32;
            let from = BufDesc::Slice(bufs[usize::from(tag)].as_slice());
            q.complete_io_cmd_unified(tag, from, Ok(UblkIORes::Result(bytes))).unwrap();
        };
        let queue = UblkQueue::new(qid, dev).unwrap();
        let queue = queue.submit_fetch_commands_unified(BufDescList::Slices(Some(&bufs))).unwrap();
        queue.wait_and_handle_io(handler);
    };
    let (tell, stopped) = (tell.clone(), Arc::new(Mutex::new(stopped)));
    let live = move |ctrl: &UblkCtrl| {
        let (id, stopped) = (ctrl.dev_info().dev_id, stopped.clone());
        // Another control object: this one's ring belongs to this thread.
        std::thread::spawn(move || {
            let _ = stopped.lock().unwrap().recv();
            UblkCtrl::new_simple(id as i32).unwrap().kill_dev().unwrap();
        });
        tell.send(id).unwrap();
    };
    ctrl.run_target(init, queue, live).unwrap();
}

/// Direct random 4 KiB reads a second of one reader, with `depth` requests in flight.
fn random_reads(path: &Path, depth: u32) -> f64 {
    let file = OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(path).unwrap();
    let mut ring = IoUring::new(depth.next_power_of_two()).unwrap();
    let layout = std::alloc::Layout::from_size_align(depth as usize * 4096, 4096).unwrap();
    // SAFETY: the size is not 0.
    let buffers = unsafe { std::alloc::alloc_zeroed(layout) };
    let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
    let mut place = move || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed % (RANGE / 4096) * 4096
    };
    let mut push = |ring: &mut IoUring, slot: u64| {
        // SAFETY: the slot is below the depth, so the address is in the buffers.
        let buffer = unsafe { buffers.add(slot as usize * 4096) };
        let entry = opcode::Read::new(types::Fd(file.as_raw_fd()), buffer, 4096);
        let entry = entry.offset(place()).build().user_data(slot);
        // SAFETY: the buffers live until all reads are done, below.
        unsafe { ring.submission().push(&entry) }.unwrap();
    };
    (0..u64::from(depth)).for_each(|slot| push(&mut ring, slot));
    let start = Instant::now();
    let (mut done, mut left) = (0_u64, u64::from(depth));
    while left > 0 {
        ring.submit_and_wait(1).unwrap();
        let slots: Vec<u64> = ring
            .completion()
            .map(|done| {
                assert_eq!(done.result(), 4096);
                done.user_data()
            })
            .collect();
        for slot in slots {
            done += 1;
            if start.elapsed() < WINDOW {
                push(&mut ring, slot);
            } else {
                left -= 1;
            }
        }
    }
    let rate = done as f64 / start.elapsed().as_secs_f64();
    // SAFETY: allocated above with the same layout; no read is in flight.
    unsafe { std::alloc::dealloc(buffers, layout) };
    rate
}

/// A disk like that of an image: one layer, file data in chunks, mappings of 64 KiB.
fn disk() -> Disk {
    let tar = vec![7_u8; RANGE as usize];
    let mut writer = WarpWriter::new(Bytes(2 * RANGE)).unwrap();
    writer.metadata(Sectors(0), &[1; 4096]).unwrap();
    for (number, at) in (0..RANGE / 512).step_by(128).enumerate() {
        // Every other piece belongs to a later file of the tar, so that mappings do not join.
        let target = if number % 2 == 0 { at } else { (at + RANGE / 1024) % (RANGE / 512) };
        writer.remote(Sectors(at + 8), Sectors(120), Sectors(target)).unwrap();
    }
    let mut meta = Vec::new();
    writer.finish(&mut meta).unwrap();
    let meta: SharedBytes = Arc::new(meta);
    let index =
        LsmtLayer::open(&MemorySource::shared("m", meta.clone()), TagMeaning::Warp).unwrap();
    let target: Arc<dyn ChunkSource> =
        Arc::new(PlainChunks::new("t", Arc::new(MemorySource::new("t", tar))));
    let data = LayerData::Turbo { meta, target: Some(target) };
    Disk::new(vec![DiskLayer { index, data }], Cache::new(2 * RANGE, 2)).unwrap()
}

fn median(mut rates: Vec<f64>) -> f64 {
    rates.sort_by(f64::total_cmp);
    rates[rates.len() / 2]
}

fn reads() {
    let memory = || Arc::new(MemoryVolume::new(vec![5; RANGE as usize]));
    let options = UblkOptions { queues: 1, ..UblkOptions::default() };
    let disk = Arc::new(disk());
    let mut page = vec![0; 1 << 20];
    for at in (0..RANGE).step_by(1 << 20) {
        disk.read_at(&mut page, at).unwrap();
    }
    let contestants: [(&str, Option<Arc<dyn Volume>>); 3] = [
        ("null target of libublk", None),
        ("memory", Some(memory())),
        ("disk in the cache", Some(disk)),
    ];
    for depth in [1, 64] {
        let mut rates: Vec<Vec<f64>> = vec![Vec::new(); contestants.len()];
        for _ in 0..ROUNDS {
            for (rates, (_, contestant)) in rates.iter_mut().zip(&contestants) {
                rates.push(match contestant {
                    None => {
                        let null = Null::start();
                        let rate = random_reads(&null.path, depth);
                        null.stop();
                        rate
                    }
                    Some(volume) => {
                        let device = UblkDevice::start(volume.clone(), &options).unwrap();
                        let rate = random_reads(device.path(), depth);
                        let counters = device.counters();
                        assert!(
                            counters.gathered + counters.pending + counters.errors
                                < counters.reads / 100,
                            "{counters:?}"
                        );
                        device.stop().unwrap();
                        rate
                    }
                });
            }
        }
        let null = median(rates[0].clone());
        println!(
            "4 KiB random reads, direct, queue depth {depth}, one queue; {ROUNDS} rounds in turns"
        );
        for ((name, _), rates) in contestants.iter().zip(&rates) {
            let spread: Vec<String> = rates.iter().map(|rate| format!("{rate:.0}")).collect();
            let mid = median(rates.clone());
            println!(
                "  {name:<34} {mid:>8.0} a second, {:.2} of null   ({})",
                mid / null,
                spread.join(" ")
            );
        }
    }
}

fn status(key: &str) -> u64 {
    let text = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = text.lines().find(|line| line.starts_with(key)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

fn many(count: usize) {
    let _ = sys::limits::raise_descriptor_limit();
    let bytes =
        Arc::new(MemoryVolume::new((0..MIB as usize).map(|at| (at / 4096) as u8).collect()));
    let (rss, begun) = (status("VmRSS"), Instant::now());
    let devices: Vec<UblkDevice> =
        (0..count).map(|_| UblkDevice::start(bytes.clone(), &shape()).unwrap()).collect();
    println!(
        "{count} devices attached in {:.1} s: {} threads in all, {:.1} KiB of memory of ours a device",
        begun.elapsed().as_secs_f64(),
        status("Threads"),
        status("VmRSS").saturating_sub(rss) as f64 / count as f64
    );
    let mut page = [0; 4096];
    for (number, device) in devices.iter().enumerate() {
        let at = (number % 256) as u64 * 4096;
        std::os::unix::fs::FileExt::read_exact_at(
            &File::open(device.path()).unwrap(),
            &mut page,
            at,
        )
        .unwrap();
        assert!(page.iter().all(|&byte| byte == (number % 256) as u8));
    }
    println!(
        "all live: each answered a read with its bytes, after {:.1} s",
        begun.elapsed().as_secs_f64()
    );
    let begun = Instant::now();
    let devices = devices.into_iter().map(|device| Box::new(device) as Box<dyn ServedDevice>);
    let failures = turbobd_frontends::stop_all(devices.collect());
    assert!(failures.is_empty(), "{failures:?}");
    println!("all detached in {:.1} s (bar: 60 s)", begun.elapsed().as_secs_f64());
    let left = std::fs::read_dir("/sys/block").unwrap().flatten();
    let left =
        left.filter(|entry| entry.file_name().to_string_lossy().starts_with("ublkb")).count();
    println!("{left} devices left, {} threads", status("Threads"));
}

fn main() {
    if !Path::new("/dev/ublk-control").exists() {
        println!("this kernel has no ublk: run perf/ublk, which brings it into a guest");
        return;
    }
    match std::env::args().nth(1).as_deref() {
        Some("many") => many(std::env::args().nth(2).and_then(|n| n.parse().ok()).unwrap_or(1000)),
        _ => reads(),
    }
}

/// The default options, or QUEUES and DEPTH of the environment.
fn shape() -> UblkOptions {
    let mut options = UblkOptions::default();
    let number = |name| std::env::var(name).ok().and_then(|text: String| text.parse().ok());
    options.queues = number("QUEUES").unwrap_or(options.queues);
    options.depth = number("DEPTH").unwrap_or(options.depth);
    options
}
