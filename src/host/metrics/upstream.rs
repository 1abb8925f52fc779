//! Upstream's metrics: those that `overlaybd-tcmu` exports, for dashboards made for it.
//!
//! Upstream has rates and maxima where Prometheus would have counters. A rate is computed from two queries,
//! over the time between the last two that are at least [`LEAST`] apart: two scrapers see the same rate, and
//! neither shortens the other's interval.

use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// Shortest time over which a rate is computed.
const LEAST: Duration = Duration::from_secs(1);

/// Totals of a series.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Reads.
    pub reads: u64,
    /// Bytes of them.
    pub bytes: u64,
}

/// One of upstream's two series.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Series {
    /// Total bytes.
    pub bytes: u64,
    /// Bytes a second.
    pub bytes_a_second: f64,
    /// Reads a second.
    pub reads_a_second: f64,
    /// The longest wait since the last query, in microseconds.
    pub longest: u64,
}

/// Upstream's exported metrics.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Upstream {
    /// Reads of devices.
    pub pread: Series,
    /// Traffic from registries.
    pub download: Series,
}

/// Computes rates from totals.
#[derive(Debug, Default)]
pub struct Rates {
    last: Mutex<Last>,
}

#[derive(Debug, Default)]
struct Last {
    look: Option<(Instant, [Totals; 2])>,
    now: [Series; 2],
}

impl Rates {
    /// Upstream's metrics for these totals; `longest` returns the longest waits since its last call.
    pub fn look(
        &self,
        now: Instant,
        totals: [Totals; 2],
        longest: impl FnOnce() -> [u64; 2],
    ) -> Upstream {
        let mut last = self.last.lock();
        let Last { look, now: series } = &mut *last;
        match look {
            Some((then, _)) if now.saturating_duration_since(*then) < LEAST => {}
            _ => {
                let longest = longest();
                for (number, series) in series.iter_mut().enumerate() {
                    series.longest = longest[number];
                    if let Some((then, before)) = look {
                        let seconds = now.saturating_duration_since(*then).as_secs_f64();
                        // Totals shrink when a device is removed.
                        let a_second =
                            |now: u64, then: u64| now.saturating_sub(then) as f64 / seconds;
                        series.bytes_a_second =
                            a_second(totals[number].bytes, before[number].bytes);
                        series.reads_a_second =
                            a_second(totals[number].reads, before[number].reads);
                    }
                }
                *look = Some((now, totals));
            }
        }
        for (series, totals) in series.iter_mut().zip(totals) {
            series.bytes = totals.bytes;
        }
        let [pread, download] = *series;
        Upstream { pread, download }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_is_over_the_time_between_two_looks_and_not_disturbed_by_a_third() {
        let rates = Rates::default();
        let begin = Instant::now();
        let totals =
            |reads, bytes| [Totals { reads, bytes }, Totals { reads: reads / 10, bytes: 0 }];
        let look = |seconds: f64, totals| {
            rates.look(begin + Duration::from_secs_f64(seconds), totals, || [5, 6])
        };
        assert_eq!(look(0.0, totals(100, 1000)).pread.bytes_a_second, 0.0);
        let now = look(10.0, totals(200, 9000));
        assert_eq!((now.pread.bytes_a_second, now.pread.reads_a_second), (800.0, 10.0));
        assert_eq!((now.download.reads_a_second, now.download.longest), (1.0, 6));
        let again = look(10.1, totals(300, 9900));
        assert_eq!((again.pread.bytes_a_second, again.pread.bytes), (800.0, 9900));
        assert_eq!(look(20.0, totals(0, 0)).pread.reads_a_second, 0.0);
    }
}
