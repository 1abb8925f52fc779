//! `turbobd daemon`: serve the devices of this host.

use std::error::Error;
use std::process::ExitCode;
use std::sync::atomic::Ordering;
use std::sync::{Arc, OnceLock};

use super::registry::Clients;
use super::{Failure, Outcome, Service, opener};
use crate::cache::{Cache, CacheOptions};
use crate::config::ServiceConfig;
use crate::daemon::{
    self, AttachRequest, Client, DaemonOptions, ImageOpener, IoCounters, protocol,
};
use crate::fetch::FetchOptions;
use crate::store::Meter;

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
pub(super) fn run(args: &Args, service: &Service) -> Outcome {
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
    let options = DaemonOptions { run_dir, auto: args.auto };
    let images = Arc::new(HostImages::new(service.load()?));
    daemon::run(&options, images).map_err(Failure::because)?;
    Ok(ExitCode::SUCCESS)
}

/// Opens images for this host: one cache for all of them.
pub(super) struct HostImages {
    /// Made at the first attach: the daemon must be alone in its process until it has entered its
    /// mount namespace.
    cache: OnceLock<Arc<Cache>>,
    /// Settings of this host, read once.
    config: Arc<ServiceConfig>,
    /// Connections, tokens and what is known of registries, shared by all devices.
    clients: Clients,
}

impl HostImages {
    pub(super) fn new(config: Arc<ServiceConfig>) -> Self {
        Self { cache: OnceLock::new(), clients: Clients::new(config.clone()), config }
    }
}

/// One cache for all devices.
fn new_cache(config: &ServiceConfig) -> Arc<Cache> {
    let fetch = FetchOptions { connections: config.turbobd.connections, ..FetchOptions::default() };
    Cache::with(CacheOptions { budget: config.turbobd.memory_cache, fetch })
}

impl ImageOpener for HostImages {
    fn open(
        &self,
        request: &AttachRequest,
    ) -> Result<daemon::Opened, Box<dyn Error + Send + Sync>> {
        let cache = self.cache.get_or_init(|| new_cache(&self.config)).clone();
        let args: opener::Args = serde_json::from_value(request.options.clone())?;
        let start = std::time::Instant::now();
        let meter = Arc::new(Meter::default());
        let opened =
            args.open_metered(&self.clients, cache.clone(), meter.clone()).map_err(Box::new)?;
        tracing::info!("{}: opened in {:.1?}", request.image, start.elapsed());
        let counters = move || IoCounters {
            fetched: meter.bytes.load(Ordering::Relaxed),
            cached: cache.stats().bytes,
            errors: meter.errors.load(Ordering::Relaxed),
        };
        Ok(daemon::Opened {
            volume: Arc::new(opened.disk),
            name: request.image.clone(),
            counters: Arc::new(counters),
        })
    }
}
