//! Faults of a registry while a disk is read: no wrong byte, no reader that waits because of another's fault,
//! a number and a reason for each.

use crate::image;
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::image::{Images, OCI_GZIP, chunks, gzip, prose, tar_of};
use crate::registry_double::{Double, Fault};
use crate::serve::serve;
use blobs::cache::Cache;
use disk::explain::{BytesPlace, What};
use disk::image::{host_manifest, open_image};
use disk::volume::{Volume as _, VolumeError};
use disk::{Disk, DiskRange};
use host::daemon::{DiskView, ImageView};
use registry::store::{self, ImageStore};
use registry::{ClientOptions, RegistryClient, RetryPolicy, Timeouts};
use source::chunk::ChunkError;

const MIB: usize = 1 << 20;

/// An image of one layer with segments of 256 KiB, in a registry.
struct Served {
    images: Images,
    registry: Double,
    target: String,
}

impl Served {
    fn new() -> Self {
        let images = Images::new();
        let layer = gzip(&tar_of(&[("a", &prose(1, 2 * MIB)), ("b", &prose(2, 2 * MIB))]));
        images.add("latest", &[(OCI_GZIP, layer)]);
        images.convert(&["--span", "256"]);
        let registry = Double::start();
        serve(&images, &registry, "team/app");
        let target = images.layer("latest", 0);
        Self { images, registry, target }
    }

    /// Opens it through `host`, with a cache of its own.
    fn open(&self, host: &str, deadline: Duration) -> Arc<Disk> {
        let pause = Duration::from_millis(50);
        let read_retry =
            RetryPolicy { max_tries: u32::MAX, deadline, first_pause: pause, max_pause: pause };
        let timeouts =
            Timeouts { connect: pause * 20, head: Duration::from_secs(1), idle: pause * 20 };
        let options = ClientOptions { read_retry, timeouts, ..ClientOptions::default() };
        let client = RegistryClient::new(options).unwrap();
        let name = format!("{host}/team/app:turbo").parse().unwrap();
        let (store, selector) = store::open(&name, &client).unwrap();
        let (_, manifest) = host_manifest(&*store, &selector).unwrap();
        let targets: Arc<dyn ImageStore> = store.clone();
        let cache = Cache::new(64 << 20, 2);
        let opened = open_image(&*store, &*targets, &manifest, cache).unwrap();
        Arc::new(opened.disk)
    }

    /// The same disk from local files: the expected bytes of every read.
    fn truth(&self) -> Vec<u8> {
        let raw = self.images.path().join("raw");
        image::done(&["export", &self.images.name("turbo"), "-o", raw.to_str().unwrap()]);
        std::fs::read(raw).unwrap()
    }
}

fn sector(disk: &Disk, offset: u64) -> Result<[u8; 512], VolumeError> {
    let mut bytes = [0; 512];
    disk.read_at(&mut bytes, offset).map(|()| bytes)
}

#[track_caller]
fn is_right(truth: &[u8], offset: u64, read: &[u8; 512]) {
    assert!(read[..] == truth[offset as usize..][..512], "wrong bytes at {offset}");
}

#[test]
fn a_wrong_byte_is_fetched_again_and_counted_and_three_times_wrong_is_an_error_with_a_reason() {
    let served = Served::new();
    let truth = served.truth();
    let disk = served.open(&served.registry.host(), Duration::from_secs(20));
    let view = DiskView::new(disk.clone());
    let chunks = chunks(&disk);
    let counters = disk.cache().fetched().clone();
    let count = || (counters.damaged.get(), counters.failed.get());
    // Far from each other, so that neither is read ahead for the other.
    let ((first, index, place), (last, broken, place_of_last)) =
        (chunks[0], chunks[chunks.len() - 1]);

    served.registry.fault(&served.target, Fault::Flip(place + 100, 8), 1);
    is_right(&truth, first, &sector(&disk, first).unwrap());
    assert_eq!(count(), (1, 0));
    let failures = view.blobs().remove(0).failures;
    assert_eq!((failures.len(), failures[0].chunk, failures[0].again), (1, index, true));
    assert!(failures[0].reason.contains("SHA-256"), "{failures:?}");

    served.registry.fault(&served.target, Fault::Flip(place_of_last + 100, 8), 3);
    let error = sector(&disk, last).unwrap_err();
    let VolumeError::Chunk { source, .. } = &error else { panic!("{error}") };
    assert!(matches!(&**source, ChunkError::Damaged { chunk, .. } if *chunk == broken), "{source}");
    assert!(!error.may_pass(), "a reader with the policy to wait would wait for ever");
    assert_eq!(count(), (4, 1));
    let failures = view.blobs().remove(0).failures;
    let again: Vec<_> = failures.iter().map(|failure| failure.again).collect();
    assert_eq!(again, [true, true, true, false], "{failures:?}");
    // The fourth is right: none of the bad ones was kept.
    is_right(&truth, last, &sector(&disk, last).unwrap());
}

