//! containerd's services over gRPC, and turbobd as one of them.
//!
//! containerd asks a *snapshotter* for the file systems of images and containers. A snapshotter of its own is a process
//! with a Unix socket, a *proxy plugin*; containerd's configuration names the socket. This crate is such a
//! process ([`snapshotter`]): it keeps records of snapshots, makes folders, asks the turbobd daemon for devices, mounts
//! them, and answers with ordinary `bind` and `overlay` mounts. No file data passes through it, so it may be restarted or killed
//! while containers run.
//!
//! gRPC and its messages are named in this crate alone, in [`api`]. The turbobd daemon is reached through the crate `client`
//! and never started from here.
//!
//! * [`api`]         messages and stubs of containerd's services
//! * [`labels`]      labels of snapshots, and what they say
//! * [`rpull`]       a pull without layer data, over containerd's own services
//! * [`snapshotter`] the snapshots service: records, folders, mounts, socket
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

pub mod api;
pub mod labels;
pub mod rpull;
pub mod snapshotter;
