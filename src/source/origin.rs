//! The origin of bytes that no checksum proves.

/// The party that answers for the bytes of a source, and the way to them. Bytes without a proof are shared only between
/// sources of one origin, and no source reads by another origin's way.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Origin {
    /// A repository, with the user and the trust by which it is reached; or a file, in its present state. It is the
    /// same after a restart, and holds no secret.
    pub name: String,
    /// Number of the client of this process that has the secrets of the way; 0 if there are none.
    pub client: u64,
}

impl Origin {
    /// An origin that is reached without secrets.
    pub fn new(name: impl Into<String>) -> Self {
        Self { name: name.into(), client: 0 }
    }
}
