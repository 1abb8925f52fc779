//! Configuration of the snapshotter: a JSON file.
//!
//! turbobd's own file comes first. A host that ran overlaybd's snapshotter has its file: the keys that mean the same are taken
//! from it, and the others are named in a warning.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::Value;
use thiserror::Error;

use super::chain::ChainOptions;
use super::lazy::PlainImages;

/// Files that are looked for, in this order.
pub const FILES: [&str; 2] =
    ["/etc/turbobd/snapshotter.json", "/etc/overlaybd-snapshotter/config.json"];

/// Name that containerd's configuration should give the plugin: nerdctl sends an image's name to it by this name.
pub const PLUGIN: &str = "overlaybd";

/// Default root: the folder that CRI reports as the image file system of the plugin [`PLUGIN`], so that the kubelet finds it.
pub const ROOT: &str = "/var/lib/containerd/io.containerd.snapshotter.v1.overlaybd";

/// Default socket.
pub const ADDRESS: &str = "/run/turbobd-snapshotter/snapshotter.sock";

/// Largest configuration file, in bytes.
const LARGEST: u64 = 1 << 20;

/// The configuration. Keys are in camelCase.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct SnapshotterConfig {
    /// `root`: folder of store and snapshots.
    pub root: PathBuf,
    /// `address`: the socket, unless systemd passes one.
    pub address: PathBuf,
    /// `plain`: what is done with plain images.
    pub plain: PlainImages,
    /// `idleSeconds`: time after which a device that no container has is removed.
    pub idle_seconds: u64,
    /// `turboFsType`: file systems of TurboOCI layers that have several, the first one preferred.
    pub turbo_fs_type: Vec<String>,
    /// `mirrorRegistry`: registries that are spoken to without TLS.
    pub mirror_registry: Vec<InsecureRegistry>,
    /// Run directory of the daemon that makes devices (`TURBOBD_RUN_DIR`).
    #[serde(skip)]
    pub run_dir: PathBuf,
    /// Keys without a meaning here.
    #[serde(flatten)]
    pub(crate) unknown: BTreeMap<String, Value>,
}

/// An entry of `mirrorRegistry`. Nothing is mirrored by it, in overlaybd neither.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct InsecureRegistry {
    /// Host with port.
    pub host: String,
    /// True if it has no TLS.
    #[serde(default)]
    pub insecure: bool,
}

impl Default for SnapshotterConfig {
    fn default() -> Self {
        Self {
            root: ROOT.into(),
            address: ADDRESS.into(),
            plain: PlainImages::default(),
            idle_seconds: 300,
            turbo_fs_type: Vec::new(),
            mirror_registry: Vec::new(),
            run_dir: client::protocol::run_dir(),
            unknown: BTreeMap::new(),
        }
    }
}

/// Failure to read the configuration.
#[derive(Debug, Error)]
pub enum SnapshotterConfigError {
    /// The file cannot be read.
    #[error("The configuration {path} cannot be read", path = path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Answer of the system.
        #[source]
        source: io::Error,
    },
    /// The file is no such configuration.
    #[error("The configuration {path} is not valid", path = path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// Place and reason.
        #[source]
        source: serde_json::Error,
    },
}

impl SnapshotterConfig {
    /// How chains of layers are shown.
    #[must_use]
    pub fn chain_options(&self) -> ChainOptions {
        let insecure = self.mirror_registry.iter().filter(|registry| registry.insecure);
        ChainOptions {
            erofs: self.turbo_fs_type.first().is_some_and(|first| first == "erofs"),
            plain_http: insecure.map(|registry| registry.host.clone()).collect(),
        }
    }

    /// Reads `file`, else the first of [`FILES`] that exists, else takes the defaults. Warnings name keys without a meaning.
    ///
    /// # Errors
    /// Returns [`SnapshotterConfigError`].
    pub fn read(file: Option<&Path>) -> Result<(Self, Vec<String>), SnapshotterConfigError> {
        let found = FILES.iter().map(Path::new).find(|path| path.exists());
        let Some(path) = file.or(found) else {
            return Ok((Self::default(), Vec::new()));
        };
        let read = |source| SnapshotterConfigError::Read { path: path.to_owned(), source };
        if std::fs::metadata(path).map_err(read)?.len() > LARGEST {
            let large = io::Error::other(format!("It is larger than {LARGEST} bytes"));
            return Err(read(large));
        }
        let text = std::fs::read(path).map_err(read)?;
        let config: Self = serde_json::from_slice(&text)
            .map_err(|source| SnapshotterConfigError::Invalid { path: path.to_owned(), source })?;
        let warn = |key: &String| format!("{}: the key {key} has no meaning here", path.display());
        let warnings = config.unknown.keys().map(warn).collect();
        Ok((config, warnings))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_of_overlaybds_file_are_taken_and_others_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("config.json");
        let text = r#"{"root":"/r","address":"/a.sock","verbose":"info","tenant":128}"#;
        std::fs::write(&file, text).unwrap();
        let (config, warnings) = SnapshotterConfig::read(Some(&file)).unwrap();
        assert_eq!((config.root, config.address), ("/r".into(), "/a.sock".into()));
        assert_eq!(warnings.len(), 2);
        assert!(warnings[0].contains("tenant") && warnings[1].contains("verbose"), "{warnings:?}");
    }

    #[test]
    fn a_file_that_is_no_configuration_is_refused_with_its_place() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("config.json");
        for text in ["", "{", r#"{"root":7}"#, "[]"] {
            std::fs::write(&file, text).unwrap();
            let error = SnapshotterConfig::read(Some(&file)).unwrap_err();
            assert!(error.to_string().contains("config.json"), "{text}: {error}");
        }
        assert!(SnapshotterConfig::read(Some(&dir.path().join("absent"))).is_err());
    }
}
