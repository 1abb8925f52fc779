//! The entries of a directory. An index by hash looks like empty entries, so it needs no special handling.

use super::{ReadError, damaged};
use crate::ext4::field::{get16, get32};
use crate::ext4::tree::NAME_MAX;

/// Adds the names in one block to `names`, without `.` and `..`.
pub(super) fn entries(
    inode: u32,
    block: &[u8],
    names: &mut Vec<(Box<[u8]>, u32)>,
) -> Result<(), ReadError> {
    let bad = |rule: &str| Err(damaged(format!("Directory inode {inode}"), rule));
    let mut at = 0;
    while at < block.len() {
        if block.len() - at < 8 {
            return bad("has an entry that passes the end of its block");
        }
        let length = usize::from(get16(block, at + 4));
        let name_length = usize::from(block[at + 6]);
        let target = get32(block, at);
        if length < 8 || !length.is_multiple_of(4) || length > block.len() - at {
            return bad("has an entry of an impossible length");
        }
        if target != 0 {
            if name_length + 8 > length {
                return bad("has a name that passes the end of its entry");
            }
            let name = &block[at + 8..at + 8 + name_length];
            if name.is_empty()
                || name.len() > NAME_MAX
                || name.iter().any(|b| matches!(b, 0 | b'/'))
            {
                return bad("has an invalid name");
            }
            if !matches!(name, b"." | b"..") {
                names.push((name.into(), target));
            }
        }
        at += length;
    }
    Ok(())
}
