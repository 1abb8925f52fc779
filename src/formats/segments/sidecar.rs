//! The segments of a layer as a file: `turbobd.segments`, version 2.
//!
//! [Version 1](crate::gzip::sidecar) is for gzip layers and is still written for them. A reader that knows
//! only version 1 refuses this one by its number. All numbers are little-endian, a varint is LEB128.
//!
//! | Offset | Size | Field |
//! |---|---|---|
//! | 0 | 8 | magic, `TBDSEGS` and NUL |
//! | 8 | 2 | version, 2 |
//! | 10 | 1 | encoding of the layer: 1 none, 2 zstd |
//! | 11 | 1 | flags, 0 |
//! | 12 | 4 | number of segments, *n* |
//! | 16 | 32 | SHA-256 of the layer blob |
//! | 48 | 8 | length of the layer blob |
//! | 56 | 8 | length of its output |
//! | 64 | 8 | span |
//! | 72 | | column: *n* × varint, bytes of the blob between the end of the previous segment and the start of this one |
//! | | | column: *n* × varint, length in the blob, at least 1 |
//! | | | column: *n* × varint, length of the output, at least 1 |
//! | | *n* | column: entry; 0 decodes alone, 1 only behind the previous segment |
//! | | 32 *n* | SHA-256 of the segment's bytes of the blob |
//! | | 4 *n* | CRC-32 of the segment's output |
//! | end − 4 | 4 | CRC-32 of everything before |
//!
//! Outputs follow each other without a gap and cover the whole output of the layer. Bytes of the blob that
//! belong to no segment are skippable or empty zstd frames.

use super::SegmentsError;
use super::columns::{Broken, Cursor, put_varint};
use super::index::{Encoding, MAX_SEGMENT, ScannedLayer, Segment, SegmentEntry, SegmentIndex};
use crate::oci::Digest;
use crate::units::Bytes;

const MAGIC: &[u8; 8] = b"TBDSEGS\0";
const VERSION: u16 = 2;
const HEADER: usize = 72;

/// Most output of a byte of zstd: a block of 4 bytes that repeats one byte yields 128 KiB (RFC 8878,
/// 3.1.1.2).
const MOST_YIELD: u64 = 32 << 10;

impl From<Broken> for SegmentsError {
    fn from(Broken { offset, rule }: Broken) -> Self {
        Self::Sidecar { offset, rule }
    }
}

/// True if this is a sidecar of version 2, complete or not.
#[must_use]
pub fn is_version_2(file: &[u8]) -> bool {
    file.starts_with(MAGIC) && file.get(8..10) == Some(&VERSION.to_le_bytes())
}

/// The bytes of `index` as a file.
#[must_use]
pub fn write(index: &SegmentIndex) -> Vec<u8> {
    let scanned = index.scanned();
    let mut file = MAGIC.to_vec();
    file.extend(VERSION.to_le_bytes());
    file.push(match scanned.encoding {
        Encoding::Plain => 1,
        Encoding::Zstd => 2,
    });
    file.push(0);
    file.extend((index.segments().len() as u32).to_le_bytes());
    file.extend(index.layer().0);
    for word in [scanned.compressed_len, scanned.uncompressed_len, scanned.span] {
        file.extend(word.0.to_le_bytes());
    }
    let mut end = 0;
    for segment in index.segments() {
        put_varint(&mut file, segment.start.saturating_sub(end));
        end = segment.input().end;
    }
    for segment in index.segments() {
        put_varint(&mut file, segment.len.into());
    }
    for segment in index.segments() {
        put_varint(&mut file, segment.out_len.into());
    }
    file.extend(
        index.segments().iter().map(|segment| u8::from(segment.entry == SegmentEntry::Inside)),
    );
    file.extend(index.sha256().as_flattened());
    for segment in index.segments() {
        file.extend(segment.crc32.to_le_bytes());
    }
    let crc = crc32fast::hash(&file);
    file.extend(crc.to_le_bytes());
    file
}

