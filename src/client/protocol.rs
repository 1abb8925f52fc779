//! The messages on the socket: one JSON object or string a line, in both directions.
//!
//! A client first asks for the version; a daemon that is about to end closes the connection instead of
//! answering, and the client looks for another one. After that, each request has one reply.
//!
//! `PROTOCOL.md` at the root describes them for programs in any language, each with an example; `tests/pages.rs`
//! compares the page with these types.

use std::path::{Path, PathBuf};

use formats::trace::Trace;
use serde::{Deserialize, Serialize};

use crate::error::{ClientError, Fault};
use crate::spec::{DeviceSpec, Frontend};

/// Newest version of the messages. Raised when one side could misunderstand the other.
pub const VERSION: u32 = 2;

/// Oldest version that this release still speaks.
pub const OLDEST_VERSION: u32 = 2;

/// Longest line that is read, in bytes: a list of 10,000 devices has about 4 MiB.
pub(crate) const MAX_LINE: u64 = 16 << 20;

/// End of the line that a daemon started by a client writes on its standard output once it accepts
/// connections.
pub const READY: &str = "turbobd is ready";

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

/// The log, in a run directory, of a daemon that a client started.
#[must_use]
pub fn log(run_dir: &Path) -> PathBuf {
    run_dir.join("turbobd.log")
}

/// A request.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// Ask for the version.
    Version,
    /// Create a device.
    Attach(Box<DeviceSpec>),
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
        /// Newest version that the daemon speaks.
        protocol: u32,
        /// Oldest version that it speaks; a daemon that does not say speaks one version.
        #[serde(default)]
        oldest: Option<u32>,
        /// Release of the daemon.
        program: String,
        /// Its process.
        pid: u32,
    },
    /// To [`Request::Attach`].
    Attached {
        /// The new device.
        device: Box<DeviceRecord>,
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
    Traced(Trace),
    /// To any request.
    Stopping(Vec<DeviceRecord>),
    /// The failure, with its causes.
    Error(Fault),
}

/// State of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DeviceState {
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
    /// Name of the device that the request gave it.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub dev_id: Option<String>,
    /// Its front end.
    pub frontend: Frontend,
    /// `/dev/ublkbN` or `/dev/loopN`.
    pub device: PathBuf,
    /// Mount point chosen by the client that attached it.
    pub mountpoint: Option<PathBuf>,
    /// Its state.
    pub state: DeviceState,
    /// The reason why it is not served, if it is not: a daemon died that served it, and the next one has not taken it back yet, or
    /// cannot.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub trouble: Option<String>,
    /// Bytes of the disk.
    pub size_bytes: u64,
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
    pub oldest_wait_ms: u64,
    /// Time of the attach, in seconds since 1970.
    pub since_unix_s: u64,
    /// Time to open the image, in microseconds.
    #[serde(default)]
    pub opening_us: u64,
    /// Time to create the device after that, in microseconds.
    #[serde(default)]
    pub making_us: u64,
}

/// Answer for `turbobd explain`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Explanation {
    /// The device.
    pub device: DeviceRecord,
    /// The requested parts, in order.
    pub places: Vec<PlacedRecord>,
    /// The reads that wait, the oldest first, up to a limit.
    pub waiting: Vec<WaitingRecord>,
    /// The blobs behind the device.
    pub blobs: Vec<BlobRecord>,
}

/// A read of a device that waits.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct WaitingRecord {
    /// First byte on the disk.
    pub offset_bytes: u64,
    /// Number of bytes.
    pub length_bytes: u64,
    /// Time that it has waited, in milliseconds.
    pub waits_ms: u64,
    /// Sources of its bytes.
    pub places: Vec<PlacedRecord>,
    /// Number of failures after which it was tried again, by the policy to wait.
    pub tries: u32,
    /// Its last error.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub error: Option<String>,
    /// Milliseconds until it is tried again; `None`: it is in flight.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub next_ms: Option<u64>,
}

