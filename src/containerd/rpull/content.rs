//! Writing blobs into containerd's content store.
//!
//! A write is a session: containerd opens a *reference*, takes bytes in order, and at the commit compares size and digest
//! of all of them. The reference is named as containerd's own pulls name it, so that two pulls of one blob see
//! each other: the second waits, and finds the blob. The bytes come from a blocking reader in a thread of its own, a
//! few pieces ahead of containerd, so that a blob of any size needs little memory.

use std::io::Read;
use std::time::{Duration, Instant};

use prost_types::FieldMask;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status};

use formats::oci::manifest::media;
use formats::oci::{Descriptor, Digest};
use registry::RegistryError;
use registry::store::StoreError;

use super::connection::ContainerdClient;
use super::error::{CallError, RpullError};
use super::labels::{DistributionSource, UNCOMPRESSED};
use crate::api::content::{
    ContentInfo, InfoRequest, ReadContentRequest, UpdateContentRequest, WriteAction,
    WriteContentRequest,
};
use crate::labels::Labels;

/// Bytes in a message: containerd's own client sends as much. A message may have 16 MiB.
const PIECE: usize = 1 << 20;
/// Messages that wait for containerd.
const AHEAD: usize = 4;
/// Pause before the next look at a blob that another process writes. containerd tells no end of a write.
const LOOK_AGAIN: Duration = Duration::from_millis(100);
/// Time without progress after which another process's write is given up.
const STANDSTILL: Duration = Duration::from_secs(60);

/// containerd's content store, for blobs of one repository.
#[derive(Clone)]
pub(super) struct ContentStore {
    containerd: ContainerdClient,
    /// The label that says where a blob comes from.
    source: DistributionSource,
}

/// Result of one write session.
enum Session {
    Committed,
    /// The blob is there.
    Exists,
    /// Another process writes it.
    Locked,
    /// What an earlier session left is not the blob.
    Stale,
}

impl ContentStore {
    pub(super) fn new(containerd: ContainerdClient, source: DistributionSource) -> Self {
        Self { containerd, source }
    }

    /// The blob, if it is there.
    pub(super) async fn info(&self, digest: &Digest) -> Result<Option<ContentInfo>, RpullError> {
        let request = self.containerd.request(InfoRequest { digest: digest.to_string() });
        match self.containerd.content().info(request).await {
            Ok(reply) => Ok(reply.into_inner().info),
            Err(status) if status.code() == Code::NotFound => Ok(None),
            Err(status) => Err(self.containerd.failed(format!("look for blob {digest}"), &status)),
        }
    }

    /// The bytes of a small blob, if they are there and right; at most `limit` bytes are read.
    pub(super) async fn read(
        &self,
        digest: &Digest,
        limit: u64,
    ) -> Result<Option<Vec<u8>>, RpullError> {
        let Some(info) = self.info(digest).await? else { return Ok(None) };
        if u64::try_from(info.size).is_ok_and(|size| size > limit) {
            return Ok(None);
        }
        let failed =
            |status: &Status| self.containerd.failed(format!("read blob {digest}"), status);
        let whole = ReadContentRequest { digest: digest.to_string(), offset: 0, size: 0 };
        let mut pieces = match self.containerd.content().read(self.containerd.request(whole)).await
        {
            Ok(reply) => reply.into_inner(),
            Err(status) if status.code() == Code::NotFound => return Ok(None), // collected meanwhile
            Err(status) => return Err(failed(&status)),
        };
        let mut bytes = Vec::new();
        while let Some(piece) = pieces.message().await.map_err(|status| failed(&status))? {
            bytes.extend_from_slice(&piece.data);
        }
        Ok(Some(bytes).filter(|bytes| Digest::of(bytes) == *digest))
    }

    /// Adds labels to a blob that is there, and the lease to what keeps it.
    pub(super) async fn label(&self, digest: &Digest, labels: Labels) -> Result<(), RpullError> {
        if labels.is_empty() {
            return Ok(());
        }
        let paths = labels.keys().map(|key| format!("labels.{key}")).collect();
        let info = ContentInfo { digest: digest.to_string(), labels, ..ContentInfo::default() };
        let update =
            UpdateContentRequest { info: Some(info), update_mask: Some(FieldMask { paths }) };
        let updated = self.containerd.content().update(self.containerd.request(update)).await;
        updated.map(drop).map_err(|status| {
            self.containerd.failed(format!("set the labels of blob {digest}"), &status)
        })
    }

    /// Notes the digest of the tar in a layer's blob, which containerd has computed.
    pub(super) async fn note_tar(&self, layer: &Digest, tar: &Digest) -> Result<(), RpullError> {
        self.label(layer, Labels::from([(UNCOMPRESSED.to_owned(), tar.to_string())])).await
    }

