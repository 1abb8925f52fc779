//! Tar headers with exact offsets.
//!
//! A layer is a tar stream, and the meta image records for every file *where its bytes lie in that stream*.
//! This needs a strict reader of headers that counts every byte, not an unpacker. It is a **push** parser:
//! the layer arrives from a decompressor in pieces of any size, and each piece goes to [`Parser::feed`]. File
//! data (nearly all of a layer) is skipped by arithmetic and not looked at.
//!
//! # Parts of one entry
//!
//! A tar is a run of 512-byte blocks. A plain entry is one header block ([`header`]) and the data, padded to
//! whole blocks. Names longer than 100 bytes, large numbers, fractions of seconds and extended attributes
//! came later, as *extra entries in front of* the one they describe: pax records (typeflag `x`, and `g` for
//! all entries that follow; [`pax`]) and GNU's long names (`L`, `K`). Sparse files have a map ([`sparse`]) in
//! the header, in the pax records, or in the first blocks of the data. The parser collects all of it and
//! returns one [`TarEntry`].
//!
//! # Differences between readers
//!
//! containerd unpacks images with Go's `archive/tar`. So where GNU tar, Python and Go differ, Go decides: a
//! long name overrides a pax path; links have no data unless no header follows. Where Go refuses an entry
//! that is unambiguous (old GNU sparse files, contiguous files), this parser accepts it. All other deviations
//! are errors that name the entry and its offset: a layer that two readers could understand differently must
//! not become a disk.
//!
//! [`archive`] writes and reads the small tar of upstream's layer format.

pub mod archive;
mod entry;
mod header;
mod join;
mod parser;
mod pax;
mod sparse;

pub use entry::{EntryContent, EntryKind, SparsePiece, TarEntry, Timestamp};
pub use parser::{METADATA_LIMIT, Parser, TarEvent};

use thiserror::Error;

/// Bytes in a tar block. Headers are one block; data is padded to whole blocks.
pub const BLOCK: usize = 512;

/// Reasons to refuse a tar. `offset` is the position of the entry's first block in the uncompressed stream,
/// its extra entries included.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum TarError {
    /// The stream ends within an entry.
    #[error("The tar is cut short at byte {total}, within {what} of entry {name} at byte {offset}")]
    Truncated {
        /// Offset of the entry.
        offset: u64,
        /// Name of the entry, as far as it is known.
        name: String,
        /// The part that was being read.
        what: &'static str,
        /// Length of the stream.
        total: u64,
    },
    /// A header block whose checksum is wrong: not a header, or damaged.
    #[error("The block at byte {offset} is not a tar header: its checksum is wrong")]
    Checksum {
        /// Offset of the block.
        offset: u64,
    },
    /// A field with a value that its format does not allow.
    #[error("Entry {name} at byte {offset} has a bad {field}: {reason}")]
    Field {
        /// Offset of the entry.
        offset: u64,
        /// Name of the entry.
        name: String,
        /// Name of the header field or pax record.
        field: String,
        /// The broken rule.
        reason: String,
    },
    /// A type of entry that has no meaning in a layer.
    #[error("Entry {name} at byte {offset} has the unsupported type {flag:?}")]
    Type {
        /// Offset of the entry.
        offset: u64,
        /// Name of the entry.
        name: String,
        /// The typeflag.
        flag: char,
    },
    /// Pax records, a long name or a sparse map larger than [`METADATA_LIMIT`].
    #[error(
        "Entry {name} at byte {offset} has {what} of {len} bytes; at most {METADATA_LIMIT} are accepted"
    )]
    TooLong {
        /// Offset of the entry.
        offset: u64,
        /// Name of the entry.
        name: String,
        /// The part that is too long.
        what: &'static str,
        /// Its length.
        len: u64,
    },
    /// One zero block that other data follows: half an end marker.
    #[error("A single zero block at byte {offset} is followed by other data")]
    LoneZeroBlock {
        /// Offset of the zero block.
        offset: u64,
    },
    /// Bytes other than zeros behind the end marker.
    #[error("The tar ends before byte {offset}, but data that is not zero follows there")]
    Trailing {
        /// Offset of the first of these bytes.
        offset: u64,
    },
    /// Pax records or a long name without the entry that they describe.
    #[error(
        "The tar ends after the extended header at byte {offset}, without the entry it describes"
    )]
    Dangling {
        /// Offset of the extended header.
        offset: u64,
    },
}

/// A name as shortened text, for a message.
fn shown(name: &[u8]) -> String {
    const SHOWN: usize = 200;
    let text = String::from_utf8_lossy(&name[..name.len().min(SHOWN)]);
    let ellipsis = if name.len() > SHOWN { "…" } else { "" };
    format!("{text:?}{ellipsis}")
}

#[cfg(test)]
mod tests;
