//! Identity of converted layers: the *chain*.
//!
//! A converted layer contains the blocks that its layer changed on the disk of the layers below. So it can be
//! reused only if the same source layer lies on the same lower layers and is converted in the same way. A
//! [`ChainId`] identifies exactly that:
//!
//! ```text
//! chain(0)     = SHA-256(recipe)              format, layout version, disk size, compression …
//! chain(n + 1) = SHA-256(chain(n), digest of source layer n)
//! ```
//!
//! If the lower layers were not converted here, the chain begins with `SHA-256(recipe, their digests)`
//! ([`ChainId::over`]). Output is deterministic, so equal chains mean equal blobs.
//!
//! A converted manifest lists the chains of its layers in an annotation ([`CHAINS`]). [`KnownLayers`]
//! collects them from such manifests (the image under the target tag, and other named images), and from a
//! [local store](LocalLayers): an image layout with one small record per chain.

use std::collections::HashMap;
use std::fmt;
use std::fs;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::base::BaseImage;
use super::layer::TargetEncoding;
use super::{ConvertOptions, ImageFormat};
use formats::oci::annotations::LayerKind;
use formats::oci::digest::DigestError;
use formats::oci::{Descriptor, Digest, Document, ImageConfig, Manifest};
use formats::zfile::Algo;
use registry::store::{ImageStore, LayoutStore, Selector, StoreError, StoredManifest};

/// Annotation of a converted manifest: the chains of its layers, lowest first, separated by commas.
pub const CHAINS: &str = "dev.turbobd.chains";

/// Version of a conversion's output. It is raised whenever equal layers would give other bytes, so that no
/// layer is put on lower ones that it does not match.
const LAYOUT: u32 = 1;

/// Version of the output for TurboOCI layers: 2 since uncompressed layers have a sidecar too.
const TURBO_LAYOUT: u32 = 2;

/// Greatest depth of nested indexes that is read.
const MAX_DEPTH: usize = 8;

/// Identifies a converted layer by its sources.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ChainId(Digest);

impl ChainId {
    /// The chain below the lowest layer of a conversion to `format`.
    #[must_use]
    pub fn root(format: ImageFormat, options: &ConvertOptions) -> Self {
        Self::over(format, options, &[])
    }

    /// The chain above layers that were not converted here, lowest first.
    #[must_use]
    pub fn over(format: ImageFormat, options: &ConvertOptions, lower: &[Digest]) -> Self {
        let mut hasher = Sha256::new();
        hasher.update(recipe(format, options));
        for digest in lower {
            hasher.update(format!("over {digest}\n"));
        }
        Self(Digest::from_hasher(hasher))
    }

    /// The chain of the layer that is made of `source` on top of this one.
    #[must_use]
    pub fn push(&self, source: &Digest) -> Self {
        let mut hasher = Sha256::new();
        hasher.update(format!("{}\n{source}\n", self.0));
        Self(Digest::from_hasher(hasher))
    }

    /// The chains of all these source layers, lowest first.
    pub fn of_layers<'d>(self, sources: impl IntoIterator<Item = &'d Digest>) -> Vec<Self> {
        let mut chain = self;
        sources
            .into_iter()
            .map(|source| {
                chain = chain.push(source);
                chain
            })
            .collect()
    }
}

impl fmt::Display for ChainId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for ChainId {
    type Err = DigestError;

    fn from_str(text: &str) -> Result<Self, DigestError> {
        text.parse().map(Self)
    }
}

/// All inputs, besides the layers, that the bytes of a converted layer depend on.
fn recipe(format: ImageFormat, options: &ConvertOptions) -> String {
    let disk = options.disk_size.get();
    match (format, options.native) {
        (ImageFormat::Native, Some(zfile)) => {
            let algo = match zfile.algo {
                Algo::Lz4 => "lz4".to_owned(),
                Algo::Zstd => format!("zstd-{}", zfile.level),
            };
            let (block, verify) = (zfile.block_size, zfile.verify);
            format!("overlaybd layout={LAYOUT} disk={disk} {algo} block={block} verify={verify}\n")
        }
        (ImageFormat::Native, None) => format!("overlaybd layout={LAYOUT} disk={disk}\n"),
        (ImageFormat::Turbo, _) => {
            format!("turboOCI layout={TURBO_LAYOUT} disk={disk} span={}\n", options.span.get())
        }
    }
}

/// A layer that was converted before.
#[derive(Clone)]
pub struct KnownLayer {
    /// Digest of the converted blob.
    pub digest: Digest,
    /// Its length in bytes.
    pub size: u64,
    /// Its `diff_id`.
    pub diff_id: Digest,
    /// Compression of the source layer, as far as the converted one records it.
    pub target: TargetEncoding,
    /// A store with the blob.
    pub from: Arc<dyn ImageStore>,
}

