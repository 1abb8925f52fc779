//! gRPC: requests to calls, failures to codes, and the time that a call may take.
//!
//! Stat, Update's mask and List are answered on the runtime's thread, from memory. All other calls may block: each has a
//! thread of its own for its time. Its deadline is the caller's (`grpc-timeout`, which CRI passes on), at most [`LONGEST`]. When it is over
//! the caller gets an answer, and the thread goes on: what it does is a transaction, whole or not at all.

use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio_stream::wrappers::UnixListenerStream;
use tonic::metadata::MetadataMap;
use tonic::{Request, Response, Status};

use crate::api::snapshots::snapshots_server::{Snapshots, SnapshotsServer};
use crate::api::snapshots::{
    CleanupRequest, CommitSnapshotRequest, ListSnapshotsRequest, ListSnapshotsResponse,
    MountsRequest, MountsResponse, PrepareSnapshotRequest, PrepareSnapshotResponse,
    RemoveSnapshotRequest, StatSnapshotRequest, StatSnapshotResponse, UpdateSnapshotRequest,
    UpdateSnapshotResponse, UsageRequest, UsageResponse, ViewSnapshotRequest, ViewSnapshotResponse,
};

use super::calls::{NewSnapshot, Snapshotter, named};
use super::config::SnapshotterConfig;
use super::error::{SnapshotError, SnapshotterError};
use super::socket::{self, ServiceSocket};
use super::store::record::Record;
use super::store::rules::NewCommit;

/// Longest time of a call. containerd holds locks while it waits, and gives a pull no deadline at all.
pub const LONGEST: Duration = Duration::from_secs(10);

/// Part of the caller's time that is left for the answer to arrive.
const FOR_THE_ANSWER: Duration = Duration::from_millis(100);

/// Time after a signal in which calls under way may end.
const LAST_CALLS: Duration = Duration::from_secs(11);

/// Largest message, in bytes: containerd's own limit.
const LARGEST_MESSAGE: usize = 16 << 20;

/// Snapshots in one message of List, as containerd's own service sends them.
const LIST_BLOCK: usize = 100;

/// Pause between two looks for idle devices.
const TIDY_PAUSE: Duration = Duration::from_secs(5);

/// Most threads for calls that block; more calls wait for one.
const CALL_THREADS: usize = 128;

/// Runs the snapshotter until SIGTERM or SIGINT. Mounts stay.
///
/// # Errors
/// Returns [`SnapshotterError`].
pub fn run(config: SnapshotterConfig) -> Result<(), SnapshotterError> {
    let start = |what| move |source| SnapshotterError::Start { what, source };
    let address = config.address.clone();
    let snapshotter = Arc::new(Snapshotter::open(config)?);
    let socket = ServiceSocket::take(&address)?;
    keep_tidy(&snapshotter).map_err(start("start the thread of the devices"))?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .enable_time()
        .max_blocking_threads(CALL_THREADS)
        .thread_name("call")
        .thread_stack_size(512 << 10)
        .build()
        .map_err(start("start the runtime"))?;
    let served = runtime.block_on(async {
        let listener = socket.listener().map_err(start("use the socket"))?;
        listener.set_nonblocking(true).map_err(start("use the socket"))?;
        let listener =
            tokio::net::UnixListener::from_std(listener).map_err(start("use the socket"))?;
        let told = signals().map_err(start("wait for signals"))?;
        let (end, ended) = tokio::sync::oneshot::channel();
        let ended = async { _ = ended.await };
        let mut serving = std::pin::pin!(serve(snapshotter.clone(), listener, ended));
        socket::tell_ready();
        tracing::info!("The snapshotter answers on {}", address.display());
        tokio::select! {
            served = &mut serving => served,
            () = told => {
                socket::tell_stopping();
                tracing::info!("The snapshotter ends; mounts stay");
                let _ = end.send(());
                tokio::time::timeout(LAST_CALLS, serving).await.unwrap_or(Ok(()))
            }
        }
    });
    // A call that still waits for something is left alone: it is a transaction, whole or not at all.
    runtime.shutdown_background();
    served
}

/// Starts the thread that removes idle devices. It ends with the process.
fn keep_tidy(snapshotter: &Arc<Snapshotter>) -> std::io::Result<()> {
    let snapshotter = Arc::downgrade(snapshotter);
    let work = move || {
        if let Some(snapshotter) = snapshotter.upgrade() {
            snapshotter.sweep_devices();
        }
        while let Some(snapshotter) = snapshotter.upgrade() {
            snapshotter.tidy();
            drop(snapshotter);
            std::thread::sleep(TIDY_PAUSE);
        }
    };
    std::thread::Builder::new().name("tidy".to_owned()).spawn(work).map(drop)
}

