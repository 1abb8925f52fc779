//! State of the hosts that are asked: their health, their speed, their failures.
//!
//! All clients of a process share one [`Network`], because an observation of one device about a
//! host holds for all. For each host it keeps
//!
//! * **health**: a host that fails is asked last for a second, and twice as long after each further
//!   failure in a row, up to a minute; one success clears it. It is never left out: when all hosts
//!   fail, all are asked.
//! * **patience**: three times the ninth decile of the last 64 waits for a first byte. A read that
//!   takes longer is a straggler, and another host may be asked for it too. Second requests have a
//!   budget, a share of all requests: when a host is slow as a whole, asking twice makes it slower.
//! * **retries**: a bucket of tokens that fills slowly, and with each success. All readers of a
//!   dead registry together make a few requests a second, not a few each.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::downloads::DownloadLog;
use super::rate::{RateLimits, Tokens};
use threads::Counter;

/// Time that a host is asked last after one failure; doubled for each further one in a row.
const FIRST_BREAK: Duration = Duration::from_secs(1);
const LONGEST_BREAK: Duration = Duration::from_secs(60);

/// Least time that a host which sent wrong bytes is asked last: it may be one bad node of many, but
/// the next read should not be the one to find out.
const BREAK_OF_LIARS: Duration = Duration::from_secs(30);

/// Number of waits for a first byte that are remembered.
const SAMPLES: usize = 64;
/// Number of waits before a host has a patience of its own.
const ENOUGH_SAMPLES: usize = 8;
/// Factor on the ninth decile that makes a straggler. At three, a log-normal tail gives one in some
/// hundred requests, well inside the budget.
const STRAGGLER: u32 = 3;
/// Patience with a host without measurements: longer than a handshake across an ocean.
const PATIENCE_AT_FIRST: Duration = Duration::from_secs(1);
/// Factor by which a body may be slower than the host's recent bodies.
const SLOW_BODY: f64 = 4.0;
/// Weight of a new measurement of bandwidth.
const WEIGHT: f64 = 0.125;
/// Least size of a body that is measured, in bytes: smaller bodies arrive in one burst and say
/// nothing of bandwidth.
const TELLING_BODY: u64 = 64 << 10;

/// Second requests that may be made at once after a long time without any.
const HEDGE_BURST: f64 = 8.0;

/// Retries of one host at once, and a second.
const RETRY_BURST: f64 = 16.0;
const RETRIES_PER_SECOND: f64 = 4.0;
/// Longest wait of a retry for its turn. A longer one would use up the deadline of the read itself.
const LONGEST_TURN: Duration = Duration::from_secs(5);

/// When a second request is made for a read that takes unusually long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hedging {
    /// False: no second request is made.
    pub enable: bool,
    /// No second request is made sooner than this after the first.
    pub after: Duration,
    /// Bound of second requests, as a share of all.
    pub budget_percent: u32,
}

impl Default for Hedging {
    /// After 30 ms at the soonest, and for one request in twenty.
    fn default() -> Self {
        Self { enable: true, after: Duration::from_millis(30), budget_percent: 5 }
    }
}

/// Settings of a [`Network`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NetworkOptions {
    /// Second requests.
    pub hedging: Hedging,
    /// Bytes a second of all reads that no process waits for; `None`: no limit.
    pub ahead_rate: Option<u64>,
    /// Bytes a second of the background fill alone; `None`: no limit.
    pub fill_rate: Option<u64>,
}

/// What all clients of a process share.
#[derive(Debug)]
pub struct Network {
    hosts: Mutex<HashMap<String, Arc<Host>>>,
    hedge: Hedging,
    hedges: Mutex<f64>,
    limits: RateLimits,
    ending: AtomicBool,
    log: OnceLock<Arc<dyn DownloadLog>>,
}

impl Default for Network {
    fn default() -> Self {
        Self::new(NetworkOptions::default())
    }
}

impl Network {
    /// Creates a network without hosts; hedging and limits are those of `service`.
    #[must_use]
    pub fn new(options: NetworkOptions) -> Self {
        Self {
            hosts: Mutex::default(),
            hedge: options.hedging,
            hedges: Mutex::new(HEDGE_BURST),
            limits: RateLimits::new(options.ahead_rate, options.fill_rate),
            ending: AtomicBool::new(false),
            log: OnceLock::new(),
        }
    }

    /// Tells `log` of each download from now on. The first log stays.
    pub fn tell(&self, log: Arc<dyn DownloadLog>) {
        let _ = self.log.set(log);
    }

