//! Inodes: 256 bytes on a new disk, with small extended attributes in the last 96; 128 bytes or more on other
//! disks.

use super::field::{get16, get32, high16, high32, low16, low32, put16, put32};
use super::file::{Attributes, NodeKind, Timestamp};

/// The file's blocks are found through extents.
pub(super) const EXTENTS_FLAG: u32 = 0x8_0000;
/// The directory has an index by hash.
pub(super) const INDEX_FLAG: u32 = 0x1000;
/// Blocks are counted in filesystem blocks and not in sectors.
const HUGE_FLAG: u32 = 0x4_0000;

/// Bytes of the fields that every inode has.
pub(super) const FIXED: usize = 128;

/// Targets up to this length lie in the inode, with a closing NUL.
pub(super) const INLINE_SYMLINK: usize = 59;

/// A directory with this many links or more gets a count of one: "unknown" (feature dir_nlink).
pub(super) const LINKS_KNOWN: u32 = 65_000;

/// Position of a file's content.
#[derive(Debug)]
pub(super) enum InodeContent {
    /// Unchanged: size and pointers stay.
    Kept,
    /// Newly written.
    New {
        /// Length in bytes: of the blocks of a directory, of a regular file, of the target of a symbolic
        /// link.
        size: u64,
        /// The root of the extent tree, for kinds that have one.
        extents: Option<[u8; 60]>,
        /// True if a directory has an index.
        indexed: bool,
    },
}

/// Position of a file's extended attributes.
#[derive(Debug)]
pub(super) enum Xattrs {
    /// Unchanged.
    Kept,
    /// In the inode and in the block, unless that is 0.
    New {
        /// Bytes behind the fields, as many as fit.
        in_inode: Vec<u8>,
        /// The block for the rest.
        block: u64,
    },
}

/// Fields of an inode besides attributes.
#[derive(Debug)]
pub(super) struct Fields<'a> {
    pub(super) kind: &'a NodeKind,
    pub(super) links: u32,
    /// Number of blocks of every kind that belong to it.
    pub(super) blocks: u64,
    pub(super) content: InodeContent,
    pub(super) xattrs: Xattrs,
}

/// A blank inode of `size` bytes: only the length of the fields beyond the first 128 is set.
pub(super) fn blank(size: usize, extra: u16) -> Vec<u8> {
    let mut record = vec![0; size];
    if size > FIXED {
        put16(&mut record, 128, extra);
    }
    record
}

/// Bytes behind the fields, for small extended attributes.
pub(super) fn xattr_room(record: &[u8]) -> usize {
    record.len() - FIXED - extra(record)
}

/// Bytes of fields beyond the first 128, bounded by the size of the inode.
pub(super) fn extra(record: &[u8]) -> usize {
    let room = record.len() - FIXED;
    if room == 0 { 0 } else { usize::from(get16(record, 128)).min(room) }
}

/// Generation number: distinguishes files that had the same inode number one after the other; a seed of
/// checksums.
pub(super) fn generation(record: &[u8]) -> u32 {
    get32(record, 100)
}

/// True if the inode has four bytes at `at`.
fn has_field(record: &[u8], at: usize) -> bool {
    at + 4 <= FIXED + extra(record)
}

/// Encodes an inode over `record`: a [`blank`] one, or one from the lower layers, which keeps all fields that
/// a layer cannot change. If the modification time is new, access, change and creation time are set to it: a
/// layer's tar has no other times.
pub(super) fn encode(record: &mut [u8], fields: &Fields, attributes: &Attributes) {
    put16(record, 0, format(fields.kind) | attributes.mode & 0o7777);
    put16(record, 2, low16(attributes.uid));
    put16(record, 24, low16(attributes.gid));
    put16(record, 120, high16(attributes.uid));
    put16(record, 122, high16(attributes.gid));
    put16(record, 26, if fields.links > LINKS_KNOWN { 1 } else { low16(fields.links) });
    if let InodeContent::New { size, extents, indexed } = &fields.content {
        put32(record, 4, low32(*size));
        put32(record, 108, high32(*size));
        let kept = get32(record, 32) & !(EXTENTS_FLAG | INDEX_FLAG | HUGE_FLAG);
        let extents_flag = if extents.is_some() { EXTENTS_FLAG } else { 0 };
        put32(record, 32, kept | extents_flag | if *indexed { INDEX_FLAG } else { 0 });
        record[40..100].copy_from_slice(&pointers(fields.kind, *extents));
    }
    if let Xattrs::New { in_inode, block } = &fields.xattrs {
        put32(record, 104, low32(*block));
        put16(record, 118, low16(high32(*block)));
        let at = record.len() - in_inode.len();
        record[at..].copy_from_slice(in_inode);
    }
    let huge = get32(record, 32) & HUGE_FLAG != 0;
    let count = if huge { fields.blocks } else { fields.blocks * super::geometry::BLOCK_SECTORS };
    put32(record, 28, low32(count));
    put16(record, 116, low16(high32(count)));
    if mtime(record) != attributes.mtime {
        set_times(record, attributes.mtime);
    }
}

/// The 60 bytes with the pointers to the content, or with the content itself.
fn pointers(kind: &NodeKind, extents: Option<[u8; 60]>) -> [u8; 60] {
    let mut bytes = extents.unwrap_or([0; 60]);
    match *kind {
        NodeKind::Symlink(ref target) if extents.is_none() => {
            bytes[..target.len()].copy_from_slice(target);
        }
        NodeKind::Char { major, minor } | NodeKind::Block { major, minor } => {
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
fn format(kind: &NodeKind) -> u16 {
    match kind {
        NodeKind::Directory => 0o040_000,
        NodeKind::Regular { .. } => 0o100_000,
        NodeKind::Symlink(_) => 0o120_000,
        NodeKind::Char { .. } => 0o020_000,
        NodeKind::Block { .. } => 0o060_000,
        NodeKind::Fifo => 0o010_000,
        NodeKind::Socket => 0o140_000,
    }
}

/// Sets all four times, as far as the inode has room for them.
fn set_times(record: &mut [u8], mtime: Timestamp) {
    let (seconds, extra) = time(mtime, has_field(record, 136));
    for (low, high) in [(8, 140), (12, 132), (16, 136), (144, 148)] {
        if low < FIXED || has_field(record, low) {
            put32(record, low, seconds);
        }
        if has_field(record, high) {
            put32(record, high, extra);
        }
    }
}

/// The modification time.
pub(super) fn mtime(record: &[u8]) -> Timestamp {
    let low = i64::from(get32(record, 16).cast_signed());
    let extra = if has_field(record, 136) { get32(record, 136) } else { 0 };
    Timestamp { secs: low + (i64::from(extra & 3) << 32), nanos: (extra >> 2).min(999_999_999) }
}

/// A time as seconds in 32 signed bits, and the extra field: two more bits of seconds below 30 of
/// nanoseconds. The range is 1901-12-13 to 2446-05-10, or to 2038-01-19 without the extra field; a time
/// outside becomes the nearest end, as in the kernel.
fn time(time: Timestamp, has_extra: bool) -> (u32, u32) {
    const FIRST: i64 = i32::MIN as i64;
    let last = if has_extra { 3 << 32 } else { 0 } + i64::from(i32::MAX);
    let secs = time.secs.clamp(FIRST, last);
    let nanos = if secs == time.secs { time.nanos.min(999_999_999) } else { 0 };
    let low = secs as i32;
    let epoch = ((secs - i64::from(low)) >> 32) as u32;
    (low.cast_unsigned(), epoch | nanos << 2)
}
