//! The SHA-256 of each segment's compressed bytes, computed behind a scan.

use std::collections::VecDeque;

use bytes::Bytes;

use super::GzipError;
use super::index::{Boundary, GzipIndex};
use crate::oci::Digest;
use crate::segments;

/// Hashes the compressed bytes of each segment, and the whole layer.
///
/// It takes the pieces that the [`Scanner`](super::Scanner) takes, and the boundaries once they are final, in
/// any interleaving; it can run on another thread. A boundary becomes final about a span behind the scan, so
/// about a span of compressed data is kept.
///
/// The bytes of a segment are all bytes that it touches: neighbours share a byte if their boundary lies
/// inside one.
#[derive(Default)]
pub struct GzipSegmentHasher {
    segments: segments::SegmentHasher,
    /// Bit positions of boundaries that are not reached yet.
    boundaries: VecDeque<u64>,
    /// Number of boundaries given.
    given: usize,
    /// Blob offset at which the open segment begins, once a boundary has been reached.
    open: Option<u64>,
}

impl GzipSegmentHasher {
    /// A hasher at the first byte of a layer.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes the next compressed bytes.
    pub fn push(&mut self, piece: Bytes) {
        self.segments.push(piece);
        self.advance();
    }

    /// Takes the next boundary.
    pub fn boundary(&mut self, boundary: Boundary) {
        self.given += 1;
        self.boundaries.push_back(boundary.bit.0);
        self.advance();
    }

    /// Digest and length in bytes of the pushed data; of the whole blob, once all of it has been pushed.
    #[must_use]
    pub fn whole(&self) -> (Digest, u64) {
        self.segments.whole()
    }

    /// Adds the digests of each segment and of the layer to `index`, whose layer was fed to this hasher.
    /// Boundaries that became final only at the end are taken from the index.
    ///
    /// # Errors
    /// [`GzipError::OtherLayer`] if the boundaries or the length differ from those of `index`.
    pub fn finish(mut self, index: &mut GzipIndex) -> Result<Digest, GzipError> {
        for checkpoint in index.checkpoints.iter().skip(self.given) {
            self.boundary(Boundary { bit: checkpoint.bit, out: checkpoint.out });
        }
        if let Some(start) = self.open {
            self.segments.segment(&(start..self.segments.received()));
        }
        let hashed = self.segments.finish();
        let other = |what, ours, theirs| Err(GzipError::OtherLayer { what, ours, theirs });
        if hashed.len != index.compressed_len.0 {
            return other("the compressed length", index.compressed_len.0, hashed.len);
        }
        if hashed.segments.len() != index.checkpoints.len() {
            return other(
                "the number of segments",
                index.checkpoints.len() as u64,
                hashed.segments.len() as u64,
            );
        }
        index.sha256 = Some(hashed.segments);
        index.layer = Some(hashed.layer);
        Ok(hashed.layer)
    }

    fn advance(&mut self) {
        while let Some(&bit) = self.boundaries.front() {
            if bit.div_ceil(8) > self.segments.received() {
                break;
            }
            self.boundaries.pop_front();
            if let Some(start) = self.open.replace(bit / 8) {
                self.segments.segment(&(start..bit.div_ceil(8)));
            }
            self.segments.forget_before(bit / 8);
        }
    }
}
