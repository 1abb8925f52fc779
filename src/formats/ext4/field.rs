//! Little-endian fields of on-disk structures.

/// Writes two bytes at `at`.
pub(super) fn put16(record: &mut [u8], at: usize, value: u16) {
    record[at..at + 2].copy_from_slice(&value.to_le_bytes());
}

/// Writes four bytes at `at`.
pub(super) fn put32(record: &mut [u8], at: usize, value: u32) {
    record[at..at + 4].copy_from_slice(&value.to_le_bytes());
}

/// Reads two bytes at `at`.
pub(super) fn get16(record: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([record[at], record[at + 1]])
}

/// Reads four bytes at `at`.
pub(super) fn get32(record: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([record[at], record[at + 1], record[at + 2], record[at + 3]])
}

/// A number with its low 32 bits at `low` and its high 32 bits at `high`.
pub(super) fn get64(record: &[u8], low: usize, high: usize) -> u64 {
    u64::from(get32(record, low)) | u64::from(get32(record, high)) << 32
}

/// The low 16 bits of a number; another field has the rest.
pub(super) fn low16(value: u32) -> u16 {
    (value & 0xffff) as u16
}

/// Bits 16..32.
pub(super) fn high16(value: u32) -> u16 {
    (value >> 16) as u16
}

/// The low 32 bits.
pub(super) fn low32(value: u64) -> u32 {
    (value & 0xffff_ffff) as u32
}

/// Bits 32..64.
pub(super) fn high32(value: u64) -> u32 {
    (value >> 32) as u32
}
