//! Tests of layers as a whole. The oracles are layers that upstream's tools wrote, and a very simple map of
//! sectors.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use proptest::prelude::*;

use super::layer::LsmtHeader;
use super::*;
use crate::zfile;
use source::testing::{FaultySource, ReadFault};
use source::{ByteSource, FileSource, MemorySource};

fn upstream(name: &str) -> Vec<u8> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/interop/blobs").join(name);
    zfile::open(Arc::new(FileSource::open(&path).unwrap())).unwrap().read_all().unwrap()
}

fn memory(bytes: Vec<u8>) -> MemorySource {
    MemorySource::new("test", bytes)
}

/// Joins mappings that continue each other: the runs that a caller gives a writer at once.
fn joined(mappings: &[Mapping]) -> Vec<(Mapping, u64)> {
    let mut runs: Vec<(Mapping, u64)> = Vec::new();
    for mapping in mappings {
        match runs.last_mut() {
            Some((first, len))
                if first.lba.0 + *len == mapping.lba.0
                    && first.tag == mapping.tag
                    && first.zeroed == mapping.zeroed
                    && (first.zeroed || first.moffset.0 + *len == mapping.moffset.0) =>
            {
                *len += u64::from(mapping.len);
            }
            _ => runs.push((*mapping, u64::from(mapping.len))),
        }
    }
    runs
}

#[test]
fn upstreams_native_layers_are_read_and_written_again_byte_for_byte() {
    for name in ["native-2-L0-overlaybd.commit", "native-2-L1-overlaybd.commit"] {
        let bytes = upstream(name);
        let source = memory(bytes.clone());
        let layer = LsmtLayer::open(&source, TagMeaning::Plain).unwrap();
        let LsmtHeader { uuid, parent, user_tag, virtual_size, index_size, .. } =
            layer.trailer().clone();
        assert_eq!(virtual_size, if name.contains("L0") { 64 << 30 } else { virtual_size });
        assert!(index_size.is_multiple_of(256) && !layer.mappings().is_empty());
        let identity = LayerIdentity { uuid, parent, user_tag };
        let mut writer = NativeWriter::new(Vec::new(), Bytes(virtual_size), identity).unwrap();
        for (run, len) in joined(layer.mappings()) {
            if run.zeroed {
                writer.zeroed(run.lba, Sectors(len)).unwrap();
                continue;
            }
            // The source was a sparse file; upstream first cuts its extents at 16383 sectors.
            let from = run.moffset.bytes().0 as usize;
            let payload = &bytes[from..from + len as usize * 512];
            for (number, part) in payload.chunks(16383 * 512).enumerate() {
                writer.data(Sectors(run.lba.0 + number as u64 * 16383), part).unwrap();
            }
        }
        assert!(writer.finish().unwrap() == bytes, "{name}");
    }
}

#[test]
fn upstreams_turbo_layers_are_read_and_written_again_byte_for_byte() {
    for name in [
        "turbooci-2-gz-L0-ext4.fs.meta",
        "turbooci-2-gz-L1-ext4.fs.meta",
        "mix-native-first-L1-ext4.fs.meta",
    ] {
        let bytes = upstream(name);
        let layer = LsmtLayer::open(&memory(bytes.clone()), TagMeaning::Warp).unwrap();
        assert_eq!(layer.virtual_size(), Bytes(64 << 30));
        assert_eq!(layer.trailer().uuid, Uuid::NULL);
        let mut writer = WarpWriter::new(layer.virtual_size()).unwrap();
        for (run, len) in joined(layer.mappings()) {
            let from = run.moffset.bytes().0 as usize;
            let added = match (run.zeroed, run.tag) {
                (true, _) => writer.zeroed(run.lba, Sectors(len)),
                (_, 0) => writer.metadata(run.lba, &bytes[from..from + len as usize * 512]),
                _ => writer.remote(run.lba, Sectors(len), run.moffset),
            };
            added.unwrap();
        }
        let mut again = Vec::new();
        writer.finish(&mut again).unwrap();
        assert!(again == bytes, "{name}");
    }
}

