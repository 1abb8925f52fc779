//! Upstream's device configuration, `config.v1.json` (spec runtime 1 and 2), and its disk.
//!
//! A layer is the first of its local files that exists, or else a blob of the registry at `repoBlobUrl`; the
//! original layer of a TurboOCI layer is a local file or such a blob. A [`TargetOpener`] connects to the
//! registry and reads compressed layers; this module does neither.
//!
//! Unknown keys are ignored with a warning; upstream ignores them too. A value of the wrong type is an error
//! with the name of the key, where upstream aborts. Relative paths count from the folder of the
//! configuration, so that an image and its configuration can be moved together.
//!
//! Contents: `parse` from text to values, `lowers` the read-only layers, `upper` the writable one.

mod lowers;
mod parse;
mod upper;

use std::cell::RefCell;
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::Value;

use self::lowers::LowersBase;
use super::{Disk, DiskError};
use crate::writable::WritableFiles;
use blobs::cache::Cache;
use formats::lsmt::MAX_LAYERS;
use formats::oci::Digest;
use formats::trace::Trace;
use source::ByteSource;
use source::chunk::ChunkSource;

/// Opens the files and blobs that a configuration only names. Implemented by the decoders of this program
/// with its registry client, and by tests.
pub trait TargetOpener {
    /// The uncompressed tar of `blob`; for a gzip stream, `index` (a `gzip.meta`) gives access to it.
    /// `sidecar` has the data that upstream's index cannot hold, or the whole index; `digest` is the name of
    /// the blob in the configuration.
    ///
    /// # Errors
    /// [`DiskError::Target`], or any other.
    fn open_indexed(
        &self,
        blob: Arc<dyn ByteSource>,
        index: Option<Vec<u8>>,
        sidecar: Option<Vec<u8>>,
        digest: Option<&str>,
    ) -> Result<Arc<dyn ChunkSource>, DiskError>;

    /// The blob `digest` of the repository with blobs at the URL `blobs`; `size` is its length in bytes, if
    /// the configuration has it.
    ///
    /// # Errors
    /// [`DiskError`]; always, without a registry.
    fn open_remote(
        &self,
        blobs: &str,
        digest: &Digest,
        size: Option<u64>,
    ) -> Result<Arc<dyn ByteSource>, DiskError> {
        let _ = size;
        let error =
            std::io::Error::other(format!("{blobs} cannot be reached without a registry client"));
        Err(DiskError::Io { name: digest.to_string(), source: Arc::new(error) })
    }
}

/// A device configuration.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DeviceConfig {
    /// `https://host/v2/<name>/blobs`: the place of blobs without a local file.
    pub repo_blob_url: String,
    /// The layers, bottom first.
    pub lowers: Vec<LowerConfig>,
    /// The writable layer.
    pub upper: UpperConfig,
    /// File that receives `success` or `failed:<reason>` once.
    pub result_file: String,
    /// Replaces the host's settings for background download, as a whole.
    pub download: Option<DeviceDownload>,
    /// The last lower is a trace to prefetch by, not a layer.
    pub acceleration_layer: bool,
    /// File of the trace.
    pub record_trace_path: String,
}

/// One layer of a configuration. An empty text means that the key is absent.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LowerConfig {
    /// Local layer file; of a TurboOCI layer, the filesystem metadata.
    pub file: String,
    /// Folder of the downloaded layer.
    pub dir: String,
    /// Digest of the layer blob.
    pub digest: String,
    /// Bytes of the layer blob.
    pub size: u64,
    /// Local copy of the original layer.
    pub target_file: String,
    /// Digest of the original layer.
    pub target_digest: String,
    /// Path of `gzip.meta`; if present, the original layer is gzip.
    pub gzip_index: String,
    /// Path of the sidecar with the data that `gzip.meta` cannot hold; a key of this program, unknown to
    /// upstream.
    pub gzip_sidecar: String,
}

/// Settings of the background download for one device. They replace the host's as a whole: an absent one has upstream's
/// default, and not the host's value.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DeviceDownload {
    /// True if there is a background download.
    pub enable: Option<bool>,
    /// Seconds after the start.
    pub delay: Option<u64>,
    /// Largest random number of seconds added to that.
    pub delay_extra: Option<u64>,
    /// Largest rate in megabytes per second.
    pub max_mbps: Option<u64>,
    /// Number of tries.
    pub tries: Option<u64>,
    /// Bytes per request.
    pub block_size: Option<u64>,
}

/// The writable layer of a configuration: both files, or none.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct UpperConfig {
    /// Its index log; for a sparse layer, a file that is never read.
    pub index: String,
    /// Its data file.
    pub data: String,
    /// Original layer of a writable TurboOCI layer.
    pub target: String,
    /// `gzip.meta` of that.
    pub gzip_index: String,
}

/// Use of the disk, which decides the place of its writable layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// The disk is read: the writable layer, if any, is the topmost of the disk and stays unchanged.
    Read,
    /// The disk is served: it excludes the writable layer, which is opened above it.
    Serve,
}

