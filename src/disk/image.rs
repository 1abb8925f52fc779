//! A converted image in a store → its layers, ready to be stacked.
//!
//! A `TurboOCI` layer is small: its archive is read whole, checked against its digest and unpacked
//! in memory; the original blob is only opened, not read. A native layer stays where it is and is
//! read by range. What the annotations say is believed only as far as the bytes agree: the index
//! must fit the target blob in length, and the sidecar must name its digest.

use std::io::Read as _;
use std::ops::Range;
use std::sync::Arc;

use super::{Disk, DiskError, DiskLayer, LayerData};
use crate::cache::Cache;
use crate::chunk::{ChunkSource, PlainChunks};
use crate::convert::layer::FS_META_NAME;
use crate::gzip::{self, GZIP_META_NAME, IndexedLayer, SIDECAR_NAME};
use crate::lsmt::{self, LayerKind};
use crate::oci::{Descriptor, Digest, Manifest, Platform, annotations, media_type};
use crate::source::{ByteSource, MemorySource};
use crate::store::{ImageStore, Selector, StoredManifest};
use crate::tar;
use crate::zfile;

/// Most bytes that a layer archive may unpack to, 4 GiB: the metadata of a layer of some 400 GB.
const MAX_ARCHIVE: u64 = 4 << 30;

/// An image opened for reading.
pub struct OpenedImage {
    /// The manifest that was opened, of this host's platform.
    pub manifest: StoredManifest,
    /// What each layer is, bottom first.
    pub layers: Vec<LayerInfo>,
    /// The targets of the `TurboOCI` layers, by layer.
    pub targets: Vec<Option<Arc<dyn ChunkSource>>>,
    /// The virtual disk.
    pub disk: Disk,
}

/// What a layer is, for people and for `--json`. Sizes in bytes.
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
}

/// What the original of a `TurboOCI` layer is.
#[derive(Clone, Debug, serde::Serialize)]
pub struct TargetInfo {
    /// The original blob.
    pub digest: String,
    /// Its size.
    pub size: u64,
    /// Its size uncompressed.
    pub uncompressed: u64,
    /// Parts of the layer archive: metadata, upstream's gzip index, our sidecar.
    pub fs_meta: u64,
    /// See `fs_meta`.
    pub gzip_meta: u64,
    /// See `fs_meta`.
    pub sidecar: u64,
    /// Distance of checkpoints, 0 for an uncompressed layer.
    pub span: u64,
    /// Segments, each decoded alone.
    pub segments: u32,
    /// Whether every segment can be verified before it is used.
    pub verified: bool,
}

/// Opens the image that `selector` names; `targets` is where the original blobs are, the same store
/// unless the meta image was written elsewhere.
///
/// # Errors
/// [`DiskError`], naming the layer and what about it is wrong.
pub fn open_image(
    store: &dyn ImageStore,
    targets: &dyn ImageStore,
    selector: &Selector,
    cache: Arc<Cache>,
) -> Result<OpenedImage, DiskError> {
    let stored = platform_manifest(store, selector)?;
    let manifest = Manifest::parse(&stored.bytes)
        .map_err(|error| DiskError::Image { what: format!("Manifest {}", stored.digest), reason: error.to_string() })?;
    let mut layers = Vec::new();
    let mut infos = Vec::new();
    for (number, descriptor) in manifest.layers.iter().enumerate() {
        let in_layer = |error: DiskError| error.in_layer(number, descriptor.digest);
        let (layer, info) = open_layer(store, targets, descriptor).map_err(in_layer)?;
        layers.push(layer);
        infos.push(info);
    }
    let targets = layers
        .iter()
        .map(|layer| match &layer.data {
            LayerData::Turbo { target, .. } => target.clone(),
            LayerData::Native { .. } => None,
        })
        .collect();
    Ok(OpenedImage { manifest: stored, layers: infos, targets, disk: Disk::new(layers, cache)? })
}

/// The manifest itself, or the one for this host out of an index.
///
/// # Errors
/// [`DiskError`] when the index has no such platform: the message lists what it has.
pub fn platform_manifest(store: &dyn ImageStore, selector: &Selector) -> Result<StoredManifest, DiskError> {
    let mut stored = store.manifest(selector)?;
    while media_type::is_index(&stored.media_type) {
        let image = |error: &dyn std::fmt::Display| DiskError::Image {
            what: format!("Index {}", stored.digest),
            reason: error.to_string(),
        };
        let index = crate::oci::Index::parse(&stored.bytes).map_err(|error| image(&error))?;
        let chosen = index.for_platform(&Platform::host()).map_err(|error| image(&error))?;
        stored = store.manifest(&Selector::Digest(chosen.digest))?;
    }
    Ok(stored)
}