    /// Writes a document that is in memory, unless it is there.
    pub(super) async fn put(
        &self,
        blob: &Descriptor,
        bytes: Vec<u8>,
        labels: Labels,
    ) -> Result<(), RpullError> {
        let open =
            move || Ok(Box::new(std::io::Cursor::new(bytes.clone())) as Box<dyn Read + Send>);
        self.put_from(blob, labels, open, |_| {}).await.map(drop)
    }

    /// Writes a blob that `open` reads from its first byte, unless it is there; returns true if it was written. `written` is told of
    /// bytes as they arrive in containerd.
    ///
    /// The blob has the labels then, and belongs to the lease.
    pub(super) async fn put_from(
        &self,
        blob: &Descriptor,
        mut labels: Labels,
        open: impl Fn() -> Result<Box<dyn Read + Send>, StoreError> + Clone + Send + 'static,
        written: impl Fn(u64),
    ) -> Result<bool, RpullError> {
        let digest = &blob.digest;
        let mut other = Standstill::new();
        let mut resume = true;
        loop {
            match self.session(blob, &labels, resume, open.clone(), &written).await? {
                Session::Committed => return Ok(true),
                Session::Stale => resume = false,
                Session::Exists => {
                    let known = self.info(digest).await?.unwrap_or_default().labels;
                    self.source.add(&mut labels, &known);
                    labels.retain(|key, value| known.get(key) != Some(value));
                    self.label(digest, labels).await?;
                    return Ok(false);
                }
                Session::Locked => {
                    other
                        .look(self.progress(blob).await?)
                        .map_err(|seconds| RpullError::Locked { digest: *digest, seconds })?;
                    tokio::time::sleep(LOOK_AGAIN).await;
                }
            }
        }
    }

    /// One session. With `resume` the bytes of an earlier session, or of another namespace, are taken if they are as many as
    /// the blob has.
    async fn session(
        &self,
        blob: &Descriptor,
        labels: &Labels,
        resume: bool,
        open: impl FnOnce() -> Result<Box<dyn Read + Send>, StoreError> + Send + 'static,
        written: impl Fn(u64),
    ) -> Result<Session, RpullError> {
        let digest = blob.digest;
        let first = WriteContentRequest {
            action: WriteAction::Stat.into(),
            r#ref: reference(blob),
            total: i64::try_from(blob.size).unwrap_or(i64::MAX),
            expected: digest.to_string(),
            ..WriteContentRequest::default()
        };
        let mut last = WriteContentRequest {
            action: WriteAction::Commit.into(),
            offset: first.total,
            labels: labels.clone(),
            ..first.clone()
        };
        self.source.add(&mut last.labels, &Labels::new());
        let failed = |status: &Status| match status.code() {
            Code::AlreadyExists => Ok(Session::Exists),
            // The text of containerd 1.6 to 2.4 for a reference in use.
            Code::Unavailable if status.message().contains("locked") => Ok(Session::Locked),
            // Of size or digest, at the commit.
            Code::FailedPrecondition => {
                Err(RpullError::Damaged { digest, source: CallError::of(status) })
            }
            _ => Err(self.containerd.failed(format!("write blob {digest}"), status)),
        };
        let (send, receive) = mpsc::channel(AHEAD);
        // The channel is empty and has room.
        let _ = send.try_send(first);
        let request = self.containerd.long_request(ReceiverStream::new(receive));
        let mut answers = match self.containerd.content().write(request).await {
            Ok(reply) => reply.into_inner(),
            Err(status) => return failed(&status),
        };
        // The answer to the first message: from here on the reference is ours.
        let known = match answers.message().await {
            Ok(Some(answer)) => answer.offset,
            Ok(None) => {
                return failed(&Status::unknown("the session ended before its first answer"));
            }
            Err(status) => return failed(&status),
        };
        let is_whole = resume && known > 0 && known == last.offset;
        let reader = tokio::task::spawn_blocking(move || {
            if !is_whole {
                return send_all(open, last, &send);
            }
            let _ = send.blocking_send(last);
            Ok(())
        });
        let (mut stored, mut committed) = (0, false);
        loop {
            match answers.message().await {
                Ok(Some(answer)) => {
                    let offset = u64::try_from(answer.offset).unwrap_or(0);
                    written(offset.saturating_sub(stored));
                    stored = stored.max(offset);
                    committed |= answer.action() == WriteAction::Commit;
                }
                Ok(None) => break,
                Err(status) if is_whole && status.code() == Code::FailedPrecondition => {
                    return Ok(Session::Stale);
                }
                Err(status) => return failed(&status),
            }
        }
        match reader.await {
            Ok(Ok(())) if committed => Ok(Session::Committed),
            Ok(Ok(())) => failed(&Status::unknown("the session ended before its commit")),
            Ok(Err(error)) => Err(broken(error, digest)),
            Err(error) => Err(RpullError::Start(error.into())),
        }
    }

