//! `cargo bench --bench read`: reading a whole disk, decoding segments, and the first read of a cold file.

#![allow(clippy::unwrap_used, reason = "a benchmark that cannot go on stops")]

#[path = "layer.rs"]
mod layer;

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use blobs::cache::Cache;
use convert::layer::{BuiltLayer, build_layer};
use convert::{ConvertOptions, Silent};
use disk::resident::read_resident;
use disk::volume::Volume as _;
use disk::{Disk, DiskLayer, LayerData, digest};
use formats::archive::FS_META_NAME;
use formats::ext4::{FilesystemIdentity, Geometry, Image, Tree};
use formats::gzip::{self, DEFAULT_SPAN, GZIP_META_NAME, IndexedLayer, SIDECAR_NAME};
use formats::lsmt::{self, RunPlace, TagMeaning};
use formats::oci::Descriptor;
use formats::units::Bytes;
use formats::{tar, zfile};
use layer::{gzip_dc, median};
use source::chunk::ChunkSource as _;
use source::{ByteSource, FileSource, MemorySource, SharedBytes, SourceError};

/// Number of cold reads at distinct places.
const READS: usize = 300;
/// A near registry: the cost of each range request, and the line's bytes a second.
const ROUND_TRIP: Duration = Duration::from_millis(20);
const LINE: f64 = 1e9 / 8.0;

/// A blob that counts the requests for it.
struct Counted {
    blob: Arc<dyn ByteSource>,
    requests: AtomicU64,
    bytes: AtomicU64,
}

impl ByteSource for Counted {
    fn name(&self) -> &str {
        self.blob.name()
    }
    fn len(&self) -> u64 {
        self.blob.len()
    }
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> Result<(), SourceError> {
        self.requests.fetch_add(1, Ordering::Relaxed);
        self.bytes.fetch_add(buf.len() as u64, Ordering::Relaxed);
        self.blob.read_exact_at(buf, offset)
    }
}

/// A converted layer, and its blob as a local file in the page cache.
struct Converted {
    built: BuiltLayer,
    blob: Arc<Counted>,
    members: Vec<(String, Vec<u8>)>,
}

impl Converted {
    fn new(path: &std::path::Path, descriptor: &Descriptor, span: u64) -> Self {
        let options = ConvertOptions { span: Bytes(span), ..ConvertOptions::default() };
        let geometry = Geometry { size: options.disk_size };
        let (mut tree, mut image) =
            (Tree::new(), Image::new(geometry, FilesystemIdentity::default()).unwrap());
        let file = Box::new(File::open(path).unwrap());
        let built =
            build_layer(file, descriptor, &mut tree, &mut image, &options, &Silent).unwrap();
        let mut unpacked = Vec::new();
        let mut archive = flate2::read::GzDecoder::new(&built.archive[..]);
        std::io::Read::read_to_end(&mut archive, &mut unpacked).unwrap();
        let members = tar::archive::read_members(&unpacked).unwrap();
        let members =
            members.into_iter().map(|(name, range)| (name, unpacked[range].to_vec())).collect();
        let blob = Arc::new(FileSource::open(path).unwrap());
        let blob = Counted { blob, requests: AtomicU64::new(0), bytes: AtomicU64::new(0) };
        Self { built, blob: Arc::new(blob), members }
    }

    fn member(&self, name: &str) -> Option<&[u8]> {
        self.members.iter().find(|(member, _)| member == name).map(|(_, bytes)| &bytes[..])
    }

    fn target(&self) -> IndexedLayer {
        let index = gzip::merge(self.member(GZIP_META_NAME), self.member(SIDECAR_NAME)).unwrap();
        IndexedLayer::new("layer", index, self.blob.clone()).unwrap()
    }

    fn disk(&self, cache: Arc<Cache>) -> Disk {
        let fs_meta = MemorySource::new("fs", self.member(FS_META_NAME).unwrap());
        let meta: SharedBytes =
            Arc::new(read_resident(&zfile::open(Arc::new(fs_meta)).unwrap()).unwrap());
        let index =
            lsmt::LsmtLayer::open(&MemorySource::shared("fs", meta.clone()), TagMeaning::Warp)
                .unwrap();
        let data = LayerData::Turbo { meta, target: Some(Arc::new(self.target())) };
        Disk::new(vec![DiskLayer { index, data }], cache).unwrap()
    }
}

fn seconds(work: impl FnOnce()) -> f64 {
    let start = Instant::now();
    work();
    start.elapsed().as_secs_f64()
}

/// Hashes everything on the disk, like `export --digest`.
fn whole_disk(converted: &Converted, path: &std::path::Path) {
    let cores = thread::available_parallelism().map_or(2, usize::from);
    let mut ratios = Vec::new();
    for _ in 0..3 {
        let gzip = gzip_dc(path).as_secs_f64();
        let disk = converted.disk(Cache::new(256 << 20, cores));
        let read = seconds(|| {
            digest::content_digest(&disk, disk.mapped()).unwrap();
        });
        println!(
            "gzip -dc {gzip:.2} s, whole disk cold with its SHA-256 {read:.2} s: ratio {:.3}",
            read / gzip
        );
        ratios.push(read / gzip);
    }
    println!("whole disk against gzip -dc: median {:.3}", median(ratios));
}

