//! `containerd.services.version.v1`: the release of a containerd.

#[allow(missing_docs, clippy::all, clippy::pedantic)]
mod stubs {
    include!(concat!(env!("OUT_DIR"), "/containerd.services.version.v1.Version.rs"));
}

pub use stubs::version_client;

/// Reply to Version.
#[derive(Clone, PartialEq, Eq, Hash, prost::Message)]
pub struct VersionResponse {
    /// The release: `1.6.20~ds1`, `2.4.2`.
    #[prost(string, tag = "1")]
    pub version: String,
}
