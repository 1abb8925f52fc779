//! One pass over a layer during its download: its output, and the checkpoints of its index.
//!
//! The target of the next checkpoint is `span` behind the last one. Every block boundary within a quarter of
//! a span around that target is a candidate. The candidate with the fewest used bytes in its window is chosen
//! ([`marks`](super::marks)); a member start has none and is chosen at once. If a block is so large that
//! there is no candidate, the checkpoint is a point between two of its symbols, with a copy of the block's
//! header. So a segment is never longer than two spans.
//!
//! The chosen points depend only on the stream and the span: every decision is taken at an output position,
//! never at the end of an input piece.

use std::collections::VecDeque;

use super::GzipError;
use super::decoder::{InflateStop, Inflater};
use super::index::{Boundary, Checkpoint, CheckpointKind, GzipIndex};
use super::window::{SparseWindow, WindowPacker};
use crate::segments::MAX_SEGMENT;
use crate::units::{Bits, Bytes};
use inflate::marks::{WINDOW, masked};

/// Default distance between checkpoints. The first read of a cold layer fetches one segment, about a third of
/// this, and inflates it in little more than a millisecond. All metadata together is 0.51 % of the layer (a
/// Debian `/usr`, gzip -6). Half the span would save 1.5 ms of the 23 ms of the read over 1 Gbit/s and 20 ms;
/// the metadata would then be 1.07 %, above the limit of 1 % (`perf/README.md`).
pub const DEFAULT_SPAN: Bytes = Bytes(1 << 20);

/// Shortest span, equal to upstream's (spec gzip-index 2).
pub const MIN_SPAN: Bytes = Bytes(64 << 10);

/// Longest span, 16 MiB: a segment has at most two, and [`MAX_SEGMENT`] bounds it.
pub const MAX_SPAN: Bytes = Bytes(MAX_SEGMENT.0 / 2);

/// Options of a scan.
#[derive(Clone, Copy, Debug)]
pub struct ScanOptions {
    /// Target distance between checkpoints in the output; clamped to [`MIN_SPAN`]`..=`[`MAX_SPAN`].
    pub span: Bytes,
}

impl Default for ScanOptions {
    fn default() -> Self {
        Self { span: DEFAULT_SPAN }
    }
}

/// A block boundary that can become a checkpoint.
struct Candidate {
    bit: u64,
    out: u64,
    /// CRC-32 of all output before it.
    crc: u32,
    member_start: bool,
    /// Number of used bytes of its window and the window, once 32 KiB have been decoded past it.
    marked: Option<(u32, Option<Box<[u8; WINDOW]>>)>,
}

/// Reads a gzip blob once, passes its output on and chooses checkpoints.
pub struct Scanner {
    inflater: Inflater,
    span: u64,
    packer: WindowPacker,
    checkpoints: Vec<Checkpoint>,
    /// CRC-32 of all output before each checkpoint.
    crc_before: Vec<u32>,
    candidates: VecDeque<Candidate>,
    /// True if the last checkpoint lies inside a block and its window is not marked yet.
    unmarked: bool,
    /// True if there was no candidate in time, and the output here cannot be cut: the next boundary becomes
    /// the checkpoint.
    overdue: bool,
    /// Extra length of the zone for that case.
    zone_extra: u64,
    last_candidate: u64,
    /// CRC-32 of the output so far, and the position that it covers.
    crc: crc32fast::Hasher,
    crc_at: u64,
    /// CRC-32 of all output before the current member.
    member_crc: u32,
    /// Number of checkpoints already returned by [`take_boundaries`](Self::take_boundaries).
    taken: usize,
    failed: Option<GzipError>,
}

impl Scanner {
    /// A scanner at the first byte of a layer.
    #[must_use]
    pub fn new(options: ScanOptions) -> Self {
        Self {
            inflater: Inflater::new(),
            span: options.span.clamp(MIN_SPAN, MAX_SPAN).0,
            packer: WindowPacker::new(),
            checkpoints: Vec::new(),
            crc_before: Vec::new(),
            candidates: VecDeque::new(),
            unmarked: false,
            overdue: false,
            zone_extra: 0,
            last_candidate: 0,
            crc: crc32fast::Hasher::new(),
            crc_at: 0,
            member_crc: 0,
            taken: 0,
            failed: None,
        }
    }

