//! The one trait between a virtual disk and its front ends for a kernel.
//!
//! A front end asks for the position of bytes `[a, b)`. The answer is either a list of [`Piece`]s, each an
//! address that stays valid as long as the piece lives (so a ublk worker can commit it without copying), or
//! [`Located::Pending`]: the volume has begun to load the missing bytes and will call the [`Waiter`] once,
//! from any thread. After an `Ok` call the front end asks again; after an `Err` it fails the request. No call
//! here blocks, except the convenience [`Volume::read_at`].
//!
//! A writable disk is a [`WritableVolume`] as well, and returns itself as one.
//!
//! Implementation: [`disk::Disk`](crate). For tests of front ends: `testing::MemoryVolume`, and
//! `testing::FaultyVolume`, which delays and fails.

use std::io;
use std::sync::{Arc, mpsc};

use thiserror::Error;

use crate::range::DiskRange;
use source::chunk::{ChunkBytes, ChunkError};
use source::{ByteSource, SharedBytes, SourceError};

/// Error of reading or writing a volume.
#[derive(Clone, Debug, Error)]
pub enum VolumeError {
    /// The request leaves the volume.
    #[error("Bytes {range} do not exist: the disk has {size} bytes")]
    PastEnd {
        /// The requested bytes.
        range: DiskRange,
        /// Size of the volume in bytes.
        size: u64,
    },
    /// A chunk of the range could not be loaded.
    #[error("Cannot read byte {offset} of the disk (layer {layer})")]
    Chunk {
        /// Byte of the volume.
        offset: u64,
        /// Layer of the image, 0 lowest.
        layer: usize,
        /// The chunk's failure.
        #[source]
        source: Arc<ChunkError>,
    },
    /// The volume was closed during the wait.
    #[error("The disk was closed before byte {offset} was read")]
    Closed {
        /// Byte of the volume.
        offset: u64,
    },
    /// The bytes did not arrive in time.
    #[error("Byte {offset} of the disk did not arrive within {seconds} s{}", so_far(.last))]
    Deadline {
        /// Byte of the volume.
        offset: u64,
        /// The deadline.
        seconds: u64,
        /// The last error in that time.
        last: Option<String>,
    },
    /// The writable layer failed.
    #[error("Cannot use the writable layer at byte {offset} of the disk")]
    Upper {
        /// Byte of the volume.
        offset: u64,
        /// The layer's failure.
        #[source]
        source: Arc<crate::writable::WritableError>,
    },
    /// The writable layer is of the kind without records of zeros.
    #[error(
        "Byte {offset} of the disk cannot be discarded: a sparse writable layer takes zeros only as data"
    )]
    NoDiscards {
        /// Byte of the volume.
        offset: u64,
    },
    /// The disk was found to show something else than its layers contain.
    #[error("The image does not show what its layers contain: {reason}")]
    Refused {
        /// The differences.
        reason: Arc<str>,
    },
    /// A failure injected by a test.
    #[error("Injected failure at byte {offset}")]
    Injected {
        /// Byte of the volume.
        offset: u64,
    },
}

fn so_far(last: &Option<String>) -> String {
    last.as_ref().map_or_else(String::new, |last| format!(": {last}"))
}

impl DiskRange {
    /// Tests that a disk of `size` bytes has it.
    ///
    /// # Errors
    /// [`VolumeError::PastEnd`].
    pub fn check(self, size: u64) -> Result<(), VolumeError> {
        if self.end() > size {
            return Err(VolumeError::PastEnd { range: self, size });
        }
        Ok(())
    }
}

impl VolumeError {
    /// True if the same read may succeed later, such as one from a registry that is unreachable now. False
    /// for bytes that were wrong several times, or a blob that does not exist.
    #[must_use]
    pub fn may_pass(&self) -> bool {
        let Self::Chunk { source, .. } = self else { return false };
        matches!(&**source, ChunkError::Source(SourceError::Remote { lasting: false, .. }))
    }

    /// The error number with which a block device answers: `ENOSPC` if the writable layer has no space,
    /// `EOPNOTSUPP` to a discard that it does not support, otherwise `EIO`.
    #[must_use]
    pub fn errno(&self) -> i32 {
        match self {
            Self::Upper { source, .. } if source.is_full() => libc::ENOSPC,
            Self::NoDiscards { .. } => libc::EOPNOTSUPP,
            _ => libc::EIO,
        }
    }
}

/// Called once, from any thread, when a pending range can be requested again or has failed.
pub type Waiter = Box<dyn FnOnce(Result<(), VolumeError>) + Send>;

