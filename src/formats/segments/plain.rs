//! The scan of an uncompressed layer: cut at every multiple of one span.

use std::ops::Range;

use super::index::{Encoding, ScannedLayer, Segment, SegmentEntry};
use crate::units::Bytes;
use source::chunk::PlainChunks;

/// Bytes in a segment: equal to the chunk of a layer without an index, so that both have the same chunks.
pub const PLAIN_SPAN: Bytes = Bytes(PlainChunks::CHUNK);

/// Cuts a tar as it arrives.
#[derive(Default)]
pub struct PlainScanner {
    at: u64,
    /// Number of bytes in the open segment.
    open: u64,
    crc: crc32fast::Hasher,
    segments: Vec<Segment>,
    /// Number of segments that were returned.
    taken: usize,
}

impl PlainScanner {
    /// Takes the next bytes.
    pub fn feed(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let left = (PLAIN_SPAN.0 - self.open) as usize;
            let (now, later) = bytes.split_at(left.min(bytes.len()));
            self.crc.update(now);
            self.at += now.len() as u64;
            self.open += now.len() as u64;
            if self.open == PLAIN_SPAN.0 {
                self.close();
            }
            bytes = later;
        }
    }

    fn close(&mut self) {
        let start = self.at - self.open;
        let len = std::mem::take(&mut self.open) as u32; // PLAIN_SPAN at most
        let crc32 = std::mem::take(&mut self.crc).finalize();
        let (entry, out) = (SegmentEntry::Start, start);
        self.segments.push(Segment { start, len, out, out_len: len, entry, crc32 });
    }

    /// Takes the segments that have become final since the last call.
    pub fn take_segments(&mut self) -> Vec<Range<u64>> {
        let new = self.segments[self.taken..].iter().map(Segment::input).collect();
        self.taken = self.segments.len();
        new
    }

    /// Ends the layer.
    #[must_use]
    pub fn finish(mut self) -> ScannedLayer {
        if self.open > 0 {
            self.close();
        }
        let len = Bytes(self.at);
        ScannedLayer {
            encoding: Encoding::Plain,
            span: PLAIN_SPAN,
            compressed_len: len,
            uncompressed_len: len,
            segments: self.segments,
        }
    }
}
