//! Records of the ublk devices of a daemon, for the next daemon.
//!
//! The kernel keeps a device whose server has died, but knows nothing of its image. So each device has a file in the folder
//! `devices` of the run directory. It is written before the device exists, changed when the device is served, and removed after
//! the device is gone. At any moment a daemon can die: the token of the record finds the device, whatever the record does not
//! say yet ([`DeviceToken`]).
//!
//! A record is one line with its version and the SHA-256 of the rest, then JSON. A file that is torn, flipped, foreign or of a
//! newer version is named in the log, passed over and left. A change is written beside the file and renamed over it. It is synced
//! too, though a device does not outlive its kernel, and a record of an earlier boot is removed: so that the folder never has a
//! torn file after a power loss, if it is not on a tmpfs as `/run` is.
//!
//! A record holds the credentials that the client gave for this device, if it gave any: without them a private image could not be
//! opened again. The files have the mode 0600 in a folder of mode 0700.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::path::{Path, PathBuf};

use client::DeviceSpec;
use formats::oci::Digest;
use frontends::ublk::recovery::{DeviceToken, RecoveryStep};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::DiskIdentity;

/// First word of a record.
const MAGIC: &str = "turbobd-device";

/// Version of the records. Raised when an older release would misunderstand one; fields that it may ignore need no new version.
const VERSION: u32 = 1;

/// Folder in the run directory.
const FOLDER: &str = "devices";

/// End of the name of a record.
const SUFFIX: &str = ".device";

/// Longest record in bytes. A spec has some paths and a credential; the longest message on the socket is 16 MiB, and no client
/// sends a spec near that.
const MOST_BYTES: u64 = 1 << 20;

/// State of a device in the journal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum DeviceStage {
    /// It is about to be made.
    Making,
    /// It is served.
    Serving,
    /// A later daemon is about to take it back.
    Recovering,
    /// A later daemon is arming its tags.
    Arming,
    /// A later daemon has armed all tags.
    Armed,
}

impl DeviceStage {
    /// The step of a recovery that an earlier daemon had reached.
    pub(super) fn step(self) -> Option<RecoveryStep> {
        match self {
            Self::Making | Self::Serving => None,
            Self::Recovering => Some(RecoveryStep::Recovering),
            Self::Arming => Some(RecoveryStep::Arming),
            Self::Armed => Some(RecoveryStep::Armed),
        }
    }
}

impl From<RecoveryStep> for DeviceStage {
    fn from(step: RecoveryStep) -> Self {
        match step {
            RecoveryStep::Recovering => Self::Recovering,
            RecoveryStep::Arming => Self::Arming,
            RecoveryStep::Armed => Self::Armed,
        }
    }
}

/// What a later daemon needs to serve a device on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct JournalRecord {
    /// The kernel's boot id: devices do not outlive it.
    pub(super) boot: String,
    /// Number of the [`DeviceToken`].
    pub(super) token: u64,
    /// State of the device.
    pub(super) stage: DeviceStage,
    /// Number of the device in the daemon.
    pub(super) number: u64,
    /// The request.
    pub(super) spec: DeviceSpec,
    /// Name of the image in lists.
    pub(super) image: String,
    /// The disk that was served; another one must not take its place.
    pub(super) identity: Option<DiskIdentity>,
    /// Bytes of the disk.
    pub(super) size_bytes: u64,
    /// Time of the attach, in seconds since 1970.
    pub(super) since_unix_s: u64,
    /// Mount point that a client chose.
    pub(super) mountpoint: Option<PathBuf>,
    /// The kernel's device, once it is served.
    pub(super) device: Option<RecordedDevice>,
}

/// The kernel's device of a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct RecordedDevice {
    /// N of `/dev/ublkbN`.
    pub(super) id: u32,
    /// The disk's number of this boot; `None` on a kernel without it (before 5.15).
    pub(super) diskseq: Option<u64>,
}

/// Reason why a file is no usable record.
#[derive(Debug, Error)]
pub(super) enum RecordError {
    /// The file cannot be read.
    #[error("It cannot be read")]
    Read(#[source] io::Error),
    /// It does not begin as a record.
    #[error("It is no record of a device")]
    Foreign,
    /// A later release wrote it.
    #[error(
        "It has version {found}, and this release knows {VERSION}: start the newer release, which takes the device back"
    )]
    Newer {
        /// The version that it has.
        found: u32,
    },
    /// Its bytes are not those that were written.
    #[error("It is damaged: its SHA-256 differs")]
    Damaged,
    /// The bytes are those that were written, and mean nothing.
    #[error("Its content cannot be understood")]
    Content(#[source] serde_json::Error),
}

impl JournalRecord {
    /// The bytes of the file.
    fn encode(&self) -> io::Result<Vec<u8>> {
        let body = serde_json::to_vec_pretty(self)?;
        let mut bytes = format!("{MAGIC} {VERSION} {}\n", Digest::of(&body).hex()).into_bytes();
        bytes.extend_from_slice(&body);
        Ok(bytes)
    }

