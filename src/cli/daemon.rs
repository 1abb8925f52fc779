//! `turbobd daemon`: serve the devices of this host.

use std::error::Error;
use std::path::Path;
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use serde_json::Value;

use super::attach::UPPER;
use super::live::LiveImages;
use super::registry::Clients;
use super::snapshots::ConfigSnapshots;
use super::{Failure, Outcome, Service, opener};
use crate::cache::{Cache, CacheOptions};
use crate::config::log_file::LogFile;
use crate::config::{CacheConfig, CacheType, DownloadConfig, ServiceConfig, TracesConfig};
use crate::daemon::{
    self, AttachRequest, Audit, Client, DaemonOptions, DiskView, ImageOpener, ReadPolicy,
    Snapshots, protocol,
};
use crate::disk::Disk;
use crate::disk::upper::{LiveVolume, UpperVolume};
use crate::fetch::{FetchOptions, FillOptions};
use crate::lsmt::WritableFiles;
use crate::metrics::exporter::ExporterOptions;
use crate::metrics::upstream::Totals;
use crate::metrics::{Page, names};
use crate::oci::Digest;
use crate::store::ImageStore;
use crate::tier::{Kind, Tier, TierOptions, Tiers, Usage};
use crate::trace::{Given, LearnOptions, Trace, Traces, published};
use crate::volume::Volume;

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
pub(super) fn run(args: &Args, service: &Service, verbose: u8) -> Outcome {
    let run_dir = protocol::run_dir();
    if args.stop {
        super::log_to_stderr(verbose, true);
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
    let images = Arc::new(HostImages::new(service.load_with_log(verbose)?).audited()?);
    let options = DaemonOptions {
        run_dir,
        auto: args.auto,
        reads: images.read_policy(),
        exporter: images.exporter(),
        snapshots: images.config.api.enable.then_some(images.config.api.address),
    };
    let ended = daemon::run(&options, images.clone());
    images.flush_audit();
    ended.map_err(Failure::because)?;
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
    /// What devices have open.
    live: LiveImages,
    /// What starts read, from one to the next.
    traces: Arc<Traces>,
    /// Where the audit log goes, if it is wanted.
    audit_file: Option<LogFile>,
    /// Made with the cache: it is a thread.
    audit: OnceLock<Option<Arc<Audit>>>,
}

impl HostImages {
    pub(super) fn new(config: Arc<ServiceConfig>) -> Self {
        let TracesConfig { enable, dir, .. } = config.turbobd.traces.clone();
        let traces = Traces::new(LearnOptions { enable, dir, ..LearnOptions::default() });
        Self {
            cache: OnceLock::new(),
            clients: Clients::new(config.clone()),
            live: LiveImages::default(),
            config,
            traces,
            audit_file: None,
            audit: OnceLock::new(),
        }
    }

    /// The same with the audit log, if the configuration wants one.
    pub(super) fn audited(self) -> Result<Self, Failure> {
        let audit = &self.config.audit;
        if !audit.enable {
            return Ok(self);
        }
        let file = self.config.open_log("auditPath", &audit.path).map_err(Failure::because)?;
        Ok(Self { audit_file: Some(file), ..self })
    }

    /// The audit log is begun with the first image.
    fn begin_audit(&self) -> Option<Arc<Audit>> {
        match Audit::begin(self.audit_file.clone()?) {
            Ok(audit) => {
                self.clients.network().tell(audit.clone());
                Some(audit)
            }
            Err(error) => {
                tracing::error!(%error, "No thread writes the audit log: there is none");
                None
            }
        }
    }

    /// Waits for the last lines of the audit log.
    pub(super) fn flush_audit(&self) {
        if let Some(audit) = self.audit.get().and_then(Option::as_ref) {
            audit.flush();
        }
    }
}

impl HostImages {
    /// How long reads of this host's devices may wait.
    pub(super) fn read_policy(&self) -> ReadPolicy {
        let own = &self.config.turbobd;
        ReadPolicy { deadline: own.read_deadline, on_error: own.on_error }
    }

    /// Where the metrics are served.
    fn exporter(&self) -> Option<ExporterOptions> {
        let exporter = &self.config.exporter;
        exporter.enable.then(|| ExporterOptions {
            address: (self.config.turbobd.metrics_address, exporter.port).into(),
            path: exporter.path.clone(),
        })
    }
}

/// One cache for all devices.
fn new_cache(config: &ServiceConfig) -> Arc<Cache> {
    let fetch = FetchOptions {
        connections: config.turbobd.connections,
        ahead: config.prefetch.concurrency,
        ..FetchOptions::default()
    };
    let options = CacheOptions { budget: config.turbobd.memory_cache, fetch };
    Cache::over(options, open_tiers(config))
}

/// Where the configuration wants chunks on disk, and how many.
pub(super) fn tier_options(config: &ServiceConfig) -> Vec<(Kind, TierOptions)> {
    let floor = config.turbobd.free_space_floor;
    let CacheConfig { kind, dir, size, .. } = &config.cache;
    let encoded = (*kind != CacheType::Download).then(|| (Kind::Encoded, dir.clone(), *size));
    let gzip = &config.gzip_cache;
    let decoded = gzip.enable.then(|| (Kind::Decoded, gzip.dir.clone(), gzip.size));
    let wanted = decoded.into_iter().chain(encoded).filter(|(_, _, capacity)| *capacity > 0);
    wanted.map(|(kind, dir, capacity)| (kind, TierOptions { dir, capacity, floor })).collect()
}

/// A tier that cannot be had is missed, not waited for.
fn open_tiers(config: &ServiceConfig) -> Tiers {
    let mut tiers = Tiers::default();
    for (kind, options) in tier_options(config) {
        match Tier::open(kind, &options) {
            Ok(tier) => {
                let Usage { bytes, chunks, .. } = tier.usage();
                let (name, dir) = (kind.name(), options.dir.display());
                tracing::info!("The {name} cache in {dir} has {chunks} chunks in {bytes} bytes");
                let place = match kind {
                    Kind::Encoded => &mut tiers.encoded,
                    Kind::Decoded => &mut tiers.decoded,
                };
                *place = Some(Arc::new(tier));
            }
            Err(error) => {
                tracing::warn!("No {} cache on disk: {}", kind.name(), super::sentence(&error));
            }
        }
    }
    tiers
}

/// How the layers of a device are fetched in the background; `None`: not at all.
fn fill_options(download: &DownloadConfig) -> Option<FillOptions> {
    let DownloadConfig { enable, delay, delay_extra, max_bytes_per_second, tries, block } =
        download.clone();
    let rate = max_bytes_per_second;
    enable.then_some(FillOptions { delay, delay_extra, rate, tries, block })
}

/// A disk to be served, and who makes snapshots of it.
type Served = (Arc<dyn Volume>, Option<Arc<dyn Snapshots>>);

/// The disk with its writable layer: that of `--upper`, or the one that the device config names.
fn writable(
    request: &AttachRequest,
    args: &opener::Args,
    disk: &Arc<Disk>,
    upper: Option<WritableFiles>,
) -> Result<Served, Box<dyn Error + Send + Sync>> {
    let dir = request.options.get(UPPER).and_then(Value::as_str);
    Ok(match (dir, upper, &args.config) {
        (Some(_), Some(_), _) => {
            return Err("the device config names a writable layer, and --upper another".into());
        }
        (Some(dir), None, _) => (Arc::new(UpperVolume::open(Path::new(dir), disk.clone())?), None),
        (None, Some(files), Some(config)) => {
            let volume = UpperVolume::open_files(files, disk.clone())?;
            let live = Arc::new(LiveVolume::new(volume));
            let snapshots = ConfigSnapshots { volume: live.clone(), config: config.clone() };
            (live, Some(Arc::new(snapshots)))
        }
        (None, _, _) => (disk.clone(), None),
    })
}

/// The trace that was published beside a manifest. That there is none, or nobody who can say so, is no fault.
fn seek(store: &dyn ImageStore, manifest: &Digest) -> Option<Trace> {
    published::find(store, manifest)
        .inspect_err(|error| {
            tracing::debug!(
                error = super::sentence(error),
                "Published traces cannot be looked for"
            );
        })
        .ok()?
}

impl ImageOpener for HostImages {
    fn open(
        &self,
        request: &AttachRequest,
    ) -> Result<daemon::Opened, Box<dyn Error + Send + Sync>> {
        self.audit.get_or_init(|| self.begin_audit());
        let cache = self.cache.get_or_init(|| new_cache(&self.config)).clone();
        let args: opener::Args = serde_json::from_value(request.options.clone())?;
        let start = std::time::Instant::now();
        let opened =
            args.open_for_device(&self.clients, cache.clone(), &self.live).map_err(Box::new)?;
        tracing::info!("{}: opened in {:.1?}", request.image, start.elapsed());
        let recorders = opened.disk.recorders().clone();
        let given = match (opened.trace, opened.named) {
            (Some(trace), _) => Given::Here(trace),
            (None, Some((store, manifest))) if self.config.turbobd.traces.published => {
                Given::Sought(Box::new(move || seek(&*store, &manifest)))
            }
            (None, _) => Given::Nothing,
        };
        if let Some(replayed) = self.traces.begin(&recorders, &cache, given) {
            tracing::info!("{}: by its trace {replayed}", request.image);
        }
        let disk = Arc::new(opened.disk);
        let (volume, snapshots) = writable(request, &args, &disk, opened.upper)?;
        let blobs = disk.blobs().into_iter().flatten().collect();
        let download = match opened.download {
            None => self.config.download.clone(),
            Some(section) => DownloadConfig::of_section(section),
        };
        if download.enable {
            // The host's bound is on all devices together; a device with its own may have more.
            self.clients.network().limits().allow_fill(download.max_bytes_per_second);
        }
        let filling = fill_options(&download).map(|options| cache.fill(blobs, options));
        Ok(daemon::Opened {
            volume,
            name: request.image.clone(),
            view: Arc::new(DiskView::new(disk).filled(filling)),
            recorders: Some(recorders),
            snapshots,
        })
    }

    fn audit(&self) -> Option<Arc<Audit>> {
        self.audit.get().and_then(Clone::clone)
    }

    /// Each part with the table of its names: see [`names`].
    fn observe(&self, page: &mut Page) {
        if let Some(audit) = self.audit.get().and_then(Option::as_ref) {
            page.put(names::AUDIT, audit.counters(), &[]);
        }
        for host in self.clients.network().hosts() {
            page.put(names::HOST, &host, &[("host", host.name())]);
        }
        let Some(cache) = self.cache.get() else { return };
        page.put(names::CACHE, &cache.stats(), &[]);
        page.put(names::RESIDENT, cache.residents(), &[]);
        page.put(names::FETCH, &**cache.fetched(), &[]);
        let tiers = cache.tiers();
        for tier in [&tiers.encoded, &tiers.decoded].into_iter().flatten() {
            page.put(names::TIER, &**tier, &[("tier", tier.kind().name())]);
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    fn config(text: &str) -> ServiceConfig {
        ServiceConfig::parse(text, "c.json").unwrap().0
    }

    #[test]
    fn compressed_bytes_are_kept_with_every_cache_type_but_download() {
        let kinds = |cache_type: &str| {
            let text =
                format!(r#"{{"cacheConfig": {{"cacheType": "{cache_type}", "cacheDir": "/c"}}}}"#);
            let options = tier_options(&config(&text)).into_iter();
            options.map(|(kind, options)| (kind, options.dir, options.capacity)).collect::<Vec<_>>()
        };
        let decoded = (Kind::Decoded, "/var/lib/turbobd/cache".into(), 4 << 30);
        let encoded = (Kind::Encoded, "/c".into(), 4 << 30);
        assert_eq!(kinds("file"), [decoded.clone(), encoded.clone()]);
        assert_eq!(kinds("ocf"), [decoded.clone(), encoded]);
        assert_eq!(kinds("download"), [decoded]);
    }

    #[test]
    fn a_fill_is_as_the_download_section_says() {
        let text = r#"{"download": {"enable": true, "delay": 7, "delayExtra": 8, "maxMBps": 9, "tryCnt": 10, "blockSize": 11}}"#;
        let seconds = std::time::Duration::from_secs;
        let expected = FillOptions {
            delay: seconds(7),
            delay_extra: seconds(8),
            rate: Some(9 << 20),
            tries: 10,
            block: 11,
        };
        assert_eq!(fill_options(&config(text).download), Some(expected));
        assert_eq!(fill_options(&config(r#"{"download": {"enable": false}}"#).download), None);
    }
}
