//! A tree of files and the ext4 blocks that describe it.
pub mod tree;
