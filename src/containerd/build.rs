//! Stubs of containerd's gRPC services, from tables: no protoc, and no `.proto` files in this tree.
//!
//! A stub needs the names of the methods and the types of their messages, and nothing of the messages' fields. The
//! messages stand in `api/`, written by hand. Facts are those of `api/services/` of github.com/containerd/containerd.

use tonic_build::manual::{Builder, Method, Service};

/// A method: its name on the wire, its name in Rust, request, reply, and which of the two is a stream.
struct Call(&'static str, &'static str, &'static str, &'static str, Streams);

/// Which messages of a method are streams.
enum Streams {
    /// One request, one reply.
    None,
    /// One request, a stream of replies.
    Reply,
    /// A stream of requests and a stream of replies.
    Both,
}

/// A service: its package, its name, whether this crate serves it, and its methods.
///
/// The generated module is `PACKAGE.NAME.rs`, included in the file of the service's messages. A service that is not served
/// gets a client only.
struct Table(&'static str, &'static str, bool, &'static [Call]);

/// Message without fields: the generator takes paths alone.
const EMPTY: &str = "crate::api::types::Nothing";

const SERVICES: &[Table] = &[
    Table(
        "containerd.services.snapshots.v1",
        "Snapshots",
        true,
        &[
            Call(
                "Prepare",
                "prepare",
                "crate::api::snapshots::PrepareSnapshotRequest",
                "crate::api::snapshots::PrepareSnapshotResponse",
                Streams::None,
            ),
            Call(
                "View",
                "view",
                "crate::api::snapshots::ViewSnapshotRequest",
                "crate::api::snapshots::ViewSnapshotResponse",
                Streams::None,
            ),
            Call(
                "Mounts",
                "mounts",
                "crate::api::snapshots::MountsRequest",
                "crate::api::snapshots::MountsResponse",
                Streams::None,
            ),
            Call(
                "Commit",
                "commit",
                "crate::api::snapshots::CommitSnapshotRequest",
                EMPTY,
                Streams::None,
            ),
            Call(
                "Remove",
                "remove",
                "crate::api::snapshots::RemoveSnapshotRequest",
                EMPTY,
                Streams::None,
            ),
            Call(
                "Stat",
                "stat",
                "crate::api::snapshots::StatSnapshotRequest",
                "crate::api::snapshots::StatSnapshotResponse",
                Streams::None,
            ),
            Call(
                "Update",
                "update",
                "crate::api::snapshots::UpdateSnapshotRequest",
                "crate::api::snapshots::UpdateSnapshotResponse",
                Streams::None,
            ),
            Call(
                "List",
                "list",
                "crate::api::snapshots::ListSnapshotsRequest",
                "crate::api::snapshots::ListSnapshotsResponse",
                Streams::Reply,
            ),
            Call(
                "Usage",
                "usage",
                "crate::api::snapshots::UsageRequest",
                "crate::api::snapshots::UsageResponse",
                Streams::None,
            ),
            Call(
                "Cleanup",
                "cleanup",
                "crate::api::snapshots::CleanupRequest",
                EMPTY,
                Streams::None,
            ),
        ],
    ),
    Table(
        "containerd.services.content.v1",
        "Content",
        false,
        &[
            Call(
                "Info",
                "info",
                "crate::api::content::InfoRequest",
                "crate::api::content::InfoResponse",
                Streams::None,
            ),
            Call(
                "Update",
                "update",
                "crate::api::content::UpdateContentRequest",
                "crate::api::content::UpdateContentResponse",
                Streams::None,
            ),
            Call(
                "Read",
                "read",
                "crate::api::content::ReadContentRequest",
                "crate::api::content::ReadContentResponse",
                Streams::Reply,
            ),
            Call(
                "Status",
                "status",
                "crate::api::content::StatusRequest",
                "crate::api::content::StatusResponse",
                Streams::None,
            ),
            Call(
                "Write",
                "write",
                "crate::api::content::WriteContentRequest",
                "crate::api::content::WriteContentResponse",
                Streams::Both,
            ),
        ],
    ),
    Table(
        "containerd.services.images.v1",
        "Images",
        false,
        &[
            Call(
                "Get",
                "get",
                "crate::api::images::GetImageRequest",
                "crate::api::images::GetImageResponse",
                Streams::None,
            ),
            Call(
                "Create",
                "create",
                "crate::api::images::CreateImageRequest",
                "crate::api::images::CreateImageResponse",
                Streams::None,
            ),
            Call(
                "Update",
                "update",
                "crate::api::images::UpdateImageRequest",
                "crate::api::images::UpdateImageResponse",
                Streams::None,
            ),
        ],
    ),
    Table(
        "containerd.services.leases.v1",
        "Leases",
        false,
        &[
            Call(
                "Create",
                "create",
                "crate::api::leases::CreateLeaseRequest",
                "crate::api::leases::CreateLeaseResponse",
                Streams::None,
            ),
            Call(
                "Delete",
                "delete",
                "crate::api::leases::DeleteLeaseRequest",
                EMPTY,
                Streams::None,
            ),
            Call(
                "List",
                "list",
                "crate::api::leases::ListLeasesRequest",
                "crate::api::leases::ListLeasesResponse",
                Streams::None,
            ),
        ],
    ),
    Table(
        "containerd.services.diff.v1",
        "Diff",
        false,
        &[Call(
            "Apply",
            "apply",
            "crate::api::diff::ApplyRequest",
            "crate::api::diff::ApplyResponse",
            Streams::None,
        )],
    ),
    Table(
        "containerd.services.version.v1",
        "Version",
        false,
        &[Call("Version", "version", EMPTY, "crate::api::version::VersionResponse", Streams::None)],
    ),
];

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    for Table(package, name, served, calls) in SERVICES {
        let mut service = Service::builder().name(*name).package(*package);
        for Call(route, method, request, reply, streams) in *calls {
            let mut call = Method::builder()
                .name(*method)
                .route_name(*route)
                .input_type(*request)
                .output_type(*reply)
                .codec_path("tonic_prost::ProstCodec");
            call = match streams {
                Streams::None => call,
                Streams::Reply => call.server_streaming(),
                Streams::Both => call.client_streaming().server_streaming(),
            };
            service = service.method(call.build());
        }
        Builder::new().build_server(*served).compile(&[service.build()]);
    }
}
