//! One inode: its kind, content and attributes.

use super::blocks::{BlockReader, FileBlocks};
use super::groups::Groups;
use super::walk::XattrBlocks;
use super::{ReadError, Source, damaged, xattr};
use crate::ext4::data::FILE_MAX;
use crate::ext4::field::{get16, get32, get64};
use crate::ext4::file::{Attributes, NodeKind};
use crate::ext4::geometry::BLOCK;
use crate::ext4::image::FileRecord;
use crate::ext4::inode::{self, EXTENTS_FLAG, INDEX_FLAG, INLINE_SYMLINK};
use crate::ext4::tree::SYMLINK_MAX;
use crate::units::Bytes;

/// Flags of inodes that this program does not support.
const REFUSED: [(u32, &str); 6] = [
    (0x4, "is compressed"),
    (0x800, "is encrypted"),
    (0x10_0000, "is protected by verity"),
    (0x20_0000, "holds an attribute of another (ea_inode)"),
    (0x1000_0000, "lies in its inode (inline_data)"),
    (0x4000_0000, "has names without case (casefold)"),
];

/// A file as stored on the disk.
pub(super) struct File {
    pub(super) kind: NodeKind,
    pub(super) attributes: Attributes,
    pub(super) record: FileRecord,
    /// Blocks of a directory, in order.
    pub(super) content: Vec<u64>,
    /// True for a directory that says that it has an index.
    pub(super) indexed: bool,
}

/// Reads one inode and claims its blocks.
pub(super) fn read(
    source: Source<'_>,
    groups: &mut Groups,
    xattrs: &mut XattrBlocks,
    number: u32,
) -> Result<File, ReadError> {
    let bad = |rule: String| damaged(format!("Inode {number}"), rule);
    if number == 0
        || number > groups.layout.inodes()
        || !groups.inodes.is_used(u64::from(number - 1))
    {
        return Err(bad("has a name, but is not in use".into()));
    }
    let record = groups.table.get(&groups.layout, number).map(<[u8]>::to_vec);
    let record = record.ok_or_else(|| bad("has a name, but is not in use".into()))?;
    let flags = get32(&record, 32);
    if let Some((_, what)) = REFUSED.iter().find(|(bit, _)| flags & bit != 0) {
        return Err(ReadError::Unsupported(format!("inode {number} {what}")));
    }
    if record.len() > inode::FIXED {
        let extra = usize::from(get16(&record, 128));
        if !extra.is_multiple_of(4) || extra > record.len() - inode::FIXED {
            return Err(bad(format!("claims {extra} B of fields beyond 128")));
        }
    }
    let mode = get16(&record, 0);
    let mut found = Attributes {
        mode: mode & 0o7777,
        uid: u32::from(get16(&record, 2)) | u32::from(get16(&record, 120)) << 16,
        gid: u32::from(get16(&record, 24)) | u32::from(get16(&record, 122)) << 16,
        mtime: inode::mtime(&record),
        xattrs: std::collections::BTreeMap::new(),
    };
    let area = &record[record.len() - inode::xattr_room(&record)..];
    xattr::in_inode(number, area, &mut found.xattrs)?;
    let xattr_block = u64::from(get32(&record, 104)) | u64::from(get16(&record, 118)) << 32;
    let xattr_block = (xattr_block != 0).then_some(xattr_block);
    if let Some(place) = xattr_block {
        xattrs.read(source, groups, number, place, &mut found.xattrs)?;
    }
    let size = get64(&record, 4, 108);
    let pointers = &record[40..100];
    let has_blocks = match mode & 0o170_000 {
        0o040_000 | 0o100_000 => true,
        0o120_000 => size > INLINE_SYMLINK as u64 || flags & EXTENTS_FLAG != 0,
        _ => false,
    };
    let mut reader = BlockReader { source, groups, inode: number };
    let blocks = match (has_blocks, flags & EXTENTS_FLAG != 0) {
        (true, true) => reader.by_extents(pointers)?,
        (true, false) => reader.by_pointers(pointers)?,
        (false, _) => FileBlocks::default(),
    };
    let mut content = Vec::new();
    let kind = match mode & 0o170_000 {
        0o040_000 => {
            content = directory_blocks(&blocks, size).map_err(bad)?;
            NodeKind::Directory
        }
        0o100_000 if size > FILE_MAX.0 => return Err(bad(format!("is {size} B long"))),
        0o100_000 => NodeKind::Regular { size: Bytes(size), runs: Vec::new() },
        0o120_000 => {
            NodeKind::Symlink(target(source, &blocks, pointers, size)?.ok_or_else(|| {
                bad(format!("is a symbolic link of {size} B, or its target has a NUL or no block"))
            })?)
        }
        0o020_000 => device(pointers, |major, minor| NodeKind::Char { major, minor }),
        0o060_000 => device(pointers, |major, minor| NodeKind::Block { major, minor }),
        0o010_000 => NodeKind::Fifo,
        0o140_000 => NodeKind::Socket,
        other => return Err(bad(format!("has the unknown type {other:o}"))),
    };
    let doubt = match kind {
        NodeKind::Regular { .. } if blocks.unwritten => {
            Some("has blocks that are marked as never written")
        }
        NodeKind::Directory if allocated(&blocks) > content.len() as u64 => {
            // An index by hash could lead to them; a walk through the directory never does.
            Some("is a directory with blocks behind its end")
        }
        _ => None,
    };
    let record = FileRecord {
        inode: number,
        directory: kind == NodeKind::Directory,
        extents: blocks.extents,
        tree: blocks.tree,
        xattr_block,
        kept: true,
        kept_xattrs: Some(found.xattrs.clone()),
        doubt,
    };
    let indexed = kind == NodeKind::Directory && flags & INDEX_FLAG != 0;
    Ok(File { kind, attributes: found, record, content, indexed })
}

