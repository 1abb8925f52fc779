//! Inodes: 256 bytes, the last 96 of which hold small extended attributes.

use super::field::{high16, high32, low16, low32, put16, put32};
use super::file::{Attributes, Kind, Timestamp};
use super::geometry::INODE;
use super::superblock::EXTRA_ISIZE;
use super::xattr::IN_INODE;

/// The file's blocks are found through extents.
const EXTENTS_FLAG: u32 = 0x8_0000;
/// The directory has an index by hash.
const INDEX_FLAG: u32 = 0x1000;

/// Targets up to this length lie in the inode, with a NUL behind.
pub(super) const INLINE_SYMLINK: usize = 59;

/// Directories with more links than fit are said to have one: "unknown" (feature dir_nlink).
const LINKS_KNOWN: u32 = 65_000;

/// What an inode is made of besides attributes.
#[derive(Debug)]
pub(super) struct Fields<'a> {
    pub(super) kind: &'a Kind,
    /// Of directories: their blocks; of regular files: their length; of symbolic links: the
    /// target's.
    pub(super) size: u64,
    pub(super) links: u32,
    /// Blocks of every sort that belong to it.
    pub(super) blocks: u64,
    /// The root of the extent tree, for what has one.
    pub(super) extents: Option<[u8; 60]>,
    pub(super) indexed: bool,
    pub(super) xattrs: &'a [u8; IN_INODE],
    pub(super) xattr_block: u64,
}

/// Encodes an inode. Access, change and creation time equal the modification time: a layer's tar
/// knows no other.
pub(super) fn encode(fields: &Fields, attributes: &Attributes) -> [u8; INODE] {
    let mut record = [0; INODE];
    put16(&mut record, 0, format(fields.kind) | attributes.mode & 0o7777);
    put16(&mut record, 2, low16(attributes.uid));
    put16(&mut record, 24, low16(attributes.gid));
    put16(&mut record, 120, high16(attributes.uid));
    put16(&mut record, 122, high16(attributes.gid));
    put32(&mut record, 4, low32(fields.size));
    put32(&mut record, 108, high32(fields.size));
    put16(&mut record, 26, if fields.links > LINKS_KNOWN { 1 } else { low16(fields.links) });
    let sectors = fields.blocks * super::geometry::BLOCK_SECTORS;
    put32(&mut record, 28, low32(sectors));
    put16(&mut record, 116, low16(high32(sectors)));
    let extents = if fields.extents.is_some() { EXTENTS_FLAG } else { 0 };
    put32(&mut record, 32, extents | if fields.indexed { INDEX_FLAG } else { 0 });
    record[40..100].copy_from_slice(&pointers(fields));
    put32(&mut record, 104, low32(fields.xattr_block));
    put16(&mut record, 118, low16(high32(fields.xattr_block)));
    put16(&mut record, 128, EXTRA_ISIZE);
    let (seconds, extra) = time(attributes.mtime);
    for (low, high) in [(8, 140), (12, 132), (16, 136), (144, 148)] {
        put32(&mut record, low, seconds);
        put32(&mut record, high, extra);
    }
    record[INODE - IN_INODE..].copy_from_slice(fields.xattrs);
    record
}

/// The 60 bytes that say where the content is, or are it.
fn pointers(fields: &Fields) -> [u8; 60] {
    let mut bytes = fields.extents.unwrap_or([0; 60]);
    match *fields.kind {
        Kind::Symlink(ref target) if fields.extents.is_none() => {
            bytes[..target.len()].copy_from_slice(target);
        }
        Kind::Char { major, minor } | Kind::Block { major, minor } => {
            if major < 256 && minor < 256 {
                put32(&mut bytes, 0, major << 8 | minor);
            } else {
                put32(&mut bytes, 4, minor & 0xff | major << 8 | (minor & !0xff) << 12);
            }
        }
        _ => {}
    }
    bytes
}

/// The type bits of a mode.
fn format(kind: &Kind) -> u16 {
    match kind {
        Kind::Directory => 0o040_000,
        Kind::Regular { .. } => 0o100_000,
        Kind::Symlink(_) => 0o120_000,
        Kind::Char { .. } => 0o020_000,
        Kind::Block { .. } => 0o060_000,
        Kind::Fifo => 0o010_000,
    }
}

/// Seconds in 32 signed bits, and the extra field: two more bits of seconds below 30 of
/// nanoseconds. The range is 1901-12-13 to 2446-05-10; what is outside becomes its nearest end, as
/// in the kernel.
fn time(time: Timestamp) -> (u32, u32) {
    const FIRST: i64 = i32::MIN as i64;
    const LAST: i64 = (3 << 32) + i32::MAX as i64;
    let secs = time.secs.clamp(FIRST, LAST);
    let nanos = if secs == time.secs { time.nanos.min(999_999_999) } else { 0 };
    let low = secs as i32;
    let epoch = ((secs - i64::from(low)) >> 32) as u32;
    (low.cast_unsigned(), epoch | nanos << 2)
}
