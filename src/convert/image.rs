//! Conversion of one manifest with its layers.

use std::collections::BTreeMap;
use std::time::Instant;

use super::base::{self, BASE, Base, BaseError, BaseLayer};
use super::chain::{CHAINS, ChainId, KnownLayer, KnownLayers, LocalLayers};
use super::layer::{LayerSizes, TargetEncoding, WantedForms, convert_layer};
use super::native::{Hashing, NativeBlob, NativeLayer, layer_uuids};
use super::{ConvertError, ConvertLayerError, ConvertOptions, ImageFormat, Progress};
use formats::ext4::{FilesystemIdentity, Geometry, Image, Tree};
use formats::lsmt;
use formats::oci::manifest::media;
use formats::oci::{Descriptor, Digest, Document, ImageConfig, Manifest, annotations};
use registry::store::{ImageStore, StoreError, StoredManifest};

/// An image in one converted format, not yet published.
pub struct ConvertedImage {
    /// Media type of the new manifest.
    pub media_type: &'static str,
    /// The new manifest, as bytes to store.
    pub manifest: Vec<u8>,
    /// The edited config.
    pub config: Vec<u8>,
    /// The new layers, bottom first.
    pub layers: Vec<LayerBlob>,
}

impl ConvertedImage {
    /// Stores layers and config.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn put_blobs(&self, into: &dyn ImageStore) -> Result<(), StoreError> {
        for layer in &self.layers {
            layer.put(into)?;
        }
        into.put_blob(&self.config)
    }
}

/// The conversion of an image in each requested format.
pub struct ConvertedFormats {
    /// The TurboOCI image.
    pub turbo: Option<ConvertedImage>,
    /// The native image.
    pub native: Option<ConvertedImage>,
    /// Report of each layer.
    pub report: Vec<LayerReport>,
}

/// The blob of a converted layer.
pub enum LayerBlob {
    /// A TurboOCI layer, which is small.
    Bytes(Vec<u8>),
    /// A native layer in its work file.
    File(NativeBlob),
    /// A layer that was converted before.
    Known(KnownLayer),
}

impl LayerBlob {
    /// Digest and length in bytes.
    #[must_use]
    pub fn id(&self) -> (Digest, u64) {
        match self {
            LayerBlob::Bytes(bytes) => (Digest::of(bytes), bytes.len() as u64),
            LayerBlob::File(blob) => (blob.digest(), blob.size()),
            LayerBlob::Known(known) => (known.digest, known.size),
        }
    }

    /// The bytes of a layer that is in memory.
    #[must_use]
    pub fn bytes(&self) -> Option<&[u8]> {
        match self {
            LayerBlob::Bytes(bytes) => Some(bytes),
            LayerBlob::File(_) | LayerBlob::Known(_) => None,
        }
    }

    /// Stores the blob unless it is present: copies it from its place, and inside a registry without moving
    /// it.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn put(&self, into: &dyn ImageStore) -> Result<(), StoreError> {
        let (digest, size) = self.id();
        match self {
            LayerBlob::Bytes(bytes) => into.put_blob(bytes),
            LayerBlob::File(blob) => {
                into.put_blob_from(&digest, size, &mut || match blob.reader() {
                    Ok(reader) => Ok(Box::new(reader)),
                    Err(source) => {
                        let store = "the work folder".to_owned();
                        Err(StoreError::Broken { store, digest, source })
                    }
                })
            }
            LayerBlob::Known(known) => {
                if into.has_blob(&digest, size)? || into.mount_blob(&digest, &*known.from)? {
                    return Ok(());
                }
                let blob = Descriptor::new("", digest, size);
                into.put_blob_from(&digest, size, &mut || known.from.open_blob(&blob))
            }
        }
    }
}

/// Report of one layer of a conversion.
#[derive(Clone, Debug, serde::Serialize)]
pub struct LayerReport {
    /// The original blob.
    pub source: String,
    /// The new blob: of the TurboOCI image if there is one.
    pub digest: String,
    /// Sizes in bytes.
    pub sizes: LayerSizes,
    /// Wall time of the pass in milliseconds.
    pub millis: u64,
    /// True if the layer was converted before and reused.
    pub reused: bool,
    /// The native layer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub native: Option<NativeReport>,
}

