//! Upstream's device configuration, `config.v1.json` (spec runtime 1 and 2), and the disk it describes.
//!
//! A layer is the first of its local files that exists, else a blob of the registry at `repoBlobUrl`; the
//! original layer of a TurboOCI layer is a local file or such a blob. How a registry is reached and how a
//! compressed layer is read is not decided here: a [`TargetOpener`] does both.
//!
//! Keys that nobody knows are ignored with a warning, as upstream ignores them. A value of the wrong
//! type is an error that names the key, where upstream aborts. Relative paths count from the folder
//! of the configuration, so that an image and its configuration can be moved together.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::{Map, Value};

use super::{Disk, DiskError, DiskLayer, LayerData};
use crate::cache::Cache;
use crate::chunk::{ChunkSource, PlainChunks};
use crate::gzip::SIDECAR_NAME;
use crate::lsmt::{Layer, LayerKind, MAX_LAYERS};
use crate::oci::Digest;
use crate::source::{ByteSource, FileSource, MemorySource, SharedBytes};
use crate::trace::Trace;
use crate::{zfile, zstandard};

/// Largest `gzip.meta` or sidecar that is read into memory, in bytes. Upstream's take 4 % of a
/// layer, ours less than 1 %: this is a layer of hundreds of GB.
const MAX_INDEX: u64 = 8 << 30;

/// Opens what a configuration only names. The decoders of this program and its registry client implement
/// it; so may tests.
pub trait TargetOpener {
    /// The uncompressed tar of `blob`, to which `index` (a `gzip.meta`) gives access if it is a gzip stream.
    /// `sidecar` holds what upstream's index cannot, or all of it; `digest` is what the configuration calls
    /// the blob.
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

    /// The blob `digest` of the repository whose blobs are at the URL `blobs`; `size` is its length in bytes
    /// if the configuration says so.
    ///
    /// # Errors
    /// [`DiskError`]; without a registry, always.
    fn open_remote(
        &self,
        blobs: &str,
        digest: &Digest,
        size: Option<u64>,
    ) -> Result<Arc<dyn ByteSource>, DiskError> {
        let _ = size;
        let error = std::io::Error::other(format!("{blobs} is not reached from here"));
        Err(DiskError::Io { name: digest.to_string(), source: Arc::new(error) })
    }
}

/// A device configuration.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Config {
    /// `https://host/v2/<name>/blobs`: where blobs without a local file are.
    pub repo_blob_url: String,
    /// The layers, bottom first.
    pub lowers: Vec<Lower>,
    /// The writable layer.
    pub upper: Upper,
    /// File that receives `success` or `failed:<reason>` once.
    pub result_file: String,
    /// Overrides the host's settings for background download.
    pub download: Option<Download>,
    /// The last lower is a trace to prefetch by, not a layer.
    pub acceleration_layer: bool,
    /// File of a trace.
    pub record_trace_path: String,
}

/// One layer of a configuration. An empty text means that the key is absent.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Lower {
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
    /// Path of `gzip.meta`; its presence says that the original layer is gzip.
    pub gzip_index: String,
    /// Path of the sidecar with what `gzip.meta` cannot hold: ours, unknown to upstream.
    pub gzip_sidecar: String,
}

/// Settings of the background download for one device; what is absent is as the host says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Download {
    /// Whether there is one.
    pub enable: Option<bool>,
    /// Seconds after the start.
    pub delay: Option<u64>,
    /// Seconds at random on top of that.
    pub delay_extra: Option<u64>,
    /// Megabytes a second at most.
    pub max_mbps: Option<u64>,
    /// Tries.
    pub tries: Option<u64>,
    /// Bytes asked for at a time.
    pub block_size: Option<u64>,
}

