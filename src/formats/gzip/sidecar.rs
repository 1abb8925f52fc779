//! The file `turbobd.segments`: data that a `gzip.meta` cannot hold, in a file beside it.
//!
//! `turbobd.segments` is a member of the layer archive that upstream ignores. It lists all checkpoints, has
//! the checksums of each segment, and holds the windows and block headers of the checkpoints that are not in
//! the `gzip.meta`. All numbers are little-endian.
//!
//! | Offset | Size | Field |
//! |---|---|---|
//! | 0 | 8 | magic, `TBDSEGS` and NUL |
//! | 8 | 2 | version, 1 ([version 2](crate::segments::sidecar) is for layers that are not gzip) |
//! | 10 | 2 | flags: bit 0, windows of block checkpoints lie in `gzip.meta`; bit 1, SHA-256 given; bit 2, CRC-32 given |
//! | 12 | 4 | number of checkpoints, *n*, at least 1 |
//! | 16 | 32 | SHA-256 of the layer blob |
//! | 48 | 8 | length of the layer blob |
//! | 56 | 8 | length of its output |
//! | 64 | 8 | span |
//! | 72 | 8 | number of gzip members |
//! | 80 | | column: *n* × varint, bit position minus that of the previous checkpoint |
//! | | | column: *n* × varint, output position minus that of the previous checkpoint |
//! | | *n* | column: kind; 0 member start, 1 block, 2 inside a block |
//! | | 32 *n* | if flag bit 1: SHA-256 of bytes ⌊bit/8⌋..⌈next bit/8⌉ of the blob; the last segment ends with the blob |
//! | | 4 *n* | if flag bit 2: CRC-32 of the segment's output |
//! | | | for each checkpoint of kind 2: varint, bits of the block header; the header, low bit first, zero-padded |
//! | | | for each checkpoint of kind 2, and of kind 1 unless flag bit 0: varint, length; the window's zlib stream |
//! | end − 4 | 4 | CRC-32 of everything before |
//!
//! A varint is LEB128: seven bits a byte, low ones first, high bit set on all but the last.

use super::index::{BlockHeader, Checkpoint, CheckpointKind, GzipIndex, MAX_HEADER_BITS};
use super::window::{SparseWindow, WindowPacker};
use super::{GzipError, ddgzidx};
use crate::oci::Digest;
use crate::segments::columns::{Broken, Cursor, put_varint};
use crate::units::{Bits, Bytes};
use inflate::marks::WINDOW;

/// Name of the file in a layer archive.
pub const SIDECAR_NAME: &str = "turbobd.segments";

const MAGIC: &[u8; 8] = b"TBDSEGS\0";
const VERSION: u16 = 1;
const HEADER: usize = 80;
const WINDOWS_IN_META: u16 = 1;
const HAS_SHA256: u16 = 2;
const HAS_CRC32: u16 = 4;

/// A parsed `turbobd.segments`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sidecar {
    /// The index; windows of block checkpoints are absent if they lie in `gzip.meta`.
    index: GzipIndex,
    needs_meta: bool,
}

/// Reads a length and that many bytes, at most `limit`.
fn sized<'a>(cursor: &mut Cursor<'a>, limit: usize) -> Result<&'a [u8], GzipError> {
    let len = usize::try_from(cursor.varint()?).ok().filter(|&len| len <= limit);
    let len = len.ok_or(cursor.broken("a window is impossibly long"))?;
    Ok(cursor.take(len)?)
}

impl From<Broken> for GzipError {
    fn from(Broken { offset, rule }: Broken) -> Self {
        Self::Sidecar { offset, rule }
    }
}

