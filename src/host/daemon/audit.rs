//! The audit log: a line for each download, and for each read of a device that had to wait for its bytes.
//!
//! `enableAudit` turns it on. A read that is answered from memory never comes here. All others send a small
//! record through a bounded channel to *one writer thread*, which makes the lines and appends them to a file of
//! bounded size ([`LogFile`]). Nothing waits for that thread: when [`QUEUE`] records wait for it, the next one is
//! dropped and counted. A disk that stalls or is full costs lines, and no reader's time.
//!
//! A line is a JSON object. `time` (UTC) is when the download or the read ended, `event` is `download` or `read`.
//! Bytes and times have their unit in the field's name; a field that has no value is left out.
//!
//! ```json
//! {"time":"2026-01-31T12:00:00.123456Z","event":"download","blob":"sha256:…","class":"demand","offset_bytes":0,"length_bytes":4194304,"duration_us":31250,"source_host":"registry.example"}
//! {"time":"2026-01-31T12:00:00.123789Z","event":"read","device":"/dev/ublkb0","image":"registry.example/app:1","offset_bytes":8192,"length_bytes":131072,"duration_us":31402}
//! ```

use std::io;
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, bounded};
use jiff::Timestamp;
use serde::Serialize;

use crate::config::log_file::LogFile;
use crate::readings::AuditCounters;
use disk::DiskRange;
use formats::oci::Digest;
use registry::{Download, DownloadLog};
use source::Class;

/// Records that may wait for the writer: a tenth of a second of the most reads that a device was seen to do, and a
/// megabyte at a few hundred bytes each.
const QUEUE: usize = 4096;

/// Bytes of lines that are appended by one write.
const BATCH: usize = 64 << 10;

/// How long the end of the process waits for the last lines.
const LAST_LINES: Duration = Duration::from_secs(2);

/// The audit log of this process.
#[derive(Debug)]
pub struct Audit {
    sender: Sender<Message>,
    counters: Arc<AuditCounters>,
}

#[derive(Debug)]
enum Message {
    Record(Timestamp, AuditRecord),
    /// Everything before it is to be written; then the sender is dropped.
    Flush(#[allow(dead_code)] Sender<()>), // kept for its drop
}

#[derive(Debug)]
enum AuditRecord {
    Download(Download),
    Read {
        device: Option<Arc<str>>,
        image: Arc<str>,
        range: DiskRange,
        took: Duration,
        error: Option<String>,
    },
}

/// A line of the file.
#[derive(Serialize)]
struct Line<'a> {
    time: String,
    event: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    device: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    image: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    blob: Option<Digest>,
    #[serde(skip_serializing_if = "Option::is_none")]
    class: Option<&'static str>,
    offset_bytes: u64,
    length_bytes: u64,
    duration_us: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    source_host: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<&'a str>,
}

impl AuditRecord {
    fn line(&self, time: Timestamp) -> Line<'_> {
        let micros = |took: &Duration| u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        let time = format!("{time:.6}");
        match self {
            Self::Download(download) => Line {
                time,
                event: "download",
                device: None,
                image: None,
                blob: Some(download.blob),
                class: Some(match download.class {
                    Class::Demand => "demand",
                    Class::Prefetch => "ahead",
                    Class::Fill => "fill",
                }),
                offset_bytes: download.range.start,
                length_bytes: download.range.end - download.range.start,
                duration_us: micros(&download.took),
                source_host: Some(&download.host),
                error: download.error.as_deref(),
            },
            Self::Read { device, image, range, took, error } => Line {
                time,
                event: "read",
                device: device.as_deref(),
                image: Some(image),
                blob: None,
                class: None,
                offset_bytes: range.offset,
                length_bytes: range.len,
                duration_us: micros(took),
                source_host: None,
                error: error.as_deref(),
            },
        }
    }
}

impl Audit {
    /// Begins to write to `file`, by a thread of its own.
    ///
    /// # Errors
    /// The system's, if there is no thread.
    pub fn begin(file: LogFile) -> io::Result<Arc<Self>> {
        let (audit, receiver) = Self::with_queue(QUEUE);
        let counters = audit.counters.clone();
        let body = move || {
            sys::privilege::become_clerk();
            write(&receiver, &file, &counters);
        };
        thread::Builder::new().name("audit".into()).spawn(body)?;
        Ok(Arc::new(audit))
    }

    fn with_queue(records: usize) -> (Self, Receiver<Message>) {
        let (sender, receiver) = bounded(records);
        (Self { sender, counters: Arc::default() }, receiver)
    }

    /// What it did so far.
    #[must_use]
    pub fn counters(&self) -> &AuditCounters {
        &self.counters
    }

    /// Waits until everything is written that was noted before; not for long.
    pub fn flush(&self) {
        let (done, wait) = bounded(0);
        if self.sender.send_timeout(Message::Flush(done), LAST_LINES).is_ok() {
            let _ = wait.recv_timeout(LAST_LINES);
        }
    }

    fn note(&self, record: AuditRecord) {
        if self.sender.try_send(Message::Record(Timestamp::now(), record)).is_err() {
            self.counters.dropped.add(1);
        }
    }
}

