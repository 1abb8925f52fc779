//! Tests of the whole module, against decoders of other projects.

use std::io::{Read as _, Write as _};
use std::process::{Command, Stdio};
use std::sync::Arc;

use proptest::prelude::*;

use super::*;
use crate::oci::Digest;
use crate::units::{Bits, Bytes};
use source::chunk::ChunkSource as _;
use source::{MemorySource, Proof};

/// Bytes that compress like a file tree: words, binary tables, runs, noise.
fn sample(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let mut random = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let words: Vec<Vec<u8>> = (0..400)
        .map(|_| (0..3 + random() % 9).map(|_| b'a' + (random() % 26) as u8).collect())
        .collect();
    let mut data = Vec::with_capacity(len + 4096);
    while data.len() < len {
        match random() % 12 {
            0 => data.extend((0..random() % 3000).map(|_| random() as u8)),
            1 => data.resize(data.len() + (random() % 5000) as usize, 0),
            2 => {
                for i in 0..random() % 500 {
                    data.extend((i * 7 + (random() & 3)).to_le_bytes());
                }
            }
            3 if data.len() > 40_000 => {
                let from = data.len() - (random() % 33_000) as usize - 1;
                let copy = data[from..(from + 2000).min(data.len())].to_vec();
                data.extend(copy);
            }
            _ => {
                for _ in 0..random() % 300 {
                    data.extend(&words[(random() % 400) as usize]);
                    data.push(b' ');
                }
            }
        }
    }
    data.truncate(len);
    data
}

/// Pipes `data` through a program.
fn pipe(program: &str, args: &[&str], data: &[u8]) -> Vec<u8> {
    let mut child = Command::new(program)
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let data = data.to_vec();
    let writer = std::thread::spawn(move || stdin.write_all(&data).unwrap());
    let output = child.wait_with_output().unwrap();
    writer.join().unwrap();
    assert!(output.status.success());
    output.stdout
}

fn flate2_gzip(data: &[u8], level: u32) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::new(level));
    encoder.write_all(data).unwrap();
    encoder.finish().unwrap()
}

fn libdeflate_gzip(data: &[u8], level: i32) -> Vec<u8> {
    let mut compressor =
        libdeflater::Compressor::new(libdeflater::CompressionLvl::new(level).unwrap());
    let mut out = vec![0; compressor.gzip_compress_bound(data.len())];
    let len = compressor.gzip_compress(data, &mut out).unwrap();
    out.truncate(len);
    out
}

/// The gzip member around a raw deflate stream.
fn member(deflate: &[u8], data: &[u8]) -> Vec<u8> {
    let mut gzip = vec![0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 255];
    gzip.extend(deflate);
    gzip.extend(crc32fast::hash(data).to_le_bytes());
    gzip.extend((data.len() as u32).to_le_bytes());
    gzip
}

/// A gzip of stored blocks of at most `block` bytes.
fn stored_gzip(data: &[u8], block: usize) -> Vec<u8> {
    let mut deflate = Vec::new();
    let count = data.len().div_ceil(block);
    for (i, piece) in data.chunks(block).enumerate() {
        deflate.push(u8::from(i + 1 == count));
        deflate.extend((piece.len() as u16).to_le_bytes());
        deflate.extend((!(piece.len() as u16)).to_le_bytes());
        deflate.extend(piece);
    }
    member(&deflate, data)
}

/// A gzip of one fixed block with literals only.
fn fixed_gzip(data: &[u8]) -> Vec<u8> {
    let (mut bits, mut count, mut deflate) = (0u64, 0, Vec::new());
    let mut put = |value: u32, len: u32| {
        bits |= u64::from(value) << count;
        count += len;
        while count >= 8 {
            deflate.push(bits as u8);
            bits >>= 8;
            count -= 8;
        }
    };
    put(3, 3);
    for &byte in data {
        let byte = u32::from(byte);
        if byte < 144 {
            put((0x30 + byte).reverse_bits() >> 24, 8);
        } else {
            put((0x190 + byte - 144).reverse_bits() >> 23, 9);
        }
    }
    put(0, 7);
    put(0, 7);
    member(&deflate, data)
}

