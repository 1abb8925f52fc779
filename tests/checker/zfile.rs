//! ZFile (spec zfile 1 to 7).

use super::Report;
use super::field::{is_zero, le32, le64, raw_crc32c};

const MAGIC: &[u8; 24] = b"ZFile\0\x01\0tuji.yyf@Alibaba";

/// True if `file` begins like a ZFile.
pub fn is_zfile(file: &[u8]) -> bool {
    file.len() >= 512 && &file[..24] == MAGIC
}

/// Parameters of a ZFile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Form {
    pub algo: u8,
    pub block_size: u32,
    pub verify: bool,
}

fn digest_holds(record: &[u8]) -> bool {
    let mut zeroed = record.to_vec();
    zeroed[28..32].fill(0);
    raw_crc32c(0, &zeroed) == le32(record, 28)
}

/// The plain bytes of a ZFile. `old`: it is from 2021; flags beyond the lowest bits, digests and padding have
/// any value (spec zfile 2).
pub fn check(file: &[u8], old: bool, report: &mut Report) -> Option<(Vec<u8>, Form)> {
    if !report.hold("zfile.has-room-for-two-records", file.len() >= 1024, || file.len().to_string())
    {
        return None;
    }
    let (header, trailer) = (&file[..512], &file[file.len() - 512..]);
    if !report.hold("zfile.header-magic", &header[..24] == MAGIC, || "header".into()) {
        return None;
    }
    report
        .hold("zfile.header-bits", le64(header, 32) & 3 == 3, || format!("{:x}", le64(header, 32)));
    report.hold("zfile.trailer-magic", &trailer[..24] == MAGIC, || "trailer".into());
    report.hold("zfile.trailer-bits", le64(trailer, 32) & 7 == 6, || {
        format!("{:x}", le64(trailer, 32))
    });
    let overwritten = le64(header, 32) & 8 != 0;
    if !old {
        let flags = (le64(header, 32), le64(trailer, 32));
        report.hold("zfile.flags-are-known", matches!(flags, (0x13 | 0x1b, 0x16)), || {
            format!("{flags:x?}")
        });
        report.hold("zfile.header-digest", digest_holds(header), || "header".into());
        report.hold("zfile.trailer-digest", digest_holds(trailer), || "trailer".into());
        let rest = is_zero(&header[96..]) && is_zero(&trailer[96..]) && is_zero(&header[89..96]);
        report.hold("zfile.padding-is-zero", rest, || "behind byte 89".into());
        report.hold("zfile.record-size", le32(header, 24) == 96 && le32(trailer, 24) == 96, || {
            "size".into()
        });
        report.hold("zfile.options-agree", header[72..89] == trailer[72..89], || {
            "bytes 72..89".into()
        });
    }
    if overwritten {
        report.hold(
            "zfile.header-says-what-the-trailer-says",
            header[40..96] == trailer[40..96],
            || "bytes 40..96".into(),
        );
    }
    // Upstream uses the header if it was overwritten, else the trailer.
    let record = if overwritten { header } else { trailer };
    let form = Form { algo: record[76], block_size: le32(record, 72), verify: record[88] == 1 };
    let (index_at, count, size) = (le64(record, 40), le64(record, 48), le64(record, 56));
    let block = u64::from(form.block_size);
    let sized =
        form.block_size.is_power_of_two() && (4 << 10..=64 << 10).contains(&form.block_size);
    if !report.hold("zfile.block-size", sized, || block.to_string()) {
        return None;
    }
    report.hold("zfile.algo-is-lz4-or-zstd", matches!(form.algo, 1 | 2), || form.algo.to_string());
    report.hold("zfile.no-dictionary", le32(record, 84) == 0 && record[78] == 0, || {
        "dict_size".into()
    });
    report.hold("zfile.blocks-cover-the-size", count == size.div_ceil(block), || {
        format!("{count} for {size}")
    });
    let inside = count <= 1_000_000_000
        && index_at >= 512
        && index_at.checked_add(count * 4).is_some_and(|end| end == file.len() as u64 - 512);
    if !report.hold("zfile.index-ends-at-the-trailer", inside, || {
        format!("{count} entries at {index_at}")
    }) {
        return None;
    }
    let index = &file[index_at as usize..file.len() - 512];
    if !old {
        report.hold("zfile.index-crc", raw_crc32c(0, index) == le32(record, 64), || "index".into());
    }
    let entries: Vec<u64> = index.chunks(4).map(|entry| u64::from(le32(entry, 0))).collect();
    let least = if form.verify { 4 } else { 0 };
    for (number, &entry) in entries.iter().enumerate() {
        report.hold("zfile.entry-has-bytes", entry > least, || format!("block {number}"));
        report.hold("zfile.entry-fits-upstreams-buffer", entry <= 65_536, || {
            format!("block {number}: {entry}")
        });
    }
    for (number, group) in entries.chunks((65_536 / block) as usize).enumerate() {
        let sum: u64 = group[..group.len() - 1].iter().sum();
        report.hold("zfile.group-sum-fits-16-bits", sum < 65_535, || {
            format!("group {number}: {sum}")
        });
    }
    let data_end = 512 + entries.iter().sum::<u64>();
    if !report.hold("zfile.index-follows-the-last-block", data_end == index_at, || {
        format!("{data_end} {index_at}")
    }) {
        return None;
    }
    let mut plain = Vec::with_capacity(size as usize);
    let mut at = 512;
    for (number, &entry) in entries.iter().enumerate() {
        let stored = &file[at..at + entry as usize];
        at += entry as usize;
        let want = (size - plain.len() as u64).min(block) as usize;
        let packed = if form.verify {
            let (packed, crc) = stored.split_at(stored.len().checked_sub(4)?);
            report.hold("zfile.block-crc", raw_crc32c(100_007, packed) == le32(crc, 0), || {
                format!("block {number}")
            });
            packed
        } else {
            stored
        };
        let decoded = match form.algo {
            2 => zstd::bulk::decompress(packed, block as usize).map_err(|e| e.to_string()),
            _ => lz4_flex::block::decompress(packed, block as usize).map_err(|e| e.to_string()),
        };
        let block = report.ok("zfile.block-decodes", decoded)?;
        if !report
            .hold("zfile.block-has-its-length", block.len() == want, || format!("block {number}"))
        {
            return None;
        }
        plain.extend_from_slice(&block);
    }
    Some((plain, form))
}
