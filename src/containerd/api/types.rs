//! Messages that several services share: package `containerd.types`.

use std::collections::BTreeMap;

use formats::oci::Descriptor;

/// A mount as containerd makes it: fields of mount(2), with options as in fstab.
#[derive(Clone, PartialEq, Eq, Hash, prost::Message)]
pub struct Mount {
    /// `bind`, `overlay` or a file system.
    #[prost(string, tag = "1")]
    pub r#type: String,
    /// Device, folder, or a name without meaning (`overlay`).
    #[prost(string, tag = "2")]
    pub source: String,
    /// Folder below the place of the mount; empty for the place itself. containerd 1.x ignores it.
    #[prost(string, tag = "3")]
    pub target: String,
    /// Options: flags by name, and those of the file system.
    #[prost(string, repeated, tag = "4")]
    pub options: Vec<String>,
}

/// `google.protobuf.Empty`.
pub type Nothing = ();

/// A reference to a blob.
#[derive(Clone, PartialEq, prost::Message)]
pub struct BlobDescriptor {
    /// Media type of the blob.
    #[prost(string, tag = "1")]
    pub media_type: String,
    /// Digest of the blob.
    #[prost(string, tag = "2")]
    pub digest: String,
    /// Size in bytes.
    #[prost(int64, tag = "3")]
    pub size: i64,
    /// Annotations.
    #[prost(btree_map = "string, string", tag = "5")]
    pub annotations: BTreeMap<String, String>,
}

impl BlobDescriptor {
    /// The message that says what `descriptor` says.
    #[must_use]
    pub fn of(descriptor: &Descriptor) -> Self {
        Self {
            media_type: descriptor.media_type.clone(),
            digest: descriptor.digest.to_string(),
            size: i64::try_from(descriptor.size).unwrap_or(i64::MAX),
            annotations: descriptor.annotations.clone(),
        }
    }
}