impl Sidecar {
    /// The sidecar of `index`, for the layer `layer`. With `beside_gzip_meta` it omits the windows that are
    /// in the `gzip.meta` written from the same index.
    ///
    /// # Errors
    /// [`GzipError::TooLarge`] for more than 2³² checkpoints.
    pub fn write(
        index: &GzipIndex,
        layer: Digest,
        beside_gzip_meta: bool,
    ) -> Result<Vec<u8>, GzipError> {
        let count = u32::try_from(index.checkpoints.len())
            .map_err(|_| GzipError::TooLarge { what: "checkpoints" })?;
        let mut flags = 0;
        for (set, flag) in [
            (beside_gzip_meta, WINDOWS_IN_META),
            (index.sha256.is_some(), HAS_SHA256),
            (index.crc32.is_some(), HAS_CRC32),
        ] {
            flags |= if set { flag } else { 0 };
        }
        let mut file = MAGIC.to_vec();
        file.extend(VERSION.to_le_bytes());
        file.extend(flags.to_le_bytes());
        file.extend(count.to_le_bytes());
        file.extend(layer.0);
        for word in [index.compressed_len.0, index.uncompressed_len.0, index.span.0, index.members]
        {
            file.extend(word.to_le_bytes());
        }
        let columns: [fn(&Checkpoint) -> u64; 2] =
            [|checkpoint| checkpoint.bit.0, |checkpoint| checkpoint.out.0];
        for column in columns {
            let mut before = 0;
            for checkpoint in &index.checkpoints {
                let value = column(checkpoint);
                put_varint(&mut file, value.wrapping_sub(before));
                before = value;
            }
        }
        file.extend(index.checkpoints.iter().map(|checkpoint| match checkpoint.kind {
            CheckpointKind::MemberStart => 0u8,
            CheckpointKind::Block => 1,
            CheckpointKind::MidBlock(_) => 2,
        }));
        for digest in index.sha256.iter().flatten() {
            file.extend(digest);
        }
        for crc in index.crc32.iter().flatten() {
            file.extend(crc.to_le_bytes());
        }
        for checkpoint in &index.checkpoints {
            if let CheckpointKind::MidBlock(header) = &checkpoint.kind {
                put_varint(&mut file, header.bits() as u64);
                file.extend(header.bytes());
            }
        }
        let mut packer = WindowPacker::new();
        for checkpoint in &index.checkpoints {
            if has_window_here(&checkpoint.kind, beside_gzip_meta) {
                let window = checkpoint.window.zlib(&mut packer);
                put_varint(&mut file, window.len() as u64);
                file.extend_from_slice(&window);
            }
        }
        let crc = crc32fast::hash(&file);
        file.extend(crc.to_le_bytes());
        Ok(file)
    }

    /// Reads a sidecar. Windows are not unpacked here: a damaged window is detected when it is used.
    ///
    /// # Errors
    /// [`GzipError::Sidecar`] with the first broken rule.
    pub fn read(file: &[u8]) -> Result<Self, GzipError> {
        let at_end = |rule| GzipError::Sidecar { offset: file.len() as u64, rule };
        let Some((body, &crc)) = file.split_last_chunk::<4>() else {
            return Err(at_end("the file is empty"));
        };
        let mut cursor = Cursor::new(body);
        if cursor.array::<8>()? != *MAGIC {
            return Err(GzipError::Sidecar { offset: 0, rule: "the magic is not TBDSEGS" });
        }
        if u16::from_le_bytes(cursor.array()?) != VERSION {
            return Err(GzipError::Sidecar { offset: 8, rule: "the version is not 1" });
        }
        if crc32fast::hash(body) != u32::from_le_bytes(crc) {
            return Err(at_end("the file does not match its CRC-32"));
        }
        let flags = u16::from_le_bytes(cursor.array()?);
        if flags & !(WINDOWS_IN_META | HAS_SHA256 | HAS_CRC32) != 0 {
            return Err(cursor.broken("unknown flags are set").into());
        }
        let count = u32::from_le_bytes(cursor.array()?) as usize;
        let layer = Digest(cursor.array()?);
        let (compressed_len, uncompressed_len) = (cursor.u64()?, cursor.u64()?);
        let (span, members) = (cursor.u64()?, cursor.u64()?);
        // Each checkpoint takes at least three bytes.
        if count == 0 || count > (body.len() - HEADER) / 3 {
            return Err(cursor.broken("the number of checkpoints does not fit the file").into());
        }
        if members == 0
            || compressed_len >= u64::MAX / 2048
            || uncompressed_len > compressed_len * 1032
        {
            return Err(cursor.broken("the lengths are impossible").into());
        }
        let bits = column(&mut cursor, count, compressed_len * 8)?;
        let outs = column(&mut cursor, count, uncompressed_len)?;
        let ordered = |column: &[u64]| column.windows(2).all(|pair| pair[0] < pair[1]);
        let last = outs[count - 1];
        if !ordered(&bits)
            || !ordered(&outs)
            || outs[0] != 0
            || (last >= uncompressed_len && last > 0)
        {
            return Err(cursor.broken("the checkpoints are not in order").into());
        }
        let kinds = cursor.take(count)?;
        if kinds[0] != 0 || kinds.iter().any(|&kind| kind > 2) {
            return Err(cursor.broken("a checkpoint is of an unknown kind").into());
        }
        let mut sha256 = None;
        if flags & HAS_SHA256 != 0 {
            sha256 = Some(cursor.take(32 * count)?.as_chunks().0.to_vec());
        }
        let mut crc32 = None;
        if flags & HAS_CRC32 != 0 {
            let (words, _) = cursor.take(4 * count)?.as_chunks();
            crc32 = Some(words.iter().map(|word| u32::from_le_bytes(*word)).collect());
        }
        let mut checkpoints = Vec::with_capacity(count);
        for i in 0..count {
            let kind = match kinds[i] {
                0 => CheckpointKind::MemberStart,
                1 => CheckpointKind::Block,
                _ => CheckpointKind::MidBlock(read_header(&mut cursor)?),
            };
            checkpoints.push(Checkpoint {
                bit: Bits(bits[i]),
                out: Bytes(outs[i]),
                kind,
                window: SparseWindow::none(),
            });
        }
        let needs_meta = flags & WINDOWS_IN_META != 0;
        for checkpoint in &mut checkpoints {
            if has_window_here(&checkpoint.kind, needs_meta) {
                checkpoint.window = SparseWindow::from_zlib(sized(&mut cursor, 2 * WINDOW)?);
            }
        }
        if !cursor.is_at_end() {
            return Err(cursor.broken("bytes follow the last window").into());
        }
        let index = GzipIndex {
            layer: Some(layer),
            span: Bytes(span),
            compressed_len: Bytes(compressed_len),
            uncompressed_len: Bytes(uncompressed_len),
            members,
            checkpoints,
            crc32,
            sha256,
        };
        Ok(Self { index, needs_meta })
    }

