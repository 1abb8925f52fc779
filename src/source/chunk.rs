//! Chunks: a blob that decodes in pieces.
//!
//! A *chunk* is the unit of fetching, verifying and caching, one decoded piece of a blob: a segment of a gzip
//! layer, a group of blocks of a `ZFile`, a slice of an uncompressed layer. [`ChunkSource`] gives the
//! positions of the chunks and decodes one on request. The cache decides when a chunk is
//! decoded, and the fetcher which chunks are fetched together.
//!
//! Each chunk decodes alone. The exception is a long zstd frame: its chunks decode one after the other, from
//! the beginning of the frame; a source with such frames is [`SerialChunks`] as well, and returns itself as one
//! ([`ChunkSource::serial`]).
//!
//! Implementations: `gzip::IndexedLayer`, `segments::SegmentedLayer`, the
//! `ZFile` reader and [`PlainChunks`]. For tests in memory or with faults, put [`PlainChunks`] over a
//! [`MemorySource`](crate::MemorySource) or a `testing::FaultySource`.

use std::fmt;
use std::ops::{Deref, Range};
use std::sync::Arc;

use thiserror::Error;

use crate::{ByteSource, Proof, SourceError, StableBytes};

/// Error of making a chunk. All threads that wait for the chunk receive the same error.
#[derive(Clone, Debug, Error)]
pub enum ChunkError {
    /// The encoded bytes could not be fetched.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// The bytes arrived but fail a check of the index.
    #[error("Chunk {chunk} of {blob} (bytes {start}..{end} of the blob) is damaged: {reason}")]
    Damaged {
        /// The blob.
        blob: String,
        /// Number of the chunk.
        chunk: u32,
        /// First encoded byte.
        start: u64,
        /// The failed check.
        end: u64,
        /// Which check failed.
        reason: String,
    },
}

/// Decoded bytes of one chunk.
///
/// The decoder may need room in front of the data: a gzip segment is decoded behind its window. So the data
/// is a range of the room and not all of it.
pub struct ChunkBytes {
    room: Box<dyn Room>,
    data: Range<usize>,
}

/// Memory that a chunk is decoded into: heap memory or a piece of a cache's arena. Its bytes keep their address.
pub trait Room: StableBytes {
    /// The bytes, writable for the decoder.
    fn bytes_mut(&mut self) -> &mut [u8];
    /// Number of bytes that this room takes from a cache's budget; 0 for memory that no cache counts.
    fn held(&self) -> u64 {
        0
    }
}

impl Room for Vec<u8> {
    fn bytes_mut(&mut self) -> &mut [u8] {
        self
    }
}

impl ChunkBytes {
    /// The bytes of `room` in `data`.
    ///
    /// # Panics
    /// If `data` does not lie in `room`: a bug of the decoder, which no input can cause.
    #[must_use]
    pub fn new(room: Box<dyn Room>, data: Range<usize>) -> Self {
        assert!(data.start <= data.end && data.end <= room.bytes().len());
        Self { room, data }
    }

    /// Number of bytes taken from the cache's budget; 0 for a chunk on the heap.
    #[must_use]
    pub fn held(&self) -> u64 {
        self.room.held()
    }
}

impl From<Vec<u8>> for ChunkBytes {
    fn from(buffer: Vec<u8>) -> Self {
        let data = 0..buffer.len();
        Self { room: Box::new(buffer), data }
    }
}

impl Deref for ChunkBytes {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.room.bytes()[self.data.clone()]
    }
}

impl fmt::Debug for ChunkBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ChunkBytes({} bytes)", self.len())
    }
}

/// Position of a chunk in its blob, and the room that its decoder needs around it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EncodedRange {
    /// The chunk's byte range in the blob. Neighbours may share a byte.
    pub range: Range<u64>,
    /// Bytes of room that the decoder needs in front of them.
    pub head: usize,
    /// Bytes of room that the decoder needs behind them.
    pub tail: usize,
}

impl EncodedRange {
    /// Number of bytes of the blob.
    #[must_use]
    pub fn len(&self) -> usize {
        self.range.end.saturating_sub(self.range.start) as usize
    }

    /// True if the range is empty.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// The encoded bytes of a chunk, with the room that its decoder needs around them.
#[derive(Debug, Default)]
pub struct EncodedChunk {
    buffer: Vec<u8>,
    data: Range<usize>,
}

impl EncodedChunk {
    /// Makes room for the bytes of `place`, in a buffer that may have been used before.
    #[must_use]
    pub fn new(place: &EncodedRange, mut buffer: Vec<u8>) -> Self {
        let data = place.head..place.head + place.len();
        let len = data.end + place.tail;
        buffer.truncate(len);
        buffer.resize(len, 0);
        Self { buffer, data }
    }

    /// The encoded bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.buffer[self.data.clone()]
    }

