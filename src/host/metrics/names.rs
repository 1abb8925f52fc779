//! Every metric: its name, its kind, its meaning, and the function that reads it.
//!
//! Names follow Prometheus' rules: the program first, the base unit last (seconds, bytes), `_total` at the
//! end of a counter. One table for each struct of counters; [`all`] lists them.

use super::upstream::Upstream;
use super::{Label, Metric, MetricKind, Process, Reading, exporter::ExporterCounters};
use crate::config::log_file::LogFile;
use crate::readings::{AuditCounters, ComparisonCounters, DeviceReading};
use blobs::cache::{CacheStats, Residents};
use blobs::fetch::FetchCounters;
use blobs::tier::Tier;
use registry::Host;

/// A metric that only grows.
const fn counter<T: ?Sized>(
    name: &'static str,
    help: &'static str,
    read: fn(&T) -> Reading,
) -> Metric<T> {
    Metric { name, kind: MetricKind::Counter, labels: &[], help, read }
}

/// A metric that goes up and down.
const fn gauge<T: ?Sized>(
    name: &'static str,
    help: &'static str,
    read: fn(&T) -> Reading,
) -> Metric<T> {
    Metric { name, kind: MetricKind::Gauge, labels: &[], help, read }
}

/// A metric of durations.
const fn times<T: ?Sized>(
    name: &'static str,
    help: &'static str,
    read: fn(&T) -> Reading,
) -> Metric<T> {
    Metric { name, kind: MetricKind::Histogram, labels: &[], help, read }
}

impl<T: ?Sized> Metric<T> {
    /// Adds labels, for several metrics of one name.
    const fn with(mut self, labels: &'static [Label<'static>]) -> Self {
        self.labels = labels;
        self
    }
}

/// The daemon's process.
pub const PROCESS: &[Metric<Process>] = &[
    gauge(
        "turbobd_start_time_seconds",
        "Time at which the daemon began to serve, since 1970",
        |process| process.started.into(),
    ),
    gauge("turbobd_resident_memory_bytes", "Resident memory of the daemon", |process| {
        process.resident.map_or(Reading::Absent, Reading::Whole)
    }),
    gauge("turbobd_threads", "Threads of the daemon", |process| {
        process.threads.map_or(Reading::Absent, Reading::Whole)
    }),
    gauge("turbobd_open_files", "Open file descriptors of the daemon", |process| {
        process.descriptors.map_or(Reading::Absent, Reading::Whole)
    }),
];

/// A device. The labels of [`DEVICE_LABELS`] are added.
pub const DEVICE: &[Metric<DeviceReading>] = &[
    gauge("turbobd_device_size_bytes", "Size of the disk", |device| device.size.into()),
    counter("turbobd_device_reads_total", "Read requests answered with data", |device| {
        device.front.reads.into()
    }),
    counter("turbobd_device_read_bytes_total", "Bytes of those", |device| {
        device.front.bytes.into()
    }),
    counter(
        "turbobd_device_direct_total",
        "Reads answered from the address of their bytes, without a copy in user space",
        |device| device.front.direct.into(),
    ),
    counter("turbobd_device_zero_total", "Reads of zeros only", |device| device.front.zero.into()),
    counter(
        "turbobd_device_gathered_total",
        "Reads whose bytes were gathered from several places first, by a copy in user space",
        |device| device.front.gathered.into(),
    ),
    counter("turbobd_device_waits_total", "Times a read had to wait for its bytes", |device| {
        device.front.pending.into()
    }),
    counter("turbobd_device_writes_total", "Write requests stored", |device| {
        device.front.writes.into()
    }),
    counter(
        "turbobd_device_written_bytes_total",
        "Bytes of those, for devices of ublk",
        |device| device.front.written.into(),
    ),
    counter(
        "turbobd_device_zeroed_total",
        "Discards and requests for zeros done; over FUSE they count as writes",
        |device| device.front.zeroed.into(),
    ),
    counter(
        "turbobd_device_flushes_total",
        "Flushes, and writes that were made durable at once",
        |device| device.front.flushes.into(),
    ),
    counter("turbobd_device_errors_total", "Requests answered with an error", |device| {
        device.front.errors.into()
    }),
    counter(
        "turbobd_device_refused_total",
        "Writes, discards and unknown requests that were refused",
        |device| device.front.refused.into(),
    ),
    counter(
        "turbobd_device_wakes_total",
        "System calls made to wake a sleeping queue thread",
        |device| device.front.wakes.into(),
    ),
    gauge("turbobd_device_failed", "1 when a part of the device's server has ended", |device| {
        u64::from(device.front.lost_queues > 0).into()
    }),
    times(
        "turbobd_device_wait_seconds",
        "Waiting times of reads whose bytes were not in memory",
        |device| {
            // A thousand devices without any wait need no twenty lines each.
            if device.waits.times.count() == 0 {
                Reading::Absent
            } else {
                Reading::Times(device.waits.times)
            }
        },
    ),
    gauge("turbobd_device_waiting", "Reads that wait now", |device| device.waits.waiting.into()),
    gauge(
        "turbobd_device_oldest_wait_seconds",
        "Age of the oldest read that waits now; 0 when none waits",
        |device| device.waits.oldest.map_or(0.0, |oldest| oldest.as_secs_f64()).into(),
    ),
    counter(
        "turbobd_device_deadlines_total",
        "Reads that ended with an error because their deadline had passed",
        |device| device.waits.expired.into(),
    ),
    counter(
        "turbobd_device_repeated_total",
        "Reads repeated after an error, by the policy to wait",
        |device| device.waits.repeated.into(),
    ),
    gauge(
        "turbobd_device_cached_bytes",
        "Memory of the cache that the image's blobs take; blobs that images share count for each",
        |device| device.image.cached.into(),
    ),
    counter(
        "turbobd_device_fetched_bytes_total",
        "Bytes fetched from registries for the image's blobs since it was attached; blobs that images share count for each",
        |device| device.image.fetched.into(),
    ),
    counter(
        "turbobd_device_requests_total",
        "Range requests made to registries for these bytes",
        |device| device.image.requests.into(),
    ),
    counter(
        "turbobd_device_retries_total",
        "Tries after the first of a read of the image's blobs: each follows a failed request, its broken body included",
        |device| device.image.retries.into(),
    ),
    counter(
        "turbobd_device_fetch_errors_total",
        "Reads of the image's blobs that failed after their last try",
        |device| device.image.errors.into(),
    ),
];

