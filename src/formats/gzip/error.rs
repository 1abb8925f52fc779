//! Faults of a gzip layer or of its index.

use thiserror::Error;

use crate::segments::MAX_SEGMENT;
use crate::units::Bytes;

/// Error of reading a gzip layer, or of an index that does not match it.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum GzipError {
    /// The compressed bytes break a rule of RFC 1951 or RFC 1952.
    #[error("The gzip stream is damaged at compressed byte {}: {reason}", .at.0)]
    Damaged {
        /// Compressed byte at which the broken rule was found.
        at: Bytes,
        /// The broken rule.
        reason: &'static str,
    },
    /// The stream ends before its last member does.
    #[error("The gzip stream ends at byte {}, inside a member", .at.0)]
    Truncated {
        /// Number of compressed bytes in the stream.
        at: Bytes,
    },
    /// Bytes that are neither a member nor zero padding follow the last member.
    #[error("Byte {} follows the last gzip member and is neither another member nor zero padding", .at.0)]
    TrailingGarbage {
        /// Offset of the first of these bytes.
        at: Bytes,
    },
    /// A member's trailer contradicts its content.
    #[error("The gzip member that ends at byte {} is damaged: its {what} is {found:#x} and its trailer says {expected:#x}", .at.0)]
    Trailer {
        /// Compressed offset of the trailer.
        at: Bytes,
        /// The wrong field: CRC-32 or length.
        what: &'static str,
        /// Value of the decoded data.
        found: u32,
        /// Value in the trailer.
        expected: u32,
    },
    /// A `gzip.meta` breaks a rule of its format (spec gzip-index).
    #[error("The gzip.meta is damaged at byte {offset}: {rule}")]
    Meta {
        /// Offset in the file.
        offset: u64,
        /// The broken rule.
        rule: &'static str,
    },
    /// A `turbobd.segments` breaks a rule of its format.
    #[error("The turbobd.segments is damaged at byte {offset}: {rule}")]
    Sidecar {
        /// Offset in the file.
        offset: u64,
        /// The broken rule.
        rule: &'static str,
    },
    /// Two parts that must describe the same layer contradict each other.
    #[error(
        "The index belongs to another layer: {what} is {ours} in the index and {theirs} in the layer or the gzip.meta"
    )]
    OtherLayer {
        /// The value that differs.
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
    /// A segment is longer than memory is taken for.
    #[error("The segment at compressed byte {} has {len} of {part} bytes; {MAX_SEGMENT} are allowed", .at.0)]
    LongSegment {
        /// Compressed byte at which it begins.
        at: Bytes,
        /// `compressed` or `decoded`.
        part: &'static str,
        /// Their number.
        len: Bytes,
    },
    /// More checkpoints, or a longer layer, than the format of an index can count.
    #[error("The index is too large to be written: {what}")]
    TooLarge {
        /// The part that is too large.
        what: &'static str,
    },
}

impl GzipError {
    pub(crate) fn damaged(byte: u64, reason: &'static str) -> Self {
        Self::Damaged { at: Bytes(byte), reason }
    }
}
