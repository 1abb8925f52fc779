//! Origin of a byte of a disk, for people: the look-up of a read, without reading.

use super::{Disk, DiskRange, OpenedLayer};
use crate::volume::Volume as _;
use blobs::fetch::Blob;
use formats::lsmt::RunPlace;

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
    /// Its bytes.
    pub range: DiskRange,
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
    pub fn explain(&self, range: DiskRange, most: usize) -> Vec<Placed> {
        let range = DiskRange::from(range.offset..range.end().min(self.size()));
        let mut parts = Vec::new();
        if range.is_empty() {
            return parts;
        }
        let (first, count) = range.sectors();
        for run in self.parts.stack.look_up(first, count) {
            if parts.len() >= most {
                break;
            }
            let here = range.part_in(run.lba, run.len);
            let layer = usize::from(run.layer);
            let part = |what, layer| Placed { range: here, what, layer, chunk: None };
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
                    let at = sector.bytes().0 + (here.offset - run.lba.bytes().0);
                    self.explain_chunks(blob, layer, here, at, most, &mut parts);
                }
                // Refused when the disk was opened.
                (RunPlace::Remote(_), OpenedLayer::Turbo { target: None, .. }) => {}
            }
        }
        parts
    }

    /// Adds the parts of `range`, which is at byte `at` of the decoded blob.
    fn explain_chunks(
        &self,
        blob: &Blob,
        layer: usize,
        range: DiskRange,
        mut at: u64,
        most: usize,
        parts: &mut Vec<Placed>,
    ) {
        let source = blob.source();
        let (mut offset, end) = (range.offset, range.end());
        while offset < end && parts.len() < most {
            let Some(span) = source.chunk_at(at).filter(|span| super::holds(*span, at)) else {
                let (range, what) = (DiskRange::from(offset..end), What::Padding);
                parts.push(Placed { range, what, layer: Some(layer), chunk: None });
                return;
            };
            let range =
                DiskRange::new(offset, (span.start + u64::from(span.len) - at).min(end - offset));
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
                decoded_from: Some(source.frame(span.index).start)
                    .filter(|&first| first != span.index),
                start: place.start,
                end: place.end,
                decoded: span.len.into(),
                held,
            };
            let (what, layer) = (What::Data, Some(layer));
            parts.push(Placed { range, what, layer, chunk: Some(chunk) });
            at += range.len;
            offset += range.len;
        }
    }
}
