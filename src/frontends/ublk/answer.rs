//! From a request to its commit.
//!
//! A commit carries an address. The memory there must stay until the kernel has copied it, which it does
//! while it *issues* the commit; so it is kept here until the queue driver reports that its submission queue
//! was empty after an enter.

use super::mailbox::WaitOutcome;
use super::request::{BlockRequest, Op};
use crate::counters::FrontCounters;
use disk::DiskRange;
use disk::volume::{Located, Piece, Volume, VolumeError, Waiter};

/// Limit on scratch buffers kept for reuse: one stays warm, and without a limit all those of a burst would
/// stay.
const SPARE: usize = 4;

/// Action for a request.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Commit it with this result, from this address. The address is never 0.
    Commit {
        /// Address of the bytes; any memory of this process when the result is an error.
        address: u64,
        /// Its length in bytes, or `-errno`.
        result: i32,
    },
    /// The waiter will be called.
    Wait,
}

/// Memory that a submitted commit points to.
enum CommitMemory {
    /// The volume's guards.
    Pieces(#[allow(dead_code, reason = "kept alive, not read")] Vec<Piece>),
    /// A gathered request; its buffer returns to the pool.
    Scratch(Vec<u8>),
}

/// Memory that commits point to.
#[derive(Default)]
pub(super) struct Answers {
    held: Vec<CommitMemory>,
    /// Scratch buffers not lent to a commit.
    pool: Vec<Vec<u8>>,
    /// Destination of the data of a refused write; never read.
    refuse: Vec<u8>,
    /// As many zeros as the longest request.
    zeros: Vec<u8>,
    /// Zeros and refuse buffers that were too short for a later device; commits may still point to them.
    outgrown: Vec<(Vec<u8>, Vec<u8>)>,
}

impl Answers {
    /// Prepares for requests of at most `longest` bytes.
    pub(super) fn prepare(&mut self, longest: usize) {
        if self.zeros.len() < longest {
            let zeros = std::mem::replace(&mut self.zeros, vec![0; longest]);
            self.outgrown.push((zeros, std::mem::take(&mut self.refuse)));
        }
    }

    /// Answers a read.
    pub(super) fn read(
        &mut self,
        volume: &dyn Volume,
        counters: &FrontCounters,
        range: DiskRange,
        waiter: &mut dyn FnMut() -> Waiter,
    ) -> Verdict {
        match volume.locate(range, waiter) {
            Ok(Located::Ready(pieces)) => self.pieces(counters, range, pieces),
            Ok(Located::Pending) => {
                counters.pending.add(1);
                Verdict::Wait
            }
            Err(error) => self.failed(counters, range, Some(&error)),
        }
    }

    /// Fails a read: with the volume's error, or because the volume dropped its waiter.
    pub(super) fn failed(
        &self,
        counters: &FrontCounters,
        range: DiskRange,
        error: Option<&VolumeError>,
    ) -> Verdict {
        let (offset, bytes) = (range.offset, range.len);
        match error {
            Some(error) => {
                let error = error as &dyn std::error::Error;
                tracing::error!(offset, bytes, error, "A read of the disk failed");
            }
            None => tracing::error!(
                offset,
                bytes,
                "A read of the disk failed: the volume dropped its waiter"
            ),
        }
        counters.errors.add(1);
        self.error(libc::EIO)
    }

    /// Refuses a request that is not a read, on a disk that cannot be written, and a request that no disk
    /// supports.
    pub(super) fn refused(&self, counters: &FrontCounters, request: &BlockRequest) -> Verdict {
        let errno = match request.op {
            // No data are ever dirty.
            Op::Flush => return self.done(0),
            Op::Write { .. } => libc::EROFS,
            _ => libc::EOPNOTSUPP,
        };
        counters.refused.add(1);
        self.error(errno)
    }

    /// Ends a change of the disk. A full disk is reported to the writer by its own error.
    pub(super) fn changed(
        &self,
        counters: &FrontCounters,
        request: &BlockRequest,
        outcome: &WaitOutcome,
    ) -> Verdict {
        let (offset, bytes) = (request.range.offset, request.range.len);
        let errno = match outcome {
            WaitOutcome::Ready => return self.stored(counters, request),
            WaitOutcome::Failed(error) => {
                let errno = error.errno();
                let error = error as &dyn std::error::Error;
                tracing::error!(offset, bytes, error, "A change of the disk failed");
                errno
            }
            WaitOutcome::Forgotten => {
                tracing::error!(
                    offset,
                    bytes,
                    "A change of the disk failed: its threads have ended"
                );
                libc::EIO
            }
        };
        counters.errors.add(1);
        self.error(errno)
    }

