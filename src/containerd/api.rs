//! Messages and stubs of containerd's gRPC services.
//!
//! Field numbers and names are those of `api/` in github.com/containerd/containerd (module
//! `github.com/containerd/containerd/api`, v1.12.0). A message that lacks a field of a newer containerd ignores it, as
//! protobuf does. The stubs come from the tables in `build.rs`.
//!
//! * [`types`]     messages that several services share
//! * [`snapshots`] `containerd.services.snapshots.v1`

pub mod snapshots;
pub mod types;