/// Longest directory, in bytes: half of what the kernel takes, and ten million names.
const LONGEST_DIRECTORY: u64 = 1 << 30;

/// Number of blocks with content.
fn allocated(blocks: &FileBlocks) -> u64 {
    blocks.extents.iter().map(|extent| u64::from(extent.count)).sum()
}

/// The blocks of a directory of that size; none may be missing.
fn directory_blocks(blocks: &FileBlocks, size: u64) -> Result<Vec<u64>, String> {
    let needed = size / BLOCK as u64;
    if size > LONGEST_DIRECTORY {
        return Err(format!("is a directory of {size} B"));
    }
    let mut content = Vec::new();
    for extent in &blocks.extents {
        if u64::from(extent.logical) != content.len() as u64 {
            return Err("is a directory with a hole".into());
        }
        if content.len() as u64 > needed {
            break; // blocks behind its end
        }
        content.extend(extent.physical..extent.physical + u64::from(extent.count));
    }
    if size == 0 || !size.is_multiple_of(BLOCK as u64) || needed > content.len() as u64 {
        return Err(format!("is a directory of {size} B in {} blocks", content.len()));
    }
    if blocks.unwritten {
        return Err("is a directory with blocks that were never written".into());
    }
    content.truncate(needed as usize);
    Ok(content)
}

/// The target of a symbolic link.
fn target(
    source: Source<'_>,
    blocks: &FileBlocks,
    pointers: &[u8],
    size: u64,
) -> Result<Option<Vec<u8>>, ReadError> {
    let length = size as usize;
    let block;
    let bytes = match blocks.extents.first() {
        _ if size == 0 || size > SYMLINK_MAX as u64 => return Ok(None),
        None if length <= INLINE_SYMLINK => &pointers[..length],
        Some(extent) if extent.logical == 0 && !blocks.unwritten => {
            block = source.block(extent.physical)?;
            &block[..length]
        }
        _ => return Ok(None),
    };
    Ok((!bytes.contains(&0)).then(|| bytes.to_vec()))
}

/// A device number in the old form, 8 bits each, or in the new one.
fn device(pointers: &[u8], kind: impl Fn(u32, u32) -> NodeKind) -> NodeKind {
    let (old, new) = (get32(pointers, 0), get32(pointers, 4));
    if old != 0 {
        return kind(old >> 8 & 0xff, old & 0xff);
    }
    kind(new >> 8 & 0xfff, new & 0xff | new >> 12 & 0xf_ff00)
}
