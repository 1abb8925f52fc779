//! `containerd.services.content.v1`: the blobs of all images, by digest.
//!
//! A blob is written under a *reference*, which locks it, and has a digest only when it is committed. The methods and
//! fields are those that [`rpull`](crate::rpull) uses.

use std::collections::BTreeMap;

use prost_types::FieldMask;

#[allow(missing_docs, clippy::all, clippy::pedantic)]
mod stubs {
    include!(concat!(env!("OUT_DIR"), "/containerd.services.content.v1.Content.rs"));
}

pub use stubs::content_client;

/// A blob.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ContentInfo {
    /// Digest of its bytes.
    #[prost(string, tag = "1")]
    pub digest: String,
    /// Size in bytes.
    #[prost(int64, tag = "2")]
    pub size: i64,
    /// Labels; key and value together have at most 4096 bytes.
    #[prost(btree_map = "string, string", tag = "5")]
    pub labels: BTreeMap<String, String>,
}

/// Request of Info.
#[derive(Clone, PartialEq, Eq, Hash, prost::Message)]
pub struct InfoRequest {
    /// Digest of the blob.
    #[prost(string, tag = "1")]
    pub digest: String,
}

/// Reply to Info.
#[derive(Clone, PartialEq, prost::Message)]
pub struct InfoResponse {
    /// The blob.
    #[prost(message, optional, tag = "1")]
    pub info: Option<ContentInfo>,
}

/// Request of Update.
#[derive(Clone, PartialEq, prost::Message)]
pub struct UpdateContentRequest {
    /// Digest and new labels.
    #[prost(message, optional, tag = "1")]
    pub info: Option<ContentInfo>,
    /// Labels to set: `labels.KEY`. Without it, all are replaced.
    #[prost(message, optional, tag = "2")]
    pub update_mask: Option<FieldMask>,
}

/// Reply to Update.
#[derive(Clone, PartialEq, prost::Message)]
pub struct UpdateContentResponse {
    /// The blob as it is now.
    #[prost(message, optional, tag = "1")]
    pub info: Option<ContentInfo>,
}

/// Request of Read.
#[derive(Clone, PartialEq, Eq, Hash, prost::Message)]
pub struct ReadContentRequest {
    /// Digest of the blob.
    #[prost(string, tag = "1")]
    pub digest: String,
    /// First byte.
    #[prost(int64, tag = "2")]
    pub offset: i64,
    /// Number of bytes; 0: up to the end.
    #[prost(int64, tag = "3")]
    pub size: i64,
}

/// A part of the reply to Read.
#[derive(Clone, PartialEq, Eq, Hash, prost::Message)]
pub struct ReadContentResponse {
    /// Position of `data` in the blob, in bytes.
    #[prost(int64, tag = "1")]
    pub offset: i64,
    /// Bytes of the blob.
    #[prost(bytes = "vec", tag = "2")]
    pub data: Vec<u8>,
}

/// Request of Status.
#[derive(Clone, PartialEq, Eq, Hash, prost::Message)]
pub struct StatusRequest {
    /// Reference of a write.
    #[prost(string, tag = "1")]
    pub r#ref: String,
}

/// A write that is not committed.
#[derive(Clone, PartialEq, Eq, Hash, prost::Message)]
pub struct IngestStatus {
    /// Number of bytes that are stored.
    #[prost(int64, tag = "4")]
    pub offset: i64,
}

/// Reply to Status.
#[derive(Clone, PartialEq, Eq, Hash, prost::Message)]
pub struct StatusResponse {
    /// The write.
    #[prost(message, optional, tag = "1")]
    pub status: Option<IngestStatus>,
}

/// What a message of Write asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum WriteAction {
    /// Open the reference, and tell how much of it is there.
    Stat = 0,
    /// Store bytes.
    Write = 1,
    /// Store bytes, then make the blob of all of them.
    Commit = 2,
}

/// A message of Write. The first one opens the reference.
#[derive(Clone, PartialEq, prost::Message)]
pub struct WriteContentRequest {
    /// What to do.
    #[prost(enumeration = "WriteAction", tag = "1")]
    pub action: i32,
    /// Reference of the write; it locks out other writers.
    #[prost(string, tag = "2")]
    pub r#ref: String,
    /// Size of the blob in bytes; 0: unknown.
    #[prost(int64, tag = "3")]
    pub total: i64,
    /// Digest of the blob. The answer is AlreadyExists if there is one.
    #[prost(string, tag = "4")]
    pub expected: String,
    /// Position of `data`, in bytes; 0 begins anew.
    #[prost(int64, tag = "5")]
    pub offset: i64,
    /// Bytes to store.
    #[prost(bytes = "vec", tag = "6")]
    pub data: Vec<u8>,
    /// Labels of the blob, with Commit.
    #[prost(btree_map = "string, string", tag = "7")]
    pub labels: BTreeMap<String, String>,
}

/// Answer to one message of Write.
#[derive(Clone, PartialEq, Eq, Hash, prost::Message)]
pub struct WriteContentResponse {
    /// What was done.
    #[prost(enumeration = "WriteAction", tag = "1")]
    pub action: i32,
    /// Number of bytes that are stored.
    #[prost(int64, tag = "4")]
    pub offset: i64,
}