#[test]
fn a_uuid_reads_in_either_case_and_writes_in_upper_case() {
    let text = "01BB4FCE-3EB1-B56B-05AD-F99504DAFD31";
    let uuid: Uuid = text.to_lowercase().parse().unwrap();
    assert_eq!(uuid.to_string(), text);
    assert_eq!(Uuid::NULL.to_string(), "00000000-0000-0000-0000-000000000000");
    for bad in [
        "",
        "01BB4FCE-3EB1-B56B-05AD-F99504DAFD3",
        "01BB4FCE+3EB1-B56B-05AD-F99504DAFD31",
        &"G".repeat(36),
    ] {
        assert!(bad.parse::<Uuid>().is_err(), "{bad}");
    }
}

#[test]
fn a_writer_refuses_what_no_reader_would_open() {
    assert!(WarpWriter::new(Bytes(1000)).is_err());
    assert!(WarpWriter::new(Bytes(u64::MAX / 512 * 512)).is_err());
    let mut writer = WarpWriter::new(Bytes(100 * 512)).unwrap();
    writer.remote(Sectors(10), Sectors(5), Sectors(3)).unwrap();
    assert_eq!(
        writer.metadata(Sectors(14), &[0; 512]).unwrap_err().to_string(),
        "Sectors 14..15 cannot be added to a layer: they must come after all sectors added before"
    );
    assert!(writer.metadata(Sectors(20), &[0; 100]).is_err());
    assert!(writer.zeroed(Sectors(99), Sectors(2)).is_err());
    assert!(writer.zeroed(Sectors(99), Sectors(u64::MAX)).is_err());
    assert!(writer.remote(Sectors(30), Sectors(1), Sectors(u64::MAX)).is_err());
    // Upstream takes a layer of remote runs alone for metadata.
    assert!(writer.finish(&mut Vec::new()).is_err());
}

#[test]
fn one_entry_too_many_is_refused_while_writing() {
    let fill = |count: u64| -> Result<(), LsmtError> {
        let mut writer = WarpWriter::new(Bytes(1 << 40))?;
        for number in 0..count {
            writer.zeroed(Sectors(number * 2), Sectors(1))?;
        }
        writer.finish(&mut Vec::new())
    };
    assert!(fill(MAX_ENTRIES).is_ok());
    assert!(matches!(fill(MAX_ENTRIES + 1), Err(LsmtError::TooManyMappings { .. })));
    // A native index is padded to a page of 256 entries, and 1,000,000 is not a multiple of it.
    let mut writer =
        NativeWriter::new(Vec::new(), Bytes(1 << 40), LayerIdentity::default()).unwrap();
    for number in 0..MAX_ENTRIES {
        writer.zeroed(Sectors(number * 2), Sectors(1)).unwrap();
    }
    assert!(matches!(writer.finish(), Err(LsmtError::TooManyMappings { .. })));
}

/// A small layer with all three kinds of entries.
fn small() -> Vec<u8> {
    let mut writer = WarpWriter::new(Bytes(1 << 20)).unwrap();
    writer.metadata(Sectors(0), &[1; 1024]).unwrap();
    writer.remote(Sectors(8), Sectors(16), Sectors(3)).unwrap();
    writer.zeroed(Sectors(24), Sectors(8)).unwrap();
    writer.metadata(Sectors(40), &[2; 512]).unwrap();
    let mut bytes = Vec::new();
    writer.finish(&mut bytes).unwrap();
    bytes
}

#[test]
fn every_cut_and_every_flipped_bit_is_an_error_or_a_valid_layer() {
    let whole = small();
    for len in (0..whole.len()).step_by(16) {
        for kind in [TagMeaning::Plain, TagMeaning::Warp] {
            assert!(LsmtLayer::open(&memory(whole[..len].to_vec()), kind).is_err(), "cut at {len}");
        }
    }
    let source: Arc<dyn ByteSource> = Arc::new(memory(whole.clone()));
    for bit in 0..whole.len() * 8 {
        let flipped = FaultySource::new(
            source.clone(),
            vec![ReadFault::FlipAt(bit as u64 / 8, 1 << (bit % 8))],
        );
        for kind in [TagMeaning::Plain, TagMeaning::Warp] {
            let Ok(layer) = LsmtLayer::open(&flipped, kind) else { continue };
            let ordered = layer.mappings().windows(2).all(|pair| pair[0].end() <= pair[1].lba);
            assert!(ordered && layer.mappings().iter().all(|mapping| mapping.len > 0), "bit {bit}");
            if let Ok(stack) = Stack::merge(&[&layer]) {
                stack.look_up(Sectors(0), stack.virtual_size().sector()).take(100).for_each(drop);
            }
        }
    }
}

