//! Extended attributes: as many as fit behind the inode's fields, the others in one block.
//!
//! Both areas have entries from the front and values from the back. In the inode, value positions count from
//! the first entry and entry hashes are zero. In the block, positions count from the block's start, and each
//! entry and the block have a hash (kernel `fs/ext4/xattr.c`).

use std::collections::{BTreeMap, BTreeSet};

use super::checksum::Checksums;
use super::field::{put16, put32};
use super::geometry::BLOCK;
use super::layer::{Emitted, LayerBlocks};

/// Marks the start of attributes in either area.
pub(super) const MAGIC: u32 = 0xea02_0000;
/// Bytes before the first entry: the magic in an inode, a header in a block.
pub(super) const INODE_HEADER: usize = 4;
pub(super) const BLOCK_HEADER: usize = 32;
/// Bytes of an entry without its name; also, the smallest free space between entries and values is 4 zero
/// bytes.
pub(super) const ENTRY: usize = 16;
const END: usize = 4;

/// The prefixes that ext4 stores as numbers. A listed name with an empty rest is one attribute.
pub(super) const PREFIXES: [(&[u8], u8); 5] =
    [(b"user.", 1), (ACL_ACCESS, 2), (ACL_DEFAULT, 3), (b"trusted.", 4), (b"security.", 6)];
pub(super) const ACL_ACCESS: &[u8] = b"system.posix_acl_access";
pub(super) const ACL_DEFAULT: &[u8] = b"system.posix_acl_default";

/// Reasons why a file's attributes cannot be stored.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum XattrError {
    /// ext4 has no number for the name's prefix.
    #[error(
        "The attribute \"{name}\" has no prefix that ext4 stores (user., trusted., security., system.posix_acl_access, system.posix_acl_default), no name behind it, or one over 255 bytes"
    )]
    BadName {
        /// The full name, printable.
        name: String,
    },
    /// The value is not an access control list.
    #[error(
        "The attribute \"{name}\" is not a list of version 2 with entries of 8 bytes and known tags"
    )]
    BadAcl {
        /// The full name, printable.
        name: String,
    },
    /// Inode and block together are too small.
    #[error(
        "The attributes need more than the 4096 bytes of ext4's attribute block; \"{name}\" of {len} bytes does not fit"
    )]
    TooLarge {
        /// The full name of the first attribute that does not fit, printable.
        name: String,
        /// Length of its value in bytes.
        len: usize,
    },
}

/// Attribute blocks of the layers below that several files share, with the number of files. This program
/// never writes a shared one.
#[derive(Debug, Default)]
pub(super) struct SharedBlocks {
    blocks: BTreeMap<u64, SharedXattrBlock>,
    dirty: BTreeSet<u64>,
}

#[derive(Debug)]
struct SharedXattrBlock {
    bytes: Box<[u8; BLOCK]>,
    references: u32,
}

impl SharedBlocks {
    /// Adds a block and the number of references that it claims, at least 2.
    pub(super) fn insert(&mut self, block: u64, bytes: Box<[u8; BLOCK]>, references: u32) {
        self.blocks.insert(block, SharedXattrBlock { bytes, references });
    }

    /// True if another file may need the block.
    pub(super) fn is_shared(&self, block: u64) -> bool {
        self.blocks.contains_key(&block)
    }

    /// Releases one reference. Returns true if the block must be freed.
    pub(super) fn release(&mut self, block: u64) -> bool {
        let Some(shared) = self.blocks.get_mut(&block) else { return true };
        shared.references -= 1;
        self.dirty.insert(block);
        if shared.references == 0 {
            self.blocks.remove(&block);
            self.dirty.remove(&block);
            return true;
        }
        false
    }

    /// Adds the new counts to the layer.
    pub(super) fn write(
        &mut self,
        sums: Checksums,
        emitted: &mut Emitted,
        layer: &mut LayerBlocks,
    ) {
        for block in std::mem::take(&mut self.dirty) {
            if let Some(shared) = self.blocks.get_mut(&block) {
                put32(&mut shared.bytes[..], 4, shared.references);
                sums.seal_xattrs(&mut shared.bytes[..], block);
                emitted.emit(layer, block, &shared.bytes[..]);
            }
        }
    }
}

/// Attributes in their form on the disk.
#[derive(Debug)]
pub(super) struct EncodedXattrs {
    /// As many bytes as fit into the inode.
    pub(super) in_inode: Vec<u8>,
    pub(super) block: Option<Box<[u8; BLOCK]>>,
}

/// An attribute in the kernel's form and order: by index, then length of the name, then name.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Attribute<'a> {
    index: u8,
    name_len: usize,
    name: &'a [u8],
    value: std::borrow::Cow<'a, [u8]>,
}

impl Attribute<'_> {
    fn size(&self) -> usize {
        ENTRY + self.name_len.next_multiple_of(4) + self.value.len().next_multiple_of(4)
    }
}

