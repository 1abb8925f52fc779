//! Failures of the daemon, with their codes.

use std::io;
use std::path::PathBuf;

use client::error::code_of_io;
use client::{ClientError, Code, Fault};
use frontends::FrontError;
use frontends::looped::LoopedError;
use frontends::ublk::UblkError;
use thiserror::Error;

use super::OpenFailure;
use crate::failure::code_of;

/// Failure of the daemon, or of a request to it.
#[derive(Debug, Error)]
pub enum HostError {
    /// A file, a socket or a mount cannot be used.
    #[error("Cannot {what} {path}", path = path.display())]
    Step {
        /// Step that was tried.
        what: &'static str,
        /// Its object.
        path: PathBuf,
        /// Answer of the system.
        #[source]
        source: io::Error,
    },
    /// Two daemons cannot share a run directory.
    #[error("Another daemon serves {dir}: ask it, or stop it (turbobd daemon --stop)", dir = .0.display())]
    Running(PathBuf),
    /// The connection to a client, or the list of mounts, cannot be used.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// No device has this name.
    #[error("No device, mount point or image is called {0}: see turbobd ls")]
    NotFound(String),
    /// The device is in use.
    #[error("{device} is in use: unmount it first{mounted}", device = device.display())]
    Busy {
        /// The device.
        device: PathBuf,
        /// Its mount point in brackets, if known.
        mounted: String,
    },
    /// The image cannot be opened.
    #[error("Cannot open {image}")]
    Open {
        /// The image.
        image: String,
        /// Kind of the opener's failure.
        code: Code,
        /// The opener's error.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The ublk front end failed.
    #[error("Cannot serve {image} through ublk")]
    Ublk {
        /// The image.
        image: String,
        /// Reason of the front end.
        #[source]
        source: UblkError,
    },
    /// The loop front end failed.
    #[error("Cannot serve {image} through FUSE and loop")]
    Looped {
        /// The image.
        image: String,
        /// Reason of the front end.
        #[source]
        source: LoopedError,
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
        /// Reason of the disk.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// Reads of a device cannot be recorded, or no recording was begun.
    #[error("What is read of {device} is not recorded: {why}", device = device.display())]
    Recording {
        /// The device.
        device: PathBuf,
        /// Reason.
        why: &'static str,
    },
    /// The daemon is about to end.
    #[error("The daemon is ending")]
    Ending,
}

impl HostError {
    /// The opener's failure for `image`.
    pub(super) fn of_opener(image: String, failure: OpenFailure) -> Self {
        Self::Open { image, code: failure.code, source: failure.error }
    }

    /// The front end's failure for `image`.
    pub(super) fn of_front(image: String, error: FrontError) -> Self {
        match error {
            FrontError::Ublk(source) => Self::Ublk { image, source },
            FrontError::Looped(source) => Self::Looped { image, source },
        }
    }

    /// Kind of the failure.
    #[must_use]
    pub fn code(&self) -> Code {
        match self {
            Self::Step { source, .. } => code_of_io(source),
            Self::Running(_) | Self::Taken { .. } => Code::Exists,
            Self::Client(error) => error.code(),
            Self::NotFound(_) => Code::NotFound,
            Self::Busy { .. } => Code::Busy,
            Self::Open { code, .. } => *code,
            Self::Ublk { source, .. } => code_of(source),
            Self::Looped { source, .. } => code_of(source),
            Self::Snapshot { source, .. } => code_of(&**source),
            Self::Recording { .. } => Code::Unsupported,
            Self::Ending => Code::Unavailable,
        }
    }

    /// The fault that a client is told.
    #[must_use]
    pub fn fault(&self) -> Fault {
        Fault::of(self.code(), self)
    }
}

/// Names the step and its object of a refusal of the system.
pub(super) fn step(
    what: &'static str,
    path: impl Into<PathBuf>,
) -> impl FnOnce(io::Error) -> HostError {
    let path = path.into();
    move |source| HostError::Step { what, path, source }
}
