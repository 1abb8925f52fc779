//! Tests of `ZFile`s as a whole. The oracles are files that upstream's tools wrote.

use std::io::{Cursor, Write as _};
use std::path::Path;
use std::sync::Arc;

use proptest::prelude::*;

use super::*;
use source::testing::{ReadFault, FaultySource};
use source::{FileSource, MemorySource};

fn memory(bytes: Vec<u8>) -> Arc<dyn ByteSource> {
    Arc::new(MemorySource::new("test", bytes))
}

fn pack(plain: &[u8], options: Options) -> Vec<u8> {
    let mut writer = ZFileWriter::new(Cursor::new(Vec::new()), options).unwrap();
    writer.write_all(plain).unwrap();
    let (out, summary) = writer.finish().unwrap();
    assert_eq!(summary.len, out.get_ref().len() as u64);
    out.into_inner()
}

fn upstream(name: &str) -> Arc<dyn ByteSource> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/interop/blobs").join(name);
    Arc::new(FileSource::open(&path).unwrap())
}

/// Bytes that compress a little and do not repeat.
fn text(len: usize) -> Vec<u8> {
    (0..len)
        .map(
            |at| {
                if at % 7 < 3 { (at / 97) as u8 } else { (at.wrapping_mul(2654435761) >> 13) as u8 }
            },
        )
        .collect()
}

#[test]
fn upstreams_layer_is_wrapped_in_form_a_and_carries_valid_digests() {
    let source = upstream("native-2-L0-overlaybd.commit");
    let (inner, wrapping) = unwrap(source.clone()).unwrap();
    assert_eq!((wrapping, inner.len()), (Wrapping::TarPax, 11_259_925));
    let file = ZFile::open(inner.clone()).unwrap();
    assert_eq!(
        (file.record().flags, file.record().block_size, file.record().verify),
        (0x1b, 4096, true)
    );
    let mut trailer = [0; 512];
    inner.read_exact_at(&mut trailer, inner.len() - 512).unwrap();
    let trailer = ZFileHeader::parse(&trailer, "trailer", inner.len() - 512).unwrap();
    assert_eq!(trailer, ZFileHeader { flags: 0x16, ..file.record().clone() });
}

#[test]
fn our_records_and_our_tar_are_upstreams_bytes() {
    let source = upstream("native-2-L1-overlaybd.commit");
    let (inner, _) = unwrap(source.clone()).unwrap();
    let mut theirs = vec![0; source.len() as usize];
    source.read_exact_at(&mut theirs, 0).unwrap();
    let mut ours = wrap::head(inner.len());
    ours.extend_from_slice(&theirs[1536..1536 + inner.len() as usize]);
    wrap::write_tail(inner.len(), &mut ours).unwrap();
    assert!(ours == theirs);
    let file = ZFile::open(inner.clone()).unwrap();
    assert_eq!(file.record().encode(), theirs[1536..2048]);
    // From here on only the choice of LZ4 matches differs: the plain bytes read back.
    let plain = file.read_all().unwrap();
    let again = ZFile::open(memory(pack(&plain, Options::default()))).unwrap();
    assert_eq!(again.record().flags, 0x1b);
    assert!(again.read_all().unwrap() == plain);
}

#[test]
fn a_streamed_file_is_read_by_its_trailer_and_both_give_the_same_blocks() {
    let plain = text(100_000);
    let mut writer = ZFileWriter::new(Vec::new(), Options::default()).unwrap();
    writer.write_all(&plain).unwrap();
    let (streamed, summary) = writer.finish_streaming().unwrap();
    let sought = pack(&plain, Options::default());
    assert_eq!((summary.len, summary.blocks), (sought.len() as u64, 25));
    assert_eq!(streamed[512..], sought[512..]);
    assert_ne!(streamed[..512], sought[..512]);
    assert_eq!(ZFile::open(memory(streamed)).unwrap().read_all().unwrap(), plain);
}

#[test]
fn a_file_written_behind_other_bytes_gets_its_header_in_the_right_place() {
    let mut out = Cursor::new(Vec::new());
    out.write_all(&[7; 1536]).unwrap();
    let mut writer = ZFileWriter::new(out, Options::default()).unwrap();
    writer.write_all(&text(5000)).unwrap();
    let (out, _) = writer.finish().unwrap();
    assert_eq!(out.position(), out.get_ref().len() as u64);
    let bytes = out.into_inner();
    assert_eq!(bytes[..1536], [7; 1536]);
    assert_eq!(bytes[1536..], pack(&text(5000), Options::default()));
}