    /// The encoded bytes, writable.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.buffer[self.data.clone()]
    }

    /// The bytes with the room around them, for the decoder, which leaves the bytes unchanged.
    pub fn with_room(&mut self) -> &mut [u8] {
        &mut self.buffer
    }

    /// The buffer, and the range of the encoded bytes in it.
    #[must_use]
    pub fn into_parts(self) -> (Vec<u8>, Range<usize>) {
        (self.buffer, self.data)
    }

    /// The buffer, for the next chunk.
    #[must_use]
    pub fn into_buffer(self) -> Vec<u8> {
        self.buffer
    }
}

/// Position of one chunk in the decoded bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChunkSpan {
    /// Number of the chunk, from 0.
    pub index: u32,
    /// First decoded byte.
    pub start: u64,
    /// Decoded length in bytes, never 0.
    pub len: u32,
}

/// Decodes chunks that lie in one long frame: one after the other, from the frame's beginning.
pub trait SerialDecoder: Send {
    /// Verifies and decodes the next chunk into `room`, of [`ChunkSource::room`] bytes.
    ///
    /// # Errors
    /// [`ChunkError::Damaged`]. Then no byte of `room` may be used, and the decoder must be dropped.
    fn decode_next(&mut self, encoded: &EncodedChunk, room: &mut [u8]) -> Result<(), ChunkError>;
}

/// A blob that decodes in chunks.
///
/// Fetching and decoding are separate steps because they happen on different threads. The fetching thread
/// asks for the positions of chunks and may fetch several neighbours at once. The decoding thread needs no
/// network.
pub trait ChunkSource: Send + Sync {
    /// Name of this blob for people and in traces: its digest, as the image names it, its decoding, and the positions
    /// of its chunks. It is a claim. A cache shares chunks by it only together with the [proof](Self::proof), or with
    /// the origin of the bytes.
    fn id(&self) -> &str;

    /// What proves the decoded bytes of its chunks.
    fn proof(&self) -> Proof {
        Proof::Nothing
    }

    /// Decoded length in bytes.
    fn decoded_len(&self) -> u64;

    /// Number of chunks; they cover `0..decoded_len()` without a gap.
    fn chunk_count(&self) -> u32;

    /// The chunk that holds decoded byte `offset`, or `None` past the end.
    fn chunk_at(&self, offset: u64) -> Option<ChunkSpan>;

    /// The bytes that chunks are decoded from.
    fn blob(&self) -> &Arc<dyn ByteSource>;

    /// Position of chunk `index` in the blob. Chunks lie there in the order of their numbers.
    ///
    /// # Errors
    /// [`ChunkError`] if there is no such chunk.
    fn encoded(&self, index: u32) -> Result<EncodedRange, ChunkError>;

    /// Bytes of room that chunk `index` is decoded into: its own length plus the room that its decoder needs.
    fn room(&self, index: u32) -> usize;

    /// Verifies and decodes a chunk into `room`, of [`Self::room`] bytes, and returns the range of the chunk
    /// in it.
    ///
    /// # Errors
    /// [`ChunkError::Damaged`]. Then no byte of `room` may be used.
    fn decode(
        &self,
        index: u32,
        encoded: &mut EncodedChunk,
        room: &mut [u8],
    ) -> Result<Range<usize>, ChunkError>;

    /// The long frames of this blob, if it has any.
    fn serial(&self) -> Option<&dyn SerialChunks> {
        None
    }

    /// The chunks that must be decoded one after the other to get chunk `index`. The range holds only `index`
    /// if [`decode`](Self::decode) decodes it alone. Otherwise `decode` refuses it, and
    /// [`SerialChunks::begin_frame`] decodes the range from its first chunk on.
    fn frame(&self, index: u32) -> Range<u32> {
        self.serial()
            .map_or_else(|| index..index.saturating_add(1), |serial| serial.long_frame(index))
    }

    /// True if chunk `index` is one of several that are decoded one after the other.
    fn is_serial(&self, index: u32) -> bool {
        self.frame(index).len() > 1
    }

    /// Position of chunk `index` in the decoded bytes; `None` if it cannot be computed from the number.
    fn span(&self, index: u32) -> Option<ChunkSpan> {
        let _ = index;
        None
    }

    /// True if decoding a chunk takes longer than reading its decoded bytes from a disk.
    fn is_costly(&self) -> bool {
        false
    }

    /// Checks the encoded bytes without decoding them; `None` if the index has no checksum of them.
    fn verify(&self, index: u32, encoded: &[u8]) -> Option<bool> {
        let _ = (index, encoded);
        None
    }

    /// Checks the decoded bytes of a chunk; `None` if the index has no checksum of them.
    fn verify_decoded(&self, index: u32, decoded: &[u8]) -> Option<bool> {
        let _ = (index, decoded);
        None
    }

