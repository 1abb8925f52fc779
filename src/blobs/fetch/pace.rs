//! Size and number of the requests of the background fill.
//!
//! Nothing is requested for the fill until it is [quiet](crate::quiet). Then it has the line to itself; but demand may come at
//! any moment, and requests in flight share the line with it until they end. So they are *small*: a request has the bytes
//! that the line brings in two round trips, so that one in flight delays a read by no more than that; and they are *few*: as
//! many as fill the line, and one more, so that it is busy while the next one is sent. Before the line is measured they are
//! of the least size, and two. A request always takes at least one chunk.
//!
//! On a line nearby this size would be a fraction of a chunk, where requests cost more than the bytes: it has a lower bound,
//! `download.blockSize`.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::blob::Blob;
use crate::quiet::{Allowance, Demand};

/// Least bytes of a fill request, 256 KiB: 2 ms of a gigabit, and about a chunk. `download.blockSize` changes it.
const SMALL: u64 = 256 << 10;

/// Least value of `download.blockSize`.
const LEAST: u64 = 64 << 10;

/// Limit on the bytes of a fill request: as of any request.
const LARGE: u64 = super::MOST_BYTES;

/// Limit on fill requests in flight: 32 of 4 MiB fill 10 Gbit/s over 100 ms.
const MOST: u64 = 32;

/// The demand, and the capacity of the line.
pub(super) struct Pace {
    demand: Arc<Demand>,
    /// Bytes that the line brings in two round trips; 0 before it is measured.
    line: AtomicU64,
    /// Least size of a request.
    small: AtomicU64,
}

impl Default for Pace {
    fn default() -> Self {
        Self { demand: Arc::default(), line: AtomicU64::new(0), small: AtomicU64::new(SMALL) }
    }
}

impl Pace {
    /// The demand that the fill yields to.
    pub(super) fn demand(&self) -> &Arc<Demand> {
        &self.demand
    }

    /// Records what was measured of the line to a blob.
    pub(super) fn measured(&self, blob: &Blob) {
        let Some((two_round_trips, round_trip)) = blob.line() else { return };
        self.line(two_round_trips);
        self.demand.measured(round_trip);
    }

    fn line(&self, two_round_trips: u64) {
        self.line.store(two_round_trips, Ordering::Relaxed);
    }

    /// Sets `download.blockSize`: least bytes of a fill request.
    pub(super) fn block(&self, bytes: u64) {
        self.small.store(bytes.clamp(LEAST, LARGE), Ordering::Relaxed);
    }

    /// Bytes of the next fill request, with `others` requests in flight for readers and `fill` for the fill;
    /// 0: not now.
    pub(super) fn fill(&self, others: usize, fill: usize) -> u64 {
        if others > 0 {
            self.demand.note();
        }
        self.allowed(self.demand.allowance(), fill as u64)
    }

    fn allowed(&self, allowance: Allowance, in_flight: u64) -> u64 {
        let small = self.small.load(Ordering::Relaxed);
        let line = self.line.load(Ordering::Relaxed);
        let size = line.clamp(small, LARGE);
        let (size, most) = match allowance {
            Allowance::Nothing => (0, 0),
            Allowance::Little => (small, 1),
            Allowance::All => (size, (line.div_ceil(size) + 1).clamp(2, MOST)),
        };
        if in_flight < most { size } else { 0 }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn nothing_is_filled_while_others_are_served_and_for_a_while_after() {
        let pace = Pace::default();
        assert_eq!((pace.fill(1, 0), pace.fill(0, 0)), (0, 0));
        assert_eq!(pace.allowed(Allowance::Nothing, 0), 0);
        assert_eq!(
            (pace.allowed(Allowance::Little, 0), pace.allowed(Allowance::Little, 1)),
            (SMALL, 0)
        );
    }

    #[test]
    fn the_first_requests_are_small_and_then_the_line_gives_their_size() {
        let pace = Pace::default();
        let all = |in_flight| pace.allowed(Allowance::All, in_flight);
        assert_eq!((all(0), all(1), all(2)), (SMALL, SMALL, 0));
        // A gigabit over 5 ms, and 10 Gbit/s over 100 ms.
        pace.line(1_250_000);
        assert_eq!((all(1), all(2)), (1_250_000, 0));
        pace.line(250_000_000);
        assert_eq!((all(31), all(32)), (LARGE, 0));
        // The least size is the one that is wanted, within bounds.
        pace.line(0);
        for (wanted, is) in [(1 << 20, 1 << 20), (1, LEAST), (u64::MAX, LARGE)] {
            pace.block(wanted);
            assert_eq!(all(0), is);
        }
    }

    proptest! {
        #[test]
        fn what_is_in_flight_fills_the_line_and_is_bounded(line in 0..1_u64 << 40) {
            let pace = Pace::default();
            pace.line(line);
            let mut bytes = 0;
            for in_flight in 0.. {
                match pace.allowed(Allowance::All, in_flight) {
                    0 => break,
                    size => bytes += size,
                }
            }
            prop_assert!(bytes >= line.min(MOST * LARGE));
            let one = line.clamp(SMALL, LARGE);
            prop_assert!(bytes <= line + 2 * one && bytes <= MOST * LARGE, "{bytes} of {line}");
        }
    }
}