/// Position of the bytes of one contiguous part of a request.
pub enum Piece {
    /// A hole: this many zero bytes.
    Zero(usize),
    /// Part of memory that stays at its address as long as the guard lives.
    Memory {
        /// Keeps the bytes alive.
        guard: SharedBytes,
        /// Range of the guard's bytes.
        range: std::ops::Range<usize>,
    },
    /// Part of a decoded chunk.
    Chunk {
        /// Keeps the bytes alive.
        guard: Arc<ChunkBytes>,
        /// Range of the chunk's bytes.
        range: std::ops::Range<usize>,
    },
}

impl Piece {
    /// Length in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        match self {
            Piece::Zero(len) => *len,
            Piece::Memory { range, .. } | Piece::Chunk { range, .. } => range.len(),
        }
    }

    /// True if the piece has no bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The bytes, or `None` for zeros.
    #[must_use]
    pub fn bytes(&self) -> Option<&[u8]> {
        match self {
            Piece::Zero(_) => None,
            Piece::Memory { guard, range } => Some(&guard.bytes()[range.clone()]),
            Piece::Chunk { guard, range } => Some(&guard[range.clone()]),
        }
    }

    /// Copies the piece into `buf`, which has its length.
    pub fn copy_to(&self, buf: &mut [u8]) {
        match self.bytes() {
            Some(bytes) => buf.copy_from_slice(bytes),
            None => buf.fill(0),
        }
    }
}

/// Answer to [`Volume::locate`].
pub enum Located {
    /// The bytes, in order, together exactly as long as the request.
    Ready(Vec<Piece>),
    /// The waiter will be called.
    Pending,
}

/// A writable virtual disk. Writes and reads may come from any thread; a read during a write of the same
/// bytes may see either state.
pub trait WritableVolume: Volume {
    /// Writes whole sectors at byte `offset`; like all changes, it can wait for the disk. Reads see the bytes
    /// at once; they are durable after the next [`flush`](Self::flush).
    ///
    /// # Errors
    /// [`VolumeError`]; then the bytes are unchanged.
    fn write_at(&self, bytes: &[u8], offset: u64) -> Result<(), VolumeError>;

    /// True if it supports [`discard`](Self::discard); otherwise zeros must be written as data.
    fn discards(&self) -> bool {
        true
    }

    /// Makes whole sectors zero.
    ///
    /// # Errors
    /// [`VolumeError`].
    fn discard(&self, range: DiskRange) -> Result<(), VolumeError>;

    /// Makes all writes durable that completed before the call.
    ///
    /// # Errors
    /// [`VolumeError`].
    fn flush(&self) -> Result<(), VolumeError>;
}

/// A virtual disk for reading.
pub trait Volume: Send + Sync {
    /// Size in bytes, a multiple of 512.
    fn size(&self) -> u64;

    /// Position of the bytes of `range`. `waiter` is made and kept only for the answer
    /// [`Located::Pending`], and then called exactly once.
    ///
    /// # Errors
    /// [`VolumeError`] if the range leaves the volume.
    fn locate(
        &self,
        range: DiskRange,
        waiter: &mut dyn FnMut() -> Waiter,
    ) -> Result<Located, VolumeError>;

    /// This disk for writing, if it is writable.
    fn writable(&self) -> Option<&dyn WritableVolume> {
        None
    }

    /// Reads into `buf` and blocks this thread until all bytes are present.
    ///
    /// # Errors
    /// [`VolumeError`]; `buf` is then unspecified.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<(), VolumeError> {
        let range = DiskRange::new(offset, buf.len() as u64);
        loop {
            let (wake, woken) = mpsc::sync_channel(1);
            let located = self.locate(range, &mut || {
                let wake = wake.clone();
                Box::new(move |result| {
                    let _ = wake.send(result);
                })
            })?;
            match located {
                Located::Ready(pieces) => {
                    let mut rest = buf;
                    for piece in pieces {
                        let (part, tail) = rest.split_at_mut(piece.len());
                        piece.copy_to(part);
                        rest = tail;
                    }
                    return Ok(());
                }
                Located::Pending => {
                    drop(wake);
                    // If the waiter is dropped without a call, the volume is closing.
                    woken.recv().unwrap_or(Err(VolumeError::Closed { offset }))?;
                }
            }
        }
    }
}

/// The bytes of a volume as a source, for a parser that knows no disk. A read waits until its bytes are there.
pub struct VolumeSource<'v>(pub &'v dyn Volume);

impl ByteSource for VolumeSource<'_> {
    fn len(&self) -> u64 {
        self.0.size()
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> Result<(), SourceError> {
        self.0.read_at(buf, offset).map_err(|error| SourceError::Io {
            name: self.name().to_owned(),
            offset,
            len: buf.len(),
            source: Arc::new(io::Error::other(error)),
        })
    }

    fn name(&self) -> &str {
        "the disk"
    }
}
