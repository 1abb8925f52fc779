//! A layer and its segments as a [`ChunkSource`]: one chunk for each segment.

use std::ops::Range;
use std::sync::Arc;

use parking_lot::Mutex;
use sha2::{Digest as _, Sha256};

use super::SegmentsError;
use super::index::{Encoding, Segment, SegmentEntry, SegmentIndex};
use crate::zstandard::{self, FrameDecoder, FramesDecoder};
use source::chunk::{
    ChunkError, ChunkSource, ChunkSpan, EncodedChunk, EncodedRange, SerialChunks, SerialDecoder,
};
use source::{ByteSource, Proof};

/// A layer that is not gzip, with its index.
pub struct SegmentedLayer {
    id: String,
    proof: Proof,
    index: Arc<SegmentIndex>,
    blob: Arc<dyn ByteSource>,
    /// Decoders that no thread uses at present.
    idle: Mutex<Vec<FramesDecoder>>,
}

impl SegmentedLayer {
    /// The layer `blob`, which the image names by the digest `id`, decoded by `index`. Two images may share a layer but
    /// cut it differently.
    ///
    /// # Errors
    /// [`SegmentsError::OtherLayer`] if the blob's length is not that of the index.
    pub fn new(
        id: &str,
        index: SegmentIndex,
        blob: Arc<dyn ByteSource>,
    ) -> Result<Self, SegmentsError> {
        let len = index.scanned().compressed_len.0;
        if blob.len() != len {
            let what = "the length";
            return Err(SegmentsError::OtherLayer { what, ours: len, theirs: blob.len() });
        }
        let id = format!("{id}#{}-{:08x}", index.scanned().encoding.name(), index.cuts());
        let proof = index.proof();
        Ok(Self { id, proof, index: Arc::new(index), blob, idle: Mutex::default() })
    }

    /// The index.
    #[must_use]
    pub fn index(&self) -> &SegmentIndex {
        &self.index
    }

    fn segment(&self, number: u32) -> Result<&Segment, ChunkError> {
        let segment = self.index.segments().get(number as usize);
        segment.ok_or_else(|| damaged(&*self.blob, number, 0..0, "there is no such segment"))
    }

    fn decoder(&self) -> Result<FramesDecoder, String> {
        let idle = self.idle.lock().pop();
        idle.map_or_else(FramesDecoder::new, Ok)
    }

    fn give_back(&self, decoder: FramesDecoder) {
        self.idle.lock().push(decoder);
    }

    /// Decodes a segment that decodes alone.
    fn decode_alone(&self, encoded: &[u8], room: &mut [u8]) -> Result<(), String> {
        match self.index.scanned().encoding {
            Encoding::Plain if encoded.len() == room.len() => room.copy_from_slice(encoded),
            Encoding::Plain => return Err("its length is not that of its index".to_owned()),
            Encoding::Zstd => {
                let mut decoder = self.decoder()?;
                let result = decoder.decode(encoded, room);
                self.give_back(decoder);
                result?;
            }
        }
        Ok(())
    }
}

fn damaged(
    blob: &dyn ByteSource,
    chunk: u32,
    range: Range<u64>,
    reason: impl Into<String>,
) -> ChunkError {
    let (blob, reason) = (blob.name().to_owned(), reason.into());
    ChunkError::Damaged { blob, chunk, start: range.start, end: range.end, reason }
}

/// Checks the bytes of segment `number` before their decoding.
fn check_encoded(index: &SegmentIndex, number: u32, encoded: &[u8]) -> Result<(), String> {
    let digest = index.sha256().get(number as usize);
    let good = digest.is_some_and(|digest| Sha256::digest(encoded)[..] == digest[..]);
    good.then_some(()).ok_or_else(|| "its compressed bytes do not match their SHA-256".to_owned())
}

/// Checks the bytes of a segment after their decoding.
fn check_decoded(segment: &Segment, decoded: &[u8]) -> Result<(), String> {
    let good = crc32fast::hash(decoded) == segment.crc32;
    good.then_some(()).ok_or_else(|| "its output does not match its CRC-32".to_owned())
}

impl ChunkSource for SegmentedLayer {
    fn id(&self) -> &str {
        &self.id
    }