impl DownloadLog for Audit {
    fn downloaded(&self, download: Download) {
        self.note(AuditRecord::Download(download));
    }
}

/// Reads of one device, for the audit log.
#[derive(Debug)]
pub(super) struct AuditedDevice {
    audit: Arc<Audit>,
    image: Arc<str>,
    device: OnceLock<Arc<str>>,
}

impl AuditedDevice {
    /// A device that is about to be made of `image`.
    pub(super) fn new(audit: Arc<Audit>, image: &str) -> Self {
        Self { audit, image: image.into(), device: OnceLock::new() }
    }

    /// The device is there. What the kernel read of it before is noted without its name.
    pub(super) fn named(&self, device: &str) {
        let _ = self.device.set(device.into());
    }

    /// A read had to wait, and has ended.
    pub(super) fn read(&self, range: DiskRange, took: Duration, error: Option<String>) {
        let (device, image) = (self.device.get().cloned(), self.image.clone());
        self.audit.note(AuditRecord::Read { device, image, range, took, error });
    }
}

/// Body of the thread: ends when the last sender is gone.
fn write(receiver: &Receiver<Message>, file: &LogFile, counters: &AuditCounters) {
    let mut batch = Vec::with_capacity(BATCH);
    while let Ok(first) = receiver.recv() {
        let (mut lines, mut flushed) = (0, None);
        let mut next = Some(first);
        while let Some(message) = next {
            match message {
                Message::Record(time, record) => {
                    // Texts and numbers always make a line.
                    if serde_json::to_writer(&mut batch, &record.line(time)).is_ok() {
                        batch.push(b'\n');
                        lines += 1;
                    }
                }
                Message::Flush(done) => flushed = Some(done),
            }
            next = if batch.len() < BATCH && flushed.is_none() {
                receiver.try_recv().ok()
            } else {
                None
            };
        }
        let counter = if file.append(&batch) { &counters.lines } else { &counters.dropped };
        counter.add(lines);
        batch.clear();
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use serde_json::{Value, json};

    use super::*;
    use crate::config::log_file::Rotation;

    const ROTATION: Rotation = Rotation { size: 1 << 20, keep: 1 };

    fn download(error: Option<&str>) -> Download {
        Download {
            blob: Digest::of(b"layer"),
            range: 100..4196,
            class: Class::Prefetch,
            took: Duration::from_micros(1500),
            host: "registry.example:5000".into(),
            error: error.map(str::to_owned),
        }
    }

    #[test]
    fn each_download_and_each_read_is_a_line_with_its_units() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("audit.log");
        let audit = Audit::begin(LogFile::open(&path, ROTATION).unwrap()).unwrap();
        let device = AuditedDevice::new(audit.clone(), "app:1");
        device.read(DiskRange::new(0, 512), Duration::from_millis(2), None);
        device.named("/dev/ublkb7");
        device.read(
            DiskRange::new(8192, 131_072),
            Duration::from_micros(31),
            Some("no \"route\"\n".into()),
        );
        audit.downloaded(download(None));
        audit.downloaded(download(Some("it broke")));
        audit.flush();
        let text = std::fs::read_to_string(&path).unwrap();
        let mut lines: Vec<Value> =
            text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        for line in &mut lines {
            let time = line.as_object_mut().unwrap().remove("time").unwrap();
            let time = time.as_str().unwrap();
            assert!(time.parse::<Timestamp>().is_ok() && time.len() == 27, "{time}");
        }
        let blob = Digest::of(b"layer").to_string();
        let mut fetched = json!({"event": "download", "blob": blob, "class": "ahead", "offset_bytes": 100,
            "length_bytes": 4096, "duration_us": 1500, "source_host": "registry.example:5000"});
        let early = json!({"event": "read", "image": "app:1", "offset_bytes": 0, "length_bytes": 512,
            "duration_us": 2000});
        let read = json!({"event": "read", "device": "/dev/ublkb7", "image": "app:1", "offset_bytes": 8192,
            "length_bytes": 131_072, "duration_us": 31, "error": "no \"route\"\n"});
        assert_eq!(lines[..3], [early, read, fetched.clone()]);
        fetched["error"] = "it broke".into();
        assert_eq!(lines[3], fetched);
        assert_eq!(audit.counters().lines.get(), 4);
    }

    #[test]
    fn lines_are_dropped_and_counted_when_the_writer_is_behind_and_nobody_waits() {
        let (audit, receiver) = Audit::with_queue(3);
        for _ in 0..10 {
            audit.downloaded(download(None));
        }
        assert_eq!((receiver.len(), audit.counters().dropped.get()), (3, 7));
    }

    #[test]
    fn lines_that_a_full_disk_does_not_take_are_counted_and_the_thread_goes_on() {
        let file = LogFile::open(Path::new("/dev/full"), ROTATION).unwrap();
        let audit = Audit::begin(file).unwrap();
        for number in 1..=3 {
            audit.downloaded(download(None));
            audit.flush();
            assert_eq!(audit.counters().dropped.get(), number);
        }
        assert_eq!(audit.counters().lines.get(), 0);
    }
}