fn scan_in(
    gzip: &[u8],
    span: u64,
    pieces: &mut dyn FnMut() -> usize,
) -> Result<(GzipIndex, Vec<u8>), GzipError> {
    let mut scanner = Scanner::new(ScanOptions { span: Bytes(span) });
    let mut hasher = GzipSegmentHasher::new();
    let mut out = Vec::new();
    let mut rest = gzip;
    while !rest.is_empty() {
        let (piece, after) = rest.split_at(pieces().clamp(1, rest.len()));
        rest = after;
        scanner.feed::<GzipError>(piece, &mut |bytes| {
            out.extend_from_slice(bytes);
            Ok(())
        })?;
        hasher.push(bytes::Bytes::copy_from_slice(piece));
        for boundary in scanner.take_boundaries() {
            hasher.boundary(boundary);
        }
    }
    let mut index = scanner.finish()?;
    let digest = hasher.finish(&mut index)?;
    assert_eq!(digest, Digest::of(gzip));
    Ok((index, out))
}

fn scan(gzip: &[u8], span: u64) -> Result<(GzipIndex, Vec<u8>), GzipError> {
    scan_in(gzip, span, &mut || usize::MAX)
}

fn layer(gzip: &[u8], index: GzipIndex) -> IndexedLayer {
    IndexedLayer::new("blob", index, Arc::new(MemorySource::new("blob", gzip))).unwrap()
}

/// Checks that every segment, decoded alone, equals its part of `data`.
fn assert_segments(gzip: &[u8], index: GzipIndex, data: &[u8]) {
    let layer = layer(gzip, index);
    let mut at = 0;
    for i in 0..layer.chunk_count() {
        let span = layer.chunk_at(at).unwrap();
        assert_eq!((span.index, span.start), (i, at));
        let chunk = layer.load(i).unwrap();
        assert!(chunk[..] == data[at as usize..][..span.len as usize], "segment {i}");
        at += u64::from(span.len);
    }
    assert_eq!(at, data.len() as u64);
    assert_eq!(layer.chunk_at(at), None);
}

/// Checks every property that holds for any valid stream.
fn assert_layer(name: &str, gzip: &[u8], data: &[u8]) -> GzipIndex {
    let mut last = None;
    for span in [64 << 10, 256 << 10, 1 << 20] {
        let (index, out) = scan(gzip, span).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert!(out == data, "{name}");
        for i in 0..index.segments() {
            let output = index.output(i);
            assert!(output.end - output.start <= 2 * span, "{name}: segment {i} of {span}");
        }
        assert_segments(gzip, index.clone(), data);

        let sidecar = |beside| Sidecar::write(&index, Digest::of(gzip), beside).unwrap();
        let alone = merge(None, Some(&sidecar(false))).unwrap();
        assert!(alone == index, "{name}");
        match ddgzidx::write(&index) {
            Ok(meta) => {
                let both = merge(Some(&meta), Some(&sidecar(true))).unwrap();
                assert!(both == index, "{name}");
                assert_segments(gzip, merge(Some(&meta), None).unwrap(), data);
            }
            Err(NoGzipMeta::ManyMembers { members }) => {
                assert!(members == index.members && members > 1);
            }
            Err(other) => panic!("{name}: {other}"),
        }
        last = Some(index);
    }
    last.unwrap()
}

#[test]
fn every_segment_of_every_compressor_decodes_alone() {
    let data = sample(3_000_000, 1);
    for level in ["-1", "-6", "-9"] {
        assert_layer(&format!("gzip {level}"), &pipe("gzip", &[level, "-c"], &data), &data);
    }
    for level in [0, 1, 6, 9] {
        assert_layer(&format!("miniz {level}"), &flate2_gzip(&data, level), &data);
    }
    for level in [1, 6, 12] {
        assert_layer(&format!("libdeflate {level}"), &libdeflate_gzip(&data, level), &data);
    }
    assert_layer("stored", &stored_gzip(&data, 65535), &data);
    assert_layer("stored, small", &stored_gzip(&data, 777), &data);
    let index = assert_layer("fixed", &fixed_gzip(&data), &data);
    assert!(
        index.checkpoints[1..]
            .iter()
            .all(|checkpoint| matches!(checkpoint.kind, CheckpointKind::MidBlock(_)))
    );
}

