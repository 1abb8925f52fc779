//! Decoding of one segment alone.
//!
//! libdeflate is the fastest decoder, but it takes only whole streams that start at a byte and have no
//! history. So a stream is built around the untouched compressed bytes of the segment:
//!
//! 1. a *stored block* with the window: the history becomes output, which is dropped afterwards;
//! 2. *alignment blocks*, empty: a fixed one takes 10 bits, a dynamic one 91, so at most four of them move
//!    the stream to any of the eight bit positions within a byte;
//! 3. for a checkpoint inside a block, that block's header;
//! 4. the segment's bytes; in the first byte, the bits before the checkpoint are overwritten;
//! 5. if the next checkpoint lies inside a block, the code that ends that block; then an empty final block.
//!
//! Shifting the compressed bytes instead would fail: a stored block among them is aligned to the original
//! bytes.
//!
//! A segment in which one member ends and another begins is not one deflate stream. libdeflate stops at the
//! end of the first member, before the expected length, and the scan's own decoder decodes the rest.

use std::ops::Range;

use libdeflater::Decompressor;
use sha2::{Digest as _, Sha256};

use super::GzipError;
use super::decoder::{InflateStop, Inflater};
use super::index::{Checkpoint, CheckpointKind, GzipIndex};
use inflate::marks::WINDOW;

/// Room in front of a segment's compressed bytes: a stored block with the window (5 + 32768 bytes),
/// at most four alignment blocks (121 bits) and the longest block header (563 bytes).
pub(super) const HEADROOM: usize = 5 + WINDOW + 16 + super::index::MAX_HEADER_BITS.div_ceil(8) + 1;
/// Room behind the segment's bytes: an end of block code and an empty final block take 25 bits.
pub(super) const TAILROOM: usize = 8;

/// A writer of bits over a buffer, low bit first.
struct BitWriter<'a> {
    room: &'a mut [u8],
    bit: usize,
}

impl BitWriter<'_> {
    fn put(&mut self, value: u64, count: usize) {
        for i in 0..count {
            if let Some(byte) = self.room.get_mut(self.bit / 8) {
                let mask = 1 << (self.bit % 8);
                *byte = if value >> i & 1 == 1 { *byte | mask } else { *byte & !mask };
            }
            self.bit += 1;
        }
    }

    /// Writes an empty fixed block: 10 bits.
    fn fixed_block(&mut self, last: bool) {
        self.put(u64::from(last) | 1 << 1, 10);
    }

    /// Writes an empty dynamic block: 91 bits. Its codes: literal 0 and the end of the block with one bit
    /// each, one distance code of one bit.
    fn dynamic_block(&mut self) {
        self.put(2 << 1, 3);
        self.put(0, 10); // 257 literal and length codes, 1 distance code
        self.put(14, 4); // 18 lengths of the code length code
        // The two used symbols, 18 and 1, are third and last in the stored order.
        for i in 0..18 {
            self.put(u64::from(i == 2 || i == 17), 3);
        }
        self.put(0, 1); // literal 0: length 1
        self.put(1 | 127 << 1, 8); // 138 zeros
        self.put(1 | 106 << 1, 8); // 117 zeros
        self.put(0, 1); // end of block: length 1
        self.put(0, 1); // distance: length 1
        self.put(1, 1); // end of block
    }

    /// Advances from a bit position that is 0 modulo 8 to one that is `phase` modulo 8.
    fn align(&mut self, phase: usize) {
        let (dynamic, fixed) =
            [(0, 0), (1, 3), (0, 1), (1, 0), (0, 2), (1, 1), (0, 3), (1, 2)][phase % 8];
        for _ in 0..dynamic {
            self.dynamic_block();
        }
        for _ in 0..fixed {
            self.fixed_block(false);
        }
    }
}

/// Reason for the failure of a segment, for [`ChunkError::Damaged`](source::chunk::ChunkError).
type Reason = String;

/// State of a thread that decodes segments. Kept between calls, because making it allocates.
pub(super) struct SegmentDecoder(Decompressor);

impl SegmentDecoder {
    pub(super) fn new() -> Self {
        Self(Decompressor::new())
    }

    /// Checks and decodes segment `i` of `index` into `room`, and returns the range of the output in it. The
    /// segment must exist; `room` must be as long as its window and its output.
    ///
    /// `buffer` holds the segment's compressed bytes ([`GzipIndex::input`]) between [`HEADROOM`] and [`TAILROOM`]
    /// bytes of any content; on return all bytes are unchanged.
    pub(super) fn decode(
        &mut self,
        index: &GzipIndex,
        i: usize,
        buffer: &mut [u8],
        room: &mut [u8],
    ) -> Result<Range<usize>, Reason> {
        let input = HEADROOM..buffer.len().saturating_sub(TAILROOM);
        let compressed = buffer.get(input.clone()).ok_or("the buffer is too short")?;
        if let Some(digests) = &index.sha256
            && digests.get(i).is_none_or(|digest| Sha256::digest(compressed)[..] != digest[..])
        {
            return Err("its compressed bytes do not match their SHA-256".to_owned());
        }
        let data = index.window_len(i)..room.len();
        if !self.stitched(index, i, buffer, room)? {
            self.with_own_decoder(index, i, &buffer[input], room)?;
        }
        if let Some(crcs) = &index.crc32
            && crcs.get(i).is_none_or(|&crc| crc32fast::hash(&room[data.clone()]) != crc)
        {
            return Err("its output does not match its CRC-32".to_owned());
        }
        Ok(data)
    }

