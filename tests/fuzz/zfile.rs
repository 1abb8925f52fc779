//! Any bytes as a ZFile, wrapped or bare.
#![no_main]

use libfuzzer_sys::fuzz_target;
use std::sync::Arc;

use formats::zfile;
use source::MemorySource;

/// The flag of valid digests (spec zfile 2).
const FLAG_DIGEST: u8 = 1 << 4;

fuzz_target!(|data: &[u8]| {
    open(data);
    // Once more with the digests of header and trailer declared absent, as old writers left them.
    let mut data = data.to_vec();
    for at in [0, data.len().saturating_sub(512)] {
        if let Some(flags) = data.get_mut(at + 32) {
            *flags &= !FLAG_DIGEST;
        }
    }
    open(&data);
});

fn open(data: &[u8]) {
    let Ok(payload) = zfile::open(Arc::new(MemorySource::new("fuzz", data))) else { return };
    let source = payload.source();
    let mut buf = [0; 4096];
    for at in [0, source.len() / 2, source.len().saturating_sub(100)] {
        let len = buf.len().min((source.len() - at) as usize);
        let _ = source.read_exact_at(&mut buf[..len], at);
    }
    if source.len() < 1 << 20 {
        let _ = payload.read_all();
    }
}
