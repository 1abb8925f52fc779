//! From a spec to an opened image: one cache, one network and one set of traces for all devices of a host.
//!
//! [`HostImages`] opens what a [`DeviceSpec`] names. A reference is resolved in its registry or layout; a plain image
//! gets its meta image, found or built; a device config names its layers itself. An image that a device has open
//! already is shared, its traces are replayed, and its layers are fetched in the background.
//!
//! * [`open`]          from an [`ImageSpec`](client::ImageSpec) to an opened image
//! * [`origin`]        the place of the original layers, where the image names another than its own
//! * [`registries`]    clients that devices with the same way to a registry share
//! * `live`            the images that devices have open
//! * [`comparing`]     found meta images and their layers, in the background
//! * `config_snapshots` snapshots of a device that a device config describes
//! * [`tiers`]         the caches that the service configuration asks for

pub mod comparing;
mod config_snapshots;
mod live;
pub mod open;
pub mod origin;
pub mod registries;
pub mod tiers;
use std::sync::{Arc, OnceLock};

use blobs::cache::Cache;
use blobs::trace::{Given, LearnOptions, Traces, published};
use client::{DeviceSpec, ImageSource};
use convert::child::{Builder, Program};
use disk::Disk;
use disk::upper::{LiveVolume, UpperVolume};
use disk::volume::Volume;
use disk::writable::WritableFiles;
use formats::oci::Digest;
use formats::trace::Trace;
use registry::store::ImageStore;
use source::MemoryBudget;
use source::failure::with_causes;

pub use open::{OpenError, OpenImage};
pub use registries::Registries;

use crate::config::log_file::LogFile;
use crate::config::{DownloadConfig, ServiceConfig, ServiceConfigError, TracesConfig};
use crate::daemon::{
    Audit, DiskIdentity, DiskView, ImageOpener, OpenFailure, ReadPolicy, ServableImage, Snapshots,
};
use crate::metrics::exporter::ExporterOptions;
use crate::metrics::upstream::Totals;
use crate::metrics::{Page, names};
use comparing::Comparisons;
use config_snapshots::ConfigSnapshots;
use live::LiveImages;
use tiers::{fill_options, images_budget, new_cache};

/// Opens images for this host: one cache for all of them.
pub struct HostImages {
    /// Made at the first attach: the daemon must be alone in its process until it has entered its
    /// mount namespace.
    cache: OnceLock<Arc<Cache>>,
    /// Settings of this host, read once.
    config: Arc<ServiceConfig>,
    /// Connections, tokens and what is known of registries, shared by all devices.
    registries: Registries,
    /// What devices have open.
    live: LiveImages,
    /// Where meta images are built.
    builder: Builder,
    /// Memory of open images and of conversions.
    budget: MemoryBudget,
    /// Which meta images were compared with their layers.
    comparisons: Comparisons,
    /// What starts read, from one to the next.
    traces: Arc<Traces>,
    /// The daemon's log, if it is a file.
    log: Option<LogFile>,
    /// File of the audit log, if the configuration wants one.
    audit_file: Option<LogFile>,
    /// Made with the cache, because it is a thread.
    audit: OnceLock<Option<Arc<Audit>>>,
}

impl HostImages {
    /// Nothing is open yet. The program of this process must take [`convert::child::COMMAND`].
    #[must_use]
    pub fn new(config: Arc<ServiceConfig>) -> Self {
        let TracesConfig { enable, dir, .. } = config.turbobd.traces.clone();
        let budget = images_budget(&config);
        // A trace that another user wrote decides what is fetched; a link there, what is overwritten.
        let usable = || match dir.exists().then(|| sys::private::folder(&dir)) {
            Some(Err(error)) => {
                tracing::warn!(%error, "Starts are not recorded");
                false
            }
            _ => true,
        };
        let enable = enable && usable();
        let traces = Traces::new(LearnOptions { enable, dir, ..LearnOptions::default() });
        Self {
            cache: OnceLock::new(),
            registries: Registries::new(config.clone()),
            live: LiveImages::default(),
            builder: Builder::Child(Arc::new(Program::itself(budget.clone()))),
            budget,
            comparisons: Comparisons::default(),
            config,
            traces,
            log: None,
            audit_file: None,
            audit: OnceLock::new(),
        }
    }