#[test]
fn parallel_gzip_is_one_member_with_many_flushes() {
    if Command::new("pigz").arg("--version").output().is_err() {
        return;
    }
    let data = sample(3_000_000, 2);
    assert_layer("pigz", &pipe("pigz", &["-p4", "-b128", "-c"], &data), &data);
    assert_layer("pigz -i", &pipe("pigz", &["-p4", "-i", "-c"], &data), &data);
}

#[test]
fn every_strategy_of_zlib_decodes() {
    const PROGRAM: &str = "import sys,zlib
d=sys.stdin.buffer.read()
c=zlib.compressobj(6,zlib.DEFLATED,31,int(sys.argv[2]),int(sys.argv[1]))
for i in range(0,len(d),70000):
  sys.stdout.buffer.write(c.compress(d[i:i+70000])+c.flush(zlib.Z_FULL_FLUSH if i%3 else zlib.Z_SYNC_FLUSH))
sys.stdout.buffer.write(c.flush())";
    if Command::new("python3").arg("--version").output().is_err() {
        return;
    }
    let data = sample(1_000_000, 3);
    for strategy in ["0", "1", "2", "3", "4"] {
        for memory in ["1", "9"] {
            let gzip = pipe("python3", &["-c", PROGRAM, strategy, memory], &data);
            assert_layer(&format!("strategy {strategy}, memory {memory}"), &gzip, &data);
        }
    }
}

#[test]
fn runs_noise_and_nothing_decode() {
    let zeros = vec![0; 20_000_000];
    assert_layer("zeros", &pipe("gzip", &["-6", "-c"], &zeros), &zeros);
    let mut noise = sample(100, 4);
    while noise.len() < 2_000_000 {
        let digest = Digest::of(&noise[noise.len() - 100..]);
        noise.extend(digest.0);
    }
    assert_layer("noise", &pipe("gzip", &["-6", "-c"], &noise), &noise);
    assert_layer("nothing", &pipe("gzip", &["-c"], b""), b"");
    assert_layer("one byte", &pipe("gzip", &["-c"], b"x"), b"x");
}

#[test]
fn members_are_walked_and_have_no_gzip_meta() {
    let data = sample(2_500_000, 5);
    let (mut large, mut tiny) = (Vec::new(), Vec::new());
    for piece in data.chunks(700_000) {
        large.extend(flate2_gzip(piece, 6));
    }
    for piece in data.chunks(2_500) {
        tiny.extend(flate2_gzip(piece, 6));
        if tiny.len() % 3 == 0 {
            tiny.extend(flate2_gzip(b"", 6));
        }
    }
    let index = assert_layer("large members", &large, &data);
    assert_eq!(index.members, 4);
    let index = assert_layer("tiny members", &tiny, &data);
    assert!(
        index.checkpoints.iter().all(|checkpoint| checkpoint.kind == CheckpointKind::MemberStart)
    );
    tiny.extend([0; 1000]);
    assert_layer("padded", &tiny, &data);
    tiny.extend([7, 0]);
    let at = Bytes(tiny.len() as u64 - 2);
    assert_eq!(scan(&tiny, 1 << 20).unwrap_err(), GzipError::TrailingGarbage { at });
}

#[test]
fn the_size_of_the_pieces_changes_nothing() {
    let data = sample(600_000, 6);
    let mut gzip = pipe("gzip", &["-1", "-c"], &data[..400_000]);
    gzip.extend(fixed_gzip(&data[400_000..]));
    let whole = scan(&gzip, 64 << 10).unwrap();
    assert!(whole.1 == data);
    for size in [1, 2, 7, 100, 4096, 70_000] {
        assert!(scan_in(&gzip, 64 << 10, &mut || size).unwrap() == whole, "{size}");
    }
}

#[test]
fn the_hashes_do_not_depend_on_when_a_boundary_is_told() {
    let gzip = flate2_gzip(&sample(900_000, 12), 6);
    let (index, _) = scan(&gzip, 64 << 10).unwrap();
    for early in [0, 1, index.segments()] {
        let mut hasher = GzipSegmentHasher::new();
        for checkpoint in &index.checkpoints[..early] {
            hasher.boundary(Boundary { bit: checkpoint.bit, out: checkpoint.out });
        }
        for piece in gzip.chunks(1000) {
            hasher.push(bytes::Bytes::copy_from_slice(piece));
        }
        let mut again = GzipIndex { sha256: None, layer: None, ..index.clone() };
        hasher.finish(&mut again).unwrap();
        assert!(again == index, "{early}");
    }
    let digests = index.sha256.as_ref().unwrap();
    for (i, digest) in digests.iter().enumerate() {
        let input = index.input(i);
        assert_eq!(*digest, Digest::of(&gzip[input.start as usize..input.end as usize]).0);
    }
}