/// Encodes the attributes of one file; its inode has `room` bytes for them.
pub(super) fn encode<'a>(
    xattrs: impl Iterator<Item = (&'a [u8], &'a [u8])>,
    room: usize,
) -> Result<EncodedXattrs, XattrError> {
    let mut attributes = Vec::new();
    for (name, value) in xattrs {
        attributes.push(attribute(name, value)?);
    }
    attributes.sort();
    let mut inode = Area::new(room, INODE_HEADER, INODE_HEADER);
    let mut block = Area::new(BLOCK, BLOCK_HEADER, 0);
    for attribute in &attributes {
        if !inode.add(attribute, false) && !block.add(attribute, true) {
            return Err(XattrError::TooLarge {
                name: full_name(attribute),
                len: attribute.value.len(),
            });
        }
    }
    let mut encoded = EncodedXattrs { in_inode: vec![0; room], block: None };
    if !inode.is_empty() {
        put32(&mut inode.bytes, 0, MAGIC);
        encoded.in_inode = inode.bytes;
    }
    if !block.is_empty() {
        put32(&mut block.bytes, 0, MAGIC);
        put32(&mut block.bytes, 4, 1); // references
        put32(&mut block.bytes, 8, 1); // blocks
        put32(&mut block.bytes, 12, block.hash);
        encoded.block = block.bytes.into_boxed_slice().try_into().ok();
    }
    Ok(encoded)
}

fn attribute<'a>(name: &'a [u8], value: &'a [u8]) -> Result<Attribute<'a>, XattrError> {
    let printable = || String::from_utf8_lossy(name).into_owned();
    for (prefix, index) in PREFIXES {
        let Some(rest) = name.strip_prefix(prefix) else { continue };
        let is_acl = prefix == ACL_ACCESS || prefix == ACL_DEFAULT;
        if rest.is_empty() != is_acl || rest.len() > 255 {
            break;
        }
        let value = if is_acl {
            acl(value).ok_or_else(|| XattrError::BadAcl { name: printable() })?.into()
        } else {
            value.into()
        };
        return Ok(Attribute { index, name_len: rest.len(), name: rest, value });
    }
    Err(XattrError::BadName { name: printable() })
}

fn full_name(attribute: &Attribute) -> String {
    let prefix = PREFIXES
        .iter()
        .find(|&&(_, index)| index == attribute.index)
        .map_or(&b""[..], |&(prefix, _)| prefix);
    String::from_utf8_lossy(&[prefix, attribute.name].concat()).into_owned()
}

/// Converts from the form of the system call (version 2, 8 bytes per entry) to ext4's (version 1; only named
/// users and groups have an id).
fn acl(value: &[u8]) -> Option<Vec<u8>> {
    let entries = value.strip_prefix(&2u32.to_le_bytes())?;
    let (entries, []) = entries.as_chunks::<8>() else { return None };
    let mut stored = 1u32.to_le_bytes().to_vec();
    for entry in entries {
        let id: &[u8] = match u16::from_le_bytes([entry[0], entry[1]]) {
            0x02 | 0x08 => &entry[4..],
            0x01 | 0x04 | 0x10 | 0x20 => &[],
            _ => return None,
        };
        stored.extend_from_slice(&entry[..4]);
        stored.extend_from_slice(id);
    }
    Some(stored)
}

/// An area with entries from the front and values from the back.
struct Area {
    bytes: Vec<u8>,
    header: usize,
    /// Origin of the positions of values.
    origin: usize,
    entries_end: usize,
    values_start: usize,
    hash: u32,
}

impl Area {
    fn new(size: usize, header: usize, origin: usize) -> Area {
        Area {
            bytes: vec![0; size],
            header,
            origin,
            entries_end: header,
            values_start: size,
            hash: 0,
        }
    }

    fn is_empty(&self) -> bool {
        self.entries_end == self.header
    }

    /// Adds an attribute if there is room for it.
    fn add(&mut self, attribute: &Attribute, hashed: bool) -> bool {
        if attribute.size() + END > self.values_start.saturating_sub(self.entries_end) {
            return false;
        }
        let value = &attribute.value;
        self.values_start -= value.len().next_multiple_of(4);
        self.bytes[self.values_start..self.values_start + value.len()].copy_from_slice(value);
        let position = if value.is_empty() { 0 } else { self.values_start - self.origin };
        let entry = &mut self.bytes[self.entries_end..];
        entry[0] = attribute.name_len as u8;
        entry[1] = attribute.index;
        put16(entry, 2, position as u16);
        put32(entry, 8, value.len() as u32);
        if hashed {
            let hash = entry_hash(attribute.name, value);
            put32(entry, 12, hash);
            self.hash = self.hash.rotate_left(16) ^ hash;
        }
        entry[ENTRY..ENTRY + attribute.name_len].copy_from_slice(attribute.name);
        self.entries_end += ENTRY + attribute.name_len.next_multiple_of(4);
        true
    }
}

/// The hash of one entry: its name by bytes, its value by words.
fn entry_hash(name: &[u8], value: &[u8]) -> u32 {
    let named = name.iter().fold(0u32, |hash, &byte| hash.rotate_left(5) ^ u32::from(byte));
    value.chunks(4).fold(named, |hash, word| {
        let word = word.iter().rev().fold(0, |word, &byte| word << 8 | u32::from(byte));
        hash.rotate_left(16) ^ word
    })
}