    /// The same images with the audit log, if the configuration wants one.
    ///
    /// # Errors
    /// [`ServiceConfigError::NotWritable`] when its file cannot be opened.
    pub fn audited(self) -> Result<Self, ServiceConfigError> {
        let audit = &self.config.audit;
        if !audit.enable {
            return Ok(self);
        }
        let file = self.config.open_log("auditPath", &audit.path)?;
        Ok(Self { audit_file: Some(file), ..self })
    }

    /// The same images; `log` is the file to which this process logs, if it does.
    #[must_use]
    pub fn logged(self, log: Option<LogFile>) -> Self {
        Self { log, ..self }
    }

    /// Begins the audit log, with the first image.
    fn begin_audit(&self) -> Option<Arc<Audit>> {
        match Audit::begin(self.audit_file.clone()?) {
            Ok(audit) => {
                self.registries.network().tell(audit.clone());
                Some(audit)
            }
            Err(error) => {
                tracing::error!(%error, "The thread of the audit log cannot start: there is no audit log");
                None
            }
        }
    }

    /// Waits for the last lines of the audit log.
    pub fn flush_audit(&self) {
        if let Some(audit) = self.audit.get().and_then(Option::as_ref) {
            audit.flush();
        }
    }
}

impl HostImages {
    /// How long reads of this host's devices may wait.
    pub fn read_policy(&self) -> ReadPolicy {
        let own = &self.config.turbobd;
        ReadPolicy { deadline: own.read_deadline, on_error: own.on_error }
    }

    /// Where the metrics are served.
    pub fn exporter(&self) -> Option<ExporterOptions> {
        let exporter = &self.config.exporter;
        exporter.enable.then(|| ExporterOptions {
            address: (self.config.turbobd.metrics_address, exporter.port).into(),
            path: exporter.path.clone(),
        })
    }
}

/// A disk to be served, and who makes snapshots of it.
type ServedVolume = (Arc<dyn Volume>, Option<Arc<dyn Snapshots>>);

/// The disk with its writable layer: that of `--upper`, or the one that the device config names.
fn writable(
    spec: &DeviceSpec,
    disk: &Arc<Disk>,
    upper: Option<WritableFiles>,
    budget: &MemoryBudget,
) -> Result<ServedVolume, OpenError> {
    Ok(match (&spec.upper, upper, &spec.image.source) {
        (Some(_), Some(_), _) => return Err(OpenError::TwoUppers),
        (Some(dir), None, _) => {
            (Arc::new(UpperVolume::open(dir, disk.clone(), budget.clone())?), None)
        }
        (None, Some(files), ImageSource::DeviceConfig(config)) => {
            let volume = UpperVolume::open_files(files, disk.clone(), budget.clone())?;
            let live = Arc::new(LiveVolume::new(volume));
            let snapshots = ConfigSnapshots { volume: live.clone(), config: config.clone() };
            (live, Some(Arc::new(snapshots)))
        }
        (None, _, _) => (disk.clone(), None),
    })
}

/// The trace that was published beside a manifest. An image without a trace, or a registry without an answer, is no fault.
fn seek(store: &dyn ImageStore, manifest: &Digest) -> Option<Trace> {
    published::find(store, manifest)
        .inspect_err(|error| {
            tracing::debug!(error = with_causes(error), "Published traces cannot be looked for");
        })
        .ok()?
}

