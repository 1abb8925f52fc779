//! What the daemon counts, and how others read it.
//!
//! Whoever does something counts it in a struct of relaxed atomics of its own ([`FetchCounters`],
//! [`QueueCounters`], …): that costs a few nanoseconds and knows nothing of metrics. What those numbers
//! are called outside is said in one place, [`names`]: for each such struct a table, and in it one line
//! for each metric with its name, its kind, what it means and how to read it. So a new counter is
//! a field and a line. Nothing is kept here: whoever asks for the metrics gets a new [`Page`], onto which
//! each part's struct is put with its table.
//!
//! Times are measured only where something is waited for anyway, on a miss: a [`Histogram`] takes two
//! looks at the clock, and a hot read takes none.
//!
//! The page is Prometheus' text format, at `http://127.0.0.1:9863/metrics` if the host's configuration
//! enables the [`exporter`] (`exporterConfig`, upstream's key), and by `turbobd ls --metrics` in any case.
//! Upstream's own names are served too ([`upstream`]), so that dashboards made for it go on.
//!
//! `METRICS.md` lists what there is; a test holds it to [`names`].
//!
//! [`FetchCounters`]: blobs::fetch::FetchCounters
//! [`QueueCounters`]: frontends::ublk::QueueCounters

pub mod exporter;
pub mod names;
mod page;
mod process;
pub mod upstream;

pub use blobs::histogram::{BOUNDS, Histogram, Times};
pub use page::{Label, Page};
pub use process::Process;

/// How a metric behaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Only grows, as long as the daemon runs or the device exists.
    Counter,
    /// Goes up and down.
    Gauge,
    /// Durations, counted by how long they were.
    Histogram,
}

impl Kind {
    /// As Prometheus calls it.
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
    /// There is none now, so nothing is said.
    Absent,
}

impl From<u64> for Reading {
    fn from(value: u64) -> Self {
        Self::Whole(value)
    }
}

impl From<&std::sync::atomic::AtomicU64> for Reading {
    fn from(value: &std::sync::atomic::AtomicU64) -> Self {
        Self::Whole(value.load(std::sync::atomic::Ordering::Relaxed))
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

/// A metric of a part whose numbers are in a `T`.
pub struct Metric<T: ?Sized> {
    /// Its name, with its unit at the end.
    pub name: &'static str,
    /// How it behaves.
    pub kind: Kind,
    /// Labels that tell it from others of its name.
    pub labels: &'static [Label<'static>],
    /// What it means, as one sentence without a full stop.
    pub help: &'static str,
    /// Its value.
    pub read: fn(&T) -> Reading,
}