impl Download {
    fn take(mut object: Object) -> Result<Self, DiskError> {
        let enable = match object.map.get("enable") {
            None => None,
            Some(_) => Some(object.bool("enable")?),
        };
        let mut number = |key: &str| match object.map.get(key) {
            None => Ok(None),
            Some(_) => object.u64(key).map(Some),
        };
        let download = Self {
            enable,
            delay: number("delay")?,
            delay_extra: number("delayExtra")?,
            max_mbps: number("maxMBps")?,
            tries: number("tryCnt")?,
            block_size: number("blockSize")?,
        };
        object.end();
        Ok(download)
    }
}

/// The writable layer of a configuration; this program has none.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Upper {
    /// Its index log.
    pub index: String,
    /// Its data file.
    pub data: String,
    /// Original layer of a writable TurboOCI layer.
    pub target: String,
    /// `gzip.meta` of that.
    pub gzip_index: String,
}

/// An object of the configuration, whose keys are taken one by one.
struct Object {
    file: String,
    /// Path of the object: empty, or `lowers[2].`.
    path: String,
    map: Map<String, Value>,
}

impl Object {
    fn error(&self, key: &str, rule: String) -> DiskError {
        DiskError::Config { file: self.file.clone(), key: format!("{}{key}", self.path), rule }
    }

    fn wrong_type(&self, key: &str, wanted: &str, found: &Value) -> DiskError {
        let found = match found {
            Value::Null => "null",
            Value::Bool(_) => "a boolean",
            Value::Number(_) => "a number",
            Value::String(_) => "a string",
            Value::Array(_) => "an array",
            Value::Object(_) => "an object",
        };
        self.error(key, format!("it must be {wanted}, not {found}"))
    }

    fn string(&mut self, key: &str) -> Result<String, DiskError> {
        match self.map.remove(key) {
            None => Ok(String::new()),
            Some(Value::String(text)) => Ok(text),
            Some(other) => Err(self.wrong_type(key, "a string", &other)),
        }
    }

    fn u64(&mut self, key: &str) -> Result<u64, DiskError> {
        match self.map.remove(key) {
            None => Ok(0),
            Some(value) => {
                value.as_u64().ok_or_else(|| self.wrong_type(key, "a whole number", &value))
            }
        }
    }

    fn bool(&mut self, key: &str) -> Result<bool, DiskError> {
        match self.map.remove(key) {
            None => Ok(false),
            Some(Value::Bool(value)) => Ok(value),
            Some(other) => Err(self.wrong_type(key, "true or false", &other)),
        }
    }

    fn object(&mut self, key: &str) -> Result<Option<Object>, DiskError> {
        match self.map.remove(key) {
            None => Ok(None),
            Some(Value::Object(map)) => Ok(Some(Object {
                file: self.file.clone(),
                path: format!("{}{key}.", self.path),
                map,
            })),
            Some(other) => Err(self.wrong_type(key, "an object", &other)),
        }
    }

    fn objects(&mut self, key: &str) -> Result<Vec<Object>, DiskError> {
        let values = match self.map.remove(key) {
            None => return Ok(Vec::new()),
            Some(Value::Array(values)) => values,
            Some(other) => return Err(self.wrong_type(key, "an array", &other)),
        };
        let element = |(number, value)| {
            let key = format!("{key}[{number}]");
            match value {
                Value::Object(map) => Ok(Object {
                    file: self.file.clone(),
                    path: format!("{}{key}.", self.path),
                    map,
                }),
                other => Err(self.wrong_type(&key, "an object", &other)),
            }
        };
        values.into_iter().enumerate().map(element).collect()
    }

    /// Warns of what nobody has taken.
    fn end(self) {
        for key in self.map.keys() {
            tracing::warn!("Key {}{key} of {} is unknown and ignored", self.path, self.file);
        }
    }
}

