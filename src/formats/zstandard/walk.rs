//! Walks over frames and blocks by their headers (RFC 8878, 3.1).
//!
//! ```text
//! frame      magic 28 b5 2f fd, descriptor, [window], [dictionary], [content size], blocks, [checksum, 4]
//! block      3 bytes: last (1 bit), kind (2 bits), size (21 bits); then its content
//! skippable  magic 5x 2a 4d 18, size (4), that many bytes
//! ```

use super::ZstdError;

/// Largest window of a frame, 128 MiB: the default limit of zstd's own decoder
/// (`ZSTD_WINDOWLOG_LIMIT_DEFAULT` is 27).
pub const MAX_WINDOW: u64 = 1 << 27;

/// Longest frame header: magic, descriptor, window, dictionary, content size.
const LONGEST_HEADER: usize = 4 + 1 + 1 + 4 + 8;
const MAGIC: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];
/// The magic of a skippable frame without its first byte, which is 50 to 5f.
const MAGIC_TO_SKIP: [u8; 3] = [0x2a, 0x4d, 0x18];

/// True if these are the first bytes of a zstd stream.
#[must_use]
pub fn is_zstd(bytes: &[u8]) -> bool {
    match bytes.first_chunk() {
        Some(&MAGIC) => true,
        Some([0x50..=0x5f, rest @ ..]) => *rest == MAGIC_TO_SKIP,
        _ => false,
    }
}

/// Kind of a piece of the stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PieceKind {
    /// The last part of a frame's header, which is then complete: see [`Walker::header`].
    Header,
    /// Bytes of a frame behind its header.
    Body,
    /// Bytes to be skipped.
    Skipped,
}

/// Position at the end of a piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Edge {
    /// No edge.
    None,
    /// The end of a block that others follow.
    Block,
    /// The end of a frame.
    Frame,
}

/// A piece of the stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StreamPiece {
    /// Kind of the piece.
    pub part: PieceKind,
    /// Bytes of the input in the piece; can be 0.
    pub taken: usize,
    /// Edge behind the piece.
    pub edge: Edge,
}

/// Position of the walk in the grammar, with the bytes left in that part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum WalkState {
    /// In the header of either kind of frame; between frames if no byte is held.
    FrameHeader,
    BlockHeader,
    Content {
        left: u64,
        last: bool,
    },
    Checksum {
        left: u64,
    },
    Skipped {
        left: u64,
    },
}

/// Cuts a stream into [`StreamPiece`]s.
pub struct Walker {
    state: WalkState,
    /// A header that is incomplete, or that was returned last.
    held: Vec<u8>,
    /// Blob offset behind the last byte that was walked over.
    at: u64,
    /// Offset of the current frame.
    frame: u64,
    has_checksum: bool,
}

impl Default for Walker {
    fn default() -> Self {
        let held = Vec::with_capacity(LONGEST_HEADER);
        Self { state: WalkState::FrameHeader, held, at: 0, frame: 0, has_checksum: false }
    }
}

impl Walker {
    /// Blob offset behind the last byte that was walked over.
    #[must_use]
    pub fn at(&self) -> u64 {
        self.at
    }

    /// Offset of the current frame.
    #[must_use]
    pub fn frame(&self) -> u64 {
        self.frame
    }

    /// Offset of the current frame; for a skippable frame, the present offset.
    #[must_use]
    pub fn keep_from(&self) -> u64 {
        if matches!(self.state, WalkState::Skipped { .. }) { self.at } else { self.frame }
    }

    /// The header of the frame, after the return of [`PieceKind::Header`].
    #[must_use]
    pub fn header(&self) -> &[u8] {
        &self.held
    }

    /// True inside a frame of either kind: begun and not at its end.
    #[must_use]
    pub fn is_inside(&self) -> bool {
        self.state != WalkState::FrameHeader || self.at > self.frame
    }

    fn damaged(&self, rule: &'static str) -> ZstdError {
        ZstdError::Damaged { at: self.at, rule }
    }

    /// The next piece of `input`; `None` if it has not enough bytes for a piece. All of them are taken then.
    ///
    /// # Errors
    /// [`ZstdError`] if a header breaks a rule.
    pub fn next(&mut self, input: &[u8]) -> Result<Option<StreamPiece>, ZstdError> {
        let body = |taken, edge| Some(StreamPiece { part: PieceKind::Body, taken, edge });
        match self.state {
            WalkState::FrameHeader => self.frame_header(input),
            WalkState::BlockHeader => self.block_header(input),
            WalkState::Content { left, last } => {
                let (taken, left) = self.advance(left, input);
                if left > 0 {
                    self.state = WalkState::Content { left, last };
                    return Ok(body(taken, Edge::None).filter(|_| taken > 0));
                }
                Ok(body(taken, self.end_block(last)))
            }
            WalkState::Checksum { left } => {
                let (taken, left) = self.advance(left, input);
                if left > 0 {
                    self.state = WalkState::Checksum { left };
                    return Ok(body(taken, Edge::None).filter(|_| taken > 0));
                }
                Ok(body(taken, self.end_frame()))
            }
            WalkState::Skipped { left } => {
                let (taken, left) = self.advance(left, input);
                let piece = StreamPiece { part: PieceKind::Skipped, taken, edge: Edge::None };
                if left > 0 {
                    self.state = WalkState::Skipped { left };
                    return Ok(Some(piece).filter(|_| taken > 0));
                }
                self.end_frame();
                Ok(Some(piece))
            }
        }
    }

