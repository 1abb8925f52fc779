//! A run of bytes that can be read at any position.
//!
//! Formats parse from a [`ByteSource`], which can be memory, a file or a range of a blob in a registry. A
//! source is immutable and its length never changes while it is open; if a file is truncated during that
//! time, reads return [`SourceError`], not wrong bytes.
//!
//! The read path of a disk needs more from a remote source than single reads: several neighbouring pieces by
//! one request, each passed on as soon as it is complete ([`ByteSource::read_run`]), and an urgency
//! ([`Class`]).
//!
//! Implementations: [`FileSource`], [`MemorySource`], [`SubSource`], and the registry's blob. For tests:
//! `testing::FaultySource`, which fails or returns wrong bytes at chosen offsets.

use std::fmt;
use std::fs::{File, Metadata};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::Path;
use std::sync::Arc;

use thiserror::Error;

use crate::SharedBytes;
use crate::origin::Origin;
use crate::traffic::Traffic;

/// Error of reading bytes. Cheap to clone: one failed read can have many waiters.
#[derive(Clone, Debug, Error)]
pub enum SourceError {
    /// The operating system refused.
    #[error("Cannot read {len} bytes at {offset} of {name}")]
    Io {
        /// Name of the source: a path or a blob.
        name: String,
        /// First requested byte.
        offset: u64,
        /// Number of requested bytes.
        len: usize,
        /// The system's reason.
        #[source]
        source: Arc<io::Error>,
    },
    /// The range does not lie inside the source.
    #[error("Bytes {offset}..{end} of {name} do not exist: it has {size} bytes")]
    PastEnd {
        /// Name of the source.
        name: String,
        /// First requested byte.
        offset: u64,
        /// One past the last requested byte.
        end: u64,
        /// Length of the source.
        size: u64,
    },
    /// A registry did not deliver; the text has its answer and the number of tries.
    #[error("Cannot fetch bytes {offset}..{end} of {name}: {reason}")]
    Remote {
        /// Blob and host.
        name: String,
        /// First requested byte.
        offset: u64,
        /// One past the last requested byte.
        end: u64,
        /// The failure, as a sentence without a full stop.
        reason: String,
        /// True if another try cannot succeed.
        lasting: bool,
    },
}

/// Urgency of a read; the first is the most urgent. Demand never waits behind the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Class {
    /// A process waits for it.
    Demand,
    /// A process will probably request it soon.
    Prefetch,
    /// No process requested it: the rest of a layer, fetched with spare capacity of the line.
    Fill,
}

/// The buffers of one read that fills several, one after the other.
pub trait Run {
    /// Room for the next bytes, up to the end of a buffer; never empty. `None` if all buffers are full.
    fn room(&mut self) -> Option<&mut [u8]>;

    /// Reports that this many bytes were put into the room. A buffer that is full then is passed on.
    fn filled(&mut self, bytes: usize);

    /// Puts bytes in, as many as fit.
    fn put(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty()
            && let Some(room) = self.room()
        {
            let (now, later) = bytes.split_at(room.len().min(bytes.len()));
            room[..now.len()].copy_from_slice(now);
            self.filled(now.len());
            bytes = later;
        }
    }
}

/// A run of one buffer.
pub struct OneBuffer<'a> {
    buffer: &'a mut [u8],
    filled: usize,
}

impl<'a> OneBuffer<'a> {
    /// A run with an empty buffer.
    pub fn new(buffer: &'a mut [u8]) -> Self {
        Self { buffer, filled: 0 }
    }
}

impl Run for OneBuffer<'_> {
    fn room(&mut self) -> Option<&mut [u8]> {
        self.buffer.get_mut(self.filled..).filter(|room| !room.is_empty())
    }

    fn filled(&mut self, bytes: usize) {
        self.filled += bytes;
    }
}

/// An immutable run of bytes, readable at any position by many threads.
pub trait ByteSource: Send + Sync {
    /// Length in bytes.
    fn len(&self) -> u64;

    /// True if there are no bytes.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Fills `buf` from byte `offset` on, completely or not at all.
    ///
    /// # Errors
    /// [`SourceError::PastEnd`] if the range leaves the source, otherwise the error of the source.
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> Result<(), SourceError>;