impl Config {
    /// Reads a configuration; `file` is its name for messages.
    ///
    /// # Errors
    /// [`DiskError::Config`] naming the key, or that the text is not JSON.
    pub fn parse(text: &str, file: &str) -> Result<Self, DiskError> {
        let whole = |rule: String| DiskError::Config {
            file: file.to_owned(),
            key: "(all)".to_owned(),
            rule,
        };
        let map = match serde_json::from_str(text) {
            Ok(Value::Object(map)) => map,
            Ok(_) => return Err(whole("it must be an object".to_owned())),
            Err(error) => return Err(whole(format!("it is not JSON: {error}"))),
        };
        let mut object = Object { file: file.to_owned(), path: String::new(), map };
        let config = Self {
            repo_blob_url: object.string("repoBlobUrl")?,
            lowers: object
                .objects("lowers")?
                .into_iter()
                .map(Lower::take)
                .collect::<Result<_, _>>()?,
            upper: object.object("upper")?.map(Upper::take).transpose()?.unwrap_or_default(),
            result_file: object.string("resultFile")?,
            download: object.object("download")?.map(Download::take).transpose()?,
            acceleration_layer: object.bool("accelerationLayer")?,
            record_trace_path: object.string("recordTracePath")?,
        };
        object.end();
        Ok(config)
    }
}

impl Lower {
    fn take(mut object: Object) -> Result<Self, DiskError> {
        let lower = Self {
            file: object.string("file")?,
            dir: object.string("dir")?,
            digest: object.string("digest")?,
            size: object.u64("size")?,
            target_file: object.string("targetFile")?,
            target_digest: object.string("targetDigest")?,
            gzip_index: object.string("gzipIndex")?,
            gzip_sidecar: object.string("gzipSidecar")?,
        };
        object.end();
        Ok(lower)
    }
}

impl Upper {
    fn take(mut object: Object) -> Result<Self, DiskError> {
        // The snapshotter writes a size that nothing reads.
        object.map.remove("vsize");
        let upper = Self {
            index: object.string("index")?,
            data: object.string("data")?,
            target: object.string("target")?,
            gzip_index: object.string("gzipIndex")?,
        };
        object.end();
        Ok(upper)
    }
}

/// What a configuration describes, opened.
pub struct OpenedConfig {
    /// The virtual disk.
    pub disk: Disk,
    /// What a start reads, if the configuration names a trace that was recorded.
    pub trace: Option<Trace>,
    /// File in which a trace is to be recorded.
    pub record: Option<PathBuf>,
}

/// Opens the image that the configuration at `path` describes.
///
/// # Errors
/// [`DiskError`], which names the layer or the key.
pub fn open(path: &Path, cache: Arc<Cache>, targets: &dyn TargetOpener) -> Result<Disk, DiskError> {
    open_all(path, cache, targets).map(|opened| opened.disk)
}

/// The same, with what it says beside the layers.
///
/// # Errors
/// [`DiskError`], which names the layer or the key.
pub fn open_all(
    path: &Path,
    cache: Arc<Cache>,
    targets: &dyn TargetOpener,
) -> Result<OpenedConfig, DiskError> {
    let file = path.display().to_string();
    let text = fs::read_to_string(path)
        .map_err(|source| DiskError::Io { name: file.clone(), source: Arc::new(source) })?;
    let mut config = Config::parse(&text, &file)?;
    let invalid = |key: &str, rule: &str| DiskError::Config {
        file: file.clone(),
        key: key.to_owned(),
        rule: rule.to_owned(),
    };
    if !config.upper.index.is_empty() && !config.upper.data.is_empty() {
        return Err(invalid("upper", "this program has no writable layers: remove it"));
    }
    if config.acceleration_layer && !config.record_trace_path.is_empty() {
        return Err(invalid("accelerationLayer", "it excludes recordTracePath"));
    }
    let folder = path.parent().unwrap_or(Path::new("."));
    let trace_file = trace_file(&mut config, folder);
    if config.lowers.is_empty() {
        return Err(invalid("lowers", "an image has at least one layer"));
    }
    if config.lowers.len() > MAX_LAYERS {
        // Before 256 blobs are opened for nothing.
        return Err(invalid("lowers", "an image has at most 255 layers"));
    }
    let place = Place { file: &file, folder, blobs: &config.repo_blob_url, targets, cache: &cache };
    let open = |(number, lower)| place.open_lower(number, lower);
    let layers = config.lowers.iter().enumerate().map(open).collect::<Result<_, _>>()?;
    let disk = Disk::new(layers, cache)?;
    let (trace, record) = match trace_file {
        Some(path) => read_trace(&disk, path),
        None => (None, None),
    };
    Ok(OpenedConfig { disk, trace, record })
}

