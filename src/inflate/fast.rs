//! The inner loop: decodes symbols of a Huffman block while there is enough input and room for output.
//!
//! The careful loop in the crate `formats` handles the data near an edge (the last bytes of the present
//! input, the last bytes before a limit) and checks each symbol. This loop checks its room once per round.
//!
//! `unsafe` is used here for speed: with every access checked, the scan reached 445 MB/s where libdeflate
//! reached 830; now it reaches 640 (`perf/gzip_scan.rs`). The rules are few: the room for all input and
//! output of a round is checked at its start, tables are indexed by masked values (safe code), and a distance
//! is checked against the history before it is used. With debug assertions, as in tests and under the fuzzer,
//! every access through a pointer is checked again.

#![allow(unsafe_code)]

use super::huffman::{DISTANCE_BITS, DISTANCE_SIZE};
use super::huffman::{
    END_OF_BLOCK, EXCEPTION, LITERAL, LITLEN_BITS, LITLEN_SIZE, SUBTABLE, Tables,
};
use super::marks::MatchLog;

/// Input bytes that a round may read: a few refills; each reads 8 bytes and advances by 7 or less.
const INPUT_ROOM: usize = 32;
/// Output bytes that a round may write: three literals, the longest match, and the overshoot of its copy.
pub const OUTPUT_ROOM: usize = 3 + 258 + 32;

/// Reasons for leaving the loop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Left {
    /// Not enough room for another round.
    Edge,
    /// The block ended.
    EndOfBlock,
    /// The input is damaged.
    Fault(&'static str),
}

/// Positions at which the loop reads and writes.
pub struct LoopPositions<'a> {
    /// Codes of the block.
    pub tables: &'a Tables,
    /// Bytes of the stream at hand.
    pub input: &'a [u8],
    /// Bits of `input` consumed.
    pub bit: usize,
    /// History, with room behind it.
    pub out: &'a mut [u8],
    /// Bytes of `out` written.
    pub pos: usize,
    /// Start of the history that a match may refer to.
    pub floor: usize,
    /// No round starts at this position or behind it.
    pub limit: usize,
}

/// Loads eight bytes.
///
/// # Safety
/// Eight bytes can be read at `at`.
#[inline(always)]
unsafe fn load(at: *const u8) -> u64 {
    // SAFETY: guaranteed by the caller; an array of bytes needs no alignment.
    u64::from_le_bytes(unsafe { at.cast::<[u8; 8]>().read() })
}

/// Copies `N` bytes through a register; the ranges may overlap.
///
/// # Safety
/// `N` bytes can be read at `from` and written at `to`.
#[inline(always)]
unsafe fn copy<const N: usize>(from: *const u8, to: *mut u8) {
    // SAFETY: guaranteed by the caller; arrays of bytes need no alignment, and the value is read whole before
    // it is written.
    unsafe { to.cast::<[u8; N]>().write(from.cast::<[u8; N]>().read()) };
}

/// Writes a match of `len` bytes at `to`; may write 31 bytes more.
///
/// # Safety
/// `distance >= 1` bytes before `to` must be initialised, and `len + 32` bytes must be writable there.
#[inline(always)]
unsafe fn copy_match(mut to: *mut u8, distance: usize, len: usize) {
    // SAFETY: `from` stays at least `distance` bytes before `to`, which stays before `end` whenever something
    // is copied, and no copy is longer than 32 bytes.
    unsafe {
        let mut from = to.sub(distance).cast_const();
        let end = to.add(len);
        if distance >= 8 {
            // Four at once: most matches end here, and eight is the most frequent distance in tables.
            loop {
                copy::<8>(from, to);
                copy::<8>(from.add(8), to.add(8));
                copy::<8>(from.add(16), to.add(16));
                copy::<8>(from.add(24), to.add(24));
                to = to.add(32);
                from = from.add(32);
                if to >= end {
                    break;
                }
            }
        } else if distance == 1 {
            let run = [*from; 32];
            loop {
                to.cast::<[u8; 32]>().write(run);
                to = to.add(32);
                if to >= end {
                    break;
                }
            }
        } else {
            // A copy yields `distance` correct bytes; the bytes behind them are overwritten.
            while to < end {
                copy::<8>(from, to);
                from = from.add(distance);
                to = to.add(distance);
            }
        }
    }
}

#[inline(always)]
fn low(bits: u64, count: u32) -> u64 {
    bits & ((1 << (count & 63)) - 1)
}

