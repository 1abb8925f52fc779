//! Finds the cuts of a zstd layer into segments during its first decoding.
//!
//! A segment is as many whole frames as fit into the span, or one longer frame. Only a frame longer than
//! [`LONG`] is cut inside: at the first end of a block behind each span. The scan learns that a frame is long
//! only when it reaches that length; until then it only notes the positions inside the frame.

use std::ops::Range;

use zstd::stream::raw::{Decoder, InBuffer, Operation, OutBuffer};

use super::{Encoding, ScannedLayer, Segment, SegmentEntry};
use crate::units::Bytes;
use crate::zstandard::walk::{Edge, PieceKind, Walker};
use crate::zstandard::{MOST_INPUT, ZstdError};

const _: () =
    assert!(MOST_INPUT == super::MAX_SEGMENT.0, "what has no end of a segment becomes one");

/// Length of a frame's output above which it is cut inside: 4 MiB, or the span if that is longer. Decoding 4
/// MiB for one read takes some milliseconds.
pub const LONG: Bytes = Bytes(4 << 20);

/// Longest run of skippable frames that becomes part of a segment: 64 KiB. A longer run would be fetched
/// without need.
const LONG_GAP: u64 = 64 << 10;

/// Longest span, 8 MiB: the last stretches of a long frame stay open, and with them up to three spans, which
/// [`MOST_INPUT`] must hold.
const LONGEST_SPAN: u64 = MOST_INPUT / 4;

/// Bytes decoded at a time.
const STEP: usize = 256 << 10;

/// A stretch of the blob that becomes a segment or a part of one.
struct Stretch {
    input: Range<u64>,
    output: Range<u64>,
    entry: SegmentEntry,
    crc: crc32fast::Hasher,
}

impl Stretch {
    fn begin(input: u64, output: u64, entry: SegmentEntry) -> Self {
        Self { input: input..input, output: output..output, entry, crc: crc32fast::Hasher::new() }
    }

    fn out_len(&self) -> u64 {
        self.output.end - self.output.start
    }

    /// Joins two stretches; `next` follows at once, or behind skipped bytes.
    fn join(&mut self, next: &Stretch) {
        self.input.end = next.input.end;
        self.output.end = next.output.end;
        self.crc.combine(&next.crc);
    }
}

/// The frame that is being scanned.
struct ScannedFrame {
    /// Stretches between the positions where the frame can be cut; the last is still being decoded.
    stretches: Vec<Stretch>,
    start: u64,
    is_long: bool,
}

/// Decodes a layer as it arrives, and cuts it into segments.
pub struct FramesScanner {
    span: u64,
    long: u64,
    walker: Walker,
    decoder: Decoder<'static>,
    buffer: Vec<u8>,
    /// Number of output bytes so far.
    out: u64,
    /// Whole frames that are not part of a segment yet.
    open: Option<Stretch>,
    frame: Option<ScannedFrame>,
    segments: Vec<Segment>,
    /// Number of segments that were returned.
    taken: usize,
}

impl FramesScanner {
    /// A scanner at the first byte of a layer, for segments of about `span`, 8 MiB at most.
    ///
    /// # Errors
    /// [`ZstdError::Decoder`].
    pub fn new(span: Bytes) -> Result<Self, ZstdError> {
        let span = span.0.clamp(1, LONGEST_SPAN);
        Ok(Self {
            span,
            long: span.max(LONG.0),
            walker: Walker::default(),
            decoder: Decoder::new().map_err(ZstdError::Decoder)?,
            buffer: vec![0; STEP],
            out: 0,
            open: None,
            frame: None,
            segments: Vec::new(),
            taken: 0,
        })
    }

    /// Decodes all of `input` into `sink`.
    ///
    /// # Errors
    /// [`ZstdError`], or the error of `sink`.
    pub fn feed<E: From<ZstdError>>(
        &mut self,
        mut input: &[u8],
        sink: &mut dyn FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        while let Some(piece) = self.walker.next(input)? {
            let (now, later) = input.split_at(piece.taken);
            input = later;
            match piece.part {
                PieceKind::Skipped => self.close_before_gap(),
                PieceKind::Header => self.begin_frame(sink)?,
                PieceKind::Body => self.decode(now, sink)?,
            }
            match piece.edge {
                Edge::None => {}
                Edge::Block => self.end_block(),
                Edge::Frame => self.end_frame()?,
            }
        }
        if self.walker.at() - self.keep_from() > MOST_INPUT {
            return Err(ZstdError::Empty { at: self.walker.at() }.into());
        }
        Ok(())
    }

    fn begin_frame<E: From<ZstdError>>(
        &mut self,
        sink: &mut dyn FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let start = self.walker.frame();
        let stretches = vec![Stretch::begin(start, self.out, SegmentEntry::Start)];
        self.frame = Some(ScannedFrame { stretches, start: self.out, is_long: false });
        self.decoder.reinit().map_err(ZstdError::Decoder)?;
        let header = self.walker.header().to_vec();
        self.decode(&header, sink)
    }

    /// Ends the open segment if many bytes were skipped behind it.
    fn close_before_gap(&mut self) {
        let at = self.walker.at();
        if self.open.as_ref().is_some_and(|open| at - open.input.end > LONG_GAP) {
            self.close_open();
        }
    }

