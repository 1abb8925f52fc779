//! A blob that decodes in pieces.
//!
//! A *chunk* is what is fetched, verified, decoded and cached as a whole: a segment of a gzip layer,
//! a group of blocks of a `ZFile`, a slice of an uncompressed layer. [`ChunkSource`] says where the
//! chunks lie and makes one on request; the [`cache`](crate::cache) decides when.
//!
//! Real: [`gzip::IndexedLayer`](crate::gzip), the `ZFile` reader and [`PlainChunks`]. In memory and
//! faulty: build one from [`MemorySource`](crate::source::MemorySource) or
//! [`FaultySource`](crate::source::FaultySource) under [`PlainChunks`].

use std::ops::{Deref, Range};
use std::sync::Arc;

use thiserror::Error;

use crate::source::{ByteSource, SourceError};

/// Why a chunk could not be made. Shared by everyone who waited for it.
#[derive(Clone, Debug, Error)]
pub enum ChunkError {
    /// The encoded bytes could not be had.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// The bytes arrived but are not what the index says they are.
    #[error("Chunk {chunk} of {blob} (bytes {start}..{end} of the blob) is damaged: {reason}")]
    Damaged {
        /// The blob.
        blob: String,
        /// Number of the chunk.
        chunk: u32,
        /// First encoded byte.
        start: u64,
        /// One past the last encoded byte.
        end: u64,
        /// Which check failed.
        reason: String,
    },
}

/// Decoded bytes of one chunk.
///
/// The decoder may need room in front of the data (a gzip segment is decoded behind its window), so
/// the data is a range of the buffer rather than all of it.
#[derive(Debug)]
pub struct ChunkBytes {
    buffer: Vec<u8>,
    data: Range<usize>,
}

impl ChunkBytes {
    /// The bytes of `buffer` in `data`.
    ///
    /// # Panics
    /// When `data` does not lie in `buffer`: a bug of the decoder, not a matter of input.
    #[must_use]
    pub fn new(buffer: Vec<u8>, data: Range<usize>) -> Self {
        assert!(data.start <= data.end && data.end <= buffer.len());
        Self { buffer, data }
    }

    /// Memory held, in bytes: what a budget counts.
    #[must_use]
    pub fn footprint(&self) -> usize {
        self.buffer.capacity()
    }
}

impl From<Vec<u8>> for ChunkBytes {
    fn from(buffer: Vec<u8>) -> Self {
        let data = 0..buffer.len();
        Self { buffer, data }
    }
}

impl Deref for ChunkBytes {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.buffer[self.data.clone()]
    }
}

/// Where one chunk lies in the decoded bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChunkSpan {
    /// Number of the chunk, from 0.
    pub index: u32,
    /// First decoded byte.
    pub start: u64,
    /// Decoded length in bytes, never 0.
    pub len: u32,
}

/// A blob whose decoded bytes come in chunks.
pub trait ChunkSource: Send + Sync {
    /// What distinguishes this blob from all others in a cache: its digest, and what it is decoded as.
    fn id(&self) -> &str;

    /// Decoded length in bytes.
    fn decoded_len(&self) -> u64;

    /// Number of chunks; they cover `0..decoded_len()` without a gap.
    fn chunk_count(&self) -> u32;

    /// The chunk that holds decoded byte `offset`, or `None` past the end.
    fn chunk_at(&self, offset: u64) -> Option<ChunkSpan>;

    /// Fetches, verifies and decodes a chunk. Blocks; called on a loader thread.
    ///
    /// # Errors
    /// [`ChunkError`]; nothing unverified is ever returned.
    fn load(&self, index: u32) -> Result<ChunkBytes, ChunkError>;
}

/// An uncompressed blob in chunks of one size: a plain tar layer.
///
/// Nothing in the format verifies such a range; only the blob's digest does, over the whole.
pub struct PlainChunks {
    id: String,
    source: Arc<dyn ByteSource>,
}

impl PlainChunks {
    /// Bytes in a chunk: large enough that a sequential reader makes few requests, small enough
    /// that one 4 KiB read of a cold file does not fetch much more than it needs.
    pub const CHUNK: u64 = 256 << 10;

    /// Chunks of `source`, known to a cache as `id`.
    pub fn new(id: impl Into<String>, source: Arc<dyn ByteSource>) -> Self {
        Self { id: id.into(), source }
    }
}

impl ChunkSource for PlainChunks {
    fn id(&self) -> &str {
        &self.id
    }

    fn decoded_len(&self) -> u64 {
        self.source.len()
    }

    fn chunk_count(&self) -> u32 {
        self.source.len().div_ceil(Self::CHUNK) as u32
    }

    fn chunk_at(&self, offset: u64) -> Option<ChunkSpan> {
        let size = self.source.len();
        (offset < size).then(|| {
            let index = offset / Self::CHUNK;
            let start = index * Self::CHUNK;
            ChunkSpan { index: index as u32, start, len: (size - start).min(Self::CHUNK) as u32 }
        })
    }

    fn load(&self, index: u32) -> Result<ChunkBytes, ChunkError> {
        let start = u64::from(index) * Self::CHUNK;
        let len = self.source.len().saturating_sub(start).min(Self::CHUNK);
        let mut bytes = vec![0; len as usize];
        self.source.read_exact_at(&mut bytes, start)?;
        Ok(bytes.into())
    }
}
