//! An opened image: a stack of layers that finds the position of each byte.
//!
//! A [`Disk`] finds for every sector the layer that it comes from ([`lsmt::Stack`]), and for every layer the
//! position of its bytes ([`LayerData`]): filesystem metadata of a TurboOCI layer in memory, file data in
//! chunks of the original layer blob, native layers in chunks of themselves. A request is cut along both.
//! Parts in memory or in the cache become a [`Piece`] without a copy. If any part is missing, *all* missing
//! chunks are requested at once, and the caller is woken when the last has arrived: one round trip to the
//! registry instead of one per chunk.
//!
//! The caller then repeats the request. By then a small cache may have evicted the chunks in favour of
//! others. So the chunks of a woken request are kept for it (`leases`): every request ends, however small the
//! budget.
//!
//! Upstream answers a read past the end of a layer's target (the original blob that its mappings point into) with zeros, so a disk with a
//! truncated or wrong target mounts and shows zeros. Here a mapping may exceed the target only by the padding of its last block;
//! any other excess is refused when the disk is opened.
//!
//! Contents: [`image`] a converted image in a store, [`config`] upstream's device configuration, [`digest`]
//! the content of a disk, independent of its storage, [`scan`] reading all of it, [`explain`] the origin of a
//! byte, for people, [`upper`] a writable layer on top of a disk, [`writable`] the files of such a layer,
//! [`volume`] the one trait between a disk and a front end, [`resident`] metadata in memory, `listed` a list of
//! files as a trace, `testing` doubles, by the feature of that name.
//!
//! ```
//! use formats::lsmt::LayerIdentity;
//! use formats::units::Bytes;
//! use turbobd_disk::writable::{WritableFiles, WritableLayer};
//! let dir = tempfile::tempdir()?;
//! let files = WritableFiles::in_dir(dir.path());
//! let layer = WritableLayer::create(&files, Bytes(1 << 20), LayerIdentity::default())?;
//! assert_eq!(layer.virtual_size(), Bytes(1 << 20));
//! drop(layer); // it is locked while it is open
//! assert!(WritableLayer::open(&files).is_ok());
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

pub mod config;
pub mod digest;
pub mod explain;
mod gather;
pub mod image;
mod leases;
mod listed;
pub mod range;
pub mod resident;
pub mod scan;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
pub mod upper;
pub mod volume;
pub mod writable;

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, OnceLock};

pub use range::DiskRange;
use thiserror::Error;

use crate::volume::{Located, Piece, Volume, VolumeError, Waiter};
use blobs::cache::{Cache, ChunkBatch, Lookup};
use blobs::fetch::Blob;
use blobs::trace::{self, Recorders};
use formats::lsmt::{self, LsmtError, Mapping, RunPlace, Stack, TagMeaning, Uuid};
use formats::trace::Trace;
use formats::units::{SECTOR, Sectors};
use formats::zfile::ZFileError;
use gather::Gather;
use leases::Leases;
use source::chunk::{ChunkBytes, ChunkError, ChunkSource, ChunkSpan};
use source::{OverBudget, Reserved, SharedBytes, SourceError};