    /// Who is told of downloads.
    pub(super) fn log(&self) -> Option<&Arc<dyn DownloadLog>> {
        self.log.get()
    }

    /// The host of this name (`registry.example:5000`).
    pub(super) fn host(&self, name: &str) -> Arc<Host> {
        let mut hosts = self.hosts.lock();
        hosts.entry(name.to_owned()).or_insert_with(|| Arc::new(Host::new(name))).clone()
    }

    /// All hosts that were asked so far, by name.
    #[must_use]
    pub fn hosts(&self) -> Vec<Arc<Host>> {
        let mut hosts: Vec<_> = self.hosts.lock().values().cloned().collect();
        hosts.sort_by(|a, b| a.name.cmp(&b.name));
        hosts
    }

    /// Limits on background reads: the share of the line that they may use.
    #[must_use]
    pub fn limits(&self) -> &RateLimits {
        &self.limits
    }

    /// Ends reads that wait for a registry to come back: no further try is made of any read.
    pub fn end(&self) {
        self.ending.store(true, Ordering::Relaxed);
    }

    pub(super) fn is_ending(&self) -> bool {
        self.ending.load(Ordering::Relaxed)
    }

    /// Adds the share of a second request that each new read earns.
    pub(super) fn earn_hedge(&self) {
        let mut hedges = self.hedges.lock();
        *hedges = (*hedges + f64::from(self.hedge.budget_percent) / 100.0).min(HEDGE_BURST);
    }

    /// Least wait before a second request; `None` if second requests are turned off.
    pub(super) fn hedges_after(&self) -> Option<Duration> {
        let made = self.hedge.enable && self.hedge.budget_percent > 0;
        made.then_some(self.hedge.after)
    }

    /// Takes one second request out of the budget, if there is one left.
    pub(super) fn take_hedge(&self) -> bool {
        let mut hedges = self.hedges.lock();
        let left = *hedges >= 1.0;
        if left {
            *hedges -= 1.0;
        }
        left
    }
}

/// Counters of one host's requests and answers. Redirects count for the host that sent them.
#[derive(Debug, Default)]
pub struct HostStats {
    /// Requests for bytes of blobs.
    pub requests: Counter,
    /// Bytes of blobs that arrived.
    pub bytes: Counter,
    /// Requests that failed: no answer, a broken or wrong one, an error of the server.
    pub failures: Counter,
    /// Answers that ask for fewer requests (429, or 503 with `Retry-After`).
    pub limited: Counter,
    /// Requests repeated after all sources of a blob had failed.
    pub retries: Counter,
    /// Second requests made because this host took long.
    pub hedges: Counter,
    /// Second requests that finished first.
    pub hedges_won: Counter,
    /// Deliveries whose bytes did not match their checksum.
    pub distrusted: Counter,
}

/// One host.
#[derive(Debug)]
pub struct Host {
    name: String,
    stats: HostStats,
    state: Mutex<HostState>,
    retries: Mutex<Tokens>,
}

#[derive(Debug)]
struct HostState {
    failures_in_a_row: u32,
    passed_over_until: Option<Instant>,
    waits: Vec<Duration>,
    next: usize,
    /// Three times the ninth decile, updated every few waits.
    patience: Duration,
    /// Bytes a second; 0 before the first body that is large enough to measure.
    bandwidth: f64,
}

