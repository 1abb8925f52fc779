//! `cargo bench --bench data_path`: the rates of each step from compressed bytes to a reader, and their
//! limits.

#![allow(clippy::unwrap_used, reason = "a benchmark that cannot go on stops")]

#[path = "layer.rs"]
mod layer;
#[path = "line.rs"]
mod line;

use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use blobs::cache::Cache;
use disk::Disk;
use disk::image::{host_manifest, open_image};
use disk::scan::{self, scan, steps};
use disk::volume::{Volume, VolumeError};
use formats::gzip::{self, GZIP_META_NAME, IndexedLayer, SIDECAR_NAME};
use formats::lsmt::RunPlace;
use formats::tar;
use layer::{gzip_dc, median};
use line::Line;
use registry::store::{self, ImageStore as _, LayoutStore, Selector};
use registry::{ClientOptions, RegistryClient};
use source::chunk::{ChunkSource, EncodedChunk};

const ROUNDS: usize = 5;
/// Round trip to a near registry.
const DELAY: Duration = Duration::from_millis(20);
const GIGABIT: f64 = 1e9 / 8.0;

fn seconds(work: impl FnOnce()) -> f64 {
    let start = Instant::now();
    work();
    start.elapsed().as_secs_f64()
}

/// A layout with the layer and its meta image, created once.
fn layout(layer: &Path) -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let dir = root.join("target/perf/data_path");
    if !dir.join("made").exists() {
        let _ = std::fs::remove_dir_all(&dir);
        let run = |command: &mut Command| {
            assert!(command.stdout(std::process::Stdio::null()).status().unwrap().success());
        };
        run(Command::new(root.join("scripts/oci-layout")).arg(&dir).arg("latest").arg(layer));
        let place = format!("oci:{}", dir.display());
        run(Command::new(env!("CARGO_BIN_EXE_turbobd")).args([
            "convert",
            "-r",
            &place,
            "-i",
            "latest",
            "--turboOCI",
            "turbo",
        ]));
        std::fs::write(dir.join("made"), "").unwrap();
    }
    dir
}

fn open(image: &str, cache: Arc<Cache>) -> Disk {
    let client = RegistryClient::new(ClientOptions::default()).unwrap();
    let (store, selector) = store::open(&image.parse().unwrap(), &client).unwrap();
    let (_, manifest) = host_manifest(&*store, &selector).unwrap();
    open_image(&*store, &*store, &manifest, cache).unwrap().disk
}

/// Reads every byte of the disk in order and drops it; returns the seconds.
fn discard(disk: &Disk) -> f64 {
    let steps = steps(disk.mapped(), disk.size());
    seconds(|| scan::<VolumeError>(disk, &steps, |_, _| Ok(())).unwrap())
}

/// Decodes segments from memory, one after the other into one buffer; returns the seconds.
fn decode(source: &dyn ChunkSource, gzip: &[u8], first: u32, step: usize) -> f64 {
    let mut room = vec![1; 4 << 20];
    let mut buffer = Vec::new();
    let mut time = Duration::ZERO;
    for index in (first..source.chunk_count()).step_by(step) {
        let place = source.encoded(index).unwrap();
        let mut encoded = EncodedChunk::new(&place, buffer);
        let range = place.range.start as usize..place.range.end as usize;
        encoded.bytes_mut().copy_from_slice(&gzip[range]);
        let room = &mut room[..source.room(index)];
        let start = Instant::now();
        source.decode(index, &mut encoded, room).unwrap();
        time += start.elapsed();
        buffer = encoded.into_buffer();
    }
    time.as_secs_f64()
}

fn libdeflate(gzip: &[u8], out: &mut [u8]) -> f64 {
    seconds(|| {
        libdeflater::Decompressor::new().gzip_decompress(gzip, out).unwrap();
    })
}

/// The time of both parts of a work at once, one on each core.
fn both(part: impl Fn(u32) + Sync) -> f64 {
    seconds(|| {
        thread::scope(|scope| {
            scope.spawn(|| part(0));
            part(1);
        });
    })
}

/// The same segments by an index without checksums.
fn without_checksums(layout: &Path, source: &Arc<dyn ChunkSource>) -> IndexedLayer {
    let store = LayoutStore::open(layout).unwrap();
    let (_, manifest) = host_manifest(&store, &Selector::Tag("turbo".into())).unwrap();
    let archive = store.read_blob(&manifest.layers[0]).unwrap();
    let mut unpacked = Vec::new();
    flate2::read::GzDecoder::new(&archive[..]).read_to_end(&mut unpacked).unwrap();
    let members = tar::archive::read_members(&unpacked).unwrap();
    let member = |name| {
        members.iter().find(|(member, _)| member == name).map(|(_, range)| &unpacked[range.clone()])
    };
    let mut index = gzip::merge(member(GZIP_META_NAME), member(SIDECAR_NAME)).unwrap();
    (index.sha256, index.crc32) = (None, None);
    IndexedLayer::new("bare", index, source.blob().clone()).unwrap()
}

