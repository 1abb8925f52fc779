//! The SHA-256 of each segment's compressed bytes, behind a scan.

use std::collections::VecDeque;

use bytes::{Buf as _, Bytes};
use sha2::{Digest as _, Sha256};

use super::GzipError;
use super::index::{Boundary, Index};
use crate::oci::Digest;

/// Hashes the compressed bytes of each segment, and the whole layer.
///
/// It gets the pieces that the [`Scanner`](super::Scanner) gets, and the boundaries as they become
/// final, in any interleaving; it can run on another thread. A boundary becomes final about a span
/// behind the scan, so that much compressed data is kept.
///
/// A segment's bytes are all it touches: neighbours share a byte when their boundary lies inside one.
#[derive(Default)]
pub struct SegmentHasher {
    /// Bytes not yet behind a boundary.
    pieces: VecDeque<Bytes>,
    /// Blob offset of the first of them.
    at: u64,
    received: u64,
    /// Bits of boundaries that were not reached yet.
    boundaries: VecDeque<u64>,
    /// Number of boundaries given.
    given: usize,
    /// A boundary was reached: a segment is open.
    begun: bool,
    done: Vec<[u8; 32]>,
    whole: Sha256,
}

impl SegmentHasher {
    /// At the first byte of a layer.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// The next compressed bytes.
    pub fn push(&mut self, piece: Bytes) {
        self.whole.update(&piece);
        self.received += piece.len() as u64;
        if !piece.is_empty() {
            self.pieces.push_back(piece);
        }
        self.advance();
    }

    /// The next boundary.
    pub fn boundary(&mut self, boundary: Boundary) {
        self.given += 1;
        self.boundaries.push_back(boundary.bit.0);
        self.advance();
    }

    /// Digest and length in bytes of what was pushed so far: of the blob, once all of it was.
    #[must_use]
    pub fn whole(&self) -> (Digest, u64) {
        (Digest::from_hasher(self.whole.clone()), self.received)
    }

    /// Fills in `index`, whose layer was fed to this hasher, with the digest of each segment and of
    /// the layer. Boundaries that became final only at the end are taken from the index.
    ///
    /// # Errors
    /// [`GzipError::OtherLayer`] when the boundaries or the length are not those of `index`.
    pub fn finish(mut self, index: &mut Index) -> Result<Digest, GzipError> {
        for checkpoint in index.checkpoints.iter().skip(self.given) {
            self.boundary(Boundary { bit: checkpoint.bit, out: checkpoint.out });
        }
        if self.begun {
            self.hash_to(self.received);
        }
        let other = |what, ours, theirs| Err(GzipError::OtherLayer { what, ours, theirs });
        if self.received != index.compressed_len.0 {
            return other("the compressed length", index.compressed_len.0, self.received);
        }
        if self.done.len() != index.checkpoints.len() {
            return other(
                "the number of segments",
                index.checkpoints.len() as u64,
                self.done.len() as u64,
            );
        }
        let digest = Digest::from_hasher(self.whole);
        index.sha256 = Some(self.done);
        index.layer = Some(digest);
        Ok(digest)
    }

    fn advance(&mut self) {
        while let Some(&bit) = self.boundaries.front() {
            if bit.div_ceil(8) > self.received {
                break;
            }
            self.boundaries.pop_front();
            if self.begun {
                self.hash_to(bit.div_ceil(8));
            }
            self.begun = true;
            self.drop_to(bit / 8);
        }
    }

    /// Hashes the kept bytes up to blob offset `end` as one segment, keeping them.
    fn hash_to(&mut self, end: u64) {
        let mut hasher = Sha256::new();
        let mut left = end.saturating_sub(self.at) as usize;
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

    /// Forgets bytes before blob offset `start`.
    fn drop_to(&mut self, start: u64) {
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
}
