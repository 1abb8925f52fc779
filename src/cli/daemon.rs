//! `turbobd daemon`: serve the devices of this host.

use std::error::Error;
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use super::{Failure, Outcome, opener};
use crate::cache::{Cache, CacheOptions};
use crate::daemon::{self, AttachRequest, Client, DaemonOptions, DiskView, ImageOpener, protocol};
use crate::fetch::FetchOptions;
use crate::metrics::upstream::Totals;
use crate::metrics::{Page, names};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Ask the running daemon to remove its unused devices and to end.
    #[arg(long)]
    stop: bool,
    /// As `attach` starts it: in the background, until nothing is attached any more.
    #[arg(long, hide = true, conflicts_with = "stop")]
    auto: bool,
}

/// Serves until it is told to end, or tells the one that does.
pub(super) fn run(args: &Args) -> Outcome {
    let run_dir = protocol::run_dir();
    if args.stop {
        let Some(mut client) = Client::connect(&run_dir).map_err(Failure::because)? else {
            return Ok(ExitCode::SUCCESS);
        };
        let busy = client.stop().map_err(Failure::because)?;
        if busy.is_empty() {
            return Ok(ExitCode::SUCCESS);
        }
        let names: Vec<String> =
            busy.iter().map(|record| record.device.display().to_string()).collect();
        return Err(Failure::Failed(format!(
            "It serves on, because {} is in use: detach it first",
            names.join(", ")
        )));
    }
    let options = DaemonOptions { run_dir, auto: args.auto, ..DaemonOptions::default() };
    daemon::run(&options, Arc::new(HostImages::new())).map_err(Failure::because)?;
    Ok(ExitCode::SUCCESS)
}

/// Opens images for this host: one cache for all of them.
pub(super) struct HostImages {
    /// Made at the first attach: the daemon must be alone in its process until it has entered its
    /// mount namespace.
    cache: OnceLock<Arc<Cache>>,
}

impl HostImages {
    pub(super) fn new() -> Self {
        Self { cache: OnceLock::new() }
    }
}

/// One cache for all devices.
fn new_cache() -> Arc<Cache> {
    Cache::with(CacheOptions { budget: opener::CACHE_BUDGET, fetch: FetchOptions::default() })
}

impl ImageOpener for HostImages {
    fn open(
        &self,
        request: &AttachRequest,
    ) -> Result<daemon::Opened, Box<dyn Error + Send + Sync>> {
        let cache = self.cache.get_or_init(new_cache).clone();
        let args: opener::Args = serde_json::from_value(request.options.clone())?;
        let start = std::time::Instant::now();
        let opened = args.open(cache).map_err(Box::new)?;
        tracing::info!("{}: opened in {:.1?}", request.image, start.elapsed());
        let disk = Arc::new(opened.disk);
        Ok(daemon::Opened {
            volume: disk.clone(),
            name: request.image.clone(),
            view: Arc::new(DiskView::new(disk)),
        })
    }

    /// Each part with the table of its names: see [`names`].
    fn observe(&self, page: &mut Page) {
        let Some(cache) = self.cache.get() else { return };
        page.put(names::CACHE, &cache.stats(), &[]);
        page.put(names::FETCH, &**cache.fetched(), &[]);
    }

    fn downloaded(&self) -> Totals {
        self.cache.get().map_or_else(Totals::default, |cache| {
            let fetched = cache.fetched();
            let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
            Totals {
                reads: get(&fetched.demand_requests) + get(&fetched.ahead_requests),
                bytes: get(&fetched.bytes),
            }
        })
    }

    fn take_longest_download(&self) -> u64 {
        self.cache.get().map_or(0, |cache| cache.fetched().whole.take_longest())
    }
}
