//! Numbers that many threads count up.

use std::sync::atomic::{AtomicU64, Ordering};

/// A number that only grows, for people and metrics. Counters have no order among each other: a reader may see
/// one before another, and no thread may conclude from one that something else has happened.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds `n`.
    pub fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    /// The number now.
    #[must_use]
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}
