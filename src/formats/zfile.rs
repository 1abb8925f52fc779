//! overlaybd's seekable compressed container.
//!
//! A `ZFile` cuts a stream into blocks of one size (4 to 64 KiB), compresses each alone (LZ4 or ZSTD), and
//! puts the lengths of the compressed blocks behind them: the *jump table*. With the table in memory, any
//! byte of the stream takes one read and the decoding of one block. A checksum of its compressed bytes
//! usually follows each block. Native overlaybd layers have no other integrity data, so it is always verified
//! here.
//!
//! ```text
//! header 512 | blocks: compressed bytes [+ CRC] … | jump table: N × u32 | trailer 512
//! ```
//!
//! In a registry, the file is often the single member of a tar archive: [`wrap`] finds it there. [`open`]
//! takes a layer in any form (with or without a tar, compressed or not) and returns its plain bytes.
//!
//! Contents: [`header`] the record at both ends, [`reader`] random access, [`writer`] deterministic writing,
//! [`block`] one block, [`wrap`] the tar around it.

pub mod block;
pub mod header;
pub mod reader;
pub mod wrap;
pub mod writer;

use std::io;
use std::sync::Arc;

use thiserror::Error;

pub use header::{Algo, ZFileHeader};
pub use reader::{ZFile, ZFileChunks};
pub use wrap::{Wrapping, unwrap};
pub use writer::{Options, Summary, ZFileWriter};

use source::chunk::{ChunkSource, PlainChunks};
use source::{ByteSource, OverBudget, Reserved, SourceError};

/// Error of reading or writing a `ZFile`.
#[derive(Clone, Debug, Error)]
pub enum ZFileError {
    /// The underlying bytes could not be read.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// The jump table does not fit the budget of memory.
    #[error(transparent)]
    Budget(#[from] OverBudget),
    /// The file does not begin with a header.
    #[error("{name} is not a ZFile: it does not begin with a ZFile header")]
    NotZFile {
        /// Name of the opened source.
        name: String,
    },
    /// A record or the jump table breaks a rule of the format.
    #[error("{part} of {name} at byte {offset} is invalid: {rule}")]
    Invalid {
        /// Name of the opened source.
        name: String,
        /// Header, trailer, jump table or tar header.
        part: &'static str,
        /// Offset of the part.
        offset: u64,
        /// The broken rule, and the value found.
        rule: String,
    },
    /// A block fails its checksum or does not decode.
    #[error("Block {block} of {name} (bytes {start}..{end}) is damaged: {reason}")]
    Damaged {
        /// Name of the opened source.
        name: String,
        /// Number of the block, from 0.
        block: u64,
        /// First compressed byte.
        start: u64,
        /// One past the last stored byte of the block, its checksum included.
        end: u64,
        /// The failed check.
        reason: String,
    },
    /// A block compresses to more bytes than existing readers can take.
    #[error(
        "Block {block} takes {stored} bytes with {block_size}-byte blocks, and {rule}: use smaller blocks"
    )]
    BlockTooLong {
        /// Number of the block, from 0.
        block: u64,
        /// Stored bytes of the block, its checksum included.
        stored: u64,
        /// Block size in bytes.
        block_size: u32,
        /// The limit of existing readers.
        rule: &'static str,
    },
    /// Options that no reader accepts.
    #[error("A ZFile cannot be written: {rule}")]
    Options {
        /// The broken rule, and the requested value.
        rule: String,
    },
    /// The output or a compressor failed.
    #[error("Cannot write a ZFile")]
    Write(#[source] Arc<io::Error>),
}

impl From<io::Error> for ZFileError {
    fn from(error: io::Error) -> Self {
        Self::Write(Arc::new(error))
    }
}

/// The plain bytes of a layer file, without its wrapping.
#[derive(Clone)]
pub enum LayerPayload {
    /// Compressed in blocks.
    ZFile(Arc<ZFile>),
    /// Not compressed.
    Plain(Arc<dyn ByteSource>),
}

/// Opens a layer file inside a tar archive or not, compressed or not (spec zfile 8: raw, tar, or tar with a
/// pax header, each around a `ZFile` or plain bytes).
///
/// # Errors
/// [`ZFileError`] if the source cannot be read, or looks like a tar archive or a `ZFile` but is an invalid
/// one.
pub fn open(source: Arc<dyn ByteSource>) -> Result<LayerPayload, ZFileError> {
    open_within(source, &mut Reserved::unbounded())
}

/// As [`open`], with the memory of the jump table added to `part` before it is taken.
///
/// # Errors
/// As [`open`], and [`ZFileError::Budget`].
pub fn open_within(
    source: Arc<dyn ByteSource>,
    part: &mut Reserved,
) -> Result<LayerPayload, ZFileError> {
    let (source, _) = unwrap(source)?;
    if header::is_zfile(&*source)? {
        return Ok(LayerPayload::ZFile(Arc::new(ZFile::open_within(source, part)?)));
    }
    Ok(LayerPayload::Plain(source))
}

impl LayerPayload {
    /// The plain bytes with random access.
    #[must_use]
    pub fn source(&self) -> Arc<dyn ByteSource> {
        match self {
            LayerPayload::ZFile(file) => file.clone(),
            LayerPayload::Plain(source) => source.clone(),
        }
    }

    /// The plain bytes in chunks; a cache knows the file as `id`.
    #[must_use]
    pub fn chunks(&self, id: &str) -> Arc<dyn ChunkSource> {
        match self {
            LayerPayload::ZFile(file) => {
                Arc::new(ZFileChunks::new(format!("zfile:{id}"), file.clone()))
            }
            LayerPayload::Plain(source) => {
                Arc::new(PlainChunks::new(format!("plain:{id}"), source.clone()))
            }
        }
    }

    /// Reads all plain bytes.
    ///
    /// # Errors
    /// [`ZFileError`] if a block is damaged or there is no memory for the bytes.
    pub fn read_all(&self) -> Result<Vec<u8>, ZFileError> {
        match self {
            LayerPayload::ZFile(file) => file.read_all(),
            LayerPayload::Plain(source) => {
                let mut bytes = reader::room(source.name(), source.len())?;
                bytes.resize(source.len() as usize, 0);
                source.read_exact_at(&mut bytes, 0)?;
                Ok(bytes)
            }
        }
    }
}
