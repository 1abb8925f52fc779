//! A gzip layer as a [`ChunkSource`]: one chunk for each segment.

use std::sync::{Arc, Mutex, PoisonError};

use super::GzipError;
use super::index::Index;
use super::segment::{HEADROOM, SegmentDecoder, TAILROOM};
use crate::chunk::{ChunkBytes, ChunkError, ChunkSource, ChunkSpan};
use crate::source::ByteSource;

/// Longest segment that is decoded: an upstream index may have any distance between checkpoints, for
/// a block cannot be cut there, but a number from a file must not decide how much memory is taken.
const MAX_SEGMENT: u64 = 1 << 30;

/// A gzip layer and its index.
///
/// Windows stay packed and are unpacked when a segment is decoded: the index of a 10 GB layer takes
/// about 40 MB.
pub struct IndexedLayer {
    id: String,
    index: Index,
    blob: Arc<dyn ByteSource>,
    /// Decoders that no thread is using.
    idle: Mutex<Vec<SegmentDecoder>>,
}

impl IndexedLayer {
    /// The layer `blob`, known to a cache as `id`#gzip, decoded by `index`.
    ///
    /// # Errors
    /// [`GzipError::OtherLayer`] when the blob's length is not the one in the index,
    /// [`GzipError::Damaged`] when a segment is too short for its output,
    /// [`GzipError::TooLarge`] when a segment is longer than memory should allow.
    pub fn new(id: &str, index: Index, blob: Arc<dyn ByteSource>) -> Result<Self, GzipError> {
        if blob.len() != index.compressed_len.0 {
            return Err(GzipError::OtherLayer {
                what: "the compressed length",
                ours: index.compressed_len.0,
                theirs: blob.len(),
            });
        }
        let long = |i| {
            let (output, input) = (index.output(i), index.input(i));
            output.end - output.start > MAX_SEGMENT
                || input.end.saturating_sub(input.start) > MAX_SEGMENT
        };
        if u32::try_from(index.segments()).is_err() || (0..index.segments()).any(long) {
            return Err(GzipError::TooLarge { what: "a segment of more than 1 GiB" });
        }
        // A match takes two bits at least and yields 258 bytes at most.
        let inflated = |i| {
            let (output, input) = (index.output(i), index.input(i));
            output.end - output.start > (input.end.saturating_sub(input.start)).saturating_mul(1032)
        };
        if let Some(i) = (0..index.segments()).find(|&i| inflated(i)) {
            let at = index.input(i).start;
            return Err(GzipError::damaged(
                at,
                "the index says that more comes out of a segment than can",
            ));
        }
        Ok(Self { id: format!("{id}#gzip"), index, blob, idle: Mutex::new(Vec::new()) })
    }

    /// The index.
    #[must_use]
    pub fn index(&self) -> &Index {
        &self.index
    }

    fn decoder(&self) -> SegmentDecoder {
        let idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
        idle.unwrap_or_else(SegmentDecoder::new)
    }

    fn give_back(&self, decoder: SegmentDecoder) {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner).push(decoder);
    }
}

impl ChunkSource for IndexedLayer {
    fn id(&self) -> &str {
        &self.id
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

    fn load(&self, index: u32) -> Result<ChunkBytes, ChunkError> {
        let i = index as usize;
        let damaged = |start, end, reason: String| ChunkError::Damaged {
            blob: self.blob.name().to_owned(),
            chunk: index,
            start,
            end,
            reason,
        };
        if i >= self.index.segments() {
            return Err(damaged(0, 0, "there is no such segment".to_owned()));
        }
        let input = self.index.input(i);
        let len = input.end.saturating_sub(input.start) as usize;
        if len == 0 {
            return Err(damaged(input.start, input.end, "it has no compressed bytes".to_owned()));
        }
        let load = || {
            let mut buffer = vec![0; HEADROOM + len + TAILROOM];
            self.blob.read_exact_at(&mut buffer[HEADROOM..HEADROOM + len], input.start)?;
            let mut decoder = self.decoder();
            let result = decoder.decode(&self.index, i, &mut buffer);
            self.give_back(decoder);
            result.map_err(|reason| damaged(input.start, input.end, reason))
        };
        match load() {
            // Damage on the way, or one bad node of many, is another time not there.
            Err(error @ ChunkError::Damaged { .. }) => {
                tracing::debug!(%error, "loading it again");
                load()
            }
            result => result,
        }
    }
}
