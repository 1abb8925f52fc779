//! Bytes of blobs on demand: fetched by range, verified, decoded, kept.
//!
//! A disk asks for chunks of blobs. A chunk that is in memory is answered with its address at once; each other chunk is
//! loaded once for each origin, however many readers wait: from a disk tier if one holds the chunk, else by few range requests from
//! the [`ByteSource`](source::ByteSource) behind the blob. Nothing here knows a layer format: a
//! [`ChunkSource`](source::chunk::ChunkSource) says where a chunk lies, verifies it and decodes it.
//!
//! * [`cache`]     decoded chunks in memory, bounded, each loaded once
//! * [`tier`]      chunks on disk: verified when read, written behind, given up one by one
//! * [`fetch`]     from wanted chunks to range requests to decode threads; read-ahead and background fill
//! * [`quiet`]     the time in which work may be done that no process waits for
//! * [`trace`]     what a start reads: recorded, kept, and fetched ahead at the next start
//! * [`histogram`] durations, counted
//! * [`identity`]  the name under which chunks are shared: what proves them, or who answers for them
//!
//! ```
//! use std::sync::Arc;
//! use turbobd_blobs::cache::Cache;
//! let cache = Cache::new(64 << 20, 1); // 64 MiB of chunks, one decode thread
//! # drop(cache);
//! ```

pub mod cache;
pub mod fetch;
pub mod histogram;
pub mod identity;
pub mod quiet;
pub mod tier;
pub mod trace;

pub use histogram::Histogram;
