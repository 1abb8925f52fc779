//! Sealing: a layer that was written becomes one of the layers below, in its place (spec lsmt 8.2, upstream
//! `LSMTFile::close_seal`).
//!
//! The index is written behind the payload, and a trailer behind the index; not a byte in front of them is
//! touched, so a seal that fails is undone by cutting the file where the payload ends. Whoever opens a sealed
//! file to write to it is refused: the next record would be lost on everybody who reads the file as a layer.

use std::os::unix::fs::FileExt;

use super::{Named, WritableError};
use formats::lsmt::layer::{FLAG_DATA, FLAG_HEADER, FLAG_SEALED, Record};
use formats::lsmt::mapping::{ENTRY, Mapping, PADDING};
use formats::lsmt::{LsmtError, MAX_ENTRIES, RECORD};

/// Writes index and trailer at byte `end` of the file, where the payload ends, and makes them durable. `header` is
/// the file's.
///
/// # Errors
/// [`WritableError`]; the file is then as it was.
pub(super) fn seal(
    data: &Named,
    header: &Record,
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
    let trailer = Record {
        flags: header.flags & !FLAG_HEADER | FLAG_DATA | FLAG_SEALED,
        index_offset: end,
        index_size: count,
        user_tag: Vec::new(),
        ..header.clone()
    };
    bytes.extend(trailer.encode());
    let written = data.file.write_all_at(&bytes, end).and_then(|()| data.file.sync_all());
    written.map_err(|error| {
        // What is longer than the payload only takes space.
        let _ = data.file.set_len(end);
        data.error("seal")(error)
    })
}

/// Takes a seal off again.
///
/// # Errors
/// [`WritableError::Io`].
pub(super) fn unseal(data: &Named, end: u64) -> Result<(), WritableError> {
    data.file.set_len(end).and_then(|()| data.file.sync_all()).map_err(data.error("shorten"))
}

/// Refuses a file that was sealed: one that ends in a trailer which says that it does.
///
/// # Errors
/// [`WritableError`].
pub(super) fn check_unsealed(data: &Named) -> Result<(), WritableError> {
    let len = data.len()?;
    let Some(at) = len.checked_sub(RECORD).filter(|at| *at >= RECORD) else { return Ok(()) };
    let mut bytes = [0; RECORD as usize];
    data.file.read_exact_at(&mut bytes, at).map_err(data.error("read"))?;
    let Ok(trailer) = Record::parse(&bytes) else { return Ok(()) };
    let complete = FLAG_HEADER | FLAG_DATA | FLAG_SEALED;
    let index_end = trailer.index_offset.saturating_add(trailer.index_size.saturating_mul(ENTRY));
    // Upstream pads the index to a sector, we to a page.
    let in_front = at.checked_sub(index_end).is_some_and(|padding| padding < RECORD);
    if trailer.flags & complete == FLAG_DATA | FLAG_SEALED && in_front {
        return Err(data.invalid(
            "it was sealed: name it as the last of the lowers, and new files as the upper",
        ));
    }
    Ok(())
}
