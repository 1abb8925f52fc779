//! Number of bytes to keep in flight: bandwidth times delay, measured on requests.
//!
//! A reader never waits if its data are requested one round trip before it needs them; at full speed that is
//! the line's bandwidth times its delay. Twice that number leaves room for both to vary. Less would leave the
//! line idle, more would delay requests that turn out to be needed.
//!
//! The delay is the shortest recent wait for a first byte, as longer waits are queueing. The bandwidth is a
//! mean over requests, weighted to the last few: the bytes that arrived during one request, times the number
//! of requests in flight. Pure: the caller passes the times.

use std::time::Duration;

/// Bytes before any measurement: 2.5 MB, a gigabit times 20 ms.
const AT_FIRST: u64 = 2_500_000;
/// Bounds: the size of one request, and the share that the cache can spare.
const LEAST: u64 = 1 << 20;
const MOST: u64 = 32 << 20;
/// Weight of a new measurement of bandwidth: about the last eight requests count.
const WEIGHT: f64 = 0.125;
/// Number of requests after which the shortest delay is measured anew: routes change.
const DELAY_WINDOW: u32 = 64;

/// Measurements of the line to one blob's host.
#[derive(Clone, Debug)]
pub struct Depth {
    /// Bytes a second; 0 before the first request.
    bandwidth: f64,
    delay: Duration,
    /// The shortest delay in the present window, which becomes `delay` at its end.
    shortest: Duration,
    requests: u32,
}

impl Default for Depth {
    fn default() -> Self {
        Self { bandwidth: 0.0, delay: Duration::MAX, shortest: Duration::MAX, requests: 0 }
    }
}

impl Depth {
    /// Records a request of `bytes`: its first byte came after `wait`, its last after `whole`, while `beside`
    /// other requests were in flight.
    pub fn measured(&mut self, bytes: u64, wait: Duration, whole: Duration, beside: usize) {
        self.shortest = self.shortest.min(wait);
        self.delay = self.delay.min(wait);
        self.requests += 1;
        if self.requests.is_multiple_of(DELAY_WINDOW) {
            self.delay = self.shortest;
            self.shortest = Duration::MAX;
        }
        // A few KiB arrive in one packet and do not measure bandwidth.
        let seconds = whole.saturating_sub(wait).as_secs_f64();
        if bytes >= 64 << 10 && seconds > 0.0 {
            let now = bytes as f64 / seconds * (beside + 1) as f64;
            self.bandwidth = if self.bandwidth == 0.0 {
                now
            } else {
                self.bandwidth + (now - self.bandwidth) * WEIGHT
            };
        }
    }

    /// Encoded bytes to keep in flight for one reader.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        if self.bandwidth == 0.0 || self.delay == Duration::MAX {
            return AT_FIRST;
        }
        self.twice_the_product().clamp(LEAST as f64, MOST as f64) as u64
    }

    /// Encoded bytes that arrive sooner within a pending request than by a request of their own.
    #[must_use]
    pub fn worth_a_request(&self) -> u64 {
        if self.bandwidth == 0.0 || self.delay == Duration::MAX {
            return AT_FIRST;
        }
        self.twice_the_product() as u64
    }

    /// The shortest recent delay; `None` before any measurement of delay and bandwidth.
    #[must_use]
    pub fn round_trip(&self) -> Option<Duration> {
        (self.bandwidth > 0.0 && self.delay < Duration::MAX).then_some(self.delay)
    }

    fn twice_the_product(&self) -> f64 {
        2.0 * self.bandwidth * self.delay.as_secs_f64()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(bytes: u64, wait_ms: u64, whole_ms: u64, times: usize) -> Depth {
        let mut depth = Depth::default();
        for _ in 0..times {
            depth.measured(
                bytes,
                Duration::from_millis(wait_ms),
                Duration::from_millis(whole_ms),
                0,
            );
        }
        depth
    }

    #[test]
    fn it_is_twice_bandwidth_times_delay_within_bounds() {
        assert_eq!(Depth::default().bytes(), AT_FIRST);
        // 1 MB in 8 ms is a gigabit: times 20 ms 2.5 MB.
        assert_eq!(after(1_000_000, 20, 28, 1).bytes(), 5_000_000);
        assert_eq!(after(1_000_000, 1, 9, 10).bytes(), LEAST);
        assert_eq!(after(10_000_000, 300, 310, 10).bytes(), MOST);
        // With cheap requests or a slow line, few bytes are worth a request.
        assert_eq!(after(1_000_000, 1, 9, 10).worth_a_request(), 250_000);
        assert_eq!(Depth::default().worth_a_request(), AT_FIRST);
        // Small answers measure only the delay.
        assert_eq!(after(100, 20, 28, 5).bytes(), AT_FIRST);
    }

    #[test]
    fn queueing_is_not_taken_for_delay_and_a_longer_route_is_noticed() {
        let mut depth = after(1_000_000, 20, 28, 1);
        depth.measured(1_000_000, Duration::from_millis(900), Duration::from_millis(908), 0);
        assert_eq!(depth.bytes(), 5_000_000);
        for _ in 0..2 * DELAY_WINDOW {
            depth.measured(1_000_000, Duration::from_millis(40), Duration::from_millis(48), 0);
        }
        assert!(depth.bytes().abs_diff(10_000_000) < 1000, "{}", depth.bytes());
    }
}
