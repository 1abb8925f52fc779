//! Start containers from **unmodified OCI images before they are downloaded**: the command line.
//!
//! A *meta image* (Overlaybd-TurboOCIv1: the ext4 metadata of the image and an index into its layers) is built
//! once. A host attaches it as a block device: metadata comes from memory, file data from ranges of the *original* layer
//! blobs, fetched, verified and decoded when they are first read.
//!
//! This crate turns arguments into specs, asks a daemon or opens an image itself, and prints. The work is done by these
//! crates, from the lowest to the highest; each imports only crates that are named before it.
//!
//! * `sys`, `threads`, `inflate` system calls, threads that are joined, the inner decoding loop: leaf crates
//! * `source`    the two seams: bytes at any position, chunks that decode alone
//! * `formats`   OCI documents, tar, gzip, zstd, ZFile, LSMT, ext4: pure code
//! * `registry`  the distribution client, and the stores of images
//! * `blobs`     bytes of blobs on demand: fetched, verified, cached
//! * `disk`      the virtual disk of an image, and its writable layer
//! * `convert`   from layers to a meta image or a native image
//! * `frontends` a virtual disk as a ublk or loop device
//! * `client`    the daemon's protocol, and a client that speaks it
//! * `host`      the devices of a host, and the daemon that serves them
//! * `turbobd`   this crate
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

mod cli;

#[doc(hidden)] // for the packaging tool
pub use cli::command;
pub use cli::main;