/// The memory cache.
pub const CACHE: &[Metric<CacheStats>] = &[
    counter("turbobd_cache_hits_total", "Look-ups answered at once", |cache| cache.hits.into()),
    counter("turbobd_cache_misses_total", "Look-ups that had to wait", |cache| cache.misses.into()),
    counter("turbobd_cache_loads_total", "Chunks requested from their sources", |cache| {
        cache.loads.into()
    }),
    counter("turbobd_cache_errors_total", "Loads that failed", |cache| cache.errors.into()),
    gauge("turbobd_cache_bytes", "Memory that decoded chunks take", |cache| cache.bytes.into()),
    gauge("turbobd_cache_chunks", "Decoded chunks in memory", |cache| cache.chunks.into()),
    counter("turbobd_cache_evictions_total", "Chunks evicted for others", |cache| {
        cache.evictions.into()
    }),
    counter(
        "turbobd_cache_unkept_total",
        "Chunks served and not kept, for lack of room",
        |cache| cache.unkept.into(),
    ),
];

/// A registry, a mirror or a peer. Its label is added.
pub const HOST: &[Metric<Host>] = &[
    counter(
        "turbobd_registry_requests_total",
        "Requests for bytes of blobs, to a registry, a mirror or a peer",
        |host| (&host.stats().requests).into(),
    ),
    counter("turbobd_registry_bytes_total", "Bytes of blobs that the host sent", |host| {
        (&host.stats().bytes).into()
    }),
    counter("turbobd_registry_failures_total", "Requests to the host that failed", |host| {
        (&host.stats().failures).into()
    }),
    counter(
        "turbobd_registry_limited_total",
        "Answers of the host that ask for fewer requests",
        |host| (&host.stats().limited).into(),
    ),
    counter(
        "turbobd_registry_retries_total",
        "Reads repeated after every source had failed",
        |host| (&host.stats().retries).into(),
    ),
    counter(
        "turbobd_registry_hedges_total",
        "Second requests made because the host took unusually long",
        |host| (&host.stats().hedges).into(),
    ),
    counter(
        "turbobd_registry_hedges_won_total",
        "Second requests that the host answered first",
        |host| (&host.stats().hedges_won).into(),
    ),
    counter(
        "turbobd_registry_distrusted_total",
        "Deliveries of the host whose bytes did not match their checksum",
        |host| (&host.stats().distrusted).into(),
    ),
    gauge(
        "turbobd_registry_healthy",
        "0 while the host is asked last, after failures or wrong bytes",
        |host| u64::from(host.is_healthy()).into(),
    ),
];
/// Memory of images beside the cache.
pub const RESIDENT: &[Metric<Residents>] = &[gauge(
    "turbobd_meta_bytes",
    "Filesystem metadata in memory, beside the cache; shared metadata counts once",
    |residents| residents.bytes().into(),
)];