#[test]
fn a_stream_cut_anywhere_is_an_error() {
    let data = sample(3000, 7);
    let mut gzip = flate2_gzip(&data[..1500], 6);
    let first = gzip.len();
    gzip.extend(fixed_gzip(&data[1500..]));
    for cut in (0..gzip.len()).filter(|&cut| cut != first) {
        assert_eq!(
            scan(&gzip[..cut], 1 << 20).unwrap_err(),
            GzipError::Truncated { at: Bytes(cut as u64) }
        );
    }
    assert!(scan(&gzip, 1 << 20).unwrap().1 == data);
}

#[test]
fn no_flipped_bit_goes_unnoticed() {
    let data = sample(3000, 8);
    let gzip = flate2_gzip(&data, 6);
    let (index, _) = scan(&gzip, 1 << 20).unwrap();
    for bit in 0..gzip.len() * 8 {
        let mut damaged = gzip.clone();
        damaged[bit / 8] ^= 1 << (bit % 8);
        // Time, system and flags of the header do not affect the data; neither do the bits behind the last
        // block.
        match scan(&damaged, 1 << 20) {
            Ok((_, out)) => assert!(out == data, "bit {bit}"),
            Err(_) => assert!(!(4..10).contains(&(bit / 8)), "bit {bit}"),
        }
        let layer = layer(&damaged, index.clone());
        assert_eq!(layer.load(0).is_ok(), bit / 8 < 10, "bit {bit}");
        let mut unhashed = index.clone();
        unhashed.sha256 = None;
        if let Ok(chunk) = self::layer(&damaged, unhashed).load(0) {
            assert!(chunk[..] == data);
        }
    }
}

#[test]
fn upstream_indexes_decode_upstream_layers() {
    for (name, meta) in [("base", "L0"), ("upper", "L1")] {
        let dir = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/interop/blobs");
        let gzip = std::fs::read(format!("{dir}/{name}.tar.gz")).unwrap();
        let meta = std::fs::read(format!("{dir}/turbooci-2-gz-{meta}-gzip.meta")).unwrap();
        let mut data = Vec::new();
        flate2::read::GzDecoder::new(&gzip[..]).read_to_end(&mut data).unwrap();
        let index = ddgzidx::read(&meta).unwrap();
        assert!(index.segments() > 1);
        assert_segments(&gzip, index, &data);
        let ours = ddgzidx::write(&assert_layer(name, &gzip, &data)).unwrap();
        assert!(ours.len() < meta.len() / 4, "{} against {}", ours.len(), meta.len());
    }
}

#[test]
fn an_index_of_another_layer_is_refused() {
    let (one, two) = (sample(300_000, 9), sample(300_000, 10));
    let (one, two) = (flate2_gzip(&one, 6), flate2_gzip(&two, 6));
    let (first, _) = scan(&one, 64 << 10).unwrap();
    let (second, _) = scan(&two, 64 << 10).unwrap();
    let meta = ddgzidx::write(&first).unwrap();
    let sidecar = Sidecar::write(&second, Digest::of(&two), true).unwrap();
    let error = merge(Some(&meta), Some(&sidecar)).unwrap_err();
    assert!(error.to_string().starts_with("The index belongs to another layer"), "{error}");
    let other: Arc<dyn source::ByteSource> = Arc::new(MemorySource::new("two", &two[1..]));
    assert!(matches!(IndexedLayer::new("two", second, other), Err(GzipError::OtherLayer { .. })));
    assert_eq!(merge(None, Some(&sidecar)), Err(GzipError::NoIndex { missing: GZIP_META_NAME }));
    assert!(merge(None, None).is_err());
}

