//! Prefix codes of deflate as look-up tables.
//!
//! A table is indexed by the next bits of the stream, low bit first. Each word holds the meaning of the bits
//! and the number of bits to drop. Codes longer than the table's index continue in a subtable behind the main
//! part. Both tables have a power-of-two capacity above their worst case (2342 and 402 words for 288 and 32
//! symbols of at most 15 bits), so that a masked index is always in bounds.
//!
//! ```text
//! bit 31      literal
//! bits 16-30  literal byte, base of the length or distance, or first word of the subtable
//! bit 15      exceptional: none of literal, length, distance
//! bit 14      … but a subtable
//! bit 13      … but the end of the block; neither: no code
//! bits 8-11   length of the code (of its rest, in a subtable); index bits of a subtable
//! bits 0-7    bits to drop: code and extra bits together
//! ```

/// The word is a literal.
pub const LITERAL: u32 = 1 << 31;
/// The word is neither a literal nor a length or distance.
pub const EXCEPTION: u32 = 1 << 15;
/// The word points to a subtable.
pub const SUBTABLE: u32 = 1 << 14;
/// The word ends the block.
pub const END_OF_BLOCK: u32 = 1 << 13;

/// Index bits of the literal and length table: large enough that a subtable is rare, small enough
/// for the first-level cache and for being rebuilt every 30 KiB of output.
pub const LITLEN_BITS: u32 = 11;
/// Index bits of the distance table.
pub const DISTANCE_BITS: u32 = 8;
/// Words of the literal and length table, subtables included.
pub const LITLEN_SIZE: usize = 4096;
/// Words of the distance table, subtables included.
pub const DISTANCE_SIZE: usize = 1024;
/// Longest code (RFC 1951, 3.2.7).
const MAX_LEN: usize = 15;

/// The two codes of a block, adjacent, so that the inner loop keeps one address for both.
pub struct Tables {
    /// Words of the literal and length code.
    pub litlen: [u32; LITLEN_SIZE],
    /// Words of the distance code.
    pub distance: [u32; DISTANCE_SIZE],
    /// True if the tables hold the fixed codes; a run of fixed blocks then does not rebuild them.
    fixed: bool,
}

/// Meaning of each literal and length symbol, without its code.
const LITLEN: [u32; 288] = {
    let mut table = [EXCEPTION; 288];
    let mut symbol = 0;
    while symbol < 256 {
        table[symbol] = LITERAL | (symbol as u32) << 16;
        symbol += 1;
    }
    table[256] = EXCEPTION | END_OF_BLOCK;
    // RFC 1951, 3.2.5: four symbols for each number of extra bits, after eight with none.
    let mut base = 3;
    while symbol < 284 {
        symbol += 1;
        let extra = if symbol < 265 { 0 } else { (symbol as u32 - 261) / 4 };
        table[symbol] = base << 16 | extra;
        base += 1 << extra;
    }
    table[285] = 258 << 16;
    table
};

/// Meaning of each distance symbol, without its code.
const DISTANCE: [u32; 32] = {
    let mut table = [EXCEPTION; 32];
    let mut symbol = 0;
    let mut base = 1;
    while symbol < 30 {
        let extra = if symbol < 4 { 0 } else { (symbol as u32 - 2) / 2 };
        table[symbol] = base << 16 | extra;
        base += 1 << extra;
        symbol += 1;
    }
    table
};

/// Meaning of each symbol of the code length code: its number.
const PRECODE: [u32; 19] = {
    let mut table = [0; 19];
    let mut symbol = 0;
    while symbol < 19 {
        table[symbol] = (symbol as u32) << 16;
        symbol += 1;
    }
    table
};

impl Tables {
    /// Tables in which every code is invalid.
    #[must_use]
    pub fn new() -> Box<Self> {
        Box::new(Self {
            litlen: [EXCEPTION; LITLEN_SIZE],
            distance: [EXCEPTION; DISTANCE_SIZE],
            fixed: false,
        })
    }

    /// The codes of a fixed block (RFC 1951, 3.2.6).
    pub fn set_fixed(&mut self) {
        if self.fixed {
            return;
        }
        let lens = fixed_lengths();
        // Both codes are complete by definition.
        let _ = build(&mut self.litlen[..], LITLEN_BITS, &lens, &LITLEN);
        let _ = build(&mut self.distance[..], DISTANCE_BITS, &[5; 32], &DISTANCE);
        self.fixed = true;
    }

    /// The codes of a dynamic block.
    pub fn set_dynamic(&mut self, litlen: &[u8], distance: &[u8]) -> Result<(), &'static str> {
        self.fixed = false;
        if litlen.get(256).is_none_or(|&len| len == 0) {
            return Err("a block has no code for its end");
        }
        build(&mut self.litlen[..], LITLEN_BITS, litlen, &LITLEN).map_err(|fault| match fault {
            CodeFault::Oversubscribed => "the literal and length code is over-subscribed",
            CodeFault::Incomplete => "the literal and length code is incomplete",
        })?;
        build(&mut self.distance[..], DISTANCE_BITS, distance, &DISTANCE).map_err(|fault| {
            match fault {
                CodeFault::Oversubscribed => "the distance code is over-subscribed",
                CodeFault::Incomplete => "the distance code is incomplete",
            }
        })
    }
}

