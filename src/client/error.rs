//! Codes and causes: what a program, and what a person, learns of a failure.

use std::io;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// Kind of a failure, for a program. A code that a later release adds is read as [`Code::Internal`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Code {
    /// The image, the device or the file does not exist.
    NotFound,
    /// The name is in use by another device.
    Exists,
    /// The device is in use; the same request succeeds once it is not.
    Busy,
    /// A registry or the daemon does not answer now; the same request may succeed later.
    Unavailable,
    /// A registry or the system refuses access.
    Denied,
    /// Bytes are not what their digest, checksum or format says.
    Damaged,
    /// Memory, disk space or another bounded resource is used up.
    Exhausted,
    /// The kernel, or this release, cannot do it.
    Unsupported,
    /// The request contradicts itself or cannot be understood.
    Invalid,
    /// Any other failure.
    #[serde(other)]
    Internal,
}

impl Code {
    /// True if the same request may succeed later without a change.
    #[must_use]
    pub fn may_pass(self) -> bool {
        matches!(self, Self::Busy | Self::Unavailable | Self::Exhausted)
    }
}

/// A failure that the daemon reports.
#[derive(Clone, Debug, PartialEq, Eq, Error, Serialize, Deserialize)]
#[error("{}", self.sentence())]
pub struct Fault {
    /// Kind of the failure.
    pub code: Code,
    /// What failed, and on what.
    pub message: String,
    /// Reasons, from the nearest to the root.
    #[serde(default)]
    pub causes: Vec<String>,
}

impl Fault {
    /// The fault of an error: its text, and the texts of its causes.
    #[must_use]
    pub fn of(code: Code, error: &dyn std::error::Error) -> Self {
        let mut causes = source::failure::parts(error);
        let message = causes.remove(0);
        Self { code, message, causes }
    }

    /// Message and causes in one line.
    fn sentence(&self) -> String {
        let parts: Vec<&str> =
            std::iter::once(&self.message).chain(&self.causes).map(String::as_str).collect();
        parts.join(": ")
    }
}

/// Failure of a request to the daemon.
#[derive(Debug, Error)]
pub enum ClientError {
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
    /// Something is mounted at the mount point: a second mount would hide it.
    #[error("{dir} is a mount point already, of {what}: unmount it, or name another folder", dir = dir.display())]
    MountPointTaken {
        /// The mount point.
        dir: PathBuf,
        /// File system and source of what is mounted there.
        what: String,
    },
    /// The run directory takes no socket: its filesystem is a share that holds none, or its path is too long for one.
    #[error(
        "Cannot {what} {socket} (TURBOBD_RUN_DIR names another run directory: take a short path on a local filesystem)",
        socket = socket.display()
    )]
    Socket {
        /// Step that was tried.
        what: &'static str,
        /// Path of the socket.
        socket: PathBuf,
        /// Answer of the system.
        #[source]
        source: io::Error,
    },
    /// A started daemon ended before it was ready.
    #[error("The daemon ended at its start; its log {log} says: {tail}", log = log.display())]
    NotStarted {
        /// Log of the daemon.
        log: PathBuf,
        /// Its last lines.
        tail: String,
    },
    /// Client and daemon have no version of the protocol in common.
    #[error(
        "The daemon speaks versions {oldest} to {newest} of the protocol, and this program {ours}: restart the daemon (turbobd daemon --stop)"
    )]
    Version {
        /// Oldest version of the daemon.
        oldest: u32,
        /// Newest version of the daemon.
        newest: u32,
        /// Version of this program.
        ours: u32,
    },
    /// A line on the socket is no message.
    #[error("The other side of {path} sent what is no message: {what}", path = path.display())]
    Protocol {
        /// The socket.
        path: PathBuf,
        /// The line, and the reason.
        what: String,
    },
    /// The connection ended before the answer.
    #[error("The daemon closed the connection without an answer: its log is beside {socket}", socket = .0.display())]
    NoAnswer(PathBuf),
    /// The daemon lives and does not answer.
    #[error("The daemon at {socket} has not answered for {seconds} s: {state}", socket = socket.display())]
    Hung {
        /// The socket.
        socket: PathBuf,
        /// Seconds of the wait.
        seconds: u64,
        /// The state of its process, and what to do.
        state: String,
    },
    /// The daemon refused.
    #[error(transparent)]
    Refused(#[from] Fault),
    /// No device has this name.
    #[error("No device, mount point or image is called {0}: see turbobd ls")]
    NotFound(String),
    /// Several devices have this name.
    #[error("{what} is attached as {devices}: name one of them")]
    Ambiguous {
        /// The name.
        what: String,
        /// The devices.
        devices: String,
    },
    /// A mount is in use.
    #[error("{place} is in use: unmount it first (files there are open)", place = .0.display())]
    Busy(PathBuf),
    /// A device is still in use after the wait for it. Nothing was changed.
    #[error("{device} is still in use after {seconds} s, and stays as it was: {holders}", device = device.display())]
    InUse {
        /// The device.
        device: PathBuf,
        /// Seconds of the wait.
        seconds: u64,
        /// The processes that hold it.
        holders: String,
    },
}

impl ClientError {
    /// Kind of the failure.
    #[must_use]
    pub fn code(&self) -> Code {
        match self {
            Self::Step { source, .. } | Self::Socket { source, .. } => code_of_io(source),
            Self::NotStarted { .. } | Self::NoAnswer(_) | Self::Hung { .. } => Code::Unavailable,
            Self::Version { .. } => Code::Unsupported,
            Self::Protocol { .. } => Code::Internal,
            Self::Refused(fault) => fault.code,
            Self::NotFound(_) => Code::NotFound,
            Self::Ambiguous { .. } => Code::Invalid,
            Self::Busy(_) | Self::InUse { .. } | Self::MountPointTaken { .. } => Code::Busy,
        }
    }
}

/// Kind of a refusal of the system.
#[must_use]
pub fn code_of_io(error: &io::Error) -> Code {
    match error.kind() {
        io::ErrorKind::NotFound => Code::NotFound,
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => Code::Denied,
        io::ErrorKind::ResourceBusy => Code::Busy,
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::OutOfMemory => {
            Code::Exhausted
        }
        io::ErrorKind::Unsupported => Code::Unsupported,
        io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof => Code::Damaged,
        io::ErrorKind::ConnectionRefused
        | io::ErrorKind::ConnectionReset
        | io::ErrorKind::TimedOut
        | io::ErrorKind::HostUnreachable
        | io::ErrorKind::NetworkUnreachable => Code::Unavailable,
        _ => Code::Internal,
    }
}

/// True if a read or write of a connection has taken longer than its bound.
pub(crate) fn is_late(error: &ClientError) -> bool {
    let late = [io::ErrorKind::WouldBlock, io::ErrorKind::TimedOut];
    matches!(error, ClientError::Step { source, .. } if late.contains(&source.kind()))
}

/// Names the step and its object of a refusal of the system.
pub fn step(what: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> ClientError {
    let path = path.into();
    move |source| ClientError::Step { what, path, source }
}
