//! The devices of this host: one process that serves them all, and a socket to ask it.
//!
//! `turbobd attach` asks the daemon for a device and mounts it itself; `turbobd detach` unmounts and
//! asks for the removal. The daemon never mounts: it lives in a mount namespace of its own, entered
//! before it opens anything. A server that shares a namespace with the users of its devices cannot
//! end cleanly, as the unmount at its end needs reads that nobody serves any more.
//!
//! A daemon that a client started ([`Client::connect_or_spawn`]) ends [`IDLE`] after its last device
//! and connection are gone; one that was started by hand or by an init system stays. SIGTERM,
//! SIGINT and `turbobd daemon --stop` end it too, but never under a device that is mounted or
//! otherwise claimed: such devices are named, and it serves on.
//!
//! How an image becomes a volume is the business of an [`ImageOpener`].
//!
//! * `protocol`  what goes over the socket: one JSON object a line
//! * `table`     the devices
//! * `waits`     the reads of a device that wait, and how long they may; `alarm` looks after them
//! * [`audit`]   a line for each download and each read that waited, if that is wanted
//! * `trim`      gives back what opening an image has left in the heap
//! * [`view`]    what is known of an image's traffic and of where its bytes are
//! * `snapshots` upstream's interface for making one of a device in use
//! * `server`    accepts, answers, ends
//! * `client`    finds or starts a daemon and asks it
//! * `extents`   where a file of a mounted image lies on its device
//! * `mounts`    ext4 mounts of a device, in the caller's namespace
//! * `signals`   waits for SIGTERM and SIGINT
//!
//! [`IDLE`]: server::IDLE

mod alarm;
pub mod audit;
mod client;
pub mod extents;
pub mod mounts;
pub mod protocol;
pub mod server;
pub mod signals;
mod snapshots;
mod table;
mod trim;
pub mod view;
mod waits;

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use thiserror::Error;

use crate::metrics::Page;
use crate::metrics::upstream::Totals;
use crate::trace::Recorders;
use crate::volume::Volume;
pub use audit::{Audit, AuditCounters};
pub use client::Client;
pub use protocol::{AttachRequest, DeviceRecord, Frontend, find};
pub use server::{DaemonOptions, run};
pub use table::{DeviceReading, Table};
pub use view::{DiskView, ImageView, IoCounters};
pub use waits::{ReadPolicy, WaitReading};

/// An image that can be served.
pub struct Opened {
    /// The disk.
    pub volume: Arc<dyn Volume>,
    /// How the image is listed.
    pub name: String,
    /// What else is known of it, asked for at each listing.
    pub view: Arc<dyn ImageView>,
    /// Who watches what is touched of it, if that can be watched.
    pub recorders: Option<Arc<Recorders>>,
    /// Who makes snapshots of it, if it can be written.
    pub snapshots: Option<Arc<dyn Snapshots>>,
}

/// A disk that can be continued on a new writable layer.
pub trait Snapshots: Send + Sync {
    /// Continues on the layer that the configuration at `config` names, which becomes the device's.
    ///
    /// # Errors
    /// Whatever the client should read; the disk is then as it was.
    fn take(
        &self,
        config: &std::path::Path,
    ) -> Result<(), Box<dyn std::error::Error + Send + Sync>>;
}

/// Makes a volume of what a client asked for.
pub trait ImageOpener: Send + Sync {
    /// Opens an image. May take as long as a network takes; runs on the connection's thread.
    ///
    /// # Errors
    /// Whatever the client should read.
    fn open(
        &self,
        request: &AttachRequest,
    ) -> Result<Opened, Box<dyn std::error::Error + Send + Sync>>;

    /// The audit log, if there is one; asked for after the first image was opened.
    fn audit(&self) -> Option<Arc<Audit>> {
        None
    }

    /// Puts what all images share (a cache, its threads) onto a page of metrics.
    fn observe(&self, page: &mut Page) {
        let _ = page;
    }