/// Writes into the `resultFile` of the configuration at `path`, if it names one, how the device was come by:
/// `success`, or `failed:` and the reason. That is how upstream's snapshotter learns it.
pub fn tell_result(path: &Path, outcome: Result<(), &str>) {
    let folder = path.parent().unwrap_or(Path::new("."));
    let text = fs::read_to_string(path).unwrap_or_default();
    let named = serde_json::from_str::<Value>(&text).ok();
    let named = named.as_ref().and_then(|config| config.get("resultFile")?.as_str());
    let Some(name) = named.filter(|name| !name.is_empty()) else { return };
    let result = match outcome {
        Ok(()) => "success".to_owned(),
        Err(reason) => format!("failed:{reason}"),
    };
    if let Err(error) = fs::write(folder.join(name), result) {
        tracing::warn!(%error, "The result file {name} of {} cannot be written", path.display());
    }
}

/// Where a trace may be: in the last lower, which is then no layer, or at a path of its own.
fn trace_file(config: &mut Config, folder: &Path) -> Option<PathBuf> {
    if config.acceleration_layer {
        return config.lowers.pop().map(|lower| folder.join(lower.dir).join("trace"));
    }
    let path = &config.record_trace_path;
    (!path.is_empty()).then(|| folder.join(path))
}

/// A trace that was recorded, a list of files, or the empty file into which a trace is to be. A trace is
/// advice: whatever is wrong with it, the image starts as it would without.
fn read_trace(disk: &Disk, path: PathBuf) -> (Option<Trace>, Option<PathBuf>) {
    match fs::read(&path) {
        Err(_) => (None, None),
        Ok(bytes) if bytes.is_empty() => (None, Some(path)),
        Ok(bytes) => match disk.trace_in(&bytes) {
            Ok(trace) => (Some(trace), None),
            Err(error) => {
                let error: &dyn std::error::Error = &error;
                tracing::warn!(error, "The trace {} is passed over", path.display());
                (None, None)
            }
        },
    }
}

/// The first of the places where upstream looks for a layer that exists; else those places.
fn local_file(lower: &Lower, folder: &Path) -> Result<PathBuf, Vec<PathBuf>> {
    let mut candidates = Vec::new();
    if !lower.file.is_empty() {
        candidates.push(folder.join(&lower.file));
    }
    // Upstream looks in the root directory when `dir` is empty: not imitated.
    if !lower.dir.is_empty() {
        let names = ["overlaybd.commit", ".commit", "overlaybd.sealed"];
        candidates.extend(names.map(|name| folder.join(&lower.dir).join(name)));
    }
    candidates.iter().find(|path| path.exists()).cloned().ok_or(candidates)
}

/// A name for the content of a local file: another file, or the same one changed, has another.
fn identity(path: &Path) -> Result<String, DiskError> {
    let meta = fs::metadata(path).map_err(|source| DiskError::Io {
        name: path.display().to_string(),
        source: Arc::new(source),
    })?;
    let (dev, ino, len) = (meta.dev(), meta.ino(), meta.len());
    Ok(format!("{}:{dev:x}:{ino:x}:{len}:{}.{}", path.display(), meta.mtime(), meta.mtime_nsec()))
}

