//! Tests with layers made by libzstd's encoder, cut by the scan, and decoded in every way.

use std::io::Write as _;
use std::sync::Arc;

use proptest::prelude::*;
use sha2::{Digest as _, Sha256};

use super::*;
use crate::oci::Digest;
use crate::segments::{
    FramesScanner, LONG, ScannedLayer, SegmentEntry, SegmentHasher, SegmentIndex, SegmentedLayer,
    sidecar,
};
use crate::units::Bytes;
use source::MemorySource;
use source::chunk::{ChunkSource, EncodedChunk, SerialChunks};
use source::testing::{FaultySource, ReadFault};

const SPAN: Bytes = Bytes(64 << 10);

/// Bytes that compress to some degree.
fn plain(seed: u32, len: usize) -> Vec<u8> {
    let mut state = seed | 1;
    (0..len)
        .map(|at| {
            if at % 3 == 0 {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            }
            (state >> 24) as u8 & 0x3f
        })
        .collect()
}

fn frame(bytes: &[u8]) -> Vec<u8> {
    zstd::encode_all(bytes, 3).unwrap()
}

fn frame_with(bytes: &[u8], tune: impl FnOnce(&mut zstd::Encoder<'_, Vec<u8>>)) -> Vec<u8> {
    let mut encoder = zstd::Encoder::new(Vec::new(), 3).unwrap();
    tune(&mut encoder);
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn skipped(len: u32) -> Vec<u8> {
    let mut frame = vec![0x5a, 0x2a, 0x4d, 0x18];
    frame.extend(len.to_le_bytes());
    frame.resize(8 + len as usize, 0x77);
    frame
}

/// Scans a layer of several frames, in pieces of `cut` bytes.
fn scan(layer: &[u8], cut: usize) -> Result<(SegmentIndex, Vec<u8>), ZstdError> {
    let mut scanner = FramesScanner::new(SPAN)?;
    let mut hasher = SegmentHasher::new();
    let mut out = Vec::new();
    for piece in layer.chunks(cut.max(1)) {
        scanner.feed(piece, &mut |bytes| {
            out.extend_from_slice(bytes);
            Ok::<_, ZstdError>(())
        })?;
        hasher.push(bytes::Bytes::copy_from_slice(piece));
        scanner.take_segments().iter().for_each(|range| hasher.segment(range));
        hasher.forget_before(scanner.keep_from());
    }
    Ok((scanner.finish()?.with_digests(hasher).unwrap(), out))
}

fn layer_of(blob: &[u8], index: SegmentIndex) -> SegmentedLayer {
    SegmentedLayer::new("layer", index, Arc::new(MemorySource::new("layer", blob.to_vec())))
        .unwrap()
}

/// Checks the properties of any index: each segment has its digest, and decodes to its part of the output.
fn check(blob: &[u8], index: &SegmentIndex, out: &[u8]) {
    let ScannedLayer { compressed_len, uncompressed_len, .. } = index.scanned();
    assert_eq!((compressed_len.0, uncompressed_len.0), (blob.len() as u64, out.len() as u64));
    assert_eq!(index.layer(), Digest::of(blob));
    let layer = layer_of(blob, index.clone());
    for (number, segment) in (0..).zip(index.segments()) {
        let input = segment.input();
        let bytes = &blob[input.start as usize..input.end as usize];
        assert_eq!(index.sha256()[number as usize], Sha256::digest(bytes)[..]);
        if !layer.is_serial(number) {
            assert_eq!(segment.entry, SegmentEntry::Start);
            let output = segment.output();
            let expected = &out[output.start as usize..output.end as usize];
            assert!(layer.load(number).unwrap()[..] == *expected, "segment {number}");
        }
    }
    let mut number = 0;
    while number < layer.chunk_count() {
        let serial = layer.frame(number);
        if serial.len() > 1 {
            let mut at = index.segments()[number as usize].out as usize;
            layer
                .load_frame(serial.clone(), &mut |bytes| {
                    assert!(bytes == &out[at..at + bytes.len()], "at {at}");
                    at += bytes.len();
                })
                .unwrap();
        }
        number = serial.end;
    }
    assert_eq!(&sidecar::read(&sidecar::write(index)).unwrap(), index);
}

#[test]
fn many_frames_are_segments_about_a_span_long_and_each_decodes_alone() {
    let mut layer = Vec::new();
    let mut whole = Vec::new();
    for (number, len) in
        [3000, 70_000, 20_000, 30_000, 0, 5, 200_000, 64 << 10, 1].iter().enumerate()
    {
        let part = plain(number as u32 + 1, *len);
        layer.extend(frame(&part));
        layer.extend(skipped(5));
        whole.extend(part);
    }
    layer.extend(skipped(100_000));
    for cut in [1, 7, 4096, usize::MAX / 2] {
        let (index, out) = scan(&layer, cut.min(layer.len())).unwrap();
        assert!(out == whole);
        check(&layer, &index, &out);
        let lens: Vec<u32> = index.segments().iter().map(|segment| segment.out_len).collect();
        assert_eq!(lens, [3000, 70_000, 50_005, 200_000, 64 << 10, 1], "cut {cut}");
        // Bytes skipped at the end belong to no segment.
        assert!(index.segments().last().unwrap().input().end < layer.len() as u64 - 100_000);
        assert_eq!(index.longest_serial(), Bytes(0));
    }
}

#[test]
fn a_long_frame_is_cut_between_its_blocks_and_decodes_from_its_beginning() {
    let (small, long) = (plain(1, 10_000), plain(2, (LONG.0 as usize) + 300_000));
    let just = plain(3, LONG.0 as usize);
    let layer = [frame(&small), frame(&long), frame(&small), frame(&just), frame(&long)].concat();
    let whole = [&small[..], &long, &small, &just, &long].concat();
    let (index, out) = scan(&layer, 50_000).unwrap();
    assert!(out == whole);
    check(&layer, &index, &out);
    assert_eq!(index.longest_serial(), Bytes(long.len() as u64));
    let serial = index.serial(1);
    assert!(serial.len() > 30 && serial.start == 1, "{serial:?}");
    for segment in &index.segments()[1..serial.end as usize - 1] {
        assert!((SPAN.0..SPAN.0 + (128 << 10)).contains(&segment.out_len.into()), "{segment:?}");
    }
    // A frame just below the limit of a long one is one segment.
    let exact = &index.segments()[serial.end as usize + 1];
    assert_eq!((exact.out_len as usize, exact.entry), (just.len(), SegmentEntry::Start));
    // A chunk of it is not decoded alone, whatever the result would be.
    let layer = layer_of(&layer, index);
    let mut encoded = EncodedChunk::new(&layer.encoded(2).unwrap(), Vec::new());
    let mut room = vec![0; layer.room(2)];
    let refused = layer.decode(2, &mut encoded, &mut room).unwrap_err().to_string();
    assert!(refused.contains("only after the earlier segments"), "{refused}");
    assert!(layer.begin_frame(2).is_err());
    assert!(layer.load(5).unwrap()[..] == whole[index_of(&layer, 5)]);
}

fn index_of(layer: &SegmentedLayer, number: usize) -> std::ops::Range<usize> {
    let output = layer.index().segments()[number].output();
    output.start as usize..output.end as usize
}

#[test]
fn checksums_content_sizes_and_levels_make_no_difference() {
    let bytes = plain(9, 300_000);
    let frames = [
        frame_with(&bytes, |encoder| encoder.include_checksum(true).unwrap()),
        frame_with(&bytes, |encoder| encoder.set_pledged_src_size(Some(300_000)).unwrap()),
        zstd::bulk::compress(&bytes, 19).unwrap(),
        zstd::bulk::compress(&[7; 200], 1).unwrap(),
        zstd::bulk::compress(&vec![0; 1 << 20], 1).unwrap(),
        frame(b""),
    ];
    for layer in &frames {
        let expected = zstd::decode_all(&layer[..]).unwrap();
        let (index, out) = scan(layer, 1000).unwrap();
        assert!(out == expected);
        check(layer, &index, &out);
    }
    let all = frames.concat();
    let (index, out) = scan(&all, 12_345).unwrap();
    check(&all, &index, &out);
}

#[test]
fn a_window_that_is_too_large_a_dictionary_and_what_is_no_frame_are_refused_by_name() {
    let refused = |bytes: &[u8]| scan(bytes, 3).map(|_| ()).unwrap_err().to_string();
    let large = frame_with(&plain(1, 100), |encoder| encoder.window_log(28).unwrap());
    assert!(refused(&large).contains("needs a window of 268435456 bytes"), "{}", refused(&large));
    let just = frame_with(&plain(1, 100), |encoder| encoder.window_log(27).unwrap());
    assert!(scan(&just, 3).is_ok());
    assert_eq!(window(&just), Some(MAX_WINDOW));
    assert_eq!((window(&just[..5]), window(&skipped(3)), window(b"")), (None, None, None));
    assert_eq!(window(&zstd::bulk::compress(&[7; 5000], 1).unwrap()), Some(5000));
    // A frame of one segment of 1 GiB: it has no window field.
    let single = [0x28, 0xb5, 0x2f, 0xfd, 0xa0, 0, 0, 0, 0x40, 0, 0, 0];
    assert!(refused(&single).contains("window of 1073741824"), "{}", refused(&single));
    let dictionary = [0x28, 0xb5, 0x2f, 0xfd, 0x21, 9, 4, 0x21, 0, 0];
    assert!(refused(&dictionary).contains("the dictionary 9"), "{}", refused(&dictionary));
    let garbage = [frame(&plain(1, 100)), b"and so on".to_vec()].concat();
    assert!(refused(&garbage).contains("neither a frame nor a skippable frame"));
    let good = frame(&plain(1, 100_000));
    for len in [1, 3, 6, 20, good.len() - 1] {
        assert!(refused(&good[..len]).contains("inside a frame"), "{len}");
    }
    assert!(refused(&skipped(9)[..12]).contains("inside a frame"));
    assert!(
        is_zstd(&good)
            && is_zstd(&skipped(0))
            && !is_zstd(&[0x28, 0xb5])
            && !is_zstd(b"\x60*M\x18")
    );
}

/// libzstd's two decoders treat this block differently, so the scan would accept a frame that a reader
/// refuses.
#[test]
fn an_empty_compressed_block_is_refused_by_name() {
    let header = [0x28, 0xb5, 0x2f, 0xfd, 0, 0x58];
    let block = |kind: u8, size: u8| [size << 3 | kind << 1, 0, 0];
    let last_raw = [1, 0, 0];
    let empty = [&header[..], &block(2, 0), &last_raw].concat();
    let refused = scan(&empty, 4).unwrap_err().to_string();
    assert!(refused.contains("a compressed block is empty"), "{refused}");
    // A block with stored content may be empty.
    let stored = [&header[..], &block(0, 0), &block(0, 2), b"hi", &last_raw].concat();
    assert_eq!(scan(&stored, 4).unwrap().1, b"hi");
}

#[test]
fn a_wrong_byte_never_comes_out() {
    let long = frame(&plain(4, (LONG.0 as usize) + 100_000));
    let layer = [frame(&plain(5, 100_000)), long].concat();
    let (index, _) = scan(&layer, 4096).unwrap();
    for at in (0..layer.len()).step_by(layer.len() / 37) {
        let blob = Arc::new(MemorySource::new("layer", layer.clone()));
        let faulty = FaultySource::new(blob, vec![ReadFault::FlipAt(at as u64, 0x10)]);
        let damaged = SegmentedLayer::new("layer", index.clone(), Arc::new(faulty)).unwrap();
        let number = index.segments().iter().position(|one| one.input().contains(&(at as u64)));
        let number = number.unwrap() as u32;
        let error = damaged.load(number).unwrap_err().to_string();
        assert!(
            error.contains("SHA-256") && error.contains(&format!("Chunk {number} ")),
            "{error}"
        );
    }
    let short = Arc::new(MemorySource::new("layer", layer[1..].to_vec()));
    assert!(SegmentedLayer::new("layer", index, short).is_err());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Any chain of frames in any pieces: the segments yield its output.
    #[test]
    fn any_chain_of_frames_is_indexed(
        frames in proptest::collection::vec((any::<u32>(), 0_usize..150_000, 0_u32..3), 1..12),
        cut in 1_usize..200_000,
    ) {
        let mut layer = Vec::new();
        for (seed, len, kind) in frames {
            match kind {
                0 => layer.extend(skipped(len as u32)),
                1 => layer.extend(frame(&plain(seed, len))),
                _ => layer.extend(frame_with(&vec![0; len], |encoder| encoder.include_checksum(true).unwrap())),
            }
        }
        let (index, out) = scan(&layer, cut).unwrap();
        prop_assert!(out == zstd::decode_all(&layer[..]).unwrap());
        check(&layer, &index, &out);
    }

    /// Damage yields an error or does not matter. It causes no panic and takes no large amount of memory.
    #[test]
    fn damaged_layers_are_refused_or_decode_to_what_libzstd_says(at in any::<prop::sample::Index>(), bits in 1_u8.., cut in 1_usize..5000) {
        let mut layer = [frame(&plain(1, 30_000)), skipped(10), frame(&plain(2, 100_000))].concat();
        let at = at.index(layer.len());
        layer[at] ^= bits;
        if let Ok((index, out)) = scan(&layer, cut) {
            prop_assert!(zstd::decode_all(&layer[..]).unwrap() == out);
            check(&layer, &index, &out);
        }
    }
}
