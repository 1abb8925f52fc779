//! Quiet: the time in which work may be done that no process waits for.
//!
//! Whole layers are fetched in the background, chunks are written to the disk tiers, blobs are hashed, a found meta image is
//! compared with its layers. None of it may cost a start anything: not the line, not a core, not the disk. To do it with
//! a lower priority is not enough. A request that was sent cannot be recalled, and shares the line with the one that a
//! process waits for. A thread that computes takes caches, memory bandwidth, and on a loaded host its share of a core. The
//! registry's own processor is shared too, and not ours to rank.
//!
//! So there is one rule for all of this work: **while there is demand, none of it is begun.** Demand is every read of a
//! device for file data, whether the chunk is in memory or has to be fetched, every chunk that is fetched ahead of a read
//! (a trace, read-ahead), and the attach itself: the process that will read has not begun yet. It is *quiet* when the
//! last demand is a few round trips ago ([`Quiet::pause`]).
//!
//! # How long is a few round trips
//!
//! A process that reads a file which is not here waits for one round trip, computes, and reads the next one. Eight round
//! trips without a read are therefore no pause between two reads, on whatever line: the process has what it needs. The
//! round trip is measured, on the requests for the blobs. The time has bounds.
//!
//! * At least two seconds ([`LEAST`]). On a line of half a millisecond the line is not what takes the time between two reads;
//!   the process computes. Two seconds are longer than an interpreter computes between two imports, on a machine too where
//!   it gets a part of a core, and the layer that comes two seconds later is missed by no process.
//! * At most five seconds ([`MOST`]). A registry whose first byte takes longer than half a second is overloaded, not far away;
//!   its slowness says nothing about the process.
//!
//! # A start ends
//!
//! A service may read something that is not here every second, for days, and its layers should come all the same. So the
//! rule protects a *start*, which lasts at most five minutes from the attach ([`LONGEST_START`], also what is recorded as
//! a start). Later demand leaves [`Allowance::Little`]: one small request at a time, one thread.
//!
//! # What is under way when demand comes
//!
//! It ends soon, because it is small and bounded, and nothing follows it: at most two round trips of bytes are in a fill
//! request, and as many requests in flight as the line holds (`fetch::pace`). Chunks that have arrived wait, encoded, until it
//! is quiet again. Computation is of the idle class ([`sys::idle`]). One write of a tier is at most 8 MiB, and of the idle class
//! of the disk.
//!
//! A process may want just the chunk that the fill has begun. It never waits for work that waits for quiet:
//!
//! | the chunk is | then |
//! |---|---|
//! | in the list of wanted chunks | it becomes demand there |
//! | in a request whose answer has begun | it comes within two round trips; the read waits for it |
//! | in a request without an answer (it may wait for a rate limit, or for its server) | it is fetched again, for the read; the first to come serves |
//! | fetched, and waits for a decode thread | it becomes demand there; one thread more than the fill may have is always there |
//! | being decoded, in the idle class | the thread is raised to its ordinary class: decoding again would cost more than the rest of it |
//!
//! # The clock
//!
//! [`Quiet`] is pure: the caller passes the time. [`Demand`] has the clock, and is what threads share. A read notes itself
//! by setting a flag that is usually set already; the time is taken when the flag is looked at, by the one who wants to
//! know. So the read of a chunk in memory costs one load.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// Round trips without demand after which it is quiet.
const ROUND_TRIPS: u32 = 8;

/// Least time without demand after which it is quiet: see the module.
pub const LEAST: Duration = Duration::from_secs(2);

/// Longest time without demand that is needed: see the module.
pub const MOST: Duration = Duration::from_secs(5);

/// Longest duration of a start, from its attach: later demand does not hold everything up. The same as
/// [`LearnOptions::longest`](crate::trace::LearnOptions).
pub const LONGEST_START: Duration = Duration::from_secs(300);

/// Longest sleep of a thread that waits for quiet: it looks whether it is told to end.
const STEP: Duration = Duration::from_millis(100);

/// How much work may be done that no process waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Allowance {
    /// None: a start is under way.
    Nothing,
    /// One small piece at a time: there is demand, but no start.
    Little,
    /// As much as the line, the cores and the disk can do.
    All,
}

/// The rule. Times are since a moment that is the same for all calls.
#[derive(Clone, Copy, Debug, Default)]
pub struct Quiet {
    /// The last attach.
    attached: Duration,
    /// The last demand.
    demanded: Duration,
    /// The round trip of the line, as measured last.
    round_trip: Duration,
}

impl Quiet {
    /// Records an attach: a start begins.
    pub fn attached(&mut self, now: Duration) {
        self.attached = self.attached.max(now);
        self.demanded(now);
    }

    /// Records demand.
    pub fn demanded(&mut self, now: Duration) {
        self.demanded = self.demanded.max(now);
    }

    /// Records the measured round trip of a line.
    pub fn measured(&mut self, round_trip: Duration) {
        self.round_trip = round_trip;
    }

    /// Time without demand after which it is quiet.
    #[must_use]
    pub fn pause(&self) -> Duration {
        self.round_trip.saturating_mul(ROUND_TRIPS).clamp(LEAST, MOST)
    }

    /// Time until it is quiet, if no demand comes; zero when it is quiet.
    #[must_use]
    pub fn left(&self, now: Duration) -> Duration {
        self.demanded.saturating_add(self.pause()).saturating_sub(now)
    }

