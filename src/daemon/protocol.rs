//! The messages on the socket: one JSON object a line, in both directions.
//!
//! A client first asks for the version; a daemon that is about to end closes the connection instead of
//! answering, and the client looks for another one. After that, each request has one reply.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::{DaemonError, step};
use crate::disk::explain::Placed;

/// Version of the messages below. It changes when one side could misunderstand the other.
pub const VERSION: u32 = 1;

/// Longest line that is read, in bytes: a list of 10,000 devices has about 4 MiB.
const MAX_LINE: u64 = 16 << 20;

/// Environment variable that names the run directory.
pub const RUN_DIR_VARIABLE: &str = "TURBOBD_RUN_DIR";

/// Directory of socket, lock, log and FUSE mount points: `$TURBOBD_RUN_DIR`, else `/run/turbobd`.
#[must_use]
pub fn run_dir() -> PathBuf {
    std::env::var_os(RUN_DIR_VARIABLE)
        .filter(|dir| !dir.is_empty())
        .map_or_else(|| "/run/turbobd".into(), PathBuf::from)
}

/// The socket in a run directory.
#[must_use]
pub fn socket(run_dir: &Path) -> PathBuf {
    run_dir.join("turbobd.sock")
}

/// Front end of a device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Frontend {
    /// ublk, or loop if ublk is unavailable.
    #[default]
    Auto,
    /// ublk or an error.
    Ublk,
    /// FUSE and a loop device.
    Loop,
}

/// Request of `attach`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct AttachRequest {
    /// Image reference or path of a config file, as the user gave it.
    pub image: String,
    /// The requested front end.
    #[serde(default)]
    pub frontend: Frontend,
    /// Name of the device besides its node, for requests of snapshots.
    #[serde(default)]
    pub dev_id: Option<String>,
    /// Options for the opener alone; the daemon passes them on unchanged.
    #[serde(default)]
    pub options: serde_json::Value,
}

/// A request.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// Ask for the version.
    Version,
    /// Create a device.
    Attach(AttachRequest),
    /// The client has mounted a device, or (`None`) unmounted it.
    Mounted {
        /// The device.
        id: u64,
        /// The mount point.
        mountpoint: Option<PathBuf>,
    },
    /// List the devices.
    List,
    /// Remove a device.
    Detach {
        /// The device.
        id: u64,
    },
    /// Explain the sources of a device's bytes, and its problems.
    Explain {
        /// The device.
        id: u64,
        /// First byte and length of each part of the disk to explain.
        ranges: Vec<(u64, u64)>,
        /// Limit on the number of places in the answer.
        most: usize,
    },
    /// The page of metrics.
    Metrics,
    /// Begin a recording of a device's reads.
    BeginTrace {
        /// The device.
        id: u64,
    },
    /// End the recording, and return its trace.
    EndTrace {
        /// The device.
        id: u64,
    },
    /// Remove all unused devices, and end if none is left.
    Stop,
}

/// A reply.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reply {
    /// To [`Request::Version`].
    Version {
        /// [`VERSION`] of the daemon.
        protocol: u32,
        /// Release of the daemon.
        program: String,
        /// Its process.
        pid: u32,
    },
    /// To [`Request::Attach`].
    Attached {
        /// The new device.
        device: DeviceRecord,
        /// A note for the user, such as a slower front end and the reason.
        note: Option<String>,
    },
    /// To [`Request::List`].
    Devices(Vec<DeviceRecord>),
    /// To [`Request::Explain`].
    Explained(Box<Explanation>),
    /// To [`Request::Metrics`]: Prometheus' text.
    Metrics(String),
    /// To [`Request::Mounted`], [`Request::Detach`] and [`Request::BeginTrace`].
    Done,
    /// To [`Request::EndTrace`].
    Traced(crate::trace::Trace),
    /// To [`Request::Stop`]: the devices in use, for which the daemon stays. Empty: it ends.
    Stopping(Vec<DeviceRecord>),
    /// To any request.
    Error {
        /// The failure, with its causes.
        message: String,
    },
}

/// State of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// Served, and not in use.
    Ready,
    /// Served, and mounted or otherwise in use.
    InUse,
    /// Served, but a read waits for longer than is usual.
    Stalled,
    /// A part of its server has ended: its reads fail.
    Failed,
}

