//! What is known of the hosts that are asked: how they fare, how fast they are, how often they failed.
//!
//! A [`Network`] is shared by all clients of a process, because what one device learns of a host holds
//! for all. Of each host it keeps
//!
//! * **health**: a host that fails is passed over for a second, and twice as long after each further
//!   failure in a row, up to a minute; one success clears it. Passed over means asked last, not never:
//!   when all fail, all are asked.
//! * **patience**: three times the ninth decile of the last 64 waits for a first byte. A read that takes
//!   longer is a straggler, for which somebody else may be asked too. Second requests have a budget, a
//!   share of all requests: when a host is slow as a whole, asking twice makes it slower.
//! * **retries**: a bucket of tokens that fills slowly, and by each success. Many readers of a dead
//!   registry together make a few requests a second, not a few each.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use super::downloads::DownloadLog;
use super::rate::{RateLimits, Tokens};
use crate::config::{HedgeConfig, ServiceConfig};

/// Passed over after one failure; doubled for each further one in a row.
const FIRST_BREAK: Duration = Duration::from_secs(1);
const LONGEST_BREAK: Duration = Duration::from_secs(60);

/// A host that sent wrong bytes is passed over at least so long: it may be one bad node of many, but the
/// next read should not be the one to find out.
const BREAK_OF_LIARS: Duration = Duration::from_secs(30);

/// Waits for a first byte that are remembered.
const SAMPLES: usize = 64;
/// Waits before which nothing is said of a host.
const ENOUGH_SAMPLES: usize = 8;
/// A straggler takes so many times the ninth decile. At three, a log-normal tail gives one in some
/// hundred requests, well inside the budget.
const STRAGGLER: u32 = 3;
/// Patience with a host of which nothing is known: longer than a handshake across an ocean.
const PATIENCE_AT_FIRST: Duration = Duration::from_secs(1);
/// A body may come so many times slower than the host's bodies lately did.
const SLOW_BODY: f64 = 4.0;
/// Weight of a new measurement of bandwidth.
const WEIGHT: f64 = 0.125;
/// Bodies below this many bytes come in one burst and say nothing of bandwidth.
const TELLING_BODY: u64 = 64 << 10;

/// Second requests that may be made at once, when none were for long.
const HEDGE_BURST: f64 = 8.0;

/// Retries of one host at once, and a second.
const RETRY_BURST: f64 = 16.0;
const RETRIES_PER_SECOND: f64 = 4.0;
/// Most that a retry waits for its turn. Longer would use up the deadline of the read itself.
const LONGEST_TURN: Duration = Duration::from_secs(5);

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Numbers that are right one by one: sound after a panic elsewhere.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What all clients of a process share.
#[derive(Debug)]
pub struct Network {
    hosts: Mutex<HashMap<String, Arc<Host>>>,
    hedge: HedgeConfig,
    hedges: Mutex<f64>,
    limits: RateLimits,
    ending: AtomicBool,
    log: OnceLock<Arc<dyn DownloadLog>>,
}

impl Default for Network {
    fn default() -> Self {
        Self::new(&ServiceConfig::default())
    }
}

impl Network {
    /// No host is known yet; hedging and limits are those of `service`.
    #[must_use]
    pub fn new(service: &ServiceConfig) -> Self {
        Self {
            hosts: Mutex::default(),
            hedge: service.turbobd.hedge,
            hedges: Mutex::new(HEDGE_BURST),
            limits: RateLimits::new(
                service.turbobd.rate_limit,
                service.download.max_bytes_per_second,
            ),
            ending: AtomicBool::new(false),
            log: OnceLock::new(),
        }
    }

    /// Tells `log` of each download from now on, if nobody is told yet.
    pub fn tell(&self, log: Arc<dyn DownloadLog>) {
        let _ = self.log.set(log);
    }

    /// Who is told of downloads.
    pub(super) fn log(&self) -> Option<&Arc<dyn DownloadLog>> {
        self.log.get()
    }

    /// The host of this name (`registry.example:5000`).
    pub(super) fn host(&self, name: &str) -> Arc<Host> {
        let mut hosts = lock(&self.hosts);
        hosts.entry(name.to_owned()).or_insert_with(|| Arc::new(Host::new(name))).clone()
    }

    /// All hosts that were asked so far, by name.
    #[must_use]
    pub fn hosts(&self) -> Vec<Arc<Host>> {
        let mut hosts: Vec<_> = lock(&self.hosts).values().cloned().collect();
        hosts.sort_by(|a, b| a.name.cmp(&b.name));
        hosts
    }

    /// What reads that nobody waits for may take of the line.
    #[must_use]
    pub fn limits(&self) -> &RateLimits {
        &self.limits
    }

    /// Ends reads that wait for a registry to come back: no further try is made of anything.
    pub fn end(&self) {
        self.ending.store(true, Ordering::Relaxed);
    }

    pub(super) fn is_ending(&self) -> bool {
        self.ending.load(Ordering::Relaxed)
    }

    /// A read is about to begin: it earns its share of a second request.
    pub(super) fn earn_hedge(&self) {
        let mut hedges = lock(&self.hedges);
        *hedges = (*hedges + f64::from(self.hedge.budget_percent) / 100.0).min(HEDGE_BURST);
    }

