//! `containerd.services.snapshots.v1`: the service that a snapshotter is.
//!
//! Every request names the snapshotter, as containerd's configuration calls it. Keys and names are any text: containerd
//! puts `NAMESPACE/NUMBER/` before the caller's key, which may hold blanks and slashes.

use std::collections::BTreeMap;

use prost_types::{FieldMask, Timestamp};

use super::types::Mount;

#[allow(missing_docs, clippy::all, clippy::pedantic)]
mod stubs {
    include!(concat!(env!("OUT_DIR"), "/containerd.services.snapshots.v1.Snapshots.rs"));
}

pub use stubs::{snapshots_client, snapshots_server};

/// What a snapshot is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum KindCode {
    /// Not stated.
    Unknown = 0,
    /// Mounted for reading.
    View = 1,
    /// Mounted for writing, and committed later.
    Active = 2,
    /// A parent of others, never mounted itself.
    Committed = 3,
}

/// A snapshot.
#[derive(Clone, PartialEq, prost::Message)]
pub struct SnapshotInfo {
    /// Its name; the key of an active snapshot or view.
    #[prost(string, tag = "1")]
    pub name: String,
    /// Name of its parent, or empty.
    #[prost(string, tag = "2")]
    pub parent: String,
    /// What it is.
    #[prost(enumeration = "KindCode", tag = "3")]
    pub kind: i32,
    /// Time of Prepare, View or Commit.
    #[prost(message, optional, tag = "4")]
    pub created_at: Option<Timestamp>,
    /// Time of the last Update, or `created_at`.
    #[prost(message, optional, tag = "5")]
    pub updated_at: Option<Timestamp>,
    /// Labels; key and value together have at most 4096 bytes.
    #[prost(btree_map = "string, string", tag = "6")]
    pub labels: BTreeMap<String, String>,
}

/// Request of Prepare: a snapshot for writing.
#[derive(Clone, PartialEq, prost::Message)]
pub struct PrepareSnapshotRequest {
    /// Name of the snapshotter.
    #[prost(string, tag = "1")]
    pub snapshotter: String,
    /// Key of the new snapshot.
    #[prost(string, tag = "2")]
    pub key: String,
    /// Name of a committed snapshot, or empty.
    #[prost(string, tag = "3")]
    pub parent: String,
    /// Labels of the new snapshot.
    #[prost(btree_map = "string, string", tag = "4")]
    pub labels: BTreeMap<String, String>,
}

/// Reply to Prepare.
#[derive(Clone, PartialEq, prost::Message)]
pub struct PrepareSnapshotResponse {
    /// Mounts, in order.
    #[prost(message, repeated, tag = "1")]
    pub mounts: Vec<Mount>,
}

/// Request of View: a snapshot for reading.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ViewSnapshotRequest {
    /// Name of the snapshotter.
    #[prost(string, tag = "1")]
    pub snapshotter: String,
    /// Key of the new snapshot.
    #[prost(string, tag = "2")]
    pub key: String,
    /// Name of a committed snapshot, or empty.
    #[prost(string, tag = "3")]
    pub parent: String,
    /// Labels of the new snapshot.
    #[prost(btree_map = "string, string", tag = "4")]
    pub labels: BTreeMap<String, String>,
}

/// Reply to View.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ViewSnapshotResponse {
    /// Mounts, in order.
    #[prost(message, repeated, tag = "1")]
    pub mounts: Vec<Mount>,
}

/// Request of Mounts.
#[derive(Clone, PartialEq, Eq, Hash, prost::Message)]
pub struct MountsRequest {
    /// Name of the snapshotter.
    #[prost(string, tag = "1")]
    pub snapshotter: String,
    /// Key of an active snapshot or a view.
    #[prost(string, tag = "2")]
    pub key: String,
}

/// Reply to Mounts.
#[derive(Clone, PartialEq, prost::Message)]
pub struct MountsResponse {
    /// Mounts, in order.
    #[prost(message, repeated, tag = "1")]
    pub mounts: Vec<Mount>,
}

