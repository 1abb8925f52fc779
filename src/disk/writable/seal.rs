//! Sealing: a written layer becomes one of the layers below, in place (spec lsmt 8.2, upstream
//! `LSMTFile::close_seal`).
//!
//! The index is written behind the payload, and a trailer behind the index. No byte in front of them changes,
//! so a failed seal is undone by truncating the file to the end of the payload. A sealed file cannot be
//! opened for writing: a reader that takes the file as a layer would not see the next record.

use std::os::unix::fs::FileExt;

use super::{Named, WritableError};
use formats::lsmt::layer::{FLAG_DATA, FLAG_HEADER, FLAG_SEALED, LsmtHeader};
use formats::lsmt::mapping::{ENTRY, Mapping, PADDING};
use formats::lsmt::{LsmtError, MAX_ENTRIES, RECORD};

/// Writes index and trailer at byte `end` of the file, the end of the payload, and makes them durable.
/// `header` is the file's.
///
/// # Errors
/// [`WritableError`]; the file is then unchanged.
pub(super) fn seal(
    data: &Named,
    header: &LsmtHeader,
    end: u64,
    mappings: &[Mapping],
) -> Result<(), WritableError> {
    let count = mappings.len() as u64;
    if count > MAX_ENTRIES {
        return Err(LsmtError::TooManyMappings { limit: MAX_ENTRIES }.into());
    }
    let mut bytes: Vec<u8> = mappings.iter().flat_map(Mapping::encode).collect();
    while !(bytes.len() as u64).is_multiple_of(RECORD) {
        bytes.extend(PADDING);
    }
    let trailer = LsmtHeader {
        flags: header.flags & !FLAG_HEADER | FLAG_DATA | FLAG_SEALED,
        index_offset: end,
        index_size: count,
        user_tag: Vec::new(),
        ..header.clone()
    };
    bytes.extend(trailer.encode());
    let written = data.file.write_all_at(&bytes, end).and_then(|()| data.file.sync_all());
    written.map_err(|error| {
        // Extra bytes behind the payload only take space.
        let _ = data.file.set_len(end);
        data.error("seal")(error)
    })
}

/// Removes a seal.
///
/// # Errors
/// [`WritableError::Io`].
pub(super) fn unseal(data: &Named, end: u64) -> Result<(), WritableError> {
    data.file.set_len(end).and_then(|()| data.file.sync_all()).map_err(data.error("shorten"))
}

/// Refuses a sealed file: one that ends in a trailer with the seal flag.
///
/// # Errors
/// [`WritableError`].
pub(super) fn check_unsealed(data: &Named) -> Result<(), WritableError> {
    let len = data.len()?;
    let Some(at) = len.checked_sub(RECORD).filter(|at| *at >= RECORD) else { return Ok(()) };
    let mut bytes = [0; RECORD as usize];
    data.file.read_exact_at(&mut bytes, at).map_err(data.error("read"))?;
    let Ok(trailer) = LsmtHeader::parse(&bytes) else { return Ok(()) };
    let complete = FLAG_HEADER | FLAG_DATA | FLAG_SEALED;
    let index_end = trailer.index_offset.saturating_add(trailer.index_size.saturating_mul(ENTRY));
    // Upstream pads the index to a sector, this program to a page.
    let in_front = at.checked_sub(index_end).is_some_and(|padding| padding < RECORD);
    if trailer.flags & complete == FLAG_DATA | FLAG_SEALED && in_front {
        return Err(data.invalid(
            "it was sealed: name it as the last of the lowers, and new files as the upper",
        ));
    }
    Ok(())
}
