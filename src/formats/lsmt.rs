//! overlaybd's layer format: the position of each disk sector.
//!
//! A layer is payload sectors followed by an *index* of [`Mapping`]s, sorted by disk sector (LBA). A mapping
//! places a run of sectors of the virtual disk at a sector of this file, or says that the run reads as zeros.
//! In a TurboOCI layer (*warp* in upstream's code), it can also place the run in the uncompressed tar of the
//! original image layer. Layers are stacked; each sector comes from the topmost layer that has a mapping for
//! it.
//!
//! ```text
//! header 4096 | payload sectors | index: N × 16 bytes [padding] | trailer 4096
//! ```
//!
//! The format has no checksum; the integrity of a layer depends on the [`zfile`](crate::zfile) or the digest
//! around it. So all values are checked against each other before they are used.
//!
//! Contents: [`mapping`] the sixteen bytes, [`layer`] one file, [`stack`] many layers and the look-up,
//! [`writer`] writing of a layer. A layer that still changes is in the crate `disk`.

pub mod layer;
pub mod mapping;
pub mod stack;
pub mod writer;

use std::io;
use std::sync::Arc;

use thiserror::Error;

pub use layer::{LsmtLayer, TagMeaning, Uuid};
pub use mapping::Mapping;
pub use stack::{Extent, RunPlace, Stack, StackRun};
pub use writer::{LayerIdentity, NativeWriter, ScatteredWriter, WarpWriter};

use crate::units::{Bytes, Sectors};
use source::{OverBudget, SourceError};

/// Error of reading, stacking or writing a layer.
#[derive(Clone, Debug, Error)]
pub enum LsmtError {
    /// The underlying bytes could not be read.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// The index does not fit the budget of memory.
    #[error(transparent)]
    Budget(#[from] OverBudget),
    /// A header or trailer that breaks a rule.
    #[error("{part} of layer {name} at byte {offset} is invalid: {rule}")]
    Record {
        /// Name of the opened source.
        name: String,
        /// Header, trailer or index.
        part: &'static str,
        /// Offset in the LSMT stream.
        offset: u64,
        /// The broken rule, and the value found.
        rule: String,
    },
    /// A mapping that breaks a rule.
    #[error("Index entry {entry} of layer {name} ({mapping}) is invalid: {rule}")]
    Entry {
        /// Name of the opened source.
        name: String,
        /// Number of the entry in the index.
        entry: u64,
        /// The entry.
        mapping: Mapping,
        /// The broken rule.
        rule: &'static str,
    },
    /// The layers cannot be stacked.
    #[error("{layers} layers cannot be stacked: {rule}")]
    Stack {
        /// Number of layers.
        layers: usize,
        /// The broken rule.
        rule: &'static str,
    },
    /// A run given to a writer that breaks a rule.
    #[error("Sectors {lba}..{end} cannot be added to a layer: {rule}")]
    Run {
        /// First sector of the run.
        lba: u64,
        /// One past its last sector.
        end: u64,
        /// The broken rule.
        rule: &'static str,
    },
    /// More mappings than readers accept.
    #[error(
        "A layer needs more than {limit} index entries, and readers accept no more: make the disk less fragmented"
    )]
    TooManyMappings {
        /// The limit, padding included.
        limit: u64,
    },
    /// A size that a virtual disk cannot have.
    #[error("A virtual disk cannot have {size}: {rule}")]
    Size {
        /// The requested size.
        size: Bytes,
        /// The broken rule.
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

/// Bytes of a header or trailer, padding included.
pub const RECORD: u64 = 4096;

/// First payload sector of a layer.
pub const FIRST_SECTOR: Sectors = Sectors(8);

/// Most index entries of one layer, padding included (upstream `index.h:MAX_LSMT_RO_INDEX_SIZE`, there since
/// August 2026: it refuses to open a layer with more).
pub const MAX_ENTRIES: u64 = 1_000_000;

/// Most layers of an image (upstream `MAX_STACK_LAYERS`).
pub const MAX_LAYERS: usize = 255;

#[cfg(test)]
mod tests;