/// Layers that were converted before, by their chains.
#[derive(Default)]
pub struct KnownLayers {
    by_chain: HashMap<ChainId, KnownLayer>,
    bases: Vec<BaseImage>,
    local: Option<LocalLayers>,
}

impl KnownLayers {
    /// Only the layers of `local`.
    #[must_use]
    pub fn with_local(local: Option<LocalLayers>) -> Self {
        Self { local, ..Self::default() }
    }

    /// Adds the layers of a converted image, and of all images below an index. An image that was not
    /// converted by this program adds none. Returns the number of new layers.
    ///
    /// # Errors
    /// [`StoreError`] if there is no such image, or it cannot be read.
    pub fn learn(
        &mut self,
        store: &Arc<dyn ImageStore>,
        selector: &Selector,
    ) -> Result<usize, StoreError> {
        let before = self.by_chain.len();
        self.learn_from(store, &store.manifest(selector)?, MAX_DEPTH)?;
        Ok(self.by_chain.len() - before)
    }

    /// Puts new layers on top of those of this image, or of one of the images below this index. Any converter
    /// may have made it.
    ///
    /// # Errors
    /// [`StoreError`] if there is no such image, or it cannot be read.
    pub fn build_on(
        &mut self,
        store: &Arc<dyn ImageStore>,
        selector: &Selector,
    ) -> Result<(), StoreError> {
        let bases = &mut self.bases;
        each_manifest(store, &store.manifest(selector)?, MAX_DEPTH, &mut |manifest| {
            bases.push(BaseImage::asked(store.clone(), manifest));
            Ok(())
        })
    }

    /// Images with layers that may lie below new ones.
    pub(super) fn bases(&self) -> &[BaseImage] {
        &self.bases
    }

    fn learn_from(
        &mut self,
        store: &Arc<dyn ImageStore>,
        stored: &StoredManifest,
        depth: usize,
    ) -> Result<(), StoreError> {
        each_manifest(store, stored, depth, &mut |manifest| {
            self.learn_manifest(store, &manifest)?;
            let made_here = manifest.annotations.contains_key(CHAINS);
            self.bases.push(BaseImage::found(store.clone(), manifest, made_here));
            Ok(())
        })
    }

    fn learn_manifest(
        &mut self,
        store: &Arc<dyn ImageStore>,
        manifest: &Manifest,
    ) -> Result<(), StoreError> {
        let Some(listed) = manifest.annotations.get(CHAINS) else { return Ok(()) };
        let chains: Vec<ChainId> = listed.split(',').filter_map(|id| id.parse().ok()).collect();
        let config = store.read_blob(&manifest.config)?;
        let Ok(config) = ImageConfig::parse(&config) else { return Ok(()) };
        let (layers, ids) = (&manifest.layers, config.diff_ids());
        if chains.len() != layers.len() || ids.len() != layers.len() {
            return Ok(()); // edited after its conversion: its layers cannot be used
        }
        for ((&chain, layer), &diff_id) in chains.iter().zip(layers).zip(ids) {
            let target = match LayerKind::of(layer) {
                Ok(LayerKind::Turbo { is_gzip: false, .. }) => TargetEncoding::Plain,
                Ok(LayerKind::Turbo { .. } | LayerKind::Native) => TargetEncoding::Gzip,
                _ => continue,
            };
            let (digest, size, from) = (layer.digest, layer.size, store.clone());
            let known = KnownLayer { digest, size, diff_id, target, from };
            self.by_chain.entry(chain).or_insert(known);
        }
        Ok(())
    }

    /// The layer of this chain, if its blob is still present.
    #[must_use]
    pub fn get(&self, chain: ChainId) -> Option<KnownLayer> {
        let there = |known: &KnownLayer| {
            known.from.has_blob(&known.digest, known.size).unwrap_or_else(|error| {
                tracing::warn!(%error, "The search for a converted layer failed; the layer is converted again");
                false
            })
        };
        let known = self.by_chain.get(&chain).filter(|known| there(known)).cloned();
        known.or_else(|| self.local.as_ref()?.get(chain).filter(there))
    }

    /// The local store, to keep new layers in.
    #[must_use]
    pub fn local(&self) -> Option<&LocalLayers> {
        self.local.as_ref()
    }
}

