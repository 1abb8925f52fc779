//! overlaybd's seekable compressed container.
//!
//! A `ZFile` cuts a stream into blocks of one size (4 to 64 KiB), compresses each alone (LZ4 or
//! ZSTD), and puts the lengths of the compressed blocks behind them: the *jump table*. With the
//! table in memory any byte of the stream is one read and one block of decoding away. Each block is
//! usually followed by a checksum of its compressed bytes, which is the only integrity data that
//! native overlaybd layers have: it is always verified here.
//!
//! ```text
//! header 512 | blocks: compressed bytes [+ CRC] … | jump table: N × u32 | trailer 512
//! ```
//!
//! In a registry the file often sits in a tar archive with one member: [`wrap`] finds it there.
//! [`open`] takes whatever a layer may be (tar or not, compressed or not) and gives its plain bytes.
//!
//! Contents: [`header`] the record at both ends, [`reader`] random access, [`writer`] the same bytes
//! for the same input, [`parallel`] the same bytes again from all cores, [`wrap`] the tar around it.

pub mod block;
pub mod header;
pub mod reader;
pub mod wrap;
pub mod writer;

use std::io;
use std::sync::Arc;

use thiserror::Error;

pub use header::{Algo, Record};
pub use reader::{ZFile, ZFileChunks};
pub use wrap::{Wrapping, unwrap};
pub use writer::{Options, Summary, Writer};

use source::chunk::{ChunkSource, PlainChunks};
use source::{ByteSource, SourceError};

/// Why a `ZFile` cannot be read or written.
#[derive(Clone, Debug, Error)]
pub enum ZFileError {
    /// The bytes below could not be had.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// No header where one belongs.
    #[error("{name} is not a ZFile: it does not begin with a ZFile header")]
    NotZFile {
        /// What was opened.
        name: String,
    },
    /// A record or the jump table breaks a rule of the format.
    #[error("{part} of {name} at byte {offset} is invalid: {rule}")]
    Invalid {
        /// What was opened.
        name: String,
        /// Header, trailer, jump table or tar header.
        part: &'static str,
        /// Where it lies.
        offset: u64,
        /// What should hold, and what was found.
        rule: String,
    },
    /// A block does not decode to what was written.
    #[error("Block {block} of {name} (bytes {start}..{end}) is damaged: {reason}")]
    Damaged {
        /// What was opened.
        name: String,
        /// Number of the block, from 0.
        block: u64,
        /// First compressed byte.
        start: u64,
        /// One past the last stored byte of the block, its checksum included.
        end: u64,
        /// Which check failed.
        reason: String,
    },
    /// A block compresses to more than existing readers can take.
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
        /// What should hold, and what was asked for.
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

/// The plain bytes of a layer file, whatever it was wrapped in.
#[derive(Clone)]
pub enum Payload {
    /// Compressed in blocks.
    ZFile(Arc<ZFile>),
    /// As it is.
    Plain(Arc<dyn ByteSource>),
}

/// Looks through the tar archive, if any, and the compression, if any (spec zfile 8: raw, tar, or
/// tar with a pax header, each around a `ZFile` or plain bytes).
///
/// # Errors
/// [`ZFileError`] when the source cannot be read, or looks like a tar archive or a `ZFile` and is an
/// invalid one.
pub fn open(source: Arc<dyn ByteSource>) -> Result<Payload, ZFileError> {
    let (source, _) = unwrap(source)?;
    if header::is_zfile(&*source)? {
        return Ok(Payload::ZFile(Arc::new(ZFile::open(source)?)));
    }
    Ok(Payload::Plain(source))
}

impl Payload {
    /// The plain bytes at any position.
    #[must_use]
    pub fn source(&self) -> Arc<dyn ByteSource> {
        match self {
            Payload::ZFile(file) => file.clone(),
            Payload::Plain(source) => source.clone(),
        }
    }

    /// The plain bytes in chunks, for a cache that knows the file as `id`.
    #[must_use]
    pub fn chunks(&self, id: &str) -> Arc<dyn ChunkSource> {
        match self {
            Payload::ZFile(file) => Arc::new(ZFileChunks::new(format!("zfile:{id}"), file.clone())),
            Payload::Plain(source) => {
                Arc::new(PlainChunks::new(format!("plain:{id}"), source.clone()))
            }
        }
    }

    /// All plain bytes.
    ///
    /// # Errors
    /// [`ZFileError`] when a block is damaged or there is no room for the bytes.
    pub fn read_all(&self) -> Result<Vec<u8>, ZFileError> {
        match self {
            Payload::ZFile(file) => file.read_all(),
            Payload::Plain(source) => {
                let mut bytes = reader::room(source.name(), source.len())?;
                bytes.resize(source.len() as usize, 0);
                source.read_exact_at(&mut bytes, 0)?;
                Ok(bytes)
            }
        }
    }
}
