//! Any bytes as upstream's gzip.meta and as this project's sidecar of either version, and a layer decoded by
//! the accepted index.
#![no_main]

use libfuzzer_sys::fuzz_target;
use std::sync::Arc;

use flate2::Crc;
use formats::gzip::{GzipIndex, IndexedLayer, merge};
use formats::segments::{SegmentIndex, SegmentedLayer, sidecar};
use source::MemorySource;
use source::chunk::ChunkSource as _;

/// Bytes of a segment worth decoding here.
const SEGMENT: u64 = 1 << 20;

fuzz_target!(|data: &[u8]| {
    // The first two bytes are the position of the sidecar.
    let [low, high, data @ ..] = data else { return };
    let (meta, file) =
        data.split_at(usize::from(u16::from_le_bytes([*low, *high])).min(data.len()));
    let mut crc = Crc::new();
    crc.update(file);
    let file = [file, &crc.sum().to_le_bytes()].concat();
    for (meta, file) in [(Some(meta), None), (None, Some(&file[..])), (Some(meta), Some(&file))] {
        if let Ok(index) = merge(meta, file) {
            decode(index, data);
        }
    }
    if let Ok(index) = sidecar::read(&file) {
        assert!(sidecar::is_version_2(&file));
        assert!(sidecar::write(&index) == file);
        decode_segments(index, data);
    }
});

/// Decodes a layer that is not gzip: hardly any of its segments has its SHA-256.
fn decode_segments(index: SegmentIndex, filling: &[u8]) {
    let len = index.scanned().compressed_len.get();
    if len > 1 << 20 || index.scanned().uncompressed_len.get() > 8 << 20 {
        return;
    }
    let blob: Vec<u8> = filling.iter().copied().cycle().take(len as usize).collect();
    let blob = Arc::new(MemorySource::new("fuzz", blob));
    let Ok(layer) = SegmentedLayer::new("fuzz", index, blob) else { return };
    for segment in 0..layer.chunk_count().min(8) {
        let serial = layer.frame(segment);
        assert!(serial.contains(&segment) && serial.end <= layer.chunk_count());
        let _ = layer.load(segment);
    }
}

/// Decodes a blob of the right length by `index`.
fn decode(index: GzipIndex, filling: &[u8]) {
    let len = index.compressed_len.get();
    if len > 1 << 20 {
        return;
    }
    let blob: Vec<u8> = filling.iter().copied().cycle().take(len as usize).collect();
    let Ok(layer) = IndexedLayer::new("fuzz", index, Arc::new(MemorySource::new("fuzz", blob)))
    else {
        return;
    };
    for segment in 0..layer.chunk_count().min(8) {
        let output = layer.index().output(segment as usize);
        if output.end - output.start < SEGMENT {
            let _ = layer.load(segment);
        }
    }
}