/// A blob behind a device.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BlobRecord {
    /// Name in the cache: its digest, and its division into chunks.
    pub blob: String,
    /// Its source, for display.
    pub source: String,
    /// What verifies its chunks: `table`, a SHA-256 of each; `blob`, the digest of the whole blob, which was fetched to its
    /// end; `checksum`, which finds damage and proves nothing; or `nothing`.
    #[serde(default)]
    pub verified_by: String,
    /// What images must have in common to share its chunks: that table or blob, by its digest, or else the origin of its
    /// bytes.
    #[serde(default)]
    pub shared_by: String,
    /// The host that was asked for it last; `None`: it is near.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub host: Option<String>,
    /// Bytes fetched of it, since it was opened.
    pub fetched_bytes: u64,
    /// Requests made for them.
    pub requests: u64,
    /// Repeated ones among them.
    pub retries: u64,
    /// Bytes of the memory cache that its chunks take.
    pub cached_bytes: u64,
    /// Requests that have failed and are being repeated.
    pub trying_again: Vec<RetryRecord>,
    /// Its last failures, the oldest first.
    pub failures: Vec<FailureRecord>,
}

/// A request that has failed and is being repeated.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RetryRecord {
    /// First byte of the blob.
    pub start_bytes: u64,
    /// One past the last byte.
    pub end_bytes: u64,
    /// Time since its first try, in milliseconds.
    pub waits_ms: u64,
    /// Failed tries.
    pub tries: u32,
    /// Error of the last one.
    pub error: String,
    /// Milliseconds until the next try.
    pub next_ms: u64,
}

/// A failure of a chunk.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FailureRecord {
    /// Time, in milliseconds since 1970.
    pub at_unix_ms: u64,
    /// The chunk of the blob.
    pub chunk: u32,
    /// True if it was fetched again then.
    pub again: bool,
    /// Reason.
    pub reason: String,
}

impl DeviceRecord {
    /// A new device that nothing has read: every count is 0.
    #[must_use]
    pub fn new(id: u64, spec: &DeviceSpec, frontend: Frontend, device: PathBuf) -> Self {
        Self {
            id,
            image: spec.image.name(),
            requested: spec.image.name(),
            dev_id: spec.dev_id.clone(),
            frontend,
            device,
            mountpoint: None,
            state: DeviceState::Ready,
            trouble: None,
            size_bytes: 0,
            bytes_read: 0,
            bytes_fetched: 0,
            bytes_cached: 0,
            errors: 0,
            retries: 0,
            waiting: 0,
            oldest_wait_ms: 0,
            since_unix_s: 0,
            opening_us: 0,
            making_us: 0,
        }
    }
}

/// Returns the one device among `records` that `what` names: a device path, a mount point or an image. For an
/// image attached several times the name is ambiguous.
///
/// # Errors
/// Returns [`ClientError::NotFound`] or [`ClientError::Ambiguous`].
pub fn find<'a>(records: &'a [DeviceRecord], what: &str) -> Result<&'a DeviceRecord, ClientError> {
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
        [] => Err(ClientError::NotFound(what.into())),
        [record] => Ok(record),
        several => {
            let devices: Vec<_> =
                several.iter().map(|record| record.device.display().to_string()).collect();
            Err(ClientError::Ambiguous { what: what.into(), devices: devices.join(", ") })
        }
    }
}

/// What a part of a disk is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PartKind {
    /// No layer has anything here: zeros.
    Hole,
    /// Filesystem metadata of a TurboOCI layer: in memory, always.
    Metadata,
    /// Data of a layer, in a chunk.
    Data,
    /// Behind the end of an original layer: the padding of its last file, zeros.
    Padding,
}

/// Where a chunk's bytes are now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ChunkState {
    /// Decoded, in the memory cache.
    Memory,
    /// Near: in a local file, or in the disk tier.
    Disk,
    /// Nowhere near: a read makes a request.
    Remote,
}