/// Report of a native layer.
#[derive(Clone, Debug, serde::Serialize)]
pub struct NativeReport {
    /// The new blob.
    pub digest: String,
    /// Size in bytes.
    pub size: u64,
    /// Bytes before compression.
    pub plain: u64,
    /// Bytes of zeros in files; they are not stored.
    pub zeros: u64,
    /// Bytes of filesystem metadata.
    pub metadata: u64,
}

/// One format of the result during the conversion of the layers.
struct Track {
    format: ImageFormat,
    chains: Vec<ChainId>,
    known: Vec<Option<KnownLayer>>,
    built: Vec<Option<BuiltBlob>>,
}

/// A layer of a track; its digest may still be in computation.
enum BuiltBlob {
    Turbo { archive: Vec<u8>, diff_id: Digest, target: TargetEncoding },
    Native(Hashing),
}

/// A complete layer of a track.
struct Done {
    blob: LayerBlob,
    diff_id: Digest,
    target: TargetEncoding,
}

impl Track {
    /// Starts a track for the source layers from `below.covered` on.
    fn new(
        format: ImageFormat,
        options: &ConvertOptions,
        below: &Below,
        sources: &[Digest],
        known: &KnownLayers,
    ) -> Self {
        let chains = below.chain(format, options, below.layers.len());
        let chains = chains.of_layers(&sources[below.covered..]);
        let known = chains.iter().map(|&chain| known.get(chain)).collect();
        Self { format, built: chains.iter().map(|_| None).collect(), chains, known }
    }

    /// True if layer `number` must be made.
    fn lacks(&self, number: usize) -> bool {
        self.known[number].is_none()
    }

    /// Number of layers, from the lowest on, that need not be made.
    fn known_below(&self) -> usize {
        self.known.iter().take_while(|known| known.is_some()).count()
    }

    /// The last layer that must be made.
    fn last_lacking(&self) -> Option<usize> {
        (0..self.known.len()).rev().find(|&number| self.lacks(number))
    }

    /// The layers, in order.
    fn done(&mut self) -> Result<Vec<Done>, (usize, ConvertLayerError)> {
        let mut all = Vec::with_capacity(self.chains.len());
        let built = std::mem::take(&mut self.built);
        for (number, (built, known)) in built.into_iter().zip(&self.known).enumerate() {
            all.push(match (known, built) {
                (Some(known), _) => Done {
                    diff_id: known.diff_id,
                    target: known.target,
                    blob: LayerBlob::Known(known.clone()),
                },
                (None, Some(BuiltBlob::Turbo { archive, diff_id, target })) => {
                    Done { blob: LayerBlob::Bytes(archive), diff_id, target }
                }
                (None, Some(BuiltBlob::Native(hashing))) => {
                    let blob = hashing.done().map_err(|error| (number, error))?;
                    let diff_id = blob.digest();
                    Done { blob: LayerBlob::File(blob), diff_id, target: TargetEncoding::Gzip }
                }
                (None, None) => {
                    let lost = std::io::Error::other("the layer was not converted");
                    return Err((number, ConvertLayerError::Read(lost)));
                }
            });
        }
        Ok(all)
    }
}