/// Reads a file of version 2.
///
/// # Errors
/// [`SegmentsError::Sidecar`] with the first broken rule.
pub fn read(file: &[u8]) -> Result<SegmentIndex, SegmentsError> {
    let at_end = |rule| SegmentsError::Sidecar { offset: file.len() as u64, rule };
    let Some((body, &crc)) = file.split_last_chunk::<4>() else {
        return Err(at_end("the file is empty"));
    };
    let mut cursor = Cursor::new(body);
    if cursor.array::<8>()? != *MAGIC {
        return Err(SegmentsError::Sidecar { offset: 0, rule: "the magic is not TBDSEGS" });
    }
    if u16::from_le_bytes(cursor.array()?) != VERSION {
        return Err(SegmentsError::Sidecar { offset: 8, rule: "the version is not 2" });
    }
    if crc32fast::hash(body) != u32::from_le_bytes(crc) {
        return Err(at_end("the file does not match its CRC-32"));
    }
    let encoding = match cursor.array()? {
        [1] => Encoding::Plain,
        [2] => Encoding::Zstd,
        _ => return Err(SegmentsError::Sidecar { offset: 10, rule: "the encoding is unknown" }),
    };
    if cursor.array()? != [0] {
        return Err(SegmentsError::Sidecar { offset: 11, rule: "unknown flags are set" });
    }
    let count = u32::from_le_bytes(cursor.array()?) as usize;
    let layer = Digest(cursor.array()?);
    let [compressed_len, uncompressed_len, span] = [cursor.u64()?, cursor.u64()?, cursor.u64()?];
    // Each segment takes at least three varints, a kind and two checksums.
    if count > (body.len() - HEADER) / 40 {
        return Err(cursor.broken("the number of segments does not fit the file").into());
    }
    let lens = [compressed_len, uncompressed_len];
    let mut segments = read_places(&mut cursor, count, encoding, lens)?;
    for (segment, entry) in segments.iter_mut().zip(cursor.take(count)?) {
        segment.entry = match (entry, encoding) {
            (0, _) => SegmentEntry::Start,
            (1, Encoding::Zstd) => SegmentEntry::Inside,
            _ => return Err(cursor.broken("a segment is of an unknown kind").into()),
        };
    }
    if segments.first().is_some_and(|first| first.entry == SegmentEntry::Inside) {
        return Err(cursor.broken("the first segment continues a segment before it").into());
    }
    let sha256 = cursor.take(32 * count)?.as_chunks().0.to_vec();
    let (words, _) = cursor.take(4 * count)?.as_chunks();
    for (segment, word) in segments.iter_mut().zip(words) {
        segment.crc32 = u32::from_le_bytes(*word);
    }
    if !cursor.is_at_end() {
        return Err(cursor.broken("bytes follow the last checksum").into());
    }
    let scanned = ScannedLayer {
        encoding,
        span: Bytes(span),
        compressed_len: Bytes(compressed_len),
        uncompressed_len: Bytes(uncompressed_len),
        segments,
    };
    Ok(SegmentIndex::new(layer, scanned, sha256))
}

/// Reads the three columns of positions and checks them against the lengths of the blob and of its output.
fn read_places(
    cursor: &mut Cursor<'_>,
    count: usize,
    encoding: Encoding,
    [compressed_len, uncompressed_len]: [u64; 2],
) -> Result<Vec<Segment>, Broken> {
    let mut gaps = Vec::with_capacity(count);
    for _ in 0..count {
        gaps.push(cursor.varint()?);
    }
    let mut lens = Vec::with_capacity(count);
    for _ in 0..count {
        lens.push(length(cursor)?);
    }
    let mut segments = Vec::with_capacity(count);
    let (mut end, mut out) = (0u64, 0u64);
    for (gap, len) in gaps.into_iter().zip(lens) {
        let out_len = length(cursor)?;
        let start = end.checked_add(gap).filter(|&start| start <= compressed_len);
        let start = start.ok_or(cursor.broken("a segment lies outside the layer"))?;
        // Both are at most 2³² above a length that was within bounds.
        end = start.saturating_add(len.into());
        if end > compressed_len {
            return Err(cursor.broken("a segment lies outside the layer"));
        }
        let possible = match encoding {
            Encoding::Plain => start == out && out_len == len,
            Encoding::Zstd => u64::from(out_len) <= u64::from(len) * MOST_YIELD,
        };
        if !possible {
            return Err(cursor.broken("the lengths of a segment contradict its encoding"));
        }
        segments.push(Segment { start, len, out, out_len, entry: SegmentEntry::Start, crc32: 0 });
        out = out.saturating_add(out_len.into());
    }
    if out != uncompressed_len {
        return Err(cursor.broken("the segments do not cover the output"));
    }
    Ok(segments)
}

