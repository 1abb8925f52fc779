//! Any bytes as a trace of this project and of upstream, and an accepted trace merged and written again.
#![no_main]

use blobs::trace::upstream;
use formats::trace::Trace;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    // The first byte selects the format, and the position of the second start.
    let [first, data @ ..] = data else { return };
    if first & 1 == 1 {
        // The checksum of the records, whatever they are.
        let mut bytes = data.to_vec();
        if let Some(sum) = bytes.get(24..).map(|records| !crc32c::crc32c_append(u32::MAX, records))
        {
            bytes[16..20].copy_from_slice(&sum.to_le_bytes());
        }
        for bytes in [data, &bytes] {
            if let Ok(reads) = upstream::parse(bytes) {
                assert_eq!(upstream::parse(&upstream::to_bytes(&reads)).as_ref(), Ok(&reads));
            }
        }
        return;
    }
    let (one, two) = data.split_at(data.len() * usize::from(*first) / 256);
    let mut merged = Trace::default();
    for part in [one, two] {
        let mut crc = flate2::Crc::new();
        crc.update(part);
        let Ok(trace) = Trace::parse(&[part, &crc.sum().to_le_bytes()].concat()) else { continue };
        assert_eq!(Trace::parse(&trace.to_bytes()).as_ref(), Ok(&trace));
        merged.merge(&trace);
        assert!(trace.touches.is_empty() || !merged.touches.is_empty());
        assert_eq!(Trace::parse(&merged.to_bytes()).as_ref(), Ok(&merged));
    }
});