#[test]
fn a_registry_that_stalls_in_a_body_holds_up_nobody_else() {
    let served = Served::new();
    let truth = served.truth();
    let disk = served.open(&served.registry.host(), Duration::from_secs(20));
    let chunks = chunks(&disk);
    let ((stuck, _, _), (other, _, _)) = (chunks[0], chunks[chunks.len() - 1]);
    served.registry.fault(&served.target, Fault::StallAfter(1000), 1);
    let begun = Instant::now();
    let (ended, reader) = (Arc::new(Mutex::new(None)), disk.clone());
    let stuck_reader = std::thread::spawn({
        let ended = ended.clone();
        move || {
            let read = sector(&reader, stuck);
            *ended.lock().unwrap() = Some(begun.elapsed());
            read
        }
    });
    while served.registry.traffic(&served.target.parse().unwrap()).0 == 0 {
        assert!(begun.elapsed() < Duration::from_secs(10), "nothing was asked");
        std::thread::sleep(Duration::from_millis(1));
    }
    is_right(&truth, other, &sector(&disk, other).unwrap());
    assert_eq!(*ended.lock().unwrap(), None, "the other was served after the stuck one");
    // It is requested again when the body has been silent for a second: by a second request beside it, or
    // after it.
    is_right(&truth, stuck, &stuck_reader.join().unwrap().unwrap());
    let counters = DiskView::new(disk.clone()).blobs().remove(0);
    assert!(counters.requests >= 3, "{counters:?}");
    assert_eq!(counters.trying_again, []);
}

/// A connection to a server that can be cut and restored.
struct Line {
    address: SocketAddr,
    cut: Arc<AtomicBool>,
    streams: Arc<Mutex<Vec<TcpStream>>>,
    thread: Option<JoinHandle<()>>,
}

impl Line {
    /// At `address`, port 0 for any.
    fn open(address: SocketAddr, to: &str) -> Self {
        let listener = TcpListener::bind(address).unwrap();
        let address = listener.local_addr().unwrap();
        let cut = Arc::new(AtomicBool::new(false));
        let streams = Arc::<Mutex<Vec<TcpStream>>>::default();
        let (to, own, ended) = (to.to_owned(), streams.clone(), cut.clone());
        let body = move || {
            for here in listener.incoming() {
                if ended.load(Ordering::SeqCst) {
                    return;
                }
                let (Ok(here), Ok(there)) = (here, TcpStream::connect(&to)) else { continue };
                for (from, into) in [(&here, &there), (&there, &here)] {
                    let (mut from, mut into) =
                        (from.try_clone().unwrap(), into.try_clone().unwrap());
                    std::thread::spawn(move || copy(&mut from, &mut into));
                }
                own.lock().unwrap().extend([here, there]);
            }
        };
        Self { address, cut, streams, thread: Some(std::thread::spawn(body)) }
    }

    /// Connections break, and new ones are refused.
    fn cut(mut self) -> SocketAddr {
        self.cut.store(true, Ordering::SeqCst);
        let _ = TcpStream::connect(self.address);
        self.thread.take().unwrap().join().unwrap();
        for stream in self.streams.lock().unwrap().drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
        self.address
    }
}

fn copy(from: &mut TcpStream, into: &mut TcpStream) {
    let mut buffer = [0; 4096];
    while let Ok(len @ 1..) = from.read(&mut buffer) {
        if into.write_all(&buffer[..len]).is_err() {
            break;
        }
    }
    let _ = into.shutdown(Shutdown::Both);
}

