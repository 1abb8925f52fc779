//! Any text as upstream's device configuration.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    if let Ok(text) = std::str::from_utf8(data) {
        let _ = disk::config::DeviceConfig::parse(text, "config.v1.json");
    }
});