#[test]
fn an_incompressible_block_of_64_kib_is_refused_because_upstream_cannot_read_it() {
    let noise: Vec<u8> = {
        let mut state = 1_u64;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state as u8
        };
        (0..65536).map(|_| next()).collect()
    };
    for algo in [Algo::Lz4, Algo::Zstd] {
        let options = |block_size| Options { algo, block_size, ..Options::default() };
        let mut writer = ZFileWriter::new(Vec::new(), options(65536)).unwrap();
        assert!(writer.write_all(&noise).is_err());
        // The failure stays: later blocks would not form a valid file.
        assert!(matches!(
            writer.finish_streaming(),
            Err(ZFileError::BlockTooLong { block: 0, .. })
        ));
        assert_eq!(
            ZFile::open(memory(pack(&noise, options(32768)))).unwrap().read_all().unwrap(),
            noise
        );
    }
}

#[test]
fn garbage_that_old_files_carry_is_tolerated() {
    // A header like that of upstream's `ext4_64` of 2021: stray flag bits, digests, and padding.
    let mut bytes = pack(&text(9000), Options::default());
    let end = bytes.len();
    for at in [0, end - 512] {
        let clean = bytes[at + 32];
        bytes[at + 32] = clean & !0x18 | 0x40; // no digest, not overwritten
        bytes[at + 33..at + 38].fill(0xa5);
        bytes[at + 28..at + 32].fill(0xee);
        bytes[at + 64..at + 68].fill(0xee);
        bytes[at + 96..at + 512].fill(0x5a);
    }
    bytes[40..64].fill(0xff);
    assert_eq!(ZFile::open(memory(bytes)).unwrap().read_all().unwrap(), text(9000));
}

#[test]
fn every_cut_and_every_flipped_bit_is_an_error_or_harmless() {
    for verify in [true, false] {
        let plain = text(20_000);
        let whole = pack(&plain, Options { verify, ..Options::default() });
        for len in (0..whole.len()).step_by(64) {
            let cut = memory(whole[..len].to_vec());
            assert!(ZFile::open(cut).is_err(), "cut at {len}");
        }
        for bit in 0..whole.len() * 8 {
            let source = memory(whole.clone());
            let faults = vec![ReadFault::FlipAt(bit as u64 / 8, 1 << (bit % 8))];
            let flipped = Arc::new(FaultySource::new(source, faults));
            let result = ZFile::open(flipped).and_then(|file| file.read_all());
            if verify {
                assert!(result.is_err() || result.unwrap() == plain, "bit {bit}");
            }
        }
    }
}

#[test]
fn hostile_numbers_are_refused_before_anything_is_allocated() {
    let whole = pack(&text(20_000), Options::default());
    let header = ZFileHeader::parse(whole.first_chunk().unwrap(), "test", 0).unwrap();
    let refused = |change: &dyn Fn(&mut ZFileHeader)| {
        let mut record = header.clone();
        change(&mut record);
        let mut bytes = whole.clone();
        bytes[..512].copy_from_slice(&record.encode());
        ZFile::open(memory(bytes)).map(|_| ()).unwrap_err().to_string()
    };
    assert!(refused(&|record| record.index_size = u64::MAX).contains("more than 1000000000"));
    assert!(refused(&|record| record.index_size = 999_999_999).contains("take 5"));
    let many = refused(&|record| (record.index_size, record.original_size) = (1 << 29, 1 << 41));
    assert!(many.contains("end past byte"), "{many}");
    assert!(refused(&|record| record.index_offset = u64::MAX).contains("end past byte"));
    assert!(refused(&|record| record.dict_size = u32::MAX).contains("not at its beginning"));
    assert!(refused(&|record| record.block_size = 1 << 20).contains("not a power of two"));
}

