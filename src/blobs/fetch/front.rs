//! A blob from its first byte to its last, for a reader in the background.
//!
//! Bytes of chunks that the tier of encoded chunks has are read from there; the rest (what the tier does not have, and
//! what belongs to no chunk, such as a header) is read from the blob's source in the class of the fill. After a fill the
//! network is hardly asked. A piece is read when it is [quiet](crate::quiet): so whatever the reader makes of the bytes yields
//! to demand too. Nothing is verified here: who reads a blob whole compares the digest of the whole.

use std::io::{self, Read};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::blob::Blob;
use crate::quiet::Demand;
use source::Class;
use source::OneBuffer;
use source::chunk::ChunkError;

/// Most bytes of one read of the source: a request of the fill.
const PIECE: u64 = 1 << 20;

/// Reads a blob from front to end.
pub struct WholeBlob {
    blob: Arc<Blob>,
    demand: Arc<Demand>,
    stop: Arc<AtomicBool>,
    /// First byte that was not given out.
    at: u64,
    /// The chunk that may have it, or a later one.
    chunk: u32,
    piece: Vec<u8>,
    /// Bytes of the piece that were given out.
    given: usize,
}

impl WholeBlob {
    /// Begins at the first byte. Each piece waits until `demand` allows it. When `stop` becomes true, the next read is an
    /// error.
    #[must_use]
    pub fn new(blob: Arc<Blob>, demand: Arc<Demand>, stop: Arc<AtomicBool>) -> Self {
        Self { blob, demand, stop, at: 0, chunk: 0, piece: Vec::new(), given: 0 }
    }

    /// Reads the next piece; an empty one at the end.
    fn next(&mut self) -> io::Result<()> {
        (self.piece, self.given) = (Vec::new(), 0);
        let source = self.blob.source().clone();
        let mut end = (self.at + PIECE).min(source.blob().len());
        while self.chunk < source.chunk_count() {
            let range = source.encoded(self.chunk).map_err(|error| failed(&error))?.range;
            if range.end <= self.at {
                self.chunk += 1;
                continue;
            }
            if range.start > self.at {
                end = end.min(range.start);
                break;
            }
            if let Some(bytes) = self.stored(self.chunk, (range.end - range.start) as usize) {
                self.given = (self.at - range.start) as usize;
                self.at = range.end;
                self.piece = bytes;
                return Ok(());
            }
            end = end.min(range.end);
            break;
        }
        let mut bytes = vec![0; end.saturating_sub(self.at) as usize];
        if !bytes.is_empty() {
            let run = &mut OneBuffer::new(&mut bytes);
            let read = source.blob().read_run(self.at..end, Class::Fill, run);
            read.map_err(io::Error::other)?;
        }
        self.at += bytes.len() as u64;
        self.piece = bytes;
        Ok(())
    }

    /// A chunk's encoded bytes from the tier.
    fn stored(&self, chunk: u32, len: usize) -> Option<Vec<u8>> {
        let stored = self.blob.stored().encoded.as_ref()?;
        if stored.len_of(chunk) != Some(len) {
            return None;
        }
        let mut bytes = vec![0; len];
        let verify = |bytes: &[u8]| self.blob.source().verify(chunk, bytes);
        stored.read(chunk, &mut bytes, &verify).then_some(bytes)
    }
}

fn failed(error: &ChunkError) -> io::Error {
    io::Error::other(error.clone())
}

impl Read for WholeBlob {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let stopped = || io::Error::other("the reader was told to stop");
        let is_over = || self.stop.load(Ordering::Acquire);
        if is_over() {
            return Err(stopped());
        }
        if self.given == self.piece.len() {
            if !self.demand.wait(&is_over) {
                return Err(stopped());
            }
            self.next()?;
        }
        let rest = &self.piece[self.given.min(self.piece.len())..];
        let len = rest.len().min(buf.len());
        buf[..len].copy_from_slice(&rest[..len]);
        self.given += len;
        Ok(len)
    }
}
