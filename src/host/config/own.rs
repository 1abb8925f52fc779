//! This project's keys, under `turbobd`: settings that overlaybd does not have.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::time::Duration;

use convert::meta::MetaTrust;
use registry::Hedging;
use registry::signatures::Signers;

use super::ServiceConfigError;
use super::object::{Object, Paths as _};
use super::sections::{GIB, MIB, is_http_url};

type Taken<T> = Result<T, ServiceConfigError>;

/// Default memory for decoded chunks, in MB: a few hundred chunks, the working set of a starting program.
const MEMORY_CACHE_MB: u64 = 256;

/// Default limit on range requests in flight. One request fetches 2.5 MB over a gigabit line in 20 ms, so a
/// few fill it; more are for many devices, and for stores that give each connection 50 MB/s.
const CONNECTIONS: u64 = 24;

/// Default memory for open images and conversions, beside the fixed parts of the budget: some fifty images of the usual
/// size. With the defaults of the other keys the budget is 1024 MB.
const FOR_IMAGES: u64 = 544 * MIB;

/// Memory of the program and its threads.
const PROGRAM: u64 = 64 * MIB;

/// Memory of a request in flight: its encoded bytes.
const REQUEST: u64 = 4 * MIB;

/// Memory of all requests in flight at most: the bound of the fetch threads.
const MOST_REQUESTS: u64 = 256 * MIB;

/// Memory of chunks that wait for the two disk tiers.
const TIERS: u64 = 64 * MIB;

/// Least memory for images: one of the usual size, and its conversion, whose pipes hold 16 MiB.
const LEAST_FOR_IMAGES: u64 = 128 * MIB;

/// Longest deadline of a read that can be set, in seconds: overlaybd's own 7 days.
const LONGEST_DEADLINE: u64 = 7 * 86_400;

/// Reaction to a read that cannot be fetched.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnError {
    /// `eio`: the reader gets an error once the deadline has passed.
    #[default]
    Eio,
    /// `wait`: the read is repeated without end (overlaybd repeats it for seven days). A read that can never
    /// succeed fails all the same.
    Wait,
}

/// The section `turbobd`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TurbobdConfig {
    /// `memoryCacheMB`, in bytes: decoded chunks in memory, of all devices together.
    pub memory_cache: u64,
    /// `memoryBudgetMB`, in bytes: all memory of the daemon, the cache included.
    pub memory_budget: u64,
    /// `freeSpaceFloorGB`, in bytes: free space that the disk tiers leave on their filesystem.
    pub free_space_floor: u64,
    /// `connections`: limit on range requests in flight.
    pub connections: usize,
    /// `mirrors`: for a registry's host, URLs to ask first, in order.
    pub mirrors: BTreeMap<String, Vec<String>>,
    /// `authorities`: PEM files, or folders of them, to trust besides the platform's.
    pub authorities: Vec<PathBuf>,
    /// `rateLimitMBps`, in bytes a second, for all reads that no process waits for; `None` (0): no limit.
    pub rate_limit: Option<u64>,
    /// `hedge`.
    pub hedge: Hedging,
    /// `readDeadlineSeconds`: time from the first try of a read to its last byte.
    pub read_deadline: Duration,
    /// `onError`.
    pub on_error: OnError,
    /// `metricsAddress`: the address for `exporterConfig`'s port.
    pub metrics_address: IpAddr,
    /// `traces`.
    pub traces: TracesConfig,
    /// `origins`: repositories, and folders above them, to which the images of this host may send it for their original
    /// layers.
    pub origins: Vec<String>,
    /// `trustedHosts`: hosts to which any registry may send this one, whatever their address.
    pub trusted_hosts: Vec<String>,
    /// `metaDir`: directory of meta images that were built here.
    pub meta_dir: PathBuf,
    /// `metaTrust`: which meta images are used.
    pub meta_trust: MetaTrust,
    /// `metaKeys`: files of the keys whose signatures count.
    pub meta_keys: Vec<PathBuf>,
    /// The keys in `meta_keys`; none until [`ServiceConfig::read`](super::ServiceConfig::read) has read the files.
    pub signers: Signers,
}

/// `traces`: the chunks that a start reads are recorded, and fetched ahead at the next start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TracesConfig {
    /// `enable`.
    pub enable: bool,
    /// `dir`.
    pub dir: PathBuf,
    /// `published`: true to look for a trace beside an image without a trace of this host.
    pub published: bool,
}

