//! Maps of sparse files, in the four formats that GNU tar has written.
//!
//! | format | where the map is |
//! |---|---|
//! | old GNU (`S`) | four pairs in the header, then blocks of 21 pairs |
//! | pax 0.0 | repeated records `GNU.sparse.offset` and `GNU.sparse.numbytes` |
//! | pax 0.1 | one record `GNU.sparse.map`: `offset,length,offset,length…` |
//! | pax 1.0 | decimal lines at the start of the data: count, offset, length, … padded to a block |
//!
//! All four become the same list, which is checked here once: ascending, within the file, and as long in sum
//! as the stored data.

use crate::tar::entry::{EntryContent, SparsePiece};
use crate::tar::header::{Header, number};
use crate::tar::pax::{PaxError, Records};
use crate::units::Bytes;

/// Bytes of one pair of number fields in the old format.
const OLD_PAIR: usize = 24;

/// An incomplete sparse map: the numbers in stored order, offset and length in turn.
pub(super) type Pairs = Vec<u64>;

/// Takes the pairs of an old map's field; an empty field ends the map.
pub(super) fn old_pairs(field: &[u8], pairs: &mut Pairs) -> Result<(), &'static str> {
    for pair in field.chunks_exact(OLD_PAIR) {
        if pair[0] == 0 || pair[12] == 0 {
            break;
        }
        for half in pair.chunks_exact(12) {
            pairs.push(
                u64::try_from(number(half)?)
                    .map_err(|_| "a number in the sparse map is negative")?,
            );
        }
    }
    Ok(())
}

/// Reads the map of format 1.0 from the data, which arrives in blocks.
#[derive(Default)]
pub(super) struct LineMap {
    /// Numbers still expected; `None` before the first line.
    awaited: Option<u64>,
    pairs: Pairs,
    digits: u64,
    digit_count: u32,
}

impl LineMap {
    /// Takes a block; returns the pairs once the map is complete. The rest of that block is padding.
    pub(super) fn block(&mut self, block: &[u8]) -> Result<Option<Pairs>, &'static str> {
        for &byte in block {
            match byte {
                b'0'..=b'9' if self.digit_count < 18 => {
                    self.digits = self.digits * 10 + u64::from(byte - b'0');
                    self.digit_count += 1;
                }
                b'\n' if self.digit_count > 0 => {
                    let value = std::mem::take(&mut self.digits);
                    self.digit_count = 0;
                    match &mut self.awaited {
                        None => {
                            let awaited = value.checked_mul(2);
                            self.awaited =
                                Some(awaited.ok_or("the sparse map claims too many pieces")?);
                        }
                        Some(awaited) => {
                            *awaited -= 1;
                            self.pairs.push(value);
                        }
                    }
                    if self.awaited == Some(0) {
                        return Ok(Some(std::mem::take(&mut self.pairs)));
                    }
                }
                _ => {
                    return Err(
                        "the sparse map at the start of the data is not lines of decimal numbers",
                    );
                }
            }
        }
        Ok(None)
    }
}

/// Numbers of a `GNU.sparse.map` record.
pub(super) fn comma_pairs(text: &[u8]) -> Result<Pairs, &'static str> {
    let number = |part: &[u8]| {
        if part.is_empty() || part.len() > 18 || !part.iter().all(u8::is_ascii_digit) {
            return Err("the sparse map is not a list of decimal numbers");
        }
        Ok(part.iter().fold(0, |value, digit| value * 10 + u64::from(digit - b'0')))
    };
    text.split(|&byte| byte == b',').map(number).collect()
}

/// The checked content of a sparse file of `size` bytes with `stored` bytes of data at `data_offset`.
pub(super) fn content(
    pairs: &[u64],
    size: u64,
    data_offset: u64,
    stored: u64,
) -> Result<EntryContent, &'static str> {
    if !pairs.len().is_multiple_of(2) {
        return Err("the sparse map ends between an offset and its length");
    }
    let mut pieces = Vec::with_capacity(pairs.len() / 2);
    let (mut file_end, mut used) = (0u64, 0u64);
    for pair in pairs.chunks_exact(2) {
        let (offset, len) = (pair[0], pair[1]);
        let end = offset
            .checked_add(len)
            .filter(|&end| end <= size)
            .ok_or("a sparse piece lies past the end of the file")?;
        if offset < file_end {
            return Err("sparse pieces overlap or are not in order");
        }
        let tar_offset = data_offset.checked_add(used).ok_or("a sparse piece lies past 64 bits")?;
        if len > 0 {
            pieces.push(SparsePiece {
                file_offset: Bytes(offset),
                tar_offset: Bytes(tar_offset),
                len: Bytes(len),
            });
        }
        used = used.checked_add(len).ok_or("the sparse pieces are longer than the data")?;
        file_end = end;
    }
    if used != stored {
        return Err("the sparse pieces do not add up to the stored data");
    }
    Ok(EntryContent::Sparse { size: Bytes(size), pieces })
}

/// Storage formats of an entry's sparse map.
pub(super) enum SparseKind {
    No,
    Old,
    Pairs(Pairs),
    Lines,
}

impl SparseKind {
    pub(super) fn of(header: Header<'_>, records: &Records) -> Result<Self, PaxError> {
        match header.flag() {
            b'S' => return Ok(Self::Old),
            0 | b'0' | b'7' => {}
            _ => return Ok(Self::No),
        }
        let map = records.get("GNU.sparse.map");
        let kind = match (records.get("GNU.sparse.major"), records.get("GNU.sparse.minor")) {
            (Some(b"1"), Some(b"0")) => Self::Lines,
            (None, None) if map.is_none() && records.sparse_pairs.is_empty() => {
                return Ok(Self::No);
            }
            (None, None) | (Some(b"0"), Some(b"0" | b"1")) => match map {
                Some(map) => Self::Pairs(
                    comma_pairs(map).map_err(|reason| PaxError::new(b"GNU.sparse.map", reason))?,
                ),
                None => Self::Pairs(records.sparse_pairs.clone()),
            },
            _ => {
                return Err(PaxError::new(
                    b"GNU.sparse.major",
                    "this version of sparse files is not known",
                ));
            }
        };
        if records.get("GNU.sparse.realsize").or(records.get("GNU.sparse.size")).is_none() {
            return Err(PaxError::new(b"GNU.sparse.realsize", "it is missing for a sparse file"));
        }
        let count = records.number("GNU.sparse.numblocks")?;
        if let (Self::Pairs(pairs), Some(count)) = (&kind, count)
            && count.checked_mul(2) != Some(pairs.len() as u64)
        {
            let reason = "it is not the number of pieces in the map";
            return Err(PaxError::new(b"GNU.sparse.numblocks", reason));
        }
        Ok(kind)
    }
}