/// Decoding: rates against libdeflate over the whole file. Returns the rate of one core in bytes a second.
fn decoding(layout: &Path, disk: &Disk, gzip: &[u8]) -> f64 {
    let source = disk.chunk_sources().remove(0).unwrap();
    let plain = without_checksums(layout, &source);
    let size = source.decoded_len();
    let mut out = vec![1; size as usize];
    let (mut bare, mut verified, mut scaling, mut machine, mut rates) =
        (vec![], vec![], vec![], vec![], vec![]);
    for _ in 0..ROUNDS {
        let whole = libdeflate(gzip, &mut out);
        let one = decode(&plain, gzip, 0, 1);
        bare.push(whole / one);
        verified.push(whole / decode(&*source, gzip, 0, 1));
        rates.push(size as f64 / one);
        // Wall time, copies included on both sides.
        let alone = seconds(|| _ = decode(&plain, gzip, 0, 1));
        scaling.push(alone / both(|first| _ = decode(&plain, gzip, first, 2)));
        let copies = [
            std::sync::Mutex::new(vec![1; size as usize]),
            std::sync::Mutex::new(std::mem::take(&mut out)),
        ];
        let pair =
            both(|number| _ = libdeflate(gzip, &mut copies[number as usize].lock().unwrap()));
        machine.push(2.0 * whole / pair);
        let [_, second] = copies;
        out = second.into_inner().unwrap();
    }
    let rate = median(rates);
    println!(
        "decode of segments: {:.2} of libdeflate's rate on the whole file (bar 0.95); with SHA-256 and CRC-32 {:.2}",
        median(bare),
        median(verified)
    );
    println!(
        "  {:.0} MB/s a core; two cores {:.2} times one (bar 1.8), where two independent libdeflates gain {:.2}",
        rate / 1e6,
        median(scaling),
        median(machine)
    );
    rate
}

fn whole_disk(layer: &Path, image: &str, rate: f64) {
    let cores = thread::available_parallelism().map_or(2, usize::from);
    let (mut ratios, mut of_gzip) = (vec![], vec![]);
    for _ in 0..ROUNDS {
        let gzip = gzip_dc(layer).as_secs_f64();
        let disk = open(image, Cache::new(scan::MEMORY, cores));
        let tar = disk.chunk_sources()[0].as_ref().unwrap().decoded_len() as f64;
        let read = discard(&disk);
        ratios.push(read / (tar / (cores as f64 * rate)));
        of_gzip.push(read / gzip);
    }
    println!(
        "whole disk from a local file, cold, discarded: {:.2} of tar / (cores x decode rate) (bar 1.3); {:.3} of gzip -dc",
        median(ratios),
        median(of_gzip)
    );
}

fn over_the_line(layout: &Path) {
    let line = Line::start(layout, DELAY, GIGABIT);
    let image = format!("{}/perf:turbo", line.host);
    let mut ratios = vec![];
    let (mut requests, mut chunks) = (0, 0);
    for _ in 0..3 {
        let cache = Cache::new(scan::MEMORY_FAR, 2);
        let disk = open(&image, cache.clone());
        let blob = disk.chunk_sources()[0].as_ref().unwrap().blob().len();
        let read = discard(&disk);
        ratios.push(read / (blob as f64 / GIGABIT));
        let fetched = cache.fetched();
        requests = fetched.demand_requests.get() + fetched.ahead_requests.get();
        chunks = fetched.chunks.get();
    }
    println!(
        "the same over loopback HTTP, 20 ms a request and 1 Gbit/s: {:.2} of the transfer time (bar 1.15); {chunks} segments by {requests} requests",
        median(ratios)
    );
    let (mut most, mut segments) = (0, 0);
    let mut page = [0; 4096];
    for number in 0..20 {
        let disk = open(&image, Cache::new(scan::MEMORY_FAR, 2));
        let files: Vec<_> = disk
            .stack()
            .extents()
            .filter(|e| matches!(e.place, RunPlace::Remote(_)) && e.len.0 >= 8)
            .collect();
        let before =
            (line.asked.ranges.load(Ordering::Relaxed), line.asked.bytes.load(Ordering::Relaxed));
        disk.read_at(&mut page, files[files.len() * number / 20].lba.bytes().0).unwrap();
        most = most.max(line.asked.ranges.load(Ordering::Relaxed) - before.0);
        let source = disk.chunk_sources().remove(0).unwrap();
        let longest = (0..source.chunk_count())
            .map(|i| source.encoded(i).unwrap().len() as u64)
            .max()
            .unwrap();
        segments =
            segments.max((line.asked.bytes.load(Ordering::Relaxed) - before.1).div_ceil(longest));
    }
    println!(
        "a 4 KiB file, cold, 20 of them: at most {most} range request (bar 1) and {segments} segment (bar 1)"
    );
}

fn main() {
    let layer = layer::layer();
    let layout = layout(&layer);
    let image = format!("oci:{}:turbo", layout.display());
    let gzip = std::fs::read(&layer).unwrap();
    println!("a layer of {} MB", gzip.len() / 1_000_000);
    let rate = decoding(&layout, &open(&image, Cache::new(scan::MEMORY_FAR, 2)), &gzip);
    drop(gzip);
    whole_disk(&layer, &image, rate);
    over_the_line(&layout);
}
