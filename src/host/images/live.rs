//! The images that devices have open, so that another device of one opens nothing.

use std::collections::HashMap;
use std::num::NonZeroUsize;
use std::sync::{Arc, Weak};

use parking_lot::Mutex;

use client::RegistrySpec;
use disk::image::LayerInfo;
use disk::{Disk, DiskParts};
use formats::oci::Digest;
use formats::trace::Trace;

/// What is open, by what it is and how it is reached.
#[derive(Default)]
pub(super) struct LiveImages {
    known: Mutex<HashMap<LiveName, Live>>,
}

/// An image, and the way it is reached.
#[derive(PartialEq, Eq, Hash)]
pub(super) struct LiveName {
    /// Digest of the manifest.
    pub(super) digest: Digest,
    /// Name of the manifest's store.
    pub(super) store: String,
    /// Name of the store of the original layers.
    pub(super) targets: String,
    /// Way to the registry.
    pub(super) way: RegistrySpec,
    /// Place of the original layers that the command names, which is reached as the registry is.
    pub(super) origin: Option<String>,
    /// Number of its lowest layers that are open; `None`: all.
    pub(super) layers: Option<NonZeroUsize>,
}

/// An image as long as a device has it.
#[derive(Clone)]
pub(super) struct Live {
    parts: Weak<DiskParts>,
    layers: Vec<LayerInfo>,
    trace: Option<Trace>,
}

/// An image that is open.
pub(super) struct FoundImage {
    pub(super) parts: Arc<DiskParts>,
    pub(super) layers: Vec<LayerInfo>,
    pub(super) trace: Option<Trace>,
}

impl LiveImages {
    /// The image of this name, if a device has it.
    pub(super) fn find(&self, name: &LiveName) -> Option<FoundImage> {
        let known = self.known.lock();
        let Live { parts, layers, trace } = known.get(name)?;
        let parts = parts.upgrade()?;
        Some(FoundImage { parts, layers: layers.clone(), trace: trace.clone() })
    }

    /// A device has this image now.
    pub(super) fn note(
        &self,
        name: LiveName,
        disk: &Disk,
        layers: &[LayerInfo],
        trace: Option<&Trace>,
    ) {
        let parts = Arc::downgrade(disk.parts());
        let live = Live { parts, layers: layers.to_vec(), trace: trace.cloned() };
        let mut known = self.known.lock();
        known.retain(|_, live| live.parts.strong_count() > 0);
        known.insert(name, live);
    }
}
