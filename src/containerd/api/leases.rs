//! `containerd.services.leases.v1`: what the garbage collection must leave for a while.
//!
//! What is written while the header `containerd-lease` names a lease belongs to it, and stays as long as the lease does.

use std::collections::BTreeMap;

#[allow(missing_docs, clippy::all, clippy::pedantic)]
mod stubs {
    include!(concat!(env!("OUT_DIR"), "/containerd.services.leases.v1.Leases.rs"));
}

pub use stubs::leases_client;

/// A lease.
#[derive(Clone, PartialEq, prost::Message)]
pub struct LeaseRecord {
    /// Its identifier.
    #[prost(string, tag = "1")]
    pub id: String,
    /// Labels.
    #[prost(btree_map = "string, string", tag = "3")]
    pub labels: BTreeMap<String, String>,
}

/// Request of Create.
#[derive(Clone, PartialEq, prost::Message)]
pub struct CreateLeaseRequest {
    /// Identifier of the new lease.
    #[prost(string, tag = "1")]
    pub id: String,
    /// Labels; `containerd.io/gc.expire` is the time of its end, as in RFC 3339.
    #[prost(btree_map = "string, string", tag = "3")]
    pub labels: BTreeMap<String, String>,
}

/// Reply to Create.
#[derive(Clone, PartialEq, prost::Message)]
pub struct CreateLeaseResponse {
    /// The lease.
    #[prost(message, optional, tag = "1")]
    pub lease: Option<LeaseRecord>,
}

/// Request of Delete.
#[derive(Clone, PartialEq, Eq, Hash, prost::Message)]
pub struct DeleteLeaseRequest {
    /// Identifier of the lease.
    #[prost(string, tag = "1")]
    pub id: String,
    /// Collect garbage before the reply.
    #[prost(bool, tag = "2")]
    pub sync: bool,
}

/// Request of List.
#[derive(Clone, PartialEq, Eq, Hash, prost::Message)]
pub struct ListLeasesRequest {
    /// Filters in containerd's language. None: all leases.
    #[prost(string, repeated, tag = "1")]
    pub filters: Vec<String>,
}

/// Reply to List.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ListLeasesResponse {
    /// Leases.
    #[prost(message, repeated, tag = "1")]
    pub leases: Vec<LeaseRecord>,
}