/// Request of Commit: an active snapshot becomes a committed one with another name.
#[derive(Clone, PartialEq, prost::Message)]
pub struct CommitSnapshotRequest {
    /// Name of the snapshotter.
    #[prost(string, tag = "1")]
    pub snapshotter: String,
    /// Name of the committed snapshot.
    #[prost(string, tag = "2")]
    pub name: String,
    /// Key of the active snapshot, which is no more afterwards.
    #[prost(string, tag = "3")]
    pub key: String,
    /// Labels of the committed snapshot; those of the active one are not inherited.
    #[prost(btree_map = "string, string", tag = "4")]
    pub labels: BTreeMap<String, String>,
    /// Parent of a snapshot that was prepared without one (containerd 2.2 and later).
    #[prost(string, tag = "5")]
    pub parent: String,
}

/// Request of Remove.
#[derive(Clone, PartialEq, Eq, Hash, prost::Message)]
pub struct RemoveSnapshotRequest {
    /// Name of the snapshotter.
    #[prost(string, tag = "1")]
    pub snapshotter: String,
    /// Key or name.
    #[prost(string, tag = "2")]
    pub key: String,
}

/// Request of Stat.
#[derive(Clone, PartialEq, Eq, Hash, prost::Message)]
pub struct StatSnapshotRequest {
    /// Name of the snapshotter.
    #[prost(string, tag = "1")]
    pub snapshotter: String,
    /// Key or name.
    #[prost(string, tag = "2")]
    pub key: String,
}

/// Reply to Stat.
#[derive(Clone, PartialEq, prost::Message)]
pub struct StatSnapshotResponse {
    /// The snapshot.
    #[prost(message, optional, tag = "1")]
    pub info: Option<SnapshotInfo>,
}

/// Request of Update.
#[derive(Clone, PartialEq, prost::Message)]
pub struct UpdateSnapshotRequest {
    /// Name of the snapshotter.
    #[prost(string, tag = "1")]
    pub snapshotter: String,
    /// Name and new values.
    #[prost(message, optional, tag = "2")]
    pub info: Option<SnapshotInfo>,
    /// Fields to set: `labels`, `labels.KEY`. Without it, all labels are replaced.
    #[prost(message, optional, tag = "3")]
    pub update_mask: Option<FieldMask>,
}

/// Reply to Update.
#[derive(Clone, PartialEq, prost::Message)]
pub struct UpdateSnapshotResponse {
    /// The snapshot as it is now.
    #[prost(message, optional, tag = "1")]
    pub info: Option<SnapshotInfo>,
}

/// Request of List.
#[derive(Clone, PartialEq, Eq, Hash, prost::Message)]
pub struct ListSnapshotsRequest {
    /// Name of the snapshotter.
    #[prost(string, tag = "1")]
    pub snapshotter: String,
    /// Filters in containerd's language; a snapshot must match one of them. None: all snapshots.
    #[prost(string, repeated, tag = "2")]
    pub filters: Vec<String>,
}

/// A part of the reply to List.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ListSnapshotsResponse {
    /// Snapshots.
    #[prost(message, repeated, tag = "1")]
    pub info: Vec<SnapshotInfo>,
}

/// Request of Usage.
#[derive(Clone, PartialEq, Eq, Hash, prost::Message)]
pub struct UsageRequest {
    /// Name of the snapshotter.
    #[prost(string, tag = "1")]
    pub snapshotter: String,
    /// Key or name.
    #[prost(string, tag = "2")]
    pub key: String,
}

/// Reply to Usage: what a snapshot occupies, without its parents.
#[derive(Clone, Copy, PartialEq, Eq, Hash, prost::Message)]
pub struct UsageResponse {
    /// Bytes.
    #[prost(int64, tag = "1")]
    pub size: i64,
    /// Inodes.
    #[prost(int64, tag = "2")]
    pub inodes: i64,
}

/// Request of Cleanup.
#[derive(Clone, PartialEq, Eq, Hash, prost::Message)]
pub struct CleanupRequest {
    /// Name of the snapshotter.
    #[prost(string, tag = "1")]
    pub snapshotter: String,
}