#[test]
fn a_layer_sealed_in_place_opens_and_so_do_the_tags_of_other_writers() {
    let sealed = |header: u8, trailer: u8, tags: [u8; 2]| {
        let mut bytes = small();
        let at = bytes.len() - 4096;
        (bytes[28], bytes[at + 28]) = (header, trailer);
        let first = at - 4 * 16;
        for entry in bytes[first..at].as_chunks_mut::<16>().0 {
            entry[15] = tags[usize::from(entry[15])];
        }
        memory(bytes)
    };
    let expected = LsmtLayer::open(&memory(small()), TagMeaning::Warp).unwrap();
    let tags: Vec<_> =
        expected.mappings().iter().map(|mapping| (mapping.tag, mapping.zeroed)).collect();
    assert_eq!(tags, [(0, false), (1, false), (0, true), (0, false)]);
    for (header, trailer) in [(3, 6), (0x13, 0x16), (7, 6)] {
        let layer = LsmtLayer::open(&sealed(header, trailer, [4, 5]), TagMeaning::Warp).unwrap();
        assert_eq!(layer.mappings(), expected.mappings());
    }
    for (header, trailer) in [(6, 6), (5, 6), (7, 7), (7, 2), (7, 4)] {
        assert!(
            LsmtLayer::open(&sealed(header, trailer, [0, 1]), TagMeaning::Warp).is_err(),
            "{header} {trailer}"
        );
    }
    assert!(LsmtLayer::open(&sealed(7, 6, [0, 2]), TagMeaning::Warp).is_err());
    // A plain layer has leftover tags from a merge.
    let mut writer =
        NativeWriter::new(Vec::new(), Bytes(1 << 20), LayerIdentity::default()).unwrap();
    writer.data(Sectors(1), &[1; 512]).unwrap();
    let mut bytes = writer.finish().unwrap();
    bytes[4096 + 512 + 15] = 9;
    assert_eq!(LsmtLayer::open(&memory(bytes), TagMeaning::Plain).unwrap().mappings()[0].tag, 0);
}

#[test]
fn hostile_index_places_and_sizes_are_refused() {
    let whole = small();
    let trailer = whole.len() - 4096;
    let refused = |at: usize, value: u64| {
        let mut bytes = whole.clone();
        bytes[trailer + at..trailer + at + 8].copy_from_slice(&value.to_le_bytes());
        LsmtLayer::open(&memory(bytes), TagMeaning::Warp).unwrap_err().to_string()
    };
    for offset in [0, 4095, whole.len() as u64, u64::MAX, u64::MAX - 63, trailer as u64] {
        assert!(refused(32, offset).contains("does not lie between"), "{offset}");
    }
    assert!(refused(40, u64::MAX).contains("more than 1000000"));
    assert!(refused(40, 1_000_000).contains("does not lie between"));
    assert!(refused(48, u64::MAX).contains("cannot have"));
}

#[test]
fn a_stack_is_as_large_as_its_topmost_layer_that_has_a_size() {
    let layer = |size: u64| {
        let bytes = NativeWriter::new(Vec::new(), Bytes(size), LayerIdentity::default())
            .unwrap()
            .finish()
            .unwrap();
        LsmtLayer::open(&memory(bytes), TagMeaning::Plain).unwrap()
    };
    let (none, small, large) = (layer(0), layer(512), layer(1024));
    assert_eq!(Stack::merge(&[&small, &large, &none]).unwrap().virtual_size(), Bytes(1024));
    assert_eq!(Stack::merge(&[&large, &small]).unwrap().virtual_size(), Bytes(512));
    assert!(Stack::merge(&[&none]).is_err());
    assert!(Stack::merge(&[]).is_err());
    assert!(Stack::merge(&vec![&small; 255]).is_ok());
    assert!(Stack::merge(&vec![&small; 256]).is_err());
}

/// A call of a writer: gap before it, sectors, kind (0 data, 1 remote, 2 zeroed), and position.
type Call = (u64, u64, u8, u64);

