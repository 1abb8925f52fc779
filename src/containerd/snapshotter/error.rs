//! Failures of a call, and of the start.

use std::io;
use std::path::PathBuf;

use thiserror::Error;
use tonic::{Code, Status};

use client::ClientError;
use source::failure::with_causes;

use super::chain::ChainError;
use super::config::SnapshotterConfigError;
use super::devices::DeviceError;
use super::filter::FilterError;
use super::layer::LayerError;
use super::socket::SocketError;
use super::store::RecordsError;
use crate::labels::LabelError;

/// Failure of a call. containerd decides by the code ([`SnapshotError::code`]), people by the text.
#[derive(Debug, Error)]
pub enum SnapshotError {
    /// No snapshot has this key or name.
    #[error("Snapshot {0:?} does not exist")]
    NotFound(String),
    /// The parent that the request names does not exist.
    #[error("Parent {0:?} does not exist")]
    ParentNotFound(String),
    /// The key or name is in use.
    #[error("Snapshot {0:?} exists already")]
    Exists(String),
    /// Prepare or View on a parent that is no committed snapshot.
    #[error("Parent {0:?} is not committed, and only committed snapshots have children")]
    ParentNotCommitted(String),
    /// A commit on a parent that is no committed snapshot.
    #[error("Parent {0:?} of the commit is not committed: commit it first")]
    CommitOnUncommitted(String),
    /// Mounts of a committed snapshot.
    #[error("Snapshot {0:?} is committed and has no mounts: make a view of it")]
    Committed(String),
    /// Commit of a view or of a committed snapshot.
    #[error("Snapshot {0:?} is not active, and only active snapshots are committed")]
    NotActive(String),
    /// A commit names another parent than the snapshot has.
    #[error(
        "Snapshot {key:?} has the parent {parent:?}, which a commit cannot change to {wanted:?}"
    )]
    WrongParent {
        /// Key of the snapshot.
        key: String,
        /// Its parent.
        parent: String,
        /// Parent that the request names.
        wanted: String,
    },
    /// Remove of a snapshot that is the parent of others.
    #[error("Cannot remove snapshot {name:?}: it is the parent of {children} others")]
    HasChildren {
        /// Name of the snapshot.
        name: String,
        /// Number of its children.
        children: usize,
    },
    /// Remove of a snapshot whose device or mount is in use.
    #[error("Cannot remove snapshot {name:?}: {why}")]
    InUse {
        /// Name of the snapshot.
        name: String,
        /// What uses it.
        why: String,
    },
    /// Update of a field that never changes.
    #[error("Field {0:?} of a snapshot cannot be updated: only labels can")]
    Immutable(String),
    /// A request that lacks something, or has too much of it.
    #[error("{0}")]
    Invalid(String),
    /// A filter that is not in containerd's language.
    #[error("Filter {filter:?} is not understood")]
    Filter {
        /// The filter.
        filter: String,
        /// Where it ends to be one.
        #[source]
        source: FilterError,
    },
    /// The time of the call is over. What it began goes on, if it can.
    #[error("{what} takes longer than the time of this call")]
    Deadline {
        /// What was waited for.
        what: String,
    },
    /// The store refuses.
    #[error("The store of snapshots refuses")]
    Store(#[from] RecordsError),
    /// A folder of a snapshot cannot be made, read or moved.
    #[error("Cannot {what} {path}", path = path.display())]
    Folder {
        /// Step that was tried.
        what: &'static str,
        /// Its object.
        path: PathBuf,
        /// Answer of the system.
        #[source]
        source: io::Error,
    },
    /// The content of a layer is of a kind that only a newer release knows.
    #[error(
        "Snapshot {name:?} has content of the kind {kind:?}, which this release of turbobd does not know: update it"
    )]
    UnknownContent {
        /// Name of the snapshot.
        name: String,
        /// The kind.
        kind: String,
    },
    /// The device of an image is not there.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The layers of an image cannot be shown together.
    #[error(transparent)]
    Chain(#[from] ChainError),
    /// A layer that was unpacked cannot be used.
    #[error(transparent)]
    Layer(#[from] LayerError),
    /// Labels of a container cannot be understood.
    #[error("The {0}")]
    Labels(#[from] LabelError),
    /// The owners of files cannot be mapped for a container.
    #[error("The files of the image cannot be shown to the container's users")]
    Owners(#[source] ClientError),
    /// The snapshotter ends.
    #[error("The snapshotter ends: repeat the call")]
    Ending,
}

impl SnapshotError {
    /// The code that containerd translates to its own kinds of errors (`errdefs`). Of Remove, any code but NotFound and
    /// FailedPrecondition ends containerd's garbage collection.
    #[must_use]
    pub fn code(&self) -> Code {
        match self {
            Self::NotFound(_) | Self::ParentNotFound(_) => Code::NotFound,
            Self::Exists(_) => Code::AlreadyExists,
            Self::CommitOnUncommitted(_)
            | Self::Committed(_)
            | Self::NotActive(_)
            | Self::HasChildren { .. }
            | Self::InUse { .. }
            | Self::Chain(_)
            | Self::Layer(_)
            | Self::UnknownContent { .. } => Code::FailedPrecondition,
            Self::ParentNotCommitted(_)
            | Self::WrongParent { .. }
            | Self::Immutable(_)
            | Self::Invalid(_)
            | Self::Labels(_)
            | Self::Filter { .. } => Code::InvalidArgument,
            Self::Deadline { .. } => Code::DeadlineExceeded,
            Self::Store(error) if error.is_full() => Code::ResourceExhausted,
            Self::Folder { source, .. } if is_full(source) => Code::ResourceExhausted,
            Self::Store(_) | Self::Folder { .. } | Self::Owners(_) => Code::Internal,
            Self::Device(_) | Self::Ending => Code::Unavailable,
        }
    }
}

/// True if a filesystem or a quota has no place left.
pub(super) fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

impl From<SnapshotError> for Status {
    fn from(error: SnapshotError) -> Self {
        Self::new(error.code(), with_causes(&error))
    }
}

/// Names the step and its object of a refusal of the system.
pub(super) fn step(
    what: &'static str,
    path: impl Into<PathBuf>,
) -> impl FnOnce(io::Error) -> SnapshotError {
    let path = path.into();
    move |source| SnapshotError::Folder { what, path, source }
}

/// The snapshotter does not start, or ends before it is told to.
#[derive(Debug, Error)]
pub enum SnapshotterError {
    /// The configuration.
    #[error(transparent)]
    Config(#[from] SnapshotterConfigError),
    /// The socket.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// The store of snapshots.
    #[error("The store of snapshots in {root} cannot be opened", root = root.display())]
    Store {
        /// Folder of the store.
        root: PathBuf,
        /// The reason.
        #[source]
        source: RecordsError,
    },
    /// The folder of snapshots.
    #[error("The folder of snapshots cannot be used")]
    Folders(#[from] SnapshotError),
    /// The root holds what another snapshotter has made.
    #[error(
        "{root} holds {found} of another snapshotter: remove its images and containers and move the folder away, or choose another --root",
        root = root.display()
    )]
    Foreign {
        /// The root.
        root: PathBuf,
        /// What was found there.
        found: String,
    },
    /// The root's path has a character that separates options of an overlay mount.
    #[error("The root {root} cannot be used: its path has a {character:?}, which separates options of a mount", root = root.display())]
    RootName {
        /// The root.
        root: PathBuf,
        /// The character.
        character: char,
    },
    /// Threads or the runtime cannot be started.
    #[error("Cannot {what}")]
    Start {
        /// Step that was tried.
        what: &'static str,
        /// Answer of the system.
        #[source]
        source: io::Error,
    },
    /// The service ended by itself.
    #[error("The service on the socket ended")]
    Served(#[source] tonic::transport::Error),
}
