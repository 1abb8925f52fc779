//! The SHA-256 of each segment's bytes of the blob, computed behind a scan.

use std::collections::VecDeque;
use std::ops::Range;

use bytes::{Buf as _, Bytes};
use sha2::{Digest as _, Sha256};

use crate::oci::Digest;

/// Results of the hasher.
pub(crate) struct Hashed {
    /// Digest of all bytes.
    pub(crate) layer: Digest,
    /// Number of bytes.
    pub(crate) len: u64,
    /// Digest of each segment.
    pub(crate) segments: Vec<[u8; 32]>,
}

/// Hashes the bytes of each segment, and the whole layer.
///
/// It takes the pieces that the scan takes, each before the scan's results of it; it can run on another
/// thread. Bytes that can still become a segment are kept.
#[derive(Default)]
pub struct SegmentHasher {
    pieces: VecDeque<Bytes>,
    /// Blob offset of the first kept byte.
    at: u64,
    received: u64,
    done: Vec<[u8; 32]>,
    whole: Sha256,
}

impl SegmentHasher {
    /// A hasher at the first byte of a layer.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes the next bytes.
    pub fn push(&mut self, piece: Bytes) {
        self.whole.update(&piece);
        self.received += piece.len() as u64;
        if !piece.is_empty() {
            self.pieces.push_back(piece);
        }
    }

    /// Hashes these bytes as the next segment; they must have been pushed and not forgotten.
    pub fn segment(&mut self, range: &Range<u64>) {
        self.forget_before(range.start);
        let mut hasher = Sha256::new();
        let mut left = range.end.saturating_sub(self.at) as usize;
        for piece in &self.pieces {
            let n = left.min(piece.len());
            hasher.update(&piece[..n]);
            left -= n;
            if left == 0 {
                break;
            }
        }
        self.done.push(hasher.finalize().into());
    }

    /// Drops kept bytes before blob offset `start`: no further segment begins there.
    pub fn forget_before(&mut self, start: u64) {
        while let Some(piece) = self.pieces.front_mut() {
            let surplus = start.saturating_sub(self.at).min(piece.len() as u64);
            piece.advance(surplus as usize);
            self.at += surplus;
            if !piece.is_empty() || surplus == 0 {
                break;
            }
            self.pieces.pop_front();
        }
    }

    /// Number of bytes so far.
    pub(crate) fn received(&self) -> u64 {
        self.received
    }

    /// Number of segments so far.
    pub(crate) fn count(&self) -> usize {
        self.done.len()
    }

    /// Digest and length in bytes of the pushed data; of the whole blob, once all of it has been pushed.
    #[must_use]
    pub fn whole(&self) -> (Digest, u64) {
        (Digest::from_hasher(self.whole.clone()), self.received)
    }

    pub(crate) fn finish(self) -> Hashed {
        let layer = Digest::from_hasher(self.whole);
        Hashed { layer, len: self.received, segments: self.done }
    }
}
