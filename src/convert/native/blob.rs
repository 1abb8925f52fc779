//! A native layer's blob in its work file.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::thread::{self, JoinHandle};

use sha2::{Digest as _, Sha256};

use super::payload::PayloadSummary;
use crate::ConvertLayerError;
use formats::oci::Digest;

/// Bytes hashed at a time.
const STEP: usize = 1 << 20;

/// A complete blob without its digest.
pub(crate) struct Unhashed {
    pub(super) file: File,
    pub(super) len: u64,
    pub(super) plain: u64,
    pub(super) stored: PayloadSummary,
}

/// A blob that another thread is hashing.
pub(crate) struct Hashing(JoinHandle<io::Result<NativeBlob>>);

impl Unhashed {
    /// Computes the digest on another thread.
    pub(crate) fn hash(self) -> Result<Hashing, ConvertLayerError> {
        let thread = thread::Builder::new().name("native-digest".into()).spawn(move || {
            let mut hasher = Sha256::new();
            let mut reader = FileReader { file: self.file.try_clone()?, at: 0 };
            let mut step = vec![0; STEP];
            loop {
                match reader.read(&mut step)? {
                    0 => break,
                    read => hasher.update(&step[..read]),
                }
            }
            let digest = Digest::from_hasher(hasher);
            let Self { file, len, plain, stored } = self;
            let PayloadSummary { zeros, metadata } = stored;
            Ok(NativeBlob { file, digest, len, plain, zeros, metadata })
        });
        thread.map(Hashing).map_err(ConvertLayerError::Read)
    }
}

impl Hashing {
    /// Waits for the digest.
    pub(crate) fn done(self) -> Result<NativeBlob, ConvertLayerError> {
        let lost =
            |_| ConvertLayerError::Read(io::Error::other("a thread of the conversion ended early"));
        self.0.join().map_err(lost)?.map_err(ConvertLayerError::Read)
    }
}

/// The blob of a native layer: a tar with one member, in an unnamed file that is deleted with this value.
#[derive(Debug)]
pub struct NativeBlob {
    file: File,
    digest: Digest,
    len: u64,
    plain: u64,
    zeros: u64,
    metadata: u64,
}

impl NativeBlob {
    /// SHA-256 of the blob. It is also its `diff_id`, because a tar layer is stored unchanged.
    #[must_use]
    pub fn digest(&self) -> Digest {
        self.digest
    }

    /// Bytes of the blob.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.len
    }

    /// Bytes of the LSMT stream before compression.
    #[must_use]
    pub fn plain_size(&self) -> u64 {
        self.plain
    }

    /// Bytes of file data that were all zero and are not stored.
    #[must_use]
    pub fn zeros(&self) -> u64 {
        self.zeros
    }

    /// Bytes of filesystem metadata.
    #[must_use]
    pub fn metadata(&self) -> u64 {
        self.metadata
    }

    /// Reads the blob from its start.
    ///
    /// # Errors
    /// If the process has no free file descriptor.
    pub fn reader(&self) -> io::Result<impl Read + Send + use<>> {
        Ok(FileReader { file: self.file.try_clone()?, at: 0 })
    }
}

/// Reads a file from its start without moving its position.
struct FileReader {
    file: File,
    at: u64,
}

impl Read for FileReader {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let read = self.file.read_at(buf, self.at)?;
        self.at += read as u64;
        Ok(read)
    }
}