/// A whole file in memory.
fn read_file(path: &Path) -> Result<Vec<u8>, DiskError> {
    let name = || path.display().to_string();
    let source = FileSource::open(path)?;
    if source.len() > MAX_INDEX {
        let error = std::io::Error::from(std::io::ErrorKind::FileTooLarge);
        return Err(DiskError::Io { name: name(), source: Arc::new(error) });
    }
    fs::read(path).map_err(|source| DiskError::Io { name: name(), source: Arc::new(source) })
}

/// Where the files and blobs of a configuration are.
struct Place<'a> {
    file: &'a str,
    folder: &'a Path,
    blobs: &'a str,
    targets: &'a dyn TargetOpener,
    cache: &'a Cache,
}

/// A file or a blob, and what a cache knows it as.
type Named = (Arc<dyn ByteSource>, String);

impl Place<'_> {
    fn open_lower(&self, number: usize, lower: &Lower) -> Result<DiskLayer, DiskError> {
        let (source, id) = match local_file(lower, self.folder) {
            Ok(path) => {
                (Arc::new(FileSource::open(&path)?) as Arc<dyn ByteSource>, identity(&path)?)
            }
            Err(tried) => self.remote_layer(number, lower, &tried)?,
        };
        let name = source.name().to_owned();
        let payload = zfile::open(source)?;
        if lower.target_file.is_empty() && lower.target_digest.is_empty() {
            let index = Layer::open(&*payload.source(), LayerKind::Plain)?;
            return Ok(DiskLayer {
                index,
                data: LayerData::Native { chunks: payload.chunks(&id) },
            });
        }
        // Devices of one file have its metadata once.
        let meta: SharedBytes = Arc::new(payload.read_resident()?);
        let meta = self.cache.residents().share(&id, meta);
        let index = Layer::open(&MemorySource::shared(name, meta.clone()), LayerKind::Warp)?;
        let target = self.open_target(number, lower)?;
        Ok(DiskLayer { index, data: LayerData::Turbo { meta, target: Some(target) } })
    }

    /// A layer that is nowhere on this host.
    fn remote_layer(
        &self,
        number: usize,
        lower: &Lower,
        tried: &[PathBuf],
    ) -> Result<Named, DiskError> {
        let tried: Vec<_> = tried.iter().map(|path| path.display().to_string()).collect();
        if lower.digest.is_empty() {
            let rule = if tried.is_empty() {
                "it names neither file, dir nor digest".to_owned()
            } else {
                format!("none of its local files exists: {}", tried.join(", "))
            };
            return Err(DiskError::Layer { layer: number, name: lower.file.clone(), rule });
        }
        let size = (lower.size > 0).then_some(lower.size);
        self.remote(number, "digest", &lower.digest, size)
    }

    fn remote(
        &self,
        number: usize,
        key: &str,
        digest: &str,
        size: Option<u64>,
    ) -> Result<Named, DiskError> {
        let invalid =
            |key: String, rule: String| DiskError::Config { file: self.file.to_owned(), key, rule };
        let parsed: Digest = digest
            .parse()
            .map_err(|error| invalid(format!("lowers[{number}].{key}"), format!("{error}")))?;
        if self.blobs.is_empty() {
            let rule =
                format!("{digest} is not on this host, and nothing says which registry has it");
            return Err(invalid("repoBlobUrl".to_owned(), rule));
        }
        Ok((self.targets.open_remote(self.blobs, &parsed, size)?, digest.to_owned()))
    }

    fn open_target(&self, number: usize, lower: &Lower) -> Result<Arc<dyn ChunkSource>, DiskError> {
        let (blob, id) = if lower.target_file.is_empty() {
            self.remote(number, "targetDigest", &lower.target_digest, None)?
        } else {
            let path = self.folder.join(&lower.target_file);
            (Arc::new(FileSource::open(&path)?) as Arc<dyn ByteSource>, identity(&path)?)
        };
        if lower.gzip_index.is_empty() && lower.gzip_sidecar.is_empty() {
            self.check_plain(number, lower, &*blob)?;
            return Ok(Arc::new(PlainChunks::new(format!("plain:{id}"), blob)));
        }
        let read = |path: &Path| read_file(path).map(Some);
        let index = match lower.gzip_index.as_str() {
            "" => None,
            name => Some(self.folder.join(name)),
        };
        // The snapshotter unpacks the layer archive into one folder and knows of gzip.meta alone.
        let beside = index.as_ref().map(|path| path.with_file_name(SIDECAR_NAME));
        let sidecar = match lower.gzip_sidecar.as_str() {
            "" => beside.filter(|path| path.exists()),
            name => Some(self.folder.join(name)),
        };
        // A layer of many gzip members has no gzip.meta; then the sidecar holds it all.
        let index = index.filter(|path| sidecar.is_none() || path.exists());
        let index = index.map_or(Ok(None), |path| read(&path))?;
        let sidecar = sidecar.map_or(Ok(None), |path| read(&path))?;
        let digest = Some(lower.target_digest.as_str()).filter(|digest| !digest.is_empty());
        self.targets.open_indexed(blob, index, sidecar, digest)
    }

    /// Refuses a compressed local file that is given for a plain tar: its bytes would be served as data.
    fn check_plain(
        &self,
        number: usize,
        lower: &Lower,
        blob: &dyn ByteSource,
    ) -> Result<(), DiskError> {
        if !blob.is_local() || blob.len() < 4 {
            return Ok(());
        }
        let mut magic = [0; 4];
        blob.read_exact_at(&mut magic, 0)?;
        let rule = match magic {
            [0x1f, 0x8b, ..] => "its target is a gzip file, and there is no gzipIndex",
            _ if zstandard::is_zstd(&magic) => {
                "its target is a zstd file, and there is no gzipSidecar that says where its frames are"
            }
            _ => return Ok(()),
        };
        let (layer, name, rule) = (number, lower.target_file.clone(), rule.to_owned());
        Err(DiskError::Layer { layer, name, rule })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_type_is_an_error_that_names_the_key_and_an_unknown_key_is_none() {
        let parse = |text| Config::parse(text, "c.json");
        let config = parse(
            r#"{"lowers": [{"file": "a", "size": 5, "new": 1}], "upper": {"vsize": 64}, "x": []}"#,
        );
        assert_eq!(
            config.unwrap().lowers,
            [Lower { file: "a".into(), size: 5, ..Lower::default() }]
        );
        let cases = [
            (
                r#"{"lowers": [{}, {"size": "5"}]}"#,
                "Key lowers[1].size of c.json is invalid: it must be a whole number, not a string",
            ),
            (
                r#"{"lowers": [7]}"#,
                "Key lowers[0] of c.json is invalid: it must be an object, not a number",
            ),
            (
                r#"{"lowers": {}}"#,
                "Key lowers of c.json is invalid: it must be an array, not an object",
            ),
            (
                r#"{"upper": {"data": null}}"#,
                "Key upper.data of c.json is invalid: it must be a string, not null",
            ),
            (
                r#"{"accelerationLayer": 1}"#,
                "Key accelerationLayer of c.json is invalid: it must be true or false, not a number",
            ),
            ("[]", "Key (all) of c.json is invalid: it must be an object"),
        ];
        for (text, message) in cases {
            assert_eq!(parse(text).unwrap_err().to_string(), message);
        }
        assert!(parse("{").is_err());
    }

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
        use crate::lsmt::{Identity, NativeWriter, WarpWriter};
        use crate::units::{Bytes, Sectors};
        use crate::volume::Volume as _;

        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, bytes: &[u8]| {
            let path = folder.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, bytes).unwrap();
        };
        let native = |byte: u8| {
            let mut writer =
                NativeWriter::new(Vec::new(), Bytes(1 << 20), Identity::default()).unwrap();
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