#[test]
fn a_form_b_archive_is_seen_through_and_other_archives_are_refused() {
    let file = pack(&text(3000), Options::default());
    let archive = |kind: u8, size: u64| {
        let mut header = tar::Header::new_ustar();
        header.set_path("overlaybd.commit").unwrap();
        header.set_size(size);
        header.set_entry_type(tar::EntryType::new(kind));
        header.set_cksum();
        let mut bytes = header.as_bytes().to_vec();
        bytes.extend_from_slice(&file);
        bytes.resize(bytes.len().next_multiple_of(512) + 1024, 0);
        memory(bytes)
    };
    let (inner, wrapping) = unwrap(archive(b'0', file.len() as u64)).unwrap();
    assert_eq!((wrapping, inner.len()), (Wrapping::Tar, file.len() as u64));
    assert_eq!(open(archive(b'0', file.len() as u64)).unwrap().read_all().unwrap(), text(3000));
    assert!(unwrap(archive(b'5', file.len() as u64)).is_err());
    assert!(unwrap(archive(b'0', 1 << 32)).is_err());
    assert!(unwrap(archive(b'x', 100)).is_err());
    // Not an archive: returned unchanged.
    assert_eq!(unwrap(memory(file)).unwrap().1, Wrapping::Raw);
}

#[test]
fn no_flipped_bit_of_a_tar_header_makes_a_reader_panic() {
    let file = pack(&text(3000), Options::default());
    let mut whole = wrap::head(file.len() as u64);
    whole.extend_from_slice(&file);
    wrap::write_tail(file.len() as u64, &mut whole).unwrap();
    let source = memory(whole);
    assert_eq!(open(source.clone()).unwrap().read_all().unwrap(), text(3000));
    for bit in 0..1536 * 8 {
        let flipped = Arc::new(FaultySource::new(
            source.clone(),
            vec![ReadFault::FlipAt(bit / 8, 1 << (bit % 8))],
        ));
        // With a broken archive the source is returned unchanged, and that is not a `ZFile`.
        match open(flipped) {
            Ok(LayerPayload::ZFile(file)) => assert_eq!(file.read_all().unwrap(), text(3000)),
            Ok(LayerPayload::Plain(_)) | Err(_) => {}
        }
    }
}

#[test]
fn a_damaged_block_is_named_by_its_chunk() {
    let whole = pack(&text(300_000), Options::default());
    let source = memory(whole);
    let middle = source.len() / 2;
    let file =
        ZFile::open(Arc::new(FaultySource::new(source, vec![ReadFault::FlipAt(middle, 4)]))).unwrap();
    let chunks = ZFileChunks::new("id", Arc::new(file));
    assert_eq!(chunks.chunk_count(), 3);
    assert!(chunks.load(0).is_ok() && chunks.load(2).is_ok());
    let message = chunks.load(1).unwrap_err().to_string();
    assert!(message.starts_with("Chunk 1 of test (bytes"), "{message}");
    assert!(chunks.load(3).is_err());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn every_file_reads_back_anywhere(
        runs in prop::collection::vec((any::<u8>(), 0_usize..20_000, any::<bool>()), 0..12),
        block in 12_u32..=16,
        zstd: bool,
        verify: bool,
        places in prop::collection::vec((any::<prop::sample::Index>(), any::<prop::sample::Index>()), 8),
    ) {
        let mut plain = Vec::new();
        for (byte, len, noisy) in runs {
            plain.extend((0..len).map(|at| if noisy { byte ^ (at.wrapping_mul(2654435761) >> 17) as u8 & 15 } else { byte }));
        }
        let algo = if zstd { Algo::Zstd } else { Algo::Lz4 };
        let packed = pack(&plain, Options { algo, block_size: 1 << block, verify, level: 1 });
        prop_assert_eq!(&packed, &pack(&plain, Options { algo, block_size: 1 << block, verify, level: 1 }));
        let file = Arc::new(ZFile::open(memory(packed)).unwrap());
        prop_assert!(file.read_all().unwrap() == plain);
        for (start, len) in places {
            let start = start.index(plain.len() + 1);
            let len = len.index(plain.len() - start + 1);
            let mut part = vec![0; len];
            file.read_exact_at(&mut part, start as u64).unwrap();
            prop_assert!(part == plain[start..start + len]);
        }
        prop_assert!(file.read_exact_at(&mut [0], plain.len() as u64).is_err());
        let chunks = ZFileChunks::new("id", file);
        let mut joined = Vec::new();
        for index in 0..chunks.chunk_count() {
            let span = chunks.chunk_at(joined.len() as u64).unwrap();
            let chunk = chunks.load(index).unwrap();
            prop_assert_eq!((span.index, span.start, span.len as usize), (index, joined.len() as u64, chunk.len()));
            joined.extend_from_slice(&chunk);
        }
        prop_assert!(joined == plain && chunks.chunk_at(plain.len() as u64).is_none());
    }
}