    /// Consumes all of `compressed`, in pieces of any size, and passes uncompressed bytes to `sink` in order.
    ///
    /// # Errors
    /// [`GzipError`] if the stream is damaged (again on every later call), or the error of `sink`. The scan
    /// cannot continue after an error of `sink`: the refused bytes are not offered again.
    pub fn feed<E: From<GzipError>>(
        &mut self,
        compressed: &[u8],
        sink: &mut dyn FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        if let Some(error) = &self.failed {
            return Err(error.clone().into());
        }
        let mut rest = compressed;
        while !rest.is_empty() {
            rest = self.inflater.take_input(rest);
            loop {
                match self.step() {
                    Ok(InflateStop::Input) => break,
                    Ok(_) => {}
                    Err(error) => {
                        self.failed = Some(error.clone());
                        return Err(error.into());
                    }
                }
                if self.inflater.out() >= self.inflater.buffer_end() {
                    self.hand_on(sink)?;
                    self.inflater.slide();
                }
            }
        }
        self.hand_on(sink)
    }

    /// Takes the final checkpoints that were not taken yet, to hash the compressed bytes behind the scan.
    pub fn take_boundaries(&mut self) -> Vec<Boundary> {
        // A checkpoint that no output follows can still turn out to be the end.
        let now = self.inflater.out();
        let fresh = &self.checkpoints[self.taken..];
        let count = fresh
            .iter()
            .take_while(|checkpoint| checkpoint.out.0 < now || checkpoint.out.0 == 0)
            .count();
        self.taken += count;
        fresh[..count]
            .iter()
            .map(|checkpoint| Boundary { bit: checkpoint.bit, out: checkpoint.out })
            .collect()
    }

    /// Number of uncompressed bytes so far.
    #[must_use]
    pub fn uncompressed_len(&self) -> Bytes {
        Bytes(self.inflater.out())
    }

    /// The index, once the whole layer has been fed. It can hold boundaries that
    /// [`take_boundaries`](Self::take_boundaries) never returned;
    /// [`GzipSegmentHasher::finish`](super::GzipSegmentHasher::finish) takes them from it.
    ///
    /// # Errors
    /// [`GzipError`] if the stream is damaged or incomplete.
    pub fn finish(mut self) -> Result<GzipIndex, GzipError> {
        if let Some(error) = self.failed {
            return Err(error);
        }
        if !self.inflater.at_end() {
            return Err(GzipError::Truncated { at: Bytes(self.inflater.input_end()) });
        }
        let end = self.inflater.out();
        self.crc_to(end);
        self.mark(u64::MAX);
        while end > self.zone_end() && self.choose(end) {}
        while self.checkpoints.len() > 1
            && self.checkpoints.last().is_some_and(|last| last.out.0 >= end)
        {
            self.checkpoints.pop();
            self.crc_before.pop();
        }
        let mut crc32 = Vec::with_capacity(self.checkpoints.len());
        for (i, checkpoint) in self.checkpoints.iter().enumerate() {
            let (next, after) = match self.checkpoints.get(i + 1) {
                Some(next) => (next.out.0, self.crc_before[i + 1]),
                None => (end, self.crc.clone().finalize()),
            };
            crc32.push(crc_between(self.crc_before[i], after, next - checkpoint.out.0));
        }
        Ok(GzipIndex {
            layer: None,
            span: Bytes(self.span),
            compressed_len: Bytes(self.inflater.input_end()),
            uncompressed_len: Bytes(end),
            members: self.inflater.members(),
            checkpoints: self.checkpoints,
            crc32: Some(crc32),
            sha256: None,
        })
    }

    fn hand_on<E>(&mut self, sink: &mut dyn FnMut(&[u8]) -> Result<(), E>) -> Result<(), E> {
        self.crc_to(self.inflater.out());
        match self.inflater.hand_on() {
            [] => Ok(()),
            bytes => sink(bytes),
        }
    }

    /// Output position of the last checkpoint.
    fn last(&self) -> u64 {
        self.checkpoints.last().map_or(0, |last| last.out.0)
    }

    /// First output position at which a boundary may become the next checkpoint.
    ///
    /// A quarter of a span before the target. The zone must also start early enough for stored blocks, which
    /// cannot be cut and are up to 64 KiB long: if such a block reaches past the end of the zone, it must
    /// begin in the zone.
    fn zone_start(&self) -> u64 {
        let quarter = self.span - self.span / 4;
        self.last() + quarter.min((self.span + self.span / 4).saturating_sub(65536).max(1))
    }

