//! A writer, by the specification, of the forms that upstream's tools write and turbobd does not: sealed,
//! append-only, sparse and merged layers, ZFiles of every kind. It shares no code with the crate.

use super::field::raw_crc32c;

/// Options of a ZFile (spec zfile 2).
#[derive(Clone, Copy, Debug)]
pub struct ZFileOptions {
    /// 1 LZ4, 2 ZSTD.
    pub algo: u8,
    pub block_size: u32,
    /// True if blocks have checksums.
    pub verify: bool,
}

/// The record at either end of a ZFile.
struct Record {
    options: ZFileOptions,
    index_offset: u64,
    blocks: u64,
    size: u64,
    index_crc: u32,
}

impl Record {
    fn encode(&self, flags: u64) -> Vec<u8> {
        let mut bytes = b"ZFile\0\x01\0tuji.yyf@Alibaba".to_vec();
        bytes.extend(96_u32.to_le_bytes());
        bytes.extend([0; 4]);
        for word in [flags, self.index_offset, self.blocks, self.size] {
            bytes.extend(word.to_le_bytes());
        }
        bytes.extend(self.index_crc.to_le_bytes());
        bytes.extend([0; 4]);
        bytes.extend(self.options.block_size.to_le_bytes());
        bytes.extend([self.options.algo, 0, 0, 0]);
        bytes.extend([0; 8]);
        bytes.push(u8::from(self.options.verify));
        bytes.resize(512, 0);
        let digest = raw_crc32c(0, &bytes);
        bytes[28..32].copy_from_slice(&digest.to_le_bytes());
        bytes
    }
}

/// A ZFile as `overlaybd-zfile` writes it: the header is not overwritten at the end.
pub fn zfile(plain: &[u8], options: &ZFileOptions) -> Vec<u8> {
    let mut record =
        Record { options: *options, index_offset: 0, blocks: 0, size: 0, index_crc: 0 };
    let mut file = record.encode(0x13);
    let mut index = Vec::new();
    for block in plain.chunks(options.block_size as usize) {
        let mut stored = match options.algo {
            2 => zstd::bulk::compress(block, 3).unwrap(),
            _ => lz4_flex::block::compress(block),
        };
        if options.verify {
            stored.extend(raw_crc32c(100_007, &stored).to_le_bytes());
        }
        index.extend((stored.len() as u32).to_le_bytes());
        file.extend(stored);
    }
    record.index_offset = file.len() as u64;
    record.blocks = index.len() as u64 / 4;
    record.size = plain.len() as u64;
    record.index_crc = raw_crc32c(0, &index);
    file.extend(index);
    file.extend(record.encode(0x16));
    file
}

/// Identity of a layer, and of the layer that it was made on: textual UUIDs.
pub type Identity<'a> = (&'a str, &'a str);

/// No identity.
pub const NOBODY: Identity<'static> =
    ("00000000-0000-0000-0000-000000000000", "00000000-0000-0000-0000-000000000000");

/// A header or trailer of an LSMT file (spec lsmt 3).
fn lsmt_record(flags: u32, index: (u64, u64), vsize: u64, identity: Identity<'_>) -> Vec<u8> {
    let mut bytes = vec![
        0x4c, 0x53, 0x4d, 0x54, 0x00, 0x01, 0x02, 0x00, 0x65, 0x7e, 0x63, 0xd2, 0x94, 0x44, 0x08,
        0x4c, 0xa2, 0xd2, 0xc8, 0xec, 0x4f, 0xcf, 0xae, 0x8a,
    ];
    bytes.extend(390_u32.to_le_bytes());
    bytes.extend(flags.to_le_bytes());
    for word in [index.0, index.1, vsize] {
        bytes.extend(word.to_le_bytes());
    }
    for uuid in [identity.0, identity.1] {
        bytes.extend(uuid.as_bytes());
        bytes.push(0);
    }
    bytes.extend([0, 0, 1, 1]);
    bytes.resize(4096, 0);
    bytes
}

/// An index entry (spec lsmt 4).
pub fn entry(lba: u64, len: u64, moffset: u64, zeroed: bool, tag: u8) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&(lba | len << 50).to_le_bytes());
    let second = moffset | u64::from(zeroed) << 55 | u64::from(tag) << 56;
    bytes[8..].copy_from_slice(&second.to_le_bytes());
    bytes
}

/// Origin of a read-only layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// By `overlaybd-commit`: padded index (spec lsmt 8.1).
    Committed,
    /// By `overlaybd-commit` as a warp layer: no padding (spec lsmt 9).
    Warp,
    /// Sealed in place: the header is not marked as sealed, the index is followed by garbage (spec lsmt 8.2).
    Sealed,
    /// A sealed sparse layer.
    SealedSparse,
    /// By `overlaybd-merge`: in the form of a committed layer, with tags (spec lsmt 8.3).
    Merged,
}

/// A read-only layer file of `payload`, which lies at sector 8, and `entries`.
pub fn layer(
    way: Way,
    payload: &[u8],
    entries: &[[u8; 16]],
    vsize: u64,
    identity: Identity<'_>,
) -> Vec<u8> {
    let (header, trailer) = match way {
        Way::Committed | Way::Warp | Way::Merged => (7, 6),
        Way::Sealed => (3, 6),
        Way::SealedSparse => (0x13, 0x16),
    };
    let mut file = lsmt_record(header, (0, 0), vsize, identity);
    file.extend(payload);
    let index_at = file.len() as u64;
    let mut index = entries.concat();
    if matches!(way, Way::Committed | Way::Merged) {
        while index.len() % 4096 != 0 {
            index.extend(entry((1 << 50) - 1, 0, 0, false, 0));
        }
    }
    let count = index.len() as u64 / 16;
    file.extend(index);
    if matches!(way, Way::Sealed | Way::SealedSparse) {
        file.resize(file.len().next_multiple_of(512), 0xaa);
    }
    file.extend(lsmt_record(trailer, (index_at, count), vsize, identity));
    file
}

fn tar_header(name: &str, kind: u8, mode: &str, size: &str) -> Vec<u8> {
    let mut header = vec![0; 512];
    let mut put =
        |at: usize, text: &str| header[at..at + text.len()].copy_from_slice(text.as_bytes());
    put(0, name);
    put(100, mode);
    put(124, size);
    put(257, "ustar\0");
    put(263, "00");
    header[156] = kind;
    header[148..156].fill(b' ');
    let sum: u32 = header.iter().map(|&byte| u32::from(byte)).sum();
    header[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
    header
}

/// Form A of the tar around a layer: a pax header has the size (spec zfile 8).
pub fn wrap_pax(file: &[u8]) -> Vec<u8> {
    let record = |len: usize| format!("{len} size={}\n", file.len());
    let record =
        (1..).map(record).find(|r| r.len() == r[..r.find(' ').unwrap()].parse::<usize>().unwrap());
    let record = record.unwrap();
    let mut tar = tar_header("overlaybd.pax", b'x', "", &format!("{:>11o} ", record.len()));
    tar.extend(record.as_bytes());
    tar.resize(1024, 0);
    tar.extend(tar_header("overlaybd.commit", b'0', "100644 ", "          0 "));
    tar.extend(file);
    tar.resize(tar.len().next_multiple_of(512) + 1024, 0);
    tar
}

/// Form B: one header.
pub fn wrap_ustar(file: &[u8]) -> Vec<u8> {
    let mut tar = tar_header("overlaybd.commit", b'0', "0000444", &format!("{:011o}", file.len()));
    tar.extend(file);
    tar.resize(tar.len().next_multiple_of(512) + 1024, 0);
    tar
}
