//! The result of the parser: one entry, with the information of its extra headers.

use crate::units::Bytes;

/// A point in time: seconds since 1970 and nanoseconds after that second.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Timestamp {
    /// Seconds since 1970-01-01 00:00 UTC; negative before that.
    pub secs: i64,
    /// Nanoseconds after `secs`, `0..1_000_000_000`, also when `secs` is negative.
    pub nanos: u32,
}

/// One file, directory, link or device of a tar.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TarEntry {
    /// Offset of the entry's first block, which can be that of its pax records or long name.
    pub header_offset: Bytes,
    /// The path as written: not normalised, possibly with leading or trailing slashes. No NUL.
    pub name: Vec<u8>,
    /// Kind of the entry.
    pub kind: EntryKind,
    /// Permission, set-id and sticky bits: at most `0o7777`.
    pub mode: u32,
    /// Owner.
    pub uid: u64,
    /// Group.
    pub gid: u64,
    /// Time of the last modification.
    pub mtime: Timestamp,
    /// Extended attributes in the order of the records, each name once.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    /// Offset of the file's data in the uncompressed tar (behind a sparse map that is stored there).
    pub data_offset: Bytes,
    /// Bytes of data in the tar, without padding.
    pub stored_len: Bytes,
    /// Relation between the stored bytes and the file.
    pub content: EntryContent,
}

/// The kind of an entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EntryKind {
    /// A file with data.
    Regular,
    /// Another name of the file at this path in the archive.
    HardLink(Vec<u8>),
    /// A symbolic link with this text.
    Symlink(Vec<u8>),
    /// A character device.
    Char {
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
    /// A block device.
    Block {
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
    /// A directory.
    Directory,
    /// A named pipe.
    Fifo,
}

/// Relation between the stored bytes and the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EntryContent {
    /// The stored bytes are the file.
    Plain,
    /// The stored bytes are the pieces of a file that has holes.
    Sparse {
        /// Length of the file.
        size: Bytes,
        /// The pieces, ascending, not empty, not overlapping, within `size`. Their lengths add up to the
        /// stored length. They can start at any byte.
        pieces: Vec<SparsePiece>,
    },
}

/// A run of data in a sparse file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SparsePiece {
    /// Position in the file.
    pub file_offset: Bytes,
    /// Position in the uncompressed tar.
    pub tar_offset: Bytes,
    /// Length.
    pub len: Bytes,
}
