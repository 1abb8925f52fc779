//! What can be wrong with a zstd layer.

use std::io;

use thiserror::Error;

/// Why a zstd layer cannot be read. Offsets are of the compressed blob, in bytes.
#[derive(Debug, Error)]
pub enum ZstdError {
    /// Bytes that break a rule of RFC 8878.
    #[error("The zstd stream is damaged at byte {at}: {rule}")]
    Damaged {
        /// Where.
        at: u64,
        /// The rule.
        rule: &'static str,
    },
    /// The decoder found the frame wrong.
    #[error("The zstd frame at byte {at} is damaged")]
    Frame {
        /// Where the frame begins.
        at: u64,
        /// The decoder's reason.
        #[source]
        source: io::Error,
    },
    /// The stream ends before its last frame does.
    #[error("The zstd stream ends at byte {at}, inside a frame")]
    Truncated {
        /// Number of bytes there were.
        at: u64,
    },
    /// Decoding would take too much memory.
    #[error(
        "The zstd frame at byte {at} needs a window of {window} bytes, and at most {most} are allowed: compress the layer without --long, or with --long=27",
        most = super::MAX_WINDOW
    )]
    Window {
        /// Where the frame begins.
        at: u64,
        /// The window in its header, bytes.
        window: u64,
    },
    /// A dictionary, which a layer cannot bring along.
    #[error(
        "The zstd frame at byte {at} needs the dictionary {dictionary}, which no layer brings along: compress it without one"
    )]
    Dictionary {
        /// Where the frame begins.
        at: u64,
        /// The dictionary's number.
        dictionary: u32,
    },
    /// Much input, and hardly any output: it would have to be kept to be verified.
    #[error("The zstd stream has more than {most} bytes before byte {at} that yield almost nothing", most = super::scan::MOST_INPUT)]
    Empty {
        /// Where it became too much.
        at: u64,
    },
    /// There is no memory for a decoder.
    #[error("Cannot make a zstd decoder")]
    Decoder(#[source] io::Error),
}
