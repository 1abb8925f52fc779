//! overlaybd's sections (spec runtime 3), with its names, meanings and defaults.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use super::ConfigError;
use super::object::Object;

/// overlaybd's MB and GB are powers of two.
pub(super) const MIB: u64 = 1 << 20;
pub(super) const GIB: u64 = 1 << 30;

/// Longest sensible wait in seconds: a year.
const LONGEST: u64 = 365 * 86_400;

type Taken<T> = Result<T, ConfigError>;

/// `logConfig`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogConfig {
    /// `logLevel`: 0 debug, 1 info, 2 warnings, 3 errors.
    pub level: u64,
    /// `logPath`; `None`: standard error.
    pub path: Option<PathBuf>,
    /// `logSizeMB`, in bytes: then the file is rotated.
    pub size: u64,
    /// `logRotateNum`: old files kept.
    pub rotate: u64,
}

impl LogConfig {
    pub(super) fn take(root: &mut Object<'_>) -> Taken<Self> {
        let legacy = (root.number("logLevel")?, root.path("logPath")?);
        let mut section = root.section("logConfig")?;
        let (level, path) = (section.number("logLevel")?, section.path("logPath")?);
        // overlaybd looks at the legacy keys when logConfig names no file.
        let (level, path) =
            if path.is_some() { (level, path) } else { (legacy.0.or(level), legacy.1) };
        let log = Self {
            level: level.unwrap_or(1),
            path,
            size: section.size("logSizeMB", MIB)?.unwrap_or(10 * MIB),
            rotate: section.number("logRotateNum")?.unwrap_or(3),
        };
        section.end();
        Ok(log)
    }
}

/// `ioEngine`: how overlaybd reads local layers. Here only whether they are read past the page cache.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum IoEngine {
    /// 0: `pread`, through the page cache.
    #[default]
    Psync,
    /// 1: libaio with `O_DIRECT`.
    Libaio,
    /// 2: POSIX aio.
    PosixAio,
}

impl IoEngine {
    pub(super) fn take(root: &mut Object<'_>) -> Taken<Self> {
        Ok(match root.bounded("ioEngine", 2)? {
            None | Some(0) => Self::Psync,
            Some(1) => Self::Libaio,
            Some(_) => Self::PosixAio,
        })
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
    /// `download`: beside the layer, in the folder that the device's configuration names.
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
    /// `refillSize` in bytes: a power of two, at least 4096.
    pub refill: u64,
    /// `blockSize` in bytes, of `ocf`.
    pub block: u64,
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
        let kind = match kind.as_deref() {
            None | Some("file") => CacheType::File,
            Some("ocf") => CacheType::Ocf,
            Some("download") => CacheType::Download,
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
            refill: refill(&mut section, 256 << 10)?,
            block: section.number("blockSize")?.unwrap_or(64 << 10),
        };
        section.end();
        Ok(cache)
    }
}

fn refill(section: &mut Object<'_>, default: u64) -> Taken<u64> {
    match section.number("refillSize")? {
        None => Ok(default),
        Some(size) if size >= 4096 && size.is_power_of_two() => Ok(size),
        Some(size) => {
            Err(section
                .error("refillSize", format!("it is a power of two from 4096 on, not {size}")))
        }
    }
}

/// `gzipCacheConfig`: decoded chunks on disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GzipCacheConfig {
    /// `enable`: off in a section that does not say so, on when there is no section.
    pub enable: bool,
    /// `cacheDir`; without a section `/var/lib/turbobd/cache`, so as not to meet overlaybd's files.
    pub dir: PathBuf,
    /// `cacheSizeGB`, in bytes.
    pub size: u64,
    /// `refillSize` in bytes: a power of two, at least 4096. overlaybd's unit of decoding; ours is the
    /// segment.
    pub refill: u64,
}

