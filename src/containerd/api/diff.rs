//! `containerd.services.diff.v1`: unpacking a layer.

use super::types::{BlobDescriptor, Mount};

#[allow(missing_docs, clippy::all, clippy::pedantic)]
mod stubs {
    include!(concat!(env!("OUT_DIR"), "/containerd.services.diff.v1.Diff.rs"));
}

pub use stubs::diff_client;

/// Request of Apply: containerd mounts, and unpacks a blob of its content store there.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ApplyRequest {
    /// The layer.
    #[prost(message, optional, tag = "1")]
    pub diff: Option<BlobDescriptor>,
    /// Mounts of the active snapshot.
    #[prost(message, repeated, tag = "2")]
    pub mounts: Vec<Mount>,
}

/// Reply to Apply.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ApplyResponse {
    /// The tar that was unpacked, with its digest and size.
    #[prost(message, optional, tag = "1")]
    pub applied: Option<BlobDescriptor>,
}