    /// Bytes of the blob that another process has written; `None` if none writes it.
    async fn progress(&self, blob: &Descriptor) -> Result<Option<i64>, RpullError> {
        let status = crate::api::content::StatusRequest { r#ref: reference(blob) };
        match self.containerd.content().status(self.containerd.request(status)).await {
            Ok(reply) => Ok(reply.into_inner().status.map(|status| status.offset)),
            Err(status) if status.code() == Code::NotFound => Ok(None),
            Err(status) => Err(self
                .containerd
                .failed(format!("look at the write of {}", blob.digest), &status)),
        }
    }
}

/// Sends the reader's bytes, and the message `last` behind them. Ends early, without an error, if the session has ended:
/// its answer says why.
fn send_all(
    open: impl FnOnce() -> Result<Box<dyn Read + Send>, StoreError>,
    mut last: WriteContentRequest,
    send: &mpsc::Sender<WriteContentRequest>,
) -> Result<(), SendError> {
    let total = u64::try_from(last.offset).unwrap_or(0);
    // One byte more than there should be is seen, and refused by containerd.
    let mut reader = open()?.take(total + 1);
    let mut offset = 0;
    loop {
        let mut data = Vec::new();
        // The piece is whole, but for the last one.
        let read = (&mut reader).take(PIECE as u64).read_to_end(&mut data)?;
        if read == 0 {
            break;
        }
        let piece = WriteContentRequest {
            action: WriteAction::Write.into(),
            r#ref: last.r#ref.clone(),
            offset,
            data,
            ..WriteContentRequest::default()
        };
        offset += read as i64;
        if send.blocking_send(piece).is_err() {
            return Ok(());
        }
    }
    last.offset = offset;
    let _ = send.blocking_send(last);
    Ok(())
}

/// Failure of the thread that reads.
enum SendError {
    Open(StoreError),
    Read(std::io::Error),
}

impl From<StoreError> for SendError {
    fn from(error: StoreError) -> Self {
        Self::Open(error)
    }
}

impl From<std::io::Error> for SendError {
    fn from(error: std::io::Error) -> Self {
        Self::Read(error)
    }
}

fn broken(error: SendError, digest: Digest) -> RpullError {
    match error {
        SendError::Open(error) => error.into(),
        SendError::Read(error) => match error.downcast::<RegistryError>() {
            Ok(error) => StoreError::from(error).into(), // it names the blob and its place itself
            Err(source) => {
                StoreError::Broken { store: "the registry".to_owned(), digest, source }.into()
            }
        },
    }
}

/// Name of a write, as containerd's own pulls form it (`core/remotes/handlers.go`, MakeRefKey).
fn reference(blob: &Descriptor) -> String {
    let kind = match blob.media_type.as_str() {
        media::OCI_INDEX | media::DOCKER_INDEX => "index",
        media::OCI_MANIFEST | media::DOCKER_MANIFEST => "manifest",
        media::OCI_CONFIG | media::DOCKER_CONFIG => "config",
        _ => "layer",
    };
    format!("{kind}-{}", blob.digest)
}

/// Watch over a write of another process.
struct Standstill {
    offset: Option<i64>,
    since: Instant,
}

impl Standstill {
    fn new() -> Self {
        Self { offset: None, since: Instant::now() }
    }

    /// Takes the present offset; the seconds without progress if they are too many.
    fn look(&mut self, offset: Option<i64>) -> Result<(), u64> {
        if offset != self.offset {
            *self = Self { offset, since: Instant::now() };
        }
        let stood = self.since.elapsed();
        if stood > STANDSTILL { Err(stood.as_secs()) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_write_has_the_name_that_containerd_gives_it() {
        let blob = |kind: &str| Descriptor::of(kind, b"x");
        let digest = Digest::of(b"x");
        for (kind, prefix) in [
            (media::OCI_INDEX, "index"),
            (media::DOCKER_MANIFEST, "manifest"),
            (media::OCI_CONFIG, "config"),
            (media::DOCKER_LAYER_ZSTD, "layer"),
        ] {
            assert_eq!(reference(&blob(kind)), format!("{prefix}-{digest}"));
        }
    }

    #[test]
    fn a_write_that_stands_still_is_given_up_and_one_that_moves_is_not() {
        let mut other = Standstill::new();
        assert_eq!(other.look(Some(1)), Ok(()));
        other.since -= STANDSTILL + Duration::from_secs(1);
        assert_eq!(other.look(Some(2)), Ok(()));
        other.since -= STANDSTILL + Duration::from_secs(1);
        assert_eq!(other.look(Some(2)), Err(STANDSTILL.as_secs() + 1));
    }
}
