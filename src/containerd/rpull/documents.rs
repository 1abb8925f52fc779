//! Index, manifest and config of an image: read, verified, and written into the content store.

use std::sync::Arc;

use formats::oci::manifest::DOCUMENT_LIMIT;
use formats::oci::{
    Descriptor, Digest, Document, ImageConfig, ManifestError, Platform, RegistryName,
};
use registry::store::{ImageStore, Selector, StoreError};

use super::content::ContentStore;
use super::error::RpullError;
use super::labels;
use crate::labels::Labels;

/// The documents of an image.
pub(super) struct Documents {
    /// What the image's name stands for: an index or a manifest.
    pub(super) target: Descriptor,
    /// Digest of the manifest of this platform.
    pub(super) manifest: Digest,
    /// Layers, lowest first.
    pub(super) layers: Vec<Descriptor>,
    /// Digests of their tars.
    pub(super) tars: Vec<Digest>,
    /// Their chain IDs.
    pub(super) chains: Vec<Digest>,
    config: Digest,
    /// All documents with their labels, each before its parts.
    written: Vec<(Descriptor, Vec<u8>, Labels)>,
}

impl Documents {
    /// Asks the registry what the name stands for, and reads what is below it. Documents that containerd has are not fetched.
    pub(super) async fn read(
        image: &RegistryName,
        store: &Arc<dyn ImageStore>,
        content: &ContentStore,
    ) -> Result<Self, RpullError> {
        let name = image.to_string();
        let refused = |source| RpullError::Document { name: name.clone(), source };
        let selector = match (&image.digest, &image.tag) {
            (Some(digest), _) => Selector::Digest(*digest),
            (None, Some(tag)) => Selector::Tag(tag.clone()),
            (None, None) => Selector::Default,
        };
        let asked = store.clone();
        let top = blocking(move || asked.manifest(&selector)).await??;
        let target = Descriptor::of(&top.media_type, &top.bytes);
        let mut written = Vec::new();
        let (mut place, mut bytes) = (target.clone(), top.bytes);
        let mut document = Document::parse(&bytes, Some(&place.media_type)).map_err(refused)?;
        if let Document::Index(index) = &document {
            let below = index.select(&Platform::host()).map_err(refused)?.clone();
            written.push((place, bytes, labels::children(None, &index.manifests)));
            bytes = read(&below, store, content, &name, |store, place| {
                store.manifest(&Selector::Digest(place.digest)).map(|manifest| manifest.bytes)
            })
            .await?;
            place = below;
            document = Document::parse(&bytes, Some(&place.media_type)).map_err(refused)?;
        }
        let Document::Manifest(manifest) = document else {
            return Err(RpullError::Nested { name, digest: place.digest });
        };
        let (config, layers) = (manifest.config, manifest.layers);
        written.push((place.clone(), bytes, labels::children(Some(&config), &layers)));
        let bytes =
            read(&config, store, content, &name, |store, place| store.read_blob(place)).await?;
        let parsed = ImageConfig::parse(&bytes).map_err(|source| RpullError::Config {
            name: name.clone(),
            digest: config.digest,
            source,
        })?;
        let tars = parsed.diff_ids().to_vec();
        if tars.len() != layers.len() {
            return Err(RpullError::LayerCount { name, layers: layers.len(), listed: tars.len() });
        }
        let chains = labels::chain_ids(&tars);
        let digest = config.digest;
        written.push((config, bytes, Labels::new()));
        Ok(Self { target, manifest: place.digest, layers, tars, chains, config: digest, written })
    }

    /// Writes all of them, each before its parts: what is written has a parent then, or belongs to the lease.
    pub(super) async fn write(&self, content: &ContentStore) -> Result<(), RpullError> {
        for (place, bytes, labels) in &self.written {
            content.put(place, bytes.clone(), labels.clone()).await?;
        }
        Ok(())
    }

    /// True if containerd has all documents, and the config keeps the snapshots.
    pub(super) async fn are_written(
        &self,
        content: &ContentStore,
        snapshotter: &str,
    ) -> Result<bool, RpullError> {
        let keeps = self.chains.last().map(|top| labels::snapshots(snapshotter, *top));
        for (place, _, labels) in &self.written {
            let Some(known) = content.info(&place.digest).await? else { return Ok(false) };
            let also = keeps.iter().flatten().filter(|_| place.digest == self.config);
            if labels.iter().chain(also).any(|(key, value)| known.labels.get(key) != Some(value)) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Keeps the snapshots as long as the config. An image without layers has none.
    pub(super) async fn keep_snapshots(
        &self,
        content: &ContentStore,
        snapshotter: &str,
    ) -> Result<(), RpullError> {
        match self.chains.last() {
            Some(top) => content.label(&self.config, labels::snapshots(snapshotter, *top)).await,
            None => Ok(()),
        }
    }
}

/// A document, from containerd if it has it, else from the registry by `fetch`, which verifies it.
async fn read(
    place: &Descriptor,
    store: &Arc<dyn ImageStore>,
    content: &ContentStore,
    name: &str,
    fetch: fn(&dyn ImageStore, &Descriptor) -> Result<Vec<u8>, StoreError>,
) -> Result<Vec<u8>, RpullError> {
    if place.size > DOCUMENT_LIMIT {
        let source = ManifestError::Large(place.size);
        return Err(RpullError::Document { name: name.to_owned(), source });
    }
    if let Some(bytes) = content.read(&place.digest, DOCUMENT_LIMIT).await? {
        return Ok(bytes);
    }
    let (store, place) = (store.clone(), place.clone());
    Ok(blocking(move || fetch(&*store, &place)).await??)
}

/// Runs a call of the registry in a thread of its own.
async fn blocking<T: Send + 'static>(
    call: impl FnOnce() -> T + Send + 'static,
) -> Result<T, RpullError> {
    tokio::task::spawn_blocking(call).await.map_err(|error| RpullError::Start(error.into()))
}
