//! Reads a whole disk in order, for `export` and `check`.
//!
//! One thread requests the next steps before it consumes the present one, so that requests and inflate
//! workers are busy while it hashes or writes. It copies no bytes: each step arrives as the pieces of its
//! bytes. The disk's leases keep the chunks of requested steps, so a small cache does not lose them again.

use std::sync::mpsc::{Receiver, Sender, channel};

use crate::DiskRange;
use crate::volume::{Located, Piece, Volume, VolumeError};
use formats::units::Sectors;

/// Unit in which zeros are detected: ext4's block and the page cache's page.
pub(super) const BLOCK: u64 = 4096;

/// Bytes per step, about a segment.
const STEP: u64 = 1 << 20;

/// Number of steps requested ahead. 32 MiB of disk are some 12 MB of a gzip layer: the bytes that a gigabit
/// line delivers in a round trip of 100 ms.
const AHEAD: usize = 32;

/// Bytes of cache that a scan uses if the layers are files of this host, 32 MiB: the steps requested ahead.
/// More only means more memory that the kernel must clear at its first use: a disk of 800 MB is read in 1.1 s
/// with this and in 1.4 s with the daemon's 256 MiB. That also holds for a disk from upstream, because every
/// converter lays a tar out in its order (perf/README.md).
pub const MEMORY: u64 = AHEAD as u64 * STEP;

/// Bytes of cache that a scan uses if layers come from a registry: an eighth of it may be fetched ahead of
/// demand, and with less there are twice as many requests.
pub const MEMORY_FAR: u64 = 96 << 20;

/// The runs, extended to whole blocks, joined, and cut into steps that begin at multiples of their size.
pub fn steps(mapped: impl Iterator<Item = (Sectors, Sectors)>, size: u64) -> Vec<DiskRange> {
    let mut runs: Vec<(u64, u64)> = Vec::new();
    for (lba, len) in mapped {
        let start = lba.bytes().0 / BLOCK * BLOCK;
        let end = (lba + len).bytes().0.next_multiple_of(BLOCK).min(size);
        match runs.last_mut() {
            Some((_, before)) if start <= *before => *before = end.max(*before),
            _ => runs.push((start, end)),
        }
    }
    let cut = |(start, end): (u64, u64)| {
        (start..end).step_by(STEP as usize).map(move |at| DiskRange::new(at, (end - at).min(STEP)))
    };
    runs.into_iter().flat_map(cut).collect()
}

/// Reads `steps` in their order and passes the pieces of each to `consume`, until one fails.
///
/// # Errors
/// The errors of the volume for the first step that cannot be read; the errors of `consume`.
pub fn scan<E: From<VolumeError>>(
    volume: &dyn Volume,
    steps: &[DiskRange],
    mut consume: impl FnMut(u64, &[Piece]) -> Result<(), E>,
) -> Result<(), E> {
    let mut asked = 0;
    let mut window: std::collections::VecDeque<Asked> = std::collections::VecDeque::new();
    for &step in steps {
        while window.len() < AHEAD && asked < steps.len() {
            window.push_back(Asked::new(volume, steps[asked]));
            asked += 1;
        }
        let Some(read) = window.pop_front() else { break };
        consume(step.offset, &read.pieces(volume, step)?)?;
    }
    Ok(())
}

/// A requested step.
enum Asked {
    Ready(Vec<Piece>),
    Pending(Receiver<Result<(), VolumeError>>),
    Failed(VolumeError),
}

impl Asked {
    fn new(volume: &dyn Volume, step: DiskRange) -> Self {
        let (tell, told) = channel();
        let mut waiter = || -> crate::volume::Waiter {
            let tell: Sender<_> = tell.clone();
            Box::new(move |result| drop(tell.send(result)))
        };
        match volume.locate(step, &mut waiter) {
            Ok(Located::Ready(pieces)) => Self::Ready(pieces),
            Ok(Located::Pending) => Self::Pending(told),
            Err(error) => Self::Failed(error),
        }
    }

    /// Waits for the bytes.
    fn pieces(mut self, volume: &dyn Volume, step: DiskRange) -> Result<Vec<Piece>, VolumeError> {
        loop {
            match self {
                Self::Ready(pieces) => return Ok(pieces),
                Self::Failed(error) => return Err(error),
                Self::Pending(told) => {
                    // If the waiter is dropped without a call, the volume is closing.
                    told.recv().unwrap_or(Err(VolumeError::Closed { offset: step.offset }))?;
                    self = Self::new(volume, step);
                }
            }
        }
    }
}

/// Cuts the pieces of a step into blocks and passes each one that is not all zeros on, with its offset. A
/// block of several pieces is assembled first; the last block of a disk may be short.
pub(super) fn blocks<E>(
    offset: u64,
    pieces: &[Piece],
    mut give: impl FnMut(u64, &[u8]) -> Result<(), E>,
) -> Result<(), E> {
    let mut at = offset;
    let mut partial: Vec<u8> = Vec::new();
    let mut give = |at: u64, block: &[u8]| if is_zero(block) { Ok(()) } else { give(at, block) };
    for piece in pieces {
        let mut left = piece.len();
        let mut done = 0;
        while left > 0 {
            let room = BLOCK as usize - partial.len();
            let len = room.min(left);
            match piece.bytes() {
                None if partial.is_empty() && len == BLOCK as usize => at += BLOCK,
                Some(bytes) if partial.is_empty() && len == BLOCK as usize => {
                    give(at, &bytes[done..done + len])?;
                    at += BLOCK;
                }
                bytes => {
                    match bytes {
                        Some(bytes) => partial.extend_from_slice(&bytes[done..done + len]),
                        None => partial.resize(partial.len() + len, 0),
                    }
                    if partial.len() == BLOCK as usize {
                        give(at, &partial)?;
                        partial.clear();
                        at += BLOCK;
                    }
                }
            }
            done += len;
            left -= len;
        }
    }
    if partial.is_empty() { Ok(()) } else { give(at, &partial) }
}

fn is_zero(bytes: &[u8]) -> bool {
    let (words, rest) = bytes.as_chunks::<16>();
    words.iter().all(|word| u128::from_ne_bytes(*word) == 0) && rest.iter().all(|&byte| byte == 0)
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;
    use std::sync::Arc;

    use super::*;

    #[test]
    fn blocks_are_whole_whatever_the_pieces_are() {
        let bytes = Arc::new((0..10_000_u32).map(|n| (n % 251) as u8 | 1).collect::<Vec<u8>>());
        for cuts in [&[0, 10_000][..], &[0, 1, 4097, 4098, 9000, 10_000], &[0, 4096, 8192, 10_000]]
        {
            let pieces: Vec<Piece> = cuts
                .windows(2)
                .map(|cut| Piece::Memory { guard: bytes.clone(), range: cut[0]..cut[1] })
                .chain([Piece::Zero(2288), Piece::Zero(8192)])
                .collect();
            let mut given = Vec::new();
            let Ok(()) = blocks(8192, &pieces, |at, block| {
                given.push((at, block.to_vec()));
                Ok::<_, Infallible>(())
            });
            let mut padded = (*bytes).clone();
            padded.resize(12_288, 0);
            let expected: Vec<_> = padded
                .chunks(4096)
                .zip([8192, 12_288, 16_384])
                .map(|(b, at)| (at, b.to_vec()))
                .collect();
            assert_eq!(given, expected);
        }
    }
}
