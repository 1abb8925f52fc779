//! This project's sidecar of layers that are not gzip: `turbobd.segments`, version 2.

use sha2::{Digest as _, Sha256};

use super::Report;
use super::field::{crc32, hex, le16, le32, le64};
use super::index::Reader;

/// A segment: its place in the blob, its place in the tar, and true if it continues from the one before.
struct Segment {
    input: std::ops::Range<u64>,
    output: std::ops::Range<u64>,
    inside: bool,
}

/// Checks a `turbobd.segments` against its blob and the tar in it; `encoding` is 1 for a bare tar, 2 for zstd.
pub fn check_segments(file: &[u8], blob: &[u8], tar: &[u8], encoding: u8, report: &mut Report) {
    if !report.hold("segments.has-room-for-a-header", file.len() >= 76, || file.len().to_string()) {
        return;
    }
    let body = &file[..file.len() - 4];
    report.hold("segments.crc", crc32(body) == le32(file, body.len()), || "crc".into());
    report.hold("segments.magic", &file[..8] == b"TBDSEGS\0", || hex(&file[..8]));
    report.hold("segments.version-is-2", le16(file, 8) == 2, || le16(file, 8).to_string());
    report.hold("segments.encoding-is-the-blobs", file[10..12] == [encoding, 0], || {
        hex(&file[10..12])
    });
    let named = file[16..48] == Sha256::digest(blob)[..];
    report.hold("segments.names-the-blob", named, || hex(&file[16..48]));
    let lens = [le64(file, 48), le64(file, 56)];
    report.hold("segments.knows-the-blobs-size", lens[0] == blob.len() as u64, || {
        lens[0].to_string()
    });
    report
        .hold("segments.knows-the-tars-size", lens[1] == tar.len() as u64, || lens[1].to_string());
    let mut reader = Reader { file: body, at: 72 };
    let count = le32(file, 12) as usize;
    let parsed = read(&mut reader, count);
    if !report.hold("segments.has-all-columns", parsed.is_some(), || format!("{count} segments")) {
        return;
    }
    let (segments, sha, crc) = parsed.unwrap();
    report.hold("segments.ends-with-its-crc", reader.at == body.len(), || reader.at.to_string());
    let inside = segments.iter().all(|one| one.input.end <= blob.len() as u64);
    let whole = segments.last().map_or(0, |last| last.output.end) == tar.len() as u64;
    let cover = inside && whole;
    if !report.hold("segments.cover-the-tar-and-lie-in-the-blob", cover, || "length".into()) {
        return;
    }
    let begins = segments.first().is_none_or(|first| !first.inside);
    if !report.hold("segments.first-decodes-alone", begins, || "kind".into()) {
        return;
    }
    for (number, segment) in segments.iter().enumerate() {
        let bytes = &blob[segment.input.start as usize..segment.input.end as usize];
        let data = &tar[segment.output.start as usize..segment.output.end as usize];
        let detail = || format!("segment {number}");
        let same = Sha256::digest(bytes)[..] == sha[number * 32..][..32];
        report.hold("segments.sha256", same, detail);
        report.hold("segments.crc32", crc32(data) == le32(crc, number * 4), detail);
        if segment.inside {
            continue;
        }
        // With the segments that continue from it.
        let rest = segments[number + 1..].iter().take_while(|next| next.inside).last();
        let last = rest.unwrap_or(segment);
        let bytes = &blob[segment.input.start as usize..last.input.end as usize];
        let data = &tar[segment.output.start as usize..last.output.end as usize];
        let decodes = if encoding == 1 {
            bytes == data
        } else {
            zstd::decode_all(bytes).is_ok_and(|decoded| decoded == data)
        };
        report.hold("segments.decode-to-the-tar", decodes, detail);
    }
}

fn read<'a>(reader: &mut Reader<'a>, count: usize) -> Option<(Vec<Segment>, &'a [u8], &'a [u8])> {
    let mut column = || (0..count).map(|_| reader.varint()).collect::<Option<Vec<u64>>>();
    let (gaps, lens, outs) = (column()?, column()?, column()?);
    let kinds = reader.take(count)?;
    let (mut end, mut out) = (0, 0);
    let mut segments = Vec::new();
    for number in 0..count {
        let start = end + gaps[number];
        end = start + lens[number];
        let output = out..out + outs[number];
        out = output.end;
        segments.push(Segment { input: start..end, output, inside: kinds[number] == 1 });
    }
    Some((segments, reader.take(32 * count)?, reader.take(4 * count)?))
}