#[test]
fn a_damaged_index_is_an_error_and_never_a_panic() {
    let data = sample(500_000, 11);
    let gzip = flate2_gzip(&data, 6);
    let (index, _) = scan(&gzip, 64 << 10).unwrap();
    let meta = ddgzidx::write(&index).unwrap();
    let sidecar = Sidecar::write(&index, Digest::of(&gzip), false).unwrap();
    for at in 0..sidecar.len() {
        let mut damaged = sidecar.clone();
        damaged[at] ^= 0x41;
        assert!(Sidecar::read(&damaged).is_err());
        assert!(Sidecar::read(&sidecar[..at]).is_err());
        // Damage that passes the checksum, too.
        let end = damaged.len() - 4;
        let crc = crc32fast::hash(&damaged[..end]);
        damaged[end..].copy_from_slice(&crc.to_le_bytes());
        if let Ok(index) = merge(None, Some(&damaged)) {
            load_all(&gzip, index);
        }
    }
    for at in 0..meta.len() {
        let mut damaged = meta.clone();
        damaged[at] ^= 0x41;
        assert!(at >= 333 || ddgzidx::read(&damaged).is_err());
        assert!(ddgzidx::read(&meta[..at]).is_err());
        let crc = !crc32c::crc32c_append(u32::MAX, &damaged[..329]);
        damaged[329..333].copy_from_slice(&crc.to_le_bytes());
        if let Ok(index) = ddgzidx::read(&damaged) {
            load_all(&gzip, index);
        }
    }
}

/// Loads every segment that a damaged index still describes; only panics matter.
#[test]
fn an_index_with_the_right_checksums_and_another_window_or_boundary_is_another_proof() {
    let gzip = flate2_gzip(&sample(600_000, 3), 6);
    let (index, _) = scan(&gzip, 100_000).unwrap();
    let Proof::Table(table) = index.proof() else { panic!("it has checksums") };
    let sidecar = Sidecar::write(&index, Digest::of(&gzip), false).unwrap();
    assert_eq!(merge(None, Some(&sidecar)).unwrap().proof(), Proof::Table(table));
    let at = index.checkpoints.iter().position(|one| !one.window.is_none()).unwrap();
    let edits: [fn(&mut GzipIndex, usize); 6] = [
        |index, at| {
            let mut window = [0; inflate::marks::WINDOW];
            window[99] = 1;
            index.checkpoints[at].window = window::WindowPacker::new().pack(&window);
        },
        |index, at| index.checkpoints[at].out.0 += 1,
        |index, at| index.checkpoints[at].bit.0 += 1,
        |index, at| index.checkpoints[at].kind = CheckpointKind::MemberStart,
        |index, at| index.sha256.as_mut().unwrap()[at][31] ^= 1,
        |index, at| index.crc32.as_mut().unwrap()[at] ^= 1,
    ];
    for (number, edit) in edits.into_iter().enumerate() {
        let mut other = index.clone();
        edit(&mut other, at);
        let proof = other.proof();
        assert!(proof.is_complete() && proof != Proof::Table(table), "edit {number}");
    }
    // Without the checksums it says only where segments lie.
    let upstream = GzipIndex { sha256: None, crc32: None, ..index };
    assert!(matches!(upstream.proof(), Proof::Index(other) if other != table));
}