/// The manifest of a converted image decides its disk, with the number of its layers that are used. Of a device config, its
/// layers do.
fn identity(opened: &OpenImage) -> DiskIdentity {
    let mut text = format!("{}\n", opened.layers.len());
    match &opened.digest {
        Some(digest) => text += &digest.to_string(),
        None => {
            for blob in opened.disk.blobs() {
                text += blob.as_ref().map_or("-", |blob| blob.source().id());
                text.push('\n');
            }
        }
    }
    let manifest = opened.named.as_ref().map(|(_, digest)| *digest);
    DiskIdentity { manifest, disk: Digest::of(text.as_bytes()) }
}

impl HostImages {
    fn open_image(&self, spec: &DeviceSpec) -> Result<ServableImage, OpenError> {
        self.audit.get_or_init(|| self.begin_audit());
        let cache = self.cache.get_or_init(|| new_cache(&self.config, self.budget.clone())).clone();
        let image = spec.image.name();
        let start = std::time::Instant::now();
        let opened = open::open_for_device(
            &spec.image,
            &self.registries,
            cache.clone(),
            &self.live,
            &self.builder,
        )?;
        tracing::info!("{image}: opened in {:.1?}", start.elapsed());
        let identity = Some(identity(&opened));
        let recorders = opened.disk.recorders().clone();
        let given = match (opened.trace, opened.named) {
            (Some(trace), _) => Given::Here(trace),
            (None, Some((store, manifest))) if self.config.turbobd.traces.published => {
                Given::Sought(Box::new(move || seek(&*store, &manifest)))
            }
            (None, _) => Given::Nothing,
        };
        if let Some(replayed) = self.traces.begin(&recorders, &cache, given) {
            tracing::info!("{image}: by its trace {replayed}");
        }
        let disk = Arc::new(opened.disk);
        let (volume, snapshots) = writable(spec, &disk, opened.upper, &self.budget)?;
        let blobs = disk.blobs().into_iter().flatten().collect();
        let download = match opened.download {
            None => self.config.download.clone(),
            Some(section) => DownloadConfig::of_section(section),
        };
        if download.enable {
            // The host's bound is on all devices together; a device with its own may have more.
            self.registries.network().limits().allow_fill(download.max_bytes_per_second);
        }
        let filling = fill_options(&download).map(|options| Arc::new(cache.fill(blobs, options)));
        let comparing = opened.unproved.and_then(|unproved| {
            let comparing = self.comparisons.begin(&image, unproved, &disk, filling.as_ref())?;
            Some(Box::new(comparing) as Box<dyn Send + Sync>)
        });
        Ok(ServableImage {
            volume,
            name: image,
            view: Arc::new(DiskView::new(disk).filled(filling).compared(comparing)),
            recorders: Some(recorders),
            snapshots,
            identity,
        })
    }
}

impl ImageOpener for HostImages {
    fn open(&self, spec: &DeviceSpec) -> Result<ServableImage, OpenFailure> {
        self.open_image(spec)
            .map_err(|error| OpenFailure { code: error.code(), error: Box::new(error) })
    }

    fn audit(&self) -> Option<Arc<Audit>> {
        self.audit.get().and_then(Clone::clone)
    }

    /// Each part with the table of its names: see [`names`].
    fn observe(&self, page: &mut Page) {
        if let Some(log) = &self.log {
            page.put(names::LOG, log, &[]);
        }
        if let Some(audit) = self.audit.get().and_then(Option::as_ref) {
            page.put(names::AUDIT, audit.counters(), &[]);
        }
        page.put(names::COMPARISON, &**self.comparisons.counters(), &[]);
        for host in self.registries.network().hosts() {
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
            Totals {
                reads: fetched.demand_requests.get() + fetched.ahead_requests.get(),
                bytes: fetched.bytes.get(),
            }
        })
    }

    fn take_longest_download(&self) -> u64 {
        self.cache.get().map_or(0, |cache| cache.fetched().whole.take_longest())
    }
}
