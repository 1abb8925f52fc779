//! Decoding segments: whole frames at once, a long one piece by piece.

use zstd::bulk::Decompressor;
use zstd::stream::raw::{Decoder, InBuffer, Operation, OutBuffer};

/// Why a segment cannot be had, as a reason for [`ChunkError::Damaged`](source::chunk::ChunkError).
type Reason = String;

/// What a thread needs to decode segments of whole frames. Kept between calls: making it allocates.
pub struct FramesDecoder(Decompressor<'static>);

impl FramesDecoder {
    /// A new one.
    ///
    /// # Errors
    /// That there is no memory for it, as a reason.
    pub fn new() -> Result<Self, Reason> {
        Decompressor::new().map(Self).map_err(|error| format!("no decoder can be made: {error}"))
    }

    /// Decodes frames, whose output is as long as `room`; those to be skipped are skipped. The output is the
    /// window here, so a frame's own needs no memory.
    ///
    /// # Errors
    /// What is wrong with them, as a reason.
    pub fn decode(&mut self, encoded: &[u8], room: &mut [u8]) -> Result<(), Reason> {
        match self.0.decompress_to_buffer(encoded, room) {
            Ok(len) if len == room.len() => Ok(()),
            Ok(_) => Err("it decodes to fewer bytes than its index says".to_owned()),
            Err(error) => Err(format!("it does not decode: {error}")),
        }
    }
}

/// A long frame, as far as it is decoded. It holds the frame's window and little else.
pub struct FrameDecoder(Decoder<'static>);

impl FrameDecoder {
    /// At the beginning of a frame.
    ///
    /// # Errors
    /// That there is no memory for it, as a reason.
    pub fn new() -> Result<Self, Reason> {
        Decoder::new().map(Self).map_err(|error| format!("no decoder can be made: {error}"))
    }

    /// Decodes the next whole blocks, whose output is as long as `room`.
    ///
    /// # Errors
    /// What is wrong with them, as a reason; then the decoder is of no further use.
    pub fn decode_next(&mut self, encoded: &[u8], room: &mut [u8]) -> Result<(), Reason> {
        let mut input = InBuffer::around(encoded);
        let mut filled = 0;
        let mut surplus = [0; 64];
        loop {
            let is_full = filled == room.len();
            let target = if is_full { &mut surplus[..] } else { &mut room[filled..] };
            let mut output = OutBuffer::around(target);
            let before = input.pos();
            let run = self.0.run(&mut input, &mut output);
            run.map_err(|error| format!("it does not decode: {error}"))?;
            let made = output.pos();
            if is_full && made > 0 {
                return Err("it decodes to more bytes than its index says".to_owned());
            }
            filled += made;
            if input.pos() == encoded.len() && filled == room.len() {
                return Ok(());
            }
            if made == 0 && input.pos() == before {
                return Err("it does not decode to its length".to_owned());
            }
        }
    }
}