    /// Parses a file.
    fn parse(bytes: &[u8]) -> Result<Self, RecordError> {
        let end = bytes.iter().position(|&byte| byte == b'\n').ok_or(RecordError::Foreign)?;
        let (head, body) = (&bytes[..end], &bytes[end + 1..]);
        let head = std::str::from_utf8(head).map_err(|_| RecordError::Foreign)?;
        let mut words = head.split(' ');
        let (magic, version) = (words.next(), words.next().and_then(|word| word.parse().ok()));
        let (Some(MAGIC), Some(version)) = (magic, version) else {
            return Err(RecordError::Foreign);
        };
        if version > VERSION {
            return Err(RecordError::Newer { found: version });
        }
        let is_whole = words.next() == Some(&*Digest::of(body).hex()) && words.next().is_none();
        if version != VERSION || !is_whole {
            return Err(RecordError::Damaged);
        }
        serde_json::from_slice(body).map_err(RecordError::Content)
    }

    /// Its token; `None`: the number is none, so no device of this program has it.
    pub(super) fn token(&self) -> Option<DeviceToken> {
        DeviceToken::of_number(self.token)
    }
}

/// The records of a run directory.
#[derive(Debug)]
pub(super) struct Journal {
    folder: PathBuf,
    boot: String,
}

impl Journal {
    /// The records of `run_dir`. The folder is made.
    ///
    /// # Errors
    /// The system's.
    pub(super) fn open(run_dir: &Path) -> io::Result<Self> {
        let folder = run_dir.join(FOLDER);
        sys::private::folder(&folder)?;
        let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
        Ok(Self { folder, boot: boot.trim().to_owned() })
    }

    /// The kernel's boot id.
    pub(super) fn boot(&self) -> &str {
        &self.boot
    }

    /// Writes a record, new or changed.
    ///
    /// # Errors
    /// The system's; the record is then as it was before.
    pub(super) fn write(&self, record: &JournalRecord) -> io::Result<()> {
        let path = self.path(record.token);
        // No two threads write the record of one device at once.
        let new = path.with_extension("new");
        let options = OpenOptions::new().create(true).truncate(true).write(true).clone();
        let mut file = sys::private::open(&new, &options)?;
        file.write_all(&record.encode()?)?;
        file.sync_all()?;
        fs::rename(&new, &path)?;
        File::open(&self.folder)?.sync_all()
    }

