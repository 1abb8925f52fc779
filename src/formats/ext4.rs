//! A tree of files, and the ext4 blocks that describe it.
//!
//! The layers of an image are applied, one after the other, to one in-memory [`Tree`]. After each,
//! [`Image::commit_layer`] returns the layer's part of the virtual disk ([`LayerBlocks`]): blocks of
//! metadata, and for file data mappings from disk sectors into the layer's uncompressed tar. A reader stacks
//! layers and takes each sector from the newest layer that has it. So a layer contains only the sectors that
//! it changes, and a sector in no layer reads as zeros.
//!
//! # The filesystem
//!
//! The kernel sees an ext4 that is only ever read: no journal, 4 KiB blocks, 256-byte inodes, extents,
//! indexed directories, nanosecond times from 1901 to 2446. It is clean under `e2fsck -fn` after every layer.
//! All of it depends only on the tree's history, the disk's size and the [`FilesystemIdentity`]: equal layers give
//! equal bytes.
//!
//! * **The fixed parts come first** (flex_bg): superblock, descriptors, bitmaps, inode tables. A region for
//!   directories, extent trees and similar follows, then file data. The data has the order of the tar, not of
//!   the tree: read-ahead on the disk is read-ahead in the tar. There are no backup superblocks
//!   (sparse_super2 with no groups named), and there is no room for resizing.
//! * **An empty disk is nearly free.** Zeros are never stored, so unused inode tables cost nothing. 64 bytes
//!   of descriptor and 128 of bitmap per group grow with the disk: 120 KiB for 64 GiB, and they compress
//!   well.
//! * **Descriptors have checksums** (uninit_bg) for one reason: only then may they mark an inode table as
//!   unused. Without the mark, `e2fsck` reads all tables, 2 GiB of holes on a disk of 64 GiB, and the padding
//!   of each unused inode bitmap must be written. metadata_csum would rewrite every inode and directory to
//!   protect bytes that the layer's own digest already covers.
//!
//! # Blocks are never reused
//!
//! A mapping can be shorter than its block: the end of a file fills only some sectors of its last block. If
//! that block later belonged to another file, the lower layer's bytes would be visible behind the end of the
//! new file through `mmap`. So freed blocks are marked free (counts are exact), but no later layer uses them;
//! inode numbers follow the same rule. A directory that changes is rewritten in its own blocks, which is safe
//! because a block of metadata is always written whole. The cost is disk addresses, and there are enough of
//! them: a hole takes no space.
//!
//! One effect remains: a file's last sector comes whole from the tar, with the padding that archivers fill
//! with zeros. A hostile tar can put other bytes there. They are visible only through `mmap` past the end of
//! the file.
//!
//! # Pieces
//!
//! `tree`, made of the types in `file`, is the input. `image` controls a commit and uses `allocation`
//! (bitmaps), `data` (blocks for files) and `layer` (the result). Each other module encodes one structure:
//! `superblock`, `group`, `inode`, `extent`, `directory` with `hash`, `xattr`. `geometry` has their positions
//! and `field` the storage of numbers.
//!
//! `lost+found` with mode 0700 is added to the root, because `e2fsck` requires it. An image with its own
//! `lost+found` keeps that one, even if it is not a directory; `e2fsck` then reports an error.

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
mod mountable;
mod read;
mod superblock;
mod table;
mod tree;
mod xattr;

#[cfg(test)]
mod tests;

pub use data::{DataError, FILE_MAX};
pub use file::{Attributes, DataRun, NodeKind, Timestamp};
pub use geometry::Geometry;
pub use image::{FilePart, Image};
pub use layer::{LayerBlocks, LayerRun};
pub use mountable::{ImageKind, MountableError, check_mountable};
pub use read::{ReadError, read, read_within};
pub use superblock::FilesystemIdentity;
pub use tree::{LINKS_MAX, NAME_MAX, NodeId, SYMLINK_MAX, Tree, TreeError};
pub use xattr::XattrError;

use crate::units::Bytes;

/// Reasons why a layer cannot be laid out.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Ext4Error {
    /// The size of the disk is out of bounds.
    #[error(
        "The virtual size {size} is not a multiple of 4096 B from {} to {}",
        Geometry::MIN,
        Geometry::MAX
    )]
    BadSize {
        /// The requested size.
        size: Bytes,
    },
    /// There are no free blocks.
    #[error("The image does not fit into its virtual disk of {size}; raise --vsize")]
    NoBlocks {
        /// Size of the disk.
        size: Bytes,
    },
    /// There are no free inodes.
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
        /// Path of the directory.
        path: String,
        /// Number of entries.
        entries: usize,
    },
    /// The data of a file cannot be represented.
    #[error("The data of \"{path}\" cannot be laid out")]
    Data {
        /// Path of the file.
        path: String,
        /// The reason.
        source: DataError,
    },
    /// The extended attributes of a file cannot be represented.
    #[error("The extended attributes of \"{path}\" cannot be stored")]
    Xattr {
        /// Path of the file.
        path: String,
        /// The reason.
        source: XattrError,
    },
}