    /// Last output position at which a boundary may become the next checkpoint.
    fn zone_end(&self) -> u64 {
        self.last() + self.span + self.span / 4 + self.zone_extra
    }

    fn has_candidate(&self) -> bool {
        self.candidates.front().is_some_and(|first| first.out <= self.zone_end())
    }

    /// Decodes up to the next event and handles it.
    fn step(&mut self) -> Result<InflateStop, GzipError> {
        let limit = self.limit();
        let stop = self.inflater.run(limit)?;
        self.check_input()?;
        match stop {
            InflateStop::Input => return Ok(stop),
            InflateStop::MemberEnd { crc32, len } => self.check_trailer(crc32, len)?,
            InflateStop::Limit | InflateStop::MemberStart | InflateStop::Block => {}
        }
        self.settle();
        match stop {
            InflateStop::MemberStart => self.boundary(true),
            InflateStop::Block => self.boundary(false),
            _ => {}
        }
        self.inflater.logging = self.unmarked
            || !self.candidates.is_empty()
            || self.inflater.out() >= self.zone_start();
        if !self.inflater.logging {
            self.inflater.log.clear();
        }
        Ok(stop)
    }

    /// Refuses a segment with too many compressed bytes. Only blocks that yield nothing make one: they have no output
    /// position at which it could be cut.
    fn check_input(&self) -> Result<(), GzipError> {
        let at = self.inflater.bit() / 8;
        let start = self.checkpoints.last().map_or(at, |last| last.bit.0 / 8);
        if at.saturating_sub(start) > MAX_SEGMENT.0 {
            let len = Bytes(at - start);
            return Err(GzipError::LongSegment { at: Bytes(start), part: "compressed", len });
        }
        Ok(())
    }

    /// The next output position at which a decision is due.
    fn limit(&self) -> u64 {
        let out = self.inflater.out();
        let (start, end) = (self.zone_start(), self.zone_end());
        let next = if out < start {
            start
        } else if self.has_candidate() {
            end + WINDOW as u64
        } else if self.overdue {
            u64::MAX
        } else {
            end
        };
        next.min(self.inflater.buffer_end())
    }

    /// Takes the decisions that are due at the present output position.
    fn settle(&mut self) {
        let out = self.inflater.out();
        self.mark(out);
        if out >= self.zone_end()
            && !self.has_candidate()
            && !self.checkpoints.is_empty()
            && !self.overdue
        {
            if self.inflater.inside_symbols() {
                self.crc_to(out);
                self.checkpoints.push(Checkpoint {
                    bit: Bits(self.inflater.bit()),
                    out: Bytes(out),
                    kind: CheckpointKind::MidBlock(self.inflater.block_header_bits()),
                    window: SparseWindow::none(),
                });
                self.crc_before.push(self.crc.clone().finalize());
                self.unmarked = true;
                self.candidates.clear();
            } else {
                self.overdue = true;
            }
        }
        while self.has_candidate() && out >= self.zone_end() + WINDOW as u64 && self.choose(out) {}
    }

    /// Marks the windows of candidates that lie at least 32 KiB before `out`.
    fn mark(&mut self, out: u64) {
        if self.unmarked
            && let Some(last) = self.checkpoints.last_mut()
            && out.saturating_sub(last.out.0) >= WINDOW as u64
        {
            let at = last.out.0;
            if let Some((marks, _)) = self.inflater.log.used(at, u32::MAX) {
                let window = self.inflater.output(at.saturating_sub(WINDOW as u64), at);
                last.window = self.packer.pack(&masked(window, &marks));
            }
            self.unmarked = false;
        }
        // With short spans, a candidate that is not the best here can be needed next, so all are kept.
        let mut best = u32::MAX;
        let prune = self.span >= 4 * WINDOW as u64;
        let zone_end = self.zone_end();
        for candidate in &mut self.candidates {
            if candidate.marked.is_none() && out.saturating_sub(candidate.out) >= WINDOW as u64 {
                let bound = if prune && candidate.out <= zone_end { best } else { u32::MAX };
                let marked = self.inflater.log.used(candidate.out, bound).map(|(marks, used)| {
                    let from = candidate.out.saturating_sub(WINDOW as u64);
                    (used, Some(masked(self.inflater.output(from, candidate.out), &marks)))
                });
                candidate.marked = Some(marked.unwrap_or((u32::MAX, None)));
            }
            if let Some((used, _)) = candidate.marked {
                best = best.min(used);
            }
        }
    }

