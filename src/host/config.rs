//! The service configuration: settings for all devices of this host.
//!
//! It is overlaybd's JSON (spec runtime 3), so that a host that runs overlaybd needs no second file; settings
//! that overlaybd does not have are under the key `turbobd`. `CONFIG.md` lists every key with meaning and
//! default, and a test compares the page with the parser.
//!
//! An unknown key causes a warning that names it: it may belong to another version. A value of the wrong
//! type, or an impossible one, is an error that names file, key and the expected value: a guess would serve
//! containers by settings that no user wrote. Without a file the defaults hold, which differ from overlaybd's
//! for a section that is *absent*: then the background fill begins at once and the disk tier is used. A
//! section that is present has overlaybd's meaning, except `gzipCacheConfig`: each of its absent keys keeps turbobd's
//! default.
//!
//! Each key has an effect, or a warning says that it has none when it is set. Tests take the keys from the page, and
//! look for each setting in the source of its user.
//!
//! After parsing, sizes are bytes and times are durations. A [`ServiceConfig`] is read once, when the program
//! starts, and shared behind an `Arc`.
//!
//! Contents: `object` takes keys one by one; `sections` overlaybd's; `own` ours; [`log_file`] the files that the
//! settings name for lines.

pub mod log_file;
mod object;
mod own;
mod sections;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use thiserror::Error;

use formats::json::Notes;
use log_file::LogFile;
use object::Object;
pub use own::{OnError, TracesConfig, TurbobdConfig};
use registry::signatures::{KeyError, Signers};
pub use sections::{
    ApiConfig, AuditConfig, CacheConfig, CacheType, CertificateConfig, CredentialConfig,
    CredentialMode, DownloadConfig, ExporterConfig, GzipCacheConfig, LogConfig, LogLevel,
    P2pConfig, PrefetchConfig,
};

/// Environment variable that names the file, like `--service-config`.
pub const VARIABLE: &str = "TURBOBD_SERVICE_CONFIG";

/// Files that are tried when none is named.
pub const DEFAULT_FILES: [&str; 3] =
    ["/etc/turbobd/config.json", "/etc/overlaybd/overlaybd.json", "/etc/overlaybd/config.json"];

/// Reasons why a configuration is unusable.
#[derive(Clone, Debug, Error)]
pub enum ServiceConfigError {
    /// The file cannot be read.
    #[error("Cannot read the service configuration {}", .file.display())]
    Unreadable {
        /// The file.
        file: PathBuf,
        /// The system's reason.
        #[source]
        source: Arc<std::io::Error>,
    },
    /// It is not a JSON object.
    #[error("The service configuration {file} is not a JSON object: {rule}")]
    NotJson {
        /// The file.
        file: String,
        /// The defect, with its place.
        rule: String,
    },
    /// A file for lines cannot be opened.
    #[error("Key {key} of {file} names {}, which cannot be written", .path.display())]
    NotWritable {
        /// The configuration.
        file: String,
        /// Path of the key.
        key: &'static str,
        /// What it names.
        path: PathBuf,
        /// The system's reason.
        #[source]
        source: Arc<std::io::Error>,
    },
    /// A file of a public key cannot be used.
    #[error("Key turbobd.metaKeys of {file} names a file that cannot be used")]
    SigningKey {
        /// The configuration.
        file: String,
        /// What is wrong with which file.
        #[source]
        source: Arc<KeyError>,
    },
    /// A key has an invalid value.
    #[error("Key {key} of {file} is invalid: {rule}")]
    Key {
        /// The file.
        file: String,
        /// Path of the key, such as `cacheConfig.cacheSizeGB`.
        key: String,
        /// The expected value, and the found one.
        rule: String,
    },
}

/// Settings of this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServiceConfig {
    /// The file it was read from; `None` for the defaults.
    pub file: Option<PathBuf>,
    /// `logConfig`, or the legacy `logLevel` and `logPath`.
    pub log: LogConfig,
    /// `cacheConfig`, or the legacy `cacheType`, `registryCacheDir` and `registryCacheSizeGB`.
    pub cache: CacheConfig,
    /// `gzipCacheConfig`: the disk tier of decoded chunks.
    pub gzip_cache: GzipCacheConfig,
    /// `credentialConfig`, or the legacy `credentialFilePath`.
    pub credential: CredentialConfig,
    /// `download`: the background fill.
    pub download: DownloadConfig,
    /// `p2pConfig`.
    pub p2p: P2pConfig,
    /// `prefetchConfig`.
    pub prefetch: PrefetchConfig,
    /// `exporterConfig`.
    pub exporter: ExporterConfig,
    /// `enableAudit` and `auditPath`.
    pub audit: AuditConfig,
    /// `certConfig`: a client certificate for registries.
    pub certificate: Option<CertificateConfig>,
    /// `userAgent`, or `None` for this project's own.
    pub user_agent: Option<String>,
    /// `serviceConfig`: the live snapshot service.
    pub api: ApiConfig,
    /// `turbobd`.
    pub turbobd: TurbobdConfig,
}

