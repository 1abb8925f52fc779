//! Metrics of the daemon: counters, and their export.
//!
//! Each part counts its work in a struct of [`Counter`]s of its own ([`FetchCounters`], [`FrontTotals`],
//! …): that costs a few nanoseconds and needs no knowledge of metrics. The exported names of these numbers
//! are in one place, [`names`]: for each such struct a table, and in it one line for each metric with its
//! name, its kind, its meaning and the function that reads it. So a new counter is a field and a line. No
//! values are kept here: each request for the metrics builds a new [`Page`], to which each part's struct is
//! added with its table.
//!
//! Times are measured only where a thread waits anyway, on a miss: a [`Histogram`] reads the clock twice, and
//! a cached read never does.
//!
//! The page is in Prometheus' text format, at `http://127.0.0.1:9863/metrics` if the host's configuration
//! enables the [`exporter`] (`exporterConfig`, upstream's key), and by `turbobd ls --metrics` in any case.
//! Upstream's own names are served too ([`upstream`]), so that dashboards made for it continue to work.
//!
//! `METRICS.md` lists all metrics; a test compares it with [`names`].
//!
//! [`FetchCounters`]: blobs::fetch::FetchCounters
//! [`FrontTotals`]: frontends::FrontTotals

pub mod exporter;
pub mod names;
mod page;
mod process;
pub mod upstream;

pub use blobs::histogram::{BOUNDS, Histogram, Times};
pub use page::{Label, Page};
pub use process::Process;
use threads::Counter;

/// Behaviour of a metric.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MetricKind {
    /// Only grows, while the daemon runs or the device exists.
    Counter,
    /// Goes up and down.
    Gauge,
    /// Durations, counted by length.
    Histogram,
}

impl MetricKind {
    /// Name of the kind in Prometheus.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Counter => "counter",
            Self::Gauge => "gauge",
            Self::Histogram => "histogram",
        }
    }
}

/// The value of a metric at one moment.
#[derive(Clone, Debug, PartialEq)]
pub enum Reading {
    /// A number.
    Whole(u64),
    /// A number with a fraction, such as seconds.
    Real(f64),
    /// Durations.
    Times(Times),
    /// There is no value now, so no sample is written.
    Absent,
}

impl From<u64> for Reading {
    fn from(value: u64) -> Self {
        Self::Whole(value)
    }
}

impl From<&Counter> for Reading {
    fn from(value: &Counter) -> Self {
        Self::Whole(value.get())
    }
}

impl From<f64> for Reading {
    fn from(value: f64) -> Self {
        Self::Real(value)
    }
}

impl From<&Histogram> for Reading {
    fn from(value: &Histogram) -> Self {
        Self::Times(value.times())
    }
}

/// A metric of a part whose counters are in a `T`.
pub struct Metric<T: ?Sized> {
    /// Its name, with its unit at the end.
    pub name: &'static str,
    /// Its kind.
    pub kind: MetricKind,
    /// Labels that tell it from others of the same name.
    pub labels: &'static [Label<'static>],
    /// Its meaning, as one sentence without a full stop.
    pub help: &'static str,
    /// Its value.
    pub read: fn(&T) -> Reading,
}
