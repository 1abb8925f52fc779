//! Any bytes as a gzip layer: libdeflate reads the same from a layer that the scan accepts, and every segment
//! decodes alone; of a damaged blob, a segment is right or an error.
//!
//! A mutation hardly ever leaves a stream with the right CRC-32, so the bytes are also taken as bare deflate,
//! and miniz finds its end and its trailer.
#![no_main]

use libfuzzer_sys::fuzz_target;
use std::sync::Arc;

use flate2::{Crc, Decompress, FlushDecompress, Status};
use formats::gzip::{GzipError, GzipIndex, IndexedLayer, ScanOptions, Scanner};
use formats::units::Bytes;
use source::MemorySource;
use source::chunk::ChunkSource as _;

/// Limit on the output: a few bytes may inflate to a thousand times as many.
const MOST: usize = 2 << 20;
const HEADER: [u8; 10] = [0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 255];

fuzz_target!(|data: &[u8]| {
    let [mode, piece, data @ ..] = data else { return };
    // From one byte at a time to everything at once.
    let piece = 1 << (piece % 17);
    if mode & 1 == 0 {
        check(data, piece, *mode);
        return;
    }
    let mut blob = HEADER.to_vec();
    match inflate(data) {
        Some((len, plain)) => {
            blob.extend_from_slice(&data[..len]);
            let mut crc = Crc::new();
            crc.update(&plain);
            blob.extend_from_slice(&crc.sum().to_le_bytes());
            blob.extend_from_slice(&crc.amount().to_le_bytes());
            if mode & 2 != 0 {
                blob.extend_from_within(..);
            }
            check(&blob, piece, *mode);
        }
        None => {
            blob.extend_from_slice(data);
            let _ = scan(&blob, piece);
        }
    }
});

/// Length of the deflate stream at the start of `data`, and its contents.
fn inflate(data: &[u8]) -> Option<(usize, Vec<u8>)> {
    let mut miniz = Decompress::new(false);
    let mut plain = Vec::with_capacity(64 << 10);
    loop {
        let rest = &data[miniz.total_in() as usize..];
        match miniz.decompress_vec(rest, &mut plain, FlushDecompress::Finish) {
            Ok(Status::StreamEnd) => return Some((miniz.total_in() as usize, plain)),
            Ok(_) if plain.len() == plain.capacity() && plain.len() < MOST => {
                plain.reserve(plain.len())
            }
            _ => return None,
        }
    }
}

fn scan(blob: &[u8], piece: usize) -> Result<(GzipIndex, Vec<u8>), GzipError> {
    let mut scanner = Scanner::new(ScanOptions { span: Bytes(64 << 10) });
    let mut output = Vec::new();
    for piece in blob.chunks(piece) {
        scanner.feed(piece, &mut |bytes| -> Result<(), GzipError> {
            output.extend_from_slice(bytes);
            if output.len() <= 2 * MOST {
                Ok(())
            } else {
                Err(GzipError::TooLarge { what: "the output" })
            }
        })?;
        scanner.take_boundaries();
    }
    Ok((scanner.finish()?, output))
}

fn check(blob: &[u8], piece: usize, mode: u8) {
    let scanned = scan(blob, piece);
    let Ok((index, output)) = scanned else { return };
    if index.members == 1 {
        let mut theirs = vec![0; output.len()];
        let len = libdeflater::Decompressor::new().gzip_decompress(blob, &mut theirs);
        assert_eq!(len.ok(), Some(output.len()));
        assert!(theirs == output);
    }
    let open = |blob: Vec<u8>, index: &GzipIndex| {
        IndexedLayer::new("fuzz", index.clone(), Arc::new(MemorySource::new("fuzz", blob))).unwrap()
    };
    let layer = open(blob.to_vec(), &index);
    let mut again = Vec::new();
    for segment in 0..layer.chunk_count() {
        again.extend_from_slice(&layer.load(segment).unwrap());
    }
    assert!(again == output);

    // Without the checksums of the index, any damage reaches the decoder.
    let index = GzipIndex { crc32: None, sha256: None, ..index };
    let mut damaged = blob.to_vec();
    for at in (usize::from(mode) * 7..damaged.len()).step_by(97) {
        damaged[at] ^= 1 << (mode >> 2 & 7);
    }
    let layer = open(damaged, &index);
    for segment in 0..layer.chunk_count() {
        if let Ok(bytes) = layer.load(segment) {
            let expected = layer.index().output(segment as usize);
            assert_eq!(bytes.len() as u64, expected.end - expected.start);
        }
    }
}
