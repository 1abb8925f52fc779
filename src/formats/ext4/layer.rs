//! The part of one layer on the disk.

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};

use super::geometry::{BLOCK, BLOCK_SECTORS, sector_of};
use crate::units::{SECTOR, Sectors};

/// A range of the disk in this layer, with its content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LayerRun<'a> {
    /// These bytes, a multiple of 512.
    Metadata {
        /// First sector on the disk.
        lba: Sectors,
        /// The content.
        bytes: &'a [u8],
    },
    /// The content lies in the layer's uncompressed tar.
    Remote {
        /// First sector on the disk.
        lba: Sectors,
        /// Length.
        count: Sectors,
        /// First sector in the tar.
        target: Sectors,
    },
    /// Zeros, over other content of a lower layer.
    Zeroed {
        /// First sector on the disk.
        lba: Sectors,
        /// Length.
        count: Sectors,
    },
}

impl LayerRun<'_> {
    /// First sector on the disk.
    #[must_use]
    pub fn lba(&self) -> Sectors {
        let (LayerRun::Metadata { lba, .. }
        | LayerRun::Remote { lba, .. }
        | LayerRun::Zeroed { lba, .. }) = *self;
        lba
    }

    /// Length in sectors.
    #[must_use]
    pub fn count(&self) -> Sectors {
        match *self {
            LayerRun::Metadata { bytes, .. } => Sectors(bytes.len() as u64 / SECTOR),
            LayerRun::Remote { count, .. } | LayerRun::Zeroed { count, .. } => count,
        }
    }
}

#[derive(Clone, Copy, Debug)]
struct LayerPiece {
    lba: u64,
    count: u64,
    content: PieceContent,
}

#[derive(Clone, Copy, Debug)]
enum PieceContent {
    /// Bytes from this index of [`LayerBlocks::bytes`] on.
    Bytes(usize),
    /// Sectors of the tar from this one on.
    Tar(u64),
    Zeros,
}

/// The sectors that one layer changes on the disk; all others keep the content of the layers below, or are
/// zero.
#[derive(Debug, Default)]
pub struct LayerBlocks {
    pieces: Vec<LayerPiece>,
    bytes: Vec<u8>,
}

impl LayerBlocks {
    /// The runs, ascending by disk position and without overlap.
    pub fn runs(&self) -> impl ExactSizeIterator<Item = LayerRun<'_>> {
        self.pieces.iter().map(|piece| {
            let (lba, count) = (Sectors(piece.lba), Sectors(piece.count));
            match piece.content {
                PieceContent::Bytes(at) => LayerRun::Metadata {
                    lba,
                    bytes: &self.bytes[at..at + (piece.count * SECTOR) as usize],
                },
                PieceContent::Tar(target) => {
                    LayerRun::Remote { lba, count, target: Sectors(target) }
                }
                PieceContent::Zeros => LayerRun::Zeroed { lba, count },
            }
        })
    }

    /// Length of all metadata runs together, in bytes.
    #[must_use]
    pub fn metadata_len(&self) -> u64 {
        self.bytes.len() as u64
    }

    /// Adds bytes, a multiple of 512.
    pub(super) fn metadata(&mut self, lba: Sectors, bytes: &[u8]) {
        let at = self.bytes.len();
        self.bytes.extend_from_slice(bytes);
        self.push(lba, bytes.len() as u64 / SECTOR, PieceContent::Bytes(at));
    }

    /// Adds a mapping into the tar.
    pub(super) fn remote(&mut self, lba: Sectors, count: Sectors, target: Sectors) {
        self.push(lba, count.0, PieceContent::Tar(target.0));
    }

    fn push(&mut self, lba: Sectors, count: u64, content: PieceContent) {
        if let Some(last) = self.pieces.last_mut()
            && last.lba + last.count == lba.0
            && match (last.content, content) {
                (PieceContent::Bytes(before), PieceContent::Bytes(at)) => {
                    before + (last.count * SECTOR) as usize == at
                }
                (PieceContent::Tar(before), PieceContent::Tar(target)) => {
                    before + last.count == target
                }
                (PieceContent::Zeros, PieceContent::Zeros) => true,
                _ => false,
            }
        {
            last.count += count;
            return;
        }
        self.pieces.push(LayerPiece { lba: lba.0, count, content });
    }

    /// Sorts by disk position.
    pub(super) fn sort(&mut self) {
        self.pieces.sort_unstable_by_key(|piece| piece.lba);
    }
}

/// Keyed hashes of the metadata blocks after all layers so far: enough to tell if a block changed. A false
/// "unchanged" has a probability of 2^-64 for each rewritten block, and the key is random, so no input can
/// provoke one.
#[derive(Debug, Default)]
pub(super) struct Emitted {
    key: RandomState,
    hashes: HashMap<u64, u64>,
}

impl Emitted {
    /// Adds a block to the layer, unless the layers below already have the same content.
    pub(super) fn emit(&mut self, layer: &mut LayerBlocks, block: u64, bytes: &[u8]) {
        if bytes.iter().all(|&byte| byte == 0) {
            // A block that was never written reads as zeros.
            if self.hashes.remove(&block).is_some() {
                layer.push(sector_of(block), BLOCK_SECTORS, PieceContent::Zeros);
            }
            return;
        }
        debug_assert_eq!(bytes.len(), BLOCK);
        let hash = self.key.hash_one(bytes);
        if self.hashes.insert(block, hash) != Some(hash) {
            layer.metadata(sector_of(block), bytes);
        }
    }

    /// Notes the content of a block in the layers below.
    pub(super) fn know(&mut self, block: u64, bytes: &[u8]) {
        if bytes.iter().any(|&byte| byte != 0) {
            self.hashes.insert(block, self.key.hash_one(bytes));
        }
    }

    /// Forgets a freed block, which is no longer referenced.
    pub(super) fn forget(&mut self, block: u64) {
        self.hashes.remove(&block);
    }
}
