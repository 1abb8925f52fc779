//! Numbers that many threads count up.

use std::sync::atomic::{AtomicU64, Ordering};

/// Adds `n` to a counter. Counters have no order among each other: a reader may see one before another.
pub fn count(counter: &AtomicU64, n: u64) {
    counter.fetch_add(n, Ordering::Relaxed);
}
