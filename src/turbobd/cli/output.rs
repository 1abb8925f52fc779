//! The file that a command writes: the only way to one.
//!
//! A regular file is written beside its place under another name, and renamed when it is whole: after a failure the old
//! file is there, unchanged. An existing file is replaced with `--force` only. A symbolic link stays a link, and the
//! file behind it is written. A device or a FIFO is written into, and `-` is stdout: what arrived there before a failure
//! stays there. [`OutputFile::open`] refuses before any work is done.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Seek as _, SeekFrom, Write as _};
use std::os::fd::AsFd as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _, fchown};
use std::path::{Path, PathBuf};

use tempfile::NamedTempFile;

use super::Failure;

/// Most symbolic links that are followed, as the kernel does.
const LINKS: usize = 40;

/// A file to write.
pub(super) struct OutputFile {
    shown: String,
    to: WrittenTo,
}

/// What the bytes are written to.
enum WrittenTo {
    /// A new file, and the place that it gets. `replaces` is the file that lies there.
    Beside { new: NamedTempFile, place: PathBuf, replaces: Option<Box<fs::Metadata>> },
    /// What exists and is no regular file.
    Into(File),
}

impl OutputFile {
    /// Opens `path` for writing; `-` is stdout. `force` replaces an existing regular file.
    ///
    /// # Errors
    /// [`Failure::Failed`] if a file exists and `force` is not set, if the path is a directory or a socket, or if the
    /// system refuses.
    pub(super) fn open(path: &Path, force: bool) -> Result<Self, Failure> {
        if path == Path::new("-") {
            let stdout = io::stdout().as_fd().try_clone_to_owned().map_err(cannot("stdout"))?;
            return Ok(Self { shown: "stdout".into(), to: WrittenTo::Into(stdout.into()) });
        }
        let shown = path.display().to_string();
        let refused = |why: &str| Err(Failure::Failed(format!("Cannot write {shown}: {why}")));
        let place = behind_links(path).map_err(cannot(&shown))?;
        let replaces = match fs::metadata(&place) {
            Ok(meta) => Some(Box::new(meta)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(cannot(&shown)(error)),
        };
        let kind = replaces.as_ref().map(|meta| meta.file_type());
        match kind {
            Some(kind) if kind.is_dir() => refused("it is a directory. Name a file in it"),
            Some(kind) if kind.is_socket() => refused("it is a socket. Name a file"),
            Some(kind) if !kind.is_file() => {
                let file = OpenOptions::new().write(true).open(&place).map_err(cannot(&shown))?;
                Ok(Self { shown, to: WrittenTo::Into(file) })
            }
            Some(_) if !force => refused("it exists already. --force replaces it"),
            _ => {
                let dir = match place.parent() {
                    Some(dir) if !dir.as_os_str().is_empty() => dir,
                    _ => Path::new("."),
                };
                // The mode of any new file, of which the umask takes its part.
                let new = tempfile::Builder::new()
                    .prefix(".turbobd-")
                    .permissions(Permissions::from_mode(0o666))
                    .tempfile_in(dir)
                    .map_err(cannot(&shown))?;
                Ok(Self { shown, to: WrittenTo::Beside { new, place, replaces } })
            }
        }
    }

    /// The file to write to.
    pub(super) fn file(&self) -> &File {
        match &self.to {
            WrittenTo::Beside { new, .. } => new.as_file(),
            WrittenTo::Into(file) => file,
        }
    }

    /// True if the file is new and empty, so that it can be written at any position. A device may hold other bytes, and a
    /// FIFO has no positions.
    pub(super) fn is_new(&self) -> bool {
        matches!(self.to, WrittenTo::Beside { .. })
    }

    /// True if a file is there that this one replaces.
    pub(super) fn replaces(&self) -> bool {
        matches!(self.to, WrittenTo::Beside { replaces: Some(_), .. })
    }

    /// Checks that a block device has room for `size` bytes; anything else tells when it is written.
    ///
    /// # Errors
    /// [`Failure::Failed`] with both sizes.
    pub(super) fn has_room_for(&self, size: u64) -> Result<(), Failure> {
        let WrittenTo::Into(file) = &self.to else { return Ok(()) };
        let mut file: &File = file;
        if !file.metadata().map_err(self.cannot())?.file_type().is_block_device() {
            return Ok(());
        }
        let room = file.seek(SeekFrom::End(0)).map_err(self.cannot())?;
        file.rewind().map_err(self.cannot())?;
        if room >= size {
            return Ok(());
        }
        let shown = &self.shown;
        Err(Failure::Failed(format!(
            "Cannot write {shown}: the device has {room} bytes, and the disk has {size}"
        )))
    }

    /// Writes all of `bytes` and [finishes](Self::finish).
    ///
    /// # Errors
    /// [`Failure::Failed`] if the system refuses; a regular file is then as it was.
    pub(super) fn write(self, bytes: &[u8]) -> Result<(), Failure> {
        (&mut self.file()).write_all(bytes).map_err(self.cannot())?;
        self.finish()
    }

    /// Gives a whole file its place, durably.
    ///
    /// # Errors
    /// [`Failure::Failed`] if the system refuses, or if a file has come to the place meanwhile that may not be replaced.
    pub(super) fn finish(self) -> Result<(), Failure> {
        let failed = cannot(&self.shown);
        let WrittenTo::Beside { new, place, replaces } = self.to else { return Ok(()) };
        let kept = match replaces {
            None => new.as_file().sync_all().and_then(|()| Ok(new.persist_noclobber(place)?)),
            Some(old) => {
                let file = new.as_file();
                // Of another owner's file the content may be ours to change, but not always the owner.
                let _ = fchown(file, Some(old.uid()), Some(old.gid()));
                file.set_permissions(Permissions::from_mode(old.mode() & 0o7777))
                    .and_then(|()| file.sync_all())
                    .and_then(|()| Ok(new.persist(place)?))
            }
        };
        kept.map(drop).map_err(failed)
    }

    /// Error of a write to this file.
    pub(super) fn cannot(&self) -> impl Fn(io::Error) -> Failure {
        cannot(&self.shown)
    }
}

fn cannot(shown: &str) -> impl Fn(io::Error) -> Failure {
    let shown = shown.to_owned();
    move |error| Failure::Failed(format!("Cannot write {shown}: {error}"))
}

/// The path behind symbolic links, also if nothing is there.
fn behind_links(path: &Path) -> io::Result<PathBuf> {
    let mut path = path.to_owned();
    for _ in 0..LINKS {
        match fs::symlink_metadata(&path) {
            Ok(meta) if meta.file_type().is_symlink() => {
                let target = fs::read_link(&path)?;
                path.pop();
                path.push(target); // an absolute target replaces the path
            }
            Ok(_) => return Ok(path),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(path),
            Err(error) => return Err(error),
        }
    }
    Err(io::Error::other("it is behind too many symbolic links"))
}