/// Error of opening an image.
#[derive(Clone, Debug, Error)]
pub enum DiskError {
    /// A layer's index, or the stack of layers, is invalid.
    #[error(transparent)]
    Lsmt(#[from] LsmtError),
    /// The layers do not fit the budget of memory.
    #[error(transparent)]
    Budget(#[from] OverBudget),
    /// A layer's container is invalid.
    #[error(transparent)]
    ZFile(#[from] ZFileError),
    /// Bytes could not be read.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// A mapping points past the end of its file.
    #[error("Layer {layer} ({name}) maps {mapping}, but {file} ends at byte {end}: {rule}")]
    PastTarget {
        /// The layer, 0 lowest.
        layer: usize,
        /// Its name.
        name: String,
        /// The mapping.
        mapping: Mapping,
        /// The file that it points into.
        file: String,
        /// Length of the file in bytes.
        end: u64,
        /// The broken rule.
        rule: &'static str,
    },
    /// The parts of a layer do not match.
    #[error("Layer {layer} ({name}) is incomplete: {rule}")]
    Layer {
        /// The layer, 0 lowest.
        layer: usize,
        /// Its name.
        name: String,
        /// The missing or wrong part.
        rule: String,
    },
    /// A mapping lies past the end of the disk.
    #[error("Layer {layer} ({name}) maps {mapping}, but the disk ends at byte {size}")]
    PastDisk {
        /// The layer, 0 lowest.
        layer: usize,
        /// Its name.
        name: String,
        /// The mapping.
        mapping: Mapping,
        /// The size of the disk, the largest in any layer, in bytes.
        size: u64,
    },
    /// The layers are not in the order in which they were made.
    #[error("Layer {layer} ({name}) is not in its place: {rule}")]
    Chain {
        /// The layer, 0 lowest.
        layer: usize,
        /// Its name.
        name: String,
        /// The layer named by its identity, and the layer below it.
        rule: String,
    },
    /// The device configuration breaks a rule.
    #[error("Key {key} of {file} is invalid: {rule}")]
    Config {
        /// The configuration file.
        file: String,
        /// Path of the key, like `lowers[2].size`.
        key: String,
        /// The broken rule, and the value found.
        rule: String,
    },
    /// The writable layer cannot be read.
    #[error("Cannot open the writable layer")]
    Upper(#[source] Arc<writable::WritableError>),
    /// The target of a layer cannot be opened; reported by a [`config::TargetOpener`].
    #[error("Cannot open the compressed layer {name}")]
    Target {
        /// The blob.
        name: String,
        /// The opener's reason.
        #[source]
        source: Arc<dyn std::error::Error + Send + Sync>,
    },
    /// A blob that is not on this host; reported by a [`config::TargetOpener`].
    #[error("Cannot reach the layer {name}")]
    Remote {
        /// The blob, and its expected place.
        name: String,
        /// The opener's reason.
        #[source]
        source: Arc<dyn std::error::Error + Send + Sync>,
    },
    /// A file could not be read or written.
    #[error("Cannot use {name}")]
    Io {
        /// The path.
        name: String,
        /// The system's reason.
        #[source]
        source: Arc<io::Error>,
    },
}

/// A layer of an image.
pub struct DiskLayer {
    /// Its mappings.
    pub index: lsmt::LsmtLayer,
    /// Position of its bytes.
    pub data: LayerData,
}

/// Position of a layer's bytes.
pub enum LayerData {
    /// TurboOCI.
    Turbo {
        /// The decoded LSMT stream, metadata payload included.
        meta: SharedBytes,
        /// The uncompressed tar of the original layer; may be absent if no mapping points to it.
        target: Option<Arc<dyn ChunkSource>>,
    },
    /// Native.
    Native {
        /// The decoded LSMT stream.
        chunks: Arc<dyn ChunkSource>,
    },
}

/// Largest number of bytes by which a mapping may exceed its target. Upstream maps a file's last sector, or
/// its last 4 KiB block in the erofs form, as a whole. A tar pads to 512 bytes and ends with zeros, but every
/// tar program also reads one that was cut off after the last file's data. The missing bytes are padding and
/// read as zeros.
const TARGET_PADDING: u64 = 4096;

/// A layer's bytes, with its blob opened in the cache.
enum OpenedLayer {
    Turbo { meta: SharedBytes, target: Option<Arc<Blob>> },
    Native { chunks: Arc<Blob> },
}

impl OpenedLayer {
    fn new(data: LayerData, cache: &Cache) -> Self {
        match data {
            LayerData::Turbo { meta, target } => {
                Self::Turbo { meta, target: target.map(|target| cache.open(target)) }
            }
            LayerData::Native { chunks } => Self::Native { chunks: cache.open(chunks) },
        }
    }

    fn blob(&self) -> Option<&Arc<Blob>> {
        match self {
            Self::Turbo { target, .. } => target.as_ref(),
            Self::Native { chunks } => Some(chunks),
        }
    }
}

/// The shared part of disks of the same image: the index and the metadata.
pub struct DiskParts {
    stack: Stack,
    layers: Vec<OpenedLayer>,
    /// Memory of the indexes, in the budget of images.
    _reserved: Vec<Reserved>,
    /// The memory of long frames, if a layer has one.
    _frames: Option<Arc<Reserved>>,
    /// Why no byte of it may be read any more.
    refused: OnceLock<Arc<str>>,
}

impl DiskParts {
    /// Why no byte of it may be read any more, if so.
    #[must_use]
    pub fn refused(&self) -> Option<&Arc<str>> {
        self.refused.get()
    }
}

/// A virtual disk made of layers.
pub struct Disk {
    parts: Arc<DiskParts>,
    cache: Arc<Cache>,
    leases: Arc<Leases>,
    recorders: Arc<Recorders>,
}

impl Disk {
    /// Stacks layers, the lowest first.
    ///
    /// # Errors
    /// [`DiskError::Lsmt`] if they cannot be stacked, [`DiskError::Layer`] and [`DiskError::PastTarget`] if a
    /// mapping points to missing data.
    pub fn new(layers: Vec<DiskLayer>, cache: Arc<Cache>) -> Result<Self, DiskError> {
        Self::with_reserved(layers, cache, Vec::new())
    }

    /// As [`new`](Self::new), with the parts of the budget of images that the layers' indexes take.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn with_reserved(
        layers: Vec<DiskLayer>,
        cache: Arc<Cache>,
        reserved: Vec<Reserved>,
    ) -> Result<Self, DiskError> {
        for (number, layer) in layers.iter().enumerate() {
            check_layer(number, layer)?;
        }
        check_chain(&layers)?;
        check_size(&layers)?;
        let stack = Stack::merge(&layers.iter().map(|layer| &layer.index).collect::<Vec<_>>())?;
        let layers: Vec<OpenedLayer> =
            layers.into_iter().map(|layer| OpenedLayer::new(layer.data, &cache)).collect();
        let mut blobs = layers.iter().filter_map(OpenedLayer::blob);
        let has_frames = blobs.any(|blob| blob.source().serial().is_some());
        let frames = if has_frames { Some(cache.residents().frames()?) } else { None };
        let refused = OnceLock::new();
        let parts = DiskParts { stack, layers, _reserved: reserved, _frames: frames, refused };
        Ok(Self::of(Arc::new(parts), cache))
    }

    /// Another disk from the same parts, for another device. `cache` must be the one in which the parts were
    /// opened.
    #[must_use]
    pub fn of(parts: Arc<DiskParts>, cache: Arc<Cache>) -> Self {
        let blobs = parts.layers.iter().map(|layer| layer.blob().cloned()).collect();
        let recorders = Recorders::of(cache.flow(), blobs);
        Self { parts, cache, leases: Arc::default(), recorders }
    }

    /// The part that it shares with other disks of the same image.
    #[must_use]
    pub fn parts(&self) -> &Arc<DiskParts> {
        &self.parts
    }

    /// Makes every read from now on fail, of this disk and of all that share its parts: what it shows was found to be
    /// something else than its layers contain. `reason` ends the sentence.
    pub fn refuse_reads(&self, reason: &str) {
        let _ = self.parts.refused.set(reason.into()); // the first reason stays
    }

    /// The merged index.
    #[must_use]
    pub fn stack(&self) -> &Stack {
        &self.parts.stack
    }

    /// Number of layers.
    #[must_use]
    pub fn layer_count(&self) -> usize {
        self.parts.layers.len()
    }

    /// The chunk source of each layer's data, the lowest first; `None` for a layer without data.
    #[must_use]
    pub fn chunk_sources(&self) -> Vec<Option<Arc<dyn ChunkSource>>> {
        self.parts
            .layers
            .iter()
            .map(|layer| layer.blob().map(|blob| blob.source().clone()))
            .collect()
    }

    /// The blob in the cache of each layer's data.
    #[must_use]
    pub fn blobs(&self) -> Vec<Option<Arc<Blob>>> {
        self.parts.layers.iter().map(|layer| layer.blob().cloned()).collect()
    }

    /// The chunk sources of the native layers only, which upstream's traces refer to.
    #[must_use]
    pub fn native_sources(&self) -> Vec<Option<Arc<dyn ChunkSource>>> {
        let native = |layer: &OpenedLayer| match layer {
            OpenedLayer::Native { chunks } => Some(chunks.source().clone()),
            OpenedLayer::Turbo { .. } => None,
        };
        self.parts.layers.iter().map(native).collect()
    }

    /// Upstream's trace of this disk's layers in the form of this program.
    #[must_use]
    pub fn trace_of(&self, reads: &[trace::upstream::LayerRead]) -> Trace {
        let native = self.native_sources();
        let layers: Vec<_> = native.iter().map(Option::as_deref).collect();
        trace::upstream::to_trace(reads, &layers)
    }

    /// The recorders of touched chunks.
    #[must_use]
    pub fn recorders(&self) -> &Arc<Recorders> {
        &self.recorders
    }

    /// True if a layer brings its filesystem's metadata with it: then reads of metadata wait for nothing.
    #[must_use]
    pub fn has_metadata(&self) -> bool {
        self.parts.layers.iter().any(|layer| matches!(layer, OpenedLayer::Turbo { .. }))
    }

    /// The cache of its chunks.
    #[must_use]
    pub fn cache(&self) -> &Arc<Cache> {
        &self.cache
    }

    /// First sector and length of each run of sectors that a layer has data for, ascending and joined. All
    /// other sectors of the disk are zero.
    pub fn mapped(&self) -> impl Iterator<Item = (Sectors, Sectors)> + '_ {
        let end = self.parts.stack.virtual_size().sector();
        let data = self.parts.stack.extents().filter(|extent| extent.place != RunPlace::Zero);
        let mut inside = data
            .take_while(move |extent| extent.lba < end)
            .map(move |extent| (extent.lba, Sectors(extent.len.0.min(end.0 - extent.lba.0))))
            .peekable();
        std::iter::from_fn(move || {
            let (lba, mut len) = inside.next()?;
            while let Some((_, more)) = inside.next_if(|next| next.0 == lba + len) {
                len += more;
            }
            Some((lba, len))
        })
    }

    /// Appends the pieces of `len` bytes at byte `at` of a layer's file, or registers with `request` for the
    /// missing chunks.
    fn locate_chunks(
        &self,
        request: &mut LocateCall<'_, '_>,
        part: &ChunkPart<'_>,
    ) -> Result<(), VolumeError> {
        let source = part.blob.source();
        let size = source.decoded_len();
        let (mut at, mut left) = (part.at, part.len as u64);
        while left > 0 {
            if at >= size {
                // Only the padding of the target reaches this: see `check_layer`.
                request.pieces.push(Piece::Zero(left as usize));
                return Ok(());
            }
            let offset = part.offset + (at - part.at);
            let Some(span) = source.chunk_at(at).filter(|span| holds(*span, at)) else {
                return Err(part.damaged(0, offset, "its index has no chunk for this byte"));
            };
            let skip = at - span.start;
            let len = (u64::from(span.len) - skip).min(left);
            match self.chunk(request, part, span.index, offset) {
                Some(chunk) => {
                    let range = skip as usize..(skip + len) as usize;
                    if chunk.len() < range.end {
                        return Err(part.damaged(
                            span.index,
                            offset,
                            "it decodes to fewer bytes than in its index",
                        ));
                    }
                    request.pieces.push(Piece::Chunk { guard: chunk, range });
                }
                None => request.pieces.push(Piece::Zero(len as usize)), // the answer will be Pending
            }
            at += len;
            left -= len;
        }
        Ok(())
    }

    /// A chunk from the lease or the cache. If it is missing, it is requested and `request` waits for it.
    fn chunk(
        &self,
        request: &mut LocateCall<'_, '_>,
        part: &ChunkPart<'_>,
        index: u32,
        offset: u64,
    ) -> Option<Arc<ChunkBytes>> {
        let key = (part.layer, index);
        // Extents of one file often share a chunk, and follow one another.
        if let Some((_, chunk)) = request.last.as_ref().filter(|(last, _)| *last == key) {
            return chunk.clone();
        }
        self.recorders.touched(part.layer, index);
        let leased = request.leased.iter().find(|(leased, _)| *leased == key);
        let chunk = match leased {
            Some((_, chunk)) => Some(chunk.clone()),
            None => self.cached_chunk(request, part, key, offset),
        };
        request.last = Some((key, chunk.clone()));
        chunk
    }

    fn cached_chunk(
        &self,
        request: &mut LocateCall<'_, '_>,
        part: &ChunkPart<'_>,
        key: leases::ChunkKey,
        offset: u64,
    ) -> Option<Arc<ChunkBytes>> {
        let LocateCall { gather, waiter, leases, range, batch, .. } = request;
        let lookup = batch.get(part.blob, key.1, &mut || {
            let gather =
                gather.get_or_insert_with(|| Gather::new(waiter(), (*leases).clone(), *range));
            gather.expect(key, offset)
        });
        match lookup {
            Lookup::Hit(chunk) => {
                request.present.push((key, chunk.clone()));
                Some(chunk)
            }
            Lookup::Pending => None,
        }
    }

    fn locate_all(&self, request: &mut LocateCall<'_, '_>) -> Result<(), VolumeError> {
        let (first, count) = request.range.sectors();
        for run in self.parts.stack.look_up(first, count) {
            // A run is in whole sectors, a request in bytes.
            let part = request.range.part_in(run.lba, run.len);
            let (start, len) = (part.offset, part.buffer_len());
            let skip = start - run.lba.bytes().0;
            let layer = usize::from(run.layer);
            let (blob, sector) = match (run.place, &self.parts.layers[layer]) {
                (RunPlace::Zero, _) => {
                    push_zero(&mut request.pieces, len);
                    continue;
                }
                (RunPlace::Own(sector), OpenedLayer::Turbo { meta, .. }) => {
                    // In bounds: `check_layer`.
                    let from = (sector.bytes().0 + skip) as usize;
                    request
                        .pieces
                        .push(Piece::Memory { guard: meta.clone(), range: from..from + len });
                    continue;
                }
                (RunPlace::Remote(sector), OpenedLayer::Turbo { target: Some(target), .. }) => {
                    (target, sector)
                }
                (
                    RunPlace::Own(sector) | RunPlace::Remote(sector),
                    OpenedLayer::Native { chunks },
                ) => (chunks, sector),
                (RunPlace::Remote(_), OpenedLayer::Turbo { target: None, .. }) => {
                    // Refused by `check_layer`; must never become zeros.
                    let reason = Arc::new(io::Error::other("The layer has no target"));
                    let name = format!("layer {layer}");
                    let error = SourceError::Io { name, offset: start, len, source: reason };
                    return Err(VolumeError::Chunk {
                        offset: start,
                        layer,
                        source: Arc::new(error.into()),
                    });
                }
            };
            let at = sector.bytes().0 + skip;
            self.locate_chunks(
                request,
                &ChunkPart { layer: run.layer, blob, at, len, offset: start },
            )?;
        }
        Ok(())
    }
}

/// State of one call of [`Volume::locate`].
struct LocateCall<'a, 'w> {
    range: DiskRange,
    pieces: Vec<Piece>,
    /// Chunks that were kept for this request when it was woken.
    leased: Vec<(leases::ChunkKey, Arc<ChunkBytes>)>,
    /// Chunks found in the cache; kept too if the request must wait for others.
    present: Vec<(leases::ChunkKey, Arc<ChunkBytes>)>,
    /// The last requested chunk; its content is `None` if it is missing.
    last: Option<(leases::ChunkKey, Option<Arc<ChunkBytes>>)>,
    gather: Option<Arc<Gather>>,
    /// The missing chunks, fetched together.
    batch: ChunkBatch<'a>,
    waiter: &'a mut (dyn FnMut() -> Waiter + 'w),
    leases: &'a Arc<Leases>,
}

/// Bytes `at..at + len` of a layer's chunked file, at byte `offset` of the disk.
struct ChunkPart<'a> {
    layer: u8,
    blob: &'a Arc<Blob>,
    at: u64,
    len: usize,
    offset: u64,
}