fn any_port() -> SocketAddr {
    ([127, 0, 0, 1], 0).into()
}

#[test]
fn a_registry_that_dies_and_comes_back_is_waited_for_and_meanwhile_it_is_said_why() {
    let served = Served::new();
    let truth = served.truth();
    let line = Line::open(any_port(), &served.registry.host());
    let disk = served.open(&line.address.to_string(), Duration::from_secs(30));
    let view = DiskView::new(disk.clone());
    let offset = chunks(&disk)[3].0;
    assert_eq!(
        disk.explain(DiskRange::new(offset, 1), 9)[0].chunk.as_ref().unwrap().held,
        BytesPlace::Remote
    );
    let address = line.cut();
    let reader = std::thread::spawn({
        let disk = disk.clone();
        move || sector(&disk, offset)
    });
    let begun = Instant::now();
    let retry = loop {
        if let Some(retry) =
            view.blobs().remove(0).trying_again.pop().filter(|retry| retry.tries > 2)
        {
            break retry;
        }
        assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", view.blobs());
        std::thread::sleep(Duration::from_millis(5));
    };
    assert!(retry.error.contains("refused"), "{retry:?}");
    assert!(retry.next_ms <= 50 && retry.start_bytes < retry.end_bytes, "{retry:?}");
    assert_eq!(view.trouble().as_deref(), Some(retry.error.as_str()));
    assert!(!reader.is_finished());
    let _line = Line::open(address, &served.registry.host());
    is_right(&truth, offset, &reader.join().unwrap().unwrap());
    let counters = view.counters();
    assert!(counters.retries > 2 && counters.errors == 0 && counters.fetched > 0, "{counters:?}");
    assert!(counters.cached > 0, "{counters:?}");
    assert_eq!(view.trouble(), None);
    assert_eq!(
        disk.explain(DiskRange::new(offset, 1), 9)[0].chunk.as_ref().unwrap().held,
        BytesPlace::Memory
    );
}

#[test]
fn a_registry_that_stays_away_is_an_error_that_may_pass_when_the_deadline_has() {
    let served = Served::new();
    let line = Line::open(any_port(), &served.registry.host());
    let disk = served.open(&line.address.to_string(), Duration::from_millis(400));
    let offset = chunks(&disk)[0].0;
    let address = line.cut();
    let begun = Instant::now();
    let error = sector(&disk, offset).unwrap_err();
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    assert!(error.may_pass(), "{error}");
    let failures = DiskView::new(disk.clone()).blobs().remove(0).failures;
    assert!(failures.last().unwrap().reason.contains("gave up after"), "{failures:?}");
    let _line = Line::open(address, &served.registry.host());
    is_right(&served.truth(), offset, &sector(&disk, offset).unwrap());
    // A missing blob stays missing.
    served.registry.fault(&served.target, Fault::Status(404), 1);
    let last = chunks(&disk).pop().unwrap().0;
    let error = sector(&disk, last).unwrap_err();
    assert!(!error.may_pass(), "{error}");
}

#[test]
fn the_places_of_a_disk_are_told_without_a_gap_and_as_they_are_read() {
    let served = Served::new();
    let disk = served.open(&served.registry.host(), Duration::from_secs(20));
    let places = disk.explain(DiskRange::new(0, disk.size()), usize::MAX);
    let mut at = 0;
    for place in &places {
        assert_eq!(place.range.offset, at);
        at += place.range.len;
        assert_eq!(place.chunk.is_some(), place.what == What::Data, "{place:?}");
    }
    assert_eq!(at, disk.size());
    let tar = image::gunzip(&served.images.blob(&served.target));
    let data = places.iter().filter(|place| place.what == What::Data);
    for place in data.step_by(3) {
        let chunk = place.chunk.as_ref().unwrap();
        assert!(chunk.blob.starts_with(&served.target), "{place:?}");
        let read = sector(&disk, place.range.offset).unwrap();
        let len = place.range.len.min(512) as usize;
        assert!(read[..len] == tar[chunk.at as usize..][..len], "{place:?} is not at {}", chunk.at);
    }
    let view = DiskView::new(disk.clone());
    let target = served.target.parse().unwrap();
    served.registry.until_counted(&target, || view.blobs().remove(0).fetched_bytes);
}
