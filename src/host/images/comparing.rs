//! The comparison of a found meta image with its layers, in the background.
//!
//! A tag is served at once with the meta image that its repository has beside it, and nothing has proved that one. So after
//! the background fill this host builds its own meta image from the layers: one pass of the scanner. Bytes that the tier of
//! encoded chunks has are read from there. A layer that is kept decoded only is fetched once more, in the class and at the
//! rate of the fill: its digest covers the encoded bytes. The two images are compared ([`convert::compare`]).
//!
//! * If they show the same, the image that was built is kept: from now on it is what this host uses, also for a digest.
//! * If not, a reader has been shown something that the layers do not contain. Nothing is swapped under it. **From then on
//!   every read of the device fails**, of every device of that meta image, and an attach that would share it is refused;
//!   a line in the log and a metric tell why. A new attach uses the image that was built here.
//!
//! A reference by digest shows the image that was built here, and a meta image that lies unsigned beside it is passed over. The
//! one is compared with the other as soon as it is open: a difference is a line in the log and counted, and the device is
//! right and goes on.
//!
//! What cannot be compared, because a layer cannot be read now, stays as it was and is counted. Without a background fill
//! (`download.enable`) there is no comparison of what a tag shows. One image is compared at a time, by a thread of the lowest
//! priority, and only while it is quiet ([`blobs::quiet`]): each piece of a layer waits for that, and with it all that is made of the piece.

use std::collections::HashMap;
use std::io::Read;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use parking_lot::Mutex;

use crate::readings::ComparisonCounters;
use blobs::cache::Cache;
use blobs::fetch::{Blob, Filling, WholeBlob};
use blobs::quiet::{Allowance, Demand};
use convert::Silent;
use convert::compare::{self, CompareError, Difference};
use convert::meta::{MetaError, MetaImages, PassedOver, Plain};
use disk::image::{ImageError, open_image};
use disk::{Disk, DiskParts};
use formats::oci::{Descriptor, Digest, Manifest};
use registry::store::{ImageStore, Selector, StoreError, StoredManifest};
use source::ByteSource;
use source::failure::with_causes;
use thiserror::Error;

/// Pause between two looks at the fill.
const PAUSE: Duration = Duration::from_millis(200);

/// Lowest priority of a thread: it runs when nothing else wants the processor.
const LOWEST: i32 = 19;

/// Meta images that nothing has proved.
pub enum Unproved {
    /// The one that a device shows.
    Shown(Box<ShownUnproved>),
    /// Others than the one that this host has built and a device shows.
    PassedOver {
        /// The store of the plain image.
        store: Arc<dyn ImageStore>,
        /// What was found.
        found: Vec<PassedOver>,
        /// The manifest of the built one.
        built: Box<Manifest>,
    },
}

/// A meta image that is used without proof, and the plain image that it was found for.
pub struct ShownUnproved {
    /// How this host builds its own.
    pub images: MetaImages,
    /// The store of the plain image.
    pub store: Arc<dyn ImageStore>,
    /// Its manifest as stored.
    pub stored: StoredManifest,
    /// The parsed manifest.
    pub plain: Manifest,
    /// The manifest that is used.
    pub found: Manifest,
}

/// The comparisons of a process.
#[derive(Default)]
pub(super) struct Comparisons {
    counters: Arc<ComparisonCounters>,
    turn: Arc<Mutex<()>>,
}

/// A comparison that was begun. Dropping it ends it.
pub struct Comparing(Arc<AtomicBool>);

