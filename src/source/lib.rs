//! The two seams under the formats: bytes at any position, and chunks that are fetched and verified alone.
//!
//! A format parses from a [`ByteSource`] and does not care whether it is memory, a file or a range of a blob in a
//! registry. A layer is read through a [`ChunkSource`](chunk::ChunkSource): a blob that is cut into pieces, each
//! fetched, verified and, but for pieces of a long zstd frame, decoded alone. The crate `formats` implements chunks, the crate `registry` remote bytes,
//! and the crate `blobs` joins both without a name of either.
//!
//! * [`budget`] a bound on memory, and what is taken of it
//! * [`bytes`] a run of bytes: memory, file, part of another
//! * [`chunk`] a blob in chunks: the unit of fetching, verifying and caching
//! * [`failure`] an error and its causes as one line
//! * `origin` the party that answers for bytes without a proof
//! * `proof` what proves the bytes of chunks
//! * `stable` bytes that keep their address, for those who tell it to the kernel
//! * `testing` doubles, by the feature of that name
//! * `traffic` what a source fetched, and what failed on the way
//!
//! ```
//! use turbobd_source::{ByteSource, MemorySource};
//! let blob = MemorySource::new("blob", b"0123456789".to_vec());
//! let mut part = [0; 3];
//! blob.read_exact_at(&mut part, 4)?;
//! assert_eq!(&part, b"456");
//! assert!(blob.read_exact_at(&mut part, 8).is_err()); // past the end
//! # Ok::<(), turbobd_source::SourceError>(())
//! ```

pub mod budget;
pub mod bytes;
pub mod chunk;
pub mod failure;
mod origin;
mod proof;
mod stable;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
mod traffic;

pub use budget::{MemoryBudget, OverBudget, Reserved};
pub use bytes::{
    ByteSource, Class, FileSource, MemorySource, OneBuffer, Run, SourceError, SubSource, file_state,
};
pub use origin::Origin;
pub use proof::Proof;
pub use stable::{Accounted, SharedBytes, StableBytes};
pub use traffic::{Attempts, Retries, Traffic, TryingAgain};
