//! Opens a converted image in a store: its layers, ready to be stacked.
//!
//! A `TurboOCI` layer is small: its archive is read whole, checked against its digest and unpacked in memory;
//! the original blob is only opened, not read. A native layer is read by range in its place. The annotations
//! are checked against the bytes: the index must match the length of the target blob, and the sidecar must
//! name its digest.

use std::io::Read as _;
use std::ops::Range;
use std::sync::Arc;

use thiserror::Error;

use super::config::TargetOpener;
use super::{Disk, DiskError, DiskLayer, LayerData};
use crate::resident::read_within;
use blobs::cache::Cache;
use blobs::identity::Verification;
use blobs::trace;
use formats::archive::{self, EROFS_META_NAME, FS_META_NAME};
use formats::gzip::{self, GZIP_META_NAME, GzipError, IndexedLayer, SIDECAR_NAME};
use formats::lsmt::{self, TagMeaning};
use formats::oci::annotations::{AnnotationError, LayerKind as AnnotatedKind, split_acceleration};
use formats::oci::{Descriptor, Digest, Document, ImageIndex, Manifest, ManifestError, Platform};
use formats::segments::{self, Encoding, SegmentIndex, SegmentedLayer, SegmentsError};
use formats::tar;
use formats::trace::Trace;
use formats::zfile;
use registry::store::{ImageStore, Selector, StoreError, StoredManifest};
use source::chunk::{ChunkSource, PlainChunks};
use source::{ByteSource, MemoryBudget, MemorySource, OverBudget, Reserved};

/// Most bytes that a layer archive may unpack to, 4 GiB: the metadata of a layer of some 400 GB.
const MAX_ARCHIVE: u64 = 4 << 30;

/// Bytes of an archive that are unpacked at once.
const UNPACKED_AT_ONCE: usize = 256 << 10;

/// Error of opening an image in a store.
#[derive(Debug, Error)]
pub enum ImageError {
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A manifest or index is invalid, or has no image for this host.
    #[error("Cannot use manifest {digest} of {store}")]
    Document {
        /// The store's name.
        store: String,
        /// Its digest.
        digest: Digest,
        /// The fault.
        #[source]
        source: ManifestError,
    },
    /// The layers do not form a disk.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// One layer cannot be opened.
    #[error("Layer {number} ({digest})")]
    Layer {
        /// Position, 0 lowest.
        number: usize,
        /// The layer blob.
        digest: Digest,
        /// The fault.
        #[source]
        source: Box<OpenLayerError>,
    },
}