impl GzipCacheConfig {
    pub(super) fn take(root: &mut Object<'_>) -> Taken<Self> {
        let mut section = root.section("gzipCacheConfig")?;
        let here = section.is_present();
        let dir = if here { "/opt/overlaybd/gzip_cache" } else { "/var/lib/turbobd/cache" };
        let cache = Self {
            enable: section.bool("enable")?.unwrap_or(!here),
            dir: section.path("cacheDir")?.unwrap_or_else(|| dir.into()),
            size: section.size("cacheSizeGB", GIB)?.unwrap_or(4 * GIB),
            refill: refill(&mut section, 1 << 20)?,
        };
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
    /// `tryCnt`: attempts at one layer.
    pub tries: u64,
    /// `blockSize` in bytes: overlaybd's unit of downloading; ours is the segment.
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

    pub(super) fn take(mut section: Object<'_>) -> Taken<Self> {
        let seconds =
            |seconds: Option<u64>, default| Duration::from_secs(seconds.unwrap_or(default));
        let rate = section.size("maxMBps", MIB)?.unwrap_or(100 * MIB);
        let config = Self {
            enable: section.bool("enable")?.unwrap_or(false),
            delay: seconds(section.bounded("delay", LONGEST)?, 300),
            delay_extra: seconds(section.bounded("delayExtra", LONGEST)?, 30),
            max_bytes_per_second: Some(rate).filter(|rate| *rate > 0),
            tries: section.number("tryCnt")?.unwrap_or(5),
            block: section.number("blockSize")?.unwrap_or(256 << 10),
        };
        section.end();
        Ok(config)
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
    /// `concurrency`: reads at once when a trace is replayed; at least 1.
    pub concurrency: u64,
}

impl PrefetchConfig {
    pub(super) fn take(root: &mut Object<'_>) -> Taken<Self> {
        let mut section = root.section("prefetchConfig")?;
        let concurrency = section.number("concurrency")?.unwrap_or(16).max(1);
        section.end();
        Ok(Self { concurrency })
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
    /// `updateInterval`, in microseconds in the file. overlaybd does not use it.
    pub interval: Duration,
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
            interval: Duration::from_micros(
                section.number("updateInterval")?.unwrap_or(60_000_000),
            ),
        };
        section.end();
        Ok(exporter)
    }
}

/// `enableAudit` and `auditPath`: a line for each download and read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AuditConfig {
    /// `enableAudit`; `None` when the file does not say (overlaybd: on).
    pub enable: Option<bool>,
    /// `auditPath`.
    pub path: PathBuf,
}

impl AuditConfig {
    pub(super) fn take(root: &mut Object<'_>) -> Taken<Self> {
        let path = root.path("auditPath")?;
        Ok(Self {
            enable: root.bool("enableAudit")?,
            path: path.unwrap_or_else(|| "/var/log/overlaybd-audit.log".into()),
        })
    }
}

/// `serviceConfig`: overlaybd's service for live snapshots.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ApiConfig {
    /// `enable`.
    pub enable: bool,
    /// `address`: the part after the scheme, as in `http://127.0.0.1:9862`.
    pub address: SocketAddr,
}

impl ApiConfig {
    /// Port of an address without one.
    const PORT: u16 = 9862;

    pub(super) fn take(root: &mut Object<'_>) -> Taken<Self> {
        let mut section = root.section("serviceConfig")?;
        let enable = section.bool("enable")?.unwrap_or(false);
        let address = match section.text("address")? {
            None => SocketAddr::from((Ipv4Addr::LOCALHOST, Self::PORT)),
            Some(text) => Self::address(&text).ok_or_else(|| {
                let rule = format!(
                    "it is like http://127.0.0.1:9862, with a numeric address, not {text:?}"
                );
                section.error("address", rule)
            })?,
        };
        section.end();
        Ok(Self { enable, address })
    }

    fn address(text: &str) -> Option<SocketAddr> {
        let place = text.strip_prefix("http://").unwrap_or(text).trim_end_matches('/');
        let place = place.replace("localhost", "127.0.0.1");
        let alone = |_| place.parse().map(|ip: IpAddr| SocketAddr::from((ip, Self::PORT)));
        place.parse().or_else(alone).ok()
    }
}
