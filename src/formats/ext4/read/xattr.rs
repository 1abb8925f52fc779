//! Reads extended attributes from the inode and from a block.

use std::collections::BTreeMap;

use super::{ReadError, damaged};
use crate::ext4::field::{get16, get32};
use crate::ext4::xattr::{
    ACL_ACCESS, ACL_DEFAULT, BLOCK_HEADER, ENTRY, INODE_HEADER, MAGIC, PREFIXES,
};

type Xattrs = BTreeMap<Vec<u8>, Vec<u8>>;

/// Adds the attributes behind the fields of an inode.
pub(super) fn in_inode(inode: u32, area: &[u8], found: &mut Xattrs) -> Result<(), ReadError> {
    if area.len() < INODE_HEADER || get32(area, 0) != MAGIC {
        return Ok(());
    }
    entries(inode, area, INODE_HEADER, INODE_HEADER, found)
}

/// Adds the attributes of a block; returns the number of files that refer to it by its header.
pub(super) fn in_block(inode: u32, block: &[u8], found: &mut Xattrs) -> Result<u32, ReadError> {
    if get32(block, 0) != MAGIC || get32(block, 8) != 1 {
        return Err(damaged(
            format!("The attribute block of inode {inode}"),
            "has a broken header",
        ));
    }
    entries(inode, block, BLOCK_HEADER, 0, found)?;
    Ok(get32(block, 4))
}

/// Reads entries from `first` on; positions of values count from `origin`.
fn entries(
    inode: u32,
    area: &[u8],
    first: usize,
    origin: usize,
    found: &mut Xattrs,
) -> Result<(), ReadError> {
    let bad = |rule: &str| damaged(format!("An extended attribute of inode {inode}"), rule);
    let mut at = first;
    while area.len() >= at + 4 && get32(area, at) != 0 {
        let entry = area.get(at..at + ENTRY).ok_or_else(|| bad("is truncated"))?;
        let (name_length, index) = (usize::from(entry[0]), entry[1]);
        let name =
            area.get(at + ENTRY..at + ENTRY + name_length).ok_or_else(|| bad("is truncated"))?;
        if get32(entry, 4) != 0 {
            return Err(ReadError::Unsupported(format!(
                "inode {inode} keeps an attribute in another inode (ea_inode)"
            )));
        }
        let length = get32(entry, 8) as usize;
        let start = origin + usize::from(get16(entry, 2));
        let value = match length {
            0 => &[][..],
            _ => {
                area.get(start..start.saturating_add(length)).ok_or_else(|| bad("is truncated"))?
            }
        };
        let prefix = PREFIXES.iter().find(|(_, number)| *number == index);
        let (prefix, _) = prefix.ok_or_else(|| {
            ReadError::Unsupported(format!(
                "inode {inode} has an extended attribute of the unknown class {index}"
            ))
        })?;
        let is_acl = *prefix == ACL_ACCESS || *prefix == ACL_DEFAULT;
        if name.is_empty() != is_acl {
            return Err(bad("has a name that does not fit its class"));
        }
        let value = if is_acl {
            acl(value).ok_or_else(|| bad("is not an access control list"))?
        } else {
            value.to_vec()
        };
        if found.insert([*prefix, name].concat(), value).is_some() {
            return Err(bad("exists twice"));
        }
        at += ENTRY + name_length.next_multiple_of(4);
    }
    Ok(())
}

/// Converts ext4's form of a list to that of the system call: each entry gets an id, all ones if it has none.
fn acl(stored: &[u8]) -> Option<Vec<u8>> {
    let mut rest = stored.strip_prefix(&1u32.to_le_bytes())?;
    let mut value = 2u32.to_le_bytes().to_vec();
    while !rest.is_empty() {
        let (entry, more) = rest.split_at_checked(4)?;
        value.extend_from_slice(entry);
        rest = match get16(entry, 0) {
            0x02 | 0x08 => {
                let (id, more) = more.split_at_checked(4)?;
                value.extend_from_slice(id);
                more
            }
            0x01 | 0x04 | 0x10 | 0x20 => {
                value.extend_from_slice(&[0xff; 4]);
                more
            }
            _ => return None,
        };
    }
    Some(value)
}