    /// What came from registries so far: requests and bytes.
    fn downloaded(&self) -> Totals {
        Totals::default()
    }

    /// The longest request in microseconds since this was last asked for.
    fn take_longest_download(&self) -> u64 {
        0
    }
}

impl<F> ImageOpener for F
where
    F: Fn(&AttachRequest) -> Result<Opened, Box<dyn std::error::Error + Send + Sync>> + Send + Sync,
{
    fn open(
        &self,
        request: &AttachRequest,
    ) -> Result<Opened, Box<dyn std::error::Error + Send + Sync>> {
        self(request)
    }
}

/// Why the daemon or a request to it failed.
#[derive(Debug, Error)]
pub enum DaemonError {
    /// Something with a file, a socket or a mount.
    #[error("Cannot {what} {path}", path = path.display())]
    Step {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// Two daemons cannot share a run directory.
    #[error("Another daemon serves {dir}: ask it, or stop it (turbobd daemon --stop)", dir = .0.display())]
    Running(PathBuf),
    /// A started daemon ended before it was ready.
    #[error("The daemon ended at its start; its log {log} says: {tail}", log = log.display())]
    NotStarted {
        /// The daemon's log.
        log: PathBuf,
        /// The last lines of it.
        tail: String,
    },
    /// Client and daemon are of different releases.
    #[error(
        "The daemon speaks version {theirs} of the protocol, this program {ours}: restart it (turbobd daemon --stop)"
    )]
    Version {
        /// Of the daemon.
        theirs: u32,
        /// Of this program.
        ours: u32,
    },
    /// A line on the socket was no message.
    #[error("The other side of {path} sent what is no message: {what}", path = path.display())]
    Protocol {
        /// The socket.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// The connection ended before the answer.
    #[error("The daemon closed the connection without an answer: its log is beside {socket}", socket = .0.display())]
    NoAnswer(PathBuf),
    /// The daemon's own error.
    #[error("{message}")]
    Remote {
        /// Its message, with its causes.
        message: String,
    },
    /// No device answers to this name.
    #[error("No device, mount point or image is called {0}: see turbobd ls")]
    NotFound(String),
    /// Several devices answer to this name.
    #[error("{what} is attached as {devices}: name one of them")]
    Ambiguous {
        /// The name.
        what: String,
        /// The devices.
        devices: String,
    },
    /// Somebody uses the device.
    #[error("{device} is in use: unmount it first{mounted}", device = device.display())]
    Busy {
        /// The device.
        device: PathBuf,
        /// Where, if known.
        mounted: String,
    },
    /// The opener's error.
    #[error("Cannot open {image}")]
    Open {
        /// The image.
        image: String,
        /// The opener's error.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The ublk front end failed.
    #[error("Cannot serve {image} through ublk")]
    Ublk {
        /// The image.
        image: String,
        /// Why.
        #[source]
        source: crate::ublk::UblkError,
    },
    /// The loop front end failed.
    #[error("Cannot serve {image} through FUSE and loop")]
    Looped {
        /// The image.
        image: String,
        /// Why.
        #[source]
        source: crate::looped::LoopedError,
    },
    /// Another device has this name.
    #[error("{device} is called {name} already: detach it, or choose another --dev-id", device = device.display())]
    Taken {
        /// The name.
        name: String,
        /// The device.
        device: PathBuf,
    },
    /// No snapshot was made.
    #[error("There is no snapshot of {device}", device = device.display())]
    Snapshot {
        /// The device.
        device: PathBuf,
        /// Why not.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// What is read of a device cannot be recorded, or was not begun to be.
    #[error("What is read of {device} is not recorded: {why}", device = device.display())]
    Recording {
        /// The device.
        device: PathBuf,
        /// Why not.
        why: &'static str,
    },
    /// The daemon is about to end.
    #[error("The daemon is ending")]
    Ending,
}

/// An error with its causes in one line.
#[must_use]
pub fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

fn step(what: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> DaemonError {
    let path = path.into();
    move |source| DaemonError::Step { what, path, source }
}