/// Converts the image of `source`, bottom to top, to the formats in `options`. Layers that are `known` are
/// reused; if all are, no layer of the source is read.
///
/// # Errors
/// [`ConvertError`] with the layer.
pub fn convert_image(
    store: &dyn ImageStore,
    source: &StoredManifest,
    options: &ConvertOptions,
    known: &KnownLayers,
    progress: &dyn Progress,
) -> Result<ConvertedFormats, ConvertError> {
    let broken = |what, digest, reason: String| ConvertError::Manifest { what, digest, reason };
    let manifest = match Document::parse(&source.bytes, Some(&source.media_type)) {
        Ok(Document::Manifest(manifest)) => manifest,
        Ok(Document::Index(_)) => {
            return Err(broken("Manifest", source.digest, "it is an index".into()));
        }
        Err(error) => return Err(broken("Manifest", source.digest, error.to_string())),
    };
    let config = store.read_blob(&manifest.config)?;
    let config = ImageConfig::parse(&config)
        .map_err(|error| broken("Config", manifest.config.digest, error.to_string()))?;

    let sources: Vec<Digest> = manifest.layers.iter().map(|layer| layer.digest).collect();
    // A config that lists other layers than the manifest is no error: identities are advisory.
    let ids = config.diff_ids();
    let uuids = layer_uuids(if ids.len() == sources.len() { ids } else { &sources });
    let tracks_on = |below: &Below| -> Vec<Track> {
        options
            .formats()
            .map(|format| Track::new(format, options, below, &sources, known))
            .collect()
    };
    let failed =
        |error: BaseError| ConvertError::Base { digest: source.digest, source: Box::new(error) };
    let mut below = Below { layers: Vec::new(), covered: 0 };
    let mut tracks = tracks_on(&below);
    let least = tracks.iter().map(Track::known_below).min().unwrap_or(0);
    if let Some(base) = base::choose(known.bases(), &sources, &uuids, least).map_err(failed)? {
        below = base;
        tracks = tracks_on(&below);
    }
    let stream =
        LayerSequence { store, layers: &manifest.layers, uuids: &uuids, options, progress };
    let mut report = stream.convert(&below, &mut tracks)?;

    let mut formats = ConvertedFormats { turbo: None, native: None, report: Vec::new() };
    for track in &mut tracks {
        let done = track.done().map_err(|(number, error)| {
            let number = below.covered + number;
            let source = Box::new(error);
            ConvertError::Layer { number, digest: manifest.layers[number].digest, source }
        })?;
        for (line, layer) in report[below.covered..].iter_mut().zip(&done) {
            line.note(track.format, layer);
        }
        if let Some(local) = known.local() {
            keep(local, track, &done)?;
        }
        let image = assemble(source, &manifest, &config, &below, track, done, options);
        match track.format {
            ImageFormat::Turbo => formats.turbo = Some(image),
            ImageFormat::Native => formats.native = Some(image),
        }
    }
    formats.report = report;
    Ok(formats)
}

/// A TurboOCI layer that is not part of an image.
pub struct MadeLayer {
    /// Its descriptor, with the annotations.
    pub descriptor: Descriptor,
    /// The layer archive.
    pub archive: Vec<u8>,
}

/// Converts these layers of `store`, lowest first, to TurboOCI layers on an empty disk, and reads all of them.
///
/// # Errors
/// [`ConvertError`] with the layer.
pub fn convert_layers(
    store: &dyn ImageStore,
    layers: &[Descriptor],
    options: &ConvertOptions,
    progress: &dyn Progress,
) -> Result<Vec<MadeLayer>, ConvertError> {
    let sources: Vec<Digest> = layers.iter().map(|layer| layer.digest).collect();
    let uuids = layer_uuids(&sources);
    let below = Below { layers: Vec::new(), covered: 0 };
    let known = KnownLayers::default();
    let mut tracks = vec![Track::new(ImageFormat::Turbo, options, &below, &sources, &known)];
    LayerSequence { store, layers, uuids: &uuids, options, progress }
        .convert(&below, &mut tracks)?;
    let types = Types::of(ImageFormat::Turbo, options);
    let mut made = Vec::with_capacity(layers.len());
    for track in &mut tracks {
        let done = track.done().map_err(|(number, error)| ConvertError::Layer {
            number,
            digest: sources[number],
            source: Box::new(error),
        })?;
        for (source, layer) in layers.iter().zip(done) {
            let descriptor = layer_descriptor(source, &layer, ImageFormat::Turbo, types);
            if let LayerBlob::Bytes(archive) = layer.blob {
                made.push(MadeLayer { descriptor, archive });
            }
        }
    }
    Ok(made)
}

/// The converted layers below those of this conversion.
type Below = Base;

impl Below {
    /// The chain above the lowest `count` of these layers.
    fn chain(&self, format: ImageFormat, options: &ConvertOptions, count: usize) -> ChainId {
        let digests: Vec<Digest> =
            self.layers[..count].iter().map(|layer| layer.descriptor.digest).collect();
        ChainId::over(format, options, &digests)
    }
}

