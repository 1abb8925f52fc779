//! LSMT layers (spec lsmt 2 to 5, 8, 9 and 11).

use super::Report;
use super::field::{is_zero, le32, le64};

const MAGIC: [u8; 24] = [
    0x4c, 0x53, 0x4d, 0x54, 0x00, 0x01, 0x02, 0x00, 0x65, 0x7e, 0x63, 0xd2, 0x94, 0x44, 0x08, 0x4c,
    0xa2, 0xd2, 0xc8, 0xec, 0x4f, 0xcf, 0xae, 0x8a,
];

/// First sector of a padding entry.
const PADDING: u64 = (1 << 50) - 1;

const NULL_UUID: &str = "00000000-0000-0000-0000-000000000000";

/// Origin of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Made {
    /// Committed by today's tools, or by turbobd: native.
    Native,
    /// Committed by today's tools as a warp layer.
    Warp,
    /// Sealed in place, merged or old: identity, tags and unused bytes may have any value.
    Otherwise,
}

/// A mapping, its tag normalised.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapping {
    pub lba: u64,
    pub len: u64,
    pub moffset: u64,
    pub zeroed: bool,
    pub tag: u8,
}

impl Mapping {
    pub fn end(&self) -> u64 {
        self.lba + self.len
    }
}

/// A parsed layer.
pub struct Layer {
    pub vsize: u64,
    pub uuid: String,
    pub parent: String,
    pub mappings: Vec<Mapping>,
    /// The whole stream.
    pub stream: Vec<u8>,
}

fn uuid_field(record: &[u8], at: usize) -> String {
    String::from_utf8_lossy(&record[at..at + 36]).into_owned()
}

fn is_uuid(text: &str) -> bool {
    text.len() == 36
        && text.bytes().enumerate().all(|(at, byte)| match at {
            8 | 13 | 18 | 23 => byte == b'-',
            _ => matches!(byte, b'0'..=b'9' | b'A'..=b'F'),
        })
}

/// Reads a layer.
pub fn check(stream: Vec<u8>, made: Made, report: &mut Report) -> Option<Layer> {
    if !report
        .hold("lsmt.has-room-for-two-records", stream.len() >= 8192, || stream.len().to_string())
    {
        return None;
    }
    let at = stream.len() - 4096;
    let (header, trailer) = (&stream[..4096], &stream[at..]);
    report.hold("lsmt.header-magic", header[..24] == MAGIC, || "header".into());
    report.hold("lsmt.trailer-magic", trailer[..24] == MAGIC, || "trailer".into());
    report.hold("lsmt.header-is-of-a-data-file", le32(header, 28) & 3 == 3, || {
        le32(header, 28).to_string()
    });
    report.hold("lsmt.trailer-is-sealed", le32(trailer, 28) & 7 == 6, || {
        le32(trailer, 28).to_string()
    });
    let (index_at, count, vsize) = (le64(trailer, 32), le64(trailer, 40), le64(trailer, 48));
    let (uuid, parent) = (uuid_field(trailer, 56), uuid_field(trailer, 93));
    if made != Made::Otherwise {
        check_committed(header, trailer, report);
        report.hold("lsmt.uuid-is-upper-case", is_uuid(&uuid) && is_uuid(&parent), || {
            format!("{uuid} {parent}")
        });
        if made == Made::Warp {
            report.hold(
                "lsmt.warp-has-no-identity",
                uuid == NULL_UUID && parent == NULL_UUID,
                || uuid.clone(),
            );
        }
    }
    report.hold("lsmt.vsize-is-whole-sectors", vsize % 512 == 0, || vsize.to_string());
    report
        .hold("lsmt.index-has-at-most-a-million-entries", count <= 1_000_000, || count.to_string());
    let inside = index_at >= 4096
        && index_at % 512 == 0
        && count
            .checked_mul(16)
            .and_then(|len| len.checked_add(index_at))
            .is_some_and(|end| end <= at as u64);
    if !report.hold("lsmt.index-lies-before-the-trailer", inside, || {
        format!("{count} entries at {index_at}")
    }) {
        return None;
    }
    let end = index_at + count * 16;
    if made != Made::Otherwise {
        report
            .hold("lsmt.index-ends-at-the-trailer", end == at as u64, || format!("{end} and {at}"));
    }
    if made == Made::Native {
        report.hold("lsmt.native-index-is-padded", count % 256 == 0, || count.to_string());
    }
    let mappings = read_index(&stream[index_at as usize..end as usize], report);
    let mappings = check_index(mappings, made, index_at / 512, vsize, report);
    Some(Layer { vsize, uuid, parent, mappings, stream })
}

