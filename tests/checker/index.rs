//! The gzip index, `gzip.meta` (spec gzip-index), and this project's sidecar beside it, `turbobd.segments`.
//!
//! Both are compared with the blob itself, decoded from its beginning: every checkpoint must have the stated
//! position, and decoding from it must give the same bytes.

use std::io::Read as _;

use sha2::{Digest as _, Sha256};

use super::Report;
use super::field::{crc32, hex, is_zero, le16, le32, le64, raw_crc32c};
use super::inflate::{self, Whole};

const WINDOW: usize = 32_768;

/// Output decoded beyond the next checkpoint: a read of upstream's continues from the checkpoint where it
/// began, and the bytes after the next one must not need more of the window.
const BEYOND: usize = 64 << 10;

/// A checkpoint of `gzip.meta`.
pub struct Entry {
    pub de_pos: u64,
    pub bit: u64,
    pub window: Vec<u8>,
}

fn unzlib(bytes: &[u8]) -> Result<Vec<u8>, String> {
    let mut out = Vec::new();
    let mut decoder = flate2::read::ZlibDecoder::new(bytes);
    decoder.read_to_end(&mut out).map_err(|error| error.to_string())?;
    match decoder.total_in() {
        used if used == bytes.len() as u64 => Ok(out),
        used => Err(format!("{used} of {} bytes are a zlib stream", bytes.len())),
    }
}

/// Checks a `gzip.meta` against the blob that it belongs to.
pub fn check_meta(
    file: &[u8],
    blob: &[u8],
    whole: &Whole,
    report: &mut Report,
) -> Option<Vec<Entry>> {
    if !report.hold("ddgzidx.has-room-for-a-header", file.len() >= 333, || file.len().to_string()) {
        return None;
    }
    report.hold("ddgzidx.magic", &file[..8] == b"ddgzidx\0", || hex(&file[..8]));
    report.hold("ddgzidx.major-version-is-1", file[8] == 1, || file[8].to_string());
    report.hold("ddgzidx.windows-are-raw-or-zlib", file[10] <= 1, || file[10].to_string());
    report.hold("ddgzidx.flag-is-0", file[12] == 0, || file[12].to_string());
    let span = i32::from_le_bytes(file[13..17].try_into().unwrap());
    report.hold("ddgzidx.span-is-at-least-64-KiB", span >= 65_536, || span.to_string());
    report
        .hold("ddgzidx.window-is-32-KiB", le32(file, 17) == 32_768, || le32(file, 17).to_string());
    report.hold("ddgzidx.entry-has-29-bytes", le32(file, 21) == 29, || le32(file, 21).to_string());
    report.hold("ddgzidx.knows-the-blobs-size", le64(file, 33) == blob.len() as u64, || {
        le64(file, 33).to_string()
    });
    report.hold("ddgzidx.knows-its-own-size", le64(file, 41) == file.len() as u64, || {
        le64(file, 41).to_string()
    });
    let tar_len = whole.out.len() as u64;
    report.hold("ddgzidx.knows-the-tars-size", le64(file, 49) == tar_len, || {
        le64(file, 49).to_string()
    });
    report.hold("ddgzidx.reserve-is-zero", is_zero(&file[57..313]), || "bytes 57..313".into());
    report.hold("ddgzidx.header-crc", raw_crc32c(0, &file[..329]) == le32(file, 329), || {
        "crc".into()
    });
    // Upstream sees nothing after the first member: such a layer must have no gzip.meta at all.
    report.hold("ddgzidx.blob-has-one-member", whole.members.len() == 1, || {
        whole.members.len().to_string()
    });
    let (count, start, len) = (le64(file, 25), le64(file, 313), le64(file, 321));
    let ends = start >= 333 && start.checked_add(len) == Some(file.len() as u64);
    if !report.hold("ddgzidx.table-ends-the-file", ends, || format!("{start} + {len}")) {
        return None;
    }
    let stored = &file[start as usize..];
    let table = if file[10] == 1 { unzlib(stored) } else { Ok(stored.to_vec()) };
    let table = report.ok("ddgzidx.table-unpacks", table)?;
    let exact = count.checked_mul(29) == Some(table.len() as u64) && count > 0;
    if !report
        .hold("ddgzidx.table-has-all-entries", exact, || format!("{count} in {}", table.len()))
    {
        return None;
    }
    let mut entries: Vec<Entry> = Vec::new();
    for entry in table.chunks(29) {
        entries.push(read_entry(entry, file, start, report)?);
    }
    report.hold("ddgzidx.first-entry-is-at-0", entries[0].de_pos == 0, || {
        entries[0].de_pos.to_string()
    });
    let ordered =
        entries.windows(2).all(|two| two[0].de_pos <= two[1].de_pos && two[0].bit < two[1].bit);
    report.hold("ddgzidx.entries-are-ordered", ordered, || "de_pos".into());
    for (number, entry) in entries.iter().enumerate() {
        let known = whole.blocks.binary_search(&(entry.bit, entry.de_pos)).is_ok();
        if !report.hold("ddgzidx.entry-is-a-block-boundary", known, || format!("entry {number}")) {
            continue;
        }
        let end = entries
            .get(number + 1)
            .map_or(tar_len, |next| (next.de_pos + BEYOND as u64).min(tar_len));
        let want = &whole.out[entry.de_pos as usize..end as usize];
        let got = inflate::from(blob, entry.bit, &entry.window, None, want.len());
        let good = got.as_deref() == Ok(want);
        report.hold("ddgzidx.window-serves-its-segment", good, || {
            format!("entry {number}: {:?}", got.err())
        });
    }
    Some(entries)
}