    /// Decodes with libdeflate. Returns `false` if the deflate stream ends before the segment does.
    fn stitched(
        &mut self,
        index: &GzipIndex,
        i: usize,
        buffer: &mut [u8],
        room: &mut [u8],
    ) -> Result<bool, Reason> {
        let checkpoint = &index.checkpoints[i];
        let phase = checkpoint.bit.phase() as usize;
        let window_len = index.window_len(i);
        let end = buffer.len() - TAILROOM;
        let first_byte = buffer[HEADROOM];
        let last_byte = buffer[end - 1];

        // The prefix is written from the start of the headroom, because its length is not known before.
        // Afterwards it is moved up to the compressed bytes.
        let mut prefix = [0; HEADROOM - WINDOW];
        let mut writer = BitWriter { room: &mut prefix, bit: 0 };
        if let CheckpointKind::MidBlock(header) = &checkpoint.kind {
            writer.align((phase + 8 - header.bits() % 8) % 8);
            let mut left = header.bits();
            for &byte in header.bytes() {
                writer.put(u64::from(byte), left.min(8));
                left -= left.min(8);
            }
        } else {
            writer.align(phase);
        }
        let bits = writer.bit;
        let whole = bits / 8;
        let mut start = HEADROOM - whole;
        buffer[start..HEADROOM].copy_from_slice(&prefix[..whole]);
        let low = (1u8 << phase) - 1;
        buffer[HEADROOM] = first_byte & !low | prefix[whole] & low;
        if window_len > 0 {
            start -= WINDOW;
            self.unpack(checkpoint, &mut buffer[start..start + WINDOW])?;
            start -= 5;
            buffer[start..start + 5].copy_from_slice(&[0, 0x00, 0x80, 0xff, 0x7f]);
        }
        if let Some(next) = index.checkpoints.get(i + 1) {
            let into =
                (end - 1) * 8 + if next.bit.phase() == 0 { 8 } else { next.bit.phase() as usize };
            let mut tail = BitWriter { room: buffer, bit: into };
            if let CheckpointKind::MidBlock(header) = &next.kind {
                let (code, bits) = header
                    .end_of_block()
                    .ok_or("the block header of the next checkpoint is damaged")?;
                tail.put(u64::from(code), bits as usize);
            }
            tail.fixed_block(true);
        }

        let result = self.0.deflate_decompress(&buffer[start..], room);
        buffer[end - 1] = last_byte;
        buffer[HEADROOM] = first_byte;
        match result {
            Ok(got) => Ok(got == room.len()),
            Err(_) => Err("it does not inflate to its length".to_owned()),
        }
    }

    fn unpack(&mut self, checkpoint: &Checkpoint, room: &mut [u8]) -> Result<(), Reason> {
        checkpoint.window.unpack(room, &mut self.0).map_err(str::to_owned)
    }

    /// Decodes with the decoder of the scan, which continues behind the end of a member.
    fn with_own_decoder(
        &mut self,
        index: &GzipIndex,
        i: usize,
        input: &[u8],
        room: &mut [u8],
    ) -> Result<(), Reason> {
        let checkpoint = &index.checkpoints[i];
        let (window, out) = room.split_at_mut(index.window_len(i));
        if !window.is_empty() {
            self.unpack(checkpoint, window)?;
        }
        let header = match &checkpoint.kind {
            CheckpointKind::MidBlock(header) => Some(header),
            CheckpointKind::MemberStart | CheckpointKind::Block => None,
        };
        let reason = |error: GzipError| error.to_string();
        let mut inflater = Inflater::resume(checkpoint.bit.0, window, header).map_err(reason)?;
        let end = inflater.out() + out.len() as u64;
        let mut filled = 0;
        let mut rest = input;
        while filled < out.len() {
            if inflater.out() >= inflater.buffer_end() {
                inflater.slide();
            }
            let stop = inflater.run(end.min(inflater.buffer_end())).map_err(reason)?;
            let more = inflater.hand_on();
            out.get_mut(filled..filled + more.len())
                .ok_or("it inflates to more than its length")?
                .copy_from_slice(more);
            filled += more.len();
            if stop == InflateStop::Input {
                if rest.is_empty() {
                    return Err("it does not inflate to its length".to_owned());
                }
                rest = inflater.take_input(rest);
            }
        }
        Ok(())
    }
}
