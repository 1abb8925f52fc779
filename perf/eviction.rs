//! `cargo bench --bench eviction`: hit ratios of eviction policies on the recorded reads of real starts.
//!
//! A Python image is started and read through FUSE and a loop device (root), once in each way, and every read
//! that reaches the disk is recorded. A host's day is assembled from these recordings: each device of the
//! same image begins with an empty page cache, so the reads of one are repeated by the next.

#![allow(clippy::unwrap_used, reason = "a benchmark that cannot go on stops")]

#[path = "python.rs"]
mod python;

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::{Arc, Mutex};

use blobs::cache::Cache;
use disk::Disk;
use disk::image::{host_manifest, open_image};
use formats::lsmt::RunPlace;
use formats::units::{SECTOR, Sectors};
use python::{FRAMEWORK, SERVICE, Watched};
use registry::store;
use registry::{ClientOptions, RegistryClient};

/// A chunk: its layer and number. A touch has also its bytes in the cache.
type Key = (u8, u32);
type Touch = (Key, u64);

fn open() -> Disk {
    let client = RegistryClient::new(ClientOptions::default()).unwrap();
    let image = format!("oci:{}:turbo", python::layout().display());
    let (store, selector) = store::open(&image.parse().unwrap(), &client).unwrap();
    let (_, manifest) = host_manifest(&*store, &selector).unwrap();
    open_image(&*store, &*store, &manifest, Cache::new(256 << 20, 2)).unwrap().disk
}

/// The chunks that a command reads, in the order of its reads.
fn record(command: &[&str]) -> Vec<Touch> {
    let disk = Arc::new(Watched { disk: open(), reads: Mutex::default() });
    python::run(&disk, command);
    let reads = std::mem::take(&mut *disk.reads.lock().unwrap());
    let blobs = disk.disk.blobs();
    let mut touches = Vec::new();
    for (offset, len) in reads {
        let first = offset / SECTOR;
        let count = (offset + u64::from(len)).div_ceil(SECTOR) - first;
        for run in disk.disk.stack().look_up(Sectors(first), Sectors(count)) {
            let RunPlace::Remote(sector) = run.place else { continue };
            let source = blobs[usize::from(run.layer)].as_ref().unwrap().source();
            let (mut at, end) = (sector.bytes().0, (sector + run.len).bytes().0);
            while at < end
                && let Some(span) = source.chunk_at(at)
            {
                touches.push(((run.layer, span.index), source.room(span.index) as u64));
                at = span.start + u64::from(span.len);
            }
        }
    }
    touches
}

/// An eviction policy.
trait Policy {
    /// Touches a chunk; returns true if it was in the cache. Afterwards it is.
    fn touch(&mut self, touch: Touch) -> bool;
}

/// Least recently used.
struct Lru {
    budget: u64,
    held: u64,
    turn: u64,
    order: std::collections::BTreeMap<u64, Touch>,
    at: HashMap<Key, u64>,
}

impl Policy for Lru {
    fn touch(&mut self, (key, bytes): Touch) -> bool {
        self.turn += 1;
        let hit = match self.at.insert(key, self.turn) {
            Some(turn) => self.order.remove(&turn).is_some(),
            None => {
                self.held += bytes;
                false
            }
        };
        self.order.insert(self.turn, (key, bytes));
        while self.held > self.budget {
            let (_, (key, bytes)) = self.order.pop_first().unwrap();
            self.at.remove(&key);
            self.held -= bytes;
        }
        hit
    }
}

/// A ring and one bit a chunk.
struct Clock {
    budget: u64,
    held: u64,
    ring: VecDeque<Touch>,
    used: HashMap<Key, bool>,
}

impl Policy for Clock {
    fn touch(&mut self, (key, bytes): Touch) -> bool {
        if let Some(used) = self.used.get_mut(&key) {
            *used = true;
            return true;
        }
        while self.held + bytes > self.budget {
            let (key, bytes) = self.ring.pop_front().unwrap();
            if std::mem::take(self.used.get_mut(&key).unwrap()) {
                self.ring.push_back((key, bytes));
            } else {
                self.used.remove(&key);
                self.held -= bytes;
            }
        }
        self.held += bytes;
        self.used.insert(key, false);
        self.ring.push_back((key, bytes));
        false
    }
}

#[derive(Clone, Copy)]
struct Entry {
    bytes: u64,
    used: u8,
    main: bool,
    /// Number of earlier chunks at its arrival.
    came: u64,
}

/// S3-FIFO: new chunks in a small queue, those used there in the main queue; `aged`: a use counts only after
/// the end of the burst of reads that loaded the chunk.
struct S3Fifo {
    budget: u64,
    share: u64,
    aged: bool,
    small: VecDeque<Key>,
    main: VecDeque<Key>,
    small_bytes: u64,
    held: u64,
    came: u64,
    entries: HashMap<Key, Entry>,
    ghosts: HashSet<Key>,
    ghost_order: VecDeque<Key>,
}

impl S3Fifo {
    fn new(budget: u64, share: u64, aged: bool) -> Self {
        Self {
            budget,
            share,
            aged,
            small: VecDeque::new(),
            main: VecDeque::new(),
            small_bytes: 0,
            held: 0,
            came: 0,
            entries: HashMap::new(),
            ghosts: HashSet::new(),
            ghost_order: VecDeque::new(),
        }
    }

