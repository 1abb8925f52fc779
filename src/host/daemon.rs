//! The daemon: one process that serves all devices of this host, and a socket for requests to it.
//!
//! `turbobd attach` asks the daemon for a device and mounts it itself; `turbobd detach` unmounts and asks for
//! the removal. The daemon never mounts: it lives in a mount namespace of its own, entered before it opens
//! anything. A server in the same namespace as the users of its devices cannot end cleanly, because the
//! unmount at its end needs reads that the ended server can no longer answer.
//!
//! A daemon that a client started ([`DaemonClient::connect_or_spawn`](client::DaemonClient::connect_or_spawn)) ends [`IDLE`] after its last device and
//! connection are gone; one that was started by hand or by an init system stays. SIGTERM, SIGINT and `turbobd
//! daemon --stop` end it too, but never while a device is mounted or otherwise in use: then it reports these
//! devices and continues to serve.
//!
//! An [`ImageOpener`] turns an image into a volume.
//!
//! * `error`     failures, with their codes
//! * `table`     the devices
//! * `waits`     the reads of a device that wait, and their deadlines; `alarm` wakes at these
//! * `outage`    what the log says of a device that stalls or fails
//! * [`audit`]   a line for each download and each read that waited, if the configuration wants it
//! * [`view`]    an image's traffic, and the sources of its bytes
//! * `snapshots` upstream's interface for a snapshot of a device in use
//! * `journal`   records of the devices, for the next daemon; `recovery` takes their devices back
//! * [`keeper`]  restarts a daemon that a client started and that was killed
//! * [`orphans`] devices whose daemon is dead
//! * `server`    accepts, answers, ends
//! * `copies`    mounts of other daemons in the namespace that this one enters
//! * `signals`   waits for SIGTERM and SIGINT
//!
//! [`IDLE`]: server::IDLE

mod alarm;
pub mod audit;
mod copies;
mod error;
mod journal;
pub mod keeper;
pub mod orphans;
mod outage;
mod recovery;
pub mod server;
pub mod signals;
mod snapshots;
mod table;
pub mod view;
mod waits;

use std::error::Error;
use std::sync::Arc;

use client::{Code, DeviceSpec};
use formats::oci::Digest;
use serde::{Deserialize, Serialize};

use crate::metrics::Page;
use crate::metrics::upstream::Totals;
pub use crate::readings::{AuditCounters, DeviceReading, IoCounters, WaitReading};
pub use audit::Audit;
use blobs::trace::Recorders;
use disk::volume::Volume;
pub use error::HostError;
pub use server::{DaemonOptions, run};
pub use table::DeviceTable;
pub use view::{DiskView, ImageView};
pub use waits::ReadPolicy;

/// An image that can be served.
pub struct ServableImage {
    /// The disk.
    pub volume: Arc<dyn Volume>,
    /// Name of the image in lists.
    pub name: String,
    /// Other facts about it, queried at each listing.
    pub view: Arc<dyn ImageView>,
    /// Recorders of its reads, if they can be recorded.
    pub recorders: Option<Arc<Recorders>>,
    /// Interface for snapshots, if it can be written.
    pub snapshots: Option<Arc<dyn Snapshots>>,
    /// What tells the disk from another one, if that is known: a later daemon shows nothing else in its place.
    pub identity: Option<DiskIdentity>,
}

/// What tells the disk of an image from another one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskIdentity {
    /// Manifest that the name of the image meant; `None`: the name is none of a manifest.
    pub manifest: Option<Digest>,
    /// Digest over what decides the contents of the disk.
    pub disk: Digest,
}

/// A disk that can be continued on a new writable layer.
pub trait Snapshots: Send + Sync {
    /// Continues on the layer that the configuration at `config` names, which becomes the device's layer.
    ///
    /// # Errors
    /// Returns the text for the client; the disk is then unchanged.
    fn take(&self, config: &std::path::Path) -> Result<(), Box<dyn Error + Send + Sync>>;
}

/// Failure of an opener, for the client.
#[derive(Debug)]
pub struct OpenFailure {
    /// Kind of the failure.
    pub code: Code,
    /// The error, with its causes.
    pub error: Box<dyn Error + Send + Sync>,
}

impl<E: Error + Send + Sync + 'static> From<E> for OpenFailure {
    /// The code is that of the first cause that has one ([`code_of`](crate::failure::code_of)).
    fn from(error: E) -> Self {
        Self { code: crate::failure::code_of(&error), error: Box::new(error) }
    }
}

/// Turns a spec into a volume.
pub trait ImageOpener: Send + Sync {
    /// Opens an image. May take as long as a network takes; runs on the connection's thread.
    ///
    /// # Errors
    /// The failure for the client.
    fn open(&self, spec: &DeviceSpec) -> Result<ServableImage, OpenFailure>;

    /// The audit log, if there is one; requested after the first image was opened.
    fn audit(&self) -> Option<Arc<Audit>> {
        None
    }

    /// Adds the metrics that all images share (a cache, its threads) to a page of metrics.
    fn observe(&self, page: &mut Page) {
        let _ = page;
    }

    /// Traffic from registries so far: requests and bytes.
    fn downloaded(&self) -> Totals {
        Totals::default()
    }

    /// The longest request in microseconds since the last call.
    fn take_longest_download(&self) -> u64 {
        0
    }
}

impl<F> ImageOpener for F
where
    F: Fn(&DeviceSpec) -> Result<ServableImage, OpenFailure> + Send + Sync,
{
    fn open(&self, spec: &DeviceSpec) -> Result<ServableImage, OpenFailure> {
        self(spec)
    }
}