impl ChunkPart<'_> {
    fn damaged(&self, chunk: u32, offset: u64, reason: &str) -> VolumeError {
        let source = ChunkError::Damaged {
            blob: self.blob.source().id().to_owned(),
            chunk,
            start: self.at,
            end: self.at + self.len as u64,
            reason: reason.to_owned(),
        };
        VolumeError::Chunk { offset, layer: usize::from(self.layer), source: Arc::new(source) }
    }
}

/// True if a span is a valid answer of a [`ChunkSource`] for byte `at`.
fn holds(span: ChunkSpan, at: u64) -> bool {
    span.start <= at && at - span.start < u64::from(span.len)
}

/// Appends zeros; lengthens the last piece if that is zeros too.
fn push_zero(pieces: &mut Vec<Piece>, len: usize) {
    match pieces.last_mut() {
        Some(Piece::Zero(before)) => *before += len,
        _ => pieces.push(Piece::Zero(len)),
    }
}

impl Volume for Disk {
    fn size(&self) -> u64 {
        self.parts.stack.virtual_size().0
    }

    fn locate(
        &self,
        range: DiskRange,
        waiter: &mut dyn FnMut() -> Waiter,
    ) -> Result<Located, VolumeError> {
        if let Some(reason) = self.parts.refused() {
            return Err(VolumeError::Refused { reason: reason.clone() });
        }
        range.check(self.size())?;
        if range.is_empty() {
            return Ok(Located::Ready(Vec::new()));
        }
        let leased = self.leases.take(range);
        let mut request = LocateCall {
            range,
            pieces: Vec::new(),
            leased,
            present: Vec::new(),
            last: None,
            gather: None,
            batch: self.cache.batch_for(self.recorders.flow()),
            waiter,
            leases: &self.leases,
        };
        let result = self.locate_all(&mut request);
        drop(request.batch);
        match (request.gather, result) {
            (None, Ok(())) => Ok(Located::Ready(request.pieces)),
            (None, Err(error)) => Err(error),
            (Some(gather), result) => {
                let mut present = request.present;
                present.append(&mut request.leased);
                gather.asked(present, result);
                Ok(Located::Pending)
            }
        }
    }
}