fn read_entry(entry: &[u8], file: &[u8], windows_end: u64, report: &mut Report) -> Option<Entry> {
    let (de_pos, en_pos, win_pos) = (le64(entry, 0), le64(entry, 8), le64(entry, 16));
    let (bits, win_len) = (u64::from(entry[24]), u64::from(le32(entry, 25)));
    let blob_len = le64(file, 33);
    report.hold("ddgzidx.bits-are-0-to-7", bits <= 7, || bits.to_string());
    let inside = en_pos <= blob_len && en_pos * 8 >= bits;
    report.hold("ddgzidx.entry-lies-in-the-blob", inside, || format!("{en_pos} of {blob_len}"));
    let stored =
        win_pos >= 333 && win_pos.checked_add(win_len).is_some_and(|end| end <= windows_end);
    if !report.hold("ddgzidx.window-lies-in-its-area", stored && inside, || {
        format!("{win_pos} + {win_len}")
    }) {
        return None;
    }
    let packed = &file[win_pos as usize..(win_pos + win_len) as usize];
    let window = if file[10] == 1 { unzlib(packed) } else { Ok(packed.to_vec()) };
    let window = report.ok("ddgzidx.window-unpacks", window)?;
    report.hold("ddgzidx.window-is-whole", window.len() == WINDOW, || window.len().to_string());
    Some(Entry { de_pos, bit: en_pos * 8 - bits.min(en_pos * 8), window })
}

/// Takes numbers off the front of a slice.
pub(super) struct Reader<'a> {
    pub(super) file: &'a [u8],
    pub(super) at: usize,
}

impl<'a> Reader<'a> {
    pub(super) fn take(&mut self, len: usize) -> Option<&'a [u8]> {
        let taken = self.file.get(self.at..self.at.checked_add(len)?)?;
        self.at += len;
        Some(taken)
    }

    pub(super) fn varint(&mut self) -> Option<u64> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.take(1)?[0];
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Some(value);
            }
        }
        None
    }

    fn column(&mut self, count: usize) -> Option<Vec<u64>> {
        let mut last = 0_u64;
        (0..count)
            .map(|_| {
                last = last.wrapping_add(self.varint()?);
                Some(last)
            })
            .collect()
    }
}

/// A checkpoint of the sidecar: bit, output position, kind, block header, window.
struct Point<'a> {
    bit: u64,
    out: u64,
    kind: u8,
    header: Option<(&'a [u8], u64)>,
    /// The window; `None` if it should be in `gzip.meta` and is not.
    window: Option<Vec<u8>>,
}

