//! Overlaybd's own trace files (spec runtime 8).
//!
//! They list reads of native layers: the layer, 0 lowest, and a range of its decoded stream, which is also
//! the content of this project's traces. Of a TurboOCI layer they list reads of its metadata, which are in
//! memory here; those are skipped.
//!
//! The file is a C struct as it lay in memory: 24 bytes of header, then records of 24 bytes, whose checksum
//! also covers the three bytes of padding after the first field, with any contents. Upstream's records may be
//! longer than the buffer that it replays them into; this code accepts them as they are.

use formats::trace::{MAX_TOUCHES, Touch, Trace, TraceError};
use source::chunk::ChunkSource;

/// First four bytes of the file.
pub const MAGIC: u32 = 0xC2EF_1820;

const HEAD: usize = 24;
const RECORD: usize = 24;
/// Longest file that is read: its records would list 64 GiB in reads of 4 KiB.
const MAX_FILE: usize = 384 << 20;

/// One read of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub struct LayerRead {
    /// The layer, 0 lowest.
    pub layer: u32,
    /// First byte in its decoded stream.
    pub offset: u64,
    /// Number of bytes.
    pub count: u64,
}

/// Raw CRC-32C of `bytes`, not inverted at its ends, continued from `sum`.
fn raw_crc32c(sum: u32, bytes: &[u8]) -> u32 {
    !crc32c::crc32c_append(!sum, bytes)
}

/// True if a file is upstream's trace, and not a text with a list of paths, or empty.
#[must_use]
pub fn is_trace(bytes: &[u8]) -> bool {
    bytes.starts_with(&MAGIC.to_le_bytes())
}

/// The reads that a trace file lists; writes, which upstream defines and never records, are left out.
///
/// # Errors
/// Returns [`TraceError::Upstream`] naming the rule that the file breaks.
pub fn parse(bytes: &[u8]) -> Result<Vec<LayerRead>, TraceError> {
    let refuse = |rule: String| Err(TraceError::Upstream(rule));
    if !is_trace(bytes) {
        return refuse("it begins with another magic number".to_owned());
    }
    if bytes.len() < HEAD {
        return refuse(format!("its header has 24 bytes, the file {}", bytes.len()));
    }
    if bytes.len() > MAX_FILE {
        return refuse(format!("it has more than {MAX_FILE} bytes"));
    }
    let (head, records) = bytes.split_at(HEAD);
    let word = |bytes: &[u8], at: usize| {
        bytes[at..at + 8].iter().rev().fold(0, |sum, &byte| sum << 8 | u64::from(byte))
    };
    let size = word(head, 8);
    if size != records.len() as u64 || !records.len().is_multiple_of(RECORD) {
        return refuse(format!(
            "it has {} bytes of records of 24 bytes, its header says {size}",
            records.len()
        ));
    }
    let (found, expected) = (raw_crc32c(0, records), word(head, 16) as u32);
    if found != expected {
        return refuse(format!("its checksum is {found:08x}, the header says {expected:08x}"));
    }
    let mut reads = Vec::new();
    for (number, record) in records.chunks_exact(RECORD).enumerate() {
        let (layer, count, offset) = (word(record, 0) >> 32, word(record, 8), word(record, 16));
        match record[0] {
            b'R' => {}
            b'W' => continue,
            other => return refuse(format!("record {number} has the operation {other:#04x}")),
        }
        // A signed offset.
        if offset > i64::MAX as u64
            || offset.checked_add(count).is_none_or(|end| end > i64::MAX as u64)
        {
            return refuse(format!("record {number} reads {count} bytes at {}", offset as i64));
        }
        reads.push(LayerRead { layer: layer as u32, offset, count });
    }
    Ok(reads)
}

/// The file of these reads, with padding of zeros.
#[must_use]
pub fn to_bytes(reads: &[LayerRead]) -> Vec<u8> {
    let mut records = Vec::with_capacity(reads.len() * RECORD);
    for read in reads {
        records.extend_from_slice(&[b'R', 0, 0, 0]);
        records.extend_from_slice(&read.layer.to_le_bytes());
        records.extend_from_slice(&read.count.to_le_bytes());
        records.extend_from_slice(&read.offset.to_le_bytes());
    }
    let mut out = Vec::with_capacity(HEAD + records.len());
    out.extend_from_slice(&u64::from(MAGIC).to_le_bytes());
    out.extend_from_slice(&(records.len() as u64).to_le_bytes());
    out.extend_from_slice(&u64::from(raw_crc32c(0, &records)).to_le_bytes());
    out.extend_from_slice(&records);
    out
}

/// Converts these reads to a trace of this project. `layers` are those of the disk, the lowest first: the
/// source of the decoded stream of each native layer. Reads of other layers, and of bytes that they do not
/// have, are left out.
#[must_use]
pub fn to_trace(reads: &[LayerRead], layers: &[Option<&dyn ChunkSource>]) -> Trace {
    let mut trace = Trace { starts: 1, ..Trace::default() };
    for read in reads {
        let Some(Some(source)) = layers.get(read.layer as usize) else { continue };
        let end = read.offset.saturating_add(read.count).min(source.decoded_len());
        let Some(len) = end.checked_sub(read.offset).filter(|len| *len > 0) else { continue };
        let Some(blob) = trace.blob(super::blob_name(*source)) else { continue };
        if trace.touches.len() == MAX_TOUCHES {
            break;
        }
        trace.touches.push(Touch { blob, start: read.offset, len, at: 0, weight: 1 });
    }
    trace
}