    fn stored(&self, counters: &FrontCounters, request: &BlockRequest) -> Verdict {
        match request.op {
            Op::Write { durable } => {
                counters.writes.add(1);
                counters.written.add(request.range.len);
                counters.flushes.add(durable.into());
                i32::try_from(request.range.len)
                    .map_or_else(|_| self.error(libc::EIO), |len| self.done(len))
            }
            Op::Zero => {
                counters.zeroed.add(1);
                self.done(0)
            }
            _ => {
                counters.flushes.add(1);
                self.done(0)
            }
        }
    }

    /// Success of a request without data.
    fn done(&self, result: i32) -> Verdict {
        Verdict::Commit { address: self.zero_address(), result }
    }

    /// Destination of the data of a write that is refused.
    pub(super) fn bin(&mut self) -> u64 {
        if self.refuse.is_empty() {
            self.refuse = vec![0; self.zeros.len()];
        }
        self.refuse.as_mut_ptr() as u64
    }

    /// Records that every commit so far has been issued.
    pub(super) fn issued(&mut self) {
        for held in self.held.drain(..) {
            if let CommitMemory::Scratch(buffer) = held {
                self.pool.push(buffer);
            }
        }
        self.pool.truncate(SPARE);
    }

    /// Full length, or an error, never short: the driver treats a short answer as a full one in some modes,
    /// and repeats the request without end in others.
    fn pieces(
        &mut self,
        counters: &FrontCounters,
        range: DiskRange,
        pieces: Vec<Piece>,
    ) -> Verdict {
        let Ok(result) = i32::try_from(range.len) else { return self.error(libc::EIO) };
        let len = range.buffer_len();
        if pieces.iter().map(Piece::len).sum::<usize>() != len {
            tracing::error!(range.offset, len, "The volume answered with a wrong length");
            counters.errors.add(1);
            return self.error(libc::EIO);
        }
        counters.reads.add(1);
        counters.bytes.add(range.len);
        if pieces.iter().all(|piece| piece.bytes().is_none()) && len <= self.zeros.len() {
            counters.zero.add(1);
            return Verdict::Commit { address: self.zero_address(), result };
        }
        if let Some(address) = one_run(&pieces) {
            counters.direct.add(1);
            self.held.push(CommitMemory::Pieces(pieces));
            return Verdict::Commit { address, result };
        }
        counters.gathered.add(1);
        let mut scratch = self.pool.pop().unwrap_or_default();
        scratch.resize(scratch.len().max(len), 0);
        let mut rest = scratch.as_mut_slice();
        for piece in &pieces {
            let (part, tail) = rest.split_at_mut(piece.len());
            piece.copy_to(part);
            rest = tail;
        }
        let address = scratch.as_ptr() as u64;
        self.held.push(CommitMemory::Scratch(scratch));
        Verdict::Commit { address, result }
    }

    fn error(&self, errno: i32) -> Verdict {
        Verdict::Commit { address: self.zero_address(), result: -errno }
    }

    fn zero_address(&self) -> u64 {
        self.zeros.as_ptr() as u64
    }
}

/// Address of the bytes if all pieces are contiguous in memory.
fn one_run(pieces: &[Piece]) -> Option<u64> {
    let mut pieces = pieces.iter().filter(|piece| !piece.is_empty());
    let first = pieces.next()?.bytes()?.as_ptr_range();
    let mut end = first.end;
    for piece in pieces {
        let next = piece.bytes()?.as_ptr_range();
        if next.start != end {
            return None;
        }
        end = next.end;
    }
    Some(first.start as u64)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    fn memory(guard: &Arc<Vec<u8>>, range: std::ops::Range<usize>) -> Piece {
        Piece::Memory { guard: guard.clone(), range }
    }

    #[test]
    fn only_neighbours_in_memory_are_committed_together() {
        let bytes = Arc::new(vec![1_u8; 4096]);
        let base = bytes.as_ptr() as u64;
        assert_eq!(one_run(&[memory(&bytes, 8..16)]), Some(base + 8));
        assert_eq!(one_run(&[memory(&bytes, 8..16), memory(&bytes, 16..99)]), Some(base + 8));
        assert_eq!(one_run(&[memory(&bytes, 8..16), memory(&bytes, 17..99)]), None);
        assert_eq!(one_run(&[memory(&bytes, 8..16), Piece::Zero(8)]), None);
        assert_eq!(one_run(&[Piece::Zero(8), memory(&bytes, 8..16)]), None);
        assert_eq!(one_run(&[]), None);
    }
}