/// Passes on this manifest, or all manifests below this index.
fn each_manifest(
    store: &Arc<dyn ImageStore>,
    stored: &StoredManifest,
    depth: usize,
    take: &mut dyn FnMut(Manifest) -> Result<(), StoreError>,
) -> Result<(), StoreError> {
    match Document::parse(&stored.bytes, Some(&stored.media_type)) {
        Ok(Document::Manifest(manifest)) => take(manifest),
        Ok(Document::Index(index)) if depth > 0 => {
            for entry in index.images() {
                let child = store.manifest(&Selector::Digest(entry.digest))?;
                each_manifest(store, &child, depth - 1, take)?;
            }
            Ok(())
        }
        _ => Ok(()),
    }
}

/// Record of a layer in the local store.
#[derive(Serialize, Deserialize)]
struct LayerRecord {
    digest: String,
    size: u64,
    diff_id: String,
    gzip: bool,
}

/// Converted layers kept on this host: an image layout with a folder `chains` of records.
#[derive(Clone)]
pub struct LocalLayers {
    chains: PathBuf,
    store: Arc<dyn ImageStore>,
}

impl LocalLayers {
    /// Opens the store in `dir`, or makes an empty one.
    ///
    /// # Errors
    /// [`StoreError`] if `dir` holds other files.
    pub fn open_or_create(dir: &Path) -> Result<Self, StoreError> {
        Ok(Self { chains: dir.join("chains"), store: Arc::new(LayoutStore::open_or_create(dir)?) })
    }

    fn path(&self, chain: ChainId) -> PathBuf {
        self.chains.join(chain.0.hex())
    }

    /// A record that cannot be read is ignored: the layer is converted again, and the record is replaced.
    fn get(&self, chain: ChainId) -> Option<KnownLayer> {
        let entry: LayerRecord = serde_json::from_slice(&fs::read(self.path(chain)).ok()?).ok()?;
        let target = if entry.gzip { TargetEncoding::Gzip } else { TargetEncoding::Plain };
        Some(KnownLayer {
            digest: entry.digest.parse().ok()?,
            size: entry.size,
            diff_id: entry.diff_id.parse().ok()?,
            target,
            from: self.store.clone(),
        })
    }

    /// The image layout, for the blobs.
    #[must_use]
    pub fn store(&self) -> &Arc<dyn ImageStore> {
        &self.store
    }

    /// Records that `layer`, with its blob in [`store`](Self::store), is the layer of this chain.
    ///
    /// # Errors
    /// The errors of the filesystem.
    pub fn record(
        &self,
        chain: ChainId,
        layer: &Descriptor,
        diff_id: Digest,
        target: TargetEncoding,
    ) -> io::Result<()> {
        fs::create_dir_all(&self.chains)?;
        let entry = LayerRecord {
            digest: layer.digest.to_string(),
            size: layer.size,
            diff_id: diff_id.to_string(),
            gzip: target.is_annotated_gzip(),
        };
        let mut file = tempfile::NamedTempFile::new_in(&self.chains)?;
        file.write_all(&serde_json::to_vec(&entry)?)?;
        file.persist(self.path(chain))?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use formats::units::Bytes;
    use formats::zfile;

    #[test]
    fn a_chain_depends_on_format_recipe_lower_layers_and_order() {
        let options =
            ConvertOptions { native: Some(zfile::Options::default()), ..ConvertOptions::default() };
        let (a, b) = (Digest::of(b"a"), Digest::of(b"b"));
        let larger = ConvertOptions { disk_size: Bytes(128 << 30), ..options.clone() };
        let blocks = zfile::Options { block_size: 16384, ..zfile::Options::default() };
        let other = ConvertOptions { native: Some(blocks), ..options.clone() };
        let root = |format, options| ChainId::root(format, options);
        let all = [
            root(ImageFormat::Turbo, &options).push(&a),
            root(ImageFormat::Native, &options).push(&a),
            root(ImageFormat::Native, &larger).push(&a),
            root(ImageFormat::Native, &other).push(&a),
            root(ImageFormat::Native, &options).push(&b),
            root(ImageFormat::Native, &options).push(&a).push(&b),
            root(ImageFormat::Native, &options).push(&b).push(&a),
            ChainId::over(ImageFormat::Native, &options, &[a]).push(&b),
        ];
        let distinct: std::collections::HashSet<ChainId> = all.into_iter().collect();
        assert_eq!(distinct.len(), all.len());
        // An option that affects one format leaves the other's layers usable.
        assert_eq!(root(ImageFormat::Turbo, &other), root(ImageFormat::Turbo, &options));
        let chains = root(ImageFormat::Native, &options).of_layers([&a, &b]);
        assert_eq!(chains, [all[1], all[5]]);
        assert_eq!(chains[0].to_string().parse(), Ok(chains[0]));
    }
}
