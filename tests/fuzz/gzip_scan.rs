//! Any bytes as a gzip layer: what the scan accepts, libdeflate reads the same, and every segment decodes alone.
#![no_main]

use libfuzzer_sys::fuzz_target;
use std::sync::Arc;

use turbobd::chunk::ChunkSource as _;
use turbobd::gzip::{GzipError, IndexedLayer, ScanOptions, Scanner};
use turbobd::source::MemorySource;
use turbobd::units::Bytes;

/// A few bytes may inflate to a thousand times as many.
const MOST: usize = 16 << 20;

fuzz_target!(|data: &[u8]| {
    let mut scanner = Scanner::new(ScanOptions { span: Bytes(64 << 10) });
    let mut output = Vec::new();
    let fed = scanner.feed(data, &mut |bytes| -> Result<(), GzipError> {
        output.extend_from_slice(bytes);
        if output.len() > MOST { Err(GzipError::TooLarge { what: "the output" }) } else { Ok(()) }
    });
    if fed.is_err() {
        return;
    }
    let Ok(index) = scanner.finish() else { return };
    if index.members == 1 {
        let mut theirs = vec![0; output.len()];
        let len = libdeflater::Decompressor::new().gzip_decompress(data, &mut theirs);
        assert_eq!(len.ok(), Some(output.len()));
        assert!(theirs == output);
    }
    let layer =
        IndexedLayer::new("fuzz", index, Arc::new(MemorySource::new("fuzz", data))).unwrap();
    let mut again = Vec::new();
    for segment in 0..layer.chunk_count() {
        again.extend_from_slice(&layer.load(segment).unwrap());
    }
    assert!(again == output);
});
