//! The index of a layer: the positions where decoding can begin, and the data needed there.

use std::ops::Range;

use sha2::{Digest as _, Sha256};

use super::decoder::read_lengths;
use super::window::SparseWindow;
use crate::oci::Digest;
use crate::units::{Bits, Bytes};
use inflate::huffman;
use inflate::marks::WINDOW;
use source::Proof;

/// A position where decoding can begin, in both coordinates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Boundary {
    /// First bit to decode, from the start of the blob.
    pub bit: Bits,
    /// Uncompressed position of its output.
    pub out: Bytes,
}

/// A position where decoding can begin, with the data needed there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Checkpoint {
    /// First bit to decode, from the start of the blob.
    pub bit: Bits,
    /// Uncompressed position of its output.
    pub out: Bytes,
    /// Structure at the position.
    pub kind: CheckpointKind,
    /// The output before it, with unused bytes set to zero; [`SparseWindow::none`] at a member start.
    pub window: SparseWindow,
}

/// Structure of the stream at a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CheckpointKind {
    /// The first deflate block of a gzip member: no history.
    MemberStart,
    /// A deflate block.
    Block,
    /// A symbol inside the block whose header is given.
    MidBlock(BlockHeader),
}

/// A copy of a deflate block's header: its three type bits and, for dynamic codes, their lengths.
#[derive(Clone, PartialEq, Eq)]
pub struct BlockHeader {
    bytes: Box<[u8]>,
    bits: usize,
}

/// Bits of the longest header: 3 + 14, 19 lengths of 3 bits, 316 lengths of at most 7 + 7 bits.
pub(super) const MAX_HEADER_BITS: usize = 3 + 14 + 19 * 3 + 316 * 14;

impl BlockHeader {
    /// The header from `bits` bits of `bytes`, beginning at bit `phase`.
    pub(super) fn from_bits(bytes: &[u8], phase: usize, bits: usize) -> Self {
        let mut copy: Vec<u8> = (0..bits.div_ceil(8))
            .map(|at| {
                let low = u16::from(bytes.get(at).copied().unwrap_or(0));
                let high = u16::from(bytes.get(at + 1).copied().unwrap_or(0));
                ((low | high << 8) >> phase) as u8
            })
            .collect();
        if let (Some(last), rest @ 1..) = (copy.last_mut(), bits % 8) {
            *last &= (1 << rest) - 1;
        }
        Self { bytes: copy.into(), bits }
    }

    /// The bits, low bit first, padded with zeros.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Number of bits.
    #[must_use]
    pub fn bits(&self) -> usize {
        self.bits
    }

    /// The code that ends this block, in stream order, and its length in bits; `None` if this is not the
    /// header of a block with codes.
    pub(super) fn end_of_block(&self) -> Option<(u32, u32)> {
        match self.bytes.first()? >> 1 & 3 {
            1 if self.bits == 3 => huffman::end_of_block(&huffman::fixed_lengths()),
            2 => {
                let peek = |at: usize| {
                    let mut word = [0; 8];
                    let tail = self.bytes.get(at / 8..).unwrap_or_default();
                    let n = tail.len().min(8);
                    word[..n].copy_from_slice(&tail[..n]);
                    u64::from_le_bytes(word) >> (at % 8)
                };
                let mut at = 3;
                let lengths = read_lengths(peek, &mut at, self.bits).ok()??;
                if at != self.bits {
                    return None;
                }
                huffman::end_of_block(lengths.litlen())
            }
            _ => None,
        }
    }
}

impl std::fmt::Debug for BlockHeader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} bits", self.bits)
    }
}

/// The data needed to decode any segment of a layer alone.
///
/// Checkpoints are in order: the first has output position 0, and positions strictly increase. Segment `i`
/// reaches from checkpoint `i` to the next one, or to the end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GzipIndex {
    /// The layer's digest, if the index has it (a `gzip.meta` has none).
    pub layer: Option<Digest>,
    /// Span: the target distance between checkpoints in the output.
    pub span: Bytes,
    /// Length of the layer.
    pub compressed_len: Bytes,
    /// Length of the uncompressed data.
    pub uncompressed_len: Bytes,
    /// Number of gzip members; a `gzip.meta` alone always says 1.
    pub members: u64,
    /// The checkpoints; at least one.
    pub checkpoints: Vec<Checkpoint>,
    /// CRC-32 of each segment's output, if known.
    pub crc32: Option<Vec<u32>>,
    /// SHA-256 of the compressed bytes that each segment touches, if known.
    pub sha256: Option<Vec<[u8; 32]>>,
}

