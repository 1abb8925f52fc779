//! Every refusal has the code that containerd expects.

use tonic::Code;

use super::{NAME, Served};
use crate::api::snapshots::{
    CleanupRequest, PrepareSnapshotRequest, SnapshotInfo, UpdateSnapshotRequest,
};

fn code<T>(answer: Result<T, tonic::Status>) -> Code {
    answer.err().map_or(Code::Ok, |status| status.code())
}

#[tokio::test]
async fn every_refusal_has_the_code_of_containerds_reference() {
    let served = Served::start().await;
    served.layer("base", "").await;
    served.layer("middle", "base").await;
    served.prepare("active", "base", &[]).await.unwrap();
    served.prepare("free", "", &[]).await.unwrap();
    served.view("view", "base").await.unwrap();

    // Unknown keys.
    assert_eq!(code(served.stat("none").await), Code::NotFound);
    assert_eq!(code(served.usage("none").await), Code::NotFound);
    assert_eq!(code(served.mounts("none").await), Code::NotFound);
    assert_eq!(code(served.remove("none").await), Code::NotFound);
    assert_eq!(code(served.commit("new", "none", "", &[]).await), Code::NotFound);
    // overlayfs looks for the key before the name.
    assert_eq!(code(served.commit("base", "none", "", &[]).await), Code::NotFound);

    // Prepare and View.
    for key in ["active", "view", "base"] {
        assert_eq!(code(served.prepare(key, "", &[]).await), Code::AlreadyExists, "{key}");
        assert_eq!(code(served.view(key, "").await), Code::AlreadyExists, "{key}");
    }
    assert_eq!(code(served.prepare("new", "none", &[]).await), Code::NotFound);
    assert_eq!(code(served.view("new", "none").await), Code::NotFound);
    for parent in ["active", "view"] {
        assert_eq!(code(served.prepare("new", parent, &[]).await), Code::InvalidArgument);
        assert_eq!(code(served.view("new", parent).await), Code::InvalidArgument);
    }
    assert_eq!(code(served.prepare("", "", &[]).await), Code::InvalidArgument);
    let long = "x".repeat(4090);
    assert_eq!(code(served.prepare("new", "", &[("a/label", &long)]).await), Code::InvalidArgument);

    // Mounts and Commit.
    assert_eq!(code(served.mounts("base").await), Code::FailedPrecondition);
    assert_eq!(code(served.commit("base", "active", "", &[]).await), Code::AlreadyExists);
    assert_eq!(code(served.commit("active", "active", "", &[]).await), Code::AlreadyExists);
    assert_eq!(code(served.commit("new", "view", "", &[]).await), Code::FailedPrecondition);
    assert_eq!(code(served.commit("new", "base", "", &[]).await), Code::FailedPrecondition);
    assert_eq!(code(served.commit("new", "active", "middle", &[]).await), Code::InvalidArgument);
    assert_eq!(code(served.commit("new", "free", "none", &[]).await), Code::NotFound);
    assert_eq!(code(served.commit("new", "free", "view", &[]).await), Code::FailedPrecondition);

    // Remove: containerd's collector skips a snapshot for this code alone, and looks for the word.
    let refused = served.remove("base").await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    assert!(refused.message().contains("remove"), "{}", refused.message());

    // Filters.
    assert_eq!(code(served.list(&["name==="]).await), Code::InvalidArgument);

    // Nothing of it has changed anything.
    let names: Vec<String> =
        served.list(&[]).await.unwrap().into_iter().map(|info| info.name).collect();
    assert_eq!(names, ["active", "base", "free", "middle", "view"]);
    assert_eq!(super::folders(&served.root()).len(), 5);
}

#[tokio::test]
async fn an_update_refuses_fields_that_never_change() {
    let served = Served::start().await;
    served.layer("base", "").await;
    let update = |mask: &[&str], name: &str| UpdateSnapshotRequest {
        snapshotter: NAME.into(),
        info: Some(SnapshotInfo { name: name.into(), ..SnapshotInfo::default() }),
        update_mask: Some(prost_types::FieldMask {
            paths: mask.iter().map(|path| (*path).to_owned()).collect(),
        }),
    };
    let mut client = served.client.clone();
    for field in ["parent", "kind", "name", "created_at", "labelsx"] {
        let answer = client.update(update(&["labels.a", field], "base")).await;
        assert_eq!(code(answer), Code::InvalidArgument, "{field}");
    }
    assert_eq!(code(client.update(update(&[], "none")).await), Code::NotFound);
    let without = UpdateSnapshotRequest { snapshotter: NAME.into(), ..Default::default() };
    assert_eq!(code(client.update(without).await), Code::InvalidArgument);
}

#[tokio::test]
async fn a_request_without_a_snapshotter_is_refused_and_one_without_a_namespace_is_not() {
    let served = Served::start().await;
    let request = PrepareSnapshotRequest { key: "k".into(), ..PrepareSnapshotRequest::default() };
    assert_eq!(code(served.client.clone().prepare(request).await), Code::InvalidArgument);
    // No call of these tests has the header `containerd-namespace`.
    let key = "k8s.io/12/extract-123-AbCd sha256:0123 /a/path with blanks/";
    served.prepare(key, "", &[]).await.unwrap();
    assert_eq!(served.stat(key).await.unwrap().name, key);
    let cleanup = CleanupRequest { snapshotter: NAME.into() };
    assert_eq!(code(served.client.clone().cleanup(cleanup).await), Code::Ok);
}

#[tokio::test]
async fn a_call_ends_with_its_callers_deadline() {
    let served = Served::start().await;
    served.prepare("active", "", &[]).await.unwrap();
    let mut request = tonic::Request::new(crate::api::snapshots::UsageRequest {
        snapshotter: NAME.into(),
        key: "active".into(),
    });
    // A deadline in the past: nothing can be counted by then.
    request.metadata_mut().insert("grpc-timeout", "1n".parse().unwrap());
    let status = served.client.clone().usage(request).await.unwrap_err();
    assert!(matches!(status.code(), Code::DeadlineExceeded | Code::Cancelled), "{status:?}");
}
