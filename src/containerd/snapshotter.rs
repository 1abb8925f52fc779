//! The snapshots service of containerd.
//!
//! **Records.** A snapshot is a record in a store ([`store`], one file, one durable transaction a call) and a folder of its
//! own ([`folders`]), named by a number that is never used twice. The record decides: a folder without a record is garbage, which
//! is why a folder is made before its record and removed after it. So a process that is killed anywhere leaves either the
//! old state or the new one, and at most a folder that the next start sweeps away ([`sweep`]).
//!
//! **Kinds of layers.** What a snapshot holds is its [`layer::LayerContent`]: files of its own, as the overlayfs
//! snapshotter has them, or a part of a device. The mounts of a snapshot are a pure function of its record and its parents
//! ([`mounts`]).
//!
//! **What is slow.** containerd holds a lock while it calls Prepare or Remove, so that one slow call stops all others. Stat,
//! List and filters read an index in memory. Remove deletes the record and renames the folder; a thread removes the files.
//! Usage walks a folder without any lock. Every call has a deadline ([`service`]); work that has not ended by then
//! goes on behind the answer.
//!
//! * [`config`]  the configuration file
//! * [`socket`]  the socket, of systemd or our own, and what systemd is told
//! * [`service`] gRPC: requests to calls, failures to codes, deadlines
//! * [`calls`]   the ten calls
//! * [`error`]   failures of a call, and of the start
//! * [`store`]   records
//! * [`filter`]  containerd's filter language
//! * [`layer`]   what a snapshot holds, and how it is recognised
//! * [`lazy`]    a Prepare that is a pull
//! * [`pulls`]   a line and a count for each pull
//! * [`chain`]   from the layers of an image to what a device shows
//! * [`devices`] devices by their content, mounted
//! * [`lowers`]  the folders below a snapshot: files of layers, and mounts of devices
//! * [`idmap`]   these folders with the owners of a user namespace
//! * [`mounts`]  what Mounts answers
//! * [`folders`] folders of snapshots, and their removal
//! * [`usage`]   what a folder occupies
//! * [`sweep`]   folders that no record names
//! * `failpoint` places where a test kills the process

pub mod calls;
pub mod chain;
pub mod config;
pub mod devices;
pub mod error;
mod failpoint;
pub mod filter;
pub mod folders;
pub mod idmap;
pub mod layer;
pub mod lazy;
pub mod lowers;
pub mod mounts;
pub mod pulls;
pub mod service;
pub mod socket;
pub mod store;
pub mod sweep;
pub mod usage;

#[cfg(test)]
mod tests;

pub use calls::{NewSnapshot, Snapshotter};
pub use config::SnapshotterConfig;
pub use error::{SnapshotError, SnapshotterError};
pub use service::run;
