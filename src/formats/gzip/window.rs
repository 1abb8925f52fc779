//! The 32 KiB of output before a checkpoint, mostly zeros, compressed.

use std::sync::Arc;

use libdeflater::{CompressionLvl, Compressor, Decompressor};

use inflate::marks::WINDOW;

/// The output before a checkpoint, unused bytes zero, kept as the zlib stream that a `gzip.meta` holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SparseWindow(Packed);

#[derive(Clone, Debug, PartialEq, Eq)]
enum Packed {
    None,
    Zlib(Arc<[u8]>),
    Raw(Arc<[u8]>),
}

impl SparseWindow {
    /// No history: at the start of a member.
    #[must_use]
    pub fn none() -> Self {
        Self(Packed::None)
    }

    /// From a zlib stream, not checked until it is unpacked.
    pub(super) fn from_zlib(stream: &[u8]) -> Self {
        Self(Packed::Zlib(stream.into()))
    }

    /// From 32 KiB as they are.
    pub(super) fn from_raw(window: &[u8]) -> Self {
        Self(Packed::Raw(window.into()))
    }

    /// Whether there is no history.
    #[must_use]
    pub fn is_none(&self) -> bool {
        matches!(self.0, Packed::None)
    }

    /// Bytes it takes.
    #[must_use]
    pub fn packed_len(&self) -> usize {
        match &self.0 {
            Packed::None => 0,
            Packed::Zlib(bytes) | Packed::Raw(bytes) => bytes.len(),
        }
    }

    /// The zlib stream, made if need be; of 32 KiB of zeros when there is no history.
    pub(super) fn zlib(&self, packer: &mut WindowPacker) -> Arc<[u8]> {
        match &self.0 {
            Packed::None => packer.zlib(&[0; WINDOW]).into(),
            Packed::Zlib(bytes) => bytes.clone(),
            Packed::Raw(bytes) => packer.zlib(bytes).into(),
        }
    }

    /// Writes the window into `room`, which must be 32 KiB long; zeros when there is no history.
    pub(super) fn unpack(
        &self,
        room: &mut [u8],
        decompressor: &mut Decompressor,
    ) -> Result<(), &'static str> {
        const DAMAGED: &str = "the window of its checkpoint is damaged";
        match &self.0 {
            Packed::None => room.fill(0),
            Packed::Zlib(stream) => {
                let len = decompressor.zlib_decompress(stream, room).map_err(|_| DAMAGED)?;
                if len != WINDOW || room.len() != WINDOW {
                    return Err(DAMAGED);
                }
            }
            Packed::Raw(bytes) if bytes.len() == room.len() => room.copy_from_slice(bytes),
            Packed::Raw(_) => return Err(DAMAGED),
        }
        Ok(())
    }
}

/// Level at which windows are compressed. Of 32 KiB that are zero but for some 900 bytes, level 5
/// makes 1124 bytes in 75 µs and level 9 makes 1120 in 500, a third of the time that the scan takes
/// for a whole segment.
pub(super) const LEVEL: u8 = 5;

/// Compresses windows: the same bytes for the same window.
pub(super) struct WindowPacker(Compressor);

impl WindowPacker {
    pub(super) fn new() -> Self {
        // The library has the levels 1 to 12.
        Self(Compressor::new(CompressionLvl::new(i32::from(LEVEL)).unwrap_or_default()))
    }

    pub(super) fn pack(&mut self, window: &[u8; WINDOW]) -> SparseWindow {
        SparseWindow::from_zlib(&self.zlib(window))
    }

    /// `bytes` as a zlib stream.
    pub(super) fn zlib(&mut self, bytes: &[u8]) -> Vec<u8> {
        let mut stream = vec![0; self.0.zlib_compress_bound(bytes.len())];
        // The bound is one: this cannot fail, and an empty stream would be refused when read.
        let len = self.0.zlib_compress(bytes, &mut stream).unwrap_or(0);
        stream.truncate(len);
        stream
    }
}
