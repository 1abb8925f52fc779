//! `cargo bench --bench lookup`: look-up of a sector in a stack of ten layers with 100,000 mappings.

#![allow(clippy::unwrap_used, reason = "a benchmark that cannot go on stops")]

#[path = "layer.rs"]
mod layer;

use std::hint::black_box;
use std::time::Instant;

use formats::lsmt::{LsmtLayer, Stack, TagMeaning, WarpWriter};
use formats::units::{Bytes, Sectors};
use source::MemorySource;

const LAYERS: usize = 10;
const MAPPINGS: u64 = 10_000; // for each layer
const DISK: u64 = 64 << 30;
const LOOK_UPS: usize = 1_000_000;

fn main() {
    let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = move |below: u64| {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed % below
    };
    // Every layer covers the first 4 GiB with runs of up to 400 KiB and gaps between them.
    let mut one_layer = || {
        let mut writer = WarpWriter::new(Bytes(DISK)).unwrap();
        let step = (4 << 30) / 512 / MAPPINGS;
        writer.metadata(Sectors(0), &[1; 512]).unwrap(); // every layer has some metadata
        for number in 1..=MAPPINGS {
            let len = 8 + 8 * random(step / 8 - 2);
            writer
                .remote(Sectors(number * step), Sectors(len), Sectors(1 + number * step))
                .unwrap();
        }
        let mut stream = Vec::new();
        writer.finish(&mut stream).unwrap();
        LsmtLayer::open(&MemorySource::new("layer", stream), TagMeaning::Warp).unwrap()
    };
    let layers: Vec<LsmtLayer> = (0..LAYERS).map(|_| one_layer()).collect();
    let mappings: usize = layers.iter().map(|layer| layer.mappings().len()).sum();
    let start = Instant::now();
    let stack = Stack::merge(&layers.iter().collect::<Vec<_>>()).unwrap();
    println!(
        "{LAYERS} layers, {mappings} mappings, merged to {} extents in {:.1?}",
        stack.len(),
        start.elapsed()
    );

    let places: Vec<Sectors> =
        (0..LOOK_UPS).map(|_| Sectors(random((4 << 30) / 512 / 8) * 8)).collect();
    let mut means = Vec::new();
    for _ in 0..5 {
        let start = Instant::now();
        for &lba in &places {
            black_box(stack.look_up(lba, Sectors(8)).count());
        }
        means.push(start.elapsed().as_nanos() as f64 / LOOK_UPS as f64);
    }
    println!(
        "a random look-up of 4 KiB takes {:.0} ns on average (median of 5 runs)",
        layer::median(means)
    );
}