/// A device, as `turbobd ls` shows it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DeviceRecord {
    /// Number within this daemon.
    pub id: u64,
    /// Name of the image.
    pub image: String,
    /// The string of the user's request, if it differs from the name.
    pub requested: String,
    /// Its front end.
    pub frontend: Frontend,
    /// `/dev/ublkbN` or `/dev/loopN`.
    pub device: PathBuf,
    /// Mount point chosen by the client that attached it.
    pub mountpoint: Option<PathBuf>,
    /// Its state.
    pub state: State,
    /// Bytes of the disk.
    pub size: u64,
    /// Bytes read by the kernel.
    pub bytes_read: u64,
    /// Bytes fetched from registries for the image's blobs since it was attached. Blobs that images share
    /// count for each of them.
    pub bytes_fetched: u64,
    /// Bytes of the memory cache that the image's blobs take; shared blobs count for each.
    pub bytes_cached: u64,
    /// Failed reads, and chunks that could not be fetched.
    pub errors: u64,
    /// Requests to registries that failed and were repeated.
    #[serde(default)]
    pub retries: u64,
    /// Reads that wait for their bytes now.
    #[serde(default)]
    pub waiting: u64,
    /// Age of the oldest of them in milliseconds.
    #[serde(default)]
    pub oldest_wait: u64,
    /// Time of the attach, in seconds since 1970.
    pub since: u64,
    /// Time to open the image, in microseconds.
    #[serde(default)]
    pub opening: u64,
    /// Time to create the device after that, in microseconds.
    #[serde(default)]
    pub making: u64,
}

/// Answer for `turbobd explain`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Explanation {
    /// The device.
    pub device: DeviceRecord,
    /// The requested parts, in order.
    pub places: Vec<Placed>,
    /// The reads that wait, the oldest first, up to a limit.
    pub waiting: Vec<WaitingRecord>,
    /// The blobs behind the device.
    pub blobs: Vec<BlobRecord>,
}

/// A read of a device that waits.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct WaitingRecord {
    /// First byte on the disk.
    pub offset: u64,
    /// Number of bytes.
    pub len: u64,
    /// Time that it has waited, in milliseconds.
    pub waits: u64,
    /// Sources of its bytes.
    pub places: Vec<Placed>,
    /// Number of failures after which it was tried again, by the policy to wait.
    pub tries: u32,
    /// Its last error.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub error: Option<String>,
    /// Milliseconds until it is tried again; `None`: it is in flight.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub next: Option<u64>,
}

/// A blob behind a device.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BlobRecord {
    /// Name in the cache: its digest, and its division into chunks.
    pub blob: String,
    /// Its source, for display.
    pub source: String,
    /// The host that was asked for it last; `None`: it is near.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub host: Option<String>,
    /// Bytes fetched of it, since it was opened.
    pub fetched: u64,
    /// Requests made for them.
    pub requests: u64,
    /// Repeated ones among them.
    pub retries: u64,
    /// Bytes of the memory cache that its chunks take.
    pub cached: u64,
    /// Requests that have failed and are being repeated.
    pub trying_again: Vec<RetryRecord>,
    /// Its last failures, the oldest first.
    pub failures: Vec<FailureRecord>,
}

/// A request that has failed and is being repeated.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RetryRecord {
    /// First byte of the blob.
    pub start: u64,
    /// One past the last byte.
    pub end: u64,
    /// Time since its first try, in milliseconds.
    pub waits: u64,
    /// Failed tries.
    pub tries: u32,
    /// Error of the last one.
    pub error: String,
    /// Milliseconds until the next try.
    pub next: u64,
}

/// A failure of a chunk.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FailureRecord {
    /// Time, in milliseconds since 1970.
    pub at: u64,
    /// The chunk of the blob.
    pub chunk: u32,
    /// True if it was fetched again then.
    pub again: bool,
    /// Reason.
    pub reason: String,
}

/// Returns the one device among `records` that `what` names: a device path, a mount point or an image. For an
/// image attached several times the name is ambiguous.
///
/// # Errors
/// Returns [`DaemonError::NotFound`] or [`DaemonError::Ambiguous`].
pub fn find<'a>(records: &'a [DeviceRecord], what: &str) -> Result<&'a DeviceRecord, DaemonError> {
    let path = std::fs::canonicalize(what).unwrap_or_else(|_| PathBuf::from(what));
    let by_path = |record: &&DeviceRecord| {
        record.device == path || record.mountpoint.as_deref() == Some(&path)
    };
    // The newest mount on a mount point is the visible one.
    if let Some(record) = records.iter().rev().find(by_path) {
        return Ok(record);
    }
    let named: Vec<_> =
        records.iter().filter(|record| record.image == what || record.requested == what).collect();
    match named.as_slice() {
        [] => Err(DaemonError::NotFound(what.into())),
        [record] => Ok(record),
        several => {
            let devices: Vec<_> =
                several.iter().map(|record| record.device.display().to_string()).collect();
            Err(DaemonError::Ambiguous { what: what.into(), devices: devices.join(", ") })
        }
    }
}

