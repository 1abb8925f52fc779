//! Any bytes as upstream's gzip.meta and as our sidecar, and a layer decoded by what was accepted.
#![no_main]

use libfuzzer_sys::fuzz_target;
use std::sync::Arc;

use turbobd::chunk::ChunkSource as _;
use turbobd::gzip::{IndexedLayer, merge};
use turbobd::source::MemorySource;

fuzz_target!(|data: &[u8]| {
    let _ = merge(None, Some(data));
    let split = data.len() / 2;
    let _ = merge(Some(&data[..split]), Some(&data[split..]));
    if let Ok(index) = merge(Some(data), None) {
        let len = index.compressed_len.get();
        if len <= 1 << 16 {
            let blob = vec![0x55; len as usize];
            if let Ok(layer) =
                IndexedLayer::new("fuzz", index, Arc::new(MemorySource::new("fuzz", blob)))
            {
                for segment in 0..layer.chunk_count().min(8) {
                    if layer.index().output(segment as usize).count() < 1 << 20 {
                        let _ = layer.load(segment);
                    }
                }
            }
        }
    }
});