/// The layers of one image during their conversion.
struct LayerSequence<'i> {
    store: &'i dyn ImageStore,
    layers: &'i [Descriptor],
    uuids: &'i [lsmt::Uuid],
    options: &'i ConvertOptions,
    progress: &'i dyn Progress,
}

/// The filesystem so far.
struct BuiltFilesystem {
    tree: Tree,
    image: Image,
    /// Number of source layers in it.
    applied: usize,
}

impl LayerSequence<'_> {
    /// Streams the layers up to the last one that a format lacks.
    fn convert(
        &self,
        below: &Below,
        tracks: &mut [Track],
    ) -> Result<Vec<LayerReport>, ConvertError> {
        let mut report: Vec<LayerReport> = self.layers.iter().map(LayerReport::of).collect();
        for (line, layer) in
            report.iter_mut().zip(&below.layers[below.layers.len() - below.covered..])
        {
            line.digest = layer.descriptor.digest.to_string();
            line.sizes.archive = layer.descriptor.size;
        }
        let lacking = tracks.iter().filter_map(Track::last_lacking).max();
        let Some(end) = lacking.map(|last| below.covered + last + 1) else { return Ok(report) };
        let BuiltFilesystem { mut tree, mut image, applied } = self.begin(below, tracks)?;
        // The new layers lie on the existing disk, so its size counts.
        let options = ConvertOptions { disk_size: image.size(), ..self.options.clone() };
        for (number, layer) in self.layers.iter().enumerate().take(end).skip(applied) {
            let wanted = self.wanted(number, number - below.covered, tracks, &options);
            report[number].reused = !wanted.turbo && wanted.native.is_none();
            let in_layer = |error| ConvertError::Layer {
                number,
                digest: layer.digest,
                source: Box::new(error),
            };
            let blob = self.store.open_blob(layer)?;
            let start = Instant::now();
            let converted =
                convert_layer(blob, layer, wanted, &mut tree, &mut image, &options, self.progress)
                    .map_err(in_layer)?;
            report[number].sizes.tar = converted.tar_len;
            report[number].millis = start.elapsed().as_millis() as u64;
            if let Some(turbo) = &converted.turbo {
                report[number].sizes = turbo.sizes;
            }
            let (mut turbo, mut native) = (converted.turbo, converted.native);
            for track in &mut *tracks {
                track.built[number - below.covered] = match track.format {
                    ImageFormat::Turbo => turbo.take().map(|layer| BuiltBlob::Turbo {
                        archive: layer.archive,
                        diff_id: layer.diff_id,
                        target: layer.target,
                    }),
                    ImageFormat::Native => native.take().map(BuiltBlob::Native),
                };
            }
        }
        Ok(report)
    }

    /// The parts of layer `number` that must be made; it is the `nth` of the tracks.
    fn wanted(
        &self,
        number: usize,
        nth: usize,
        tracks: &[Track],
        options: &ConvertOptions,
    ) -> WantedForms {
        let lacks = |format| tracks.iter().any(|track| track.format == format && track.lacks(nth));
        let native =
            options.native.filter(|_| lacks(ImageFormat::Native)).map(|zfile| NativeLayer {
                // Given in every layer: upstream's `overlaybd-merge` reads only the topmost one.
                virtual_size: options.disk_size,
                identity: lsmt::LayerIdentity {
                    uuid: self.uuids[number],
                    parent: number
                        .checked_sub(1)
                        .map_or(lsmt::Uuid::NULL, |below| self.uuids[below]),
                    user_tag: Vec::new(),
                },
                has_lower: number > 0,
                zfile,
            });
        WantedForms { turbo: lacks(ImageFormat::Turbo), native }
    }

    /// The filesystem below the first layer that must be read: read back from converted layers if there are
    /// any, or else an empty one.
    fn begin(&self, below: &Below, tracks: &[Track]) -> Result<BuiltFilesystem, ConvertError> {
        if !below.layers.is_empty() {
            let mut layers = below.layers.clone();
            let more = self.known_turbo(below.covered, tracks);
            let applied = below.covered + more.len();
            layers.extend(more);
            let (tree, image) = base::read_back(&layers, self.store).map_err(|error| {
                ConvertError::Base { digest: self.layers[0].digest, source: Box::new(error) }
            })?;
            return Ok(BuiltFilesystem { tree, image, applied });
        }
        let known = self.known_turbo(0, tracks);
        if !known.is_empty() {
            match base::read_back(&known, self.store) {
                Ok((tree, image)) => {
                    return Ok(BuiltFilesystem { tree, image, applied: known.len() });
                }
                Err(error) => {
                    tracing::warn!(%error, "The filesystem of the converted layers cannot be read back, so all source layers are read");
                }
            }
        }
        let image =
            Image::new(Geometry { size: self.options.disk_size }, FilesystemIdentity::default())
                .map_err(ConvertError::Disk)?;
        Ok(BuiltFilesystem { tree: Tree::new(), image, applied: 0 })
    }

    /// The lowest layers that no format lacks, as TurboOCI layers. Native layers cannot be used here: they do
    /// not record the zeros of a file. So the allocated blocks of the disk cannot be derived from them
    /// exactly, and the same chain would not always give the same bytes.
    fn known_turbo(&self, covered: usize, tracks: &[Track]) -> Vec<BaseLayer> {
        let count = tracks.iter().map(Track::known_below).min().unwrap_or(0);
        let Some(track) = tracks.iter().find(|track| track.format == ImageFormat::Turbo) else {
            return Vec::new();
        };
        let types = Types::of(ImageFormat::Turbo, self.options);
        let known = track.known[..count].iter().flatten();
        let layers = self.layers[covered..].iter().zip(known).map(|(source, known)| {
            let done = Done {
                diff_id: known.diff_id,
                target: known.target,
                blob: LayerBlob::Known(known.clone()),
            };
            BaseLayer {
                descriptor: layer_descriptor(source, &done, ImageFormat::Turbo, types),
                diff_id: known.diff_id,
                from: known.from.clone(),
            }
        });
        layers.collect()
    }
}

