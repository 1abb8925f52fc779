//! The read-only layers: local files, or else blobs of the registry.

use std::cell::RefCell;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::{LowerConfig, TargetOpener};
use crate::resident::read_within;
use crate::{DiskError, DiskLayer, LayerData};
use blobs::cache::Cache;
use formats::gzip::SIDECAR_NAME;
use formats::lsmt::{LsmtLayer, TagMeaning};
use formats::oci::Digest;
use formats::{archive, zfile, zstandard};
use source::chunk::{ChunkSource, PlainChunks};
use source::{ByteSource, FileSource, MemorySource, Reserved};

/// Largest `gzip.meta` or sidecar that is read into memory, in bytes. Upstream's take 4 % of a layer, this
/// program's less than 1 %: the limit suffices for a layer of hundreds of GB.
const MAX_INDEX: u64 = 8 << 30;

/// The first existing file of the places where upstream looks for a layer; otherwise all those places.
fn local_file(lower: &LowerConfig, folder: &Path) -> Result<PathBuf, Vec<PathBuf>> {
    let mut candidates = Vec::new();
    if !lower.file.is_empty() {
        candidates.push(folder.join(&lower.file));
    }
    // If `dir` is empty, upstream looks in the root directory; this is not imitated.
    if !lower.dir.is_empty() {
        let names = ["overlaybd.commit", ".commit", "overlaybd.sealed"];
        candidates.extend(names.map(|name| folder.join(&lower.dir).join(name)));
    }
    candidates.iter().find(|path| path.exists()).cloned().ok_or(candidates)
}

/// Identity of a local file's content: another file, or the same one changed, has another identity.
pub(super) fn identity(path: &Path) -> Result<String, DiskError> {
    let meta = fs::metadata(path).map_err(|source| DiskError::Io {
        name: path.display().to_string(),
        source: Arc::new(source),
    })?;
    Ok(source::file_state(path, &meta))
}

/// Reads a whole file into memory.
fn read_file(path: &Path, part: &mut Reserved) -> Result<Vec<u8>, DiskError> {
    let name = || path.display().to_string();
    let source = FileSource::open(path)?;
    if source.len() > MAX_INDEX {
        let error = std::io::Error::from(std::io::ErrorKind::FileTooLarge);
        return Err(DiskError::Io { name: name(), source: Arc::new(error) });
    }
    part.add(source.len(), &name())?;
    fs::read(path).map_err(|source| DiskError::Io { name: name(), source: Arc::new(source) })
}

/// Base of the files and blobs of a configuration.
pub(super) struct LowersBase<'a> {
    pub(super) file: &'a str,
    pub(super) folder: &'a Path,
    pub(super) blobs: &'a str,
    pub(super) targets: &'a dyn TargetOpener,
    pub(super) cache: &'a Cache,
    /// Memory of the indexes, in the budget of images.
    pub(super) reserved: RefCell<Vec<Reserved>>,
}

/// A file or a blob, and its name in the cache.
type NamedBytes = (Arc<dyn ByteSource>, String);

impl LowersBase<'_> {
    pub(super) fn open_lower(
        &self,
        number: usize,
        lower: &LowerConfig,
    ) -> Result<DiskLayer, DiskError> {
        let (source, id) = match local_file(lower, self.folder) {
            Ok(path) => {
                (Arc::new(FileSource::open(&path)?) as Arc<dyn ByteSource>, identity(&path)?)
            }
            Err(tried) => self.remote_layer(number, lower, &tried)?,
        };
        let (name, is_local) = (source.name().to_owned(), source.is_local());
        let budget = self.cache.residents().budget();
        let mut part = budget.part();
        let payload = zfile::open_within(source, &mut part)?;
        if lower.target_file.is_empty() && lower.target_digest.is_empty() {
            let index = LsmtLayer::open_within(&*payload.source(), TagMeaning::Plain, &mut part)?;
            self.reserved.borrow_mut().push(part);
            return Ok(DiskLayer {
                index,
                data: LayerData::Native { chunks: payload.chunks(&id) },
            });
        }
        // Devices of one file share its metadata. A blob was not verified by its digest: its metadata is its name.
        let meta = read_within(&payload, budget, &name)?;
        let shared = if is_local { id } else { Digest::of(meta.bytes()).to_string() };
        let meta = self.cache.residents().share(&shared, meta);
        let source = MemorySource::shared(name, meta.clone());
        let index = LsmtLayer::open_within(&source, TagMeaning::Warp, &mut part)?;
        let target = self.open_target(number, lower, &mut part)?;
        self.reserved.borrow_mut().push(part);
        Ok(DiskLayer { index, data: LayerData::Turbo { meta, target: Some(target) } })
    }

    /// A layer without a local file.
    fn remote_layer(
        &self,
        number: usize,
        lower: &LowerConfig,
        tried: &[PathBuf],
    ) -> Result<NamedBytes, DiskError> {
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
    ) -> Result<NamedBytes, DiskError> {
        let invalid =
            |key: String, rule: String| DiskError::Config { file: self.file.to_owned(), key, rule };
        let parsed: Digest = digest
            .parse()
            .map_err(|error| invalid(format!("lowers[{number}].{key}"), format!("{error}")))?;
        if self.blobs.is_empty() {
            let rule = format!("{digest} is not on this host, and no registry is given for it");
            return Err(invalid("repoBlobUrl".to_owned(), rule));
        }
        Ok((self.targets.open_remote(self.blobs, &parsed, size)?, digest.to_owned()))
    }

    fn open_target(
        &self,
        number: usize,
        lower: &LowerConfig,
        part: &mut Reserved,
    ) -> Result<Arc<dyn ChunkSource>, DiskError> {
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
        let mut read = |path: &Path| read_file(path, part).map(Some);
        let index = match lower.gzip_index.as_str() {
            "" => None,
            name => Some(self.folder.join(name)),
        };
        // The snapshotter unpacks the layer archive into one folder and knows only gzip.meta.
        let beside = index.as_ref().map(|path| path.with_file_name(SIDECAR_NAME));
        let sidecar = match lower.gzip_sidecar.as_str() {
            "" => beside.filter(|path| path.exists()),
            name => Some(self.folder.join(name)),
        };
        // A layer of many gzip members has no gzip.meta; then the sidecar has the whole index.
        let index = index.filter(|path| sidecar.is_none() || path.exists());
        let index = index.map_or(Ok(None), |path| read(&path))?;
        let sidecar = sidecar.map_or(Ok(None), |path| read(&path))?;
        part.add(
            archive::index_memory(index.as_deref(), sidecar.as_deref()),
            "The index of a layer",
        )?;
        let digest = Some(lower.target_digest.as_str()).filter(|digest| !digest.is_empty());
        self.targets.open_indexed(blob, index, sidecar, digest)
    }

    /// Refuses a compressed local file in place of a plain tar: its bytes would be served as data.
    fn check_plain(
        &self,
        number: usize,
        lower: &LowerConfig,
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
                "its target is a zstd file, and there is no gzipSidecar with the positions of its frames"
            }
            _ => return Ok(()),
        };
        let (layer, name, rule) = (number, lower.target_file.clone(), rule.to_owned());
        Err(DiskError::Layer { layer, name, rule })
    }
}
