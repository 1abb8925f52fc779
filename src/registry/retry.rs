//! Retry policy: pauses, deadlines, numbers of tries.
//!
//! Pauses double from a short first one up to a bound, each shortened at random by up to a half:
//! the hosts of a fleet must not return to their registry all at once. In addition the readers of
//! one host take turns ([`host`](super::host)), so that an outage causes no storm of requests. A
//! server's `Retry-After` is obeyed when the deadline allows it; when it does not, the read fails
//! at once instead of sleeping until a certain failure.

use std::hash::{BuildHasher as _, RandomState};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use super::client::RepositoryPlace;
use super::error::RegistryError;
use super::host::{Host, Network};

/// Limits on the tries of one operation.
#[derive(Clone, Copy, Debug)]
pub struct RetryPolicy {
    /// Number of tries, the first included; at least 1.
    pub max_tries: u32,
    /// Time from the first try to the last byte. Longer than any healthy answer, shorter than the
    /// two minutes after which the kernel reports a hung task.
    pub deadline: Duration,
    /// Pause after the first failure; doubled after each further one.
    pub first_pause: Duration,
    /// Longest pause, unless the server asks for a longer one.
    pub max_pause: Duration,
}

impl RetryPolicy {
    /// For a user who waits for a command: one lost request is repeated, and a wrong host is
    /// reported in seconds.
    pub const COMMAND: Self = Self {
        max_tries: 5,
        deadline: Duration::from_secs(60),
        first_pause: Duration::from_millis(100),
        max_pause: Duration::from_secs(5),
    };

    /// For a read that blocks processes: it waits for up to a minute while a registry restarts.
    pub const READ: Self = Self { max_tries: u32::MAX, ..Self::COMMAND };
}

/// `pause` shortened at random by up to a half, so that reads that failed together are not repeated
/// together. Never longer: a policy's longest pause is a promise.
fn by_chance(pause: Duration) -> Duration {
    let chance = RandomState::new().hash_one(()) >> 32;
    pause.mul_f64(0.5 + chance as f64 / (1_u64 << 33) as f64)
}

/// Tries of a request whose answers break the rules. Such a server may be one bad node of many, but
/// is more likely to stay broken: retries for a minute would only hide the reason.
const MAX_TRIES_OF_NONSENSE: u32 = 5;

/// The budget of one operation.
pub(super) struct Budget {
    policy: RetryPolicy,
    started: Instant,
    tries: u32,
    host: Arc<Host>,
    network: Arc<Network>,
}

impl Budget {
    pub(super) fn new(policy: RetryPolicy, place: &RepositoryPlace) -> Self {
        Self::of(policy, place.state.clone(), place.services.network.clone())
    }

    fn of(policy: RetryPolicy, host: Arc<Host>, network: Arc<Network>) -> Self {
        Self { policy, started: Instant::now(), tries: 0, host, network }
    }

    /// Time at which the operation must be done.
    pub(super) fn deadline(&self) -> Instant {
        self.started + self.policy.deadline
    }

    /// Starts the count anew, after progress.
    pub(super) fn renew(&mut self) {
        self.started = Instant::now();
        self.tries = 0;
    }

    /// Records a failed try and sleeps before the next one.
    ///
    /// # Errors
    /// Returns `error` itself when it is final, [`RegistryError::GaveUp`] when the budget is used
    /// up.
    pub(super) fn pause(&mut self, error: RegistryError) -> Result<(), RegistryError> {
        self.pause_telling(error, |_, _| ())
    }

    /// Form of [`Budget::pause`] that calls `tell` with the error and the time until the next try
    /// before it sleeps.
    pub(super) fn pause_telling(
        &mut self,
        error: RegistryError,
        mut tell: impl FnMut(&RegistryError, Duration),
    ) -> Result<(), RegistryError> {
        self.tries += 1;
        if !error.is_transient() || self.network.is_ending() {
            return Err(self.give_up(error));
        }
        let doubled = self.policy.first_pause.saturating_mul(1 << (self.tries - 1).min(20));
        let left = self.policy.deadline.saturating_sub(self.started.elapsed());
        // A pause that would end after the deadline is shortened, so the last tries come close
        // together.
        let wait = by_chance(doubled.min(self.policy.max_pause))
            .min(left.mul_f64(0.75))
            .max(error.retry_after().unwrap_or_default())
            .max(self.host.retry_after());
        let nonsense = matches!(error, RegistryError::Protocol { .. });
        let most =
            if nonsense { MAX_TRIES_OF_NONSENSE } else { u32::MAX }.min(self.policy.max_tries);
        if self.tries >= most || wait >= left || left < self.policy.first_pause {
            return Err(self.give_up(error));
        }
        tracing::debug!(tries = self.tries, ?wait, %error, "registry: trying again");
        tell(&error, wait);
        thread::sleep(wait);
        Ok(())
    }

    fn give_up(&self, error: RegistryError) -> RegistryError {
        if self.tries <= 1 {
            return error;
        }
        RegistryError::GaveUp {
            tries: self.tries,
            elapsed: self.started.elapsed(),
            last: Box::new(error),
        }
    }

    /// Runs `attempt` until it succeeds or the budget is used up.
    pub(super) fn run<T>(
        &mut self,
        mut attempt: impl FnMut(Instant) -> Result<T, RegistryError>,
    ) -> Result<T, RegistryError> {
        loop {
            match attempt(self.deadline()) {
                Ok(done) => return Ok(done),
                Err(error) => self.pause(error)?,
            }
        }
    }
}

