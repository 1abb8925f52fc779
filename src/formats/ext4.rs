//! A tree of files and the ext4 blocks that describe it.
//!
//! The layers of an image are applied, one after the other, to one in-memory [`Tree`]. After each,
//! [`Image::commit_layer`] says what the layer puts on the virtual disk ([`LayerBlocks`]): blocks
//! of metadata, and for file data mappings from disk sectors into the layer's uncompressed tar. A
//! reader stacks layers and takes each sector from the newest that has it, so a layer names only
//! what it changes, and what no layer names reads as zeros.
//!
//! # What the kernel sees
//!
//! ext4 that is only ever read: no journal, 4 KiB blocks, 256-byte inodes, extents, indexed
//! directories, nanosecond times from 1901 to 2446; clean under `e2fsck -fn` after every layer. All
//! of it depends only on the tree's history, the disk's size and the [`Identity`]: same layers,
//! same bytes.
//!
//! * **Everything fixed lies in front** (flex_bg): superblock, descriptors, bitmaps, inode tables.
//!   Behind them comes a region for directories, extent trees and the like, then file data in the
//!   order of the tar, whatever the order of the tree: read-ahead on the disk is read-ahead in the
//!   tar. No backup superblocks (sparse_super2 with no groups named), no room for resizing.
//! * **An empty disk costs nothing.** Zeros are never stored, so unused inode tables are free. What
//!   grows with the disk is 64 bytes of descriptor and 128 of bitmap a group: 120 KiB for 64 GiB,
//!   and well compressed.
//! * **Descriptors carry checksums** (uninit_bg) for one reason: only then may they say that an
//!   inode table is unused. Without that `e2fsck` reads all tables, 2 GiB of holes on a disk of 64
//!   GiB, and each unused inode bitmap needs its padding written. metadata_csum would rewrite every
//!   inode and directory to protect bytes that the layer's own digest already covers.
//!
//! # Blocks are never reused
//!
//! A mapping may be shorter than its block: the end of a file fills only some sectors of the last
//! one. Were that block once another file's, the lower layer's bytes would show behind the end of
//! the new one, through `mmap`. So what a layer frees is marked free (counts are exact) but is
//! given out to no later layer, and the same holds for inode numbers. A directory that changes is
//! rewritten in its own blocks, which is safe as a block of metadata is always written whole. The
//! price is disk addresses, of which there are plenty: a hole costs nothing.
//!
//! One thing remains visible: a file's last sector comes whole from the tar, with the padding that
//! archivers fill with zeros. A hostile tar can put other bytes there; they are seen by `mmap` past
//! the end of the file and by nothing else.
//!
//! # Pieces
//!
//! `tree`, of what `file` defines, is the input. `image` drives a commit, with `allocation`
//! (bitmaps), `data` (blocks for files) and `layer` (the result) at hand. The others each encode
//! one structure: `superblock`, `group`, `inode`, `extent`, `directory` with `hash`, `xattr`;
//! `geometry` knows where they lie and `field` how numbers are stored.
//!
//! `lost+found` appears in the root, mode 0700, because `e2fsck` insists on it; an image that
//! brings its own keeps that one, even if it is no directory, which `e2fsck` then objects to.

mod allocation;
mod checksum;
mod data;
mod directory;
mod extent;
mod field;
mod file;
mod geometry;
mod group;
mod hash;
mod image;
mod inode;
mod layer;
mod read;
mod superblock;
mod table;
mod tree;
mod xattr;

#[cfg(test)]
mod tests;

pub use data::DataError;
pub use file::{Attributes, DataRun, Kind, Timestamp};
pub use geometry::Geometry;
pub use image::Image;
pub use layer::{LayerBlocks, Run};
pub use read::{ReadError, read};
pub use superblock::Identity;
pub use tree::{LINKS_MAX, NAME_MAX, NodeId, SYMLINK_MAX, Tree, TreeError};
pub use xattr::XattrError;

use crate::units::Bytes;

/// Why a layer cannot be laid out.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Ext4Error {
    /// The disk's size is out of bounds.
    #[error(
        "The virtual size {size} is not a multiple of 4096 B from {} to {}",
        Geometry::MIN,
        Geometry::MAX
    )]
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
    #[error(
        "The directory \"{path}\" has {entries} entries, more than an index of two levels holds"
    )]
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