/// Refuses a layer that was made on another layer than the one below it. A layer may have no identity, and a
/// TurboOCI layer never has one; but an identity names the layer that it was made on (spec lsmt 3). Upstream
/// has this check but does not run it when it opens an image: a missing layer then appears as damaged files.
fn check_chain(layers: &[DiskLayer]) -> Result<(), DiskError> {
    let identity = |layer: &DiskLayer| match layer.index.kind() {
        TagMeaning::Plain => {
            let trailer = layer.index.trailer();
            (trailer.uuid, trailer.parent)
        }
        TagMeaning::Warp => (Uuid::NULL, Uuid::NULL),
    };
    let mut seen: HashMap<Uuid, usize> = HashMap::new();
    let mut below = None;
    for (number, layer) in layers.iter().enumerate() {
        let (uuid, parent) = identity(layer);
        let misplaced = |rule: String| DiskError::Chain {
            layer: number,
            name: layer.index.name().to_owned(),
            rule,
        };
        if uuid != Uuid::NULL
            && let Some(other) = seen.insert(uuid, number)
        {
            return Err(misplaced(format!(
                "its UUID {uuid} is that of layer {other} too, and a layer cannot lie on itself"
            )));
        }
        match below {
            None if parent != Uuid::NULL => {
                return Err(misplaced(format!(
                    "it was made on {parent}, and no layer is below it"
                )));
            }
            Some(below) if parent != Uuid::NULL && below != Uuid::NULL && parent != below => {
                return Err(misplaced(format!("it was made on {parent}, and lies on {below}")));
            }
            _ => below = Some(uuid),
        }
    }
    Ok(())
}

