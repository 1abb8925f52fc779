//! overlaybd's layer format: which disk sector lives where.
//!
//! A layer is payload sectors followed by an *index* of [`Mapping`]s, sorted by disk sector (LBA).
//! A mapping says that a run of sectors of the virtual disk is found at a sector of this file, reads
//! as zeros, or, in a TurboOCI layer (*warp* in upstream's code), is found in the uncompressed tar
//! of the original image layer. Layers are stacked; for each sector the topmost layer that says
//! anything about it wins.
//!
//! ```text
//! header 4096 | payload sectors | index: N × 16 bytes [padding] | trailer 4096
//! ```
//!
//! There is no checksum anywhere in this format; a layer is as trustworthy as the
//! [`zfile`](crate::zfile) or the digest around it. So everything read here is checked against
//! everything else before it is used.
//!
//! Contents: [`mapping`] the sixteen bytes, [`layer`] one file, [`stack`] many layers and the
//! look-up, [`writer`] the way back; a layer that can still change is in the crate `disk`.

pub mod layer;
pub mod mapping;
pub mod stack;
pub mod writer;

use std::io;
use std::sync::Arc;

use thiserror::Error;

pub use layer::{Layer, LayerKind, Uuid};
pub use mapping::Mapping;
pub use stack::{Extent, Place, Run, Stack};
pub use writer::{Identity, NativeWriter, ScatteredWriter, WarpWriter};

use crate::units::{Bytes, Sectors};
use source::SourceError;

/// Why a layer cannot be read, stacked or written.
#[derive(Clone, Debug, Error)]
pub enum LsmtError {
    /// The bytes below could not be had.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// Header or trailer breaks a rule.
    #[error("{part} of layer {name} at byte {offset} is invalid: {rule}")]
    Record {
        /// What was opened.
        name: String,
        /// Header, trailer or index.
        part: &'static str,
        /// Where it lies in the LSMT stream.
        offset: u64,
        /// What should hold, and what was found.
        rule: String,
    },
    /// A mapping breaks a rule.
    #[error("Index entry {entry} of layer {name} ({mapping}) is invalid: {rule}")]
    Entry {
        /// What was opened.
        name: String,
        /// Number of the entry in the index.
        entry: u64,
        /// The entry.
        mapping: Mapping,
        /// What should hold.
        rule: &'static str,
    },
    /// The layers cannot be stacked.
    #[error("{layers} layers cannot be stacked: {rule}")]
    Stack {
        /// How many there are.
        layers: usize,
        /// What should hold.
        rule: &'static str,
    },
    /// A run given to a writer breaks a rule.
    #[error("Sectors {lba}..{end} cannot be added to a layer: {rule}")]
    Run {
        /// First sector of the run.
        lba: u64,
        /// One past its last sector.
        end: u64,
        /// What should hold.
        rule: &'static str,
    },
    /// More mappings than readers accept.
    #[error(
        "A layer needs more than {limit} index entries, which no reader opens: make the disk less fragmented"
    )]
    TooManyMappings {
        /// The limit, padding included.
        limit: u64,
    },
    /// A layer cannot have this size.
    #[error("A virtual disk cannot have {size}: {rule}")]
    Size {
        /// The size asked for.
        size: Bytes,
        /// What should hold.
        rule: &'static str,
    },
    /// The output failed.
    #[error("Cannot write a layer")]
    Write(#[source] Arc<io::Error>),
}

impl From<io::Error> for LsmtError {
    fn from(error: io::Error) -> Self {
        Self::Write(Arc::new(error))
    }
}

/// Bytes of a header or trailer with its padding.
pub const RECORD: u64 = 4096;

/// First payload sector of a layer.
pub const FIRST_SECTOR: Sectors = Sectors(8);

/// Most index entries of one layer, padding included (upstream `index.h:MAX_LSMT_RO_INDEX_SIZE`,
/// there since August 2026: it refuses to open what has more).
pub const MAX_ENTRIES: u64 = 1_000_000;

/// Most layers of an image (upstream `MAX_STACK_LAYERS`).
pub const MAX_LAYERS: usize = 255;

#[cfg(test)]
mod tests;