/// Checks a `turbobd.segments` against its blob and the `gzip.meta` beside it.
pub fn check_sidecar(
    file: &[u8],
    blob: &[u8],
    whole: &Whole,
    meta: Option<&[Entry]>,
    report: &mut Report,
) {
    if !report.hold("sidecar.has-room-for-a-header", file.len() >= 84, || file.len().to_string()) {
        return;
    }
    let body = &file[..file.len() - 4];
    report.hold("sidecar.crc", crc32(body) == le32(file, body.len()), || "crc".into());
    report.hold("sidecar.magic", &file[..8] == b"TBDSEGS\0", || hex(&file[..8]));
    report.hold("sidecar.version-is-1", le16(file, 8) == 1, || le16(file, 8).to_string());
    let (flags, count) = (le16(file, 10), le32(file, 12) as usize);
    // A segment that cannot be verified is served on trust: turbobd's own sidecars never need that.
    report.hold("sidecar.has-both-checksums", flags & 6 == 6 && flags < 8, || flags.to_string());
    let shared = flags & 1 == 1;
    report.hold("sidecar.shares-windows-with-gzip-meta", shared == meta.is_some(), || {
        flags.to_string()
    });
    report.hold("sidecar.names-the-blob", file[16..48] == Sha256::digest(blob)[..], || {
        hex(&file[16..48])
    });
    report.hold("sidecar.knows-the-blobs-size", le64(file, 48) == blob.len() as u64, || {
        le64(file, 48).to_string()
    });
    let tar_len = whole.out.len() as u64;
    report.hold("sidecar.knows-the-tars-size", le64(file, 56) == tar_len, || {
        le64(file, 56).to_string()
    });
    let members = whole.members.len() as u64;
    report.hold("sidecar.counts-the-members", le64(file, 72) == members, || {
        le64(file, 72).to_string()
    });
    let mut reader = Reader { file: body, at: 80 };
    let parsed = read_points(&mut reader, count, shared, meta);
    if !report.hold("sidecar.has-all-columns", parsed.is_some(), || format!("{count} checkpoints"))
    {
        return;
    }
    let (points, sha, crc) = parsed.unwrap();
    report.hold("sidecar.ends-with-its-crc", reader.at == body.len(), || reader.at.to_string());
    report.hold(
        "sidecar.first-checkpoint-is-at-0",
        points.first().is_some_and(|p| p.out == 0),
        String::new,
    );
    let ordered = points.windows(2).all(|two| two[0].out < two[1].out && two[0].bit < two[1].bit);
    let bounded =
        points.iter().all(|point| point.out <= tar_len && point.bit <= blob.len() as u64 * 8);
    if !report.hold("sidecar.checkpoints-are-ordered", ordered && bounded, || "out or bit".into()) {
        return;
    }
    for (number, point) in points.iter().enumerate() {
        let next = points.get(number + 1);
        let end = next.map_or(tar_len, |next| next.out);
        let bytes_end = next.map_or(blob.len() as u64, |next| next.bit.div_ceil(8));
        let compressed = &blob[(point.bit / 8) as usize..bytes_end as usize];
        let data = &whole.out[point.out as usize..end as usize];
        let detail = || format!("segment {number}");
        report.hold(
            "sidecar.segment-sha256",
            Sha256::digest(compressed)[..] == sha[number * 32..][..32],
            detail,
        );
        report.hold("sidecar.segment-crc32", crc32(data) == le32(crc, number * 4), detail);
        let block = whole.blocks.binary_search(&(point.bit, point.out)).is_ok();
        let kind = match point.kind {
            0 => begins_member(whole, point),
            1 => block && !begins_member(whole, point),
            2 => !block,
            _ => false,
        };
        report.hold("sidecar.kind-is-what-lies-there", kind, detail);
        let there = point.window.is_some();
        report.hold("sidecar.shared-window-is-in-gzip-meta", there, detail);
        let window = point.window.as_deref().unwrap_or_default();
        let got = inflate::from(blob, point.bit, window, point.header, data.len());
        report.hold("sidecar.segment-decodes-alone", got.as_deref() == Ok(data), || {
            format!("segment {number}: {:?}", got.err())
        });
    }
}

/// True if the first block of a member is at `point`.
fn begins_member(whole: &Whole, point: &Point<'_>) -> bool {
    let first = whole.blocks.partition_point(|&(_, out)| out < point.out);
    whole.members.contains(&point.out)
        && whole.blocks.get(first).is_some_and(|&(bit, _)| bit == point.bit)
}

type Points<'a> = (Vec<Point<'a>>, &'a [u8], &'a [u8]);

fn read_points<'a>(
    reader: &mut Reader<'a>,
    count: usize,
    shared: bool,
    meta: Option<&[Entry]>,
) -> Option<Points<'a>> {
    let bits = reader.column(count)?;
    let outs = reader.column(count)?;
    let kinds = reader.take(count)?;
    let sha = reader.take(32 * count)?;
    let crc = reader.take(4 * count)?;
    let mut points: Vec<Point<'a>> = Vec::new();
    for (number, &kind) in kinds.iter().enumerate() {
        let mut header = None;
        if kind == 2 {
            let len = reader.varint()?;
            header = Some((reader.take(len.div_ceil(8) as usize)?, len));
        }
        points.push(Point {
            bit: bits[number],
            out: outs[number],
            kind,
            header,
            window: Some(Vec::new()),
        });
    }
    for point in &mut points {
        point.window = match point.kind {
            0 => continue,
            1 if shared => {
                let here = (point.bit, point.out);
                let entry = meta?.iter().find(|entry| (entry.bit, entry.de_pos) == here);
                entry.map(|entry| entry.window.clone())
            }
            _ => {
                let len = reader.varint()? as usize;
                Some(unzlib(reader.take(len)?).ok()?)
            }
        };
    }
    Some((points, sha, crc))
}
