//! A gzip layer as a [`ChunkSource`]: one chunk for each segment.

use std::ops::Range;
use std::sync::Arc;

use parking_lot::Mutex;
use sha2::{Digest as _, Sha256};

use super::GzipError;
use super::index::GzipIndex;
use super::segment::{HEADROOM, SegmentDecoder, TAILROOM};
use crate::segments::MAX_SEGMENT;
use crate::units::Bytes;
use source::chunk::{ChunkError, ChunkSource, ChunkSpan, EncodedChunk, EncodedRange};
use source::{ByteSource, Proof};

/// A gzip layer and its index.
///
/// Windows stay packed and are unpacked for the decoding of a segment: the index of a 10 GB layer takes about
/// 40 MB.
pub struct IndexedLayer {
    id: String,
    proof: Proof,
    index: GzipIndex,
    blob: Arc<dyn ByteSource>,
    /// Decoders that no thread uses at present.
    idle: Mutex<Vec<SegmentDecoder>>,
}

impl IndexedLayer {
    /// The layer `blob`, which the image names by the digest `id`, decoded by `index`. Two images may share a layer but
    /// have different checkpoints for it.
    ///
    /// # Errors
    /// [`GzipError::OtherLayer`] if the blob's length is not that of the index, [`GzipError::Damaged`] if a
    /// segment is too short for its output, [`GzipError::LongSegment`] if a segment is longer than
    /// [`MAX_SEGMENT`], [`GzipError::TooLarge`] for 2³² segments.
    pub fn new(id: &str, index: GzipIndex, blob: Arc<dyn ByteSource>) -> Result<Self, GzipError> {
        if blob.len() != index.compressed_len.0 {
            return Err(GzipError::OtherLayer {
                what: "the compressed length",
                ours: index.compressed_len.0,
                theirs: blob.len(),
            });
        }
        if u32::try_from(index.segments()).is_err() {
            return Err(GzipError::TooLarge { what: "2^32 segments" });
        }
        for i in 0..index.segments() {
            let (output, input) = (index.output(i), index.input(i));
            let at = Bytes(input.start);
            for (part, range) in [("decoded", output), ("compressed", input)] {
                let len = Bytes(range.end.saturating_sub(range.start));
                if len > MAX_SEGMENT {
                    return Err(GzipError::LongSegment { at, part, len });
                }
            }
        }
        // A match takes at least two bits and yields at most 258 bytes.
        let inflated = |i| {
            let (output, input) = (index.output(i), index.input(i));
            output.end - output.start > (input.end.saturating_sub(input.start)).saturating_mul(1032)
        };
        if let Some(i) = (0..index.segments()).find(|&i| inflated(i)) {
            let at = index.input(i).start;
            return Err(GzipError::damaged(
                at,
                "the index claims more output of a segment than it can contain",
            ));
        }
        let id = format!("{id}#gzip-{:08x}", index.cuts());
        let proof = index.proof();
        Ok(Self { id, proof, index, blob, idle: Mutex::new(Vec::new()) })
    }

    /// The index.
    #[must_use]
    pub fn index(&self) -> &GzipIndex {
        &self.index
    }

    fn damaged(&self, chunk: u32, range: Range<u64>, reason: String) -> ChunkError {
        let blob = self.blob.name().to_owned();
        ChunkError::Damaged { blob, chunk, start: range.start, end: range.end, reason }
    }

    fn decoder(&self) -> SegmentDecoder {
        let idle = self.idle.lock().pop();
        idle.unwrap_or_else(SegmentDecoder::new)
    }

    fn give_back(&self, decoder: SegmentDecoder) {
        self.idle.lock().push(decoder);
    }
}

impl ChunkSource for IndexedLayer {
    fn id(&self) -> &str {
        &self.id
    }

    fn proof(&self) -> Proof {
        self.proof
    }

    fn decoded_len(&self) -> u64 {
        self.index.uncompressed_len.0
    }

    fn chunk_count(&self) -> u32 {
        if self.index.uncompressed_len.0 == 0 { 0 } else { self.index.segments() as u32 }
    }

    fn chunk_at(&self, offset: u64) -> Option<ChunkSpan> {
        let i = self.index.segment_at(offset)?;
        let output = self.index.output(i);
        Some(ChunkSpan {
            index: i as u32,
            start: output.start,
            len: (output.end - output.start) as u32,
        })
    }

    fn span(&self, index: u32) -> Option<ChunkSpan> {
        let i = index as usize;
        (i < self.index.segments()).then(|| {
            let output = self.index.output(i);
            ChunkSpan { index, start: output.start, len: (output.end - output.start) as u32 }
        })
    }

    fn is_costly(&self) -> bool {
        true
    }

    fn blob(&self) -> &Arc<dyn ByteSource> {
        &self.blob
    }

    fn encoded(&self, index: u32) -> Result<EncodedRange, ChunkError> {
        if index as usize >= self.index.segments() {
            return Err(self.damaged(index, 0..0, "there is no such segment".to_owned()));
        }
        let range = self.index.input(index as usize);
        if range.start >= range.end {
            return Err(self.damaged(index, range, "it has no compressed bytes".to_owned()));
        }
        Ok(EncodedRange { range, head: HEADROOM, tail: TAILROOM })
    }

    fn room(&self, index: u32) -> usize {
        let i = index as usize;
        if i >= self.index.segments() {
            return 0;
        }
        let output = self.index.output(i);
        self.index.window_len(i) + (output.end - output.start) as usize
    }

    fn decode(
        &self,
        index: u32,
        encoded: &mut EncodedChunk,
        room: &mut [u8],
    ) -> Result<Range<usize>, ChunkError> {
        let i = index as usize;
        if i >= self.index.segments() || room.len() != self.room(index) {
            return Err(self.damaged(index, 0..0, "there is no such segment".to_owned()));
        }
        let mut decoder = self.decoder();
        let result = decoder.decode(&self.index, i, encoded.with_room(), room);
        self.give_back(decoder);
        result.map_err(|reason| self.damaged(index, self.index.input(i), reason))
    }

    fn verify(&self, index: u32, encoded: &[u8]) -> Option<bool> {
        let digest = self.index.sha256.as_ref()?.get(index as usize)?;
        Some(Sha256::digest(encoded)[..] == digest[..])
    }

    fn verify_decoded(&self, index: u32, decoded: &[u8]) -> Option<bool> {
        let crc = self.index.crc32.as_ref()?.get(index as usize)?;
        Some(crc32fast::hash(decoded) == *crc)
    }
}
