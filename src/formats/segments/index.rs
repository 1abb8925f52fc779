//! The index of a layer's segments.

use std::ops::Range;

use sha2::{Digest as _, Sha256};

use super::hasher::Hashed;
use super::{SegmentHasher, SegmentsError};
use crate::oci::Digest;
use crate::units::Bytes;
use source::Proof;

/// Longest segment, stored or decoded, of any encoding: 32 MiB. Memory is taken for all of it, one thread decodes all of
/// it for a read of any length, and a number from a file must not decide how long that takes. A scan cuts at twice its
/// span at the latest, and the longest span is 16 MiB. Upstream cannot cut a block of deflate: the longest that zlib makes
/// (32 Ki symbols of at most 258 bytes) has 8.1 MiB.
pub const MAX_SEGMENT: Bytes = Bytes(32 << 20);

/// Encoding of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encoding {
    /// No encoding: a bare tar.
    Plain,
    /// zstd frames.
    Zstd,
}

impl Encoding {
    /// Name of the encoding.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Plain => "tar",
            Self::Zstd => "zstd",
        }
    }
}

/// Position where the decoding of a segment begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SegmentEntry {
    /// At a frame, or in a bare tar: the segment decodes alone.
    Start,
    /// At a block inside a frame: decoding continues from the previous segment.
    Inside,
}

/// A segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Its first byte in the blob.
    pub start: u64,
    /// Its length in the blob, never 0.
    pub len: u32,
    /// Its first byte in the output.
    pub out: u64,
    /// Its length in the output, never 0.
    pub out_len: u32,
    /// Position where decoding begins.
    pub entry: SegmentEntry,
    /// CRC-32 of its output.
    pub crc32: u32,
}

impl Segment {
    /// Its bytes of the blob.
    #[must_use]
    pub fn input(&self) -> Range<u64> {
        self.start..self.start + u64::from(self.len)
    }

    /// Its bytes of the output.
    #[must_use]
    pub fn output(&self) -> Range<u64> {
        self.out..self.out + u64::from(self.out_len)
    }
}

/// Result of a scan of a layer; the digests come from the [`SegmentHasher`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ScannedLayer {
    /// Encoding of the layer.
    pub encoding: Encoding,
    /// Target length of a segment's output.
    pub span: Bytes,
    /// Length of the blob.
    pub compressed_len: Bytes,
    /// Length of its output.
    pub uncompressed_len: Bytes,
    /// The segments in order; their outputs follow each other without a gap.
    pub segments: Vec<Segment>,
}

impl ScannedLayer {
    /// The index, with the digests that `hasher` computed of the same bytes. Segments that became final only
    /// at the end are hashed here.
    ///
    /// # Errors
    /// [`SegmentsError::OtherLayer`] if the hasher received other bytes or segments,
    /// [`SegmentsError::TooMany`].
    pub fn with_digests(self, mut hasher: SegmentHasher) -> Result<SegmentIndex, SegmentsError> {
        for segment in self.segments.iter().skip(hasher.count()) {
            hasher.segment(&segment.input());
        }
        let Hashed { layer, len, segments: sha256 } = hasher.finish();
        let other = |what, ours, theirs| Err(SegmentsError::OtherLayer { what, ours, theirs });
        let count = self.segments.len();
        if len != self.compressed_len.0 {
            return other("the length", self.compressed_len.0, len);
        }
        if sha256.len() != count {
            return other("the number of segments", count as u64, sha256.len() as u64);
        }
        if u32::try_from(count).is_err() {
            return Err(SegmentsError::TooMany { count });
        }
        Ok(SegmentIndex::new(layer, self, sha256))
    }
}

/// The data needed to fetch, verify and decode any segment of a layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SegmentIndex {
    layer: Digest,
    scanned: ScannedLayer,
    sha256: Vec<[u8; 32]>,
    /// The stretches of more than one segment that decode only from their first segment on, in order.
    serial: Vec<Range<u32>>,
}

impl SegmentIndex {
    /// `sha256` has one digest for each segment; there are fewer than 2³².
    pub(super) fn new(layer: Digest, scanned: ScannedLayer, sha256: Vec<[u8; 32]>) -> Self {
        let mut serial: Vec<Range<u32>> = Vec::new();
        for (number, segment) in (0u32..).zip(&scanned.segments) {
            if segment.entry == SegmentEntry::Inside {
                match serial.last_mut().filter(|last| last.end == number) {
                    Some(last) => last.end = number + 1,
                    None => serial.push(number.saturating_sub(1)..number + 1),
                }
            }
        }
        Self { layer, scanned, sha256, serial }
    }

    /// The layer's digest.
    #[must_use]
    pub fn layer(&self) -> Digest {
        self.layer
    }

    /// The result of the scan.
    #[must_use]
    pub fn scanned(&self) -> &ScannedLayer {
        &self.scanned
    }

    /// The segments.
    #[must_use]
    pub fn segments(&self) -> &[Segment] {
        &self.scanned.segments
    }

    /// SHA-256 of each segment's bytes of the blob.
    #[must_use]
    pub fn sha256(&self) -> &[[u8; 32]] {
        &self.sha256
    }

    /// The segment that contains output position `out`, or `None` past the end.
    #[must_use]
    pub fn segment_at(&self, out: u64) -> Option<usize> {
        (out < self.scanned.uncompressed_len.0).then(|| {
            self.segments().partition_point(|segment| segment.out <= out).saturating_sub(1)
        })
    }

    /// The segments that must be decoded one after the other to get segment `number` or others of its frame.
    /// The range holds only `number`, unless that is one of several segments in a long frame.
    #[must_use]
    pub fn serial(&self, number: u32) -> Range<u32> {
        let at = self.serial.partition_point(|stretch| stretch.end <= number);
        let stretch = self.serial.get(at).filter(|stretch| stretch.start <= number);
        stretch.map_or(number..number.saturating_add(1), Clone::clone)
    }

    /// Length of the output of the longest frame with several segments; 0 if there is none.
    #[must_use]
    pub fn longest_serial(&self) -> Bytes {
        let len = |stretch: &Range<u32>| {
            let part = self.segments().get(stretch.start as usize..stretch.end as usize);
            part.unwrap_or_default().iter().map(|segment| u64::from(segment.out_len)).sum()
        };
        Bytes(self.serial.iter().map(len).max().unwrap_or(0))
    }

    /// What proves the output of the segments: the table of their positions and checksums.
    #[must_use]
    pub fn proof(&self) -> Proof {
        let scanned = &self.scanned;
        let mut table = Sha256::new();
        table.update(b"turbobd segments table 1\0");
        table.update(scanned.encoding.name());
        for word in
            [scanned.compressed_len.0, scanned.uncompressed_len.0, scanned.segments.len() as u64]
        {
            table.update(word.to_le_bytes());
        }
        for segment in &scanned.segments {
            table.update(segment.start.to_le_bytes());
            table.update(segment.len.to_le_bytes());
            table.update(segment.out.to_le_bytes());
            table.update(segment.out_len.to_le_bytes());
            table.update([u8::from(segment.entry == SegmentEntry::Inside)]);
            table.update(segment.crc32.to_le_bytes());
        }
        table.update(self.sha256.as_flattened());
        Proof::Table(table.finalize().into())
    }

    /// A hash of the positions of the segments: indexes with other segments have other values.
    #[must_use]
    pub fn cuts(&self) -> u32 {
        self.segments().iter().fold(0, |crc, segment| {
            let crc = crc32c::crc32c_append(crc, &segment.start.to_le_bytes());
            crc32c::crc32c_append(crc, &segment.out.to_le_bytes())
        })
    }
}