impl LoopPositions<'_> {
    /// Decodes until there is no room for another round or the block ends. With `LOG`, matches are added to
    /// `log`. `base` holds the low 32 bits of the output position of `out[0]`.
    pub fn go<const LOG: bool>(&mut self, log: &mut MatchLog, base: u32) -> Left {
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("bmi2") {
            // SAFETY: the processor has the feature.
            return unsafe { self.with_bmi2::<LOG>(log, base) };
        }
        self.rounds::<LOG>(log, base)
    }

    /// Runs the loop compiled for BMI2: its shifts leave the flags unchanged and take any register.
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "bmi1,bmi2")]
    fn with_bmi2<const LOG: bool>(&mut self, log: &mut MatchLog, base: u32) -> Left {
        self.rounds::<LOG>(log, base)
    }

    #[inline(always)]
    fn rounds<const LOG: bool>(&mut self, log: &mut MatchLog, base: u32) -> Left {
        let input = self.input;
        let out = &mut *self.out;
        let tables = self.tables;
        let (floor, pos) = (self.floor, self.pos);
        let limit = self.limit.min(out.len().saturating_sub(OUTPUT_ROOM));
        let Some(input_limit) = input.len().checked_sub(INPUT_ROOM) else { return Left::Edge };
        let start = self.bit / 8;
        if start > input_limit || pos >= limit {
            return Left::Edge;
        }
        if self.floor > pos {
            return Left::Fault("the history is damaged");
        }
        // A match yields at least three bytes, so the room suffices; the last match may pass the limit.
        let room = log.room(if LOG { (limit - pos) / 3 + 2 } else { 0 });
        let (room_start, room_len) = (room.as_mut_ptr(), size_of_val(room));
        let mut room = room_start;
        let phase = (self.bit % 8) as u32;
        let mut count = 56 - phase;
        let (input_start, out_start) = (input.as_ptr(), out.as_mut_ptr());
        // Used only by the debug assertions.
        let (out_end, room_end) = (out_start.addr() + out.len(), room_start.addr() + room_len);
        // SAFETY: `start <= input_limit`, which lies 32 bytes before the end of `input`; `floor <=
        // pos < limit`, which lies OUTPUT_ROOM before the end of `out`.
        let (mut next, input_limit, mut to, limit, floor, mut bits) = unsafe {
            (
                input_start.add(start + 7),
                input_start.add(input_limit),
                out_start.add(pos),
                out_start.add(limit),
                out_start.add(floor),
                load(input_start.add(start)) >> phase,
            )
        };

        // Only the low six bits of `count` count, because entries are subtracted whole. Bits of `bits` above
        // `count` are zero or equal to those of the following input: a refill sets them to the same values.
        macro_rules! refill {
            () => {
                debug_assert!(next.addr() + 8 <= input.as_ptr_range().end.addr());
                // SAFETY: a round starts with `next <= input_limit`, 32 bytes before the end, and
                // refills at most twice, advancing by 7 or less.
                unsafe {
                    bits |= load(next) << (count & 63);
                    next = next.add(7 - (count >> 3 & 7) as usize);
                }
                count |= 56;
            };
        }
        macro_rules! drop_bits {
            ($entry:expr) => {
                bits >>= $entry & 63;
                count = count.wrapping_sub($entry);
            };
        }
        macro_rules! literal {
            ($entry:expr) => {
                debug_assert!(to.addr() < out_end);
                // SAFETY: a round starts with `to < limit`, which leaves OUTPUT_ROOM.
                unsafe {
                    *to = ($entry >> 16) as u8;
                    to = to.add(1);
                }
            };
        }
        macro_rules! look_up {
            () => {
                tables.litlen[low(bits, LITLEN_BITS) as usize % LITLEN_SIZE]
            };
        }

        if next > input_limit {
            return Left::Edge;
        }
        refill!();
        let mut entry = look_up!();
        let left = loop {
            // At least 56 bits are present here, and `entry` is the entry of the first of them.
            if next > input_limit || to >= limit {
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
                    entry = tables.litlen[slot % LITLEN_SIZE];
                    if entry & LITERAL != 0 {
                        drop_bits!(entry);
                        literal!(entry);
                        refill!();
                        entry = look_up!();
                        continue;
                    }
                }
                if entry & END_OF_BLOCK != 0 {
                    count = count.wrapping_sub(entry);
                    break Left::EndOfBlock;
                }
                if entry & EXCEPTION != 0 {
                    break Left::Fault("there is no such literal or length code");
                }
            }
            let len = (entry >> 16) as usize + (low(bits, entry) >> (entry >> 8 & 15)) as usize;
            drop_bits!(entry);
            // At most 28 bits are needed; they are rarely missing.
            if count & 63 < 28 {
                refill!();
            }
            entry = tables.distance[low(bits, DISTANCE_BITS) as usize % DISTANCE_SIZE];
            if entry & EXCEPTION != 0 {
                if entry & SUBTABLE == 0 {
                    break Left::Fault("there is no such distance code");
                }
                drop_bits!(entry);
                let slot = (entry >> 16) as usize + low(bits, entry >> 8 & 15) as usize;
                entry = tables.distance[slot % DISTANCE_SIZE];
                if entry & EXCEPTION != 0 {
                    break Left::Fault("there is no such distance code");
                }
            }
            let distance =
                (entry >> 16) as usize + (low(bits, entry) >> (entry >> 8 & 15)) as usize;
            drop_bits!(entry);
            // `floor <= to` always holds.
            if distance > to.addr() - floor.addr() {
                break Left::Fault("a match reaches back before the start");
            }
            // The next look-up runs during the copy of the match.
            refill!();
            entry = look_up!();
            if LOG {
                let at = base.wrapping_add((to.addr() - out_start.addr()) as u32);
                debug_assert!(room.addr() < room_end);
                // SAFETY: each entry stands for three bytes or more of output before `limit`, and the log has
                // room for that many.
                unsafe {
                    room.write(MatchLog::entry(at, distance as u32, len as u32));
                    room = room.add(1);
                }
            }
            debug_assert!(distance > 0 && to.addr() + len + 32 <= out_end);
            // SAFETY: `distance` is at least 1 and within the history; the round began with OUTPUT_ROOM bytes
            // of room, and at most two literals used some of it.
            unsafe {
                copy_match(to, distance, len);
                to = to.add(len);
            }
        };
        let (next, pos) = (next.addr() - input_start.addr(), to.addr() - out_start.addr());
        log.note((room.addr() - room_start.addr()) / size_of::<u64>());
        self.bit = next * 8 - (count & 63) as usize;
        self.pos = pos;
        left
    }
}