    /// Fills the buffers of `run`, together as long as `range`, with its bytes: by one request if requests
    /// are costly. Each buffer is passed on as soon as it is full.
    ///
    /// # Errors
    /// The errors of [`read_exact_at`](Self::read_exact_at); buffers passed on before stay valid.
    fn read_run(
        &self,
        range: Range<u64>,
        class: Class,
        run: &mut dyn Run,
    ) -> Result<(), SourceError> {
        let _ = class;
        let mut at = range.start;
        while let Some(room) = run.room() {
            let len = room.len();
            self.read_exact_at(room, at)?;
            run.filled(len);
            at += len as u64;
        }
        Ok(())
    }

    /// True if a read costs no more than a system call, so that joint requests and requests ahead of time
    /// gain nothing.
    fn is_local(&self) -> bool {
        true
    }

    /// Reports that the bytes of `range` were wrong: the next read should use another server.
    fn distrust(&self, range: Range<u64>) {
        let _ = range;
    }

    /// Counts of bytes and requests from remote hosts so far.
    fn traffic(&self) -> Traffic {
        Traffic::default()
    }

    /// Its origin. A source that knows none has its name.
    fn origin(&self) -> Origin {
        Origin::new(self.name())
    }

    /// The source that it is a part of, and the position of its first byte there.
    fn outer(&self) -> Option<(&Arc<dyn ByteSource>, u64)> {
        None
    }

    /// All bytes as one slice, if they are in memory already.
    fn as_slice(&self) -> Option<&[u8]> {
        None
    }

    /// Name of this source in messages: a path or a digest.
    fn name(&self) -> &str;
}

impl fmt::Debug for dyn ByteSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({} bytes)", self.name(), self.len())
    }
}

/// Returns `offset + len` if it lies inside `size`.
fn check_range(name: &str, size: u64, offset: u64, len: usize) -> Result<(), SourceError> {
    let end = offset.saturating_add(len as u64);
    if end > size {
        return Err(SourceError::PastEnd { name: name.to_owned(), offset, end, size });
    }
    Ok(())
}

/// Bytes in memory.
#[derive(Clone)]
pub struct MemorySource {
    name: String,
    bytes: SharedBytes,
}

impl MemorySource {
    /// Takes `bytes` under a name for messages.
    pub fn new(name: impl Into<String>, bytes: impl Into<Arc<[u8]>>) -> Self {
        let bytes: Arc<[u8]> = bytes.into();
        Self::shared(name, Arc::new(bytes))
    }

    /// Takes shared bytes without a copy.
    pub fn shared(name: impl Into<String>, bytes: SharedBytes) -> Self {
        Self { name: name.into(), bytes }
    }

    fn bytes(&self) -> &[u8] {
        self.bytes.bytes()
    }
}

impl ByteSource for MemorySource {
    fn len(&self) -> u64 {
        self.bytes().len() as u64
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> Result<(), SourceError> {
        check_range(&self.name, self.len(), offset, buf.len())?;
        let start = offset as usize;
        buf.copy_from_slice(&self.bytes()[start..start + buf.len()]);
        Ok(())
    }

    fn as_slice(&self) -> Option<&[u8]> {
        Some(self.bytes())
    }

    fn name(&self) -> &str {
        &self.name
    }
}

/// A file, read with `pread`.
pub struct FileSource {
    name: String,
    origin: String,
    file: File,
    len: u64,
}

impl FileSource {
    /// Opens `path` and takes its present length as final.
    ///
    /// # Errors
    /// [`SourceError::Io`] if the file cannot be opened.
    pub fn open(path: &Path) -> Result<Self, SourceError> {
        let name = path.display().to_string();
        let io = |source| SourceError::Io {
            name: name.clone(),
            offset: 0,
            len: 0,
            source: Arc::new(source),
        };
        let file = File::open(path).map_err(io)?;
        Self::new(path, name.clone(), file)
    }