    fn proof(&self) -> Proof {
        self.proof
    }

    fn decoded_len(&self) -> u64 {
        self.index.scanned().uncompressed_len.0
    }

    fn chunk_count(&self) -> u32 {
        self.index.segments().len() as u32
    }

    fn chunk_at(&self, offset: u64) -> Option<ChunkSpan> {
        self.span(self.index.segment_at(offset)? as u32)
    }

    fn span(&self, index: u32) -> Option<ChunkSpan> {
        let segment = self.index.segments().get(index as usize)?;
        Some(ChunkSpan { index, start: segment.out, len: segment.out_len })
    }

    /// True for a layer with a frame that must be decoded from far before a chunk.
    fn is_costly(&self) -> bool {
        self.index.longest_serial().0 > 0
    }

    fn blob(&self) -> &Arc<dyn ByteSource> {
        &self.blob
    }

    fn encoded(&self, index: u32) -> Result<EncodedRange, ChunkError> {
        Ok(EncodedRange { range: self.segment(index)?.input(), head: 0, tail: 0 })
    }

    fn room(&self, index: u32) -> usize {
        self.segment(index).map_or(0, |segment| segment.out_len as usize)
    }

    fn decode(
        &self,
        index: u32,
        encoded: &mut EncodedChunk,
        room: &mut [u8],
    ) -> Result<Range<usize>, ChunkError> {
        let segment = self.segment(index)?;
        let mut decode = || {
            if self.is_serial(index) {
                return Err("it decodes only after the earlier segments of its frame".to_owned());
            }
            check_encoded(&self.index, index, encoded.bytes())?;
            self.decode_alone(encoded.bytes(), room)?;
            check_decoded(segment, room)
        };
        decode().map_err(|reason| damaged(&*self.blob, index, segment.input(), reason))?;
        Ok(0..room.len())
    }

    fn serial(&self) -> Option<&dyn SerialChunks> {
        (self.index.longest_serial().0 > 0).then_some(self)
    }

    fn verify(&self, index: u32, encoded: &[u8]) -> Option<bool> {
        Some(check_encoded(&self.index, index, encoded).is_ok())
    }

    fn verify_decoded(&self, index: u32, decoded: &[u8]) -> Option<bool> {
        let segment = self.index.segments().get(index as usize)?;
        Some(check_decoded(segment, decoded).is_ok())
    }
}

impl SerialChunks for SegmentedLayer {
    fn long_frame(&self, index: u32) -> Range<u32> {
        self.index.serial(index)
    }

    fn longest_frame(&self) -> u64 {
        self.index.longest_serial().0
    }

    fn window(&self, first: &[u8]) -> u64 {
        zstandard::window(first).unwrap_or(0)
    }

    fn begin_frame(&self, first: u32) -> Result<Box<dyn SerialDecoder>, ChunkError> {
        let segment = self.segment(first)?;
        let refused = |reason: String| damaged(&*self.blob, first, segment.input(), reason);
        if segment.entry == SegmentEntry::Inside {
            return Err(refused("it is not the first of a frame".to_owned()));
        }
        let (index, blob) = (self.index.clone(), self.blob.clone());
        let decoder = FrameDecoder::new().map_err(refused)?;
        Ok(Box::new(LongFrame { index, blob, decoder, next: first }))
    }
}

/// A decoder of a frame of several segments, at one of them.
struct LongFrame {
    index: Arc<SegmentIndex>,
    blob: Arc<dyn ByteSource>,
    decoder: FrameDecoder,
    next: u32,
}

impl SerialDecoder for LongFrame {
    fn decode_next(&mut self, encoded: &EncodedChunk, room: &mut [u8]) -> Result<(), ChunkError> {
        let number = self.next;
        self.next = self.next.saturating_add(1);
        let Some(segment) = self.index.segments().get(number as usize) else {
            return Err(damaged(&*self.blob, number, 0..0, "there is no such segment"));
        };
        let mut decode = || {
            check_encoded(&self.index, number, encoded.bytes())?;
            self.decoder.decode_next(encoded.bytes(), room)?;
            check_decoded(segment, room)
        };
        decode().map_err(|reason| damaged(&*self.blob, number, segment.input(), reason))
    }
}