impl LayerReport {
    /// A report of a layer without results yet.
    fn of(layer: &Descriptor) -> Self {
        Self {
            source: layer.digest.to_string(),
            digest: String::new(),
            sizes: LayerSizes { blob: layer.size, ..LayerSizes::default() },
            millis: 0,
            reused: true,
            native: None,
        }
    }

    fn note(&mut self, format: ImageFormat, layer: &Done) {
        let (digest, size) = layer.blob.id();
        if format == ImageFormat::Turbo {
            self.sizes.archive = size;
        } else {
            let mut report =
                NativeReport { digest: digest.to_string(), size, plain: 0, zeros: 0, metadata: 0 };
            if let LayerBlob::File(blob) = &layer.blob {
                report.plain = blob.plain_size();
                report.zeros = blob.zeros();
                report.metadata = blob.metadata();
            }
            self.native = Some(report);
        }
        if self.digest.is_empty() {
            self.digest = digest.to_string();
        }
    }
}

/// Adds new layers to the local store.
fn keep(local: &LocalLayers, track: &Track, done: &[Done]) -> Result<(), ConvertError> {
    for (&chain, layer) in track.chains.iter().zip(done) {
        layer.blob.put(&**local.store())?;
        let (digest, size) = layer.blob.id();
        let blob = Descriptor::new("", digest, size);
        local.record(chain, &blob, layer.diff_id, layer.target).map_err(ConvertError::Keep)?;
    }
    Ok(())
}

