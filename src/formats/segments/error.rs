//! What can be wrong with the segments of a layer.

use thiserror::Error;

/// Why an index of segments cannot be read, made or used.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum SegmentsError {
    /// A `turbobd.segments` breaks a rule of its format.
    #[error("The turbobd.segments is damaged at byte {offset}: {rule}")]
    Sidecar {
        /// Offset in the file.
        offset: u64,
        /// The rule.
        rule: &'static str,
    },
    /// The index describes another layer.
    #[error(
        "The index belongs to another layer: {what} is {ours} in the index and {theirs} in the layer"
    )]
    OtherLayer {
        /// What they disagree on.
        what: &'static str,
        /// In the index.
        ours: u64,
        /// In the layer.
        theirs: u64,
    },
    /// More segments than the format can count.
    #[error("The layer has {count} segments, more than an index can hold")]
    TooMany {
        /// How many.
        count: usize,
    },
}