impl TurbobdConfig {
    pub(super) fn take(root: &mut Object<'_>) -> Taken<Self> {
        let mut section = root.section("turbobd")?;
        let folder = |path: Option<PathBuf>, default: &str| path.unwrap_or_else(|| default.into());
        let mirrors = section.lists("mirrors")?;
        if let Some(url) = mirrors.values().flatten().find(|url| !is_http_url(url)) {
            let rule = format!("{url:?} is not an http:// or https:// URL");
            return Err(section.error("mirrors", rule));
        }
        let deadline = section.bounded("readDeadlineSeconds", LONGEST_DEADLINE)?.unwrap_or(60);
        let connections = section.bounded("connections", 1024)?.unwrap_or(CONNECTIONS).max(1);
        let budget = section.size("memoryBudgetMB", MIB)?;
        let mut config = Self {
            memory_cache: section.size("memoryCacheMB", MIB)?.unwrap_or(MEMORY_CACHE_MB * MIB),
            memory_budget: u64::MAX,
            free_space_floor: section.size("freeSpaceFloorGB", GIB)?.unwrap_or(GIB),
            connections: usize::try_from(connections).unwrap_or(1),
            mirrors,
            authorities: section.texts("authorities")?.into_iter().map(PathBuf::from).collect(),
            rate_limit: section.size("rateLimitMBps", MIB)?.filter(|rate| *rate > 0),
            hedge: take_hedging(&mut section)?,
            read_deadline: Duration::from_secs(deadline.max(1)),
            on_error: OnError::take(&mut section)?,
            metrics_address: metrics_address(&mut section)?,
            traces: TracesConfig::take(&mut section)?,
            origins: origins(&mut section)?,
            trusted_hosts: section.texts("trustedHosts")?,
            meta_dir: folder(section.path("metaDir")?, "/var/lib/turbobd/meta"),
            meta_trust: meta_trust(&mut section)?,
            meta_keys: section.texts("metaKeys")?.into_iter().map(PathBuf::from).collect(),
            signers: Signers::default(),
        };
        let fixed = config.fixed_memory();
        config.memory_budget = budget.unwrap_or(fixed.saturating_add(FOR_IMAGES));
        let least = fixed.saturating_add(LEAST_FOR_IMAGES);
        if config.memory_budget < least {
            let rule = format!(
                "the program, turbobd.memoryCacheMB, turbobd.connections and one image take at least {} MB, and the \
                 budget is {} MB",
                least.div_ceil(MIB),
                config.memory_budget / MIB
            );
            return Err(section.error("memoryBudgetMB", rule));
        }
        section.end();
        Ok(config)
    }

    /// Bytes of the budget that do not depend on images: the program, the cache, requests in flight, and chunks that wait
    /// for a disk tier. The rest is for open images and conversions.
    #[must_use]
    pub fn fixed_memory(&self) -> u64 {
        let requests = (self.connections as u64).saturating_mul(REQUEST).min(MOST_REQUESTS);
        self.memory_cache.saturating_add(requests).saturating_add(PROGRAM + TIERS)
    }
}

/// Repositories, folders of them, hosts, and absolute folders of this host after `oci:`.
fn origins(section: &mut Object<'_>) -> Taken<Vec<String>> {
    let origins = section.texts("origins")?;
    let is_wrong = |entry: &&String| match entry.strip_prefix("oci:") {
        Some(folder) => !folder.starts_with('/'),
        None => entry.is_empty() || entry.contains("://") || entry.starts_with('/'),
    };
    match origins.iter().find(is_wrong) {
        Some(wrong) => Err(section.error(
            "origins",
            format!("{wrong:?} is neither HOST, HOST/REPOSITORY nor oci:/ABSOLUTE/FOLDER"),
        )),
        None => Ok(origins),
    }
}

/// This host alone by default, because the page names the images that run here.
fn metrics_address(section: &mut Object<'_>) -> Taken<IpAddr> {
    match section.text("metricsAddress")? {
        None => Ok(Ipv4Addr::LOCALHOST.into()),
        Some(text) => text
            .parse()
            .map_err(|_| section.error("metricsAddress", format!("{text:?} is not an IP address"))),
    }
}

fn meta_trust(section: &mut Object<'_>) -> Taken<MetaTrust> {
    match section.text("metaTrust")? {
        None => Ok(MetaTrust::default()),
        Some(text) => text.parse().map_err(|()| {
            section.error("metaTrust", format!("it is verify, signed or any, not {text:?}"))
        }),
    }
}

impl OnError {
    fn take(section: &mut Object<'_>) -> Taken<Self> {
        match section.text("onError")?.as_deref() {
            None | Some("eio") => Ok(Self::Eio),
            Some("wait") => Ok(Self::Wait),
            Some(other) => {
                Err(section.error("onError", format!("it is eio or wait, not {other:?}")))
            }
        }
    }
}

/// Takes `hedge`; a key that is absent leaves its default.
fn take_hedging(section: &mut Object<'_>) -> Taken<Hedging> {
    let mut hedge = section.section("hedge")?;
    let default = Hedging::default();
    let after = hedge.bounded("afterMs", 3_600_000)?.map(Duration::from_millis);
    let percent = hedge.bounded("budgetPercent", 100)?;
    let hedging = Hedging {
        enable: hedge.bool("enable")?.unwrap_or(default.enable),
        after: after.unwrap_or(default.after),
        budget_percent: percent
            .and_then(|percent| u32::try_from(percent).ok())
            .unwrap_or(default.budget_percent),
    };
    hedge.end();
    Ok(hedging)
}

impl TracesConfig {
    fn take(section: &mut Object<'_>) -> Taken<Self> {
        let mut traces = section.section("traces")?;
        let dir = traces.path("dir")?;
        let config = Self {
            enable: traces.bool("enable")?.unwrap_or(true),
            dir: dir.unwrap_or_else(|| "/var/lib/turbobd/traces".into()),
            published: traces.bool("published")?.unwrap_or(true),
        };
        traces.end();
        Ok(config)
    }
}