/// The opened disk of a configuration, and its other parts.
pub struct OpenedConfig {
    /// The virtual disk.
    pub disk: Disk,
    /// The writable layer, if the disk is served with one.
    pub upper: Option<WritableFiles>,
    /// The trace, if the configuration names a recorded one.
    pub trace: Option<Trace>,
    /// File in which a trace must be recorded.
    pub record: Option<PathBuf>,
    /// Settings of the background download, in the place of the host's.
    pub download: Option<DeviceDownload>,
}

/// Opens the disk of the configuration at `path`, to read it.
///
/// # Errors
/// [`DiskError`] with the layer or the key.
pub fn open(path: &Path, cache: Arc<Cache>, targets: &dyn TargetOpener) -> Result<Disk, DiskError> {
    open_all(path, cache, targets, Purpose::Read).map(|opened| opened.disk)
}

/// Reads the configuration at `path`.
///
/// # Errors
/// [`DiskError::Io`], [`DiskError::Config`].
pub fn read(path: &Path) -> Result<DeviceConfig, DiskError> {
    let file = path.display().to_string();
    let text = fs::read_to_string(path)
        .map_err(|source| DiskError::Io { name: file.clone(), source: Arc::new(source) })?;
    DeviceConfig::parse(&text, &file)
}

impl DeviceConfig {
    /// The files of the writable layer in this configuration, which lies at `path`.
    ///
    /// # Errors
    /// [`DiskError::Config`].
    pub fn upper_files(&self, path: &Path) -> Result<Option<WritableFiles>, DiskError> {
        upper::files(&self.upper, folder_of(path)).map_err(|rule| DiskError::Config {
            file: path.display().to_string(),
            key: "upper".to_owned(),
            rule: rule.to_owned(),
        })
    }
}

fn folder_of(path: &Path) -> &Path {
    path.parent().unwrap_or(Path::new("."))
}

/// Opens the disk of the configuration, together with its writable layer, its trace and the file for
/// recording.
///
/// # Errors
/// [`DiskError`] with the layer or the key.
pub fn open_all(
    path: &Path,
    cache: Arc<Cache>,
    targets: &dyn TargetOpener,
    purpose: Purpose,
) -> Result<OpenedConfig, DiskError> {
    let mut config = read(path)?;
    let file = path.display().to_string();
    let invalid = |key: &str, rule: &str| DiskError::Config {
        file: file.clone(),
        key: key.to_owned(),
        rule: rule.to_owned(),
    };
    if config.acceleration_layer && !config.record_trace_path.is_empty() {
        return Err(invalid("accelerationLayer", "it cannot be combined with recordTracePath"));
    }
    let folder = folder_of(path);
    let upper = config.upper_files(path)?;
    let trace_file = trace_file(&mut config, folder);
    if config.lowers.is_empty() && upper.is_none() {
        return Err(invalid("lowers", "an image has at least one layer"));
    }
    if config.lowers.len() > MAX_LAYERS {
        // Checked before 256 blobs are opened without need.
        return Err(invalid("lowers", "an image has at most 255 layers"));
    }
    let place = LowersBase {
        file: &file,
        folder,
        blobs: &config.repo_blob_url,
        targets,
        cache: &cache,
        reserved: RefCell::default(),
    };
    let open = |(number, lower)| place.open_lower(number, lower);
    let mut layers =
        config.lowers.iter().enumerate().map(open).collect::<Result<Vec<_>, DiskError>>()?;
    let upper = match (upper, purpose) {
        (Some(files), Purpose::Read) => {
            layers.push(upper::as_layer(&files)?);
            None
        }
        (Some(files), Purpose::Serve) if layers.is_empty() => {
            layers.push(upper::below_nothing(&files)?);
            Some(files)
        }
        (upper, _) => upper,
    };
    let reserved = place.reserved.take();
    let disk = Disk::with_reserved(layers, cache, reserved)?;
    let (trace, record) = match trace_file {
        Some(path) => read_trace(&disk, path),
        None => (None, None),
    };
    Ok(OpenedConfig { disk, upper, trace, record, download: config.download })
}

/// Writes the outcome into the `resultFile` of the configuration at `path`, if it names one: `success`, or
/// `failed:` and the reason. Upstream's snapshotter reads it there.
pub fn tell_result(path: &Path, outcome: Result<(), &str>) {
    let folder = folder_of(path);
    let text = fs::read_to_string(path).unwrap_or_default();
    let named = serde_json::from_str::<Value>(&text).ok();
    let named = named.as_ref().and_then(|config| config.get("resultFile")?.as_str());
    let Some(name) = named.filter(|name| !name.is_empty()) else { return };
    let result = match outcome {
        Ok(()) => "success".to_owned(),
        Err(reason) => format!("failed:{reason}"),
    };
    let options = fs::OpenOptions::new().write(true).create(true).truncate(true).clone();
    let written = sys::private::open(&folder.join(name), &options)
        .and_then(|mut file| file.write_all(result.as_bytes()));
    if let Err(error) = written {
        tracing::warn!(%error, "The result file {name} of {} cannot be written", path.display());
    }
}