impl Default for ServiceConfig {
    fn default() -> Self {
        // An empty object has no key that could be wrong.
        Self::parse("{}", "the defaults")
            .map_or_else(|error| unreachable!("the defaults parse: {error}"), |(config, _)| config)
    }
}

impl ServiceConfig {
    /// Reads the file that the user named, or that [`VARIABLE`] names, or the first of [`DEFAULT_FILES`] that
    /// exists, or no file at all. Unknown keys are logged as warnings.
    ///
    /// # Errors
    /// Returns [`ServiceConfigError`]; a named file must exist.
    pub fn load(named: Option<&Path>) -> Result<Self, ServiceConfigError> {
        let (config, warnings) = Self::read(named)?;
        for warning in warnings {
            tracing::warn!("{warning}");
        }
        Ok(config)
    }

    /// As [`load`](Self::load), with the warnings returned: for a program whose log the file itself sets up.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub fn read(named: Option<&Path>) -> Result<(Self, Vec<String>), ServiceConfigError> {
        let variable = std::env::var_os(VARIABLE).filter(|value| !value.is_empty());
        let named = named.map(Path::to_owned).or_else(|| variable.map(PathBuf::from));
        let found =
            named.or_else(|| DEFAULT_FILES.iter().map(PathBuf::from).find(|path| path.exists()));
        let Some(file) = found else { return Ok((Self::default(), Vec::new())) };
        let text = std::fs::read_to_string(&file).map_err(|source| {
            ServiceConfigError::Unreadable { file: file.clone(), source: Arc::new(source) }
        })?;
        let (mut config, warnings) = Self::parse(&text, &file.display().to_string())?;
        let signers = Signers::load(&config.turbobd.meta_keys).map_err(|source| {
            ServiceConfigError::SigningKey {
                file: file.display().to_string(),
                source: Arc::new(source),
            }
        })?;
        config.turbobd.signers = signers;
        config.file = Some(file);
        Ok((config, warnings))
    }

    /// Opens the file for lines that `key` names, as large as `logConfig` says.
    ///
    /// # Errors
    /// [`ServiceConfigError::NotWritable`].
    pub fn open_log(&self, key: &'static str, path: &Path) -> Result<LogFile, ServiceConfigError> {
        LogFile::open(path, self.log.rotation).map_err(|source| ServiceConfigError::NotWritable {
            file: self
                .file
                .as_ref()
                .map_or("the defaults".into(), |file| file.display().to_string()),
            key,
            path: path.to_owned(),
            source: Arc::new(source),
        })
    }

    /// Parses a configuration; `file` is its name for messages. Returns the warnings too.
    ///
    /// # Errors
    /// Returns [`ServiceConfigError::NotJson`] and [`ServiceConfigError::Key`].
    pub fn parse(text: &str, file: &str) -> Result<(Self, Vec<String>), ServiceConfigError> {
        let notes = Notes::default();
        let config = Self::take(Object::parse(text, file, &notes)?)?;
        Ok((config, notes.into_warnings()))
    }

    fn take(mut root: Object<'_>) -> Result<Self, ServiceConfigError> {
        let config = Self {
            file: None,
            log: LogConfig::take(&mut root)?,
            cache: CacheConfig::take(&mut root)?,
            gzip_cache: GzipCacheConfig::take(&mut root)?,
            credential: CredentialConfig::take(&mut root)?,
            download: DownloadConfig::take_section(&mut root)?,
            p2p: P2pConfig::take(&mut root)?,
            prefetch: PrefetchConfig::take(&mut root)?,
            exporter: ExporterConfig::take(&mut root)?,
            audit: AuditConfig::take(&mut root)?,
            certificate: CertificateConfig::take(&mut root)?,
            user_agent: root.text("userAgent")?,
            api: ApiConfig::take(&mut root)?,
            turbobd: TurbobdConfig::take(&mut root)?,
        };
        // They say how overlaybd itself works: how it reads local layers, threads a device, which HTTP client.
        root.without_effect("ioEngine");
        root.bounded("ioEngine", 2)?;
        root.without_effect("enableThread");
        root.bool("enableThread")?;
        root.without_effect("registryFsVersion");
        root.text("registryFsVersion")?;
        root.end();
        Ok(config)
    }
}

#[cfg(test)]
mod tests;