fn open_layer(
    store: &dyn ImageStore,
    targets: &dyn ImageStore,
    descriptor: &Descriptor,
) -> Result<(DiskLayer, LayerInfo), DiskError> {
    if let Some(target) = annotations::target_digest(descriptor) {
        return open_turbo(store, targets, descriptor, &target.map_err(|error| DiskError::bad(&error))?);
    }
    if annotations::is_overlaybd(descriptor) {
        return open_native(store, descriptor);
    }
    Err(DiskError::Image {
        what: "The image".into(),
        reason: "it is a plain OCI image without a meta image: build one with `turbobd convert`".into(),
    })
}

fn open_native(store: &dyn ImageStore, descriptor: &Descriptor) -> Result<(DiskLayer, LayerInfo), DiskError> {
    let blob = store.blob_source(&descriptor.digest, Some(descriptor.size))?;
    let (index, data) = super::open_native_layer(blob, &descriptor.digest.to_string())?;
    let info = LayerInfo {
        kind: "native",
        digest: descriptor.digest.to_string(),
        size: descriptor.size,
        target: None,
        mappings: index.mappings().len(),
    };
    Ok((DiskLayer { index, data }, info))
}

fn open_turbo(
    store: &dyn ImageStore,
    targets: &dyn ImageStore,
    descriptor: &Descriptor,
    target: &Digest,
) -> Result<(DiskLayer, LayerInfo), DiskError> {
    let members = Members::unpack(&store.read_blob(descriptor)?)?;
    let fs_meta = members.fs_meta()?;
    let gzip_meta = members.get(GZIP_META_NAME);
    let sidecar = members.get(SIDECAR_NAME);
    let plain = annotations::target_is_plain(descriptor);
    let (source, mut info) = if plain {
        let blob = targets.blob_source(target, None)?;
        let info = TargetInfo::plain(target, blob.len());
        (Arc::new(PlainChunks::new(target.to_string(), blob)) as Arc<dyn ChunkSource>, info)
    } else {
        let index = gzip::merge(gzip_meta, sidecar, Some(target))?;
        let blob = targets.blob_source(target, Some(index.compressed_len.get()))?;
        let info = TargetInfo::indexed(target, &index);
        (Arc::new(IndexedLayer::new(index, blob, format!("{target}#gzip"))?) as Arc<dyn ChunkSource>, info)
    };
    info.fs_meta = fs_meta.len() as u64;
    info.gzip_meta = gzip_meta.map_or(0, |bytes| bytes.len() as u64);
    info.sidecar = sidecar.map_or(0, |bytes| bytes.len() as u64);

    let name = format!("{FS_META_NAME} of {}", descriptor.digest);
    let lsmt = zfile::decompress(Arc::new(MemorySource::new(name.clone(), fs_meta)))?;
    let lsmt: Arc<dyn ByteSource> = Arc::new(MemorySource::new(name, lsmt));
    let index = lsmt::Layer::open(lsmt.clone(), LayerKind::Warp)?;
    let info = LayerInfo {
        kind: "turbo",
        digest: descriptor.digest.to_string(),
        size: descriptor.size,
        target: Some(info),
        mappings: index.mappings().len(),
    };
    Ok((DiskLayer { index, data: LayerData::Turbo { meta: lsmt, target: Some(source) } }, info))
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
        }
    }

    fn indexed(digest: &Digest, index: &gzip::Index) -> Self {
        Self {
            size: index.compressed_len.get(),
            uncompressed: index.uncompressed_len.get(),
            span: index.span.get(),
            segments: index.checkpoints.len() as u32,
            verified: index.is_verified(),
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
    fn unpack(archive: &[u8]) -> Result<Self, DiskError> {
        let broken = |reason: String| DiskError::Image { what: "The layer archive".into(), reason };
        let mut bytes = Vec::new();
        if archive.starts_with(&[0x1f, 0x8b]) {
            flate2::read::MultiGzDecoder::new(archive)
                .take(MAX_ARCHIVE + 1)
                .read_to_end(&mut bytes)
                .map_err(|error| broken(format!("it is not whole gzip: {error}")))?;
            if bytes.len() as u64 > MAX_ARCHIVE {
                return Err(broken(format!("it unpacks to more than {MAX_ARCHIVE} bytes")));
            }
        } else {
            bytes.extend_from_slice(archive);
        }
        let ranges = tar::archive::read_members(&bytes).map_err(|error| broken(error.to_string()))?;
        Ok(Self { bytes, ranges })
    }

    fn get(&self, name: &str) -> Option<&[u8]> {
        let (_, range) = self.ranges.iter().find(|(member, _)| member == name)?;
        self.bytes.get(range.clone())
    }

    /// The ext4 metadata. An archive with only erofs metadata is refused by name.
    fn fs_meta(&self) -> Result<&[u8], DiskError> {
        self.get(FS_META_NAME).ok_or_else(|| {
            let names: Vec<&str> = self.ranges.iter().map(|(name, _)| name.as_str()).collect();
            DiskError::Image {
                what: "The layer archive".into(),
                reason: format!("it has no {FS_META_NAME}, only {}", names.join(", ")),
            }
        })
    }
}
