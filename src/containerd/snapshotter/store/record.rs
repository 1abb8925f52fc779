//! A record: what is known of a snapshot.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use prost_types::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::api::snapshots::{KindCode, SnapshotInfo};
use crate::snapshotter::layer::LayerContent;

/// What a snapshot is to containerd.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SnapshotKind {
    /// Mounted for writing, and committed later.
    Active,
    /// Mounted for reading.
    View,
    /// A parent of others, never mounted itself.
    Committed,
}

impl SnapshotKind {
    /// The word of filters.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Active => "active",
            Self::View => "view",
            Self::Committed => "committed",
        }
    }

    /// The number on the wire.
    #[must_use]
    pub fn code(self) -> KindCode {
        match self {
            Self::Active => KindCode::Active,
            Self::View => KindCode::View,
            Self::Committed => KindCode::Committed,
        }
    }
}

/// A time, in nanoseconds since 1970 (UTC): until the year 2554.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Moment(u64);

impl Moment {
    /// Now, by the clock of this host.
    #[must_use]
    pub fn now() -> Self {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
        Self(u64::try_from(since.as_nanos()).unwrap_or(u64::MAX))
    }

    /// The same time on the wire.
    #[must_use]
    pub fn timestamp(self) -> Timestamp {
        const SECOND: u64 = 1_000_000_000;
        // Both fit: u64::MAX nanoseconds are 1.8e10 seconds, and the rest is below 1e9.
        Timestamp { seconds: (self.0 / SECOND) as i64, nanos: (self.0 % SECOND) as i32 }
    }
}

/// What a folder occupies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskUsage {
    /// Bytes on disk.
    pub bytes: u64,
    /// Inodes.
    pub inodes: u64,
}

/// A snapshot. In the store it is a JSON object: fields that a newer release has added are kept when this one writes it again.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// Its number, which is the name of its folder; never used twice in a store.
    pub id: u64,
    /// Snapshotter that it belongs to, as containerd's configuration calls it.
    pub snapshotter: String,
    /// Its name; the key of an active snapshot or view. Unique within its snapshotter.
    pub name: String,
    /// Name of its parent, a committed snapshot of the same snapshotter.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<String>,
    /// What it is to containerd.
    pub kind: SnapshotKind,
    /// Labels without empty values.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// Time of Prepare, View or Commit.
    pub created: Moment,
    /// Time of the last Update, or `created`.
    pub updated: Moment,
    /// What it holds.
    #[serde(default)]
    pub content: LayerContent,
    /// Of a committed snapshot: the key that it was committed from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub committed_from: Option<String>,
    /// Of a committed snapshot: what it occupies, once it was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub usage: Option<DiskUsage>,
    /// Fields of newer releases.
    #[serde(flatten)]
    pub more: Map<String, Value>,
}

impl Record {
    /// The record on the wire.
    #[must_use]
    pub fn info(&self) -> SnapshotInfo {
        SnapshotInfo {
            name: self.name.clone(),
            parent: self.parent.clone().unwrap_or_default(),
            kind: self.kind.code() as i32,
            created_at: Some(self.created.timestamp()),
            updated_at: Some(self.updated.timestamp()),
            labels: self.labels.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_of_a_newer_release_survive_a_change_by_this_one() {
        let text = r#"{"id":7,"snapshotter":"overlaybd","name":"k8s.io/1/a b","kind":"committed","created":1700000000000000001,"updated":2,"content":{"kind":"plain"},"colour":"blue"}"#;
        let mut record: Record = serde_json::from_str(text).unwrap();
        assert_eq!(record.created.timestamp(), Timestamp { seconds: 1_700_000_000, nanos: 1 });
        record.labels.insert("a".into(), "b".into());
        let written: Value =
            serde_json::from_str(&serde_json::to_string(&record).unwrap()).unwrap();
        assert_eq!(written["colour"], "blue");
        assert_eq!(written["created"], 1_700_000_000_000_000_001_u64);
        assert_eq!(written["labels"]["a"], "b");
    }
}
