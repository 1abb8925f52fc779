//! Upstream's index of a gzip layer, the file `gzip.meta` (spec gzip-index).
//!
//! Only block boundaries are written: the format has no field for a block's header, so a checkpoint inside a
//! block is left out, and a reader of the file starts at the checkpoint before it. The format can describe
//! only the first member of a layer, and upstream's reader returns zeros behind that member without an error.
//! So a layer of several members gets no `gzip.meta`: a missing file fails when it is opened.

use libdeflater::Decompressor;
use thiserror::Error;

use super::GzipError;
use super::index::{Checkpoint, CheckpointKind, GzipIndex};
use super::window::{LEVEL, SparseWindow, WindowPacker};
use crate::units::{Bits, Bytes};
use inflate::marks::WINDOW;

/// Name of the file in a layer archive.
pub const GZIP_META_NAME: &str = "gzip.meta";

const MAGIC: &[u8; 8] = b"ddgzidx\0";
const HEADER: usize = 333;
const ENTRY: usize = 29;
/// Largest entry table that is read: 64 MiB.
const MAX_TABLE: u64 = 64 << 20;
/// Longest stored window: a generous bound for zlib's worst result for 32 KiB.
const MAX_WINDOW: u64 = 2 * WINDOW as u64;

/// Reasons why a layer has no `gzip.meta`.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum NoGzipMeta {
    /// The format can describe only one gzip member.
    #[error("The layer has {members} gzip members and gzip.meta can describe only one")]
    ManyMembers {
        /// Number of members.
        members: u64,
    },
    /// A length does not fit the format's signed fields.
    #[error("The layer is too long for a gzip.meta")]
    TooLarge,
}

/// CRC-32C without the inversions before and after (spec gzip-index 2).
fn raw_crc32c(bytes: &[u8]) -> u32 {
    !crc32c::crc32c_append(u32::MAX, bytes)
}

/// The `gzip.meta` of a layer.
///
/// # Errors
/// [`NoGzipMeta`] if the format cannot describe the layer.
pub fn write(index: &GzipIndex) -> Result<Vec<u8>, NoGzipMeta> {
    if index.members != 1 {
        return Err(NoGzipMeta::ManyMembers { members: index.members });
    }
    let signed = |value: u64| i64::try_from(value).map_err(|_| NoGzipMeta::TooLarge);
    let mut packer = WindowPacker::new();
    let mut file = vec![0; HEADER];
    let mut table = Vec::new();
    let mut count = 0u64;
    for checkpoint in &index.checkpoints {
        if matches!(checkpoint.kind, CheckpointKind::MidBlock(_)) {
            continue;
        }
        let window = checkpoint.window.zlib(&mut packer);
        table.extend(signed(checkpoint.out.0)?.to_le_bytes());
        table.extend(signed(checkpoint.bit.bytes_ceil().0)?.to_le_bytes());
        table.extend(signed(file.len() as u64)?.to_le_bytes());
        table.push(((8 - checkpoint.bit.phase()) % 8) as u8);
        table.extend((window.len() as u32).to_le_bytes());
        file.extend_from_slice(&window);
        count += 1;
    }
    let table = packer.zlib(&table);
    let table_at = file.len() as u64;
    file.extend_from_slice(&table);

    let span = i32::try_from(index.span.0).map_err(|_| NoGzipMeta::TooLarge)?;
    let mut header = Vec::with_capacity(HEADER);
    header.extend_from_slice(MAGIC);
    header.extend([1, 0, 1, LEVEL, 0]); // version 1.0, zlib, its level, no flags
    for word in [span, WINDOW as i32, ENTRY as i32] {
        header.extend(word.to_le_bytes());
    }
    for word in [count, index.compressed_len.0, file.len() as u64, index.uncompressed_len.0] {
        header.extend(signed(word)?.to_le_bytes());
    }
    header.resize(313, 0);
    header.extend(signed(table_at)?.to_le_bytes());
    header.extend((table.len() as i64).to_le_bytes());
    let crc = raw_crc32c(&header);
    header.extend(crc.to_le_bytes());
    file[..HEADER].copy_from_slice(&header);
    Ok(file)
}

