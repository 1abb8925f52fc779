//! Faults of a zstd layer.

use std::io;

use thiserror::Error;

/// Most bytes of a blob without an end of a segment, 32 MiB: they are kept to be hashed, and become one segment, which may
/// not be longer. Twice the longest span stays below this, unless the bytes yield hardly any output.
pub const MOST_INPUT: u64 = 32 << 20;

/// Error of reading a zstd layer. Offsets are in bytes of the compressed blob.
#[derive(Debug, Error)]
pub enum ZstdError {
    /// Bytes that break a rule of RFC 8878.
    #[error("The zstd stream is damaged at byte {at}: {rule}")]
    Damaged {
        /// Offset of the fault.
        at: u64,
        /// The broken rule.
        rule: &'static str,
    },
    /// A frame that the decoder refuses.
    #[error("The zstd frame at byte {at} is damaged")]
    Frame {
        /// Offset of the frame.
        at: u64,
        /// The decoder's reason.
        #[source]
        source: io::Error,
    },
    /// The stream ends before its last frame does.
    #[error("The zstd stream ends at byte {at}, inside a frame")]
    Truncated {
        /// Number of bytes in the stream.
        at: u64,
    },
    /// A frame that needs too much memory to decode.
    #[error(
        "The zstd frame at byte {at} needs a window of {window} bytes, and at most {most} are allowed: compress the layer without --long, or with --long=27",
        most = super::MAX_WINDOW
    )]
    Window {
        /// Offset of the frame.
        at: u64,
        /// The window in its header, bytes.
        window: u64,
    },
    /// A frame that needs a dictionary, which a layer cannot contain.
    #[error(
        "The zstd frame at byte {at} needs the dictionary {dictionary}, which a layer cannot contain: compress it without one"
    )]
    Dictionary {
        /// Offset of the frame.
        at: u64,
        /// Number of the dictionary.
        dictionary: u32,
    },
    /// Much input with hardly any output. It would have to be kept in memory for its checksum.
    #[error("The zstd stream has more than {most} bytes before byte {at} that yield almost nothing", most = MOST_INPUT)]
    Empty {
        /// Offset at which the limit was reached.
        at: u64,
    },
    /// There is not enough memory for a decoder.
    #[error("Cannot make a zstd decoder")]
    Decoder(#[source] io::Error),
}