fn load_all(gzip: &[u8], index: GzipIndex) {
    if let Ok(layer) = IndexedLayer::new("blob", index, Arc::new(MemorySource::new("blob", gzip))) {
        for i in 0..layer.chunk_count().min(4) {
            let _ = layer.load(i);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn any_span_and_any_pieces_give_the_same_output(
        seed in 1u64.., len in 0usize..600_000, level in 0u32..10, span in 65_536u64..400_000, piece in 1usize..100_000,
    ) {
        let data = sample(len, seed);
        let gzip = flate2_gzip(&data, level);
        let (index, out) = scan(&gzip, span).unwrap();
        prop_assert!(out == data);
        let mut state = piece;
        let mut pieces = || { state = state * 31 % 100_003; state % piece + 1 };
        prop_assert!(scan_in(&gzip, span, &mut pieces).unwrap() == (index.clone(), out));
        assert_segments(&gzip, index, &data);
    }

    #[test]
    fn no_input_makes_the_scan_panic(noise in prop::collection::vec(any::<u8>(), 0..2000), seed in any::<u64>()) {
        let mut gzip = vec![0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 3];
        gzip.extend(&noise);
        prop_assert!(scan(&gzip, 1 << 20).is_err());
        let mut gzip = flate2_gzip(&sample(50_000, seed), 6);
        for (i, &byte) in noise.iter().take(3).enumerate() {
            let at = (seed.rotate_left(i as u32 * 20) % gzip.len() as u64) as usize;
            gzip[at] ^= byte;
        }
        let _ = scan(&gzip, 1 << 16);
    }
}

#[test]
fn a_segment_longer_than_the_bound_is_refused_with_its_length() {
    let most = crate::segments::MAX_SEGMENT.0;
    let index = |compressed: u64, out: u64| GzipIndex {
        layer: None,
        span: DEFAULT_SPAN,
        compressed_len: Bytes(compressed),
        uncompressed_len: Bytes(out),
        members: 1,
        checkpoints: vec![Checkpoint {
            bit: Bits(0),
            out: Bytes(0),
            kind: CheckpointKind::MemberStart,
            window: SparseWindow::none(),
        }],
        crc32: None,
        sha256: None,
    };
    let open = |compressed: u64, out: u64| {
        let blob = Arc::new(MemorySource::new("blob", vec![0; compressed as usize]));
        IndexedLayer::new("blob", index(compressed, out), blob).map(|_| ())
    };
    assert!(open(most, most).is_ok());
    let long = |part, len| Err(GzipError::LongSegment { at: Bytes(0), part, len: Bytes(len) });
    assert_eq!(open(most, most + 1), long("decoded", most + 1));
    assert_eq!(open(most + 1, 1), long("compressed", most + 1));
    let text = open(most, most + 1).unwrap_err().to_string();
    assert!(text.contains("33554433 B") && text.contains("33554432 B"), "{text}");
}

#[test]
fn compressed_bytes_without_output_end_the_scan_before_they_become_too_long_a_segment() {
    let mut scanner = Scanner::new(ScanOptions::default());
    let mut sink = |_: &[u8]| -> Result<(), GzipError> { Ok(()) };
    scanner.feed(b"\x1f\x8b\x08\0\0\0\0\0\0\x03", &mut sink).unwrap();
    let empty = b"\0\0\0\xff\xff".repeat(1 << 16);
    let failed = (0..120).find_map(|_| scanner.feed(&empty, &mut sink).err());
    assert!(
        matches!(failed, Some(GzipError::LongSegment { part: "compressed", .. })),
        "{failed:?}"
    );
}

#[test]
fn windows_that_many_entries_share_are_not_copied_for_each() {
    let plain = sample(3 << 20, 5);
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::new(6));
    encoder.write_all(&plain).unwrap();
    let blob = encoder.finish().unwrap();
    let mut scanner = Scanner::new(ScanOptions { span: MIN_SPAN });
    scanner.feed(&blob, &mut |_| -> Result<(), GzipError> { Ok(()) }).unwrap();
    let file = ddgzidx::write(&scanner.finish().unwrap()).unwrap();
    assert!(ddgzidx::read(&file).is_ok());
    // All entries name the area of all windows.
    let number = |at: usize| u64::from_le_bytes(*file[at..].first_chunk().unwrap());
    let table_at = number(313) as usize;
    let mut table = Vec::new();
    flate2::read::ZlibDecoder::new(&file[table_at..]).read_to_end(&mut table).unwrap();
    let len = (table_at as u32 - 333).min(60_000);
    for entry in table.chunks_exact_mut(29) {
        entry[16..24].copy_from_slice(&333_u64.to_le_bytes());
        entry[25..29].copy_from_slice(&len.to_le_bytes());
    }
    let mut forged = file[..table_at].to_vec();
    forged[10] = 1;
    let mut packed = flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::new(6));
    packed.write_all(&table).unwrap();
    let packed = packed.finish().unwrap();
    forged.extend(&packed);
    let file_len = forged.len() as u64;
    forged[41..49].copy_from_slice(&file_len.to_le_bytes());
    forged[321..329].copy_from_slice(&(packed.len() as u64).to_le_bytes());
    let crc = !crc32c::crc32c_append(u32::MAX, &forged[..329]);
    forged[329..333].copy_from_slice(&crc.to_le_bytes());
    let error = ddgzidx::read(&forged).unwrap_err().to_string();
    assert!(error.contains("more bytes than the file holds"), "{error}");
}
