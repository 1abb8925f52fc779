//! Faults of the segments of a layer.

use thiserror::Error;

/// Error of reading, making or using an index of segments.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum SegmentsError {
    /// A `turbobd.segments` breaks a rule of its format.
    #[error("The turbobd.segments is damaged at byte {offset}: {rule}")]
    Sidecar {
        /// Offset in the file.
        offset: u64,
        /// The broken rule.
        rule: &'static str,
    },
    /// The index describes another layer.
    #[error(
        "The index belongs to another layer: {what} is {ours} in the index and {theirs} in the layer"
    )]
    OtherLayer {
        /// The value that differs.
        what: &'static str,
        /// In the index.
        ours: u64,
        /// In the layer.
        theirs: u64,
    },
    /// More segments than the format can count.
    #[error("The layer has {count} segments, more than an index can hold")]
    TooMany {
        /// The number of segments.
        count: usize,
    },
}
