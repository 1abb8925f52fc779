//! Speed of a gzip layer's scan and of decoding its segments: `gzip_scan FILE.gz [SPAN_KIB]`.
//!
//! Speeds are MB/s of uncompressed data on one thread. `gzip -dc` runs in between, so that a busy machine
//! slows all of them equally.

use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use formats::gzip::{
    GzipError, GzipSegmentHasher, IndexedLayer, ScanOptions, Scanner, Sidecar, ddgzidx,
};
use formats::units::Bytes;
use source::MemorySource;
use source::chunk::ChunkSource as _;

/// CPU time of this thread: other work on the machine does not count.
fn cpu() -> Duration {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    let nanos = text.split(' ').next().and_then(|word| word.parse().ok()).unwrap_or(0);
    Duration::from_nanos(nanos)
}

fn timed<T>(name: &str, bytes: u64, work: impl FnOnce() -> T) -> T {
    let (wall, start) = (Instant::now(), cpu());
    let result = work();
    let (cpu, wall) = ((cpu() - start).as_secs_f64(), wall.elapsed().as_secs_f64());
    let mb = bytes as f64 / 1e6;
    println!(
        "{name:24} {:7.0} MB/s of CPU time, {:7.0} MB/s of wall time, {wall:.3} s",
        mb / cpu.max(1e-9),
        mb / wall
    );
    result
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1).filter(|arg| !arg.starts_with("--"));
    let path = args.next().ok_or("usage: gzip_scan FILE.gz [SPAN_KIB]")?;
    let span = Bytes(args.next().map_or(Ok(1024), |kib| kib.parse::<u64>())? << 10);
    let gzip = std::fs::read(&path)?;
    let scan = || -> Result<_, GzipError> {
        let mut scanner = Scanner::new(ScanOptions { span });
        let mut sum = 0u64;
        for piece in gzip.chunks(256 << 10) {
            scanner.feed::<GzipError>(piece, &mut |bytes| {
                sum += bytes.len() as u64;
                Ok(())
            })?;
            scanner.take_boundaries();
        }
        scanner.finish()
    };
    let mut index = scan()?;
    let size = index.uncompressed_len.0;
    for _ in 0..3 {
        timed("scan", size, scan)?;
        timed("gzip -dc", size, || {
            Command::new("gzip").args(["-dc", &path]).stdout(Stdio::null()).status()
        })?;
    }
    let mut hasher = GzipSegmentHasher::new();
    timed("hash segments and whole", size, || {
        for piece in gzip.chunks(256 << 10) {
            hasher.push(bytes::Bytes::copy_from_slice(piece));
        }
        hasher.finish(&mut index)
    })?;

    let meta = ddgzidx::write(&index)?;
    let layer = index.layer.ok_or("no digest")?;
    let sidecar = Sidecar::write(&index, layer, true)?;
    let largest = (0..index.segments()).map(|i| index.output(i).end - index.output(i).start).max();
    println!(
        "index: {} segments, largest {} KiB; gzip.meta {} B, {} B, together {:.3} % of {} B; in memory {} B",
        index.segments(),
        largest.unwrap_or(0) >> 10,
        meta.len(),
        sidecar.len(),
        (meta.len() + sidecar.len()) as f64 * 100.0 / gzip.len() as f64,
        gzip.len(),
        index.footprint(),
    );
    let source = MemorySource::new(path.as_str(), &gzip[..]);
    let mut unverified = index.clone();
    unverified.sha256 = None;
    for (name, index) in [("segments, verified", index), ("segments, CRC-32 only", unverified)] {
        let layer = IndexedLayer::new("layer", index, Arc::new(source.clone()))?;
        timed(name, size, || (0..layer.chunk_count()).try_for_each(|i| layer.load(i).map(drop)))?;
    }
    let mut out = vec![0; size as usize];
    for name in ["libdeflate, whole, cold", "libdeflate, whole"] {
        timed(name, size, || libdeflater::Decompressor::new().gzip_decompress(&gzip, &mut out))
            .map_err(|e| format!("{e:?}"))?;
    }
    Ok(())
}