/// Reads the length of a segment.
fn length(cursor: &mut Cursor<'_>) -> Result<u32, Broken> {
    let len = cursor.varint()?;
    let fits = (1..=MAX_SEGMENT.0).contains(&len);
    fits.then_some(len as u32).ok_or(cursor.broken("a segment is empty or impossibly long"))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn index(encoding: Encoding, places: &[(u64, u32, u32, bool)]) -> SegmentIndex {
        let (mut end, mut out) = (0, 0);
        let segments = places.iter().map(|&(gap, len, out_len, inside)| {
            let start = end + gap;
            let entry = if inside && out > 0 { SegmentEntry::Inside } else { SegmentEntry::Start };
            let segment = Segment { start, len, out, out_len, entry, crc32: len ^ out_len };
            (end, out) = (start + u64::from(len), out + u64::from(out_len));
            segment
        });
        let segments: Vec<Segment> = segments.collect();
        let sha256 = segments.iter().map(|segment| [segment.len as u8; 32]).collect();
        let (compressed_len, uncompressed_len) = (Bytes(end + 9), Bytes(out));
        let span = Bytes(1 << 20);
        let scanned = ScannedLayer { encoding, span, compressed_len, uncompressed_len, segments };
        SegmentIndex::new(Digest::of(b"layer"), scanned, sha256)
    }

    #[test]
    fn segments_that_go_on_from_others_form_stretches() {
        let place = |inside| (0, 10, 100, inside);
        let entries = [false, true, true, false, false, true, false];
        let index = index(Encoding::Zstd, &entries.map(place));
        let stretches: Vec<_> = (0..7).map(|number| index.serial(number)).collect();
        assert_eq!(stretches, [0..3, 0..3, 0..3, 3..4, 4..6, 4..6, 6..7]);
        assert_eq!(index.longest_serial(), Bytes(300));
        assert_eq!(index.segment_at(299), Some(2));
        assert_eq!((index.segment_at(699), index.segment_at(700)), (Some(6), None));
    }

    #[test]
    fn an_index_with_another_place_or_checksum_is_another_proof() {
        let places = [(0, 10, 100, false), (3, 10, 100, true), (0, 7, 9, false)];
        let proof = index(Encoding::Zstd, &places).proof();
        assert!(proof.is_complete());
        assert_eq!(index(Encoding::Zstd, &places).proof(), proof);
        for at in 0..3 {
            let mut other = places;
            other[at].2 += 1; // its length, and the checksum with it
            assert_ne!(index(Encoding::Zstd, &other).proof(), proof);
            let mut other = places;
            other[at].3 = !other[at].3;
            assert!(at == 0 || index(Encoding::Zstd, &other).proof() != proof);
        }
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(
            places in proptest::collection::vec((0_u64..5, 1_u32..1000, 1_u32..1000, any::<bool>()), 0..40),
        ) {
            let index = index(Encoding::Zstd, &places);
            let file = write(&index);
            prop_assert!(is_version_2(&file));
            prop_assert_eq!(read(&file), Ok(index));
        }

        #[test]
        fn no_damage_is_read_as_something_else(at in 0_usize..400, bits in 1_u8..) {
            let index = index(Encoding::Zstd, &[(0, 10, 100, false), (3, 10, 100, true), (0, 7, 9, false)]);
            let mut file = write(&index);
            let at = at % file.len();
            file[at] ^= bits;
            prop_assert!(read(&file).is_err());
            prop_assert!(read(&file[..at]).is_err());
            // With a matching checksum, every file that is accepted obeys the rules.
            let (body, _) = file.split_last_chunk::<4>().unwrap();
            let sealed = [body, &crc32fast::hash(body).to_le_bytes()].concat();
            if let Ok(read) = read(&sealed) {
                prop_assert_eq!(write(&read), sealed);
                let out: u64 = read.segments().iter().map(|segment| u64::from(segment.out_len)).sum();
                prop_assert_eq!(out, read.scanned().uncompressed_len.0);
            }
        }
    }
}