/// Fetching and decoding.
pub const FETCH: &[Metric<FetchCounters>] = &[
    counter(
        "turbobd_fetch_requests_total",
        "Range requests made, by class",
        |fetch: &FetchCounters| (&fetch.demand_requests).into(),
    )
    .with(&[("class", "demand")]),
    counter(
        "turbobd_fetch_requests_total",
        "Range requests made, by class",
        |fetch: &FetchCounters| (&fetch.ahead_requests).into(),
    )
    .with(&[("class", "ahead")]),
    counter(
        "turbobd_fetch_requests_total",
        "Range requests made, by class",
        |fetch: &FetchCounters| (&fetch.fill_requests).into(),
    )
    .with(&[("class", "fill")]),
    counter("turbobd_fetch_chunks_total", "Chunks fetched by those requests", |fetch| {
        (&fetch.chunks).into()
    }),
    counter("turbobd_fetch_bytes_total", "Encoded bytes of those chunks", |fetch| {
        (&fetch.bytes).into()
    }),
    counter("turbobd_fetch_local_total", "Chunks read from local files", |fetch| {
        (&fetch.local).into()
    }),
    counter("turbobd_fetch_stored_total", "Chunks read from the disk tiers", |fetch| {
        (&fetch.stored).into()
    }),
    counter("turbobd_fill_chunks_total", "Chunks fetched in the background", |fetch| {
        (&fetch.filled).into()
    }),
    counter("turbobd_fill_bytes_total", "Encoded bytes of those chunks", |fetch| {
        (&fetch.filled_bytes).into()
    }),
    counter(
        "turbobd_fill_taken_over_total",
        "Chunks that the background fill had requested and that were fetched again, because a read could not wait for its turn",
        |fetch| (&fetch.taken_over).into(),
    ),
    counter(
        "turbobd_fill_whole_total",
        "Blobs without a table of checksums that were fetched whole and have their digest",
        |fetch| (&fetch.whole_blobs).into(),
    ),
    counter(
        "turbobd_fill_whole_wrong_total",
        "Blobs that were fetched whole and have another digest than the image names",
        |fetch| (&fetch.whole_wrong).into(),
    ),
    counter(
        "turbobd_fetch_damaged_total",
        "Deliveries of a chunk whose bytes did not match their checksum; each but the third in a row is fetched again",
        |fetch| (&fetch.damaged).into(),
    ),
    counter("turbobd_fetch_failed_total", "Chunks that could not be fetched", |fetch| {
        (&fetch.failed).into()
    }),
    times("turbobd_fetch_first_byte_seconds", "Time from a request to its first byte", |fetch| {
        (&fetch.first_byte).into()
    }),
    times("turbobd_fetch_seconds", "Time from a request to its last byte", |fetch| {
        (&fetch.whole).into()
    }),
    counter(
        "turbobd_long_frames_begun_total",
        "Passes begun through long zstd frames, from their beginning",
        |fetch| (&fetch.frames).into(),
    ),
    counter("turbobd_inflate_in_bytes_total", "Encoded bytes that were decoded", |fetch| {
        (&fetch.inflate_in).into()
    }),
    counter("turbobd_inflate_out_bytes_total", "Decoded bytes that were produced", |fetch| {
        (&fetch.inflate_out).into()
    }),
    times("turbobd_inflate_seconds", "Time to verify and decode a chunk, on one core", |fetch| {
        (&fetch.inflate).into()
    }),
];

