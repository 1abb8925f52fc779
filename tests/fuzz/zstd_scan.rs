//! Any bytes as a zstd layer: in any pieces the scan has the same result, and every segment that it finds is
//! the right part of the output.
#![no_main]

use libfuzzer_sys::fuzz_target;
use std::sync::Arc;

use formats::segments::{FramesScanner, SegmentHasher, SegmentIndex, SegmentedLayer};
use formats::units::Bytes;
use formats::zstandard::ZstdError;
use source::MemorySource;
use source::chunk::{ChunkSource as _, SerialChunks as _};

/// Limit on the output: a few bytes may decode to many.
const MOST: usize = 16 << 20;

fuzz_target!(|data: &[u8]| {
    // From one byte at a time to everything at once.
    let [piece, blob @ ..] = data else { return };
    let Ok((index, output)) = scan(blob, 1 << (piece % 17)) else {
        let _ = scan(blob, blob.len().max(1));
        return;
    };
    if let Ok((other, same)) = scan(blob, blob.len().max(1)) {
        assert!(other == index && same == output);
    }
    let source = Arc::new(MemorySource::new("fuzz", blob.to_vec()));
    let layer = SegmentedLayer::new("fuzz", index, source).unwrap();
    let mut again = Vec::new();
    let mut at = 0;
    while at < layer.chunk_count() {
        let serial = layer.frame(at);
        at = serial.end;
        if serial.len() > 1 {
            layer.load_frame(serial, &mut |bytes| again.extend_from_slice(bytes)).unwrap();
        } else {
            again.extend_from_slice(&layer.load(serial.start).unwrap());
        }
    }
    assert!(again == output);
});

fn scan(blob: &[u8], piece: usize) -> Result<(SegmentIndex, Vec<u8>), ZstdError> {
    let mut scanner = FramesScanner::new(Bytes(64 << 10))?;
    let mut hasher = SegmentHasher::new();
    let mut output = Vec::new();
    for piece in blob.chunks(piece) {
        scanner.feed(piece, &mut |bytes| -> Result<(), ZstdError> {
            output.extend_from_slice(bytes);
            if output.len() <= MOST { Ok(()) } else { Err(ZstdError::Empty { at: 0 }) }
        })?;
        hasher.push(piece.to_vec().into());
        scanner.take_segments().iter().for_each(|range| hasher.segment(range));
        hasher.forget_before(scanner.keep_from());
    }
    Ok((scanner.finish()?.with_digests(hasher).unwrap(), output))
}
