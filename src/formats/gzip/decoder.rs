//! Inflate with known positions: it takes input in pieces and stops at block boundaries.
//!
//! The state between two calls is a bit position and the kind of the next part. No part is decoded halfway:
//! if the present input does not contain all of a block header, symbol or member header, the part is not
//! begun, and is tried again with more input. So the sizes of the input pieces cannot change the output or
//! the boundaries.

use super::index::BlockHeader;
use super::{GzipError, member};
use inflate::fast::{Left, LoopPositions, OUTPUT_ROOM};
use inflate::huffman::{
    self, DISTANCE_BITS, DISTANCE_SIZE, END_OF_BLOCK, EXCEPTION, LITERAL, LITLEN_BITS, LITLEN_SIZE,
};
use inflate::huffman::{SUBTABLE, Tables};
use inflate::marks::{MatchLog, WINDOW};

/// History kept in the buffer: enough for the window of a candidate checkpoint that lies up to 32 KiB back.
const HISTORY: usize = 2 * WINDOW;
/// Output decoded between two slides of the buffer; with its history it fits a second-level cache.
const FRESH: usize = 448 << 10;
/// Room behind the last position at which decoding may continue.
const SLACK: usize = 2 * OUTPUT_ROOM;
/// Bytes before a limit that are decoded symbol by symbol: a round of the fast loop there could overshoot the
/// limit.
const CAREFUL: usize = 3 + 258;
/// Size of the parts in which a larger input piece is taken.
const PIECE: usize = 128 << 10;

/// Reasons for the return of [`Inflater::run`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum InflateStop {
    /// More input is needed.
    Input,
    /// The output has reached the limit, at a symbol boundary inside a block.
    Limit,
    /// At the first bit of deflate data after a member header.
    MemberStart,
    /// At the first bit of a block that is not the first of its member.
    Block,
    /// Behind a member's trailer, which has these values.
    MemberEnd { crc32: u32, len: u32 },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    Member,
    Block,
    Stored { left: usize },
    Symbol,
    Trailer,
    Padding,
}

/// A decoder with known positions; see the module.
pub(super) struct Inflater {
    input: Vec<u8>,
    /// Blob offset of `input[0]`.
    input_at: u64,
    /// Bits of `input` consumed.
    bit: usize,
    out: Vec<u8>,
    /// Output position of `out[0]`.
    out_at: u64,
    pos: usize,
    /// `out[..handed]` has been passed on.
    handed: usize,
    /// First output byte of the current member.
    member_at: u64,
    members: u64,
    next: Next,
    last_block: bool,
    tables: Box<Tables>,
    /// Header of the current block: input bytes from its first bit.
    header: Vec<u8>,
    header_phase: usize,
    header_bits: usize,
    pub(super) log: MatchLog,
    pub(super) logging: bool,
}

impl Inflater {
    /// A decoder at the first byte of a gzip blob.
    pub(super) fn new() -> Self {
        Self {
            input: Vec::with_capacity(PIECE + 4096),
            input_at: 0,
            bit: 0,
            out: vec![0; HISTORY + FRESH + SLACK],
            out_at: 0,
            pos: 0,
            handed: 0,
            member_at: 0,
            members: 0,
            next: Next::Member,
            last_block: false,
            tables: Tables::new(),
            header: Vec::with_capacity(320),
            header_phase: 0,
            header_bits: 0,
            log: MatchLog::default(),
            logging: false,
        }
    }

    /// A decoder inside a member, at bit `bit` of the blob. The first byte fed is the one with that bit in
    /// it. It needs the output before the bit, and the header of the current block unless the bit is a
    /// block's first.
    pub(super) fn resume(
        bit: u64,
        window: &[u8],
        header: Option<&BlockHeader>,
    ) -> Result<Self, GzipError> {
        let mut inflater = Self::new();
        inflater.input_at = bit / 8;
        inflater.bit = (bit % 8) as usize;
        inflater.members = 1;
        inflater.next = Next::Block;
        let window = &window[window.len().saturating_sub(WINDOW)..];
        inflater.out[..window.len()].copy_from_slice(window);
        inflater.pos = window.len();
        inflater.handed = window.len();
        if let Some(header) = header {
            let mut bytes = header.bytes().to_vec();
            std::mem::swap(&mut bytes, &mut inflater.input);
            let at = std::mem::replace(&mut inflater.bit, 0);
            let complete = inflater.block_header()? && inflater.bit == header.bits();
            std::mem::swap(&mut bytes, &mut inflater.input);
            inflater.bit = at;
            if !complete || inflater.next != Next::Symbol {
                return Err(GzipError::damaged(
                    bit / 8,
                    "the block header of a checkpoint is not one",
                ));
            }
        }
        Ok(inflater)
    }

