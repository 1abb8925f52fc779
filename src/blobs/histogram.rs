//! Durations, counted by length.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use threads::Counter;

/// Upper bounds of the buckets in microseconds: from the time of a local disk to the minute after which a
/// read fails; three a decade are enough to tell a slow registry from a distant one.
pub const BOUNDS: [u64; 18] = [
    100, 250, 500, 1_000, 2_500, 5_000, 10_000, 25_000, 50_000, 100_000, 250_000, 500_000,
    1_000_000, 2_500_000, 5_000_000, 10_000_000, 30_000_000, 60_000_000,
];

/// Counts durations; any thread may add to it.
#[derive(Debug, Default)]
pub struct Histogram {
    buckets: [Counter; BOUNDS.len() + 1],
    /// Microseconds.
    sum: Counter,
    /// Longest duration since the last call of `take_longest`, in microseconds.
    longest: AtomicU64,
}

impl Histogram {
    /// Counts one duration.
    pub fn add(&self, duration: Duration) {
        let micros = u64::try_from(duration.as_micros()).unwrap_or(u64::MAX);
        let bucket = BOUNDS.partition_point(|&bound| bound < micros);
        self.buckets[bucket].add(1);
        self.sum.add(micros);
        if self.longest.load(Ordering::Relaxed) < micros {
            self.longest.fetch_max(micros, Ordering::Relaxed);
        }
    }

    /// A copy of the counts.
    #[must_use]
    pub fn times(&self) -> Times {
        let mut buckets = [0; BOUNDS.len() + 1];
        for (copy, bucket) in buckets.iter_mut().zip(&self.buckets) {
            *copy = bucket.get();
        }
        Times { buckets, sum: self.sum.get() }
    }

    /// The longest duration in microseconds since the last call.
    #[must_use]
    pub fn take_longest(&self) -> u64 {
        self.longest.swap(0, Ordering::Relaxed)
    }
}

/// A copy of a [`Histogram`] at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Times {
    /// Number of durations between the [`BOUNDS`]; the last one counts those above all of them.
    pub buckets: [u64; BOUNDS.len() + 1],
    /// Sum of all durations, in microseconds.
    pub sum: u64,
}

impl Times {
    /// Number of durations.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.buckets.iter().sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_duration_is_counted_once_under_the_first_bound_that_it_does_not_exceed() {
        let histogram = Histogram::default();
        for micros in [0, 100, 101, 60_000_000, 60_000_001] {
            histogram.add(Duration::from_micros(micros));
        }
        histogram.add(Duration::MAX);
        let times = histogram.times();
        assert_eq!((times.buckets[0], times.buckets[1]), (2, 1));
        assert_eq!((times.buckets[BOUNDS.len() - 1], times.buckets[BOUNDS.len()]), (1, 2));
        assert_eq!(times.count(), 6);
        assert_eq!(histogram.take_longest(), u64::MAX);
        assert_eq!(histogram.take_longest(), 0);
    }
}
