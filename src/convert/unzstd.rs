//! zstd layers, decoded as they arrive.
//!
//! Only a native conversion takes them: TurboOCI's index can point into gzip alone.

use std::io;

use zstd::stream::raw::{Decoder, InBuffer, Operation, OutBuffer};

use super::LayerError;

/// Bytes decoded at a time.
const STEP: usize = 256 << 10;

/// Decodes frames one after the other; those to be skipped are skipped.
pub(super) struct Unzstd {
    decoder: Decoder<'static>,
    out: Vec<u8>,
    /// Bytes that the decoder wishes for; 0 at the end of a frame.
    wanted: usize,
    /// The frame has ended and the next one, if any, needs a fresh start.
    ended: bool,
}

impl Unzstd {
    pub(super) fn new() -> Result<Self, LayerError> {
        let decoder = Decoder::new().map_err(LayerError::Zstd)?;
        Ok(Self { decoder, out: vec![0; STEP], wanted: 1, ended: false })
    }

    /// Decodes all of `piece` into `sink`.
    pub(super) fn feed(
        &mut self,
        piece: &[u8],
        sink: &mut dyn FnMut(&[u8]) -> Result<(), LayerError>,
    ) -> Result<(), LayerError> {
        let mut input = InBuffer::around(piece);
        loop {
            if self.ended {
                if input.pos() == piece.len() {
                    return Ok(());
                }
                self.decoder.reinit().map_err(LayerError::Zstd)?;
                self.ended = false;
            }
            let mut output = OutBuffer::around(&mut self.out[..]);
            let (before, capacity) = (input.pos(), output.capacity());
            self.wanted = self.decoder.run(&mut input, &mut output).map_err(LayerError::Zstd)?;
            self.ended = self.wanted == 0;
            let filled = output.pos();
            sink(&self.out[..filled])?;
            // A full buffer may have left more inside the decoder.
            let idle = input.pos() == before && filled == 0;
            if !self.ended && (idle || (input.pos() == piece.len() && filled < capacity)) {
                return Ok(());
            }
        }
    }

    /// Ends the layer.
    pub(super) fn finish(&self) -> Result<(), LayerError> {
        if self.ended {
            return Ok(());
        }
        let cut = "the zstd stream breaks off within a frame";
        Err(LayerError::Zstd(io::Error::new(io::ErrorKind::UnexpectedEof, cut)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decode(bytes: &[u8], cut: usize) -> Result<Vec<u8>, LayerError> {
        let mut unzstd = Unzstd::new()?;
        let mut out = Vec::new();
        for piece in bytes.chunks(cut) {
            unzstd.feed(piece, &mut |bytes| {
                out.extend_from_slice(bytes);
                Ok(())
            })?;
        }
        unzstd.finish()?;
        Ok(out)
    }

    #[test]
    fn frames_and_frames_to_skip_are_decoded_in_any_pieces_and_a_cut_is_an_error() {
        let plain: Vec<u8> = (0..900_000_u32).map(|at| (at / 7) as u8 ^ (at >> 11) as u8).collect();
        let mut bytes = Vec::new();
        for part in plain.chunks(333_333) {
            bytes.extend(zstd::encode_all(part, 3).unwrap());
            bytes.extend([0x50, 0x2a, 0x4d, 0x18, 3, 0, 0, 0, 1, 2, 3]);
        }
        for cut in [1, 13, 4096, usize::MAX] {
            assert!(decode(&bytes, cut.min(bytes.len())).unwrap() == plain, "{cut}");
        }
        let one = zstd::encode_all(&plain[..], 3).unwrap();
        for len in [1, 3, 100, one.len() - 1] {
            assert!(matches!(decode(&one[..len], 64), Err(LayerError::Zstd(_))), "{len}");
        }
        let mut wrong = one;
        wrong[20] ^= 0x55;
        assert!(decode(&wrong, 4096).is_err() || decode(&wrong, 4096).unwrap() != plain);
    }
}