    /// Takes a part of `piece`; returns the rest.
    pub(super) fn take_input<'a>(&mut self, piece: &'a [u8]) -> &'a [u8] {
        let consumed = (self.bit / 8).min(self.input.len());
        self.input.drain(..consumed);
        self.input_at += consumed as u64;
        self.bit -= consumed * 8;
        let (taken, rest) = piece.split_at(piece.len().min(PIECE));
        self.input.extend_from_slice(taken);
        rest
    }

    /// The bit position in the blob.
    pub(super) fn bit(&self) -> u64 {
        self.input_at * 8 + self.bit as u64
    }

    /// Number of bytes fed.
    pub(super) fn input_end(&self) -> u64 {
        self.input_at + self.input.len() as u64
    }

    /// Output position.
    pub(super) fn out(&self) -> u64 {
        self.out_at + self.pos as u64
    }

    /// First output byte of the current member.
    pub(super) fn member_at(&self) -> u64 {
        self.member_at
    }

    /// Members begun so far.
    pub(super) fn members(&self) -> u64 {
        self.members
    }

    /// True if the stream may end here: behind a member, with no input left.
    pub(super) fn at_end(&self) -> bool {
        let consumed = self.bit.div_ceil(8) >= self.input.len();
        consumed && self.members > 0 && matches!(self.next, Next::Member | Next::Padding)
    }

    /// True if a checkpoint here needs the header of the current block.
    pub(super) fn inside_symbols(&self) -> bool {
        self.next == Next::Symbol
    }

    /// The header of the current block.
    pub(super) fn block_header_bits(&self) -> BlockHeader {
        BlockHeader::from_bits(&self.header, self.header_phase, self.header_bits)
    }

    /// The output at positions `from..to`, as far back as the history reaches.
    pub(super) fn output(&self, from: u64, to: u64) -> &[u8] {
        let start = from.saturating_sub(self.out_at) as usize;
        let end = (to.saturating_sub(self.out_at) as usize).min(self.pos);
        &self.out[start.min(end)..end]
    }

    /// The output that has not been passed on; it counts as passed on from now.
    pub(super) fn hand_on(&mut self) -> &[u8] {
        let fresh = self.handed..self.pos;
        self.handed = self.pos;
        &self.out[fresh]
    }

    /// Position at which the buffer must be [slid](Self::slide) before decoding can continue.
    pub(super) fn buffer_end(&self) -> u64 {
        self.out_at + (HISTORY + FRESH) as u64
    }

    /// Makes room and keeps the history. All output must have been passed on.
    pub(super) fn slide(&mut self) {
        let gone = self.pos.saturating_sub(HISTORY).min(self.handed);
        self.out.copy_within(gone..self.pos, 0);
        self.out_at += gone as u64;
        self.pos -= gone;
        self.handed -= gone;
        self.log.forget_before(self.out_at + WINDOW as u64);
    }

    /// Decodes until there is an event to report, or until output position `limit` is reached or passed by
    /// less than a match. `limit` must not be greater than [`buffer_end`](Self::buffer_end).
    pub(super) fn run(&mut self, limit: u64) -> Result<InflateStop, GzipError> {
        let limit = limit.saturating_sub(self.out_at).min((HISTORY + FRESH) as u64) as usize;
        loop {
            match self.next {
                Next::Member => return self.member(),
                Next::Block => {
                    if !self.block_header()? {
                        return Ok(InflateStop::Input);
                    }
                }
                Next::Stored { left } => {
                    let from = self.bit / 8;
                    let room = limit.saturating_sub(self.pos);
                    let n = left.min(self.input.len().saturating_sub(from)).min(room);
                    self.out[self.pos..self.pos + n].copy_from_slice(&self.input[from..from + n]);
                    self.pos += n;
                    self.bit += n * 8;
                    self.next = Next::Stored { left: left - n };
                    if n == left {
                        if let Some(stop) = self.end_of_block() {
                            return Ok(stop);
                        }
                    } else {
                        return Ok(if n == room { InflateStop::Limit } else { InflateStop::Input });
                    }
                }
                Next::Symbol => {
                    if let Some(stop) = self.symbols(limit)? {
                        return Ok(stop);
                    }
                }
                Next::Trailer => return Ok(self.trailer()),
                Next::Padding => {
                    let from = self.bit / 8;
                    if let Some(at) = self.input[from..].iter().position(|&byte| byte != 0) {
                        return Err(self.garbage(from + at));
                    }
                    self.bit = self.input.len() * 8;
                    return Ok(InflateStop::Input);
                }
            }
        }
    }

    fn garbage(&self, at: usize) -> GzipError {
        GzipError::TrailingGarbage { at: crate::units::Bytes(self.input_at + at as u64) }
    }

    fn fault(&self, reason: &'static str) -> GzipError {
        GzipError::damaged(self.bit() / 8, reason)
    }

    fn member(&mut self) -> Result<InflateStop, GzipError> {
        let from = self.bit / 8;
        let bytes = &self.input[from.min(self.input.len())..];
        if self.members > 0 {
            match bytes {
                [] | [0x1f] => return Ok(InflateStop::Input),
                [0, ..] => {
                    self.next = Next::Padding;
                    return self.run(0);
                }
                [0x1f, 0x8b, ..] => {}
                _ => return Err(self.garbage(from)),
            }
        }
        let Some(len) = member::header_len(bytes, self.input_at + from as u64)? else {
            return Ok(InflateStop::Input);
        };
        self.bit += len * 8;
        self.members += 1;
        self.member_at = self.out();
        self.next = Next::Block;
        Ok(InflateStop::MemberStart)
    }

    fn trailer(&mut self) -> InflateStop {
        let from = self.bit / 8;
        let Some(bytes) = self.input.get(from..).and_then(<[u8]>::first_chunk::<8>) else {
            return InflateStop::Input;
        };
        let word = u64::from_le_bytes(*bytes);
        self.bit += 64;
        self.next = Next::Member;
        InflateStop::MemberEnd { crc32: word as u32, len: (word >> 32) as u32 }
    }

    fn end_of_block(&mut self) -> Option<InflateStop> {
        if self.last_block {
            self.bit = self.bit.next_multiple_of(8);
            self.next = Next::Trailer;
            None
        } else {
            self.next = Next::Block;
            Some(InflateStop::Block)
        }
    }

    /// At least 56 bits from bit `at` of the input; zeros past its end.
    #[inline]
    fn peek(&self, at: usize) -> u64 {
        let from = at / 8;
        let word = match self.input.get(from..).and_then(<[u8]>::first_chunk) {
            Some(bytes) => u64::from_le_bytes(*bytes),
            None => {
                let tail = self.input.get(from..).unwrap_or_default();
                tail.iter().rev().fold(0, |word, &byte| word << 8 | u64::from(byte))
            }
        };
        word >> (at % 8)
    }

    /// Reads a block header; false if the present input does not contain all of it.
    fn block_header(&mut self) -> Result<bool, GzipError> {
        let start = self.bit;
        let end = self.input.len() * 8;
        if start + 3 > end {
            return Ok(false);
        }
        let bits = self.peek(start);
        let last = bits & 1 == 1;
        let mut at = start + 3;
        match bits >> 1 & 3 {
            0 => {
                at = at.next_multiple_of(8);
                if at + 32 > end {
                    return Ok(false);
                }
                let lengths = self.peek(at) as u32;
                let len = lengths & 0xffff;
                if len ^ lengths >> 16 != 0xffff {
                    return Err(
                        self.fault("the length of a stored block does not match its complement")
                    );
                }
                at += 32;
                self.next = Next::Stored { left: len as usize };
            }
            1 => {
                self.tables.set_fixed();
                self.next = Next::Symbol;
            }
            2 => {
                let Some(lengths) = self.read_lengths(&mut at, end)? else { return Ok(false) };
                let (litlen, distance) = lengths.split();
                self.tables.set_dynamic(litlen, distance).map_err(|reason| self.fault(reason))?;
                self.next = Next::Symbol;
            }
            _ => return Err(self.fault("there is no block type 3")),
        }
        self.last_block = last;
        self.header.clear();
        self.header.extend_from_slice(&self.input[start / 8..at.div_ceil(8)]);
        self.header_phase = start % 8;
        self.header_bits = at - start;
        self.bit = at;
        Ok(true)
    }

    /// Code lengths of a dynamic block (RFC 1951, 3.2.7); `None` if the input ends before they do.
    fn read_lengths(&self, at: &mut usize, end: usize) -> Result<Option<CodeLengths>, GzipError> {
        read_lengths(|at| self.peek(at), at, end).map_err(|reason| self.fault(reason))
    }

    fn symbols(&mut self, limit: usize) -> Result<Option<InflateStop>, GzipError> {
        if self.pos >= limit {
            return Ok(Some(InflateStop::Limit));
        }
        loop {
            if self.pos + CAREFUL < limit {
                let floor = self.member_at.saturating_sub(self.out_at) as usize;
                let mut run = LoopPositions {
                    tables: &self.tables,
                    input: &self.input,
                    bit: self.bit,
                    out: &mut self.out,
                    pos: self.pos,
                    floor,
                    limit: limit - CAREFUL,
                };
                let base = self.out_at as u32;
                let left = if self.logging {
                    run.go::<true>(&mut self.log, base)
                } else {
                    run.go::<false>(&mut self.log, base)
                };
                (self.bit, self.pos) = (run.bit, run.pos);
                match left {
                    Left::Edge => {}
                    Left::EndOfBlock => return Ok(self.end_of_block()),
                    Left::Fault(reason) => return Err(self.fault(reason)),
                }
            }
            loop {
                match self.symbol()? {
                    Symbol::Starved => return Ok(Some(InflateStop::Input)),
                    Symbol::EndOfBlock => return Ok(self.end_of_block()),
                    Symbol::Written if self.pos >= limit => return Ok(Some(InflateStop::Limit)),
                    Symbol::Written => {}
                }
                if self.pos + CAREFUL < limit && self.bit / 8 + 64 < self.input.len() {
                    break;
                }
            }
        }
    }

    /// Decodes one literal, match or end of block.
    fn symbol(&mut self) -> Result<Symbol, GzipError> {
        let available = (self.input.len() * 8).saturating_sub(self.bit);
        let bits = self.peek(self.bit);
        let mut used = 0;
        let low = |from: u32, count: u32| (bits >> from & ((1 << count) - 1)) as usize;
        let mut entry = self.tables.litlen[low(0, LITLEN_BITS) % LITLEN_SIZE];
        if entry & SUBTABLE != 0 && entry & (LITERAL | EXCEPTION) == EXCEPTION {
            used = entry & 0xff;
            entry = self.tables.litlen
                [((entry >> 16) as usize + low(used, entry >> 8 & 15)) % LITLEN_SIZE];
        }
        let drop = entry & 0xff;
        if (used + drop) as usize > available {
            return Ok(Symbol::Starved);
        }
        if entry & LITERAL != 0 {
            self.out[self.pos] = (entry >> 16) as u8;
            self.pos += 1;
            self.bit += (used + drop) as usize;
            return Ok(Symbol::Written);
        }
        if entry & EXCEPTION != 0 {
            if entry & END_OF_BLOCK != 0 {
                self.bit += (used + drop) as usize;
                return Ok(Symbol::EndOfBlock);
            }
            if available < 15 {
                return Ok(Symbol::Starved);
            }
            return Err(self.fault("there is no such literal or length code"));
        }
        let code = entry >> 8 & 15;
        let len = (entry >> 16) as usize + low(used + code, drop - code);
        used += drop;
        let mut entry = self.tables.distance[low(used, DISTANCE_BITS) % DISTANCE_SIZE];
        if entry & SUBTABLE != 0 && entry & EXCEPTION != 0 {
            let drop = entry & 0xff;
            entry = self.tables.distance
                [((entry >> 16) as usize + low(used + drop, entry >> 8 & 15)) % DISTANCE_SIZE];
            used += drop;
        }
        let drop = entry & 0xff;
        if (used + drop) as usize > available {
            return Ok(Symbol::Starved);
        }
        if entry & EXCEPTION != 0 {
            if available < 48 {
                return Ok(Symbol::Starved);
            }
            return Err(self.fault("there is no such distance code"));
        }
        let code = entry >> 8 & 15;
        let distance = (entry >> 16) as usize + low(used + code, drop - code);
        used += drop;
        let floor = self.member_at.saturating_sub(self.out_at) as usize;
        if distance > self.pos - floor {
            return Err(self.fault("a match reaches back before the start"));
        }
        if self.logging {
            self.log.push(
                (self.out_at as u32).wrapping_add(self.pos as u32),
                distance as u32,
                len as u32,
            );
        }
        for at in self.pos..self.pos + len {
            self.out[at] = self.out[at - distance];
        }
        self.pos += len;
        self.bit += used as usize;
        Ok(Symbol::Written)
    }
}