impl Host {
    /// A host that was not asked yet.
    pub(super) fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            stats: HostStats::default(),
            state: Mutex::new(HostState {
                failures_in_a_row: 0,
                passed_over_until: None,
                waits: Vec::new(),
                next: 0,
                patience: PATIENCE_AT_FIRST,
                bandwidth: 0.0,
            }),
            retries: Mutex::new(Tokens::new(RETRIES_PER_SECOND, RETRY_BURST)),
        }
    }

    /// Its name with the port.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its counters.
    #[must_use]
    pub fn stats(&self) -> &HostStats {
        &self.stats
    }

    /// True if it has no recent failure that makes it asked last.
    #[must_use]
    pub fn is_healthy(&self) -> bool {
        self.state.lock().passed_over_until.is_none_or(|until| until <= Instant::now())
    }

    /// Longest wait before a reader counts it as a straggler.
    #[must_use]
    pub fn patience(&self) -> Duration {
        self.state.lock().patience
    }

    /// Longest time for a body of so many bytes, when the bandwidth is known.
    pub(super) fn patience_with_body(&self, bytes: u64) -> Option<Duration> {
        let bandwidth = self.state.lock().bandwidth;
        let seconds = SLOW_BODY * bytes as f64 / bandwidth;
        (bandwidth > 0.0).then(|| Duration::try_from_secs_f64(seconds).ok()).flatten()
    }

    /// Records a failure, or a request for a pause of `wait`.
    pub(super) fn failed(&self, wait: Option<Duration>) {
        self.stats.failures.add(1);
        let mut state = self.state.lock();
        let doubled = FIRST_BREAK.saturating_mul(1 << state.failures_in_a_row.min(10));
        state.failures_in_a_row = state.failures_in_a_row.saturating_add(1);
        let rest = doubled.max(wait.unwrap_or_default()).min(LONGEST_BREAK);
        state.passed_over_until = Some(Instant::now() + rest);
    }

    /// Records bytes that did not match their checksum.
    pub(super) fn lied(&self) {
        self.stats.distrusted.add(1);
        let mut state = self.state.lock();
        let until = Instant::now() + BREAK_OF_LIARS;
        state.passed_over_until = state.passed_over_until.max(Some(until));
    }

    /// Records a whole read. A host that sent wrong bytes stays asked last.
    pub(super) fn succeeded(&self) {
        let mut state = self.state.lock();
        if state.failures_in_a_row > 0 {
            state.failures_in_a_row = 0;
            state.passed_over_until = None;
        }
        drop(state);
        self.retries.lock().give(1.0);
    }

    /// Records a first byte that came after `wait`.
    pub(super) fn heard_after(&self, wait: Duration) {
        let mut state = self.state.lock();
        let place = state.next % SAMPLES;
        match state.waits.get_mut(place) {
            Some(sample) => *sample = wait,
            None => state.waits.push(wait),
        }
        state.next += 1;
        // Sorting 64 numbers takes a microsecond; every fourth time is often enough.
        if state.waits.len() >= ENOUGH_SAMPLES && state.next.is_multiple_of(4) {
            let mut sorted = state.waits.clone();
            sorted.sort_unstable();
            let decile = sorted[(sorted.len() * 9 / 10).min(sorted.len() - 1)];
            state.patience = decile * STRAGGLER;
        }
    }

    /// Records a body of so many bytes that took `time` from its first to its last byte.
    pub(super) fn brought(&self, bytes: u64, time: Duration) {
        let seconds = time.as_secs_f64();
        if bytes < TELLING_BODY || seconds <= 0.0 {
            return;
        }
        let mut state = self.state.lock();
        let now = bytes as f64 / seconds;
        state.bandwidth = if state.bandwidth == 0.0 {
            now
        } else {
            state.bandwidth + (now - state.bandwidth) * WEIGHT
        };
    }

    /// Time that a retry waits for its turn.
    pub(super) fn retry_after(&self) -> Duration {
        self.stats.retries.add(1);
        self.retries.lock().take(1.0, LONGEST_TURN)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_that_fails_is_passed_over_until_it_succeeds() {
        let host = Host::new("r");
        assert!(host.is_healthy());
        host.failed(None);
        assert!(!host.is_healthy());
        host.succeeded();
        assert!(host.is_healthy());
        host.lied();
        host.succeeded();
        assert!(!host.is_healthy(), "whole answers do not make a liar honest");
    }

    #[test]
    fn patience_follows_what_a_host_usually_takes() {
        let host = Host::new("r");
        assert_eq!(host.patience(), PATIENCE_AT_FIRST);
        for number in 0..64 {
            // One in twenty is a straggler: the ninth decile is not affected by it.
            host.heard_after(Duration::from_millis(if number % 20 == 0 { 900 } else { 10 }));
        }
        assert_eq!(host.patience(), Duration::from_millis(30));
        for _ in 0..64 {
            host.heard_after(Duration::from_millis(200));
        }
        assert_eq!(host.patience(), Duration::from_millis(600), "a host that is slow as a whole");
    }

    #[test]
    fn second_requests_are_a_share_of_all() {
        let network = Network::default();
        let made = (0..1000).filter(|_| {
            network.earn_hedge();
            network.take_hedge()
        });
        let made = made.count();
        assert!((50..=58).contains(&made), "{made} of 1000 at 5 % and a burst of 8");
    }

    #[test]
    fn many_readers_of_a_dead_host_take_turns() {
        let host = Host::new("r");
        let waits: Vec<_> = (0..100).map(|_| host.retry_after()).collect();
        assert!(waits[..16].iter().all(Duration::is_zero), "{waits:?}");
        assert!(waits[20] > Duration::from_millis(900), "{waits:?}");
        assert!(waits.iter().all(|wait| *wait <= LONGEST_TURN));
    }
}