/// Converts the touches of native layers to upstream's records: reads of at most 1 MiB, for which its replay
/// has room.
#[must_use]
pub fn of_trace(trace: &Trace, layers: &[Option<&dyn ChunkSource>]) -> Vec<LayerRead> {
    const MOST: u64 = 1 << 20;
    let names: Vec<_> = layers.iter().map(|layer| layer.map(super::blob_name)).collect();
    let mut reads = Vec::new();
    for touch in &trace.touches {
        let Some(blob) = trace.blobs.get(touch.blob as usize) else { continue };
        let Some(layer) = names.iter().position(|name| name.as_ref() == Some(blob)) else {
            continue;
        };
        let size = layers[layer].map_or(0, ChunkSource::decoded_len);
        let mut offset = touch.start;
        while offset < touch.end().min(size) {
            let count = (touch.end().min(size) - offset).min(MOST);
            reads.push(LayerRead { layer: layer as u32, offset, count });
            offset += count;
        }
    }
    reads
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use proptest::prelude::*;

    use super::*;
    use source::MemorySource;
    use source::chunk::PlainChunks;

    #[test]
    fn the_file_is_laid_out_as_upstream_lays_it_out_and_padding_counts() {
        let reads = [LayerRead { layer: 3, offset: 0x1000, count: 0x200 }];
        let mut bytes = to_bytes(&reads);
        assert_eq!(bytes.len(), 48);
        assert_eq!(bytes[..16], [0x20, 0x18, 0xef, 0xc2, 0, 0, 0, 0, 24, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(bytes[24..32], [b'R', 0, 0, 0, 3, 0, 0, 0]);
        assert_eq!(parse(&bytes).unwrap(), reads);
        // Contents of upstream's stack between the fields: part of the checksum, not of the record.
        bytes[25..28].copy_from_slice(b"abc");
        bytes[4..8].copy_from_slice(b"defg");
        assert!(parse(&bytes).unwrap_err().to_string().contains("checksum"));
        let sum = raw_crc32c(0, &bytes[24..]);
        bytes[16..20].copy_from_slice(&sum.to_le_bytes());
        assert_eq!(parse(&bytes).unwrap(), reads);
    }

    #[test]
    fn the_checksum_is_the_raw_one() {
        // CRC-32C of "123456789" is e3069283, with both inversions; raw from 0 it is 58e3fa20.
        assert_eq!(raw_crc32c(0, b"123456789"), 0x58e3_fa20);
        assert_eq!(raw_crc32c(raw_crc32c(0, b"1234"), b"56789"), 0x58e3_fa20);
    }

    #[test]
    fn what_breaks_a_rule_is_refused_with_the_rule() {
        let good = to_bytes(&[LayerRead { layer: 0, offset: 0, count: 1 }; 2]);
        let refused = |bytes: &[u8]| parse(bytes).unwrap_err().to_string();
        assert!(refused(b"/usr/bin/python3\n").contains("magic"));
        assert!(refused(&good[..20]).contains("the file 20"));
        assert!(refused(&good[..71]).contains("47 bytes of records"));
        let mut other = good.clone();
        other[24] = b'X';
        let sum = raw_crc32c(0, &other[24..]);
        other[16..20].copy_from_slice(&sum.to_le_bytes());
        assert!(refused(&other).contains("record 0 has the operation 0x58"));
        assert_eq!(parse(&to_bytes(&[])).unwrap(), []);
    }

    #[test]
    fn reads_of_native_layers_become_touches_and_back() {
        let native = |name: &str| {
            PlainChunks::new(name, Arc::new(MemorySource::new(name, vec![0; 3 << 20])))
        };
        let (low, high) = (native("low"), native("high"));
        let layers: [Option<&dyn ChunkSource>; 3] = [Some(&low), None, Some(&high)];
        let read = |layer, offset, count| LayerRead { layer, offset, count };
        let reads = [
            read(2, 4096, 8192),
            read(1, 0, 512),
            read(0, (3 << 20) - 100, 4096),
            read(0, 4 << 20, 1),
            read(9, 0, 1),
            read(2, 0, 5 << 19),
        ];
        let trace = to_trace(&reads, &layers);
        let expected = [
            read(2, 4096, 8192),
            read(0, (3 << 20) - 100, 100),
            read(2, 0, 1 << 20),
            read(2, 1 << 20, 1 << 20),
            read(2, 2 << 20, 1 << 19),
        ];
        assert_eq!(of_trace(&trace, &layers), expected);
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_again_and_nothing_panics(
            reads in proptest::collection::vec((any::<u32>(), 0..i64::MAX as u64 / 2, 0..i64::MAX as u64 / 2), 0..20),
            at in any::<prop::sample::Index>(), byte in any::<u8>(),
        ) {
            let reads: Vec<_> = reads.into_iter()
                .map(|(layer, offset, count)| LayerRead { layer, offset, count }).collect();
            let mut bytes = to_bytes(&reads);
            prop_assert_eq!(parse(&bytes).unwrap(), reads);
            let at = at.index(bytes.len());
            bytes[at] ^= byte;
            let _ = parse(&bytes);
        }
    }
}
