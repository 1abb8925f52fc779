//! A file without its names: kind, content, attributes.

use std::collections::BTreeMap;

pub use crate::tar::Timestamp;
use crate::units::{Bytes, SECTOR};

/// Attributes of a file.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Attributes {
    /// Permission bits with set-uid, set-gid and sticky: `0o7777`. Higher bits are ignored.
    pub mode: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Time of the last change of the content. ext4 covers 1901 to 2446; other times are clamped.
    pub mtime: Timestamp,
    /// Extended attributes: full names (`security.capability`), values in the form of the system
    /// call (POSIX ACLs in the `posix_acl_xattr` form).
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

/// A piece of a file's content, with its position in the layer's uncompressed tar.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DataRun {
    /// First byte in the file.
    pub file_offset: Bytes,
    /// First byte in the uncompressed tar.
    pub tar_offset: Bytes,
    /// Length in bytes.
    pub len: Bytes,
    /// The content itself, `len` bytes, for a piece that cannot be a mapping of whole sectors
    /// ([`DataRun::needs_bytes`]). `None` for all others.
    pub bytes: Option<Box<[u8]>>,
}

impl DataRun {
    /// A run that stays in the tar.
    #[must_use]
    pub fn remote(file_offset: Bytes, tar_offset: Bytes, len: Bytes) -> DataRun {
        DataRun { file_offset, tar_offset, len, bytes: None }
    }

    /// True if this run cannot be a mapping of whole sectors, so that [`DataRun::bytes`] must be filled as
    /// the tar passes. `size` is the file's. Always false for a file without holes that starts on a sector of
    /// the tar and ends with the file.
    #[must_use]
    pub fn needs_bytes(&self, size: Bytes) -> bool {
        let end = self.file_offset.0.saturating_add(self.len.0);
        !self.file_offset.0.is_multiple_of(SECTOR)
            || !self.tar_offset.0.is_multiple_of(SECTOR)
            || (!end.is_multiple_of(SECTOR) && end != size.0)
    }

    /// Cuts this run into pieces so that as much as possible stays remote: at most a head, whole sectors and
    /// a tail. [`DataRun::needs_bytes`] must be tested for each piece. A run with offsets that differ modulo
    /// 512 cannot be mapped at all and is returned whole; GNU tar never writes one.
    #[must_use]
    pub fn split(self, size: Bytes) -> Vec<DataRun> {
        let phase = self.file_offset.0 % SECTOR;
        let stays = self.bytes.is_some() || !self.needs_bytes(size);
        let overflows = self.file_offset.checked_add(self.len).is_none()
            || self.tar_offset.checked_add(self.len).is_none();
        if stays || overflows || phase != self.tar_offset.0 % SECTOR {
            return vec![self];
        }
        let head = ((SECTOR - phase) % SECTOR).min(self.len.0);
        let rest = self.len.0 - head;
        let tail =
            if self.file_offset.0.saturating_add(self.len.0) == size.0 { 0 } else { rest % SECTOR };
        let mut pieces = Vec::with_capacity(3);
        let mut at = 0;
        for len in [head, rest - tail, tail] {
            if len > 0 {
                let (file, tar) = (self.file_offset + Bytes(at), self.tar_offset + Bytes(at));
                pieces.push(DataRun::remote(file, tar, Bytes(len)));
            }
            at += len;
        }
        pieces
    }
}

/// Kind of a node, with its content.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum NodeKind {
    /// A directory; [`Tree::children`](super::Tree::children) returns its entries.
    Directory,
    /// A regular file.
    Regular {
        /// Length in bytes.
        size: Bytes,
        /// Its data, ascending and without overlap; the gaps are holes. Empty for a file that was
        /// [read](super::read()) back from a disk: its blocks stay in place.
        runs: Vec<DataRun>,
    },
    /// A symbolic link with its exact target.
    Symlink(Vec<u8>),
    /// A character device.
    Char {
        /// Major number, 12 bits.
        major: u32,
        /// Minor number, 20 bits.
        minor: u32,
    },
    /// A block device.
    Block {
        /// Major number, 12 bits.
        major: u32,
        /// Minor number, 20 bits.
        minor: u32,
    },
    /// A named pipe.
    Fifo,
    /// A socket. A tar has none, but a filesystem that was in use can have one.
    Socket,
}