    fn evict(&mut self) {
        loop {
            let from_small = self.small_bytes > self.budget / self.share || self.main.is_empty();
            let queue = if from_small { &mut self.small } else { &mut self.main };
            let key = queue.pop_front().unwrap();
            let entry = self.entries.get_mut(&key).unwrap();
            if entry.used > 0 {
                entry.used = if from_small { 0 } else { entry.used - 1 };
                if from_small {
                    entry.main = true;
                    self.small_bytes -= entry.bytes;
                }
                self.main.push_back(key);
                continue;
            }
            let entry = self.entries.remove(&key).unwrap();
            self.held -= entry.bytes;
            if !entry.main {
                self.small_bytes -= entry.bytes;
                self.ghosts.insert(key);
                self.ghost_order.push_back(key);
                // As many keys as chunks are held.
                while self.ghost_order.len() > self.entries.len() {
                    let old = self.ghost_order.pop_front().unwrap();
                    self.ghosts.remove(&old);
                }
            }
            return;
        }
    }
}

impl Policy for S3Fifo {
    fn touch(&mut self, (key, bytes): Touch) -> bool {
        let young = self.small.len() as u64 / 2;
        if let Some(entry) = self.entries.get_mut(&key) {
            if !self.aged || entry.main || self.came - entry.came > young {
                entry.used = (entry.used + 1).min(3);
            }
            return true;
        }
        while self.held + bytes > self.budget {
            self.evict();
        }
        self.came += 1;
        let main = self.ghosts.remove(&key);
        self.held += bytes;
        self.entries.insert(key, Entry { bytes, used: 0, main, came: self.came });
        if main {
            self.main.push_back(key);
        } else {
            self.small.push_back(key);
            self.small_bytes += bytes;
        }
        false
    }
}

/// Misses, as a share of the distinct touches: repetitions within a burst count once.
fn misses(policy: &mut dyn Policy, touches: &[Touch]) -> f64 {
    let mut last = None;
    let (mut all, mut missed) = (0_u64, 0_u64);
    for &(key, bytes) in touches {
        let hit = policy.touch((key, bytes));
        if !hit {
            missed += bytes;
        }
        if last != Some(key) {
            all += bytes;
        }
        last = Some(key);
    }
    missed as f64 / all as f64
}

/// The reads of two devices at once, in turns of a few each.
fn beside(one: &[Touch], other: &[Touch]) -> Vec<Touch> {
    let (mut one, mut other) = (one.chunks(8), other.chunks(8));
    let mut both = Vec::new();
    loop {
        let (a, b) = (one.next(), other.next());
        if a.is_none() && b.is_none() {
            return both;
        }
        both.extend_from_slice(a.unwrap_or_default());
        both.extend_from_slice(b.unwrap_or_default());
    }
}

fn main() {
    let framework = record(&["/usr/bin/python3.11", "-W", "ignore", "-c", FRAMEWORK]);
    let service = record(&["/usr/bin/python3.11", "-c", SERVICE]);
    let scan = record(&["/usr/bin/find", "/usr", "-xdev", "-type", "f", "-exec", "cat", "{}", "+"]);
    let distinct = |touches: &[Touch]| touches.iter().copied().collect::<HashSet<_>>();
    let bytes = |set: HashSet<Touch>| set.iter().map(|touch| touch.1).sum::<u64>() as f64 / 1e6;
    println!(
        "recorded: framework {} reads of {:.0} MB, service {} of {:.0} MB, scan {} of {:.0} MB",
        framework.len(),
        bytes(distinct(&framework)),
        service.len(),
        bytes(distinct(&service)),
        scan.len(),
        bytes(distinct(&scan))
    );
    let repeat = |touches: &[Touch], times: usize| touches.repeat(times);
    let days: [(&str, Vec<Touch>); 5] = [
        ("service x 8", repeat(&service, 8)),
        ("framework x 4", repeat(&framework, 4)),
        ("service x 8 beside a scan", beside(&repeat(&service, 8), &scan)),
        ("framework, scan, framework", [&framework[..], &scan, &framework].concat()),
        (
            "all in turns",
            [&service[..], &framework, &service, &scan, &service, &framework, &scan, &service]
                .concat(),
        ),
    ];
    println!("misses, bytes fetched of bytes touched; budgets in MiB");
    print!("{:<28}{:>8}", "", "budget");
    for name in ["LRU", "CLOCK", "S3-FIFO", "aged 10 %", "aged 25 %"] {
        print!("{name:>12}");
    }
    println!();
    for (name, touches) in &days {
        for budget in [32_u64, 64, 128, 256] {
            let bytes = budget << 20;
            let lru = Lru {
                budget: bytes,
                held: 0,
                turn: 0,
                order: std::collections::BTreeMap::new(),
                at: HashMap::new(),
            };
            let clock =
                Clock { budget: bytes, held: 0, ring: VecDeque::new(), used: HashMap::new() };
            let mut policies: [Box<dyn Policy>; 5] = [
                Box::new(lru),
                Box::new(clock),
                Box::new(S3Fifo::new(bytes, 10, false)),
                Box::new(S3Fifo::new(bytes, 10, true)),
                Box::new(S3Fifo::new(bytes, 4, true)),
            ];
            print!("{name:<28}{budget:>8}");
            for policy in &mut policies {
                print!("{:>12.3}", misses(&mut **policy, touches));
            }
            println!();
        }
    }
}
