//! Who has to stand back: the background fill, for everyone else.
//!
//! A request that was sent cannot be called back, and what is under way shares the line with a demand that
//! comes now. So the fill takes the whole line only while nobody has wanted anything for a while; when
//! somebody does, what is under way ends soon, and then only small requests go, one at a time, until it
//! is quiet again. A demand then waits for a few hundred KiB at most that are not its own.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// So long after a demand, milliseconds, it is not quiet yet: a program that starts reads, computes, and
/// reads on.
const QUIET: u64 = 1000;

/// Bytes of a fill request while somebody wants something, 256 KiB: 2 ms of a gigabit. One chunk is always
/// taken.
const SMALL: u64 = 256 << 10;

/// Bytes of a fill request when it is quiet.
const LARGE: u64 = 4 << 20;

/// Fill requests under way at most: 32 of 4 MiB hold 10 Gbit/s over 100 ms.
const MOST: u64 = 32;

/// When something was wanted last, and how much the line holds.
pub(super) struct Pace {
    begun: Instant,
    /// Milliseconds since then, plus one; 0: never.
    demand: AtomicU64,
    /// Bytes to keep on their way.
    line: AtomicU64,
    /// Small requests are of this size.
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

    /// Somebody waits for a chunk, or has got it.
    pub(super) fn demand(&self) {
        self.demand.store(self.now(), Ordering::Relaxed);
    }

    /// Bytes that a line was found to hold.
    pub(super) fn line(&self, bytes: u64) {
        self.line.store(bytes, Ordering::Relaxed);
    }

    /// `download.blockSize`: bytes of a fill request while others want something.
    pub(super) fn block(&self, bytes: u64) {
        self.small.store(bytes.clamp(64 << 10, LARGE), Ordering::Relaxed);
    }

    /// Whether nobody has wanted anything for a while.
    pub(super) fn is_quiet(&self) -> bool {
        let last = self.demand.load(Ordering::Relaxed);
        last == 0 || self.now() - last.min(self.now()) > QUIET
    }

    /// Bytes of the next fill request, with `others` requests under way for somebody and `fill` for the fill;
    /// 0: not now.
    pub(super) fn fill(&self, others: usize, fill: usize) -> u64 {
        if others > 0 || !self.is_quiet() {
            return if fill == 0 { self.small.load(Ordering::Relaxed) } else { 0 };
        }
        // One more than fit, so that the line is busy while the next one is asked for.
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
