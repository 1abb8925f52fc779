//! containerd's socket, and the headers of each call.
//!
//! containerd knows the caller's namespace and lease by two headers. Every call has a deadline, but for those that move or
//! unpack a layer: they take as long as they take, and a signal ends them.

use std::error::Error;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Status};

use super::error::{CallError, RpullError};
use crate::api::content::content_client::ContentClient;
use crate::api::diff::diff_client::DiffClient;
use crate::api::images::images_client::ImagesClient;
use crate::api::leases::leases_client::LeasesClient;
use crate::api::snapshots::StatSnapshotRequest;
use crate::api::snapshots::snapshots_client::SnapshotsClient;
use crate::api::version::version_client::VersionClient;

/// Header with the namespace (`pkg/namespaces` of containerd).
const NAMESPACE: &str = "containerd-namespace";
/// Header with the lease (`core/leases` of containerd).
const LEASE: &str = "containerd-lease";

/// Deadline of a connection. A containerd that lives accepts at once.
const CONNECT_DEADLINE: Duration = Duration::from_secs(5);
/// Deadline of an ordinary call: a snapshotter may take 10 s, and containerd may collect garbage before it.
const CALL_DEADLINE: Duration = Duration::from_secs(60);

/// A connection to a containerd. Clones share it.
#[derive(Clone)]
pub(super) struct ContainerdClient {
    channel: Channel,
    socket: PathBuf,
    namespace: MetadataValue<Ascii>,
    lease: Option<MetadataValue<Ascii>>,
}

impl ContainerdClient {
    /// Connects to the socket, and asks for the version: what answers is a containerd.
    pub(super) async fn open(socket: &Path, namespace: &str) -> Result<Self, RpullError> {
        let header = namespace.parse::<MetadataValue<Ascii>>();
        let named = header.ok().filter(|_| !namespace.is_empty());
        let namespace =
            named.ok_or_else(|| RpullError::Namespace { name: namespace.to_owned() })?;
        let unreachable = |source: io::Error| match source.kind() {
            io::ErrorKind::PermissionDenied => {
                RpullError::Forbidden { socket: socket.to_owned(), source }
            }
            _ => RpullError::NoContainerd { socket: socket.to_owned(), source },
        };
        let path = socket
            .to_str()
            .ok_or_else(|| unreachable(io::Error::other("the path is not UTF-8 text")))?;
        let endpoint = Endpoint::from_shared(format!("unix://{path}"))
            .map_err(|error| unreachable(io::Error::other(error)))?
            .connect_timeout(CONNECT_DEADLINE);
        // The deadline above is that of the connection alone, this one is for what a wrong program does with it.
        let channel = tokio::time::timeout(CONNECT_DEADLINE, endpoint.connect()).await;
        let channel = channel
            .map_err(|_| unreachable(io::ErrorKind::TimedOut.into()))?
            .map_err(|error| unreachable(cause(&error)))?;
        let connection = Self { channel, socket: socket.to_owned(), namespace, lease: None };
        let mut request = connection.request(());
        request.set_timeout(CONNECT_DEADLINE);
        let version = VersionClient::new(connection.channel.clone()).version(request).await;
        let version =
            version.map_err(|status| unreachable(io::Error::other(CallError::of(&status))))?;
        tracing::info!(
            "containerd {} answers at {}",
            version.into_inner().version,
            socket.display()
        );
        Ok(connection)
    }

    /// The connection with each call under this lease.
    pub(super) fn with_lease(&self, id: &str) -> Result<Self, RpullError> {
        let lease = id.parse().map_err(|_| RpullError::Namespace { name: id.to_owned() })?;
        Ok(Self { lease: Some(lease), ..self.clone() })
    }

    /// Asks the snapshotter for anything: the error of one that is missing says what to do.
    pub(super) async fn need_snapshotter(&self, name: &str) -> Result<(), RpullError> {
        let stat = StatSnapshotRequest { snapshotter: name.to_owned(), key: "none".to_owned() };
        match self.snapshots().stat(self.request(stat)).await {
            Err(status) if status.code() != Code::NotFound => {
                Err(self.snapshot_failed(name, "ask the snapshotter".to_owned(), &status))
            }
            _ => Ok(()),
        }
    }

    /// A request with the headers and a deadline.
    pub(super) fn request<T>(&self, message: T) -> Request<T> {
        let mut request = self.long_request(message);
        request.set_timeout(CALL_DEADLINE);
        request
    }

    /// A request with the headers, which takes as long as it takes.
    pub(super) fn long_request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        let headers = request.metadata_mut();
        headers.insert(NAMESPACE, self.namespace.clone());
        if let Some(lease) = &self.lease {
            headers.insert(LEASE, lease.clone());
        }
        request
    }

    /// The failure of a call; `what` follows "cannot".
    pub(super) fn failed(&self, what: String, status: &Status) -> RpullError {
        RpullError::Call { socket: self.socket.clone(), what, source: CallError::of(status) }
    }

    /// The failure of a call to the snapshotter.
    pub(super) fn snapshot_failed(&self, name: &str, what: String, status: &Status) -> RpullError {
        let (socket, name) = (self.socket.clone(), name.to_owned());
        let source = CallError::of(status);
        match status.code() {
            // The text of containerd 1.6 to 2.4 for a name without a plugin.
            Code::InvalidArgument if status.message().contains("not loaded") => {
                RpullError::NoSnapshotter { socket, name }
            }
            Code::Unavailable => RpullError::SnapshotterDown { name, source },
            _ => RpullError::Call { socket, what, source },
        }
    }

    pub(super) fn content(&self) -> ContentClient<Channel> {
        ContentClient::new(self.channel.clone())
    }

    pub(super) fn diff(&self) -> DiffClient<Channel> {
        DiffClient::new(self.channel.clone())
    }

    pub(super) fn images(&self) -> ImagesClient<Channel> {
        ImagesClient::new(self.channel.clone())
    }

    pub(super) fn leases(&self) -> LeasesClient<Channel> {
        LeasesClient::new(self.channel.clone())
    }

    pub(super) fn snapshots(&self) -> SnapshotsClient<Channel> {
        SnapshotsClient::new(self.channel.clone())
    }
}

/// The system's error below the transport's, which says nothing of its own.
fn cause(error: &tonic::transport::Error) -> io::Error {
    let mut next: Option<&(dyn Error + 'static)> = Some(error);
    let mut text = error.to_string();
    while let Some(error) = next {
        if let Some(code) = error.downcast_ref::<io::Error>().and_then(io::Error::raw_os_error) {
            return io::Error::from_raw_os_error(code);
        }
        text = error.to_string();
        next = error.source();
    }
    io::Error::other(text)
}