    /// Takes up to `left` bytes; returns the number of bytes taken and the number left.
    fn advance(&mut self, left: u64, input: &[u8]) -> (usize, u64) {
        let taken = usize::try_from(left).unwrap_or(usize::MAX).min(input.len());
        self.at += taken as u64;
        (taken, left - taken as u64)
    }

    fn end_block(&mut self, last: bool) -> Edge {
        self.held.clear();
        match (last, self.has_checksum) {
            (false, _) => {
                self.state = WalkState::BlockHeader;
                Edge::Block
            }
            (true, true) => {
                self.state = WalkState::Checksum { left: 4 };
                Edge::None
            }
            (true, false) => self.end_frame(),
        }
    }

    fn end_frame(&mut self) -> Edge {
        self.state = WalkState::FrameHeader;
        self.held.clear();
        self.frame = self.at;
        Edge::Frame
    }

    /// Holds bytes of a header until there are `len`; returns the number of bytes taken, and true if the
    /// header is complete.
    fn hold(&mut self, len: usize, input: &[u8]) -> (usize, bool) {
        let taken = len.saturating_sub(self.held.len()).min(input.len());
        self.held.extend_from_slice(&input[..taken]);
        self.at += taken as u64;
        (taken, self.held.len() >= len)
    }

    fn frame_header(&mut self, input: &[u8]) -> Result<Option<StreamPiece>, ZstdError> {
        let (mut taken, whole) = self.hold(5, input);
        if !whole {
            return Ok(None);
        }
        let to_skip = self.held[1..4] == MAGIC_TO_SKIP && matches!(self.held[0], 0x50..=0x5f);
        if !to_skip && self.held[..4] != MAGIC {
            let rule = "neither a frame nor a skippable frame begins here";
            return Err(ZstdError::Damaged { at: self.frame, rule });
        }
        let descriptor = self.held[4];
        let len = if to_skip { 8 } else { header_len(descriptor) };
        let (more, whole) = self.hold(len, &input[taken..]);
        taken += more;
        if !whole {
            return Ok(None);
        }
        let part = if to_skip {
            self.state = WalkState::Skipped { left: number(&self.held[4..]) };
            PieceKind::Skipped
        } else {
            self.check_header(descriptor)?;
            self.has_checksum = descriptor & 4 != 0;
            self.state = WalkState::BlockHeader;
            PieceKind::Header
        };
        Ok(Some(StreamPiece { part, taken, edge: Edge::None }))
    }

    /// Refuses a frame that does not decode in bounded memory, or not at all.
    fn check_header(&self, descriptor: u8) -> Result<(), ZstdError> {
        if descriptor & 8 != 0 {
            return Err(self.damaged("a reserved bit of a frame header is set"));
        }
        let window = self.window(descriptor);
        if window > MAX_WINDOW {
            return Err(ZstdError::Window { at: self.frame, window });
        }
        let id = 5 + usize::from(descriptor & SINGLE == 0);
        match number(&self.held[id..id + dictionary_len(descriptor)]) as u32 {
            0 => Ok(()),
            dictionary => Err(ZstdError::Dictionary { at: self.frame, dictionary }),
        }
    }

    /// The window of the frame whose complete header is held.
    fn window(&self, descriptor: u8) -> u64 {
        if descriptor & SINGLE != 0 {
            // It has no window field, because its window is its whole content.
            let size = number(&self.held[5 + dictionary_len(descriptor)..]);
            return size.saturating_add(if descriptor >> 6 == 1 { 256 } else { 0 });
        }
        let (exponent, mantissa) = (self.held[5] >> 3, u64::from(self.held[5] & 7));
        let base = 1u64 << (10 + exponent);
        base + base / 8 * mantissa
    }

    fn block_header(&mut self, input: &[u8]) -> Result<Option<StreamPiece>, ZstdError> {
        if self.held.len() >= 3 {
            self.held.clear(); // the frame's header, which was returned
        }
        let (taken, whole) = self.hold(3, input);
        if whole {
            let header = number(&self.held);
            let (last, size) = (header & 1 != 0, header >> 3);
            let left = match header >> 1 & 3 {
                1 => 1, // one byte, repeated
                // libzstd ignores it when streaming, and refuses it when it decodes the frame as a whole.
                2 if size == 0 => return Err(self.damaged("a compressed block is empty")),
                3 => return Err(self.damaged("a block is of the reserved kind")),
                _ => size,
            };
            self.state = WalkState::Content { left, last };
        }
        let piece = StreamPiece { part: PieceKind::Body, taken, edge: Edge::None };
        Ok(Some(piece).filter(|_| taken > 0))
    }
}

/// The descriptor bit that marks a frame with a single segment.
const SINGLE: u8 = 0x20;

/// Length in bytes of a dictionary's number.
fn dictionary_len(descriptor: u8) -> usize {
    [0, 1, 2, 4][usize::from(descriptor & 3)]
}

/// The window, in bytes, of the frame at the start of these bytes; `None` if they start no frame, or one that
/// is refused.
#[must_use]
pub fn window(frame: &[u8]) -> Option<u64> {
    let mut walker = Walker::default();
    let piece = walker.next(frame).ok()??;
    (piece.part == PieceKind::Header).then(|| walker.window(walker.held[4]))
}

/// Length in bytes of the header of a frame with this descriptor.
fn header_len(descriptor: u8) -> usize {
    let single = descriptor & SINGLE != 0;
    let size = match descriptor >> 6 {
        0 => usize::from(single),
        flag => 1 << flag,
    };
    5 + usize::from(!single) + dictionary_len(descriptor) + size
}

/// A little-endian number of at most eight bytes.
fn number(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |number, &byte| number << 8 | u64::from(byte))
}
