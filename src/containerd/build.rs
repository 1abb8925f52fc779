//! Stubs of containerd's gRPC services, from tables: no protoc, and no `.proto` files in this tree.
//!
//! A stub needs the names of the methods and the types of their messages, and nothing of the messages' fields. The
//! messages stand in `api/`, written by hand. Facts are those of `api/services/` of github.com/containerd/containerd.

use tonic_build::manual::{Builder, Method, Service};

/// A method: its name on the wire, its name in Rust, request, reply, and which of the two is a stream.
struct GrpcMethod(&'static str, &'static str, &'static str, &'static str, GrpcStreams);

/// Which messages of a method are streams.
enum GrpcStreams {
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
struct GrpcService(&'static str, &'static str, bool, &'static [GrpcMethod]);

/// Message without fields: the generator takes paths alone.
const EMPTY: &str = "crate::api::types::Nothing";

const SERVICES: &[GrpcService] = &[
    GrpcService(
        "containerd.services.snapshots.v1",
        "Snapshots",
        true,
        &[
            GrpcMethod(
                "Prepare",
                "prepare",
                "crate::api::snapshots::PrepareSnapshotRequest",
                "crate::api::snapshots::PrepareSnapshotResponse",
                GrpcStreams::None,
            ),
            GrpcMethod(
                "View",
                "view",
                "crate::api::snapshots::ViewSnapshotRequest",
                "crate::api::snapshots::ViewSnapshotResponse",
                GrpcStreams::None,
            ),
            GrpcMethod(
                "Mounts",
                "mounts",
                "crate::api::snapshots::MountsRequest",
                "crate::api::snapshots::MountsResponse",
                GrpcStreams::None,
            ),
            GrpcMethod(
                "Commit",
                "commit",
                "crate::api::snapshots::CommitSnapshotRequest",
                EMPTY,
                GrpcStreams::None,
            ),
            GrpcMethod(
                "Remove",
                "remove",
                "crate::api::snapshots::RemoveSnapshotRequest",
                EMPTY,
                GrpcStreams::None,
            ),
            GrpcMethod(
                "Stat",
                "stat",
                "crate::api::snapshots::StatSnapshotRequest",
                "crate::api::snapshots::StatSnapshotResponse",
                GrpcStreams::None,
            ),
            GrpcMethod(
                "Update",
                "update",
                "crate::api::snapshots::UpdateSnapshotRequest",
                "crate::api::snapshots::UpdateSnapshotResponse",
                GrpcStreams::None,
            ),
            GrpcMethod(
                "List",
                "list",
                "crate::api::snapshots::ListSnapshotsRequest",
                "crate::api::snapshots::ListSnapshotsResponse",
                GrpcStreams::Reply,
            ),
            GrpcMethod(
                "Usage",
                "usage",
                "crate::api::snapshots::UsageRequest",
                "crate::api::snapshots::UsageResponse",
                GrpcStreams::None,
            ),
            GrpcMethod(
                "Cleanup",
                "cleanup",
                "crate::api::snapshots::CleanupRequest",
                EMPTY,
                GrpcStreams::None,
            ),
        ],
    ),
    GrpcService(
        "containerd.services.content.v1",
        "Content",
        false,
        &[
            GrpcMethod(
                "Info",
                "info",
                "crate::api::content::InfoRequest",
                "crate::api::content::InfoResponse",
                GrpcStreams::None,
            ),
            GrpcMethod(
                "Update",
                "update",
                "crate::api::content::UpdateContentRequest",
                "crate::api::content::UpdateContentResponse",
                GrpcStreams::None,
            ),
            GrpcMethod(
                "Read",
                "read",
                "crate::api::content::ReadContentRequest",
                "crate::api::content::ReadContentResponse",
                GrpcStreams::Reply,
            ),
            GrpcMethod(
                "Status",
                "status",
                "crate::api::content::StatusRequest",
                "crate::api::content::StatusResponse",
                GrpcStreams::None,
            ),
            GrpcMethod(
                "Write",
                "write",
                "crate::api::content::WriteContentRequest",
                "crate::api::content::WriteContentResponse",
                GrpcStreams::Both,
            ),
        ],
    ),
    GrpcService(
        "containerd.services.images.v1",
        "Images",
        false,
        &[
            GrpcMethod(
                "Get",
                "get",
                "crate::api::images::GetImageRequest",
                "crate::api::images::GetImageResponse",
                GrpcStreams::None,
            ),
            GrpcMethod(
                "Create",
                "create",
                "crate::api::images::CreateImageRequest",
                "crate::api::images::CreateImageResponse",
                GrpcStreams::None,
            ),
            GrpcMethod(
                "Update",
                "update",
                "crate::api::images::UpdateImageRequest",
                "crate::api::images::UpdateImageResponse",
                GrpcStreams::None,
            ),
        ],
    ),
    GrpcService(
        "containerd.services.leases.v1",
        "Leases",
        false,
        &[
            GrpcMethod(
                "Create",
                "create",
                "crate::api::leases::CreateLeaseRequest",
                "crate::api::leases::CreateLeaseResponse",
                GrpcStreams::None,
            ),
            GrpcMethod(
                "Delete",
                "delete",
                "crate::api::leases::DeleteLeaseRequest",
                EMPTY,
                GrpcStreams::None,
            ),
            GrpcMethod(
                "List",
                "list",
                "crate::api::leases::ListLeasesRequest",
                "crate::api::leases::ListLeasesResponse",
                GrpcStreams::None,
            ),
        ],
    ),
    GrpcService(
        "containerd.services.diff.v1",
        "Diff",
        false,
        &[GrpcMethod(
            "Apply",
            "apply",
            "crate::api::diff::ApplyRequest",
            "crate::api::diff::ApplyResponse",
            GrpcStreams::None,
        )],
    ),
    GrpcService(
        "containerd.services.version.v1",
        "Version",
        false,
        &[GrpcMethod(
            "Version",
            "version",
            EMPTY,
            "crate::api::version::VersionResponse",
            GrpcStreams::None,
        )],
    ),
];

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    for GrpcService(package, name, served, calls) in SERVICES {
        let mut service = Service::builder().name(*name).package(*package);
        for GrpcMethod(route, method, request, reply, streams) in *calls {
            let mut call = Method::builder()
                .name(*method)
                .route_name(*route)
                .input_type(*request)
                .output_type(*reply)
                .codec_path("tonic_prost::ProstCodec");
            call = match streams {
                GrpcStreams::None => call,
                GrpcStreams::Reply => call.server_streaming(),
                GrpcStreams::Both => call.client_streaming().server_streaming(),
            };
            service = service.method(call.build());
        }
        Builder::new().build_server(*served).compile(&[service.build()]);
    }
}
