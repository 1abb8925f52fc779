//! Start containers from **unmodified OCI images before they are downloaded**.
//!
//! A *meta image* (Overlaybd-TurboOCIv1: the ext4 metadata of the image and an index into its gzip
//! layers) is built once by [`convert`]. [`disk`] turns it back into a virtual disk: metadata comes
//! from memory, file data from ranges of the *original* layer blobs, inflated when first read.
//! [`ublk`] (or, on a kernel without it, [`looped`]) shows that disk to the kernel as a block device.
//!
//! # Contents, in the order in which data flows
//!
//! Formats: pure code, no I/O policy, no threads, no network.
//!
//! * [`units`]    bytes, sectors and bits as types that do not mix
//! * [`oci`]      digests, references, manifests, the image layout directory
//! * [`tar`]      a strict header iterator with exact data offsets; an archive writer
//! * [`gzip`]     scan a layer once; later decode any segment of it alone
//! * [`zstandard`] the same for zstd layers, of many frames or of one
//! * [`segments`] where the segments of a zstd or uncompressed layer are, and what they must be
//! * [`zfile`]    overlaybd's seekable compressed container
//! * [`lsmt`]     overlaybd's layer format: which disk sector lives where
//! * [`ext4`]     an in-memory tree of files, and the ext4 blocks that describe it
//!
//! Bytes on demand.
//!
//! * [`source`]   a run of bytes readable at any position: memory, file, range of a blob
//! * [`chunk`]    a blob that decodes in pieces: the unit of fetching, verifying and caching
//! * [`cache`]    decoded chunks, bounded, each loaded once however many wait
//! * [`tier`]     chunks on disk: verified when read, written behind, given up one by one
//! * [`fetch`]    what is wanted → few range requests → inflate workers; read-ahead, traces, background fill
//! * [`trace`]    what a start reads: recorded, kept, and fetched ahead at the next
//! * [`registry`] the distribution client: names, credentials, ranges, uploads
//! * [`store`]    where an image lives: a repository, a layout directory, memory
//! * [`volume`]   the one trait between a virtual disk and a front end
//! * [`disk`]     an opened image: a stack of layers resolved to where each byte lives
//!
//! Programs.
//!
//! * [`convert`]  layer stream → meta image, beside the original
//! * [`meta`]     the meta image of a plain image: found, or built and kept
//! * [`ublk`]     the block device: one `io_uring` worker a queue
//! * [`looped`]   the same disk as one FUSE file under a loop device
//! * [`daemon`]   the devices of this host and the socket to ask for more
//! * [`metrics`]  what all of them count, and the page on which others read it
//! * [`doctor`]   what this host can do, and the remedy for what it cannot
//! * [`endpoint`] a small HTTP server, for the metrics and for snapshots
//! * [`config`]   the service configuration: overlaybd's keys and ours
//! * [`cli`]      one file a command

// Tests may unwrap and panic; what input can reach may not. `println!` and `eprintln!` panic when nobody reads: see
// `cli/stdout.rs` and `cli/stderr.rs`.
#![cfg_attr(
    not(test),
    warn(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::panic,
        clippy::print_stdout,
        clippy::print_stderr
    )
)]
#![warn(unreachable_pub)]

pub mod cache;
pub mod chunk;
pub mod cli;
pub mod config;
pub mod convert;
pub mod daemon;
pub mod disk;
pub mod doctor;
pub mod endpoint;
pub mod ext4;
pub mod fetch;
mod flock;
pub mod gzip;
pub mod looped;
pub mod lsmt;
pub mod meta;
pub mod metrics;
pub mod oci;
pub mod registry;
pub mod segments;
pub mod source;
pub mod store;
pub mod tar;
pub mod tier;
pub mod trace;
pub mod ublk;
pub mod units;
pub mod volume;
pub mod zfile;
pub mod zstandard;
