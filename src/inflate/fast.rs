//! The inner loop: symbols of a Huffman block while input and output are ample.
//!
//! Everything near an edge (the last bytes of the input at hand, the last bytes before a limit) is
//! left to the careful loop in [`inflate`](super::inflate); this one checks its room once a round.
//!
//! `unsafe` lives here because of that: with every access checked, the scan did 445 MB/s where
//! libdeflate did 830; now it does 640 (`perf/gzip_scan.rs`). The rules are few: input and output
//! room are checked at the start of a round for all it may do, tables are indexed by masked values
//! (safe code), and a distance is checked against the history before it is used. With debug
//! assertions, as in tests and under the fuzzer, every access through a pointer is checked again.

#![allow(unsafe_code)]

use super::huffman::{DISTANCE_BITS, DISTANCE_SIZE};
use super::huffman::{
    END_OF_BLOCK, EXCEPTION, LITERAL, LITLEN_BITS, LITLEN_SIZE, SUBTABLE, Tables,
};
use super::marks::MatchLog;

/// Input bytes a round may look at: a few refills, each of which reads 8 bytes and advances by 7 or less.
const INPUT_ROOM: usize = 32;
/// Output bytes a round may write: three literals, the longest match, and what its copy overshoots.
pub const OUTPUT_ROOM: usize = 3 + 258 + 32;

/// Why the loop was left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Left {
    /// Not enough room for another round.
    Edge,
    /// The block ended.
    EndOfBlock,
    /// The input is damaged.
    Fault(&'static str),
}

/// Where the loop reads and writes.
pub struct Run<'a> {
    pub tables: &'a Tables,
    pub input: &'a [u8],
    /// Bits of `input` consumed.
    pub bit: usize,
    /// History, then room.
    pub out: &'a mut [u8],
    /// Bytes of `out` written.
    pub pos: usize,
    /// Start of the history that a match may refer to.
    pub floor: usize,
    /// No round starts at or past this position.
    pub limit: usize,
}

/// Eight bytes.
///
/// # Safety
/// Eight bytes can be read at `at`.
#[inline(always)]
unsafe fn load(at: *const u8) -> u64 {
    // SAFETY: by the caller; an array of bytes needs no alignment.
    u64::from_le_bytes(unsafe { at.cast::<[u8; 8]>().read() })
}

/// Copies `N` bytes that may overlap, by way of a register.
///
/// # Safety
/// `N` bytes can be read at `from` and written at `to`.
#[inline(always)]
unsafe fn copy<const N: usize>(from: *const u8, to: *mut u8) {
    // SAFETY: by the caller; arrays of bytes need no alignment, and the value is read whole before
    // it is written.
    unsafe { to.cast::<[u8; N]>().write(from.cast::<[u8; N]>().read()) };
}

/// Writes a match of `len` bytes at `to`; may write 31 bytes more.
///
/// # Safety
/// `distance >= 1` bytes before `to` are initialised and `len + 32` bytes can be written there.
#[inline(always)]
unsafe fn copy_match(mut to: *mut u8, distance: usize, len: usize) {
    // SAFETY: `from` stays `distance` or more behind `to`, which stays before `end` whenever
    // something is copied, and no copy is longer than 32 bytes.
    unsafe {
        let mut from = to.sub(distance).cast_const();
        let end = to.add(len);
        if distance >= 8 {
            // Four at once: most matches end here, and eight is the commonest distance of tables.
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
            // A copy yields `distance` right bytes; those behind them are overwritten.
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

impl Run<'_> {
    /// Decodes until there is no room for another round or the block ends. With `LOG`, matches are
    /// noted in `log`; `base` is the output position of `out[0]`, of which the low 32 bits count.
    pub fn go<const LOG: bool>(&mut self, log: &mut MatchLog, base: u32) -> Left {
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("bmi2") {
            // SAFETY: the processor has the feature.
            return unsafe { self.with_bmi2::<LOG>(log, base) };
        }
        self.rounds::<LOG>(log, base)
    }

    /// The same with shifts that leave the flags alone and take any register.
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
        // A match yields three bytes at least, so the room suffices; the last may pass the limit.
        let room = log.room(if LOG { (limit - pos) / 3 + 2 } else { 0 });
        let (room_start, room_len) = (room.as_mut_ptr(), size_of_val(room));
        let mut room = room_start;
        let phase = (self.bit % 8) as u32;
        let mut count = 56 - phase;
        let (input_start, out_start) = (input.as_ptr(), out.as_mut_ptr());
        // For the debug assertions alone.
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

        // Only the low six bits of `count` are meant: entries are subtracted whole.
        // Bits of `bits` above `count` are those that follow, or zero: a refill sets them to the same again.
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
            // Here at least 56 bits are at hand, and `entry` is what they begin with.
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
            // At most 28 bits: rarely not at hand.
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
            // `floor <= to` always.
            if distance > to.addr() - floor.addr() {
                break Left::Fault("a match reaches back before the start");
            }
            // The next look-up runs while the match is copied.
            refill!();
            entry = look_up!();
            if LOG {
                let at = base.wrapping_add((to.addr() - out_start.addr()) as u32);
                debug_assert!(room.addr() < room_end);
                // SAFETY: each entry stands for three bytes or more of output before `limit`, and
                // so much room was taken.
                unsafe {
                    room.write(MatchLog::entry(at, distance as u32, len as u32));
                    room = room.add(1);
                }
            }
            debug_assert!(distance > 0 && to.addr() + len + 32 <= out_end);
            // SAFETY: `distance` is at least 1 and within the history; the round began with
            // OUTPUT_ROOM bytes of room, of which at most two literals were used.
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
