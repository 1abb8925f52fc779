//! Application of a header to the attributes of an inode, in the order of containerd's system calls: chown,
//! extended attributes, chmod, time.

use std::collections::BTreeMap;

use thiserror::Error;

use formats::ext4::{Attributes, NodeKind};
use formats::tar::{TarEntry, Timestamp};

/// Largest number of bytes in the name of an extended attribute (Linux: `XATTR_NAME_MAX`).
const XATTR_NAME_LIMIT: usize = 255;

/// Largest number of bytes in the value of an extended attribute (Linux: `XATTR_SIZE_MAX`).
const XATTR_VALUE_LIMIT: usize = 65536;

/// The last time that Go can represent as nanoseconds since 1970, in 2262.
const LAST_TIME: Timestamp = Timestamp { secs: 9_223_372_036, nanos: 854_775_807 };

const SYMLINK_MODE: u16 = 0o777;

const CAPABILITY: &[u8] = b"security.capability";

/// An attribute that no inode can have.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum AttributeError {
    /// An owner or group beyond 32 bits.
    #[error("the {field} {id} does not fit in 32 bits")]
    Id {
        /// Owner or group.
        field: &'static str,
        /// The number.
        id: u64,
    },
    /// An extended attribute whose name or value is longer than Linux allows.
    #[error(
        "the extended attribute {name} has a name of {name_len} bytes and a value of {value_len}; Linux allows 255 and 65536"
    )]
    XattrLength {
        /// Its name.
        name: String,
        /// Bytes in the name.
        name_len: usize,
        /// Bytes in the value.
        value_len: usize,
    },
}

/// A new inode before its header is applied.
pub(super) fn fresh() -> Attributes {
    Attributes { mode: 0o755, uid: 0, gid: 0, mtime: Timestamp::default(), xattrs: BTreeMap::new() }
}

/// Attributes of a directory without a header and without a lower directory. Linux gives it the group of a
/// parent that has the set-group-id bit, and containerd does not change that.
pub(super) fn implicit_directory(parent: &Attributes, mtime: Timestamp) -> Attributes {
    let gid = if parent.mode & 0o2000 != 0 { parent.gid } else { 0 };
    Attributes { gid, mtime: bounded(mtime), ..fresh() }
}

/// The attributes of a lower directory, as copied to the same directory of this layer.
pub(super) fn copied_up(lower: &Attributes) -> Attributes {
    let mut copy = lower.clone();
    copy.xattrs.retain(|name, _| !name.starts_with(b"trusted."));
    copy
}

/// Applies a header to an inode of this kind; returns the number of extended attributes that it cannot have.
pub(super) fn apply_header(
    attributes: &mut Attributes,
    entry: &TarEntry,
    kind: &NodeKind,
) -> Result<u64, AttributeError> {
    attributes.uid = id("owner", entry.uid, attributes.uid)?;
    attributes.gid = id("group", entry.gid, attributes.gid)?;
    if !matches!(kind, NodeKind::Directory) {
        // Linux removes the capabilities of a file at every chown, even to the same owner. So a hard link
        // with a header that lacks the attribute leaves the file without it.
        attributes.xattrs.remove(CAPABILITY);
    }
    let mut dropped = 0;
    for (name, value) in &entry.xattrs {
        if name.len() > XATTR_NAME_LIMIT || value.len() > XATTR_VALUE_LIMIT {
            let text =
                String::from_utf8_lossy(&name[..name.len().min(XATTR_NAME_LIMIT)]).into_owned();
            return Err(AttributeError::XattrLength {
                name: text,
                name_len: name.len(),
                value_len: value.len(),
            });
        }
        if is_kept(name, kind) {
            attributes.xattrs.insert(name.clone(), value.clone());
        } else {
            dropped += 1;
        }
    }
    attributes.mode = if matches!(kind, NodeKind::Symlink(_)) {
        SYMLINK_MODE
    } else {
        (entry.mode & 0o7777) as u16
    };
    attributes.mtime = bounded(entry.mtime);
    Ok(dropped)
}

/// An owner or group. Linux reads all ones as "leave it unchanged".
fn id(field: &'static str, id: u64, present: u32) -> Result<u32, AttributeError> {
    match u32::try_from(id) {
        Ok(u32::MAX) => Ok(present),
        Ok(id) => Ok(id),
        Err(_) => Err(AttributeError::Id { field, id }),
    }
}

/// containerd sets a time before 1970 or past [`LAST_TIME`] to 1970.
fn bounded(time: Timestamp) -> Timestamp {
    if time.secs < 0 || time > LAST_TIME { Timestamp::default() } else { time }
}

/// True if Linux stores this attribute on such an inode, and containerd sets it.
fn is_kept(name: &[u8], kind: &NodeKind) -> bool {
    match name {
        b"system.posix_acl_access" => !matches!(kind, NodeKind::Symlink(_)),
        b"system.posix_acl_default" => matches!(kind, NodeKind::Directory),
        _ if name.starts_with(b"user.") => {
            matches!(kind, NodeKind::Regular { .. } | NodeKind::Directory)
        }
        _ => name.starts_with(b"security."),
    }
}
