//! `cargo bench --bench framework`: Python imports a large framework from a registry 5 ms away, cold.

#![allow(clippy::unwrap_used, reason = "a benchmark that cannot go on stops")]

#[path = "line.rs"]
mod line;
#[path = "python.rs"]
mod python;

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use blobs::cache::{Cache, CacheOptions};
use blobs::fetch::FetchOptions;
use blobs::trace::{Given, LearnOptions, Traces, published};
use disk::image::{host_manifest, open_image};
use formats::trace::Trace;
use line::Line;
use python::{FRAMEWORK, SERVICE, Watched};
use registry::store::{self, LayoutStore, Selector};
use registry::{ClientOptions, RegistryClient};

const DELAY: Duration = Duration::from_millis(5);
const GIGABIT: f64 = 1e9 / 8.0;
const BUDGET: u64 = 256 << 20;

/// One start: its time and its requests. `published`: it looks for a trace beside the image.
fn start(
    line: &Line,
    traces: Option<&Arc<Traces>>,
    published: bool,
    program: &str,
    name: &str,
) -> Trace {
    let fetch = FetchOptions::default();
    let cache = Cache::with(CacheOptions { budget: BUDGET, fetch });
    let client = RegistryClient::new(ClientOptions::default()).unwrap();
    let image = format!("{}/perf:turbo", line.host);
    let (store, selector) = store::open(&image.parse().unwrap(), &client).unwrap();
    let (stored, manifest) = host_manifest(&*store, &selector).unwrap();
    let disk = open_image(&*store, &*store, &manifest, cache.clone()).unwrap().disk;
    let recorders = disk.recorders().clone();
    let before = asked(line);
    if let Some(traces) = traces {
        let seek = move || published::find(&*store, &stored.digest).unwrap();
        let given = if published { Given::Sought(Box::new(seek)) } else { Given::Nothing };
        traces.begin(&recorders, &cache, given);
    }
    let recording = recorders.begin();
    let disk = Arc::new(Watched { disk, reads: Mutex::default() });
    let time = python::run(&disk, &["/usr/bin/python3.11", "-W", "ignore", "-c", program]);
    let now = asked(line);
    let trace = recorders.end(&recording);
    let mut segments = BTreeSet::new();
    let mut touched = 0;
    for touch in &trace.touches {
        let blobs = disk.disk.blobs();
        let named = |source: &dyn source::chunk::ChunkSource| {
            blobs::trace::blob_name(source) == trace.blobs[touch.blob as usize]
        };
        let blob = blobs.iter().flatten().find(|blob| named(&**blob.source())).unwrap();
        let chunk = blob.source().chunk_at(touch.start).unwrap().index;
        if segments.insert(blob.key(chunk)) {
            touched += blob.source().encoded(chunk).unwrap().len() as u64;
        }
    }
    let (requests, bytes) = (now.0 - before.0, now.1 - before.1);
    let counters = cache.fetched();
    println!(
        "{name:<28} {:>6.2} s  {:>4} segments {:>6.1} MB touched  {requests:>4} requests ({:.2} a segment)  {:>6.1} MB ({:.2} of touched)  demand {}",
        time.as_secs_f64(),
        segments.len(),
        touched as f64 / 1e6,
        requests as f64 / segments.len() as f64,
        bytes as f64 / 1e6,
        bytes as f64 / touched as f64,
        counters.demand_requests.get(),
    );
    if std::env::var_os("TURBOBD_BENCH_VERBOSE").is_some() {
        let blobs: Vec<_> = trace.touches.iter().map(|t| (t.at, t.blob, t.start >> 20)).collect();
        eprintln!("{blobs:?}");
    }
    trace
}

/// Publishes `trace` beside the image, and serves the image anew.
fn publish(layout: &Path, trace: &Trace) -> Line {
    let store = LayoutStore::open(layout).unwrap();
    let (subject, _) = host_manifest(&store, &Selector::Tag("turbo".to_owned())).unwrap();
    published::publish(&store, &subject, trace, jiff::Timestamp::now()).unwrap();
    Line::start(layout, DELAY, GIGABIT)
}

fn asked(line: &Line) -> (u64, u64) {
    let read = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
    (read(&line.asked.ranges), read(&line.asked.bytes))
}

fn main() {
    let layout = python::layout();
    let line = Line::start(&layout, DELAY, GIGABIT);
    println!(
        "bar for the framework, first start: 0.25 requests a segment, 1.30 of the bytes touched"
    );
    for (name, program) in [("framework", FRAMEWORK), ("service", SERVICE)] {
        let start = |line: &Line, traces, published, how| {
            start(line, traces, published, program, &format!("{name}, {how}"))
        };
        let (here, elsewhere) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let traces = |dir: &Path| {
            Traces::new(LearnOptions { dir: dir.to_owned(), ..LearnOptions::default() })
        };
        let (here, elsewhere) = (traces(here.path()), traces(elsewhere.path()));
        start(&line, None, false, "first start");
        let trace = start(&line, Some(&here), false, "learned");
        start(&line, Some(&here), false, "by its trace");
        // On another host.
        let line = publish(&layout, &trace);
        start(&line, Some(&elsewhere), true, "first, published");
    }
}