/// Rules of a layer written by `overlaybd-commit` (spec lsmt 8.1).
fn check_committed(header: &[u8], trailer: &[u8], report: &mut Report) {
    let flags = (le32(header, 28), le32(trailer, 28));
    report.hold("lsmt.committed-flags", flags == (7, 6), || format!("{flags:?}"));
    report.hold("lsmt.record-size", le32(header, 24) == 390 && le32(trailer, 24) == 390, || {
        "size".into()
    });
    report.hold("lsmt.header-has-no-index", is_zero(&header[32..48]), || "bytes 32..48".into());
    report.hold(
        "lsmt.version-is-1.1",
        header[132..134] == [1, 1] && trailer[132..134] == [1, 1],
        || format!("{:?}", &trailer[132..134]),
    );
    report.hold(
        "lsmt.header-and-trailer-have-one-identity",
        header[48..390] == trailer[48..390],
        || "bytes 48..390".into(),
    );
    report.hold(
        "lsmt.record-padding-is-zero",
        is_zero(&header[390..]) && is_zero(&trailer[390..]),
        || "behind byte 390".into(),
    );
}

/// Entries that are not padding.
fn read_index(index: &[u8], report: &mut Report) -> Vec<Mapping> {
    let mut mappings: Vec<Mapping> = Vec::new();
    let mut padded = false;
    for (number, entry) in index.chunks_exact(16).enumerate() {
        let (a, b) = (le64(entry, 0), le64(entry, 8));
        let lba = a & PADDING;
        if lba == PADDING {
            padded = true;
            report.hold("lsmt.padding-is-as-upstream-writes-it", a == PADDING && b == 0, || {
                format!("entry {number}")
            });
            continue;
        }
        report.hold("lsmt.padding-comes-last", !padded, || format!("entry {number}"));
        mappings.push(Mapping {
            lba,
            len: a >> 50,
            moffset: b & ((1 << 55) - 1),
            zeroed: b >> 55 & 1 == 1,
            tag: (b >> 56) as u8,
        });
    }
    mappings
}

fn check_index(
    mut mappings: Vec<Mapping>,
    made: Made,
    limit: u64,
    vsize: u64,
    report: &mut Report,
) -> Vec<Mapping> {
    // Upstream subtracts the lowest tag of a warp layer, which is right only if some entry is of the layer's
    // own data.
    if made == Made::Warp {
        let lowest = mappings.iter().map(|mapping| mapping.tag).min().unwrap_or(0);
        report
            .hold("lsmt.warp-has-a-metadata-entry", lowest == 0, || format!("lowest tag {lowest}"));
    }
    let mut free = 0;
    for (number, mapping) in mappings.iter_mut().enumerate() {
        let detail = format!("entry {number}: {mapping:?}");
        let detail = || detail.clone();
        report.hold("lsmt.entry-has-a-length", mapping.len > 0, detail);
        report.hold("lsmt.entries-are-ordered", mapping.lba >= free, detail);
        free = mapping.end();
        if vsize > 0 {
            report.hold("lsmt.entry-lies-on-the-disk", mapping.end() <= vsize / 512, detail);
        }
        if made == Made::Warp {
            report.hold("lsmt.warp-tags-are-0-and-1", mapping.tag <= 1, detail);
        } else {
            mapping.tag = 0; // ignored by readers; merged layers have some
        }
        if mapping.tag == 1 {
            report.hold("lsmt.remote-entry-is-not-zeroed", !mapping.zeroed, detail);
            continue;
        }
        let end = mapping.moffset + if mapping.zeroed { 0 } else { mapping.len };
        report.hold(
            "lsmt.entry-points-into-the-payload",
            mapping.moffset >= 8 && end <= limit,
            detail,
        );
        if !mapping.zeroed {
            report.hold(
                "lsmt.data-entry-begins-in-the-payload",
                mapping.moffset < limit && end > 8,
                detail,
            );
        }
    }
    mappings
}