/// Decodes all segments, verified, against libdeflate over the blob in one piece.
fn decoding(converted: &Converted, path: &std::path::Path) {
    let gzip = std::fs::read(path).unwrap();
    let target = converted.target();
    let mut out = vec![1; target.decoded_len() as usize];
    let (mut one_core, mut two_cores, mut machine) = (Vec::new(), Vec::new(), Vec::new());
    let mut other = out.clone();
    let count = target.chunk_count();
    let part = |first: u32, step: u32| {
        (first..count).step_by(step as usize).for_each(|i| drop(target.load(i).unwrap()));
    };
    let libdeflate = |out: &mut [u8]| {
        libdeflater::Decompressor::new().gzip_decompress(&gzip, out).unwrap();
    };
    for _ in 0..3 {
        let whole = seconds(|| libdeflate(&mut out));
        // The present gain from a second core: twice the same work, at once.
        let both = seconds(|| {
            thread::scope(|scope| {
                scope.spawn(|| libdeflate(&mut other));
                libdeflate(&mut out);
            });
        });
        machine.push(2.0 * whole / both);
        let one = seconds(|| part(0, 1));
        let two = seconds(|| {
            thread::scope(|scope| {
                scope.spawn(|| part(0, 2));
                part(1, 2);
            });
        });
        println!(
            "libdeflate over the whole {whole:.2} s; all segments, verified, on one core {one:.2} s, on two {two:.2} s"
        );
        one_core.push(one / whole);
        two_cores.push(one / two);
    }
    println!(
        "segments against libdeflate: median {:.2}; two cores against one: {:.2} times, where libdeflate gains {:.2}",
        median(one_core),
        median(two_cores),
        median(machine)
    );
}

/// 4 KiB reads at places of the disk that lie in the layer, each in a segment not read before if there are
/// enough, with an empty cache: milliseconds from a local file, and from a registry.
fn first_reads(converted: &Converted) -> [Vec<f64>; 2] {
    let disk = converted.disk(Cache::new(0, 1)); // keeps nothing
    let remote: Vec<_> = disk
        .stack()
        .extents()
        .filter(|e| matches!(e.place, RunPlace::Remote(_)) && e.len.0 >= 8)
        .collect();
    let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = move |below: u64| {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed % below
    };
    let (mut local, mut far) = (Vec::new(), Vec::new());
    let mut page = vec![0; 4096];
    for _ in 0..READS {
        let extent = remote[random(remote.len() as u64) as usize];
        let at = extent.lba.bytes().0 + random(extent.len.0 / 8) * 4096;
        let (requests, bytes) = (&converted.blob.requests, &converted.blob.bytes);
        requests.store(0, Ordering::Relaxed);
        bytes.store(0, Ordering::Relaxed);
        let time = seconds(|| disk.read_at(&mut page, at).unwrap());
        assert!(requests.load(Ordering::Relaxed) >= 1, "not cold");
        // All ranges of one read are requested at once: one round trip.
        let line = ROUND_TRIP.as_secs_f64() + bytes.load(Ordering::Relaxed) as f64 / LINE;
        local.push(time * 1e3);
        far.push((time + line) * 1e3);
    }
    local.sort_by(f64::total_cmp);
    far.sort_by(f64::total_cmp);
    [local, far]
}

fn main() {
    let path = layer::layer();
    let bytes = std::fs::read(&path).unwrap(); // in the page cache from here on
    let descriptor = Descriptor::of("", &bytes);
    drop(bytes);
    let spans = [256 << 10, 512 << 10, 1 << 20, 2 << 20];
    let all: Vec<Converted> =
        spans.iter().map(|&span| Converted::new(&path, &descriptor, span)).collect();
    println!("layer {} ({} bytes)", path.display(), descriptor.size);
    for (converted, span) in
        all.iter().zip(spans).filter(|(_, span)| *span == 512 << 10 || *span == DEFAULT_SPAN.0)
    {
        println!("span {} KiB", span >> 10);
        whole_disk(converted, &path);
        decoding(converted, &path);
    }

    println!("first 4 KiB of a cold place, ms        local file   20 ms + 1 Gbit/s");
    println!("span     meta    fetched (median)     median    p90     median    p90");
    let mut results: Vec<[Vec<f64>; 2]> = vec![Default::default(); spans.len()];
    for _ in 0..3 {
        // In turns, so that a busy machine slows all of them equally.
        for (result, converted) in results.iter_mut().zip(&all) {
            for (sum, more) in result.iter_mut().zip(first_reads(converted)) {
                sum.extend(more);
                sum.sort_by(f64::total_cmp);
            }
        }
    }
    for ((converted, span), [local, far]) in all.iter().zip(spans).zip(&results) {
        let sizes = &converted.built.sizes;
        let index = converted.target();
        let mut inputs: Vec<u64> = (0..index.index().segments())
            .map(|i| index.index().input(i))
            .map(|r| r.end - r.start)
            .collect();
        inputs.sort_unstable();
        let at = |sorted: &[f64], of_ten: usize| sorted[sorted.len() * of_ten / 10];
        println!(
            "{:>4} KiB {:.3} %  {:>6} KiB          {:>8.2} {:>7.2}   {:>7.2} {:>7.2}",
            span >> 10,
            sizes.archive as f64 * 100.0 / sizes.blob as f64,
            inputs[inputs.len() / 2] >> 10,
            at(local, 5),
            at(local, 9),
            at(far, 5),
            at(far, 9),
        );
    }
}
