//! Any bytes as a ZFile, wrapped or bare.
#![no_main]

use libfuzzer_sys::fuzz_target;
use std::sync::Arc;

use turbobd::source::MemorySource;
use turbobd::zfile;

fuzz_target!(|data: &[u8]| {
    if let Ok(payload) = zfile::open(Arc::new(MemorySource::new("fuzz", data))) {
        let source = payload.source();
        let mut buf = [0; 4096];
        for at in [0, source.len() / 2, source.len().saturating_sub(100)] {
            let len = buf.len().min((source.len() - at) as usize);
            let _ = source.read_exact_at(&mut buf[..len], at);
        }
        if source.len() < 16 << 20 {
            let _ = payload.read_all();
        }
    }
});
