//! Priorities: the background fill yields to all other requests.
//!
//! A sent request cannot be recalled, and requests in flight share the line with a demand request that comes
//! now. So the fill takes the whole line only after a time without demand; when demand comes, the requests in
//! flight end soon, and then only small ones are sent, one at a time, until the line is quiet again. A demand
//! request then waits for at most a few hundred KiB that are not its own.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// Time after a demand, in milliseconds, before the line counts as quiet: a program that starts reads,
/// computes, and reads on.
const QUIET: u64 = 1000;

/// Bytes of a fill request while there is demand, 256 KiB: 2 ms of a gigabit. A request always takes at least
/// one chunk.
const SMALL: u64 = 256 << 10;

/// Bytes of a fill request on a quiet line.
const LARGE: u64 = 4 << 20;

/// Limit on fill requests in flight: 32 of 4 MiB fill 10 Gbit/s over 100 ms.
const MOST: u64 = 32;

/// Time of the last demand, and capacity of the line.
pub(super) struct Pace {
    begun: Instant,
    /// Time of the last demand in milliseconds since the start, plus one; 0: never.
    demand: AtomicU64,
    /// Bytes to keep in flight.
    line: AtomicU64,
    /// Size of small requests.
    small: AtomicU64,
}

impl Default for Pace {
    fn default() -> Self {
        Self {
            begun: Instant::now(),
            demand: AtomicU64::new(0),
            line: AtomicU64::new(0),
            small: AtomicU64::new(SMALL),
        }
    }
}

impl Pace {
    fn now(&self) -> u64 {
        self.begun.elapsed().as_millis() as u64 + 1
    }

    /// Records a demand for a chunk.
    pub(super) fn demand(&self) {
        self.demand.store(self.now(), Ordering::Relaxed);
    }

    /// Records the measured capacity of a line in bytes.
    pub(super) fn line(&self, bytes: u64) {
        self.line.store(bytes, Ordering::Relaxed);
    }

    /// Sets `download.blockSize`: bytes of a fill request while there is demand.
    pub(super) fn block(&self, bytes: u64) {
        self.small.store(bytes.clamp(64 << 10, LARGE), Ordering::Relaxed);
    }

    /// True if there was no demand for a while.
    pub(super) fn is_quiet(&self) -> bool {
        let last = self.demand.load(Ordering::Relaxed);
        last == 0 || self.now() - last.min(self.now()) > QUIET
    }

    /// Bytes of the next fill request, with `others` requests in flight for readers and `fill` for the fill;
    /// 0: not now.
    pub(super) fn fill(&self, others: usize, fill: usize) -> u64 {
        if others > 0 || !self.is_quiet() {
            return if fill == 0 { self.small.load(Ordering::Relaxed) } else { 0 };
        }
        // One more than fit, so that the line is busy while the next one is sent.
        let most = (self.line.load(Ordering::Relaxed).div_ceil(LARGE) + 1).clamp(2, MOST);
        if (fill as u64) < most { LARGE } else { 0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fill_has_the_line_to_itself_only_while_nobody_wants_anything() {
        let pace = Pace::default();
        assert_eq!((pace.fill(0, 0), pace.fill(0, 1), pace.fill(0, 2)), (LARGE, LARGE, 0));
        pace.line(3 * LARGE);
        assert_eq!((pace.fill(0, 3), pace.fill(0, 4)), (LARGE, 0));
        assert_eq!((pace.fill(1, 0), pace.fill(1, 1)), (SMALL, 0));
        pace.demand();
        assert_eq!((pace.fill(0, 0), pace.fill(0, 1)), (SMALL, 0));
        assert!(!pace.is_quiet());
        // Its small requests are of the size that is wanted, within bounds.
        for (wanted, is) in [(1 << 20, 1 << 20), (1, 64 << 10), (u64::MAX, LARGE)] {
            pace.block(wanted);
            assert_eq!(pace.fill(0, 0), is);
        }
    }
}