enum Symbol {
    Starved,
    EndOfBlock,
    Written,
}

/// Code lengths of a dynamic block: literals and lengths, then distances.
pub(super) struct CodeLengths {
    lens: [u8; 320],
    litlen: usize,
    distance: usize,
}

impl CodeLengths {
    fn split(&self) -> (&[u8], &[u8]) {
        (&self.lens[..self.litlen], &self.lens[self.litlen..self.litlen + self.distance])
    }

    /// Lengths of the literal and length code.
    pub(super) fn litlen(&self) -> &[u8] {
        &self.lens[..self.litlen]
    }
}

/// Reads code lengths from bit `at` on and moves `at` behind them; `None` if bit `end` comes first.
pub(super) fn read_lengths(
    peek: impl Fn(usize) -> u64,
    at: &mut usize,
    end: usize,
) -> Result<Option<CodeLengths>, &'static str> {
    /// Order in which the lengths of the code length code are stored.
    const ORDER: [usize; 19] = [16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15];
    if *at + 14 > end {
        return Ok(None);
    }
    let bits = peek(*at);
    let litlen = 257 + (bits & 31) as usize;
    let distance = 1 + (bits >> 5 & 31) as usize;
    let stored = 4 + (bits >> 10 & 15) as usize;
    *at += 14;
    if litlen > 286 || distance > 30 {
        return Err("a block declares too many codes");
    }
    if *at + 3 * stored > end {
        return Ok(None);
    }
    let mut lens = [0; 19];
    for &symbol in &ORDER[..stored] {
        lens[symbol] = (peek(*at) & 7) as u8;
        *at += 3;
    }
    let table = huffman::precode(&lens)?;
    let mut lens = [0; 320];
    let total = litlen + distance;
    let mut done = 0;
    while done < total {
        let bits = peek(*at);
        let entry = table[(bits & 127) as usize];
        let drop = entry & 0xff;
        let symbol = entry >> 16;
        let (extra, base) = match symbol {
            16 => (2, 3),
            17 => (3, 3),
            18 => (7, 11),
            _ => (0, 1),
        };
        *at += (drop + extra) as usize;
        if *at > end {
            return Ok(None);
        }
        let run = base + (bits >> drop & ((1 << extra) - 1)) as usize;
        let len = match symbol {
            16 if done == 0 => return Err("a block repeats a code length before the first"),
            16 => lens[done - 1],
            17 | 18 => 0,
            len => len as u8,
        };
        if run > total - done {
            return Err("a block repeats a code length past the last");
        }
        lens[done..done + run].fill(len);
        done += run;
    }
    Ok(Some(CodeLengths { lens, litlen, distance }))
}
