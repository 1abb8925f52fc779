//! Origin of a byte of a disk, for people: the look-up of a read, without reading.

use std::ops::Range;

use super::{Disk, OpenedLayer};
use crate::volume::Volume as _;
use blobs::fetch::Blob;
use formats::lsmt::RunPlace;
use formats::units::{SECTOR, Sectors};

/// Kind of a part of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    /// No layer has data here: zeros.
    Hole,
    /// Filesystem metadata of a TurboOCI layer: in memory, always.
    Metadata,
    /// Data of a layer, in a chunk.
    Data,
    /// Beyond the end of an original layer: the padding of its last file, zeros.
    Padding,
}

/// Present place of a chunk's bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BytesPlace {
    /// Decoded, in the memory cache.
    Memory,
    /// On this host: in a local file, or in the tier on disk.
    Disk,
    /// Not on this host: a read sends a request.
    Remote,
}

/// A part of a disk that lies in one place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placed {
    /// First byte on the disk.
    pub offset: u64,
    /// Number of bytes.
    pub len: u64,
    /// Kind of the part.
    pub what: What,
    /// Number of the layer with the part, 0 lowest.
    pub layer: Option<usize>,
    /// The chunk with the part.
    pub chunk: Option<ChunkPlace>,
}

/// The chunk behind a part of a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChunkPlace {
    /// The blob, as named in the cache: its digest and its cuts.
    pub blob: String,
    /// Byte of the decoded blob; for a TurboOCI layer, of the uncompressed tar.
    pub at: u64,
    /// Number of the chunk (the segment of a compressed layer).
    pub index: u32,
    /// The chunk at which decoding begins, if it is another one: the first of a long zstd frame.
    pub decoded_from: Option<u32>,
    /// Its first byte in the blob as it is stored.
    pub start: u64,
    /// One past its last byte in the blob as it is stored.
    pub end: u64,
    /// Its length decoded, in bytes.
    pub decoded: u64,
    /// Its present place.
    pub held: BytesPlace,
}

impl Disk {
    /// Origin of bytes `range` of the disk, cut at layers and chunks, in at most `most` parts. Bytes past the
    /// end of the disk are left out.
    #[must_use]
    pub fn explain(&self, range: Range<u64>, most: usize) -> Vec<Placed> {
        let end = range.end.min(self.size());
        let mut parts = Vec::new();
        if range.start >= end {
            return parts;
        }
        let first = range.start / SECTOR;
        let count = Sectors(end.div_ceil(SECTOR) - first);
        for run in self.parts.stack.look_up(Sectors(first), count) {
            if parts.len() >= most {
                break;
            }
            let start = run.lba.bytes().0.max(range.start);
            let skip = start - run.lba.bytes().0;
            let len = (run.lba + run.len).bytes().0.min(end) - start;
            let layer = usize::from(run.layer);
            let part = |what, layer| Placed { offset: start, len, what, layer, chunk: None };
            match (run.place, &self.parts.layers[layer]) {
                (RunPlace::Zero, _) => parts.push(part(What::Hole, None)),
                (RunPlace::Own(_), OpenedLayer::Turbo { .. }) => {
                    parts.push(part(What::Metadata, Some(layer)));
                }
                (RunPlace::Remote(sector), OpenedLayer::Turbo { target: Some(blob), .. })
                | (
                    RunPlace::Own(sector) | RunPlace::Remote(sector),
                    OpenedLayer::Native { chunks: blob },
                ) => {
                    let at = sector.bytes().0 + skip;
                    self.explain_chunks(blob, layer, start, at..at + len, most, &mut parts);
                }
                // Refused when the disk was opened.
                (RunPlace::Remote(_), OpenedLayer::Turbo { target: None, .. }) => {}
            }
        }
        parts
    }

    fn explain_chunks(
        &self,
        blob: &Blob,
        layer: usize,
        offset: u64,
        range: Range<u64>,
        most: usize,
        parts: &mut Vec<Placed>,
    ) {
        let source = blob.source();
        let mut at = range.start;
        while at < range.end && parts.len() < most {
            let offset = offset + (at - range.start);
            let Some(span) = source.chunk_at(at).filter(|span| super::holds(*span, at)) else {
                let len = range.end - at;
                let what = What::Padding;
                parts.push(Placed { offset, len, what, layer: Some(layer), chunk: None });
                return;
            };
            let len = (span.start + u64::from(span.len)).min(range.end) - at;
            let place = source.encoded(span.index).map_or(0..0, |place| place.range);
            let held = if self.cache.holds(blob, span.index) {
                BytesPlace::Memory
            } else if blob.is_near(span.index) {
                BytesPlace::Disk
            } else {
                BytesPlace::Remote
            };
            let chunk = ChunkPlace {
                blob: source.id().to_owned(),
                at,
                index: span.index,
                decoded_from: Some(source.serial(span.index).start)
                    .filter(|&first| first != span.index),
                start: place.start,
                end: place.end,
                decoded: span.len.into(),
                held,
            };
            let (what, layer) = (What::Data, Some(layer));
            parts.push(Placed { offset, len, what, layer, chunk: Some(chunk) });
            at += len;
        }
    }
}
