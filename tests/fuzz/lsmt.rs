//! Any bytes as one LSMT layer, and as two stacked.
#![no_main]

use libfuzzer_sys::fuzz_target;
use turbobd::lsmt::{Layer, LayerKind, Stack};
use turbobd::source::MemorySource;
use turbobd::units::Sectors;

fuzz_target!(|data: &[u8]| {
    let split = data.len() / 2 / 512 * 512;
    for kind in [LayerKind::Plain, LayerKind::Warp] {
        let open = |bytes: &[u8]| Layer::open(&MemorySource::new("fuzz", bytes), kind);
        let whole = open(data);
        let halves = [open(&data[..split]), open(&data[split..])];
        let layers: Vec<&Layer> =
            halves.iter().chain([&whole]).filter_map(|layer| layer.as_ref().ok()).collect();
        if let Ok(stack) = Stack::merge(&layers) {
            let mut covered = 0;
            for extent in stack.look_up(Sectors(0), Sectors(1 << 12)) {
                covered += extent.len.get();
            }
            assert_eq!(covered, 1 << 12);
        }
    }
});
