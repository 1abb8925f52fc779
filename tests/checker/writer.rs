//! A writer of what upstream's tools write and turbobd does not, by the specification: sealed, append-only, sparse and
//! merged layers, ZFiles of every kind. It shares no code with the crate.

use super::field::raw_crc32c;

/// How a ZFile is made (spec zfile 2).
#[derive(Clone, Copy, Debug)]
pub struct ZFileOptions {
    /// 1 LZ4, 2 ZSTD.
    pub algo: u8,
    pub block_size: u32,
    /// Whether blocks have checksums.
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

/// A header or trailer of an LSMT file (spec lsmt 3).
pub fn lsmt_record(flags: u32, index_offset: u64, index_size: u64, vsize: u64) -> Vec<u8> {
    let mut bytes = vec![
        0x4c, 0x53, 0x4d, 0x54, 0x00, 0x01, 0x02, 0x00, 0x65, 0x7e, 0x63, 0xd2, 0x94, 0x44, 0x08,
        0x4c, 0xa2, 0xd2, 0xc8, 0xec, 0x4f, 0xcf, 0xae, 0x8a,
    ];
    bytes.extend(390_u32.to_le_bytes());
    bytes.extend(flags.to_le_bytes());
    for word in [index_offset, index_size, vsize] {
        bytes.extend(word.to_le_bytes());
    }
    bytes.extend(b"3D8B79FE-5D5F-40CE-A25B-45F392BDF32B\0");
    bytes.extend(b"00000000-0000-0000-0000-000000000000\0");
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

/// A read-only layer file: header with `header_flags`, payload, index, trailer with `trailer_flags`.
pub fn layer(
    header_flags: u32,
    trailer_flags: u32,
    payload: &[u8],
    entries: &[[u8; 16]],
    vsize: u64,
) -> Vec<u8> {
    let mut file = lsmt_record(header_flags, 0, 0, vsize);
    file.extend(payload);
    let index_at = file.len() as u64;
    entries.iter().for_each(|entry| file.extend(entry));
    // A layer sealed in place rounds its index up to a sector with whatever is there (spec lsmt 8.2).
    if header_flags & 4 == 0 {
        file.resize(file.len().next_multiple_of(512), 0xaa);
    }
    file.extend(lsmt_record(trailer_flags, index_at, entries.len() as u64, vsize));
    file
}
