//! overlaybd's sections (spec runtime 3), with its names, meanings and defaults.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use super::ServiceConfigError;
use super::log_file::Rotation;
use super::object::{Object, Paths as _};
use crate::endpoint::Listen;
use disk::config::DeviceDownload;

/// overlaybd's MB and GB are powers of two.
pub(super) const MIB: u64 = 1 << 20;
pub(super) const GIB: u64 = 1 << 30;

/// Longest sensible wait in seconds: a year.
const LONGEST: u64 = 365 * 86_400;

type Taken<T> = Result<T, ServiceConfigError>;

/// How much is logged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogLevel {
    /// 0.
    Debug,
    /// 1.
    Info,
    /// 2.
    Warnings,
    /// 3, and overlaybd's levels above it.
    Errors,
}

/// `logConfig`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogConfig {
    /// `logLevel`; `None`: 1 in a file, and on standard error as the command line says.
    pub level: Option<LogLevel>,
    /// `logPath`; `None`: standard error.
    pub path: Option<PathBuf>,
    /// The key that names the path.
    pub key: &'static str,
    /// `logSizeMB` (in bytes, at least 1 MB) and `logRotateNum`: of the log file, and of the audit file.
    pub rotation: Rotation,
}

/// Old log files that can be kept at most: each rotation renames all of them.
const MOST_OLD_LOGS: u64 = 1000;

impl LogConfig {
    pub(super) fn take(root: &mut Object<'_>) -> Taken<Self> {
        let legacy = (root.number("logLevel")?, root.path("logPath")?);
        let mut section = root.section("logConfig")?;
        let (level, path) = (section.number("logLevel")?, section.path("logPath")?);
        // overlaybd reads the legacy keys when logConfig names no file.
        let (level, path, key) = if path.is_some() {
            (level, path, "logConfig.logPath")
        } else {
            (legacy.0.or(level), legacy.1, "logPath")
        };
        let log = Self {
            level: level.map(|level| match level {
                0 => LogLevel::Debug,
                1 => LogLevel::Info,
                2 => LogLevel::Warnings,
                _ => LogLevel::Errors,
            }),
            path,
            key,
            rotation: Rotation {
                size: section.size("logSizeMB", MIB)?.map_or(10 * MIB, |size| size.max(MIB)),
                keep: section.bounded("logRotateNum", MOST_OLD_LOGS)?.unwrap_or(3),
            },
        };
        section.end();
        Ok(log)
    }
}

/// `cacheConfig.cacheType`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CacheType {
    /// `file`: sparse files by blob digest, with a limit on their size.
    #[default]
    File,
    /// `ocf`: overlaybd's Open CAS cache; here it is treated as `file`.
    Ocf,
    /// `download`: overlaybd keeps them in the layer's own folder, which the device's configuration names, and
    /// nothing in `cacheDir`. Here compressed bytes are not kept then.
    Download,
}

/// `cacheConfig`: compressed bytes of remote layers on disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CacheConfig {
    /// `cacheType`.
    pub kind: CacheType,
    /// `cacheDir`.
    pub dir: PathBuf,
    /// `cacheSizeGB`, in bytes.
    pub size: u64,
}

impl CacheConfig {
    pub(super) fn take(root: &mut Object<'_>) -> Taken<Self> {
        let legacy_kind = root.text("cacheType")?;
        let legacy_dir = root.path("registryCacheDir")?;
        let legacy_size = root.size("registryCacheSizeGB", GIB)?;
        let mut section = root.section("cacheConfig")?;
        let kind = section.text("cacheType")?;
        // overlaybd's rule: without a type in cacheConfig, the legacy keys count.
        let (kind, legacy) = if kind.is_some() { (kind, false) } else { (legacy_kind, true) };
        let key = if legacy { "cacheType" } else { "cacheConfig.cacheType" };
        let kind = match kind.as_deref() {
            None | Some("file") => CacheType::File,
            Some("ocf") => {
                section.warn(format!("Value ocf of {key} of {} means file here", section.file()));
                CacheType::Ocf
            }
            Some("download") => {
                section.warn(format!(
                    "Value download of {key} of {} keeps no compressed bytes on disk here, neither in cacheDir nor in the folder of a layer",
                    section.file()
                ));
                CacheType::Download
            }
            Some(other) => {
                let rule = format!("it is file, ocf or download, not {other:?}");
                return Err(section.error("cacheType", rule));
            }
        };
        let (dir, size) = (section.path("cacheDir")?, section.size("cacheSizeGB", GIB)?);
        let (dir, size) = if legacy {
            (legacy_dir.or(dir), legacy_size.or(size))
        } else {
            (dir.or(legacy_dir), size.or(legacy_size))
        };
        let cache = Self {
            kind,
            dir: dir.unwrap_or_else(|| "/opt/overlaybd/registry_cache".into()),
            size: size.unwrap_or(4 * GIB),
        };
        unused_refill(&mut section)?;
        section.without_effect("blockSize");
        section.number("blockSize")?;
        section.end();
        Ok(cache)
    }
}