/// Code lengths of the fixed literal and length code.
pub fn fixed_lengths() -> [u8; 288] {
    let mut lens = [8; 288];
    lens[144..256].fill(9);
    lens[256..280].fill(7);
    lens
}

/// The table of the code length code: indexed by 7 bits, without subtables.
pub fn precode(lens: &[u8; 19]) -> Result<[u32; 128], &'static str> {
    let mut table = [EXCEPTION; 128];
    build(&mut table, 7, lens, &PRECODE)
        .map_err(|_| "the code of the code lengths is not complete")?;
    if lens.iter().filter(|&&len| len > 0).count() < 2 {
        return Err("the code of the code lengths is not complete");
    }
    Ok(table)
}

/// The code of the end of a block, in stream order, and its length in bits.
pub fn end_of_block(lens: &[u8]) -> Option<(u32, u32)> {
    let own = *lens.get(256).filter(|&&len| len > 0)?;
    let shorter: u32 =
        lens.iter().filter(|&&len| len > 0 && len < own).map(|&len| 1 << (own - len)).sum();
    let before = lens[..256].iter().filter(|&&len| len == own).count() as u32;
    let code = shorter + before;
    Some((code.reverse_bits() >> (32 - u32::from(own)), u32::from(own)))
}

/// Reasons why code lengths form no code.
enum CodeFault {
    Oversubscribed,
    Incomplete,
}

/// Fills `table` from code lengths. The accepted codes are those of zlib: a complete code, no code, or a
/// single code of one bit. The unused code words of the last two decode to an exception.
fn build(table: &mut [u32], bits: u32, lens: &[u8], meaning: &[u32]) -> Result<(), CodeFault> {
    let mut count = [0u16; MAX_LEN + 1];
    for &len in lens {
        count[usize::from(len) & MAX_LEN] += 1;
    }
    count[0] = 0;
    let mut left = 1i32;
    for &number in &count[1..] {
        left = 2 * left - i32::from(number);
        if left < 0 {
            return Err(CodeFault::Oversubscribed);
        }
    }
    if left > 0 {
        table.fill(EXCEPTION);
        let Some(longest) = count.iter().rposition(|&number| number > 0) else { return Ok(()) };
        if longest != 1 {
            return Err(CodeFault::Incomplete);
        }
        let symbol = lens.iter().position(|&len| len == 1).unwrap_or(0);
        for word in table[..1 << bits].iter_mut().step_by(2) {
            *word = meaning[symbol] + 0x101;
        }
        return Ok(());
    }

    // Symbols in the order of their codes: sorted by length, then by number.
    let mut next = [0u16; MAX_LEN + 2];
    for len in 1..=MAX_LEN {
        next[len + 1] = next[len] + count[len];
    }
    let mut sorted = [0u16; 320];
    for (symbol, &len) in lens.iter().enumerate() {
        if len > 0 {
            let slot = &mut next[usize::from(len) & MAX_LEN];
            sorted[usize::from(*slot)] = symbol as u16;
            *slot += 1;
        }
    }
    let mut symbols = sorted.iter().map(|&symbol| meaning[usize::from(symbol)]);

    // Codes are stored with their first bit lowest. A table of `size` words is doubled for each further bit:
    // its entries, decided by fewer bits, repeat.
    let mut code = 0usize;
    let mut size = 1usize;
    for len in 1..=bits {
        table.copy_within(0..size, size);
        size *= 2;
        for word in symbols.by_ref().take(usize::from(count[len as usize])) {
            table[code] = word + 0x101 * len;
            code = successor(code, size - 1);
        }
    }

    // Longer codes have a subtable for each of their prefixes.
    let mut free = size;
    let mut prefix = usize::MAX;
    let (mut start, mut sub_bits) = (0, 0);
    for len in bits + 1..=MAX_LEN as u32 {
        let mut remaining = usize::from(count[len as usize]);
        let all = (1usize << len) - 1;
        for word in symbols.by_ref().take(remaining) {
            if code & (size - 1) != prefix {
                prefix = code & (size - 1);
                start = free;
                sub_bits = len - bits;
                // The length grows until the remaining codes fill the subtable.
                let mut space = remaining;
                while space < 1 << sub_bits && bits + sub_bits < MAX_LEN as u32 {
                    sub_bits += 1;
                    space = 2 * space + usize::from(count[(bits + sub_bits) as usize]);
                }
                free = start + (1 << sub_bits);
                table[prefix] = (start as u32) << 16 | EXCEPTION | SUBTABLE | sub_bits << 8 | bits;
            }
            for slot in (code >> bits..1 << sub_bits).step_by(1 << (len - bits)) {
                table[start + slot] = word + 0x101 * (len - bits);
            }
            code = successor(code, all);
            remaining -= 1;
        }
    }
    Ok(())
}

/// The next code of the same length, first bit lowest; `all` has every bit of the length set.
fn successor(code: usize, all: usize) -> usize {
    match (code ^ all).checked_ilog2() {
        Some(highest_clear) => code & ((1 << highest_clear) - 1) | 1 << highest_clear,
        None => code,
    }
}