impl GzipIndex {
    /// Number of segments: equal to that of the checkpoints.
    #[must_use]
    pub fn segments(&self) -> usize {
        self.checkpoints.len()
    }

    /// Range of the output of segment `i`.
    ///
    /// # Panics
    /// If there is no such segment.
    #[must_use]
    pub fn output(&self, i: usize) -> Range<u64> {
        let end = self.checkpoints.get(i + 1).map_or(self.uncompressed_len, |next| next.out);
        self.checkpoints[i].out.0..end.0
    }

    /// Range of blob bytes that segment `i` touches; the last byte may be shared with its neighbour.
    ///
    /// # Panics
    /// If there is no such segment.
    #[must_use]
    pub fn input(&self, i: usize) -> Range<u64> {
        let end =
            self.checkpoints.get(i + 1).map_or(self.compressed_len, |next| next.bit.bytes_ceil());
        self.checkpoints[i].bit.byte().0..end.0
    }

    /// Bytes of window in front of segment `i`: 0 or 32 KiB.
    pub(super) fn window_len(&self, i: usize) -> usize {
        match self.checkpoints.get(i) {
            Some(checkpoint) if !checkpoint.window.is_none() => WINDOW,
            _ => 0,
        }
    }

    /// A hash of the positions of the checkpoints: indexes with other segments have other values.
    #[must_use]
    pub fn cuts(&self) -> u32 {
        self.checkpoints.iter().fold(0, |crc, checkpoint| {
            let crc = crc32c::crc32c_append(crc, &checkpoint.bit.0.to_le_bytes());
            crc32c::crc32c_append(crc, &checkpoint.out.0.to_le_bytes())
        })
    }

    /// What proves the output of the segments: the table of their checksums, with everything else that decides their
    /// output. The windows belong to it: they are part of the index and not of the layer, so an index with the right
    /// checksums and other windows yields other bytes.
    #[must_use]
    pub fn proof(&self) -> Proof {
        let mut table = Sha256::new();
        let whole = self.sha256.as_ref().zip(self.crc32.as_ref());
        table.update(b"turbobd gzip table 1\0");
        for word in [self.compressed_len.0, self.uncompressed_len.0, self.segments() as u64] {
            table.update(word.to_le_bytes());
        }
        for checkpoint in &self.checkpoints {
            table.update(checkpoint.bit.0.to_le_bytes());
            table.update(checkpoint.out.0.to_le_bytes());
            match &checkpoint.kind {
                CheckpointKind::MemberStart => table.update([0]),
                CheckpointKind::Block => table.update([1]),
                CheckpointKind::MidBlock(header) => {
                    table.update([2]);
                    table.update((header.bits() as u64).to_le_bytes());
                    table.update(header.bytes());
                }
            }
            let (form, window) = checkpoint.window.packed();
            table.update([form]);
            table.update((window.len() as u64).to_le_bytes());
            table.update(window);
        }
        if let Some((sha256, crc32)) = whole {
            table.update(sha256.as_flattened());
            crc32.iter().for_each(|crc| table.update(crc.to_le_bytes()));
            return Proof::Table(table.finalize().into());
        }
        Proof::Index(table.finalize().into())
    }

    /// The segment that contains output position `out`, or `None` past the end.
    #[must_use]
    pub fn segment_at(&self, out: u64) -> Option<usize> {
        (out < self.uncompressed_len.0).then(|| {
            self.checkpoints.partition_point(|checkpoint| checkpoint.out.0 <= out).saturating_sub(1)
        })
    }

    /// Memory of the windows, in bytes.
    #[must_use]
    pub fn footprint(&self) -> usize {
        self.checkpoints
            .iter()
            .map(|checkpoint| size_of::<Checkpoint>() + checkpoint.window.packed_len())
            .sum()
    }
}
