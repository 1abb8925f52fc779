//! Messages and stubs of containerd's gRPC services.
//!
//! Field numbers and names are those of `api/` in github.com/containerd/containerd (module
//! `github.com/containerd/containerd/api`, v1.12.0). A message that lacks a field of a newer containerd ignores it, as
//! protobuf does. The stubs come from the tables in `build.rs`.
//!
//! * [`types`]     messages that several services share
//! * [`snapshots`] `containerd.services.snapshots.v1`
//! * [`content`], [`diff`], [`images`], [`leases`], [`version`]: the services of containerd that a pull calls; of their messages, the
//!   fields that it uses

pub mod content;
pub mod diff;
pub mod images;
pub mod leases;
pub mod snapshots;
pub mod types;
pub mod version;
