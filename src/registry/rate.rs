//! Rate limits on reads that no process waits for.
//!
//! A bucket of tokens fills at the allowed rate. Before a read is sent, it takes as many tokens as
//! it has bytes, and may leave a debt that the next read waits for. So the rate holds over several
//! requests, not within one, and a request that has begun runs at full speed: a demand read that
//! waits for the same bytes is not held up by the limit. Demand reads take no tokens and do not
//! wait.

use std::thread;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use source::Class;

/// Longest sleep for a limit. The rate is at least 1 MB/s and a request some MB, so this bounds
/// only a debt that many readers made together.
const LONGEST: Duration = Duration::from_secs(60);

/// A bucket of tokens.
#[derive(Debug)]
pub(super) struct Tokens {
    per_second: f64,
    most: f64,
    left: f64,
    at: Instant,
}

impl Tokens {
    /// Creates a full bucket with room for `most`.
    pub(super) fn new(per_second: f64, most: f64) -> Self {
        Self { per_second, most, left: most, at: Instant::now() }
    }

    /// Takes `count` and returns the time until they are really there, at most `longest`.
    pub(super) fn take(&mut self, count: f64, longest: Duration) -> Duration {
        let now = Instant::now();
        let earned = now.duration_since(self.at).as_secs_f64() * self.per_second;
        self.at = now;
        let least = -(longest.as_secs_f64() * self.per_second);
        self.left = ((self.left + earned).min(self.most) - count).max(least);
        Duration::from_secs_f64((-self.left / self.per_second).max(0.0))
    }

    pub(super) fn give(&mut self, count: f64) {
        self.left = (self.left + count).min(self.most);
    }
}

/// A bucket of so many bytes a second, of which a tenth of a second's worth may come at once.
fn bucket(rate: u64) -> Tokens {
    let rate = rate.max(1) as f64;
    Tokens::new(rate, rate / 10.0)
}

/// Rate limits: bytes a second of all reads ahead of demand, and of the background fill alone.
#[derive(Debug)]
pub struct RateLimits {
    ahead: Mutex<Option<Tokens>>,
    fill: Mutex<Option<Tokens>>,
}

impl RateLimits {
    /// Creates limits in bytes a second; `None` is no limit. A burst of a tenth of a second is
    /// allowed.
    #[must_use]
    pub fn new(ahead: Option<u64>, fill: Option<u64>) -> Self {
        Self { ahead: Mutex::new(ahead.map(bucket)), fill: Mutex::new(fill.map(bucket)) }
    }

    /// A fill may take so many bytes a second; `None`: any number. Raises the bound on all fills together if that is
    /// lower, and never lowers it: each fill keeps to its own rate besides.
    pub fn allow_fill(&self, rate: Option<u64>) {
        let mut fill = self.fill.lock();
        let Some(now) = fill.as_ref().map(|bucket| bucket.per_second) else { return };
        if rate.is_none_or(|rate| rate as f64 > now) {
            *fill = rate.map(bucket);
        }
    }

    /// Accounts for `bytes` that are about to be requested, and returns the time to wait before
    /// that.
    #[must_use]
    pub fn wait(&self, class: Class, bytes: u64) -> Duration {
        let take = |bucket: &Mutex<Option<Tokens>>| {
            let mut bucket = bucket.lock();
            Some(bucket.as_mut()?.take(bytes as f64, LONGEST))
        };
        let waits = match class {
            Class::Demand => [None, None],
            Class::Prefetch => [take(&self.ahead), None],
            Class::Fill => [take(&self.ahead), take(&self.fill)],
        };
        waits.into_iter().flatten().max().unwrap_or_default()
    }

    /// Waits until `bytes` may be requested.
    pub(super) fn pace(&self, class: Class, bytes: u64) {
        let wait = self.wait(class, bytes);
        if !wait.is_zero() {
            thread::sleep(wait);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_holds_over_requests_and_never_for_demand() {
        let limits = RateLimits::new(Some(10_000_000), Some(1_000_000));
        let wait = |class| limits.wait(class, 500_000).as_secs_f64();
        assert_eq!(wait(Class::Prefetch), 0.0, "within the burst");
        assert!((0.3..0.5).contains(&wait(Class::Fill)), "half a second's worth, less the burst");
        assert!((0.8..1.0).contains(&wait(Class::Fill)), "the debt of the one before");
        assert!(wait(Class::Prefetch) < 0.2, "fill's own limit is not the prefetch's");
        assert_eq!(wait(Class::Demand), 0.0);
        assert_eq!(RateLimits::new(None, None).wait(Class::Fill, u64::MAX), Duration::ZERO);
    }

    #[test]
    fn the_bound_on_all_fills_is_that_of_the_one_that_may_take_most() {
        let limits = RateLimits::new(None, Some(1_000_000));
        let seconds = |bytes| limits.wait(Class::Fill, bytes).as_secs_f64();
        limits.allow_fill(Some(1000));
        assert!((0.3..0.5).contains(&seconds(500_000)), "a slower one does not lower it");
        limits.allow_fill(Some(10_000_000));
        assert!((0.3..0.5).contains(&seconds(5_000_000)));
        limits.allow_fill(None);
        assert_eq!(seconds(u64::MAX), 0.0);
        RateLimits::new(None, None).allow_fill(Some(1));
    }
}
