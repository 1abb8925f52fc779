//! Snapshots of a device that was attached by a device config.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::daemon::Snapshots;
use disk::config::{self, DeviceConfig};
use disk::upper::LiveVolume;

/// Continues a disk on the writable layer of another configuration, which then takes the place of the first: who
/// attaches the device again finds the layer that was sealed among the lowers.
pub(super) struct ConfigSnapshots {
    pub(super) volume: Arc<LiveVolume>,
    pub(super) config: PathBuf,
}

impl Snapshots for ConfigSnapshots {
    fn take(&self, config: &Path) -> Result<(), Box<dyn Error + Send + Sync>> {
        let next = config::read(config)?;
        let files = next.upper_files(config)?.ok_or_else(|| {
            format!("{} names no new writable layer: upper.data and upper.index", config.display())
        })?;
        if config.parent() != self.config.parent()
            && let Some(path) = relative(&next)
        {
            return Err(format!(
                "{} is moved to {}, and its relative path {path:?} would lead elsewhere: make it absolute",
                config.display(),
                self.config.display()
            )
            .into());
        }
        self.volume.continue_on(&files, |sealed| {
            let folder = config.parent().unwrap_or(Path::new("/"));
            let is_below = next.lowers.last().is_some_and(|top| {
                let top = folder.join(&top.file).canonicalize().ok();
                top.is_some() && top == sealed.canonicalize().ok()
            });
            if !is_below {
                tracing::warn!(
                    "{} does not name {}, which was sealed, as its last lower: what was written to it is missed when the device is attached again",
                    config.display(),
                    sealed.display()
                );
            }
            std::fs::rename(config, &self.config)
        })?;
        tracing::info!("{} continues on {}", self.config.display(), files.data.display());
        Ok(())
    }
}

/// A path that counts from the folder of the configuration.
fn relative(config: &DeviceConfig) -> Option<&str> {
    let DeviceConfig { lowers, upper, result_file, record_trace_path, .. } = config;
    let own = [&upper.data, &upper.index, result_file, record_trace_path];
    let of_lowers = lowers.iter().flat_map(|lower| {
        [&lower.file, &lower.dir, &lower.target_file, &lower.gzip_index, &lower.gzip_sidecar]
    });
    let mut paths = own.into_iter().chain(of_lowers).map(String::as_str);
    paths.find(|path| !path.is_empty() && Path::new(path).is_relative())
}