    /// How much may be done now.
    #[must_use]
    pub fn allowance(&self, now: Duration) -> Allowance {
        if self.left(now).is_zero() {
            Allowance::All
        } else if now.saturating_sub(self.attached) > LONGEST_START {
            Allowance::Little
        } else {
            Allowance::Nothing
        }
    }
}

/// Demand as the threads of a process see it.
#[derive(Debug)]
pub struct Demand {
    origin: Instant,
    /// True if there was demand since the last look.
    seen: AtomicBool,
    quiet: Mutex<Quiet>,
}

impl Default for Demand {
    /// An attach was just now.
    fn default() -> Self {
        Self { origin: Instant::now(), seen: AtomicBool::new(false), quiet: Mutex::default() }
    }
}

impl Demand {
    /// Notes that a process reads, or that something is fetched ahead of its read. Never blocks.
    pub fn note(&self) {
        // A load first: the cache line stays shared between cores.
        if !self.seen.load(Ordering::Relaxed) {
            self.seen.store(true, Ordering::Relaxed);
        }
    }

    /// Notes that an image was attached.
    pub fn attached(&self) {
        self.look(Quiet::attached);
    }

    /// Notes the measured round trip of a line.
    pub fn measured(&self, round_trip: Duration) {
        self.look(|quiet, _| quiet.measured(round_trip));
    }

    /// How much work may be done now that no process waits for.
    #[must_use]
    pub fn allowance(&self) -> Allowance {
        self.look(|quiet, now| quiet.allowance(now))
    }

    /// Time until it is quiet, if no demand comes.
    #[must_use]
    pub fn left(&self) -> Duration {
        self.look(|quiet, now| quiet.left(now))
    }

    /// Waits until something may be done, or until `is_over`. False if it is over.
    pub fn wait(&self, is_over: &dyn Fn() -> bool) -> bool {
        loop {
            if is_over() {
                return false;
            }
            if self.allowance() > Allowance::Nothing {
                return true;
            }
            std::thread::sleep(self.left().min(STEP));
        }
    }

    fn look<T>(&self, at: impl FnOnce(&mut Quiet, Duration) -> T) -> T {
        let mut quiet = self.quiet.lock();
        let now = self.origin.elapsed();
        if self.seen.swap(false, Ordering::Relaxed) {
            quiet.demanded(now);
        }
        at(&mut quiet, now)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MS: fn(u64) -> Duration = Duration::from_millis;

    #[test]
    fn the_pause_is_some_round_trips_within_bounds() {
        let mut quiet = Quiet::default();
        for (round_trip, pause) in [(0, 2000), (5, 2000), (300, 2400), (400, 3200), (9000, 5000)] {
            quiet.measured(MS(round_trip));
            assert_eq!(quiet.pause(), MS(pause), "{round_trip} ms");
        }
    }

    #[test]
    fn an_attach_alone_holds_all_work_up_until_its_process_could_have_read() {
        let mut quiet = Quiet::default();
        quiet.attached(MS(10_000));
        assert_eq!(quiet.allowance(MS(10_000)), Allowance::Nothing);
        assert_eq!(quiet.allowance(MS(11_999)), Allowance::Nothing);
        assert_eq!(quiet.allowance(MS(12_000)), Allowance::All);
    }

    #[test]
    fn demand_that_never_ends_leaves_a_little_when_the_start_is_over() {
        let mut quiet = Quiet::default();
        quiet.attached(MS(0));
        for second in 0..=300 {
            quiet.demanded(MS(second * 1000));
            assert_eq!(quiet.allowance(MS(second * 1000)), Allowance::Nothing);
        }
        quiet.demanded(MS(300_500));
        assert_eq!(quiet.allowance(MS(300_500)), Allowance::Little);
        quiet.attached(MS(301_000));
        assert_eq!(quiet.allowance(MS(301_000)), Allowance::Nothing);
    }

    #[test]
    fn a_read_is_seen_by_the_next_look() {
        let demand = Demand::default();
        demand.quiet.lock().round_trip = MS(600);
        demand.note();
        demand.note();
        let left = demand.left();
        assert!(left > MS(4000) && left <= MS(4800), "{left:?}");
        assert_eq!(demand.allowance(), Allowance::Nothing);
        assert!(!demand.wait(&|| true), "it is over");
    }

    proptest! {
        /// Whatever comes in whatever order.
        #[test]
        fn nothing_is_allowed_within_the_pause_after_demand_and_all_is_after_it(
            demands in proptest::collection::vec(0..200_000_u64, 1..40),
            round_trip in 0..2000_u64,
            after in 0..10_000_u64,
        ) {
            let mut quiet = Quiet::default();
            quiet.measured(MS(round_trip));
            demands.iter().for_each(|&at| quiet.demanded(MS(at)));
            let last = *demands.iter().max().unwrap();
            let now = MS(last + after);
            let expected = if MS(after) < quiet.pause() { Allowance::Nothing } else { Allowance::All };
            prop_assert_eq!(quiet.allowance(now), expected);
            prop_assert_eq!(quiet.left(now), quiet.pause().saturating_sub(MS(after)));
            // What is left is the truth: then, and not before, all may be done.
            let left = quiet.left(now);
            prop_assert_eq!(quiet.allowance(now + left), Allowance::All);
            prop_assert!(left.is_zero() || quiet.allowance(now + left - MS(1)) == Allowance::Nothing);
            prop_assert!(quiet.pause() >= LEAST && quiet.pause() <= MOST);
        }
    }
}