/// `refillSize`, overlaybd's unit of fetching or decoding: a power of two from 4096 on. Segments are the unit here.
fn unused_refill(section: &mut Object<'_>) -> Taken<()> {
    section.without_effect("refillSize");
    match section.number("refillSize")? {
        Some(size) if size < 4096 || !size.is_power_of_two() => {
            Err(section
                .error("refillSize", format!("it is a power of two from 4096 on, not {size}")))
        }
        _ => Ok(()),
    }
}

/// `gzipCacheConfig`: decoded chunks on disk. What the section leaves out is as without it, unlike overlaybd's
/// own defaults: a section that names only a size gives a cache of that size.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GzipCacheConfig {
    /// `enable`; on by default.
    pub enable: bool,
    /// `cacheDir`; `/var/lib/turbobd/cache` by default, so as not to meet overlaybd's files.
    pub dir: PathBuf,
    /// `cacheSizeGB`, in bytes.
    pub size: u64,
}

impl GzipCacheConfig {
    pub(super) fn take(root: &mut Object<'_>) -> Taken<Self> {
        let mut section = root.section("gzipCacheConfig")?;
        let dir = section.path("cacheDir")?;
        let cache = Self {
            enable: section.bool("enable")?.unwrap_or(true),
            dir: dir.unwrap_or_else(|| "/var/lib/turbobd/cache".into()),
            size: section.size("cacheSizeGB", GIB)?.unwrap_or(4 * GIB),
        };
        unused_refill(&mut section)?;
        section.end();
        Ok(cache)
    }
}

/// `credentialConfig.mode`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CredentialMode {
    /// `file`: a file in docker's form.
    File(PathBuf),
    /// `http` or `https`: a service that is asked for each repository.
    Service(String),
    /// `uds`: a service over a Unix socket.
    Socket(PathBuf),
}

/// `credentialConfig`: credentials for registries.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CredentialConfig {
    /// `mode` and `path`; without them `credentialFilePath`, by default `/opt/overlaybd/cred.json`.
    pub mode: CredentialMode,
    /// `timeout` of a service, in seconds.
    pub timeout: Duration,
    /// `client_cert_path` and `client_key_path`: certificate for a service that asks for one.
    pub certificate: Option<CertificateConfig>,
    /// `server_ca_path`: an authority to trust for the service.
    pub authority: Option<PathBuf>,
}

impl CredentialConfig {
    pub(super) fn take(root: &mut Object<'_>) -> Taken<Self> {
        let legacy = root.path("credentialFilePath")?;
        let mut section = root.section("credentialConfig")?;
        let (kind, path) = (section.text("mode")?, section.text("path")?);
        let needs = |path: Option<String>| {
            path.ok_or_else(|| section.error("path", "a credential mode needs it"))
        };
        let scheme = |path: String, scheme: &str| {
            let other = path.split_once("://").is_some_and(|(found, _)| found != scheme);
            if other {
                return Err(
                    section.error("path", format!("it is a URL that begins with {scheme}://"))
                );
            }
            // overlaybd accepts an address without a scheme too.
            Ok(if path.contains("://") { path } else { format!("{scheme}://{path}") })
        };
        let mode = match kind.as_deref() {
            None => {
                CredentialMode::File(legacy.unwrap_or_else(|| "/opt/overlaybd/cred.json".into()))
            }
            Some("file") => CredentialMode::File(needs(path)?.into()),
            Some(kind @ ("http" | "https")) => CredentialMode::Service(scheme(needs(path)?, kind)?),
            Some("uds") => CredentialMode::Socket(needs(path)?.into()),
            Some(other) => {
                let rule = format!("it is file, http, https, uds or empty, not {other:?}");
                return Err(section.error("mode", rule));
            }
        };
        let timeout = section.bounded("timeout", LONGEST)?.unwrap_or(1);
        let credential = Self {
            mode,
            timeout: Duration::from_secs(timeout.max(1)),
            certificate: CertificateConfig::pair(
                &mut section,
                "client_cert_path",
                "client_key_path",
            )?,
            authority: section.path("server_ca_path")?,
        };
        section.end();
        Ok(credential)
    }
}

