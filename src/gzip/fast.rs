//! The inner loop: symbols of a Huffman block while input and output are ample.
//!
//! Everything near an edge (the last bytes of the input at hand, the last bytes before a limit) is
//! left to the careful loop in [`inflate`](super::inflate); this one checks its room once a round.

use super::huffman::{END_OF_BLOCK, EXCEPTION, LITERAL, LITLEN_BITS, LITLEN_SIZE, SUBTABLE, Tables};
use super::huffman::{DISTANCE_BITS, DISTANCE_SIZE};
use super::marks::MatchLog;

/// Input bytes a round may look at: three refills of at most 8 bytes, each of which reads 8.
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

#[inline(always)]
fn load(input: &[u8], at: usize) -> u64 {
    match input.get(at..).and_then(<[u8]>::first_chunk) {
        Some(word) => u64::from_le_bytes(*word),
        None => 0,
    }
}

#[inline(always)]
fn low(bits: u64, count: u32) -> u64 {
    bits & ((1 << count) - 1)
}

/// Copies 16 bytes that do not overlap.
#[inline(always)]
fn copy16(out: &mut [u8], from: usize, to: usize) {
    let Some(&chunk) = out.get(from..).and_then(<[u8]>::first_chunk::<16>) else { return };
    if let Some(room) = out.get_mut(to..).and_then(<[u8]>::first_chunk_mut::<16>) {
        *room = chunk;
    }
}

/// Copies 8 bytes that do not overlap.
#[inline(always)]
fn copy8(out: &mut [u8], from: usize, to: usize) {
    let Some(&chunk) = out.get(from..).and_then(<[u8]>::first_chunk::<8>) else { return };
    if let Some(room) = out.get_mut(to..).and_then(<[u8]>::first_chunk_mut::<8>) {
        *room = chunk;
    }
}

#[inline(always)]
fn copy_match(out: &mut [u8], pos: usize, distance: usize, len: usize) {
    let from = pos - distance;
    if distance >= 16 {
        copy16(out, from, pos);
        if len > 16 {
            copy16(out, from + 16, pos + 16);
            let mut done = 32;
            while done < len {
                copy16(out, from + done, pos + done);
                done += 16;
            }
        }
    } else if distance >= 8 {
        let mut done = 0;
        while done < len {
            copy8(out, from + done, pos + done);
            done += 8;
        }
    } else if distance == 1 {
        let byte = out[from];
        out[pos..pos + len].fill(byte);
    } else {
        for at in pos..pos + len {
            out[at] = out[at - distance];
        }
    }
}

impl Run<'_> {
    /// Decodes until there is no room for another round or the block ends. With `LOG`, matches are
    /// noted in `log`; `base` is the output position of `out[0]`, of which the low 32 bits count.
    pub(super) fn go<const LOG: bool>(&mut self, log: &mut MatchLog, base: u32) -> Left {
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
        if LOG {
            log.reserve((limit - pos) / 3 + 258);
        }
        let phase = (self.bit % 8) as u32;
        let mut bits = load(input, start) >> phase;
        let mut count = 56 - phase;
        let mut next = start + 7;

        macro_rules! refill {
            () => {
                bits |= load(input, next) << count;
                next += ((63 - count) >> 3) as usize;
                count |= 56;
            };
        }
        macro_rules! drop_bits {
            ($entry:expr) => {
                bits >>= $entry as u8;
                count -= u32::from($entry as u8);
            };
        }

        let left = loop {
            if next > input_limit || pos >= limit {
                break Left::Edge;
            }
            refill!();
            let mut entry = litlen[low(bits, LITLEN_BITS) as usize % LITLEN_SIZE];
            if entry & LITERAL != 0 {
                drop_bits!(entry);
                out[pos] = (entry >> 16) as u8;
                pos += 1;
                entry = litlen[low(bits, LITLEN_BITS) as usize % LITLEN_SIZE];
                if entry & LITERAL != 0 {
                    drop_bits!(entry);
                    out[pos] = (entry >> 16) as u8;
                    pos += 1;
                    entry = litlen[low(bits, LITLEN_BITS) as usize % LITLEN_SIZE];
                    if entry & LITERAL != 0 {
                        drop_bits!(entry);
                        out[pos] = (entry >> 16) as u8;
                        pos += 1;
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
                        out[pos] = (entry >> 16) as u8;
                        pos += 1;
                        continue;
                    }
                }
                if entry & END_OF_BLOCK != 0 {
                    drop_bits!(entry);
                    break Left::EndOfBlock;
                }
                if entry & EXCEPTION != 0 {
                    break Left::Fault("there is no such literal or length code");
                }
            }
            let len = (entry >> 16) as usize + (low(bits, u32::from(entry as u8)) >> (entry >> 8 & 15)) as usize;
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
            let distance = (entry >> 16) as usize + (low(bits, u32::from(entry as u8)) >> (entry >> 8 & 15)) as usize;
            drop_bits!(entry);
            if distance > pos - floor {
                break Left::Fault("a match reaches back before the start");
            }
            if LOG {
                log.push(base.wrapping_add(pos as u32), distance as u32, len as u32);
            }
            copy_match(out, pos, distance, len);
            pos += len;
        };
        self.bit = next * 8 - count as usize;
        self.pos = pos;
        left
    }
}