/// A number of the header or of an entry; stored signed.
fn number(bytes: &[u8], at: usize) -> Option<u64> {
    let word = i64::from_le_bytes(*bytes.get(at..)?.first_chunk()?);
    u64::try_from(word).ok()
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

/// Reads a `gzip.meta`. Windows are not unpacked here: a damaged window is detected when it is used.
///
/// # Errors
/// [`GzipError::Meta`] with the first broken rule.
pub fn read(file: &[u8]) -> Result<GzipIndex, GzipError> {
    let broken = |offset: usize, rule| GzipError::Meta { offset: offset as u64, rule };
    if file.len() < HEADER {
        return Err(broken(file.len(), "the file ends inside the header of 333 bytes"));
    }
    let number = |at| number(file, at).ok_or(broken(at, "the number is negative"));
    let span = word(file, 13).unwrap_or(0);
    let (count, compressed_len, file_len, uncompressed_len) =
        (number(25)?, number(33)?, number(41)?, number(49)?);
    let (table_at, table_len) = (number(313)?, number(321)?);
    let rules = [
        (file.starts_with(MAGIC), 0, "the magic is not ddgzidx"),
        (
            word(file, 329) == Some(raw_crc32c(&file[..329])),
            329,
            "the header does not match its CRC-32C",
        ),
        (file[8] == 1, 8, "the major version is not 1"),
        (file[10] <= 1, 10, "the compression of windows is neither none nor zlib"),
        (i32::try_from(span).is_ok_and(|span| span >= 65536), 13, "the span is less than 65536"),
        (word(file, 17) == Some(WINDOW as u32), 17, "the window is not 32768 bytes"),
        (word(file, 21) == Some(ENTRY as u32), 21, "an entry is not 29 bytes"),
        (file_len == file.len() as u64, 41, "the length is not that of the file"),
        (table_at >= HEADER as u64, 313, "the entry table lies in the header"),
        (
            table_at.checked_add(table_len) == Some(file_len),
            313,
            "the entry table does not end with the file",
        ),
        (count >= 1, 25, "there is no entry"),
        (count <= MAX_TABLE / ENTRY as u64, 25, "there are too many entries"),
        // A bit position must fit 64 bits; deflate cannot expand by more than 1032.
        (compressed_len < u64::MAX / 2048, 33, "the gzip file is impossibly long"),
        (
            uncompressed_len <= compressed_len.saturating_mul(1032),
            49,
            "the output is impossibly long",
        ),
    ];
    for (holds, at, rule) in rules {
        if !holds {
            return Err(broken(at, rule));
        }
    }
    let table_at = table_at as usize;
    let stored = &file[table_at..];
    let table_len = count as usize * ENTRY;
    let unpacked;
    let table = if file[10] == 1 {
        // zlib compresses by at most 1032, so a small file cannot claim a large table.
        if table_len > stored.len().saturating_mul(1040) {
            return Err(broken(table_at, "the entry table is too short for its entries"));
        }
        let mut room = vec![0; table_len];
        match Decompressor::new().zlib_decompress(stored, &mut room) {
            Ok(len) if len == table_len => {}
            _ => return Err(broken(table_at, "the entry table does not unpack to its entries")),
        }
        unpacked = room;
        &unpacked[..]
    } else if stored.len() == table_len {
        stored
    } else {
        return Err(broken(table_at, "the entry table is not as long as its entries"));
    };

    let mut checkpoints: Vec<Checkpoint> = Vec::with_capacity(count as usize);
    let mut windows = 0;
    for (i, entry) in table.chunks_exact(ENTRY).enumerate() {
        let broken = |rule| broken(table_at + i, rule);
        let number = |at| self::number(entry, at).ok_or(broken("a number of an entry is negative"));
        let (out, byte, window_at) = (number(0)?, number(8)?, number(16)?);
        let window_len = u64::from(word(entry, 25).unwrap_or(0));
        if entry[24] > 7 {
            return Err(broken("an entry has more than 7 bits"));
        }
        let bit = byte.checked_mul(8).and_then(|bit| bit.checked_sub(u64::from(entry[24])));
        let Some(bit) = bit.filter(|_| byte <= compressed_len) else {
            return Err(broken("an entry lies outside the gzip file"));
        };
        if out > uncompressed_len {
            return Err(broken("an entry lies outside the output"));
        }
        let window_end = window_at.saturating_add(window_len);
        if window_at < HEADER as u64 || window_end > table_at as u64 {
            return Err(broken("a window lies outside the area of windows"));
        }
        if window_len == 0
            || window_len > MAX_WINDOW
            || (file[10] == 0 && window_len != WINDOW as u64)
        {
            return Err(broken("a window has an impossible length"));
        }
        // Each is copied: without this bound, many entries could name one window.
        windows += window_len;
        if windows > table_at as u64 {
            return Err(broken("the windows have more bytes than the file holds"));
        }
        let window = &file[window_at as usize..window_end as usize];
        let window = match (out, file[10]) {
            (0, _) => SparseWindow::none(),
            (_, 0) => SparseWindow::from_raw(window),
            _ => SparseWindow::from_zlib(window),
        };
        match checkpoints.last() {
            None if out != 0 => return Err(broken("the first entry does not start the output")),
            Some(last) if out < last.out.0 || bit <= last.bit.0 => {
                return Err(broken("the entries are not in order"));
            }
            // An empty block lies between the two, or only empty blocks follow.
            Some(last) if out == last.out.0 || out == uncompressed_len => continue,
            _ => {}
        }
        let kind = if out == 0 { CheckpointKind::MemberStart } else { CheckpointKind::Block };
        checkpoints.push(Checkpoint { bit: Bits(bit), out: Bytes(out), kind, window });
    }
    Ok(GzipIndex {
        layer: None,
        span: Bytes(u64::from(span)),
        compressed_len: Bytes(compressed_len),
        uncompressed_len: Bytes(uncompressed_len),
        members: 1,
        checkpoints,
        crc32: None,
        sha256: None,
    })
}
