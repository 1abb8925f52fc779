//! Any bytes as an unpacked layer archive.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    if let Ok(members) = turbobd::tar::archive::read_members(data) {
        for (_, range) in members {
            assert!(data.get(range).is_some());
        }
    }
});