    /// Takes an open file, its path (it is part of the origin), a name for messages, and its present length as final.
    ///
    /// # Errors
    /// [`SourceError::Io`] if its length cannot be had.
    pub fn new(path: &Path, name: String, file: File) -> Result<Self, SourceError> {
        match file.metadata() {
            Ok(meta) => Ok(Self { origin: file_state(path, &meta), len: meta.len(), name, file }),
            Err(source) => {
                Err(SourceError::Io { name, offset: 0, len: 0, source: Arc::new(source) })
            }
        }
    }
}

impl FileSource {
    /// The file, for a reader from front to end.
    #[must_use]
    pub fn into_file(self) -> File {
        self.file
    }
}

/// Name of a file in its present state: another file at its path, or the same file changed, has another name. The time
/// of the last change of the inode belongs to it, because a user can set every other time.
#[must_use]
pub fn file_state(path: &Path, meta: &Metadata) -> String {
    let (dev, ino, len) = (meta.dev(), meta.ino(), meta.len());
    let (written, changed) = (meta.mtime(), meta.ctime());
    let (written_ns, changed_ns) = (meta.mtime_nsec(), meta.ctime_nsec());
    let path = path.display();
    format!("{path}:{dev:x}:{ino:x}:{len}:{written}.{written_ns}:{changed}.{changed_ns}")
}

impl ByteSource for FileSource {
    fn len(&self) -> u64 {
        self.len
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> Result<(), SourceError> {
        check_range(&self.name, self.len, offset, buf.len())?;
        self.file.read_exact_at(buf, offset).map_err(|source| SourceError::Io {
            name: self.name.clone(),
            offset,
            len: buf.len(),
            source: Arc::new(source),
        })
    }

    fn origin(&self) -> Origin {
        Origin::new(self.origin.clone())
    }

    fn name(&self) -> &str {
        &self.name
    }
}

/// A range of another source.
pub struct SubSource {
    inner: Arc<dyn ByteSource>,
    start: u64,
    len: u64,
}

impl SubSource {
    /// Bytes `start..start + len` of `inner`.
    ///
    /// # Errors
    /// [`SourceError::PastEnd`] if the range leaves `inner`.
    pub fn new(inner: Arc<dyn ByteSource>, start: u64, len: u64) -> Result<Self, SourceError> {
        let end = start.saturating_add(len);
        if end > inner.len() {
            return Err(SourceError::PastEnd {
                name: inner.name().to_owned(),
                offset: start,
                end,
                size: inner.len(),
            });
        }
        Ok(Self { inner, start, len })
    }
}

impl ByteSource for SubSource {
    fn len(&self) -> u64 {
        self.len
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> Result<(), SourceError> {
        check_range(self.name(), self.len, offset, buf.len())?;
        self.inner.read_exact_at(buf, self.start + offset)
    }

    fn read_run(
        &self,
        range: Range<u64>,
        class: Class,
        run: &mut dyn Run,
    ) -> Result<(), SourceError> {
        let len = range.end.saturating_sub(range.start);
        check_range(self.name(), self.len, range.start, len as usize)?;
        self.inner.read_run(self.start + range.start..self.start + range.end, class, run)
    }

    fn is_local(&self) -> bool {
        self.inner.is_local()
    }

    fn distrust(&self, range: Range<u64>) {
        self.inner.distrust(self.start + range.start..self.start + range.end);
    }

    fn traffic(&self) -> Traffic {
        self.inner.traffic()
    }

    fn origin(&self) -> Origin {
        self.inner.origin()
    }

    fn outer(&self) -> Option<(&Arc<dyn ByteSource>, u64)> {
        Some((&self.inner, self.start))
    }

    fn as_slice(&self) -> Option<&[u8]> {
        let start = self.start as usize;
        self.inner.as_slice().map(|bytes| &bytes[start..start + self.len as usize])
    }

    fn name(&self) -> &str {
        self.inner.name()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_read_outside_a_source_is_refused_and_named() {
        let source: Arc<dyn ByteSource> = Arc::new(MemorySource::new("blob", vec![1, 2, 3]));
        let sub = SubSource::new(source.clone(), 1, 2).unwrap();
        let mut buf = [0; 2];
        sub.read_exact_at(&mut buf, 0).unwrap();
        assert_eq!(buf, [2, 3]);
        assert_eq!(
            sub.read_exact_at(&mut buf, 1).unwrap_err().to_string(),
            "Bytes 1..3 of blob do not exist: it has 2 bytes"
        );
        assert!(sub.read_exact_at(&mut buf, u64::MAX).is_err());
        assert!(SubSource::new(source, 2, u64::MAX).is_err());
    }
}
