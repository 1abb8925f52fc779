//! The inner loop: symbols of a Huffman block while input and output are ample.
//!
//! Everything near an edge (the last bytes of the input at hand, the last bytes before a limit) is
//! left to the careful loop in [`inflate`](super::inflate); this one checks its room once a round.
//!
//! `unsafe` lives here because of that: with every access checked, the scan does 440 MB/s, half of
//! what libdeflate does, and could not keep up with a fast download. The rules are few: input and
//! output room are checked at the start of a round for all it may do, tables are indexed by masked
//! values (safe code), and a distance is checked against the history before it is used.

#![allow(unsafe_code)]

use super::huffman::{END_OF_BLOCK, EXCEPTION, LITERAL, LITLEN_BITS, LITLEN_SIZE, SUBTABLE, Tables};
use super::huffman::{DISTANCE_BITS, DISTANCE_SIZE};
use super::marks::MatchLog;

/// Input bytes a round may look at: three refills, each of which reads 8 bytes and advances by 7 or less.
const INPUT_ROOM: usize = 32;
/// Output bytes a round may write: three literals, the longest match, and what its copy overshoots.
pub(super) const OUTPUT_ROOM: usize = 3 + 258 + 32;

/// Why the loop was left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Left {
    /// Not enough room for another round.
    Edge,
    /// The block ended.
    EndOfBlock,
    /// The input is damaged.
    Fault(&'static str),
}

/// Where the loop reads and writes.
pub(super) struct Run<'a> {
    pub(super) tables: &'a Tables,
    pub(super) input: &'a [u8],
    /// Bits of `input` consumed.
    pub(super) bit: usize,
    /// History, then room.
    pub(super) out: &'a mut [u8],
    /// Bytes of `out` written.
    pub(super) pos: usize,
    /// Start of the history that a match may refer to.
    pub(super) floor: usize,
    /// No round starts at or past this position.
    pub(super) limit: usize,
}

/// Eight bytes of `input` from `at` on.
///
/// # Safety
/// `at + 8 <= input.len()`.
#[inline(always)]
unsafe fn load(input: &[u8], at: usize) -> u64 {
    debug_assert!(at + 8 <= input.len());
    // SAFETY: the caller keeps `at + 8` inside `input`; the read needs no alignment.
    u64::from_le_bytes(unsafe { input.as_ptr().add(at).cast::<[u8; 8]>().read() })
}

/// Writes a byte.
///
/// # Safety
/// `at < out.len()`.
#[inline(always)]
unsafe fn put(out: &mut [u8], at: usize, byte: u8) {
    debug_assert!(at < out.len());
    // SAFETY: the caller keeps `at` inside `out`.
    unsafe { *out.as_mut_ptr().add(at) = byte };
}

/// Copies `N` bytes that may overlap, by way of a register.
///
/// # Safety
/// `from + N <= out.len()` and `to + N <= out.len()`.
#[inline(always)]
unsafe fn copy<const N: usize>(out: &mut [u8], from: usize, to: usize) {
    debug_assert!(from + N <= out.len() && to + N <= out.len());
    let start = out.as_mut_ptr();
    // SAFETY: the caller keeps both ranges inside `out`; arrays of bytes need no alignment, and the
    // value is read whole before it is written.
    unsafe { start.add(to).cast::<[u8; N]>().write(start.add(from).cast::<[u8; N]>().read()) };
}

/// Writes a match of `len` bytes at `pos`; may write 31 bytes more.
///
/// # Safety
/// `1 <= distance <= pos` and `pos + len + 32 <= out.len()`.
#[inline(always)]
unsafe fn copy_match(out: &mut [u8], pos: usize, distance: usize, len: usize) {
    let (mut from, mut to, end) = (pos - distance, pos, pos + len);
    // SAFETY: `from < to < end` before each copy, and no copy is longer than 32 bytes.
    unsafe {
        if distance >= 16 {
            // Two at once: most matches end here.
            copy::<16>(out, from, to);
            copy::<16>(out, from + 16, to + 16);
            while to + 32 < end {
                to += 32;
                from += 32;
                copy::<16>(out, from, to);
                copy::<16>(out, from + 16, to + 16);
            }
        } else if distance == 1 {
            let start = out.as_mut_ptr().add(pos);
            start.write_bytes(*start.sub(1), len);
        } else {
            // A copy yields at least `step` right bytes; those behind them are overwritten.
            let step = distance.min(8);
            while to < end {
                copy::<8>(out, from, to);
                from += step;
                to += step;
            }
        }
    }
}

#[inline(always)]
fn low(bits: u64, count: u32) -> u64 {
    bits & ((1 << (count & 63)) - 1)
}

