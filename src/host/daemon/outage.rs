//! What the log says of a device that stalls or fails: one line when it begins, one when the device goes on, and at most one
//! line a minute meanwhile, with the number of failures that it stands for.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use disk::DiskRange;

/// Time after which a waiting read is no longer just slow: the device is reported as stalled. A device whose reads fail goes
/// on when a read succeeds and none has failed for so long.
pub(super) const STALLED: Duration = Duration::from_secs(5);

/// Time between two lines of one device.
const MINUTE: Duration = Duration::from_secs(60);

/// The outages of one device.
#[derive(Default)]
pub(super) struct Outage {
    device: OnceLock<String>,
    /// True during an outage, for a look without the lock.
    is_on: AtomicBool,
    state: Mutex<OutageState>,
}

#[derive(Default)]
struct OutageState {
    /// Start of the outage.
    since: Option<Instant>,
    /// Last line of a beginning or a failure.
    told: Option<Instant>,
    /// The beginning of this outage was told, so its end is, too.
    is_told: bool,
    last_failure: Option<Instant>,
    failed: u64,
    left_out: u64,
}

impl OutageState {
    /// True if a line may be written now; then the next may in a minute.
    fn may_tell(&mut self, now: Instant) -> bool {
        let may = self.told.is_none_or(|told| now.saturating_duration_since(told) >= MINUTE);
        if may {
            self.told = Some(now);
        }
        may
    }
}

impl Outage {
    /// The device has this name in lines.
    pub(super) fn named(&self, device: &str) {
        let _ = self.device.set(device.to_owned());
    }

    fn device(&self) -> &str {
        self.device.get().map_or("a device that is being made", String::as_str)
    }

    /// A read has waited for longer than [`STALLED`]; called again as long as it does.
    pub(super) fn stalled(
        &self,
        now: Instant,
        range: DiskRange,
        waits: Duration,
        reason: Option<&str>,
    ) {
        let mut state = self.state.lock();
        if state.since.is_some() {
            return;
        }
        state.since = Some(now.checked_sub(waits).unwrap_or(now));
        self.is_on.store(true, Ordering::Relaxed);
        state.is_told = state.may_tell(now);
        if state.is_told {
            let reason = reason.unwrap_or("no request has failed yet");
            tracing::warn!(
                device = self.device(),
                offset = range.offset,
                bytes = range.len,
                "The device stalls: a read waits for {} s: {reason}",
                waits.as_secs()
            );
        }
    }

    /// A read has failed.
    pub(super) fn failed(&self, now: Instant, range: DiskRange, error: &str) {
        let mut state = self.state.lock();
        state.since.get_or_insert(now);
        self.is_on.store(true, Ordering::Relaxed);
        state.last_failure = Some(now);
        state.failed += 1;
        if state.may_tell(now) {
            state.is_told = true;
            let more = match std::mem::take(&mut state.left_out) {
                0 => String::new(),
                more => format!(" (and {more} before it that were left out)"),
            };
            tracing::warn!(
                device = self.device(),
                offset = range.offset,
                bytes = range.len,
                "A read failed{more}: {error}"
            );
        } else {
            state.left_out += 1;
        }
    }

    /// A read has succeeded, and none waits for longer than [`STALLED`].
    pub(super) fn succeeded(&self, now: Instant) {
        if !self.is_on.load(Ordering::Relaxed) {
            return;
        }
        let mut state = self.state.lock();
        let failing = |at: Instant| now.saturating_duration_since(at) < STALLED;
        if state.last_failure.is_some_and(failing) {
            return;
        }
        let Some(since) = state.since.take() else { return };
        self.is_on.store(false, Ordering::Relaxed);
        let failed = std::mem::take(&mut state.failed);
        (state.left_out, state.last_failure) = (0, None);
        if std::mem::take(&mut state.is_told) {
            let took = now.saturating_duration_since(since).as_secs();
            tracing::warn!(
                device = self.device(),
                "The device goes on after {took} s; {failed} reads failed"
            );
        }
    }

    /// True during an outage.
    pub(super) fn is_on(&self) -> bool {
        self.is_on.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::AtomicUsize;

    use super::*;
    use tracing::span;

    /// Counts the lines.
    #[derive(Clone, Default)]
    struct LineCount(Arc<AtomicUsize>);

    impl tracing::Subscriber for LineCount {
        fn enabled(&self, _: &tracing::Metadata<'_>) -> bool {
            true
        }
        fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
            span::Id::from_u64(1)
        }
        fn record(&self, _: &span::Id, _: &span::Record<'_>) {}
        fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}
        fn event(&self, _: &tracing::Event<'_>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
        fn enter(&self, _: &span::Id) {}
        fn exit(&self, _: &span::Id) {}
    }

    #[test]
    fn an_outage_of_ten_minutes_leaves_a_line_a_minute_and_one_at_its_end() {
        let count = LineCount::default();
        let lines = || count.0.swap(0, Ordering::Relaxed);
        tracing::subscriber::with_default(count.clone(), || {
            let (outage, start) = (Outage::default(), Instant::now());
            let range = DiskRange::new(0, 4096);
            let at = |seconds| start + Duration::from_secs(seconds);
            outage.named("/dev/loop7");
            outage.succeeded(at(0));
            assert_eq!(lines(), 0, "no outage");
            outage.stalled(at(5), range, STALLED, Some("no route"));
            outage.stalled(at(6), range, STALLED, None);
            outage.succeeded(at(8));
            assert_eq!(lines(), 2, "a stall and its end");
            for second in 60..660 {
                (0..50).for_each(|_| outage.failed(at(100 + second), range, "no route"));
            }
            assert_eq!(lines(), 10);
            outage.succeeded(at(760));
            assert_eq!((lines(), outage.is_on()), (0, true), "others have just failed");
            outage.succeeded(at(765));
            assert_eq!((lines(), outage.is_on()), (1, false));
        });
    }
}