/// A certificate and its key, two PEM files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CertificateConfig {
    /// The certificate, and the certificates between it and its authority.
    pub certificate: PathBuf,
    /// Its private key.
    pub key: PathBuf,
}

impl CertificateConfig {
    /// `certConfig`.
    pub(super) fn take(root: &mut Object<'_>) -> Taken<Option<Self>> {
        let mut section = root.section("certConfig")?;
        let pair = Self::pair(&mut section, "certFile", "keyFile")?;
        section.end();
        Ok(pair)
    }

    fn pair(section: &mut Object<'_>, certificate: &str, key: &str) -> Taken<Option<Self>> {
        match (section.path(certificate)?, section.path(key)?) {
            (None, None) => Ok(None),
            (Some(certificate), Some(key)) => Ok(Some(Self { certificate, key })),
            (Some(_), None) => Err(section.error(key, format!("{certificate} needs its key"))),
            (None, Some(_)) => {
                Err(section.error(certificate, format!("{key} needs its certificate")))
            }
        }
    }
}

/// `download`: whole layers are fetched in the background.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DownloadConfig {
    /// `enable`.
    pub enable: bool,
    /// `delay` in seconds, after the attach.
    pub delay: Duration,
    /// `delayExtra` in seconds: upper bound of a random addition, so that hosts do not begin together.
    pub delay_extra: Duration,
    /// `maxMBps`, in bytes a second; `None` (0): the whole spare capacity of the line.
    pub max_bytes_per_second: Option<u64>,
    /// `tryCnt`: rounds over what could not be had.
    pub tries: u64,
    /// `blockSize` in bytes: of a request while a process waits for something; it holds at least one segment.
    pub block: u64,
}

impl DownloadConfig {
    /// Immediate fill with the whole spare capacity of the line: the default without any `download` section.
    pub const AT_ONCE: Self = Self {
        enable: true,
        delay: Duration::ZERO,
        delay_extra: Duration::ZERO,
        max_bytes_per_second: None,
        tries: 5,
        block: 256 << 10,
    };

    pub(super) fn take_section(root: &mut Object<'_>) -> Taken<Self> {
        let section = root.section("download")?;
        let here = section.is_present();
        let config = Self::take(section)?;
        Ok(if here { config } else { Self::AT_ONCE })
    }

    fn take(mut section: Object<'_>) -> Taken<Self> {
        let download = DeviceDownload {
            enable: section.bool("enable")?,
            delay: section.bounded("delay", LONGEST)?,
            delay_extra: section.bounded("delayExtra", LONGEST)?,
            max_mbps: section.bounded("maxMBps", u64::MAX / MIB)?,
            tries: section.number("tryCnt")?,
            block_size: section.number("blockSize")?,
        };
        section.end();
        Ok(Self::of_section(download))
    }

    /// The settings of a section that is there, the host's or a device's: what it leaves out is overlaybd's default.
    #[must_use]
    pub fn of_section(section: DeviceDownload) -> Self {
        let DeviceDownload { enable, delay, delay_extra, max_mbps, tries, block_size } = section;
        let rate = max_mbps.unwrap_or(100).saturating_mul(MIB);
        Self {
            enable: enable.unwrap_or(false),
            delay: Duration::from_secs(delay.unwrap_or(300)),
            delay_extra: Duration::from_secs(delay_extra.unwrap_or(30)),
            max_bytes_per_second: Some(rate).filter(|rate| *rate > 0),
            tries: tries.unwrap_or(5),
            block: block_size.unwrap_or(256 << 10),
        }
    }
}

/// `p2pConfig`: requests go through a proxy that shares fetched data between hosts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct P2pConfig {
    /// `enable`.
    pub enable: bool,
    /// `address`: the actual URL is appended to it.
    pub address: String,
}

impl P2pConfig {
    pub(super) fn take(root: &mut Object<'_>) -> Taken<Self> {
        let mut section = root.section("p2pConfig")?;
        let address = section.text("address")?;
        let address = address.unwrap_or_else(|| "http://localhost:9731/accelerator".to_owned());
        if !is_http_url(&address) {
            return Err(section.error("address", "it is an http:// or https:// URL with a host"));
        }
        let p2p = Self { enable: section.bool("enable")?.unwrap_or(false), address };
        section.end();
        Ok(p2p)
    }
}