/// A part of a disk that lies in one place.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlacedRecord {
    /// First byte on the disk.
    pub offset_bytes: u64,
    /// Number of bytes.
    pub length_bytes: u64,
    /// What is there.
    pub what: PartKind,
    /// Which layer has it, 0 lowest.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub layer: Option<usize>,
    /// What of which blob holds it.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub chunk: Option<ChunkRecord>,
}

/// The chunk behind a part of a disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChunkRecord {
    /// The blob, as the cache knows it: its digest, and how it is cut.
    pub blob: String,
    /// Byte of the decoded blob, for a TurboOCI layer of the uncompressed tar.
    pub at_bytes: u64,
    /// Number of the chunk (the segment of a compressed layer).
    pub index: u32,
    /// The chunk that decoding begins with, if that is another: the first of a long zstd frame.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub decoded_from: Option<u32>,
    /// Its first byte in the blob as it is stored.
    pub start_bytes: u64,
    /// One past its last byte in the blob as it is stored.
    pub end_bytes: u64,
    /// Its length decoded, in bytes.
    pub decoded_bytes: u64,
    /// Where it is now.
    pub held: ChunkState,
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::os::unix::net::UnixStream;

    use super::*;
    use crate::connection::Connection;
    use crate::error::Code;
    use crate::spec::{ImageSpec, RegistrySpec};

    fn record(id: u64, image: &str, device: &str, mountpoint: Option<&str>) -> DeviceRecord {
        let spec = DeviceSpec::of(ImageSpec::of_reference(image));
        let mountpoint = mountpoint.map(PathBuf::from);
        let new = DeviceRecord::new(id, &spec, Frontend::Loop, device.into());
        DeviceRecord { mountpoint, size_bytes: 512, ..new }
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
        assert!(matches!(find(&records, "reg/b:1"), Err(ClientError::Ambiguous { .. })));
        assert!(matches!(find(&records, "reg/c:1"), Err(ClientError::NotFound(_))));
    }

    #[test]
    fn a_request_reaches_the_other_side_as_it_was() {
        let (one, two) = UnixStream::pair().unwrap();
        let (mut one, mut two) =
            (Connection::new(one, "one".into()), Connection::new(two, "two".into()));
        let registry = RegistrySpec {
            credential: Some("user:pass\nword".into()),
            authorities: vec!["/ca".into()],
            ..RegistrySpec::default()
        };
        let image = ImageSpec { registry, publish: true, ..ImageSpec::of_reference("reg/a:1") };
        let request = Request::Attach(Box::new(DeviceSpec {
            frontend: Frontend::Ublk,
            upper: Some("/upper".into()),
            dev_id: Some("d".into()),
            ..DeviceSpec::of(image)
        }));
        one.send(&request).unwrap();
        assert_eq!(two.receive::<Request>().unwrap(), Some(request));
        drop(one);
        assert_eq!(two.receive::<Request>().unwrap(), None);
    }

    #[test]
    fn a_code_of_a_later_release_is_an_internal_failure() {
        let fault = r#"{"error":{"code":"on_fire","message":"It burns","causes":["heat"]}}"#;
        let reply: Reply = serde_json::from_str(fault).unwrap();
        let Reply::Error(fault) = reply else { panic!("{reply:?}") };
        assert_eq!(fault.code, Code::Internal);
        assert_eq!(fault.to_string(), "It burns: heat");
    }

    #[test]
    fn what_is_no_message_is_an_error_and_not_a_panic() {
        for junk in ["{}\n", "nonsense\n", "\"version\"", "[[[[\n", "\n"] {
            let (mut one, two) = UnixStream::pair().unwrap();
            one.write_all(junk.as_bytes()).unwrap();
            drop(one);
            let received = Connection::new(two, "two".into()).receive::<Request>();
            assert!(matches!(received, Err(ClientError::Protocol { .. })), "{junk:?}");
        }
    }
}