/// A disk tier.
pub const TIER: &[Metric<Tier>] = &[
    gauge("turbobd_tier_bytes", "Bytes that the disk tier's files take", |tier| {
        tier.usage().bytes.into()
    }),
    gauge("turbobd_tier_capacity_bytes", "Limit on the bytes of the disk tier's files", |tier| {
        tier.usage().capacity.into()
    }),
    gauge("turbobd_tier_chunks", "Chunks in the disk tier", |tier| {
        (tier.usage().chunks as u64).into()
    }),
    gauge("turbobd_tier_full", "1 while its disk has no space for more", |tier| {
        u64::from(tier.is_full()).into()
    }),
    counter("turbobd_tier_reads_total", "Chunks read from the disk tier", |tier| {
        (&tier.counters().reads).into()
    }),
    counter("turbobd_tier_read_bytes_total", "Bytes of those", |tier| {
        (&tier.counters().read_bytes).into()
    }),
    counter("turbobd_tier_writes_total", "Chunks written to the disk tier", |tier| {
        (&tier.counters().writes).into()
    }),
    counter("turbobd_tier_written_bytes_total", "Bytes of those", |tier| {
        (&tier.counters().written_bytes).into()
    }),
    counter(
        "turbobd_tier_dropped_total",
        "Chunks not written because the queue for the disk was full",
        |tier: &Tier| (&tier.counters().dropped).into(),
    ),
    counter("turbobd_tier_refused_total", "Chunks not written for lack of space", |tier| {
        (&tier.counters().refused).into()
    }),
    counter(
        "turbobd_tier_evicted_total",
        "Chunks evicted for others or for the free-space floor",
        |tier| (&tier.counters().evicted).into(),
    ),
    counter(
        "turbobd_tier_damaged_total",
        "Chunks on disk that failed verification; they are dropped, and fetched again when they are needed",
        |tier: &Tier| (&tier.counters().damaged).into(),
    ),
    counter(
        "turbobd_tier_resets_total",
        "Cache files that were unusable and created anew",
        |tier| (&tier.counters().resets).into(),
    ),
    counter(
        "turbobd_tier_failures_total",
        "Reads, writes and syncs of the disk tier that the system refused",
        |tier: &Tier| (&tier.counters().failures).into(),
    ),
];

/// The log of the daemon, if it goes to a file.
pub const LOG: &[Metric<LogFile>] = &[counter(
    "turbobd_log_lost_total",
    "Messages not written to the log file, because the system refused",
    |log: &LogFile| log.lost().into(),
)];

/// The audit log.
pub const AUDIT: &[Metric<AuditCounters>] = &[
    counter(
        "turbobd_audit_lines_total",
        "Lines written to the audit log",
        |audit: &AuditCounters| (&audit.lines).into(),
    ),
    counter(
        "turbobd_audit_dropped_total",
        "Lines not written to the audit log, because too many were waiting or its file could not be written",
        |audit: &AuditCounters| (&audit.dropped).into(),
    ),
];

/// Comparisons of meta images with their layers.
pub const COMPARISON: &[Metric<ComparisonCounters>] = &[
    counter(
        "turbobd_meta_equal_total",
        "Meta images found beside an image that were compared with its layers and show what these contain",
        |comparisons: &ComparisonCounters| (&comparisons.equal).into(),
    ),
    counter(
        "turbobd_meta_different_total",
        "Meta images that show something else than their layers contain; reads of devices that show one fail",
        |comparisons: &ComparisonCounters| (&comparisons.different).into(),
    ),
    counter(
        "turbobd_meta_incomparable_total",
        "Meta images that could not be compared with their layers",
        |comparisons: &ComparisonCounters| (&comparisons.failed).into(),
    ),
];

/// The endpoint itself.
pub const EXPORTER: &[Metric<ExporterCounters>] =
    &[counter("turbobd_exporter_requests_total", "Requests to the metrics endpoint", |exporter| {
        (&exporter.requests).into()
    })];

/// Upstream's names. Its `pread` counts reads of the devices, and its `download` the traffic from registries.
pub const UPSTREAM: &[Metric<Upstream>] = &[
    gauge("OverlayBD_Alive", "Upstream's name: 1", |_| 1.into()),
    gauge(
        "OverlayBD_Read_Throughtput",
        "Upstream's name: bytes a second, over the time since the last query",
        |now: &Upstream| now.pread.bytes_a_second.into(),
    )
    .with(&[("type", "pread"), ("mode", "read")]),
    gauge(
        "OverlayBD_Read_Throughtput",
        "Upstream's name: bytes a second, over the time since the last query",
        |now: &Upstream| now.download.bytes_a_second.into(),
    )
    .with(&[("type", "download"), ("mode", "read")]),
    gauge(
        "OverlayBD_QPS",
        "Upstream's name: reads a second, over the time since the last query",
        |now: &Upstream| now.pread.reads_a_second.into(),
    )
    .with(&[("type", "pread"), ("mode", "read")]),
    gauge(
        "OverlayBD_QPS",
        "Upstream's name: reads a second, over the time since the last query",
        |now: &Upstream| now.download.reads_a_second.into(),
    )
    .with(&[("type", "download"), ("mode", "read")]),
    gauge(
        "OverlayBD_MaxLatency",
        "Upstream's name: the longest wait since the last query, in microseconds",
        |now: &Upstream| now.pread.longest.into(),
    )
    .with(&[("type", "pread"), ("mode", "read")]),
    gauge(
        "OverlayBD_MaxLatency",
        "Upstream's name: the longest wait since the last query, in microseconds",
        |now: &Upstream| now.download.longest.into(),
    )
    .with(&[("type", "download"), ("mode", "read")]),
    gauge("OverlayBD_Count", "Upstream's name: total bytes", |now: &Upstream| {
        now.pread.bytes.into()
    })
    .with(&[("type", "pread")]),
    gauge("OverlayBD_Count", "Upstream's name: total bytes", |now: &Upstream| {
        now.download.bytes.into()
    })
    .with(&[("type", "download")]),
];