    /// Makes the best candidate of the zone before output position `end` a checkpoint.
    fn choose(&mut self, end: u64) -> bool {
        let target = self.last() + self.span;
        let zone_end = self.zone_end();
        let key = |candidate: &Candidate| {
            let used = candidate.marked.as_ref().map_or(u32::MAX, |&(used, _)| used);
            (used, candidate.out.abs_diff(target))
        };
        let best = self
            .candidates
            .iter()
            .enumerate()
            .filter(|(_, candidate)| candidate.out <= zone_end && candidate.out < end)
            .min_by_key(|(_, candidate)| key(candidate))
            .map(|(i, _)| i);
        let Some(chosen) = best.and_then(|i| self.candidates.drain(..=i).next_back()) else {
            return false;
        };
        let window = chosen.marked.and_then(|(_, window)| window);
        self.checkpoints.push(Checkpoint {
            bit: Bits(chosen.bit),
            out: Bytes(chosen.out),
            kind: if chosen.member_start {
                CheckpointKind::MemberStart
            } else {
                CheckpointKind::Block
            },
            window: window.map_or_else(SparseWindow::none, |window| self.packer.pack(&window)),
        });
        self.crc_before.push(chosen.crc);
        self.overdue = false;
        self.zone_extra = 0;
        let start = self.zone_start();
        self.candidates.retain(|candidate| candidate.out >= start);
        true
    }

    /// Adds the present position to the candidates if it lies in the zone.
    fn boundary(&mut self, member_start: bool) {
        let (bit, out) = (self.inflater.bit(), self.inflater.out());
        if self.checkpoints.is_empty() {
            self.checkpoints.push(Checkpoint {
                bit: Bits(bit),
                out: Bytes(out),
                kind: CheckpointKind::MemberStart,
                window: SparseWindow::none(),
            });
            self.crc_before.push(0);
        }
        // Blocks can be as short as a byte; so many candidates would only cost time.
        let spacing = self.span / 128;
        let crowded =
            !self.candidates.is_empty() && out < self.last_candidate + spacing && !member_start;
        if out <= self.last() || out < self.zone_start() || crowded {
            return;
        }
        if self.candidates.back().is_some_and(|last| last.out == out) {
            self.candidates.pop_back();
        }
        self.last_candidate = out;
        self.crc_to(out);
        let marked = member_start.then_some((0, None));
        let crc = self.crc.clone().finalize();
        self.candidates.push_back(Candidate { bit, out, crc, member_start, marked });
        if self.overdue {
            self.zone_extra += out.saturating_sub(self.zone_end());
        }
    }

    fn crc_to(&mut self, out: u64) {
        self.crc.update(self.inflater.output(self.crc_at, out));
        self.crc_at = out;
    }

    fn check_trailer(&mut self, crc32: u32, len: u32) -> Result<(), GzipError> {
        let out = self.inflater.out();
        self.crc_to(out);
        let member_len = out - self.inflater.member_at();
        let crc = self.crc.clone().finalize();
        let found = crc_between(self.member_crc, crc, member_len);
        self.member_crc = crc;
        let at = Bytes(self.inflater.bit() / 8 - 8);
        if found != crc32 {
            return Err(GzipError::Trailer { at, what: "CRC-32", found, expected: crc32 });
        }
        if member_len as u32 != len {
            return Err(GzipError::Trailer {
                at,
                what: "length",
                found: member_len as u32,
                expected: len,
            });
        }
        Ok(())
    }
}

/// CRC-32 of the last `len` bytes of data with CRC-32 `after`; `before` is the CRC-32 of all bytes before
/// them.
fn crc_between(before: u32, after: u32, len: u64) -> u32 {
    if before == 0 {
        return after; // this covers the case of no bytes; a shifted zero is zero
    }
    let mut shifted = crc32fast::Hasher::new_with_initial_len(before, 0);
    shifted.combine(&crc32fast::Hasher::new_with_initial_len(0, len));
    shifted.finalize() ^ after
}
