//! The hash that orders indexed directories: "half MD4", seeded, over unsigned bytes, or over signed ones on
//! a disk with that flag.
//!
//! The result must equal the kernel's bit for bit; otherwise a name is in the directory but not found.
//! Source: `fs/ext4/hash.c` as documented in the kernel's "Hash Tree Directories"; the oracle is `debugfs -R
//! dx_hash`.

/// `s_def_hash_version` and `dx_root.hash_version` of this hash. A flag of the superblock says if bytes are
/// signed.
pub(super) const HALF_MD4: u8 = 1;

/// Position of a name in an indexed directory: sorted by `major`, then `minor`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct NameHash {
    /// Even: the lowest bit of an index entry marks that names of this hash continue from the previous block.
    pub(super) major: u32,
    pub(super) minor: u32,
}

/// Marks the end for readers of directories by hash; no name may have it.
const END: u32 = 0x7fff_ffff << 1;

/// Hash parameters in a filesystem's superblock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct HashRule {
    pub(super) seed: [u32; 4],
    /// True if bytes of names are signed, as on most older machines.
    pub(super) signed: bool,
}

/// Hashes `name` by the superblock's rule.
pub(super) fn hash(name: &[u8], rule: HashRule) -> NameHash {
    let mut state = rule.seed;
    if state == [0; 4] {
        state = [0x6745_2301, 0xefcd_ab89, 0x98ba_dcfe, 0x1032_5476];
    }
    let mut rest = name;
    while !rest.is_empty() {
        transform(&mut state, words(rest, rule.signed));
        rest = &rest[rest.len().min(32)..];
    }
    let major = state[1] & !1;
    NameHash { major: if major == END { END - 2 } else { major }, minor: state[2] }
}

/// The next 32 bytes as eight words, padded with the length of the remaining bytes.
fn words(rest: &[u8], signed: bool) -> [u32; 8] {
    // A name has at most 255 bytes.
    let length = rest.len() as u32;
    let padding = length | length << 8;
    let padding = padding | padding << 16;
    let mut words = [padding; 8];
    for (word, bytes) in words.iter_mut().zip(rest.chunks(4)) {
        for &byte in bytes {
            let value = if signed {
                i32::from(byte.cast_signed()).cast_unsigned()
            } else {
                u32::from(byte)
            };
            *word = (*word << 8).wrapping_add(value);
        }
    }
    words
}

fn transform(state: &mut [u32; 4], input: [u32; 8]) {
    const ROUND_2: u32 = 0x5a82_7999;
    const ROUND_3: u32 = 0x6ed9_eba1;
    let choose = |x: u32, y: u32, z: u32| z ^ (x & (y ^ z));
    let majority = |x: u32, y: u32, z: u32| (x & y).wrapping_add((x ^ y) & z);
    let parity = |x: u32, y: u32, z: u32| x ^ y ^ z;
    let mut s = *state;
    let mut step = |f: &dyn Fn(u32, u32, u32) -> u32, word: u32, shift: u32| {
        let [a, b, c, d] = s;
        let mixed = a.wrapping_add(f(b, c, d)).wrapping_add(word).rotate_left(shift);
        s = [d, mixed, b, c];
    };
    for (index, shift) in
        [0, 1, 2, 3, 4, 5, 6, 7].into_iter().zip([3, 7, 11, 19].into_iter().cycle())
    {
        step(&choose, input[index], shift);
    }
    for (index, shift) in
        [1, 3, 5, 7, 0, 2, 4, 6].into_iter().zip([3, 5, 9, 13].into_iter().cycle())
    {
        step(&majority, input[index].wrapping_add(ROUND_2), shift);
    }
    for (index, shift) in
        [3, 7, 2, 6, 1, 5, 0, 4].into_iter().zip([3, 9, 11, 15].into_iter().cycle())
    {
        step(&parity, input[index].wrapping_add(ROUND_3), shift);
    }
    for (old, new) in state.iter_mut().zip(s) {
        *old = old.wrapping_add(new);
    }
}
