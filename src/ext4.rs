//! A tree of files and the ext4 blocks that describe it.

mod allocation;
mod data;
mod directory;
mod extent;
mod field;
mod geometry;
mod group;
mod hash;
mod image;
mod inode;
mod layer;
mod superblock;
mod tree;
mod xattr;

#[cfg(test)]
mod tests;

pub use data::DataError;
pub use geometry::Geometry;
pub use image::Image;
pub use layer::{LayerBlocks, Run};
pub use superblock::Identity;
pub use tree::{Attributes, DataRun, Kind, LINKS_MAX, NAME_MAX, NodeId, SYMLINK_MAX, Timestamp, Tree, TreeError};
pub use xattr::XattrError;

use crate::units::Bytes;

/// Why a layer cannot be laid out.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Ext4Error {
    /// The disk's size is out of bounds.
    #[error("The virtual size {size} is not a multiple of 4096 B from {} to {}", Geometry::MIN, Geometry::MAX)]
    BadSize {
        /// The size asked for.
        size: Bytes,
    },
    /// No blocks are left.
    #[error("The image does not fit into its virtual disk of {size}; raise --vsize")]
    NoBlocks {
        /// Size of the disk.
        size: Bytes,
    },
    /// No inodes are left.
    #[error("The image has more files than the {inodes} inodes of its virtual disk; raise --vsize")]
    NoInodes {
        /// Inodes of the disk.
        inodes: u32,
    },
    /// A directory needs more than two levels of index.
    #[error("The directory \"{path}\" has {entries} entries, more than an index of two levels holds")]
    DirectoryTooLarge {
        /// Where it is.
        path: String,
        /// Its entries.
        entries: usize,
    },
    /// A file's data cannot be expressed.
    #[error("The data of \"{path}\" cannot be laid out")]
    Data {
        /// Where the file is.
        path: String,
        /// Why.
        source: DataError,
    },
    /// A file's extended attributes cannot be expressed.
    #[error("The extended attributes of \"{path}\" cannot be stored")]
    Xattr {
        /// Where the file is.
        path: String,
        /// Why.
        source: XattrError,
    },
}