/// Error of opening a layer.
#[derive(Debug, Error)]
pub enum OpenLayerError {
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The annotations contradict each other.
    #[error(transparent)]
    Annotation(#[from] AnnotationError),
    /// An ordinary layer.
    #[error(
        "This is a plain OCI layer without a meta image: build one with `turbobd convert`, then attach that"
    )]
    NotConverted,
    /// The layer archive is not gzip.
    #[error("The layer archive cannot be unpacked")]
    Archive(#[source] std::io::Error),
    /// The layer archive unpacks to more than the limit.
    #[error("The layer archive unpacks to more than {MAX_ARCHIVE} bytes")]
    ArchiveTooLarge,
    /// The layer does not fit the budget of memory.
    #[error(transparent)]
    Budget(#[from] OverBudget),
    /// The layer archive is not a tar.
    #[error(transparent)]
    Members(#[from] tar::archive::ArchiveError),
    /// The layer archive has no filesystem metadata.
    #[error("The layer archive has no {wanted}, only {found}")]
    NoFsMeta {
        /// The expected member.
        wanted: &'static str,
        /// Names of its members.
        found: String,
    },
    /// The sidecar describes another blob.
    #[error("The index belongs to another layer: it describes {layer}, but the target is {target}")]
    OtherTarget {
        /// The layer named by the sidecar.
        layer: Digest,
        /// The target named by the annotation.
        target: Digest,
    },
    /// The gzip index is invalid or belongs to another blob.
    #[error(transparent)]
    Gzip(#[from] GzipError),
    /// The index of a layer that is not gzip is invalid or belongs to another blob.
    #[error(transparent)]
    Segments(#[from] SegmentsError),
    /// The index and the annotations contradict each other.
    #[error(
        "The index says that the target is {encoding}, and the annotations say that it is {annotated}"
    )]
    OtherEncoding {
        /// In the index.
        encoding: &'static str,
        /// In the annotations.
        annotated: &'static str,
    },
    /// The `ZFile` is invalid.
    #[error(transparent)]
    ZFile(#[from] zfile::ZFileError),
    /// The LSMT layer is invalid.
    #[error(transparent)]
    Lsmt(#[from] lsmt::LsmtError),
    /// The trace is invalid.
    #[error(transparent)]
    Trace(#[from] formats::trace::TraceError),
}

/// An image opened for reading.
pub struct OpenedImage {
    /// Description of each layer, bottom first.
    pub layers: Vec<LayerInfo>,
    /// The virtual disk.
    pub disk: Disk,
    /// The trace of the image, if it has one.
    pub trace: Option<Trace>,
}

/// Description of a layer, for people and for `--json`. Sizes in bytes.
#[derive(Clone, Debug, serde::Serialize)]
pub struct LayerInfo {
    /// `turbo` or `native`.
    pub kind: &'static str,
    /// The layer blob.
    pub digest: String,
    /// Its size.
    pub size: u64,
    /// The original layer, if there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub target: Option<TargetInfo>,
    /// Mappings in the layer's index.
    pub mappings: usize,
    /// What verifies its file data. Its own metadata, in a `turbo` layer, is verified by its digest.
    #[serde(flatten)]
    pub data: Verification,
}

/// The original layer of a `TurboOCI` layer.
#[derive(Clone, Debug, serde::Serialize)]
pub struct TargetInfo {
    /// The original blob.
    pub digest: String,
    /// Its size.
    pub size: u64,
    /// Its size uncompressed.
    pub uncompressed: u64,
    /// Size of the filesystem metadata in the layer archive.
    pub fs_meta: u64,
    /// Size of upstream's gzip index in the layer archive.
    pub gzip_meta: u64,
    /// Size of the sidecar in the layer archive.
    pub sidecar: u64,
    /// Target length of segments; 0 for an uncompressed layer without an index.
    pub span: u64,
    /// Number of segments.
    pub segments: u32,
    /// True if every segment can be verified before it is used.
    pub verified: bool,
    /// Encoding: `gzip`, `zstd` or `tar`.
    pub encoding: &'static str,
    /// Output of its longest zstd frame that must be decoded from its beginning; 0 if there is none.
    pub longest_frame: u64,
}

/// The manifest of an image for this host.
pub struct HostManifest {
    /// The manifest as stored.
    pub stored: StoredManifest,
    /// The parsed manifest.
    pub manifest: Manifest,
    /// The index from which it was chosen, if any.
    pub index: Option<ImageIndex>,
    /// Digests of the indexes on the way to it: the named one first, the one from which it was chosen last.
    pub indexes: Vec<Digest>,
}

/// The manifest of an image for this host, chosen from an index if needed.
///
/// # Errors
/// [`ImageError`] if the index has no such platform; the message lists its platforms.
pub fn choose_manifest(
    store: &dyn ImageStore,
    selector: &Selector,
) -> Result<HostManifest, ImageError> {
    let mut stored = store.manifest(selector)?;
    let mut chosen_from = None;
    let mut indexes = Vec::new();
    loop {
        let document = |source| ImageError::Document {
            store: store.name().to_owned(),
            digest: stored.digest,
            source,
        };
        match Document::parse(&stored.bytes, Some(&stored.media_type)).map_err(document)? {
            Document::Manifest(manifest) => {
                return Ok(HostManifest { stored, manifest, index: chosen_from, indexes });
            }
            Document::Index(index) => {
                let digest = index.select(&Platform::host()).map_err(document)?.digest;
                indexes.push(stored.digest);
                stored = store.manifest(&Selector::Digest(digest))?;
                chosen_from = Some(index);
            }
        }
    }
}

/// The manifest of an image for this host, without the index.
///
/// # Errors
/// The errors of [`choose_manifest`].
pub fn host_manifest(
    store: &dyn ImageStore,
    selector: &Selector,
) -> Result<(StoredManifest, Manifest), ImageError> {
    choose_manifest(store, selector).map(|chosen| (chosen.stored, chosen.manifest))
}

/// Opens the image of `manifest`, with its layers in `store`. `targets` has the original blobs; it is the
/// same store unless the meta image was written elsewhere.
///
/// # Errors
/// [`ImageError`] with the layer and the fault.
pub fn open_image(
    store: &dyn ImageStore,
    targets: &dyn ImageStore,
    manifest: &Manifest,
    cache: Arc<Cache>,
) -> Result<OpenedImage, ImageError> {
    let (acceleration, layers) = split_acceleration(&manifest.layers);
    let mut opened = open_layers(layers.iter().map(|layer| (store, layer)), targets, cache)?;
    // A trace is advice: with an invalid one, the image starts as without one.
    opened.trace = acceleration.and_then(|layer| {
        read_trace(store, layer, opened.disk.cache().residents().budget())
            .inspect_err(|error| {
                tracing::warn!(layer = %layer.digest, error = %error, "The trace of the image is ignored");
            })
            .ok()
            .map(|reads| opened.disk.trace_of(&reads))
    });
    Ok(opened)
}

/// Opens converted layers, lowest first, each from the store with its blob; none of them may be a trace.
///
/// # Errors
/// The errors of [`open_image`].
pub fn open_layers<'l>(
    stack: impl IntoIterator<Item = (&'l dyn ImageStore, &'l Descriptor)>,
    targets: &dyn ImageStore,
    cache: Arc<Cache>,
) -> Result<OpenedImage, ImageError> {
    let mut layers = Vec::new();
    let mut infos = Vec::new();
    let mut filesystem = None;
    let budget = cache.residents().budget().clone();
    let mut reserved = Vec::new();
    for (number, (store, descriptor)) in stack.into_iter().enumerate() {
        let in_layer = |error| ImageError::Layer {
            number,
            digest: descriptor.digest,
            source: Box::new(error),
        };
        let mut memory = LayerMemory { budget: &budget, index: budget.part() };
        let (mut layer, info) =
            open_layer(store, targets, descriptor, &mut filesystem, &mut memory)
                .map_err(in_layer)?;
        reserved.push(memory.index);
        if let LayerData::Turbo { meta, .. } = &mut layer.data {
            // Images with a common layer share its metadata: its archive was verified by this digest. An archive may
            // have the metadata of several filesystems.
            let name = format!("{} {}", descriptor.digest, filesystem.unwrap_or_default());
            *meta = cache.residents().share(&name, meta.clone());
        }
        layers.push(layer);
        infos.push(info);
    }
    Ok(OpenedImage {
        layers: infos,
        disk: Disk::with_reserved(layers, cache, reserved)?,
        trace: None,
    })
}

/// The memory of a layer that is being opened.
struct LayerMemory<'a> {
    budget: &'a MemoryBudget,
    /// The part that its indexes take as long as the image is open.
    index: Reserved,
}

/// Reads upstream's acceleration layer: an archive with a trace in it.
fn read_trace(
    store: &dyn ImageStore,
    layer: &Descriptor,
    budget: &MemoryBudget,
) -> Result<Vec<trace::upstream::LayerRead>, OpenLayerError> {
    let what = "The trace of the image";
    let mut part = budget.reserve(layer.size, what)?;
    let members = Members::unpack(&store.read_blob(layer)?, &mut part, what)?;
    let bytes = members.get("trace").or_else(|| members.get("./trace"));
    Ok(trace::upstream::parse(bytes.unwrap_or_default())?)
}

fn open_layer(
    store: &dyn ImageStore,
    targets: &dyn ImageStore,
    descriptor: &Descriptor,
    filesystem: &mut Option<&'static str>,
    memory: &mut LayerMemory<'_>,
) -> Result<(DiskLayer, LayerInfo), OpenLayerError> {
    match AnnotatedKind::of(descriptor)? {
        AnnotatedKind::Turbo { target, is_gzip, .. } => {
            open_turbo(store, targets, descriptor, (&target, is_gzip), filesystem, memory)
        }
        AnnotatedKind::Native => open_native(store, descriptor, &mut memory.index),
        AnnotatedKind::Plain => Err(OpenLayerError::NotConverted),
    }
}

fn open_native(
    store: &dyn ImageStore,
    descriptor: &Descriptor,
    part: &mut Reserved,
) -> Result<(DiskLayer, LayerInfo), OpenLayerError> {
    let blob = store.blob_source(&descriptor.digest, Some(descriptor.size))?;
    let payload = zfile::open_within(blob, part)?;
    let index = lsmt::LsmtLayer::open_within(&*payload.source(), TagMeaning::Plain, part)?;
    let chunks = payload.chunks(&descriptor.digest.to_string());
    let data = Verification::of(&*chunks);
    let info = LayerInfo {
        data,
        kind: "native",
        digest: descriptor.digest.to_string(),
        size: descriptor.size,
        target: None,
        mappings: index.mappings().len(),
    };
    Ok((DiskLayer { index, data: LayerData::Native { chunks } }, info))
}

/// The identity of a native layer.
///
/// # Errors
/// [`ImageError`] with the layer as number 0.
pub fn native_identity(
    store: &dyn ImageStore,
    descriptor: &Descriptor,
) -> Result<lsmt::Uuid, ImageError> {
    let mut part = Reserved::unbounded();
    let (layer, _) = open_native(store, descriptor, &mut part).map_err(|error| {
        ImageError::Layer { number: 0, digest: descriptor.digest, source: Box::new(error) }
    })?;
    Ok(layer.index.trailer().uuid)
}

fn open_turbo(
    store: &dyn ImageStore,
    targets: &dyn ImageStore,
    descriptor: &Descriptor,
    (target, is_gzip): (&Digest, bool),
    filesystem: &mut Option<&'static str>,
    LayerMemory { budget, index: part }: &mut LayerMemory<'_>,
) -> Result<(DiskLayer, LayerInfo), OpenLayerError> {
    let what = format!("The archive of layer {}", descriptor.digest);
    // Given back at the end: the archive is needed only until the layer is open.
    let mut opening = budget.reserve(descriptor.size, &what)?;
    let members = Members::unpack(&store.read_blob(descriptor)?, &mut opening, &what)?;
    let (gzip_meta, sidecar) = (members.get(GZIP_META_NAME), members.get(SIDECAR_NAME));
    part.add(
        archive::index_memory(gzip_meta, sidecar),
        &format!("The index of layer {}", descriptor.digest),
    )?;
    let fs_meta = members.fs_meta(filesystem)?;
    let (target_source, mut info) = open_target(&members, targets, target, is_gzip)?;
    let len = |name| members.get(name).map_or(0, |bytes| bytes.len() as u64);
    info.fs_meta = fs_meta.len() as u64;
    info.gzip_meta = len(GZIP_META_NAME);
    info.sidecar = len(SIDECAR_NAME);

    let name = format!("{} of {}", filesystem.unwrap_or(FS_META_NAME), descriptor.digest);
    opening.add(fs_meta.len() as u64, &name)?;
    let fs_meta = Arc::new(MemorySource::new(name.clone(), fs_meta));
    let meta = read_within(&zfile::open_within(fs_meta, &mut opening)?, budget, &name)?;
    let source = MemorySource::shared(name, meta.clone());
    let index = lsmt::LsmtLayer::open_within(&source, TagMeaning::Warp, part)?;
    let info = LayerInfo {
        data: Verification::of(&*target_source),
        kind: "turbo",
        digest: descriptor.digest.to_string(),
        size: descriptor.size,
        target: Some(info),
        mappings: index.mappings().len(),
    };
    Ok((DiskLayer { index, data: LayerData::Turbo { meta, target: Some(target_source) } }, info))
}

/// Opens the original layer with the index in the archive.
fn open_target(
    members: &Members,
    targets: &dyn ImageStore,
    target: &Digest,
    is_gzip: bool,
) -> Result<(Arc<dyn ChunkSource>, TargetInfo), OpenLayerError> {
    let other = |layer| OpenLayerError::OtherTarget { layer, target: *target };
    let sidecar = members.get(SIDECAR_NAME);
    if let Some(file) = sidecar.filter(|file| segments::sidecar::is_version_2(file)) {
        let index = segments::sidecar::read(file)?;
        if index.layer() != *target {
            return Err(other(index.layer()));
        }
        let encoding = index.scanned().encoding;
        // Every compressed layer is annotated as gzip, because of upstream.
        if is_gzip == (encoding == Encoding::Plain) {
            let annotated = if is_gzip { "gzip" } else { "tar" };
            return Err(OpenLayerError::OtherEncoding { encoding: encoding.name(), annotated });
        }
        let blob = targets.covered_source(target, index.scanned().compressed_len.get())?;
        let info = TargetInfo::segmented(target, &index);
        return Ok((Arc::new(SegmentedLayer::new(&target.to_string(), index, blob)?), info));
    }
    if !is_gzip {
        let blob = targets.blob_source(target, None)?;
        let info = TargetInfo::plain(target, blob.len());
        return Ok((Arc::new(PlainChunks::new(target.to_string(), blob)), info));
    }
    let index = gzip::merge(members.get(GZIP_META_NAME), sidecar)?;
    if let Some(layer) = index.layer.filter(|layer| layer != target) {
        return Err(other(layer));
    }
    let len = index.compressed_len.get();
    let blob = match index.sha256 {
        Some(_) => targets.covered_source(target, len)?,
        None => targets.blob_source(target, Some(len))?,
    };
    let info = TargetInfo::indexed(target, &index);
    Ok((Arc::new(IndexedLayer::new(&target.to_string(), index, blob)?), info))
}

impl TargetInfo {
    fn plain(digest: &Digest, size: u64) -> Self {
        Self {
            digest: digest.to_string(),
            size,
            uncompressed: size,
            fs_meta: 0,
            gzip_meta: 0,
            sidecar: 0,
            span: 0,
            segments: size.div_ceil(PlainChunks::CHUNK) as u32,
            verified: false,
            encoding: Encoding::Plain.name(),
            longest_frame: 0,
        }
    }

    fn segmented(digest: &Digest, index: &SegmentIndex) -> Self {
        let scanned = index.scanned();
        Self {
            size: scanned.compressed_len.get(),
            uncompressed: scanned.uncompressed_len.get(),
            span: scanned.span.get(),
            segments: scanned.segments.len() as u32,
            verified: true,
            encoding: scanned.encoding.name(),
            longest_frame: index.longest_serial().get(),
            ..Self::plain(digest, 0)
        }
    }

    fn indexed(digest: &Digest, index: &gzip::GzipIndex) -> Self {
        Self {
            size: index.compressed_len.get(),
            uncompressed: index.uncompressed_len.get(),
            span: index.span.get(),
            segments: index.segments() as u32,
            verified: index.sha256.is_some() && index.crc32.is_some(),
            encoding: "gzip",
            ..Self::plain(digest, 0)
        }
    }
}

/// The members of a layer archive, unpacked in memory.
struct Members {
    bytes: Vec<u8>,
    ranges: Vec<(String, Range<usize>)>,
}

impl Members {
    /// Unpacks an archive. Its bytes are added to `part` before they are taken; a member counts when its header is there.
    fn unpack(archive: &[u8], part: &mut Reserved, what: &str) -> Result<Self, OpenLayerError> {
        let before = part.bytes();
        let mut admit = |end: u64| -> Result<(), OpenLayerError> {
            if end > MAX_ARCHIVE {
                return Err(OpenLayerError::ArchiveTooLarge);
            }
            Ok(part.grow_to(before.saturating_add(end), what)?)
        };
        let mut bytes = Vec::new();
        if archive.starts_with(&[0x1f, 0x8b]) {
            let mut unpacked = flate2::read::MultiGzDecoder::new(archive);
            let mut members = tar::Parser::new();
            let mut piece = vec![0; UNPACKED_AT_ONCE];
            loop {
                let len = unpacked.read(&mut piece).map_err(OpenLayerError::Archive)?;
                if len == 0 {
                    break;
                }
                let mut end = (bytes.len() + len) as u64;
                // What is no tar is refused below, with its reason.
                let _ = members.feed(&piece[..len], &mut |event| -> Result<(), tar::TarError> {
                    if let tar::TarEvent::Entry(entry) = event {
                        end =
                            end.max(entry.data_offset.get().saturating_add(entry.stored_len.get()));
                    }
                    Ok(())
                });
                admit(end)?;
                bytes.extend_from_slice(&piece[..len]);
            }
        } else {
            admit(archive.len() as u64)?;
            bytes.extend_from_slice(archive);
        }
        let ranges = tar::archive::read_members(&bytes)?;
        Ok(Self { bytes, ranges })
    }

    fn get(&self, name: &str) -> Option<&[u8]> {
        let (_, range) = self.ranges.iter().find(|(member, _)| member == name)?;
        self.bytes.get(range.clone())
    }

    /// The filesystem metadata: of the same filesystem as in the layers below, otherwise ext4 before erofs.
    fn fs_meta(&self, below: &mut Option<&'static str>) -> Result<&[u8], OpenLayerError> {
        let lacks = |wanted| {
            let names: Vec<&str> = self.ranges.iter().map(|(name, _)| name.as_str()).collect();
            OpenLayerError::NoFsMeta { wanted, found: names.join(", ") }
        };
        let there =
            [FS_META_NAME, EROFS_META_NAME].into_iter().find(|name| self.get(name).is_some());
        let name = *below.get_or_insert(there.unwrap_or(FS_META_NAME));
        self.get(name).ok_or_else(|| lacks(name))
    }
}

/// Opens the targets with an index that upstream's device configuration names.
pub struct IndexedTargets;

impl TargetOpener for IndexedTargets {
    fn open_indexed(
        &self,
        blob: Arc<dyn ByteSource>,
        index: Option<Vec<u8>>,
        sidecar: Option<Vec<u8>>,
        digest: Option<&str>,
    ) -> Result<Arc<dyn ChunkSource>, DiskError> {
        let name = digest.unwrap_or_else(|| blob.name()).to_owned();
        let target = digest.and_then(|digest| digest.parse::<Digest>().ok());
        let open = || -> Result<Arc<dyn ChunkSource>, OpenLayerError> {
            let check = |layer: Digest| match target {
                Some(target) if target != layer => {
                    Err(OpenLayerError::OtherTarget { layer, target })
                }
                _ => Ok(()),
            };
            if let Some(file) =
                sidecar.as_ref().filter(|file| segments::sidecar::is_version_2(file))
            {
                let index = segments::sidecar::read(file)?;
                check(index.layer())?;
                return Ok(Arc::new(SegmentedLayer::new(&name, index, blob.clone())?));
            }
            let index = gzip::merge(index.as_deref(), sidecar.as_deref())?;
            index.layer.map_or(Ok(()), check)?;
            Ok(Arc::new(IndexedLayer::new(&name, index, blob.clone())?))
        };
        open().map_err(|error| DiskError::Target { name: name.clone(), source: Arc::new(error) })
    }
}
