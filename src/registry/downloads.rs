//! Each download, for a log of them.
//!
//! A download is one read of a range of a blob, with all its tries, or one pass through a blob from its beginning.
//! A [`Network`](super::Network) tells its log of each when it has ended, well or not.

use std::fmt;
use std::ops::Range;
use std::time::Duration;

use formats::oci::Digest;
use source::Class;

/// Bytes of a blob that were asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Download {
    /// The blob.
    pub blob: Digest,
    /// Which of its bytes.
    pub range: Range<u64>,
    /// How urgent they were.
    pub class: Class,
    /// From the first request to the last byte. Of a pass through a blob, what its reader did meanwhile is in it.
    pub took: Duration,
    /// The host that sent the last byte; if none came, the one that is asked first.
    pub host: String,
    /// Why the bytes did not come, or not all of them.
    pub error: Option<String>,
}

/// Takes note of downloads. It is called by threads that others wait for, and must not block.
pub trait DownloadLog: fmt::Debug + Send + Sync {
    /// A download has ended.
    fn downloaded(&self, download: Download);
}