/// Labels of a device's metrics.
pub const DEVICE_LABELS: &[&str] = &["device", "image"];

/// Description of a metric: a row of `METRICS.md`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Description {
    /// Its name.
    pub name: &'static str,
    /// Its kind.
    pub kind: MetricKind,
    /// Its labels, with their values if there are few.
    pub labels: String,
    /// Its meaning.
    pub help: &'static str,
}

/// All metrics, one for each name.
#[must_use]
pub fn all() -> Vec<Description> {
    let mut all = Vec::new();
    describe(&mut all, PROCESS, &[]);
    describe(&mut all, DEVICE, DEVICE_LABELS);
    describe(&mut all, CACHE, &[]);
    describe(&mut all, RESIDENT, &[]);
    describe(&mut all, FETCH, &[]);
    describe(&mut all, HOST, &["host"]);
    describe(&mut all, TIER, &["tier"]);
    describe(&mut all, LOG, &[]);
    describe(&mut all, AUDIT, &[]);
    describe(&mut all, COMPARISON, &[]);
    describe(&mut all, EXPORTER, &[]);
    describe(&mut all, UPSTREAM, &["node"]);
    all
}

fn describe<T: ?Sized>(all: &mut Vec<Description>, metrics: &[Metric<T>], whose: &[&str]) {
    for metric in metrics {
        let Metric { name, kind, help, .. } = *metric;
        if all.iter().any(|one| one.name == name) {
            continue;
        }
        let mut labels: Vec<String> = whose.iter().map(|label| format!("`{label}`")).collect();
        for (number, (label, _)) in metric.labels.iter().enumerate() {
            let same = metrics.iter().filter(|other| other.name == name);
            let mut values: Vec<_> =
                same.filter_map(|other| other.labels.get(number)).map(|label| label.1).collect();
            values.dedup();
            labels.push(format!("`{label}` ({})", values.join(", ")));
        }
        all.push(Description { name, kind, labels: labels.join(", "), help });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The rows of a table that describes all metrics.
    fn rows() -> Vec<String> {
        let row = |one: Description| {
            let labels = if one.labels.is_empty() { "-" } else { &one.labels };
            format!("| `{}` | {} | {labels} | {} |", one.name, one.kind.name(), one.help)
        };
        all().into_iter().map(row).collect()
    }

    #[test]
    fn the_page_for_people_lists_exactly_the_metrics_that_there_are() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../METRICS.md");
        let page = std::fs::read_to_string(path).unwrap();
        let listed: Vec<&str> = page
            .lines()
            .filter(|line| line.starts_with("| `turbobd_") || line.starts_with("| `OverlayBD_"))
            .collect();
        let rows = rows();
        for row in &rows {
            assert!(
                listed.contains(&row.as_str()),
                "METRICS.md lacks this row:\n{row}\nAll of them:\n{}",
                rows.join("\n")
            );
        }
        for row in &listed {
            assert!(
                rows.iter().any(|other| other == row),
                "No metric is as METRICS.md says:\n{row}"
            );
        }
        assert_eq!(listed.len(), rows.len(), "METRICS.md has a row twice");
    }

    #[test]
    fn names_keep_the_rules_and_metrics_of_one_name_agree() {
        fn check<T>(metrics: &[Metric<T>]) {
            for (number, metric) in metrics.iter().enumerate() {
                let Metric { name, kind, .. } = *metric;
                if name.starts_with("OverlayBD_") {
                    continue;
                }
                assert!(name.starts_with("turbobd_"), "{name}");
                assert_eq!(name.ends_with("_total"), kind == MetricKind::Counter, "{name}");
                assert!(kind != MetricKind::Histogram || name.ends_with("_seconds"), "{name}");
                assert!(!metric.help.ends_with('.') && !metric.help.contains('\n'), "{name}");
                for other in &metrics[..number] {
                    if other.name == name {
                        assert_eq!((other.kind, other.help), (kind, metric.help), "{name}");
                        assert_ne!(other.labels, metric.labels, "{name}");
                    }
                }
            }
        }
        check(PROCESS);
        check(DEVICE);
        check(CACHE);
        check(HOST);
        check(RESIDENT);
        check(FETCH);
        check(TIER);
        check(LOG);
        check(AUDIT);
        check(COMPARISON);
        check(EXPORTER);
        check(UPSTREAM);
    }
}
