//! A log file that stays within a bound: `logConfig.logPath` and `auditPath`.
//!
//! A line is appended by one write. Before a write that would take the file over its size, the file is
//! *rotated*: `log` becomes `log.1`, `log.1` becomes `log.2`, and so on, and the oldest is removed. So at most
//! `size * (keep + 1)` bytes are on disk.
//!
//! A file that cannot be opened is an error at the start. Later failures (a full disk, a folder that became
//! read-only) never reach the writer: the line is lost and counted, and the next one tries again. A folder in
//! which nothing can be renamed makes the file begin anew in place, so that the bound holds there too.
//! A line that was written in part is ended before the next one, so that no two lines become one.
//!
//! The lines name images and hosts: the file is for its owner alone, and in a folder that others can write no link is
//! followed to it ([`sys::private`]).
//!
//! The path is looked at again when the file is rotated: another process that has rotated it (a second server with
//! the same configuration, `logrotate`) is followed to the new file. Only regular files are rotated; a pipe or
//! `/dev/stderr` may be named too.
//!
//! The crates for this do not fit: `tracing-appender` rotates by time alone, `file-rotate` panics when it cannot
//! make a folder, and `logroller` brings `regex` and `chrono` for names that are not wanted here.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::Mutex;
use threads::Counter;

/// How large a log file becomes, and how many of its predecessors are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rotation {
    /// Bytes of the file at most. A single longer write is not divided.
    pub size: u64,
    /// Old files kept.
    pub keep: u64,
}

/// A file that lines are appended to by any thread. Clones write to the same file.
#[derive(Clone, Debug)]
pub struct LogFile(Arc<LogShared>);

#[derive(Debug)]
struct LogShared {
    path: PathBuf,
    rotation: Rotation,
    state: Mutex<OpenLog>,
    lost: Counter,
}

#[derive(Debug)]
struct OpenLog {
    file: File,
    /// Bytes in the file, as far as this process knows.
    size: u64,
    is_regular: bool,
    /// The last write ended within a line.
    is_torn: bool,
}

impl OpenLog {
    fn open(path: &Path) -> io::Result<Self> {
        let file = sys::private::open(path, OpenOptions::new().append(true).create(true))?;
        let metadata = file.metadata()?;
        let (size, is_regular) = (metadata.len(), metadata.is_file());
        Ok(Self { file, size, is_regular, is_torn: false })
    }

    fn write(&mut self, lines: &[u8]) -> io::Result<()> {
        let torn = std::mem::take(&mut self.is_torn);
        let mut rest = [if torn { &b"\n"[..] } else { &[] }, lines].concat();
        while !rest.is_empty() {
            match self.file.write(&rest) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => {
                    self.size += written as u64;
                    self.is_torn = rest[written - 1] != b'\n';
                    rest.drain(..written);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    self.is_torn |= torn && rest.len() > lines.len();
                    return Err(error);
                }
            }
        }
        Ok(())
    }
}

impl LogFile {
    /// Opens the file at `path` to append to it; makes it, and its folder, if there is none.
    ///
    /// # Errors
    /// The system's.
    pub fn open(path: &Path, rotation: Rotation) -> io::Result<Self> {
        let named = path.parent().filter(|folder| !folder.as_os_str().is_empty());
        if let Some(folder) = named.filter(|folder| !folder.exists()) {
            sys::private::folder(folder)?;
        }
        let state = Mutex::new(OpenLog::open(path)?);
        let lost = Counter::default();
        Ok(Self(Arc::new(LogShared { path: path.to_owned(), rotation, state, lost })))
    }

    /// Appends whole lines, which end with a line feed, by one write. False if they are lost.
    pub fn append(&self, lines: &[u8]) -> bool {
        let shared = &*self.0;
        // Its numbers are sound after a panic elsewhere.
        let mut state = shared.state.lock();
        let written = shared.make_room(&mut state, lines.len() as u64);
        let written = written.and_then(|()| state.write(lines)).is_ok();
        if !written {
            shared.lost.add(1);
        }
        written
    }

    /// Appends that failed so far.
    #[must_use]
    pub fn lost(&self) -> u64 {
        self.0.lost.get()
    }
}