/// True if `text` is a URL that requests can be sent to.
pub(super) fn is_http_url(text: &str) -> bool {
    let Ok(url) = text.parse::<hyper::Uri>() else { return false };
    let http = matches!(url.scheme_str(), Some("http" | "https"));
    http && url.host().is_some_and(|host| !host.is_empty())
}

/// `prefetchConfig`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PrefetchConfig {
    /// `concurrency`: requests under way at most for what a trace lists, or reading ahead; at least 1. `None`: as
    /// many as `turbobd.connections` leaves.
    pub concurrency: Option<usize>,
}

impl PrefetchConfig {
    pub(super) fn take(root: &mut Object<'_>) -> Taken<Self> {
        let mut section = root.section("prefetchConfig")?;
        let concurrency = section.number("concurrency")?;
        section.end();
        let at_least_one = |most: u64| usize::try_from(most).unwrap_or(usize::MAX).max(1);
        Ok(Self { concurrency: concurrency.map(at_least_one) })
    }
}

/// `exporterConfig`: metrics for Prometheus.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExporterConfig {
    /// `enable`.
    pub enable: bool,
    /// `uriPrefix`: path of the metrics.
    pub path: String,
    /// `port`.
    pub port: u16,
}

impl ExporterConfig {
    pub(super) fn take(root: &mut Object<'_>) -> Taken<Self> {
        let mut section = root.section("exporterConfig")?;
        let path = section.text("uriPrefix")?.unwrap_or_else(|| "/metrics".to_owned());
        let port = section.bounded("port", u64::from(u16::MAX))?;
        let exporter = Self {
            enable: section.bool("enable")?.unwrap_or(false),
            path: if path.starts_with('/') { path } else { format!("/{path}") },
            port: port.and_then(|port| u16::try_from(port).ok()).unwrap_or(9863),
        };
        // overlaybd does not use it either.
        section.without_effect("updateInterval");
        section.number("updateInterval")?;
        section.end();
        Ok(exporter)
    }
}

/// `enableAudit` and `auditPath`: a line for each download and each read that was not in memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AuditConfig {
    /// `enableAudit`; off by default, unlike overlaybd's.
    pub enable: bool,
    /// `auditPath`; in a folder of its own by default.
    pub path: PathBuf,
}

impl AuditConfig {
    pub(super) fn take(root: &mut Object<'_>) -> Taken<Self> {
        let path = root.path("auditPath")?;
        Ok(Self {
            enable: root.bool("enableAudit")?.unwrap_or(false),
            path: path.unwrap_or_else(|| "/var/log/turbobd/audit.log".into()),
        })
    }
}

/// `serviceConfig`: overlaybd's service for live snapshots.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ApiConfig {
    /// `enable`.
    pub enable: bool,
    /// `address`: `http://127.0.0.1:9862`, or `unix:/PATH`.
    pub address: Listen,
}

impl ApiConfig {
    /// Port of an address without one.
    const PORT: u16 = 9862;

    pub(super) fn take(root: &mut Object<'_>) -> Taken<Self> {
        let mut section = root.section("serviceConfig")?;
        let enable = section.bool("enable")?.unwrap_or(false);
        let address = match section.text("address")? {
            None => Listen::Tcp(SocketAddr::from((Ipv4Addr::LOCALHOST, Self::PORT))),
            Some(text) => Self::address(&text).ok_or_else(|| {
                let rule = format!(
                    "it is like http://127.0.0.1:9862, with a numeric address, or like unix:/PATH, not {text:?}"
                );
                section.error("address", rule)
            })?,
        };
        section.end();
        Ok(Self { enable, address })
    }

    fn address(text: &str) -> Option<Listen> {
        if let Some(path) = text.strip_prefix("unix:") {
            let path = path.strip_prefix("//").unwrap_or(path);
            return path.starts_with('/').then(|| Listen::Unix(path.into()));
        }
        let place = text.strip_prefix("http://").unwrap_or(text).trim_end_matches('/');
        let place = place.replace("localhost", "127.0.0.1");
        let alone = |_| place.parse().map(|ip: IpAddr| SocketAddr::from((ip, Self::PORT)));
        place.parse().or_else(alone).ok().map(Listen::Tcp)
    }
}