/// Ends at the first SIGTERM or SIGINT.
fn signals() -> std::io::Result<impl Future<Output = ()>> {
    use tokio::signal::unix::{SignalKind, signal};
    let (mut term, mut int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    Ok(async move {
        tokio::select! {
            _ = term.recv() => {}
            _ = int.recv() => {}
        }
    })
}

/// Answers calls on `listener` until `ended`; calls under way are answered first.
///
/// # Errors
/// Returns [`SnapshotterError::Served`].
pub async fn serve(
    snapshotter: Arc<Snapshotter>,
    listener: tokio::net::UnixListener,
    ended: impl Future<Output = ()>,
) -> Result<(), SnapshotterError> {
    let service = SnapshotsServer::new(SnapshotsService { snapshotter })
        .max_decoding_message_size(LARGEST_MESSAGE)
        .max_encoding_message_size(LARGEST_MESSAGE);
    tonic::transport::Server::builder()
        .serve_with_incoming_shutdown(service, UnixListenerStream::new(listener), ended)
        .await
        .map_err(SnapshotterError::Served)
}

/// The service on a [`Snapshotter`].
#[derive(Clone, Debug)]
struct SnapshotsService {
    snapshotter: Arc<Snapshotter>,
}

impl SnapshotsService {
    /// Makes a call that may block, on a thread of its own, until its deadline.
    async fn call<T: Send + 'static, R: Send + 'static>(
        &self,
        what: &'static str,
        request: Request<T>,
        call: impl FnOnce(&Snapshotter, T, Instant) -> Result<R, SnapshotError> + Send + 'static,
    ) -> Result<Response<R>, Status> {
        let until = deadline(request.metadata());
        let snapshotter = self.snapshotter.clone();
        let message = request.into_inner();
        let start = Instant::now();
        let work = tokio::task::spawn_blocking(move || {
            let result = call(&snapshotter, message, until);
            if start.elapsed() > LONGEST {
                tracing::warn!(
                    "{what} has taken {:?}, longer than its caller waits",
                    start.elapsed()
                );
            }
            result
        });
        let result = match tokio::time::timeout_at(until.into(), work).await {
            Ok(Ok(result)) => result,
            // The runtime ends, or the call has panicked, which the log has told.
            Ok(Err(_)) => Err(SnapshotError::Ending),
            Err(_) => Err(SnapshotError::Deadline { what: what.to_owned() }),
        };
        tracing::debug!("{what}: {:?} after {:?}", result.as_ref().err(), start.elapsed());
        result.map(Response::new).map_err(Status::from)
    }
}

/// Refuses a request that does not name its snapshotter, as containerd's own service does.
fn snapshotter_of(name: &str) -> Result<(), SnapshotError> {
    if name.is_empty() {
        return Err(SnapshotError::Invalid("The request names no snapshotter".to_owned()));
    }
    Ok(())
}

#[tonic::async_trait]
impl Snapshots for SnapshotsService {
    async fn prepare(
        &self,
        request: Request<PrepareSnapshotRequest>,
    ) -> Result<Response<PrepareSnapshotResponse>, Status> {
        self.call("Prepare", request, |snapshotter, request, until| {
            snapshotter_of(&request.snapshotter)?;
            let PrepareSnapshotRequest { snapshotter: name, key, parent, labels } = request;
            let new = NewSnapshot { snapshotter: name, key, parent, labels };
            Ok(PrepareSnapshotResponse { mounts: snapshotter.prepare(&new, until)? })
        })
        .await
    }

    async fn view(
        &self,
        request: Request<ViewSnapshotRequest>,
    ) -> Result<Response<ViewSnapshotResponse>, Status> {
        self.call("View", request, |snapshotter, request, until| {
            snapshotter_of(&request.snapshotter)?;
            let ViewSnapshotRequest { snapshotter: name, key, parent, labels } = request;
            let new = NewSnapshot { snapshotter: name, key, parent, labels };
            Ok(ViewSnapshotResponse { mounts: snapshotter.view(&new, until)? })
        })
        .await
    }

    async fn mounts(
        &self,
        request: Request<MountsRequest>,
    ) -> Result<Response<MountsResponse>, Status> {
        self.call("Mounts", request, |snapshotter, request, until| {
            snapshotter_of(&request.snapshotter)?;
            let mounts = snapshotter.mounts(&request.snapshotter, &request.key, until)?;
            Ok(MountsResponse { mounts })
        })
        .await
    }

    async fn commit(
        &self,
        request: Request<CommitSnapshotRequest>,
    ) -> Result<Response<()>, Status> {
        self.call("Commit", request, |snapshotter, request, _| {
            snapshotter_of(&request.snapshotter)?;
            snapshotter.commit(&NewCommit {
                snapshotter: &request.snapshotter,
                key: &request.key,
                name: &request.name,
                labels: &request.labels,
                parent: named(&request.parent),
            })
        })
        .await
    }

    async fn remove(
        &self,
        request: Request<RemoveSnapshotRequest>,
    ) -> Result<Response<()>, Status> {
        self.call("Remove", request, |snapshotter, request, _| {
            snapshotter_of(&request.snapshotter)?;
            snapshotter.remove(&request.snapshotter, &request.key)
        })
        .await
    }

    async fn stat(
        &self,
        request: Request<StatSnapshotRequest>,
    ) -> Result<Response<StatSnapshotResponse>, Status> {
        let request = request.into_inner();
        snapshotter_of(&request.snapshotter)?;
        let record = self.snapshotter.stat(&request.snapshotter, &request.key)?;
        Ok(Response::new(StatSnapshotResponse { info: Some(record.info()) }))
    }

    async fn update(
        &self,
        request: Request<UpdateSnapshotRequest>,
    ) -> Result<Response<UpdateSnapshotResponse>, Status> {
        self.call("Update", request, |snapshotter, request, _| {
            snapshotter_of(&request.snapshotter)?;
            let info = request.info.ok_or_else(|| {
                SnapshotError::Invalid("The request names no snapshot".to_owned())
            })?;
            let mask = request.update_mask.unwrap_or_default().paths;
            let record =
                snapshotter.update(&request.snapshotter, &info.name, &info.labels, &mask)?;
            Ok(UpdateSnapshotResponse { info: Some(record.info()) })
        })
        .await
    }

    type ListStream = ListBlocks;

    async fn list(
        &self,
        request: Request<ListSnapshotsRequest>,
    ) -> Result<Response<ListBlocks>, Status> {
        let request = request.into_inner();
        snapshotter_of(&request.snapshotter)?;
        let records = self.snapshotter.list(&request.snapshotter, &request.filters)?;
        Ok(Response::new(ListBlocks { records: records.into_iter() }))
    }

    async fn usage(
        &self,
        request: Request<UsageRequest>,
    ) -> Result<Response<UsageResponse>, Status> {
        self.call("Usage", request, |snapshotter, request, until| {
            snapshotter_of(&request.snapshotter)?;
            let usage = snapshotter.usage(&request.snapshotter, &request.key, until)?;
            let number = |number| i64::try_from(number).unwrap_or(i64::MAX);
            Ok(UsageResponse { size: number(usage.bytes), inodes: number(usage.inodes) })
        })
        .await
    }

    async fn cleanup(&self, request: Request<CleanupRequest>) -> Result<Response<()>, Status> {
        self.call("Cleanup", request, |snapshotter, _, until| {
            snapshotter.cleanup(until - FOR_THE_ANSWER);
            Ok(())
        })
        .await
    }
}

/// Answer of List: the state of one moment, in messages of [`LIST_BLOCK`].
#[derive(Debug)]
pub struct ListBlocks {
    records: std::vec::IntoIter<Arc<Record>>,
}

impl tokio_stream::Stream for ListBlocks {
    type Item = Result<ListSnapshotsResponse, Status>;

    fn poll_next(
        mut self: std::pin::Pin<&mut Self>,
        _: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Self::Item>> {
        let block: Vec<_> =
            self.records.by_ref().take(LIST_BLOCK).map(|record| record.info()).collect();
        let block = (!block.is_empty()).then_some(Ok(ListSnapshotsResponse { info: block }));
        std::task::Poll::Ready(block)
    }
}

/// End of a call: the caller's deadline with some time for the answer, at most [`LONGEST`] from now.
fn deadline(metadata: &MetadataMap) -> Instant {
    let stated = metadata.get("grpc-timeout").and_then(|value| timeout(value.to_str().ok()?));
    let longest = stated.map_or(LONGEST, |stated| {
        LONGEST.min(stated.saturating_sub(FOR_THE_ANSWER.min(stated / 10)))
    });
    Instant::now() + longest
}

/// The header `grpc-timeout`: at most eight digits, and a unit.
fn timeout(text: &str) -> Option<Duration> {
    let unit = text.chars().last()?;
    let digits = &text[..text.len() - unit.len_utf8()];
    if digits.is_empty() || digits.len() > 8 || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let number: u64 = digits.parse().ok()?;
    Some(match unit {
        'H' => Duration::from_secs(number * 3600),
        'M' => Duration::from_secs(number * 60),
        'S' => Duration::from_secs(number),
        'm' => Duration::from_millis(number),
        'u' => Duration::from_micros(number),
        'n' => Duration::from_nanos(number),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_callers_deadline_is_kept_with_time_for_the_answer_and_ten_seconds_are_the_longest() {
        let of = |value: Option<&'static str>| {
            let mut metadata = MetadataMap::new();
            if let Some(value) = value {
                metadata.insert("grpc-timeout", value.parse().unwrap());
            }
            (deadline(&metadata) - Instant::now()).as_millis()
        };
        for (value, least, most) in [
            (None, 9_000, 10_000),
            (Some("2S"), 1_000, 1_900),
            (Some("100m"), 0, 90),
            (Some("1H"), 9_000, 10_000),
            (Some("99999999H"), 9_000, 10_000),
            (Some("123456789S"), 9_000, 10_000),
            (Some("S"), 9_000, 10_000),
            (Some("-1S"), 9_000, 10_000),
        ] {
            let found = of(value);
            assert!((least..=most).contains(&found), "{value:?}: {found} ms");
        }
    }
}