/// For `tracing`, which makes one write of each event. There is no error: what cannot be written is counted.
impl Write for LogFile {
    fn write(&mut self, lines: &[u8]) -> io::Result<usize> {
        self.append(lines);
        Ok(lines.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl LogShared {
    /// Rotates the file if so many bytes more do not fit.
    fn make_room(&self, state: &mut OpenLog, bytes: u64) -> io::Result<()> {
        let is_over = |state: &OpenLog| {
            state.is_regular && state.size > 0 && state.size + bytes > self.rotation.size
        };
        if !is_over(state) {
            return Ok(());
        }
        let own = state.file.metadata()?;
        let there = fs::metadata(&self.path).ok();
        let is_own =
            there.is_some_and(|there| (there.dev(), there.ino()) == (own.dev(), own.ino()));
        if is_own {
            // It may have been truncated by others.
            state.size = own.len();
        } else {
            *state = OpenLog::open(&self.path)?;
        }
        if is_over(state) && self.rotate(state).is_err() {
            state.file.set_len(0)?;
            (state.size, state.is_torn) = (0, false);
        }
        Ok(())
    }

    /// Moves each file one place on, and begins a new one. On an error the file that is written to is at its path.
    fn rotate(&self, state: &mut OpenLog) -> io::Result<()> {
        let keep = self.rotation.keep;
        if keep == 0 {
            return Err(io::ErrorKind::Unsupported.into()); // it begins anew in place
        }
        // Up to the first gap: what is behind one stays.
        let last = (1..keep).find(|&number| !self.old(number).exists()).unwrap_or(keep);
        for number in (1..last).rev() {
            fs::rename(self.old(number), self.old(number + 1))?;
        }
        fs::rename(&self.path, self.old(1))?;
        *state =
            OpenLog::open(&self.path).inspect_err(|_| _ = fs::rename(self.old(1), &self.path))?;
        Ok(())
    }

    /// The old file of this number, 1 the newest.
    fn old(&self, number: u64) -> PathBuf {
        let mut name = OsString::from(&self.path);
        name.push(format!(".{number}"));
        name.into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(folder: &Path) -> Vec<String> {
        let entries = fs::read_dir(folder).unwrap();
        let mut names: Vec<_> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn a_file_is_rotated_at_its_size_and_so_many_old_ones_are_kept() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("made").join("log");
        let file = LogFile::open(&path, Rotation { size: 20, keep: 2 }).unwrap();
        for number in 0..9 {
            assert!(file.append(format!("line {number}..\n").as_bytes()), "9 bytes each");
        }
        let read = |name: &str| fs::read_to_string(path.with_file_name(name)).unwrap();
        assert_eq!(names(path.parent().unwrap()), ["log", "log.1", "log.2"]);
        assert_eq!(read("log"), "line 8..\n");
        assert_eq!(read("log.1"), "line 6..\nline 7..\n");
        assert_eq!(read("log.2"), "line 4..\nline 5..\n");
        // After a restart the size counts on.
        drop(file);
        let file = LogFile::open(&path, Rotation { size: 20, keep: 1 }).unwrap();
        file.append(b"more\n");
        file.append(b"and more\n");
        assert_eq!((read("log"), read("log.1")), ("and more\n".into(), "line 8..\nmore\n".into()));
        // What is longer than the bound is written whole.
        file.append(b"a line of more than twenty bytes\n");
        assert_eq!(read("log"), "a line of more than twenty bytes\n");
    }

    #[test]
    fn without_old_files_it_begins_anew_in_place() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        let file = LogFile::open(&path, Rotation { size: 8, keep: 0 }).unwrap();
        [b"one..\n", b"two..\n"].iter().for_each(|line| _ = file.append(*line));
        assert_eq!(fs::read(&path).unwrap(), b"two..\n");
        assert_eq!(names(folder.path()), ["log"]);
    }

    #[test]
    fn a_full_disk_loses_lines_and_nothing_else() {
        let file = LogFile::open(Path::new("/dev/full"), Rotation { size: 8, keep: 3 }).unwrap();
        for _ in 0..5 {
            assert!(!file.append(b"a line that no disk takes\n"));
        }
        assert_eq!(file.lost(), 5);
        assert!(file.clone().write(b"x\n").is_ok_and(|written| written == 2));
        assert!(!Path::new("/dev/full.1").exists(), "a device is not rotated");
    }

    #[test]
    fn a_line_that_was_written_in_part_is_ended_before_the_next() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        let mut state = OpenLog::open(&path).unwrap();
        state.write(b"in par").unwrap();
        assert!(state.is_torn);
        state.write(b"whole\n").unwrap();
        assert!(!state.is_torn);
        assert_eq!(fs::read(&path).unwrap(), b"in par\nwhole\n");
    }

    #[test]
    fn a_file_that_cannot_be_renamed_begins_anew_so_that_the_bound_holds() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        let file = LogFile::open(&path, Rotation { size: 8, keep: 1 }).unwrap();
        // A folder in the place of the old file cannot be replaced by a file, not by root either.
        fs::create_dir_all(folder.path().join("log.1").join("full")).unwrap();
        for line in [b"one..\n", b"two..\n", b"three\n"] {
            assert!(file.append(line));
        }
        assert_eq!(fs::read(&path).unwrap(), b"three\n");
    }

    #[test]
    fn a_file_that_others_have_moved_or_cut_is_followed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        let rotation = Rotation { size: 20, keep: 2 };
        let (own, other) =
            (LogFile::open(&path, rotation).unwrap(), LogFile::open(&path, rotation).unwrap());
        own.append(b"1 of own..\n");
        other.append(b"1 of other\n");
        other.append(b"2 of other\n");
        // Its own count says 11 bytes: it looks, and finds another file.
        own.append(b"2 of own..\n");
        own.append(b"3 of own..\n");
        assert_eq!(fs::read(&path).unwrap(), b"3 of own..\n");
        assert_eq!(names(folder.path()), ["log", "log.1", "log.2"]);
        fs::File::create(&path).unwrap();
        own.append(b"4 of own..\n");
        assert_eq!(fs::read(&path).unwrap(), b"4 of own..\n");
        assert_eq!(names(folder.path()), ["log", "log.1", "log.2"]);
    }

    #[test]
    fn a_path_that_cannot_be_written_is_an_error_at_once() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("file"), b"").unwrap();
        for path in [folder.path().to_owned(), folder.path().join("file").join("log")] {
            assert!(LogFile::open(&path, Rotation { size: 8, keep: 1 }).is_err());
        }
    }
}
