//! Numbers in files, and checksums.

use sha2::{Digest as _, Sha256};

pub fn le16(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(bytes[at..at + 2].try_into().unwrap())
}

pub fn le32(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

pub fn le64(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

pub fn is_zero(bytes: &[u8]) -> bool {
    bytes.iter().all(|&byte| byte == 0)
}

/// `sha256:…` of `bytes`.
pub fn digest(bytes: &[u8]) -> String {
    format!("sha256:{}", hex(&Sha256::digest(bytes)))
}

pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The register of a reflected CRC without inversion at either end, one bit at a time for the table.
fn register(polynomial: u32, seed: u32, bytes: &[u8]) -> u32 {
    let mut table = [0_u32; 256];
    for (n, entry) in table.iter_mut().enumerate() {
        let mut value = n as u32;
        for _ in 0..8 {
            value = value >> 1 ^ if value & 1 == 1 { polynomial } else { 0 };
        }
        *entry = value;
    }
    bytes
        .iter()
        .fold(seed, |crc, &byte| crc >> 8 ^ table[((crc ^ u32::from(byte)) & 0xff) as usize])
}

/// Castagnoli's polynomial as overlaybd uses it (spec zfile 3): no inversions, any seed.
pub fn raw_crc32c(seed: u32, bytes: &[u8]) -> u32 {
    register(0x82F6_3B78, seed, bytes)
}

/// The CRC-32 of gzip.
pub fn crc32(bytes: &[u8]) -> u32 {
    !register(0xEDB8_8320, u32::MAX, bytes)
}
