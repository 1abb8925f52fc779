//! Any bytes as one LSMT layer, and any index entries as two layers stacked: for every sector the merge must
//! agree with a walk from the top.
#![no_main]

use formats::lsmt::layer::LsmtHeader;
use formats::lsmt::mapping::ENTRY;
use formats::lsmt::{LsmtLayer, RunPlace, Stack, TagMeaning, Uuid};
use formats::units::{Bytes, Sectors};
use libfuzzer_sys::fuzz_target;
use source::MemorySource;

/// Number of sectors that are compared.
const SECTORS: u64 = 1 << 12;
const RECORD: u64 = 4096;

fuzz_target!(|data: &[u8]| {
    let [mode, split, data @ ..] = data else { return };
    let kind = if mode & 2 == 0 { TagMeaning::Plain } else { TagMeaning::Warp };
    if mode & 1 == 0 {
        if let Ok(layer) = open(data, kind) {
            let _ = Stack::merge(&[&layer]);
        }
        return;
    }
    let (lower, upper) = data.split_at((usize::from(*split) * ENTRY as usize).min(data.len()));
    let (Ok(lower), Ok(upper)) = (open(&stream(lower), kind), open(&stream(upper), kind)) else {
        return;
    };
    let layers = [lower, upper];
    let Ok(stack) = Stack::merge(&[&layers[0], &layers[1]]) else { return };
    let mut at = 0;
    for run in stack.look_up(Sectors(0), Sectors(SECTORS)) {
        assert!(run.lba.0 == at && run.len.0 > 0);
        for i in 0..run.len.0 {
            let place = match run.place {
                RunPlace::Zero => RunPlace::Zero,
                RunPlace::Own(from) => RunPlace::Own(Sectors(from.0 + i)),
                RunPlace::Remote(from) => RunPlace::Remote(Sectors(from.0 + i)),
            };
            let (layer, expected) = walk(&layers, at + i);
            assert_eq!((place, at + i), (expected, at + i));
            assert!(place == RunPlace::Zero || run.layer == layer);
        }
        at += run.len.0;
    }
    assert_eq!(at, SECTORS);
});

fn open(bytes: &[u8], kind: TagMeaning) -> Result<LsmtLayer, formats::lsmt::LsmtError> {
    LsmtLayer::open(&MemorySource::new("fuzz", bytes), kind)
}

/// A layer with `entries` for an index and room to point to.
fn stream(entries: &[u8]) -> Vec<u8> {
    let entries = &entries[..entries.len() / ENTRY as usize * ENTRY as usize];
    let payload = 64 * 512;
    let record = |flags| LsmtHeader {
        flags,
        index_offset: RECORD + payload,
        index_size: entries.len() as u64 / ENTRY,
        virtual_size: Bytes(SECTORS * 512).get(),
        uuid: Uuid::NULL,
        parent: Uuid::NULL,
        user_tag: Vec::new(),
    };
    let mut bytes = record(0b011).encode();
    bytes.resize((RECORD + payload) as usize, 0);
    bytes.extend_from_slice(entries);
    bytes.extend(record(0b110).encode());
    bytes
}

/// The entry for `sector` in the topmost layer that has one.
fn walk(layers: &[LsmtLayer], sector: u64) -> (u8, RunPlace) {
    for (number, layer) in layers.iter().enumerate().rev() {
        for mapping in layer.mappings() {
            if (mapping.lba.0..mapping.end().0).contains(&sector) {
                let at = Sectors(mapping.moffset.0 + (sector - mapping.lba.0));
                let place = match mapping.tag {
                    _ if mapping.zeroed => RunPlace::Zero,
                    0 => RunPlace::Own(at),
                    _ => RunPlace::Remote(at),
                };
                return (number as u8, place);
            }
        }
    }
    (0, RunPlace::Zero)
}