    /// Removes a record; one that is gone is no error.
    ///
    /// # Errors
    /// The system's.
    pub(super) fn remove(&self, token: u64) -> io::Result<()> {
        match fs::remove_file(self.path(token)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    /// The records of this boot, in the order of their attaches. Records of earlier boots are removed; a file that is none is
    /// returned with the reason.
    ///
    /// # Errors
    /// The system's, when the folder cannot be read.
    pub(super) fn read(&self) -> io::Result<(Vec<JournalRecord>, Vec<(PathBuf, RecordError)>)> {
        let (mut records, mut refused) = (Vec::new(), Vec::new());
        for entry in fs::read_dir(&self.folder)? {
            let path = entry?.path();
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            if name.ends_with(".new") {
                // A write that did not come to its end.
                let _ = fs::remove_file(&path);
                continue;
            }
            if !name.ends_with(SUFFIX) {
                continue;
            }
            match read_record(&path) {
                Ok(record) if record.boot != self.boot => {
                    let _ = fs::remove_file(&path);
                }
                // A copy under another name could be used twice.
                Ok(record) if self.path(record.token) != path => {
                    refused.push((path, RecordError::Foreign));
                }
                Ok(record) => records.push(record),
                Err(error) => refused.push((path, error)),
            }
        }
        records.sort_by_key(|record| record.number);
        Ok((records, refused))
    }

    fn path(&self, token: u64) -> PathBuf {
        self.folder.join(format!("{token:016x}{SUFFIX}"))
    }
}

/// True if a daemon of this run directory has left records of devices.
pub(super) fn has_records(run_dir: &Path) -> bool {
    let names = fs::read_dir(run_dir.join(FOLDER)).into_iter().flatten().flatten();
    names.into_iter().any(|entry| entry.file_name().to_string_lossy().ends_with(SUFFIX))
}

fn read_record(path: &Path) -> Result<JournalRecord, RecordError> {
    let mut bytes = Vec::new();
    let file =
        sys::private::open(path, OpenOptions::new().read(true)).map_err(RecordError::Read)?;
    file.take(MOST_BYTES + 1).read_to_end(&mut bytes).map_err(RecordError::Read)?;
    if bytes.len() as u64 > MOST_BYTES {
        return Err(RecordError::Foreign);
    }
    JournalRecord::parse(&bytes)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use proptest::prelude::*;

    use super::*;
    use client::{ImageSpec, RegistrySpec};

    fn record(number: u64) -> JournalRecord {
        let registry =
            RegistrySpec { credential: Some("user:secret".into()), ..RegistrySpec::default() };
        let image = ImageSpec { registry, ..ImageSpec::of_reference("reg.example/app:1") };
        JournalRecord {
            boot: String::new(),
            token: DeviceToken::draw().number(),
            stage: DeviceStage::Serving,
            number,
            spec: DeviceSpec { dev_id: Some("d".into()), ..DeviceSpec::of(image) },
            image: "reg.example/app:1".into(),
            identity: Some(DiskIdentity {
                manifest: Some(Digest::of(b"manifest")),
                disk: Digest::of(b"disk"),
            }),
            size_bytes: 1 << 30,
            since_unix_s: 1_700_000_000,
            mountpoint: Some("/mnt/ä b".into()),
            device: Some(RecordedDevice { id: 3, diskseq: Some(77) }),
        }
    }

    fn journal(dir: &Path) -> (Journal, JournalRecord) {
        let journal = Journal::open(dir).unwrap();
        let record = JournalRecord { boot: journal.boot().to_owned(), ..record(1) };
        (journal, record)
    }

    #[test]
    fn a_record_is_read_as_it_was_written_and_only_its_user_can_read_it() {
        let dir = tempfile::tempdir().unwrap();
        let (journal, first) = journal(dir.path());
        let second = JournalRecord { stage: DeviceStage::Making, device: None, ..first.clone() };
        let second = JournalRecord { token: DeviceToken::draw().number(), number: 9, ..second };
        journal.write(&second).unwrap();
        journal.write(&JournalRecord { stage: DeviceStage::Making, ..first.clone() }).unwrap();
        journal.write(&first).unwrap();
        let mode = fs::metadata(journal.path(first.token)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert_eq!(fs::metadata(&journal.folder).unwrap().permissions().mode() & 0o777, 0o700);
        let (records, refused) = journal.read().unwrap();
        assert!(records == [first.clone(), second.clone()] && refused.is_empty(), "{refused:?}");
        journal.remove(first.token).unwrap();
        journal.remove(first.token).unwrap();
        assert_eq!(journal.read().unwrap().0, [second]);
    }

    #[test]
    fn records_of_an_earlier_boot_and_writes_that_did_not_end_are_removed_and_nothing_else_is() {
        let dir = tempfile::tempdir().unwrap();
        let (journal, record) = journal(dir.path());
        journal.write(&JournalRecord { boot: "another".into(), ..record.clone() }).unwrap();
        fs::write(journal.folder.join("x.new"), "turbo").unwrap();
        fs::write(journal.folder.join("note"), "the operator's").unwrap();
        let copy = journal.folder.join("copy.device");
        fs::write(&copy, record.encode().unwrap()).unwrap();
        let (records, refused) = journal.read().unwrap();
        assert!(records.is_empty());
        assert!(matches!(&refused[..], [(path, RecordError::Foreign)] if *path == copy));
        let mut left: Vec<_> = fs::read_dir(&journal.folder)
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        left.sort();
        assert_eq!(left, ["copy.device", "note"]);
    }

    #[test]
    fn a_record_of_a_newer_release_is_left_to_it() {
        let dir = tempfile::tempdir().unwrap();
        let (journal, record) = journal(dir.path());
        let text = String::from_utf8(record.encode().unwrap()).unwrap();
        let newer = text.replacen(" 1 ", " 2 ", 1);
        fs::write(journal.path(record.token), &newer).unwrap();
        let (records, refused) = journal.read().unwrap();
        assert!(records.is_empty());
        assert!(matches!(refused[0].1, RecordError::Newer { found: 2 }), "{refused:?}");
        assert_eq!(fs::read_to_string(journal.path(record.token)).unwrap(), newer);
    }

    #[test]
    fn every_prefix_and_every_flipped_bit_is_caught() {
        let bytes = record(5).encode().unwrap();
        let whole = JournalRecord::parse(&bytes).unwrap();
        for end in 0..bytes.len() {
            assert!(JournalRecord::parse(&bytes[..end]).is_err(), "the first {end} bytes");
        }
        for bit in 0..bytes.len() * 8 {
            let mut flipped = bytes.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            match JournalRecord::parse(&flipped) {
                Err(_) => {}
                Ok(record) => assert_eq!(record, whole, "bit {bit}"),
            }
        }
    }

    proptest! {
        #[test]
        fn any_bytes_and_any_change_are_a_record_or_an_error(
            junk in proptest::collection::vec(any::<u8>(), 0..300),
            at in any::<prop::sample::Index>(),
            cut in any::<prop::sample::Index>(),
        ) {
            prop_assert!(JournalRecord::parse(&junk).is_err());
            let whole = record(5);
            let mut bytes = whole.encode().unwrap();
            let at = at.index(bytes.len());
            let end = at + cut.index(bytes.len() - at + 1);
            bytes.splice(at..end, junk);
            if let Ok(record) = JournalRecord::parse(&bytes) {
                prop_assert_eq!(record, whole);
            }
        }
    }
}
