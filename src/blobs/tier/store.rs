//! The files of a tier: the interface to a directory.
//!
//! Reads are plain `pread`s on the reader's own thread. Writes and syncs belong to the writer, which has many
//! in progress at once; so they are futures, driven by the store's own means ([`Store::drive`]): `io_uring`
//! where there is one, else the calling thread, one after the other.
//!
//! Real: [`DirStore`]. For tests: `memory::MemoryTierStore`, whose power can fail, and `memory::FaultyTierStore`.

use std::fs::{File, OpenOptions};
use std::future::Future;
use std::io;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;

use rustix::fs::FallocateFlags;

use super::uring;
use source::chunk::ChunkBytes;

/// A future of the writer's thread.
pub type Local<'a, T> = Pin<Box<dyn Future<Output = T> + 'a>>;

/// Bytes to be written, shared with their readers during the write.
pub enum ChunkPayload {
    /// A chunk that the memory cache has too.
    Shared(Arc<ChunkBytes>),
    /// A buffer of its own: the bytes of it in this range.
    Owned(Vec<u8>, std::ops::Range<usize>),
}

impl ChunkPayload {
    /// The bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        match self {
            Self::Shared(chunk) => chunk,
            Self::Owned(buffer, range) => buffer.get(range.clone()).unwrap_or_default(),
        }
    }
}

impl From<Vec<u8>> for ChunkPayload {
    fn from(bytes: Vec<u8>) -> Self {
        let range = 0..bytes.len();
        Self::Owned(bytes, range)
    }
}

/// A directory of files.
pub trait Store: Send + Sync {
    /// Opens a file for reading and writing; it is created if it does not exist.
    ///
    /// # Errors
    /// Returns the system's error.
    fn open(&self, name: &str) -> io::Result<Arc<dyn StoredFile>>;

    /// Names of the files, in no order.
    ///
    /// # Errors
    /// Returns the system's error.
    fn names(&self) -> io::Result<Vec<String>>;

    /// Removes a file; a missing file is no error.
    ///
    /// # Errors
    /// Returns the system's error.
    fn remove(&self, name: &str) -> io::Result<()>;

    /// Moves a file to another's place, durably.
    ///
    /// # Errors
    /// Returns the system's error.
    fn rename(&self, from: &str, to: &str) -> io::Result<()>;

    /// Free bytes of the filesystem.
    ///
    /// # Errors
    /// Returns the system's error.
    fn available(&self) -> io::Result<u64>;

    /// Runs the writer on this thread, with the runtime that its writes need.
    fn drive(&self, work: Local<'static, ()>) {
        uring::block_on(work);
    }
}

/// An open file of a [`Store`].
pub trait StoredFile: Send + Sync {
    /// Length in bytes.
    ///
    /// Returns the system's error.
    /// The system's.
    fn len(&self) -> io::Result<u64>;

    /// True if it has no bytes.
    ///
    /// # Errors
    /// Returns the system's error.
    fn is_empty(&self) -> io::Result<bool> {
        Ok(self.len()? == 0)
    }

    /// Fills `buf` from byte `at` on.
    ///
    /// # Errors
    /// Returns the system's error; [`io::ErrorKind::UnexpectedEof`] when the file ends before.
    fn read_exact_at(&self, buf: &mut [u8], at: u64) -> io::Result<()>;

    /// Writes all of `bytes` at byte `at`. Only [`sync`](Self::sync) makes it durable.
    fn write(&self, bytes: Arc<ChunkPayload>, at: u64) -> Local<'_, io::Result<()>>;

    /// Makes all written data durable.
    fn sync(&self) -> Local<'_, io::Result<()>>;

    /// Frees the whole pages in bytes `at..at + len`; they read as zeros.
    ///
    /// # Errors
    /// Returns the system's error.
    fn punch(&self, at: u64, len: u64) -> io::Result<()>;

    /// Truncates the file, or extends it by a hole.
    ///
    /// # Errors
    /// Returns the system's error.
    fn set_len(&self, len: u64) -> io::Result<()>;

    /// Bytes that it takes on the disk.
    ///
    /// # Errors
    /// Returns the system's error.
    fn allocated(&self) -> io::Result<u64>;

    /// True if it still has a name: it was not removed.
    ///
    /// # Errors
    /// Returns the system's error.
    fn is_linked(&self) -> io::Result<bool>;

    /// Hints that the bytes will not be read soon: the kernel need not keep them.
    fn let_go(&self, at: u64, len: u64) {
        let _ = (at, len);
    }
}

/// A real directory.
pub struct DirStore {
    dir: PathBuf,
}

impl DirStore {
    /// Opens the directory, which must exist.
    #[must_use]
    pub fn new(dir: &Path) -> Self {
        Self { dir: dir.to_owned() }
    }
}

impl Store for DirStore {
    fn open(&self, name: &str) -> io::Result<Arc<dyn StoredFile>> {
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).create(true).truncate(false);
        Ok(Arc::new(DirFile { file: file.open(self.dir.join(name))? }))
    }

    fn names(&self) -> io::Result<Vec<String>> {
        let names = std::fs::read_dir(&self.dir)?.map(|entry| Ok(entry?.file_name()));
        let names = names.collect::<io::Result<Vec<_>>>()?;
        Ok(names.into_iter().filter_map(|name| name.into_string().ok()).collect())
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        match std::fs::remove_file(self.dir.join(name)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            result => result,
        }
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        std::fs::rename(self.dir.join(from), self.dir.join(to))?;
        File::open(&self.dir)?.sync_all()
    }

    fn available(&self) -> io::Result<u64> {
        let stat = rustix::fs::statvfs(&self.dir)?;
        Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
    }

    fn drive(&self, work: Local<'static, ()>) {
        uring::run(work);
    }
}

/// A file in it.
struct DirFile {
    file: File,
}

impl StoredFile for DirFile {
    fn len(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.len())
    }

    fn read_exact_at(&self, buf: &mut [u8], at: u64) -> io::Result<()> {
        self.file.read_exact_at(buf, at)
    }

    fn write(&self, bytes: Arc<ChunkPayload>, at: u64) -> Local<'_, io::Result<()>> {
        Box::pin(async move {
            match uring::file(&self.file) {
                Some(file) => uring::write(&file?, bytes, at).await,
                None => self.file.write_all_at(bytes.bytes(), at),
            }
        })
    }

    fn sync(&self) -> Local<'_, io::Result<()>> {
        Box::pin(async move {
            match uring::file(&self.file) {
                Some(file) => file?.sync_data().await,
                None => self.file.sync_data(),
            }
        })
    }

    fn punch(&self, at: u64, len: u64) -> io::Result<()> {
        let how = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        Ok(rustix::fs::fallocate(&self.file, how, at, len)?)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.file.set_len(len)
    }

    fn allocated(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.blocks() * 512)
    }

    fn is_linked(&self) -> io::Result<bool> {
        Ok(self.file.metadata()?.nlink() > 0)
    }

    fn let_go(&self, at: u64, len: u64) {
        let len = std::num::NonZero::new(len);
        let _ = rustix::fs::fadvise(&self.file, at, len, rustix::fs::Advice::DontNeed);
    }
}