/// Makes config, descriptors and manifest of one format.
fn assemble(
    source: &StoredManifest,
    original: &Manifest,
    config: &ImageConfig,
    below: &Below,
    track: &Track,
    done: Vec<Done>,
    options: &ConvertOptions,
) -> ConvertedImage {
    let types = Types::of(track.format, options);
    let base = below.layers.iter();
    let diff_ids: Vec<Digest> = base
        .clone()
        .map(|layer| layer.diff_id)
        .chain(done.iter().map(|layer| layer.diff_id))
        .collect();
    let config = config.with_diff_ids(&diff_ids);
    let new = original.layers[below.covered..]
        .iter()
        .zip(&done)
        .map(|(source, layer)| layer_descriptor(source, layer, track.format, types));
    let descriptors = base.clone().map(|layer| layer.descriptor.clone()).chain(new).collect();
    let mut notes = original.annotations.clone();
    let lower = (1..=below.layers.len()).map(|count| below.chain(track.format, options, count));
    let chains: Vec<String> =
        lower.chain(track.chains.iter().copied()).map(|chain| chain.to_string()).collect();
    notes.insert(CHAINS.to_owned(), chains.join(","));
    if !below.layers.is_empty() {
        notes.insert(BASE.to_owned(), below.layers.len().to_string());
    }
    let manifest = write_manifest(source, notes, types, &config, descriptors, options);
    let layers = base.map(BaseLayer::blob).chain(done.into_iter().map(|layer| layer.blob));
    ConvertedImage { media_type: types.manifest, manifest, config, layers: layers.collect() }
}

impl BaseLayer {
    /// The blob in its present place.
    fn blob(&self) -> LayerBlob {
        LayerBlob::Known(KnownLayer {
            digest: self.descriptor.digest,
            size: self.descriptor.size,
            diff_id: self.diff_id,
            target: TargetEncoding::Gzip, // not used: the descriptor has the encoding
            from: self.from.clone(),
        })
    }
}

/// Media types of the result.
#[derive(Clone, Copy)]
struct Types {
    manifest: &'static str,
    config: &'static str,
    layer: &'static str,
    artifact: &'static str,
}

impl Types {
    fn of(format: ImageFormat, options: &ConvertOptions) -> Self {
        let oci = options.oci_types || options.referrer;
        let layer = match (format, oci) {
            (ImageFormat::Turbo, true) => media::OCI_LAYER_GZIP,
            (ImageFormat::Turbo, false) => media::DOCKER_LAYER_GZIP,
            (ImageFormat::Native, true) => media::OCI_LAYER,
            (ImageFormat::Native, false) => media::DOCKER_LAYER,
        };
        let artifact = format.artifact_type();
        if oci {
            Self { manifest: media::OCI_MANIFEST, config: media::OCI_CONFIG, layer, artifact }
        } else {
            Self { manifest: media::DOCKER_MANIFEST, config: media::DOCKER_CONFIG, layer, artifact }
        }
    }
}

/// The new layer's descriptor (spec turbooci 3.5 and 4).
fn layer_descriptor(
    source: &Descriptor,
    layer: &Done,
    format: ImageFormat,
    types: Types,
) -> Descriptor {
    let (digest, size) = layer.blob.id();
    let mut descriptor = Descriptor::new(types.layer, digest, size);
    let notes = match format {
        ImageFormat::Native => annotations::native(&digest, size),
        ImageFormat::Turbo => {
            let is_gzip = layer.target.is_annotated_gzip();
            let target_type = match (media::is_docker(&source.media_type), is_gzip) {
                (true, true) => media::DOCKER_LAYER_GZIP,
                (true, false) => media::DOCKER_LAYER,
                (false, true) => media::OCI_LAYER_GZIP,
                (false, false) => media::OCI_LAYER,
            };
            annotations::turbo(&digest, size, &source.digest, target_type)
        }
    };
    descriptor.annotations = notes.into_iter().collect();
    descriptor
}

/// The new manifest.
fn write_manifest(
    source: &StoredManifest,
    mut notes: BTreeMap<String, String>,
    types: Types,
    config: &[u8],
    layers: Vec<Descriptor>,
    options: &ConvertOptions,
) -> Vec<u8> {
    if let Some(origin) = &options.origin {
        notes.insert(annotations::ORIGIN.to_owned(), origin.clone());
    }
    let manifest = Manifest {
        schema_version: 2,
        media_type: Some(types.manifest.to_owned()),
        artifact_type: options.referrer.then(|| types.artifact.to_owned()),
        config: Descriptor::of(types.config, config),
        layers,
        subject: options.referrer.then(|| subject(source)),
        annotations: notes,
        other: serde_json::Map::new(),
    };
    manifest.to_bytes()
}

/// The descriptor of the source image.
pub(super) fn subject(source: &StoredManifest) -> Descriptor {
    Descriptor::new(&source.media_type, source.digest, source.bytes.len() as u64)
}