impl Run<'_> {
    /// Decodes until there is no room for another round or the block ends. With `LOG`, matches are
    /// noted in `log`; `base` is the output position of `out[0]`, of which the low 32 bits count.
    pub(super) fn go<const LOG: bool>(&mut self, log: &mut MatchLog, base: u32) -> Left {
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("bmi2") {
            // SAFETY: the processor has the feature.
            return unsafe { self.with_bmi2::<LOG>(log, base) };
        }
        self.rounds::<LOG>(log, base)
    }

    /// The same with shifts that leave the flags alone and take any register: a tenth faster.
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "bmi2,bmi1,lzcnt")]
    fn with_bmi2<const LOG: bool>(&mut self, log: &mut MatchLog, base: u32) -> Left {
        self.rounds::<LOG>(log, base)
    }

    #[inline(always)]
    fn rounds<const LOG: bool>(&mut self, log: &mut MatchLog, base: u32) -> Left {
        let input = self.input;
        let out = &mut *self.out;
        let (litlen, distances) = (&*self.tables.litlen, &*self.tables.distance);
        let (floor, mut pos) = (self.floor, self.pos);
        let limit = self.limit.min(out.len().saturating_sub(OUTPUT_ROOM));
        let Some(input_limit) = input.len().checked_sub(INPUT_ROOM) else { return Left::Edge };
        let start = self.bit / 8;
        if start > input_limit || pos >= limit {
            return Left::Edge;
        }
        if self.floor > pos {
            return Left::Fault("the history is damaged");
        }
        // A match yields three bytes at least, so the room suffices; the last may pass the limit.
        let room = log.room(if LOG { (limit - pos) / 3 + 2 } else { 0 });
        let mut logged = 0;

        let phase = (self.bit % 8) as u32;
        // SAFETY: `start <= input_limit`.
        let mut bits = unsafe { load(input, start) } >> phase;
        let mut count = 56 - phase;
        let mut next = start + 7;

        // Bits above `count` are those that follow, or zero: a refill sets them to the same again.
        macro_rules! refill {
            () => {
                // SAFETY: a round starts with `next <= input_limit`, and refills three times.
                bits |= unsafe { load(input, next) } << count;
                next += ((63 - count) >> 3) as usize;
                count |= 56;
            };
        }
        macro_rules! drop_bits {
            ($entry:expr) => {
                bits >>= $entry & 63;
                count -= $entry & 63;
            };
        }
        macro_rules! literal {
            ($entry:expr) => {
                // SAFETY: a round starts with `pos < limit`, which leaves OUTPUT_ROOM.
                unsafe { put(out, pos, ($entry >> 16) as u8) };
                pos += 1;
            };
        }
        macro_rules! look_up {
            () => {
                litlen[low(bits, LITLEN_BITS) as usize % LITLEN_SIZE]
            };
        }

        if next > input_limit {
            return Left::Edge;
        }
        refill!();
        let mut entry = look_up!();
        let left = loop {
            // Here at least 56 bits are at hand, and `entry` is what they begin with.
            if next > input_limit || pos >= limit {
                break Left::Edge;
            }
            if entry & LITERAL != 0 {
                drop_bits!(entry);
                let literal = entry;
                entry = look_up!();
                literal!(literal);
                if entry & LITERAL != 0 {
                    drop_bits!(entry);
                    let literal = entry;
                    entry = look_up!();
                    literal!(literal);
                    if entry & LITERAL != 0 {
                        drop_bits!(entry);
                        let literal = entry;
                        refill!();
                        entry = look_up!();
                        literal!(literal);
                        continue;
                    }
                }
            }
            if entry & EXCEPTION != 0 {
                if entry & SUBTABLE != 0 {
                    drop_bits!(entry);
                    let slot = (entry >> 16) as usize + low(bits, entry >> 8 & 15) as usize;
                    entry = litlen[slot % LITLEN_SIZE];
                    if entry & LITERAL != 0 {
                        drop_bits!(entry);
                        literal!(entry);
                        refill!();
                        entry = look_up!();
                        continue;
                    }
                }
                if entry & END_OF_BLOCK != 0 {
                    count -= entry & 63;
                    break Left::EndOfBlock;
                }
                if entry & EXCEPTION != 0 {
                    break Left::Fault("there is no such literal or length code");
                }
            }
            // At most 22 bits of literals and 20 of the length were taken; a distance takes 28.
            let len = (entry >> 16) as usize + (low(bits, entry) >> (entry >> 8 & 15)) as usize;
            drop_bits!(entry);
            refill!();
            entry = distances[low(bits, DISTANCE_BITS) as usize % DISTANCE_SIZE];
            if entry & EXCEPTION != 0 {
                if entry & SUBTABLE == 0 {
                    break Left::Fault("there is no such distance code");
                }
                drop_bits!(entry);
                let slot = (entry >> 16) as usize + low(bits, entry >> 8 & 15) as usize;
                entry = distances[slot % DISTANCE_SIZE];
                if entry & EXCEPTION != 0 {
                    break Left::Fault("there is no such distance code");
                }
            }
            let distance = (entry >> 16) as usize + (low(bits, entry) >> (entry >> 8 & 15)) as usize;
            drop_bits!(entry);
            if distance > pos - floor {
                break Left::Fault("a match reaches back before the start");
            }
            // The next look-up runs while the match is copied.
            refill!();
            entry = look_up!();
            if LOG {
                if let Some(slot) = room.get_mut(logged) {
                    *slot = MatchLog::entry(base.wrapping_add(pos as u32), distance as u32, len as u32);
                }
                logged += 1;
            }
            // SAFETY: `distance` is at least 1 and within the history; the round began with
            // OUTPUT_ROOM bytes of room, of which at most two literals were used.
            unsafe { copy_match(out, pos, distance, len) };
            pos += len;
        };
        log.note(logged);
        self.bit = next * 8 - count as usize;
        self.pos = pos;
        left
    }
}
