//! Bytes that keep their address.
//!
//! The kernel is given addresses of bytes that this process owns: a ublk commit names the address of a decoded
//! chunk, and a write of the disk tier names that of its payload. Both keep the owner of the bytes alive until
//! the kernel is done. That is sound only if the bytes stay where they are as long as their owner lives, which
//! no safe trait can promise: an `AsRef<[u8]>` may return another slice at every call. So the promise is an
//! `unsafe trait`, and each type that makes it says why it holds.
#![allow(unsafe_code)]

use std::sync::Arc;

use memmap2::MmapMut;

use crate::budget::Reserved;
use crate::chunk::{ChunkBytes, Room};

/// An owner of bytes that keep their address while it lives.
///
/// # Safety
/// From its creation until it is dropped or borrowed exclusively, and also when the value itself is moved:
/// * [`bytes`](Self::bytes) returns the same address and the same length at every call;
/// * the bytes are initialised, and are neither changed nor released.
pub unsafe trait StableBytes: Send + Sync {
    /// The bytes.
    fn bytes(&self) -> &[u8];
}

// SAFETY: the bytes of a vector are on the heap, which a move of the vector leaves in place, and change only
// through an exclusive borrow.
unsafe impl StableBytes for Vec<u8> {
    fn bytes(&self) -> &[u8] {
        self
    }
}

// SAFETY: as a vector's, the bytes are on the heap; and nothing can borrow them exclusively while two owners
// share them.
unsafe impl StableBytes for Arc<[u8]> {
    fn bytes(&self) -> &[u8] {
        self
    }
}

// SAFETY: the mapping stays where it is until it is dropped, also when the value is moved. Anonymous memory has no
// other writer; who maps a file vouches for that in an `unsafe` block of memmap2's.
unsafe impl StableBytes for MmapMut {
    fn bytes(&self) -> &[u8] {
        self
    }
}

// SAFETY: the room keeps its address by its own promise, the range in it never changes, and the room is private.
unsafe impl StableBytes for ChunkBytes {
    fn bytes(&self) -> &[u8] {
        self
    }
}

/// Bytes with the part of a budget that they take: it is given back with them.
pub struct Accounted<B, P = Reserved> {
    bytes: B,
    _part: P,
}

impl<B, P> Accounted<B, P> {
    /// `bytes`, for which `part` was reserved.
    pub fn new(bytes: B, part: P) -> Self {
        Self { bytes, _part: part }
    }
}

// SAFETY: the bytes keep their address by their own promise, and are private.
unsafe impl<B: StableBytes, P: Send + Sync> StableBytes for Accounted<B, P> {
    fn bytes(&self) -> &[u8] {
        self.bytes.bytes()
    }
}

impl<B: Room, P: Send + Sync> Room for Accounted<B, P> {
    fn bytes_mut(&mut self) -> &mut [u8] {
        self.bytes.bytes_mut()
    }
}

/// Shared bytes in memory, of any owner.
pub type SharedBytes = Arc<dyn StableBytes>;
