//! A bound on the lines of a server's log: a failure that repeats leaves one line a minute, with the number of those left out.
//!
//! A container's user can make reads fail as fast as the processor allows. Each place in the program that logs warnings or
//! errors, and each device that its lines name, has a budget of a minute: one line if the line tells an error
//! (`error=`), else [`PLAIN`]. What is left out is counted, and the next line of that place says so.

use std::collections::HashMap;
use std::io::{self, Write};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tracing::callsite::Identifier;
use tracing::{Level, Metadata};
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::fmt::writer::BoxMakeWriter;

/// Length of a budget.
const MINUTE: Duration = Duration::from_secs(60);

/// Lines a minute that tell no error: the warnings of a configuration come from one place.
const PLAIN: u32 = 20;

/// Number of places and devices with a budget of their own. The others share one.
const KEYS: usize = 4096;

/// A place in the program, and a device.
type LineKey = Option<(Identifier, String)>;

/// Lines of one key in a minute.
struct LineBudget {
    since: Instant,
    written: u32,
    left_out: u64,
}

/// A log whose repeated failures are bounded.
pub(super) struct LimitedLog {
    inner: BoxMakeWriter,
    budgets: Mutex<HashMap<LineKey, LineBudget>>,
}

impl LimitedLog {
    pub(super) fn new(inner: BoxMakeWriter) -> Self {
        Self { inner, budgets: Mutex::default() }
    }

    /// True if the line is written; with the number of lines that were left out before it.
    fn admit(&self, place: &Identifier, line: &[u8], now: Instant) -> Option<u64> {
        let text = String::from_utf8_lossy(line);
        let most = if text.contains(" error=") { 1 } else { PLAIN };
        let device = text.split(" device=").nth(1).and_then(|rest| rest.split_whitespace().next());
        let mut key = Some((place.clone(), device.unwrap_or_default().to_owned()));
        let mut budgets = self.budgets.lock();
        if budgets.len() >= KEYS && !budgets.contains_key(&key) {
            budgets.retain(|_, budget| now.saturating_duration_since(budget.since) < MINUTE);
            if budgets.len() >= KEYS {
                key = None;
            }
        }
        let budget =
            budgets.entry(key).or_insert(LineBudget { since: now, written: 0, left_out: 0 });
        if now.saturating_duration_since(budget.since) >= MINUTE {
            (budget.since, budget.written) = (now, 0);
        }
        if budget.written >= most {
            budget.left_out += 1;
            return None;
        }
        budget.written += 1;
        Some(std::mem::take(&mut budget.left_out))
    }
}

impl<'a> MakeWriter<'a> for LimitedLog {
    type Writer = LimitedLine<'a>;

    fn make_writer(&'a self) -> Self::Writer {
        LimitedLine { log: self, place: None }
    }

    fn make_writer_for(&'a self, event: &Metadata<'_>) -> Self::Writer {
        let place = (*event.level() <= Level::WARN).then(|| event.callsite());
        LimitedLine { log: self, place }
    }
}

/// One line of the log: `tracing` makes one write of it.
pub(super) struct LimitedLine<'a> {
    log: &'a LimitedLog,
    place: Option<Identifier>,
}

impl Write for LimitedLine<'_> {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let mut inner = self.log.inner.make_writer();
        let left_out = match &self.place {
            None => Some(0),
            Some(place) => self.log.admit(place, line, Instant::now()),
        };
        match left_out {
            None => {}
            Some(0) => inner.write_all(line)?,
            Some(left_out) => {
                let mut line = line.strip_suffix(b"\n").unwrap_or(line).to_vec();
                line.extend(format!(" (and {left_out} more like it before, left out)\n").bytes());
                inner.write_all(&line)?;
            }
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use tracing_subscriber::layer::SubscriberExt as _;

    #[derive(Clone, Default)]
    struct LogText(Arc<Mutex<Vec<u8>>>);

    impl Write for LogText {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().extend(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_failure_that_repeats_leaves_one_line_for_each_device_and_others_stay() {
        let kept = LogText::default();
        let into = kept.clone();
        let log = LimitedLog::new(BoxMakeWriter::new(move || into.clone()));
        let lines = tracing_subscriber::fmt::layer().with_writer(log).with_ansi(false);
        tracing::subscriber::with_default(tracing_subscriber::registry().with(lines), || {
            for number in 0..1000 {
                let device = number % 2;
                tracing::error!(device, error = "no route", "A read failed at {number}");
            }
            for number in 0..5 {
                tracing::warn!("The key {number} is not known");
            }
            for number in 0..50 {
                tracing::info!("step {number}");
            }
        });
        let text = String::from_utf8(kept.0.lock().clone()).unwrap();
        let of = |part: &str| text.lines().filter(|line| line.contains(part)).count();
        assert_eq!((of("A read failed"), of("is not known"), of("step")), (2, 5, 50), "{text}");
    }

    #[test]
    fn what_was_left_out_is_counted_in_the_next_minute() {
        let log = LimitedLog::new(BoxMakeWriter::new(io::sink));
        let place = {
            static CALLSITE: tracing::callsite::DefaultCallsite =
                tracing::callsite::DefaultCallsite::new(&META);
            static META: Metadata<'static> = tracing::metadata! {
                name: "line", target: "test", level: Level::ERROR, fields: &[],
                callsite: &CALLSITE, kind: tracing::metadata::Kind::EVENT
            };
            Identifier(&CALLSITE)
        };
        let start = Instant::now();
        let admit =
            |seconds| log.admit(&place, b"x error=e\n", start + Duration::from_secs(seconds));
        assert_eq!(
            [admit(0), admit(1), admit(59), admit(60), admit(61)],
            [Some(0), None, None, Some(2), None]
        );
    }
}