/// `Retry-After` as a duration from now: seconds, or an HTTP date in the form every server sends
/// (RFC 9110 10.2.3, 5.6.7).
pub(super) fn parse_retry_after(text: &str, unix_now: u64) -> Option<Duration> {
    let text = text.trim();
    if let Ok(seconds) = text.parse::<u64>() {
        return Some(Duration::from_secs(seconds));
    }
    let at = parse_http_date(text)?;
    Some(Duration::from_secs(at.saturating_sub(unix_now)))
}

/// `Sun, 06 Nov 1994 08:49:37 GMT` as seconds since 1970.
fn parse_http_date(text: &str) -> Option<u64> {
    const MONTHS: [&str; 12] =
        ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
    let mut words = text.split_whitespace().skip(1);
    let day: u64 = words.next()?.parse().ok().filter(|day| (1..=31).contains(day))?;
    let month_name = words.next()?;
    let month = MONTHS.iter().position(|name| *name == month_name)? as u64 + 1;
    let year: u64 = words.next()?.parse().ok().filter(|year| (1970..10000).contains(year))?;
    let mut clock =
        words.next()?.split(':').map(|part| part.parse::<u64>().ok().filter(|n| *n < 61));
    let (hour, minute, second) = (clock.next()??, clock.next()??, clock.next()??);
    Some(((days_since_1970(year, month, day) * 24 + hour) * 60 + minute) * 60 + second)
}

/// Days from 1970-01-01 to a date of the Gregorian calendar, counted in years that begin in March.
pub(super) fn days_since_1970(year: u64, month: u64, day: u64) -> u64 {
    let (year, month) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let leap_days = year / 4 - year / 100 + year / 400;
    year * 365 + leap_days + (month * 153 + 2) / 5 + day - 1 - 719_468
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flaky() -> RegistryError {
        RegistryError::Unreachable {
            what: "blob".into(),
            host: "h".into(),
            reason: "it broke".into(),
        }
    }

    fn budget(policy: RetryPolicy) -> Budget {
        let network = Arc::new(Network::default());
        Budget::of(policy, network.host("h"), network)
    }

    fn quick(max_tries: u32) -> RetryPolicy {
        let pause = Duration::from_millis(1);
        RetryPolicy {
            max_tries,
            deadline: Duration::from_secs(5),
            first_pause: pause,
            max_pause: pause,
        }
    }

    #[test]
    fn tries_are_counted_and_the_last_reason_is_told() {
        let mut calls = 0;
        let error = budget(quick(3))
            .run(|_| -> Result<(), _> {
                calls += 1;
                Err(flaky())
            })
            .unwrap_err();
        assert_eq!(calls, 3);
        assert!(
            error
                .to_string()
                .starts_with("Cannot reach h for blob: it broke (gave up after 3 tries"),
            "{error}"
        );
        assert!(matches!(error.root(), RegistryError::Unreachable { .. }));
    }

    #[test]
    fn no_pause_is_longer_than_the_policy_says_nor_shorter_than_half() {
        for pause in [Duration::from_millis(50), Duration::ZERO, Duration::MAX / 2] {
            for _ in 0..1000 {
                let wait = by_chance(pause);
                assert!(wait <= pause && wait >= pause / 2 - pause / 1000, "{pause:?}: {wait:?}");
            }
        }
    }

    #[test]
    fn what_can_never_succeed_is_tried_once() {
        let mut calls = 0;
        let error = budget(quick(9)).run(|_| -> Result<(), _> {
            calls += 1;
            Err(RegistryError::NotFound { what: "blob".into() })
        });
        assert!(matches!(error, Err(RegistryError::NotFound { .. })));
        assert_eq!(calls, 1);
    }

    #[test]
    fn a_retry_after_past_the_deadline_fails_at_once() {
        let wait = Some(Duration::from_secs(3600));
        let started = Instant::now();
        let error = budget(quick(9)).run(|_| -> Result<(), _> {
            Err(RegistryError::RateLimited { what: "b".into(), retry_after: wait })
        });
        assert!(matches!(error, Err(RegistryError::RateLimited { .. })));
        assert!(started.elapsed() < Duration::from_secs(2));
    }

    #[test]
    fn the_time_until_the_deadline_is_used_up() {
        let pause = Duration::from_millis(20);
        let (max_pause, deadline) = (Duration::from_secs(9), Duration::from_millis(500));
        let policy = RetryPolicy { max_tries: u32::MAX, deadline, first_pause: pause, max_pause };
        let started = Instant::now();
        let error = budget(policy).run(|_| -> Result<(), _> { Err(flaky()) }).unwrap_err();
        assert!(matches!(error, RegistryError::GaveUp { tries: 5..20, .. }), "{error}");
        assert!(started.elapsed() >= deadline - pause, "{:?}", started.elapsed());
    }

    #[test]
    fn retry_after_is_seconds_or_a_date() {
        assert_eq!(parse_retry_after("120", 0), Some(Duration::from_secs(120)));
        let date = "Sun, 06 Nov 1994 08:49:37 GMT";
        assert_eq!(parse_http_date(date), Some(784_111_777));
        assert_eq!(parse_retry_after(date, 784_111_770), Some(Duration::from_secs(7)));
        assert_eq!(parse_retry_after(date, 999_999_999), Some(Duration::ZERO));
        for bad in
            ["", "soon", "Sun, 99 Nov 1994 08:49:37 GMT", "Sun, 06 Foo 1994 08:49:37 GMT", "-1"]
        {
            assert_eq!(parse_retry_after(bad, 0), None, "{bad}");
        }
    }
}
