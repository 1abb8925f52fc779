//! The smallest erofs, by the kernel's documentation of the format: a root directory with one file, uncompressed.

#![allow(clippy::unwrap_used, unreachable_pub)]

const BLOCK: usize = 4096;

/// A compact inode: flat data from `block` on.
fn inode(mode: u16, links: u16, size: u32, block: u32, number: u32) -> Vec<u8> {
    let mut bytes = vec![0; 4]; // compact, flat; no extended attributes
    bytes.extend(mode.to_le_bytes());
    bytes.extend(links.to_le_bytes());
    bytes.extend(size.to_le_bytes());
    bytes.extend([0; 4]);
    bytes.extend(block.to_le_bytes());
    bytes.extend(number.to_le_bytes());
    bytes.resize(32, 0);
    bytes
}

/// Blocks 0 to 2 of a filesystem whose only file `name`, of `size` bytes, begins at block 3.
pub fn one_file(name: &str, size: u32) -> Vec<u8> {
    let (root, file) = (1_u64, 2_u64); // inodes of 32 bytes, in block 1
    let mut superblock = vec![0; 128];
    let mut put = |at: usize, value: &[u8]| superblock[at..at + value.len()].copy_from_slice(value);
    put(0, &0xE0F5_E1E2_u32.to_le_bytes());
    put(12, &[12]); // log2 of the block size
    put(14, &(root as u16).to_le_bytes());
    put(16, &2_u64.to_le_bytes()); // inodes
    put(36, &(3 + size.div_ceil(BLOCK as u32)).to_le_bytes()); // blocks
    put(40, &1_u32.to_le_bytes()); // inodes begin in this block
    let names = [(".", root, 2_u8), ("..", root, 2), (name, file, 1)];
    let mut directory = Vec::new();
    let mut name_at = names.len() * 12;
    for (name, number, kind) in names {
        directory.extend(number.to_le_bytes());
        directory.extend((name_at as u16).to_le_bytes());
        directory.extend([kind, 0]);
        name_at += name.len();
    }
    names.iter().for_each(|(name, ..)| directory.extend(name.as_bytes()));
    let mut disk = vec![0; 1024];
    disk.extend(superblock);
    disk.resize(BLOCK + 32, 0);
    disk.extend(inode(0o040_755, 2, directory.len() as u32, 2, 1));
    disk.extend(inode(0o100_644, 1, size, 3, 2));
    disk.resize(2 * BLOCK, 0);
    disk.extend(directory);
    disk.resize(3 * BLOCK, 0);
    disk
}