    /// Whether second requests are made at all, and not sooner than when.
    pub(super) fn hedges_after(&self) -> Option<Duration> {
        let made = self.hedge.enable && self.hedge.budget_percent > 0;
        made.then_some(self.hedge.after)
    }

    /// Takes one second request out of the budget, if there is one left.
    pub(super) fn take_hedge(&self) -> bool {
        let mut hedges = lock(&self.hedges);
        let left = *hedges >= 1.0;
        if left {
            *hedges -= 1.0;
        }
        left
    }
}

/// What a host was asked, and how it answered. Redirects count for the host that gave them.
#[derive(Debug, Default)]
pub struct HostStats {
    /// Requests for bytes of blobs.
    pub requests: AtomicU64,
    /// Bytes of blobs that arrived.
    pub bytes: AtomicU64,
    /// Requests that failed: no answer, a broken or wrong one, an error of the server.
    pub failures: AtomicU64,
    /// Answers that ask for fewer requests (429, or 503 with `Retry-After`).
    pub limited: AtomicU64,
    /// Requests made again after all ways to a blob had failed.
    pub retries: AtomicU64,
    /// Second requests made because this host took long.
    pub hedges: AtomicU64,
    /// Of those, how many were done first.
    pub hedges_won: AtomicU64,
    /// Deliveries whose bytes did not match their checksum.
    pub distrusted: AtomicU64,
}

/// One host.
#[derive(Debug)]
pub struct Host {
    name: String,
    stats: HostStats,
    state: Mutex<State>,
    retries: Mutex<Tokens>,
}

#[derive(Debug)]
struct State {
    failures_in_a_row: u32,
    passed_over_until: Option<Instant>,
    waits: Vec<Duration>,
    next: usize,
    /// Three times the ninth decile, kept up with every few waits.
    patience: Duration,
    /// Bytes a second; 0 before the first telling body.
    bandwidth: f64,
}

impl Host {
    fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            stats: HostStats::default(),
            state: Mutex::new(State {
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

    /// What it was asked.
    #[must_use]
    pub fn stats(&self) -> &HostStats {
        &self.stats
    }

    /// Whether it is not passed over now.
    #[must_use]
    pub fn is_healthy(&self) -> bool {
        lock(&self.state).passed_over_until.is_none_or(|until| until <= Instant::now())
    }

    /// How long it may keep a reader waiting before it counts as a straggler.
    #[must_use]
    pub fn patience(&self) -> Duration {
        lock(&self.state).patience
    }

    /// How long a body of so many bytes may take, when that is known.
    pub(super) fn patience_with_body(&self, bytes: u64) -> Option<Duration> {
        let bandwidth = lock(&self.state).bandwidth;
        let seconds = SLOW_BODY * bytes as f64 / bandwidth;
        (bandwidth > 0.0).then(|| Duration::try_from_secs_f64(seconds).ok()).flatten()
    }

    /// It failed, or asked to be left alone for `wait`.
    pub(super) fn failed(&self, wait: Option<Duration>) {
        self.stats.failures.fetch_add(1, Ordering::Relaxed);
        let mut state = lock(&self.state);
        let doubled = FIRST_BREAK.saturating_mul(1 << state.failures_in_a_row.min(10));
        state.failures_in_a_row = state.failures_in_a_row.saturating_add(1);
        let rest = doubled.max(wait.unwrap_or_default()).min(LONGEST_BREAK);
        state.passed_over_until = Some(Instant::now() + rest);
    }

    /// Its bytes did not match their checksum.
    pub(super) fn lied(&self) {
        self.stats.distrusted.fetch_add(1, Ordering::Relaxed);
        let mut state = lock(&self.state);
        let until = Instant::now() + BREAK_OF_LIARS;
        state.passed_over_until = state.passed_over_until.max(Some(until));
    }

    /// A read of it was whole. What lied stays passed over.
    pub(super) fn succeeded(&self) {
        let mut state = lock(&self.state);
        if state.failures_in_a_row > 0 {
            state.failures_in_a_row = 0;
            state.passed_over_until = None;
        }
        drop(state);
        lock(&self.retries).give(1.0);
    }

    /// The first byte came after `wait`.
    pub(super) fn heard_after(&self, wait: Duration) {
        let mut state = lock(&self.state);
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

    /// A body of so many bytes took `time` from its first to its last.
    pub(super) fn brought(&self, bytes: u64, time: Duration) {
        let seconds = time.as_secs_f64();
        if bytes < TELLING_BODY || seconds <= 0.0 {
            return;
        }
        let mut state = lock(&self.state);
        let now = bytes as f64 / seconds;
        state.bandwidth = if state.bandwidth == 0.0 {
            now
        } else {
            state.bandwidth + (now - state.bandwidth) * WEIGHT
        };
    }

    /// How long a retry waits for its turn.
    pub(super) fn retry_after(&self) -> Duration {
        self.stats.retries.fetch_add(1, Ordering::Relaxed);
        lock(&self.retries).take(1.0, LONGEST_TURN)
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
            // One in twenty is a straggler: the ninth decile does not see it.
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
