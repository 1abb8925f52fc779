//! Little-endian fields of on-disk structures.

/// Writes two bytes at `at`.
pub(super) fn put16(record: &mut [u8], at: usize, value: u16) {
    record[at..at + 2].copy_from_slice(&value.to_le_bytes());
}

/// Writes four bytes at `at`.
pub(super) fn put32(record: &mut [u8], at: usize, value: u32) {
    record[at..at + 4].copy_from_slice(&value.to_le_bytes());
}

/// The low 16 bits of a number of which another field holds the rest.
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
