//! Messages that several services share: package `containerd.types`.

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
