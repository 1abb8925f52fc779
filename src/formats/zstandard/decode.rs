//! Decoding of segments: whole frames at once, a long frame piece by piece.

use zstd::bulk::Decompressor;
use zstd::stream::raw::{Decoder, InBuffer, Operation, OutBuffer};

/// Reason for the failure of a segment, for [`ChunkError::Damaged`](source::chunk::ChunkError).
type Reason = String;

/// State of a thread that decodes segments of whole frames. Kept between calls, because making it allocates.
pub struct FramesDecoder(Decompressor<'static>);

impl FramesDecoder {
    /// Makes a decoder.
    ///
    /// # Errors
    /// A reason if there is no memory for it.
    pub fn new() -> Result<Self, Reason> {
        Decompressor::new().map(Self).map_err(|error| format!("no decoder can be made: {error}"))
    }

    /// Decodes frames whose output is as long as `room`; skippable frames are skipped. The output serves as
    /// the window, so the window of a frame needs no memory.
    ///
    /// # Errors
    /// The reason of the failure.
    pub fn decode(&mut self, encoded: &[u8], room: &mut [u8]) -> Result<(), Reason> {
        match self.0.decompress_to_buffer(encoded, room) {
            Ok(len) if len == room.len() => Ok(()),
            Ok(_) => Err("it decodes to fewer bytes than its index says".to_owned()),
            Err(error) => Err(format!("it does not decode: {error}")),
        }
    }
}

/// A decoder of a long frame, at some block of it. It holds the frame's window and little else.
pub struct FrameDecoder(Decoder<'static>);

impl FrameDecoder {
    /// Makes a decoder at the beginning of a frame.
    ///
    /// # Errors
    /// A reason if there is no memory for it.
    pub fn new() -> Result<Self, Reason> {
        Decoder::new().map(Self).map_err(|error| format!("no decoder can be made: {error}"))
    }

    /// Decodes the next whole blocks; their output is as long as `room`.
    ///
    /// # Errors
    /// The reason of the failure; the decoder must then be dropped.
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