/// Refuses a mapping past the end of the disk. A layer may have made the disk smaller; data of lower layers
/// past the new end stays invisible.
fn check_size(layers: &[DiskLayer]) -> Result<(), DiskError> {
    let size = layers.iter().map(|layer| layer.index.virtual_size().0).max().unwrap_or(0);
    for (number, layer) in layers.iter().enumerate() {
        // Entries are in order: the last ends last.
        let last = layer.index.mappings().last();
        if let Some(mapping) = last.filter(|mapping| size > 0 && mapping.end().0 > size / SECTOR) {
            return Err(DiskError::PastDisk {
                layer: number,
                name: layer.index.name().to_owned(),
                mapping: *mapping,
                size,
            });
        }
    }
    Ok(())
}

/// Refuses a layer that points to missing data.
fn check_layer(number: usize, layer: &DiskLayer) -> Result<(), DiskError> {
    let name = || layer.index.name().to_owned();
    let incomplete =
        |rule: &str| DiskError::Layer { layer: number, name: name(), rule: rule.to_owned() };
    let (own_end, target) = match (&layer.data, layer.index.kind()) {
        (LayerData::Turbo { meta, target }, TagMeaning::Warp) => {
            (meta.bytes().len() as u64, target.as_ref())
        }
        (LayerData::Native { chunks }, TagMeaning::Plain) => (chunks.decoded_len(), None),
        _ => return Err(incomplete("its index and its data are of different kinds")),
    };
    for mapping in layer.index.mappings().iter().filter(|mapping| !mapping.zeroed) {
        let past = |file: &str, end, rule| {
            Err(DiskError::PastTarget {
                layer: number,
                name: name(),
                mapping: *mapping,
                file: file.to_owned(),
                end,
                rule,
            })
        };
        let (start, end) = (mapping.moffset.checked_bytes(), mapping.moffset_end().checked_bytes());
        let (Some(start), Some(end)) = (start, end) else {
            return past("every file", u64::MAX, "no file is that long");
        };
        if mapping.tag == 0 {
            if end.0 > own_end {
                return past("the layer itself", own_end, "a layer's own data must lie inside it");
            }
            continue;
        }
        let Some(target) = target else {
            return Err(incomplete("it maps file data to an original layer, which is missing"));
        };
        let size = target.decoded_len();
        if start.0 >= size || end.0 - size.min(end.0) >= TARGET_PADDING {
            return past(
                target.id(),
                size,
                "a mapping may exceed it only by less than a block of 4096 bytes",
            );
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