    /// Fetches, verifies and decodes a chunk on this thread, twice if it is damaged the first time. In a long
    /// frame, all chunks before it are decoded too.
    ///
    /// # Errors
    /// [`ChunkError`]; unverified bytes are never returned.
    fn load(&self, index: u32) -> Result<ChunkBytes, ChunkError> {
        let frame = self.frame(index);
        if let Some(serial) = self.serial().filter(|_| frame.len() > 1) {
            let mut wanted = Vec::new();
            serial.load_frame(frame.start..index.saturating_add(1), &mut |bytes| {
                wanted.clear();
                wanted.extend_from_slice(bytes);
            })?;
            return Ok(wanted.into());
        }
        let place = self.encoded(index)?;
        let mut encoded = EncodedChunk::new(&place, Vec::new());
        let mut room = vec![0; self.room(index)];
        let mut load = || {
            self.blob().read_exact_at(encoded.bytes_mut(), place.range.start)?;
            self.decode(index, &mut encoded, &mut room)
        };
        let data = match load() {
            // Damage on the way, or from one bad node of several, is often gone at the next attempt.
            Err(error @ ChunkError::Damaged { .. }) => {
                tracing::debug!(%error, "loading it again");
                self.blob().distrust(place.range.clone());
                load()?
            }
            result => result?,
        };
        Ok(ChunkBytes::new(Box::new(room), data))
    }
}

/// The long frames of a blob: what [`ChunkSource`] has for them alone. A long frame is one of several chunks,
/// which are fetched and verified alone, but decoded one after the other, from the first.
pub trait SerialChunks: ChunkSource {
    /// The chunks of the frame with chunk `index`; only `index` if it decodes alone.
    fn long_frame(&self, index: u32) -> Range<u32>;

    /// Decoded length in bytes of the longest of these frames.
    fn longest_frame(&self) -> u64;

    /// Bytes of memory needed to decode a frame that begins with these encoded bytes: its window.
    fn window(&self, first: &[u8]) -> u64;

    /// Begins to decode the chunks of a frame; `first` is the first of them.
    ///
    /// # Errors
    /// [`ChunkError`] if `first` is not the first chunk of a frame, or there is no memory for a decoder.
    fn begin_frame(&self, first: u32) -> Result<Box<dyn SerialDecoder>, ChunkError>;

    /// Loads the chunks of one long frame from its first on, in the way of [`ChunkSource::load`], and gives
    /// each to `each`.
    ///
    /// # Errors
    /// [`ChunkError`].
    fn load_frame(
        &self,
        chunks: Range<u32>,
        each: &mut dyn FnMut(&[u8]),
    ) -> Result<(), ChunkError> {
        let mut decoder = self.begin_frame(chunks.start)?;
        let (mut buffer, mut room) = (Vec::new(), Vec::new());
        for index in chunks {
            let place = self.encoded(index)?;
            let mut encoded = EncodedChunk::new(&place, buffer);
            self.blob().read_exact_at(encoded.bytes_mut(), place.range.start)?;
            if self.verify(index, encoded.bytes()) == Some(false) {
                self.blob().distrust(place.range.clone());
                self.blob().read_exact_at(encoded.bytes_mut(), place.range.start)?;
            }
            room.resize(self.room(index), 0);
            decoder.decode_next(&encoded, &mut room)?;
            each(&room);
            buffer = encoded.into_buffer();
        }
        Ok(())
    }
}

/// An uncompressed blob in chunks of one size: a plain tar layer.
///
/// The format has no checksum of such a range. Only the blob's digest verifies it, and only as a whole.
pub struct PlainChunks {
    id: String,
    source: Arc<dyn ByteSource>,
}

impl PlainChunks {
    /// Bytes in a chunk: large enough for few requests of a sequential reader, small enough that a 4 KiB read
    /// of a cold file fetches little that it does not need.
    pub const CHUNK: u64 = 256 << 10;

    /// Chunks of `source`; a cache knows them as `id`.
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

    fn span(&self, index: u32) -> Option<ChunkSpan> {
        self.chunk_at(u64::from(index) * Self::CHUNK)
    }

    fn blob(&self) -> &Arc<dyn ByteSource> {
        &self.source
    }

    fn encoded(&self, index: u32) -> Result<EncodedRange, ChunkError> {
        let start = u64::from(index) * Self::CHUNK;
        let size = self.source.len();
        if start >= size {
            let name = self.source.name().to_owned();
            return Err(SourceError::PastEnd { name, offset: start, end: start + 1, size }.into());
        }
        Ok(EncodedRange { range: start..size.min(start + Self::CHUNK), head: 0, tail: 0 })
    }

    fn room(&self, index: u32) -> usize {
        self.encoded(index).map_or(0, |place| place.len())
    }

    fn decode(
        &self,
        _: u32,
        encoded: &mut EncodedChunk,
        room: &mut [u8],
    ) -> Result<Range<usize>, ChunkError> {
        room.copy_from_slice(encoded.bytes());
        Ok(0..room.len())
    }
}