/// Path of a trace: in the last lower, which is then not a layer, or at a path of its own.
fn trace_file(config: &mut DeviceConfig, folder: &Path) -> Option<PathBuf> {
    if config.acceleration_layer {
        return config.lowers.pop().map(|lower| folder.join(lower.dir).join("trace"));
    }
    let path = &config.record_trace_path;
    (!path.is_empty()).then(|| folder.join(path))
}

/// Reads a recorded trace or a list of files, or finds the empty file for a new trace. A trace is advice:
/// with an invalid one, the image starts as without one.
fn read_trace(disk: &Disk, path: PathBuf) -> (Option<Trace>, Option<PathBuf>) {
    match fs::read(&path) {
        Err(_) => (None, None),
        Ok(bytes) if bytes.is_empty() => (None, Some(path)),
        Ok(bytes) => match disk.trace_in(&bytes) {
            Ok(trace) => (Some(trace), None),
            Err(error) => {
                let error: &dyn std::error::Error = &error;
                tracing::warn!(error, "The trace {} is ignored", path.display());
                (None, None)
            }
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct NoGzip;

    impl TargetOpener for NoGzip {
        fn open_indexed(
            &self,
            blob: Arc<dyn ByteSource>,
            index: Option<Vec<u8>>,
            sidecar: Option<Vec<u8>>,
            digest: Option<&str>,
        ) -> Result<Arc<dyn ChunkSource>, DiskError> {
            let name = format!("{} bytes, {index:?}, {sidecar:?}, {digest:?}", blob.len());
            Err(DiskError::Target { name, source: Arc::new(std::io::Error::other("no gzip here")) })
        }
    }

    #[test]
    fn layers_are_found_where_upstream_finds_them_and_what_is_missing_is_named() {
        use crate::volume::Volume as _;
        use formats::lsmt::{LayerIdentity, NativeWriter, WarpWriter};
        use formats::units::{Bytes, Sectors};

        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, bytes: &[u8]| {
            let path = folder.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, bytes).unwrap();
        };
        let native = |byte: u8| {
            let mut writer =
                NativeWriter::new(Vec::new(), Bytes(1 << 20), LayerIdentity::default()).unwrap();
            writer.data(Sectors(u64::from(byte)), &[byte; 512]).unwrap();
            writer.finish().unwrap()
        };
        let mut warp = WarpWriter::new(Bytes(1 << 20)).unwrap();
        warp.metadata(Sectors(4), &[4; 512]).unwrap();
        warp.remote(Sectors(5), Sectors(1), Sectors(1)).unwrap();
        let mut meta = Vec::new();
        warp.finish(&mut meta).unwrap();
        write("one/overlaybd.sealed", &native(1));
        write("one/.commit", &native(2));
        write("three", &native(3));
        write("meta", &meta);
        write("layer.tar", &[[9; 512], [5; 512]].concat());
        write("index", &[1, 2]);
        write("sidecar", &[3]);
        let open = |text: &str| {
            write("config.v1.json", text.as_bytes());
            open(&folder.path().join("config.v1.json"), Cache::new(1 << 20, 1), &NoGzip)
        };
        let disk = open(r#"{"lowers": [{"dir": "one", "file": "absent"}, {"file": "three", "dir": "one"},
            {"file": "meta", "targetFile": "layer.tar", "targetDigest": "sha256:5"}], "upper": {}}"#)
        .unwrap();
        let mut bytes = [0xff; 6 * 512];
        disk.read_at(&mut bytes, 0).unwrap();
        let sectors: Vec<_> = bytes.chunks(512).map(|sector| sector[0]).collect();
        assert_eq!(sectors, [0, 0, 2, 3, 4, 5]);

        let refused = |text| open(text).map(|_| ()).unwrap_err().to_string();
        let cases = [
            (r#"{"lowers": []}"#, "Key lowers of"),
            (
                r#"{"lowers": [{"file": "three"}], "upper": {"index": "i", "data": "d"}}"#,
                "Cannot open the writable layer",
            ),
            (
                r#"{"lowers": [{"file": "three"}], "upper": {"index": "i", "data": "d", "target": "t"}}"#,
                "Key upper of",
            ),
            (r#"{"lowers": [{"file": "three"}], "accelerationLayer": true}"#, "Key lowers of"),
            (r#"{"lowers": [{"digest": "sha256:7"}]}"#, "Key lowers[0].digest of"),
            (
                r#"{"lowers": [{"file": "x", "dir": "y"}]}"#,
                "Layer 0 (x) is incomplete: none of its local files",
            ),
            (
                r#"{"lowers": [{"file": "meta", "targetDigest": "sha256:5"}]}"#,
                "Key lowers[0].targetDigest of",
            ),
            (
                r#"{"lowers": [{"file": "meta", "targetFile": "layer.tar", "gzipIndex": "index", "gzipSidecar": "sidecar"}]}"#,
                "Cannot open the compressed layer 1024 bytes, Some([1, 2]), Some([3]), None",
            ),
        ];
        for (text, message) in cases {
            let refused = refused(text);
            assert!(refused.starts_with(message), "{refused}");
        }
        assert!(open(r#"{"lowers": [{"file": "layer.tar"}]}"#).is_err());
    }
}
