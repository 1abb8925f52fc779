//! What can be wrong with a gzip layer or with an index of one.

use thiserror::Error;

use crate::units::Bytes;

/// Why a gzip layer cannot be read, or an index does not fit it.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum GzipError {
    /// The compressed bytes break a rule of RFC 1951 or RFC 1952.
    #[error("The gzip stream is damaged at compressed byte {}: {reason}", .at.0)]
    Damaged {
        /// Compressed byte at which the rule was found broken.
        at: Bytes,
        /// The rule.
        reason: &'static str,
    },
    /// The stream ends before its last member does.
    #[error("The gzip stream ends at byte {}, inside a member", .at.0)]
    Truncated {
        /// Number of compressed bytes there were.
        at: Bytes,
    },
    /// Bytes that are neither a member nor zero padding follow the last member.
    #[error("Byte {} follows the last gzip member and is neither another member nor zero padding", .at.0)]
    TrailingGarbage {
        /// Offset of the first such byte.
        at: Bytes,
    },
    /// A member's trailer contradicts its content.
    #[error("The gzip member that ends at byte {} is damaged: its {what} is {found:#x} and its trailer says {expected:#x}", .at.0)]
    Trailer {
        /// Compressed offset of the trailer.
        at: Bytes,
        /// Which of the two fields.
        what: &'static str,
        /// As decoded.
        found: u32,
        /// As the trailer says.
        expected: u32,
    },
    /// A `gzip.meta` breaks a rule of its format (spec gzip-index).
    #[error("The gzip.meta is damaged at byte {offset}: {rule}")]
    Meta {
        /// Offset in the file.
        offset: u64,
        /// The rule.
        rule: &'static str,
    },
    /// A `turbobd.segments` breaks a rule of its format.
    #[error("The turbobd.segments is damaged at byte {offset}: {rule}")]
    Sidecar {
        /// Offset in the file.
        offset: u64,
        /// The rule.
        rule: &'static str,
    },
    /// Two parts that must describe the same layer do not.
    #[error(
        "The index belongs to another layer: {what} is {ours} in the one and {theirs} in the other"
    )]
    OtherLayer {
        /// What they disagree on.
        what: &'static str,
        /// In the index (or the sidecar).
        ours: u64,
        /// In the layer (or the `gzip.meta`).
        theirs: u64,
    },
    /// Neither a `gzip.meta` nor a `turbobd.segments` was given, or the windows lie in the missing one.
    #[error("The layer has no gzip index: {missing} is missing")]
    NoIndex {
        /// Name of the missing file.
        missing: &'static str,
    },
    /// More checkpoints, or a longer layer, than the format of an index can count.
    #[error("The index is too large to be written: {what}")]
    TooLarge {
        /// What overflows.
        what: &'static str,
    },
}

impl GzipError {
    pub(crate) fn damaged(byte: u64, reason: &'static str) -> Self {
        Self::Damaged { at: Bytes(byte), reason }
    }
}