    /// Decodes bytes of a frame.
    fn decode<E: From<ZstdError>>(
        &mut self,
        bytes: &[u8],
        sink: &mut dyn FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut input = InBuffer::around(bytes);
        loop {
            let mut output = OutBuffer::around(&mut self.buffer[..]);
            let (before, capacity) = (input.pos(), output.capacity());
            let run = self.decoder.run(&mut input, &mut output);
            run.map_err(|source| ZstdError::Frame { at: self.walker.frame(), source })?;
            let filled = output.pos();
            self.out += filled as u64;
            if let Some(stretch) = self.frame.as_mut().and_then(|frame| frame.stretches.last_mut())
            {
                stretch.crc.update(&self.buffer[..filled]);
                stretch.output.end = self.out;
            }
            sink(&self.buffer[..filled])?;
            // If the buffer is full, the decoder may hold more output.
            if filled < capacity && input.pos() == bytes.len() {
                return Ok(());
            }
            if filled == 0 && input.pos() == before {
                let at = self.walker.frame();
                let rule = "a frame continues behind its end";
                return Err(ZstdError::Damaged { at, rule }.into());
            }
        }
    }

    /// Notes a position where the frame can be cut, and cuts there if the frame is a long one.
    fn end_block(&mut self) {
        let (at, out) = (self.walker.at(), self.out);
        let Some(frame) = &mut self.frame else { return };
        let Some(last) = frame.stretches.last_mut() else { return };
        last.input.end = at;
        if last.out_len() >= self.span {
            frame.stretches.push(Stretch::begin(at, out, SegmentEntry::Inside));
        }
        if !frame.is_long && out - frame.start > self.long {
            frame.is_long = true;
            self.close_open();
        }
        self.close_inside();
    }

    /// Makes segments of the stretches of a long frame, except the last two: the one that is being decoded,
    /// and the one that it joins if it yields no output.
    fn close_inside(&mut self) {
        let Some(frame) = self.frame.as_mut().filter(|frame| frame.is_long) else { return };
        let whole = frame.stretches.len().saturating_sub(2);
        let done: Vec<Stretch> = frame.stretches.drain(..whole).collect();
        self.segments.extend(done.iter().map(close));
    }

    fn end_frame(&mut self) -> Result<(), ZstdError> {
        // Header and checksum have passed through the decoder; it must agree that this is the end.
        let Some(mut frame) = self.frame.take() else { return Ok(()) };
        if let Some(last) = frame.stretches.last_mut() {
            last.input.end = self.walker.at();
        }
        // A stretch without output belongs to the one before it.
        while let [.., before, last] = &mut frame.stretches[..]
            && last.out_len() == 0
        {
            before.join(last);
            frame.stretches.pop();
        }
        if frame.is_long || self.out - frame.start > self.long {
            self.close_open();
            self.segments.extend(frame.stretches.iter().map(close));
            return Ok(());
        }
        let mut stretches = frame.stretches.into_iter();
        let Some(mut whole) = stretches.next() else { return Ok(()) };
        stretches.for_each(|next| whole.join(&next));
        self.add(whole);
        Ok(())
    }

    /// Adds a whole frame to the open segment.
    fn add(&mut self, frame: Stretch) {
        let fits = |open: &&mut Stretch| open.out_len() + frame.out_len() <= self.span;
        match self.open.as_mut().filter(fits) {
            Some(open) => open.join(&frame),
            None => {
                self.close_open();
                // An empty frame alone forms no segment.
                self.open = Some(frame).filter(|frame| frame.out_len() > 0);
            }
        }
        let open = self.open.as_ref();
        if open.is_some_and(|open| {
            open.out_len() >= self.span || open.input.end - open.input.start > MOST_INPUT / 2
        }) {
            self.close_open();
        }
    }

    fn close_open(&mut self) {
        self.segments.extend(self.open.take().as_ref().map(close));
    }

    /// Blob offset before which no further segment begins.
    #[must_use]
    pub fn keep_from(&self) -> u64 {
        let open = self.open.as_ref();
        let frame = self.frame.as_ref().and_then(|frame| frame.stretches.first());
        open.or(frame).map_or(self.walker.keep_from(), |first| first.input.start)
    }

    /// Takes the segments that have become final since the last call.
    pub fn take_segments(&mut self) -> Vec<Range<u64>> {
        let new = self.segments[self.taken..].iter().map(Segment::input).collect();
        self.taken = self.segments.len();
        new
    }

    /// Ends the layer.
    ///
    /// # Errors
    /// [`ZstdError::Truncated`] inside a frame.
    pub fn finish(mut self) -> Result<ScannedLayer, ZstdError> {
        let at = self.walker.at();
        if self.walker.is_inside() {
            return Err(ZstdError::Truncated { at });
        }
        self.close_open();
        Ok(ScannedLayer {
            encoding: Encoding::Zstd,
            span: Bytes(self.span),
            compressed_len: Bytes(at),
            uncompressed_len: Bytes(self.out),
            segments: self.segments,
        })
    }
}

/// Makes a segment. All lengths are at most [`MOST_INPUT`]: two spans, and a block.
fn close(stretch: &Stretch) -> Segment {
    Segment {
        start: stretch.input.start,
        len: (stretch.input.end - stretch.input.start) as u32,
        out: stretch.output.start,
        out_len: stretch.out_len() as u32,
        entry: stretch.entry,
        crc32: stretch.crc.clone().finalize(),
    }
}