const DISK: u64 = 60_000;

/// The content of every sector, by the calls.
type Model = BTreeMap<u64, (u8, RunPlace)>;

/// Writes a layer, reads it, and applies its sectors to `model`.
fn write(calls: &[Call], number: u8, model: &mut Model, payloads: &mut Vec<Vec<u8>>) -> LsmtLayer {
    let mut writer = WarpWriter::new(Bytes(DISK * 512)).unwrap();
    writer.metadata(Sectors(0), &[0xee; 512]).unwrap();
    model.insert(0, (number, RunPlace::Own(FIRST_SECTOR)));
    let (mut lba, mut own) = (1, FIRST_SECTOR.0 + 1);
    for &(gap, len, kind, target) in calls {
        lba += gap;
        let len = len.min(DISK.saturating_sub(lba));
        for sector in 0..len {
            let place = match kind {
                0 => RunPlace::Own(Sectors(own + sector)),
                1 => RunPlace::Remote(Sectors(target + sector)),
                _ => RunPlace::Zero,
            };
            model.insert(lba + sector, (number, place));
        }
        match kind {
            0 => {
                let bytes: Vec<u8> =
                    (0..len * 512).map(|at| (lba + at / 512) as u8 ^ number).collect();
                writer.metadata(Sectors(lba), &bytes).unwrap();
                own += len;
            }
            1 => writer.remote(Sectors(lba), Sectors(len), Sectors(target)).unwrap(),
            _ => writer.zeroed(Sectors(lba), Sectors(len)).unwrap(),
        }
        lba += len;
        if lba >= DISK {
            break;
        }
    }
    let mut bytes = Vec::new();
    writer.finish(&mut bytes).unwrap();
    let layer = LsmtLayer::open(&memory(bytes.clone()), TagMeaning::Warp).unwrap();
    payloads.push(bytes);
    layer
}

fn calls() -> impl Strategy<Value = Vec<Call>> {
    let len = prop_oneof![8 => 1_u64..200, 1 => 16_300_u64..16_400, 1 => 32_700_u64..33_000];
    let gap = prop_oneof![1 => Just(0_u64), 2 => 1_u64..300];
    prop::collection::vec((gap, len, 0_u8..3, 0_u64..1 << 40), 0..12)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]
    #[test]
    fn a_stack_answers_as_a_map_of_sectors_does(
        layers in prop::collection::vec(calls(), 1..6),
        places in prop::collection::vec((0..DISK, 1_u64..5000), 40),
    ) {
        let (mut model, mut payloads) = (Model::new(), Vec::new());
        let opened: Vec<_> = layers.iter().enumerate()
            .map(|(number, calls)| write(calls, number as u8, &mut model, &mut payloads))
            .collect();
        let stack = Stack::merge(&opened.iter().collect::<Vec<_>>()).unwrap();
        let whole = [(0, DISK)];
        for &(lba, len) in places.iter().chain(&whole) {
            let mut at = lba;
            for run in stack.look_up(Sectors(lba), Sectors(len)) {
                prop_assert_eq!(run.lba.0, at);
                prop_assert!(run.len.0 > 0);
                for sector in 0..run.len.0 {
                    let expected = model.get(&(at + sector)).copied();
                    let place = match run.place {
                        RunPlace::Zero => RunPlace::Zero,
                        RunPlace::Own(from) => RunPlace::Own(from + Sectors(sector)),
                        RunPlace::Remote(from) => RunPlace::Remote(from + Sectors(sector)),
                    };
                    prop_assert_eq!(place, expected.map_or(RunPlace::Zero, |(_, place)| place));
                    if let (RunPlace::Own(from), Some((layer, _))) = (place, expected) {
                        prop_assert_eq!(run.layer, layer);
                        let byte = payloads[usize::from(layer)][from.bytes().0 as usize];
                        prop_assert!(at + sector == 0 || byte == (at + sector) as u8 ^ layer);
                    }
                }
                at += run.len.0;
            }
            prop_assert_eq!(at, lba + len);
        }
        let mapped: u64 = stack.extents().map(|extent| extent.len.0).sum();
        prop_assert_eq!(mapped, model.len() as u64);
    }
}
