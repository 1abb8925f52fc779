//! Blobs of layers on their way into the content store, a few at a time.
//!
//! Layers are unpacked in their order, but fetched ahead: while containerd unpacks one, the next ones arrive.

use std::collections::HashMap;
use std::io::Read;
use std::sync::{Arc, Once};

use tokio::sync::Semaphore;
use tokio::task::JoinHandle;

use formats::oci::{Descriptor, Digest};
use registry::store::ImageStore;

use super::content::ContentStore;
use super::error::RpullError;
use super::{PullEvent, Report};
use crate::labels::Labels;

/// Blobs that are fetched at once: as many as containerd's own pulls fetch.
const AT_ONCE: usize = 3;

/// Fetches that were begun. They end with this value.
pub(super) struct Fetches {
    content: ContentStore,
    store: Arc<dyn ImageStore>,
    report: Report,
    turns: Arc<Semaphore>,
    begun: HashMap<Digest, Fetching>,
}

/// A fetch: the number of bytes that came from the registry. `None` when it was waited for.
struct Fetching(Option<JoinHandle<Result<u64, RpullError>>>);

impl Fetching {
    /// Waits for its end; 0 if that was done before.
    async fn end(&mut self) -> Result<u64, RpullError> {
        let Some(handle) = &mut self.0 else { return Ok(0) };
        let fetched = handle.await.map_err(|error| RpullError::Start(error.into()))?;
        self.0 = None;
        fetched
    }
}

impl Drop for Fetching {
    fn drop(&mut self) {
        self.0.iter().for_each(JoinHandle::abort);
    }
}

impl Fetches {
    pub(super) fn new(content: ContentStore, store: Arc<dyn ImageStore>, report: Report) -> Self {
        let turns = Arc::new(Semaphore::new(AT_ONCE));
        Self { content, store, report, turns, begun: HashMap::new() }
    }

    /// Begins to fetch a layer, unless that was done before. Its turn comes in the order of these calls.
    pub(super) fn begin(&mut self, layer: &Descriptor) {
        if self.begun.contains_key(&layer.digest) {
            return;
        }
        let fetch = fetch(
            layer.clone(),
            self.content.clone(),
            self.store.clone(),
            self.report.clone(),
            self.turns.clone(),
        );
        self.begun.insert(layer.digest, Fetching(Some(tokio::spawn(fetch))));
    }

    /// Waits until the layer is in the content store; returns the number of bytes that came from the registry.
    pub(super) async fn finish(&mut self, layer: &Descriptor) -> Result<u64, RpullError> {
        self.begin(layer);
        let Some(fetching) = self.begun.get_mut(&layer.digest) else { return Ok(0) };
        fetching.end().await
    }

    /// Waits for all that were begun; returns the number of bytes that came from the registry and were not returned yet.
    pub(super) async fn finish_all(&mut self) -> Result<u64, RpullError> {
        let mut fetched = 0;
        for fetching in self.begun.values_mut() {
            fetched += fetching.end().await?;
        }
        Ok(fetched)
    }
}

async fn fetch(
    layer: Descriptor,
    content: ContentStore,
    store: Arc<dyn ImageStore>,
    report: Report,
    turns: Arc<Semaphore>,
) -> Result<u64, RpullError> {
    // The semaphore is never closed.
    let _turn = turns.acquire().await;
    let digest = layer.digest;
    let (blob, told) = (layer.clone(), report.clone());
    let first = Arc::new(Once::new());
    let open = move || -> Result<Box<dyn Read + Send>, _> {
        first.call_once(|| told(PullEvent::Begun(digest, blob.size)));
        store.open_blob(&blob)
    };
    let written = |bytes| report(PullEvent::Advanced(digest, bytes));
    let was_written = content.put_from(&layer, Labels::new(), open, written).await?;
    report(PullEvent::Done(digest));
    Ok(if was_written { layer.size } else { 0 })
}