    /// Digest of the layer that this sidecar describes.
    #[must_use]
    pub fn layer(&self) -> Option<Digest> {
        self.index.layer
    }
}

/// True if a sidecar holds the window of a checkpoint of this kind.
fn has_window_here(kind: &CheckpointKind, beside_gzip_meta: bool) -> bool {
    match kind {
        CheckpointKind::MemberStart => false,
        CheckpointKind::Block => !beside_gzip_meta,
        CheckpointKind::MidBlock(_) => true,
    }
}

/// Reads `count` positions of at most `limit`, stored as differences.
fn column(cursor: &mut Cursor<'_>, count: usize, limit: u64) -> Result<Vec<u64>, GzipError> {
    let mut value = 0u64;
    let mut values = Vec::with_capacity(count);
    for _ in 0..count {
        let next = value.checked_add(cursor.varint()?).filter(|&next| next <= limit);
        value = next.ok_or(cursor.broken("a checkpoint lies outside the layer"))?;
        values.push(value);
    }
    Ok(values)
}

fn read_header(cursor: &mut Cursor<'_>) -> Result<BlockHeader, GzipError> {
    let bits = usize::try_from(cursor.varint()?).ok().filter(|&bits| bits <= MAX_HEADER_BITS);
    let bits = bits.ok_or(cursor.broken("a block header is impossibly long"))?;
    let bytes = cursor.take(bits.div_ceil(8))?;
    let header = BlockHeader::from_bits(bytes, 0, bits);
    if header.end_of_block().is_none() || header.bytes() != bytes {
        return Err(cursor.broken("a block header is not one").into());
    }
    Ok(header)
}

/// The full index of a layer from the files in its archive. Upstream's images have no sidecar (then no
/// segment can be verified); layers of several members have no `gzip.meta`.
///
/// # Errors
/// [`GzipError::OtherLayer`] if the two describe different layers, [`GzipError::NoIndex`] if a needed file is
/// missing, or the error of reading one of them.
pub fn merge(gzip_meta: Option<&[u8]>, sidecar: Option<&[u8]>) -> Result<GzipIndex, GzipError> {
    let missing = |name| GzipError::NoIndex { missing: name };
    let meta = gzip_meta.map(ddgzidx::read).transpose()?;
    let Some(sidecar) = sidecar else { return meta.ok_or(missing(ddgzidx::GZIP_META_NAME)) };
    let Sidecar { mut index, needs_meta } = Sidecar::read(sidecar)?;
    let Some(meta) = meta else {
        return if needs_meta { Err(missing(ddgzidx::GZIP_META_NAME)) } else { Ok(index) };
    };
    let same = |what, ours: u64, theirs: u64| {
        if ours == theirs { Ok(()) } else { Err(GzipError::OtherLayer { what, ours, theirs }) }
    };
    same("the compressed length", index.compressed_len.0, meta.compressed_len.0)?;
    same("the uncompressed length", index.uncompressed_len.0, meta.uncompressed_len.0)?;
    let mut theirs = meta.checkpoints.into_iter();
    for checkpoint in &mut index.checkpoints {
        if matches!(checkpoint.kind, CheckpointKind::MidBlock(_)) {
            continue;
        }
        let other = theirs.next().map(|other| (other.bit, other.out, other.window));
        let (bit, out, window) = other.unwrap_or((Bits(0), Bytes(u64::MAX), SparseWindow::none()));
        same("the output position of a checkpoint", checkpoint.out.0, out.0)?;
        same("the bit position of a checkpoint", checkpoint.bit.0, bit.0)?;
        if checkpoint.kind == CheckpointKind::Block && needs_meta {
            checkpoint.window = window;
        }
    }
    if let Some(surplus) = theirs.next() {
        same("the output position of a checkpoint", index.uncompressed_len.0, surplus.out.0)?;
    }
    Ok(index)
}