impl Drop for Comparing {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

/// Why there is no result.
#[derive(Debug, Error)]
enum ComparisonFailure {
    #[error(transparent)]
    Build(#[from] MetaError),
    #[error(transparent)]
    Open(#[from] ImageError),
    #[error(transparent)]
    Compare(#[from] CompareError),
}

impl Comparisons {
    /// Counts so far.
    pub(super) fn counters(&self) -> &Arc<ComparisonCounters> {
        &self.counters
    }

    /// Begins the comparison of `disk` with its layers once `filling` has ended, or with what was passed over at once.
    /// `name` is the image's in messages.
    pub(super) fn begin(
        &self,
        name: &str,
        unproved: Unproved,
        disk: &Disk,
        filling: Option<&Arc<Filling>>,
    ) -> Option<Comparing> {
        let awaited = match unproved {
            Unproved::Shown(_) => Some(Arc::downgrade(filling?)),
            Unproved::PassedOver { .. } => None,
        };
        let stop = Arc::new(AtomicBool::new(false));
        let job = ComparisonJob {
            name: name.to_owned(),
            unproved,
            parts: Arc::downgrade(disk.parts()),
            cache: disk.cache().clone(),
            awaited,
            stop: stop.clone(),
            counters: self.counters.clone(),
            turn: self.turn.clone(),
        };
        let thread = std::thread::Builder::new().name("compare".into()).spawn(move || job.run());
        thread
            .inspect_err(|error| tracing::error!(%error, "A comparison cannot start: {name}"))
            .ok()?;
        Some(Comparing(stop))
    }
}

struct ComparisonJob {
    name: String,
    unproved: Unproved,
    /// The disk lives as long as its device, not as long as this thread.
    parts: Weak<DiskParts>,
    cache: Arc<Cache>,
    /// What must have ended before; `None`: nothing.
    awaited: Option<Weak<Filling>>,
    stop: Arc<AtomicBool>,
    counters: Arc<ComparisonCounters>,
    turn: Arc<Mutex<()>>,
}

impl ComparisonJob {
    fn run(self) {
        // Threads that are made for the conversion have the same priority.
        if let Err(error) = rustix::process::setpriority_process(None, LOWEST) {
            tracing::debug!(%error, "The priority of a comparison stays as it is");
        }
        if let Err(error) = sys::idle::yield_disk() {
            tracing::debug!(%error, "A comparison reads the disk in the class of other threads");
        }
        let turn = loop {
            let filling = self.awaited.as_ref().map(Weak::upgrade);
            let is_due = match &filling {
                Some(None) => return,
                Some(Some(filling)) => filling.ended(),
                None => true,
            };
            if self.stop.load(Ordering::Acquire) {
                return;
            }
            if is_due
                && self.cache.demand().allowance() > Allowance::Nothing
                && let Some(turn) = self.turn.try_lock()
            {
                break turn;
            }
            drop(filling);
            std::thread::sleep(PAUSE);
        };
        let Some(parts) = self.parts.upgrade() else { return };
        // Its own recorders: the comparison is no start of the image.
        let disk = Disk::of(parts, self.cache.clone());
        match &self.unproved {
            Unproved::Shown(shown) => self.tell_of_shown(self.compare(&disk, shown), &disk),
            Unproved::PassedOver { store, found, built } => {
                for one in found {
                    if self.stop.load(Ordering::Acquire) {
                        return;
                    }
                    let result = self.compare_passed_over(one, store, (&disk, built));
                    self.tell_of_passed_over(result, &one.digest);
                }
            }
        }
        drop(turn);
    }

    fn tell_of_passed_over(
        &self,
        result: Result<Vec<Difference>, ComparisonFailure>,
        digest: &Digest,
    ) {
        let name = &self.name;
        match result {
            Ok(differences) if differences.is_empty() => {
                self.counters.equal.add(1);
                tracing::info!(
                    "{name}: the meta image {digest}, which is not used, shows what its layers contain"
                );
            }
            Ok(differences) => {
                self.counters.different.add(1);
                let listed = listed(&differences);
                tracing::error!(
                    "{name}: the meta image {digest} was found for it and does not show what its layers contain. It is not \
                     used: {listed}"
                );
            }
            Err(error) => {
                self.counters.failed.add(1);
                let reason = with_causes(&error);
                tracing::warn!(
                    "{name}: the meta image {digest}, which is not used, could not be compared with its layers: {reason}"
                );
            }
        }
    }

    fn tell_of_shown(&self, result: Result<Vec<Difference>, ComparisonFailure>, disk: &Disk) {
        let name = &self.name;
        match result {
            _ if self.stop.load(Ordering::Acquire) => {}
            Ok(differences) if differences.is_empty() => {
                self.counters.equal.add(1);
                tracing::info!("{name}: its meta image shows what its layers contain");
            }
            Ok(differences) => {
                let listed = listed(&differences);
                self.counters.different.add(1);
                tracing::error!(
                    "{name}: its meta image does not show what its layers contain, and its reads fail from now on: {listed}"
                );
                disk.refuse_reads(&listed);
            }
            Err(error) => {
                self.counters.failed.add(1);
                let reason = with_causes(&error);
                tracing::warn!(
                    "{name}: its meta image could not be compared with its layers: {reason}"
                );
            }
        }
    }

    /// The differences between the image that this host built, which `disk` shows, and one that it passed over.
    fn compare_passed_over(
        &self,
        found: &PassedOver,
        store: &Arc<dyn ImageStore>,
        (disk, built): (&Disk, &Manifest),
    ) -> Result<Vec<Difference>, ComparisonFailure> {
        if layer_digests(&found.manifest) == layer_digests(built) {
            return Ok(Vec::new());
        }
        let opened = open_image(&*found.store, &**store, &found.manifest, self.cache.clone())?;
        Ok(compare::disks(&opened.disk, disk)?)
    }

    /// The differences between the image that this host builds and `disk`.
    fn compare(
        &self,
        disk: &Disk,
        shown: &ShownUnproved,
    ) -> Result<Vec<Difference>, ComparisonFailure> {
        let ShownUnproved { images, store, stored, plain, found } = shown;
        let blobs = disk.blobs().into_iter().zip(&plain.layers);
        let near = NearLayers {
            store: store.clone(),
            blobs: blobs.filter_map(|(blob, layer)| Some((layer.digest, blob?))).collect(),
            demand: self.cache.demand().clone(),
            stop: self.stop.clone(),
        };
        let plain = Plain {
            store,
            tag: None,
            pinned: true,
            index: None,
            indexes: &[],
            stored,
            manifest: plain,
        };
        let built = images.build_from(&plain, &near, &Silent)?;
        if layer_digests(&built.manifest) == layer_digests(found) {
            return Ok(Vec::new());
        }
        let expected =
            open_image(&*built.store, &**store, &built.manifest, self.cache.clone())?.disk;
        Ok(compare::disks(disk, &expected)?)
    }
}

/// Digests of a meta image's layers.
fn layer_digests(manifest: &Manifest) -> Vec<Digest> {
    manifest.layers.iter().map(|layer| layer.digest).collect()
}

/// Differences in one line.
fn listed(differences: &[Difference]) -> String {
    let listed: Vec<String> = differences.iter().map(ToString::to_string).collect();
    listed.join("; ")
}

/// The plain image's store, whose layers are read from this host where they are on it.
struct NearLayers {
    store: Arc<dyn ImageStore>,
    blobs: HashMap<Digest, Arc<Blob>>,
    demand: Arc<Demand>,
    stop: Arc<AtomicBool>,
}

impl ImageStore for NearLayers {
    fn name(&self) -> &str {
        self.store.name()
    }

    fn manifest(&self, selector: &Selector) -> Result<StoredManifest, StoreError> {
        self.store.manifest(selector)
    }

    fn open_blob(&self, blob: &Descriptor) -> Result<Box<dyn Read + Send>, StoreError> {
        match self.blobs.get(&blob.digest) {
            Some(near) => {
                Ok(Box::new(WholeBlob::new(near.clone(), self.demand.clone(), self.stop.clone())))
            }
            None => self.store.open_blob(blob),
        }
    }

    fn blob_source(
        &self,
        digest: &Digest,
        size: Option<u64>,
    ) -> Result<Arc<dyn ByteSource>, StoreError> {
        self.store.blob_source(digest, size)
    }

    fn put_blob(&self, bytes: &[u8]) -> Result<(), StoreError> {
        self.store.put_blob(bytes)
    }

    fn put_blob_from(
        &self,
        digest: &Digest,
        size: u64,
        open: &mut dyn FnMut() -> Result<Box<dyn Read + Send>, StoreError>,
    ) -> Result<(), StoreError> {
        self.store.put_blob_from(digest, size, open)
    }

    fn has_blob(&self, digest: &Digest, size: u64) -> Result<bool, StoreError> {
        self.store.has_blob(digest, size)
    }

    fn put_manifest(
        &self,
        tag: Option<&str>,
        media_type: &str,
        bytes: &[u8],
    ) -> Result<(), StoreError> {
        self.store.put_manifest(tag, media_type, bytes)
    }
}