/// One end of a connection.
pub(super) struct Connection {
    reader: BufReader<UnixStream>,
    path: PathBuf,
}

impl Connection {
    pub(super) fn new(stream: UnixStream, path: PathBuf) -> Self {
        Self { reader: BufReader::new(stream), path }
    }

    /// Sends one message.
    pub(super) fn send(&mut self, message: &impl Serialize) -> Result<(), DaemonError> {
        let send = |stream: &mut UnixStream| {
            let mut line = serde_json::to_vec(message)?;
            line.push(b'\n');
            stream.write_all(&line)
        };
        send(self.reader.get_mut()).map_err(step("write to", &self.path))
    }

    /// Receives the next message; `None` at the end of the connection.
    pub(super) fn receive<T: DeserializeOwned>(&mut self) -> Result<Option<T>, DaemonError> {
        let mut line = Vec::new();
        let read = (&mut self.reader).take(MAX_LINE).read_until(b'\n', &mut line);
        if read.map_err(step("read from", &self.path))? == 0 {
            return Ok(None);
        }
        let wrong = |what: String| DaemonError::Protocol { path: self.path.clone(), what };
        if line.last() != Some(&b'\n') {
            return Err(wrong(format!("a line without an end after {} bytes", line.len())));
        }
        serde_json::from_slice(&line).map(Some).map_err(|error| wrong(error.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(id: u64, image: &str, device: &str, mountpoint: Option<&str>) -> DeviceRecord {
        DeviceRecord {
            id,
            image: image.into(),
            requested: image.into(),
            frontend: Frontend::Loop,
            device: device.into(),
            mountpoint: mountpoint.map(PathBuf::from),
            state: State::Ready,
            size: 512,
            bytes_read: 0,
            bytes_fetched: 0,
            bytes_cached: 0,
            errors: 0,
            retries: 0,
            waiting: 0,
            oldest_wait: 0,
            since: 0,
            opening: 0,
            making: 0,
        }
    }

    #[test]
    fn a_device_is_found_by_path_mount_point_or_image() {
        let records = [
            record(1, "reg/a:1", "/dev/nosuch0", Some("/nosuch/x")),
            record(2, "reg/b:1", "/dev/nosuch1", None),
            record(3, "reg/b:1", "/dev/nosuch2", None),
        ];
        assert_eq!(find(&records, "/dev/nosuch1").unwrap().id, 2);
        assert_eq!(find(&records, "/nosuch/x").unwrap().id, 1);
        assert_eq!(find(&records, "reg/a:1").unwrap().id, 1);
        assert!(matches!(find(&records, "reg/b:1"), Err(DaemonError::Ambiguous { .. })));
        assert!(matches!(find(&records, "reg/c:1"), Err(DaemonError::NotFound(_))));
    }

    #[test]
    fn options_reach_the_other_side_untouched() {
        let (one, two) = UnixStream::pair().unwrap();
        let (mut one, mut two) =
            (Connection::new(one, "one".into()), Connection::new(two, "two".into()));
        let options = serde_json::json!({"z": [1, null, "\n"], "a": {"deep": 1.5}});
        let request = Request::Attach(AttachRequest {
            image: "i".into(),
            frontend: Frontend::Ublk,
            dev_id: Some("d".into()),
            options,
        });
        one.send(&request).unwrap();
        assert_eq!(two.receive::<Request>().unwrap(), Some(request));
        drop(one);
        assert_eq!(two.receive::<Request>().unwrap(), None);
    }

    #[test]
    fn what_is_no_message_is_an_error_and_not_a_panic() {
        for junk in ["{}\n", "nonsense\n", "\"version\"", "[[[[\n", "\n"] {
            let (mut one, two) = UnixStream::pair().unwrap();
            one.write_all(junk.as_bytes()).unwrap();
            drop(one);
            let received = Connection::new(two, "two".into()).receive::<Request>();
            assert!(matches!(received, Err(DaemonError::Protocol { .. })), "{junk:?}");
        }
    }
}
