//! What the calls answer and keep.

use std::fs;
use std::process::Command;

use super::{KindCode, NAME, Served, folders, kind, labels, open};
use crate::api::snapshots::{
    CleanupRequest, ListSnapshotsRequest, PrepareSnapshotRequest, SnapshotInfo,
    StatSnapshotRequest, UpdateSnapshotRequest,
};
use crate::snapshotter::store::record::DiskUsage;

const REF: &str = "containerd.io/snapshot.ref";

/// Bytes that du counts.
fn du(path: &std::path::Path) -> i64 {
    let output = Command::new("du").args(["-s", "-B1"]).arg(path).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    text.split_whitespace().next().unwrap().parse().unwrap()
}

#[tokio::test]
async fn a_committed_layer_is_found_by_its_chain_and_parent() {
    let served = Served::start().await;
    served.layer("base", "").await;
    for (key, chain, parent) in
        [("a", "sha256:aa", ""), ("b", "sha256:bb", "base"), ("c", "sha256:bb", "")]
    {
        served.prepare(key, parent, &[(REF, chain)]).await.unwrap();
    }
    served.commit("layer b", "b", "", &[(REF, "sha256:bb")]).await.unwrap();
    // As containerd's metadata asks after "already exists".
    let filter = format!(r#"labels."{REF}"=="sha256:bb",parent=="base""#);
    let found = served.list(&[&filter]).await.unwrap();
    assert_eq!(found.len(), 1);
    assert_eq!((found[0].name.as_str(), kind(&found[0])), ("layer b", KindCode::Committed));
    let empty_parent = format!(r#"labels."{REF}"=="sha256:bb",parent=="""#);
    let found = served.list(&[&empty_parent, "name==base"]).await.unwrap();
    let names: Vec<&str> = found.iter().map(|info| info.name.as_str()).collect();
    assert_eq!(names, ["base", "c"]);
}

#[tokio::test]
async fn a_commit_may_give_a_parent_to_a_snapshot_without_one() {
    let served = Served::start().await;
    served.layer("base", "").await;
    served.prepare("k", "", &[]).await.unwrap();
    served.commit("top", "k", "base", &[]).await.unwrap();
    assert_eq!(served.stat("top").await.unwrap().parent, "base");
    assert_eq!(served.remove("base").await.unwrap_err().code(), tonic::Code::FailedPrecondition);
    let mounts = served.prepare("container", "top", &[]).await.unwrap();
    let lower = mounts[0].options.iter().find(|option| option.starts_with("lowerdir=")).unwrap();
    assert_eq!(lower.matches(':').count(), 1, "{lower}");
    // The parent that it has may be named too.
    served.prepare("k", "base", &[]).await.unwrap();
    served.commit("other", "k", "base", &[]).await.unwrap();
}

#[tokio::test]
async fn labels_and_times_are_those_of_containerds_reference() {
    let served = Served::start().await;
    served.prepare("k", "", &[("a", "1"), ("empty", "")]).await.unwrap();
    let prepared = served.stat("k").await.unwrap();
    assert_eq!(prepared.labels, labels(&[("a", "1")]));
    assert!(prepared.created_at.is_some());
    assert_eq!(prepared.created_at, prepared.updated_at);
    assert_eq!(kind(&prepared), KindCode::Active);

    served.commit("name", "k", "", &[("b", "2"), ("c", "")]).await.unwrap();
    let committed = served.stat("name").await.unwrap();
    assert_eq!(committed.labels, labels(&[("b", "2")]), "labels of Prepare are not inherited");
    assert_eq!(committed.created_at, committed.updated_at);
    assert_ne!(committed.created_at, prepared.created_at);

    let update = |mask: Option<&[&str]>, with: &[(&str, &str)]| UpdateSnapshotRequest {
        snapshotter: NAME.into(),
        info: Some(SnapshotInfo {
            name: "name".into(),
            labels: labels(with),
            ..SnapshotInfo::default()
        }),
        update_mask: mask.map(|paths| prost_types::FieldMask {
            paths: paths.iter().map(|path| (*path).to_owned()).collect(),
        }),
    };
    let mut client = served.client.clone();
    for (mask, with, expected) in [
        (
            Some(&["labels.d.e/f"][..]),
            &[("d.e/f", "3"), ("x", "y")][..],
            &[("b", "2"), ("d.e/f", "3")][..],
        ),
        (Some(&["labels.b", "labels.none"]), &[], &[("d.e/f", "3")]),
        (Some(&["labels.d.e/f"]), &[("d.e/f", "")], &[]),
        (Some(&["labels"]), &[("p", "q"), ("r", "")], &[("p", "q")]),
        (None, &[("s", "t")], &[("s", "t")]),
        (None, &[], &[]),
    ] {
        let answer = client.update(update(mask, with)).await.unwrap().into_inner().info.unwrap();
        assert_eq!(answer.labels, labels(expected), "{mask:?}");
        let stat = served.stat("name").await.unwrap();
        assert_eq!(answer, stat);
        assert_eq!(served.list(&["name==name"]).await.unwrap(), std::slice::from_ref(&stat));
        assert_eq!(stat.created_at, committed.created_at);
        let time = |info: &SnapshotInfo| info.updated_at.map(|time| (time.seconds, time.nanos));
        assert!(time(&stat) > time(&committed));
    }
}

#[tokio::test]
async fn list_comes_by_name_in_blocks_of_a_hundred() {
    let served = Served::start().await;
    assert!(served.list(&[]).await.unwrap().is_empty());
    for i in 0..203 {
        served.prepare(&format!("key {i:03}"), "", &[]).await.unwrap();
    }
    let (found, sizes) = served.list_of(NAME, &[]).await.unwrap();
    assert_eq!(sizes, [100, 100, 3]);
    assert!(found.is_sorted_by(|a, b| a.name < b.name));
}

#[tokio::test]
async fn two_plugins_on_one_socket_do_not_see_each_other() {
    let served = Served::start().await;
    served.layer("base", "").await;
    let other = |key: &str, parent: &str| PrepareSnapshotRequest {
        snapshotter: "other".into(),
        key: key.into(),
        parent: parent.into(),
        ..PrepareSnapshotRequest::default()
    };
    let mut client = served.client.clone();
    assert_eq!(client.prepare(other("k", "base")).await.unwrap_err().code(), tonic::Code::NotFound);
    client.prepare(other("base", "")).await.unwrap();
    assert_eq!(served.list_of("other", &[]).await.unwrap().0.len(), 1);
    assert_eq!(served.list(&[]).await.unwrap().len(), 1);
    served.remove("base").await.unwrap();
    assert_eq!(served.list_of("other", &[]).await.unwrap().0.len(), 1);
    let request = ListSnapshotsRequest::default();
    assert_eq!(client.list(request).await.unwrap_err().code(), tonic::Code::InvalidArgument);
}

#[tokio::test]
async fn usage_is_what_is_on_disk_without_parents_and_a_committed_one_keeps_it() {
    let served = Served::start().await;
    let mounts = served.prepare("k", "", &[]).await.unwrap();
    let upper = std::path::PathBuf::from(&mounts[0].source);
    fs::write(upper.join("big"), vec![1; 300_000]).unwrap();
    fs::create_dir(upper.join("folder")).unwrap();
    let usage = served.usage("k").await.unwrap();
    assert_eq!((usage.size, usage.inodes), (du(&upper), 3));
    served.commit("layer", "k", "", &[]).await.unwrap();
    let before = served.stat("layer").await.unwrap();
    assert_eq!(served.usage("layer").await.unwrap(), usage);
    assert_eq!(served.stat("layer").await.unwrap(), before, "asking changes nothing");
    // It is asked once: later changes, which nothing may make, are not seen.
    fs::write(upper.join("more"), vec![1; 300_000]).unwrap();
    assert_eq!(served.usage("layer").await.unwrap(), usage);
    let record = served.snapshotter.stat(NAME, "layer").unwrap();
    let stored = DiskUsage { bytes: usage.size as u64, inodes: usage.inodes as u64 };
    assert_eq!(record.usage, Some(stored));

    served.prepare("child", "layer", &[]).await.unwrap();
    served.view("view", "layer").await.unwrap();
    for key in ["child", "view"] {
        let usage = served.usage(key).await.unwrap();
        assert!(usage.size <= 8192 && usage.inodes == 1, "{key}: {usage:?}");
    }
}

#[tokio::test]
async fn cleanup_ends_when_the_files_of_removed_snapshots_are_gone() {
    let served = Served::start().await;
    for i in 0..10 {
        let key = format!("k{i}");
        let mounts = served.prepare(&key, "", &[]).await.unwrap();
        let upper = std::path::PathBuf::from(&mounts[0].source);
        for j in 0..200 {
            fs::create_dir(upper.join(format!("d{j}"))).unwrap();
            fs::write(upper.join(format!("d{j}/file")), b"x").unwrap();
        }
        served.remove(&key).await.unwrap();
        assert!(!upper.exists(), "the folder is out of the way at once");
    }
    served.client.clone().cleanup(CleanupRequest { snapshotter: NAME.into() }).await.unwrap();
    assert_eq!(fs::read_dir(served.root().join("trash")).unwrap().count(), 0);
    assert!(folders(&served.root()).is_empty());
}

#[tokio::test]
async fn the_root_of_a_new_snapshot_belongs_to_the_user_of_its_parents_root() {
    use std::os::unix::fs::MetadataExt as _;
    let served = Served::start().await;
    let mounts = served.prepare("k", "", &[]).await.unwrap();
    let owner = if rustix::process::geteuid().is_root() {
        1234
    } else {
        rustix::process::geteuid().as_raw()
    };
    std::os::unix::fs::chown(&mounts[0].source, Some(owner), None).unwrap();
    served.commit("layer", "k", "", &[]).await.unwrap();
    let mounts = served.prepare("child", "layer", &[]).await.unwrap();
    let option = |name: &str| {
        let found = mounts[0].options.iter().find_map(|option| option.strip_prefix(name));
        std::path::PathBuf::from(found.unwrap())
    };
    let meta = fs::metadata(option("upperdir=")).unwrap();
    assert_eq!((meta.uid(), meta.mode() & 0o7777), (owner, 0o755));
    assert!(option("workdir=").is_dir());
}

#[tokio::test]
async fn all_of_it_is_there_after_a_restart() {
    let served = Served::start().await;
    served.layer("base", "").await;
    served.prepare("k with blank/and slash", "base", &[("a", "b")]).await.unwrap();
    served.view("v", "base").await.unwrap();
    let before = served.list(&[]).await.unwrap();
    let mounts = served.mounts("k with blank/and slash").await.unwrap();
    let root = served.root();
    let dir = {
        let mut served = served;
        served.server.abort();
        let _ = (&mut served.server).await;
        // The last owner closes the store.
        while std::sync::Arc::strong_count(&served.snapshotter) > 1 {
            tokio::task::yield_now().await;
        }
        std::mem::replace(&mut served.dir, tempfile::tempdir().unwrap())
    };
    let again = open(&root);
    let after: Vec<SnapshotInfo> =
        again.list(NAME, &[]).unwrap().iter().map(|record| record.info()).collect();
    assert_eq!(after, before);
    let until = std::time::Instant::now() + super::super::service::LONGEST;
    assert_eq!(again.mounts(NAME, "k with blank/and slash", until).unwrap(), mounts);
    drop(again);
    drop(dir);
}

#[tokio::test]
async fn stat_is_answered_while_list_streams() {
    let served = Served::start().await;
    for i in 0..250 {
        served.prepare(&format!("k{i}"), "", &[]).await.unwrap();
    }
    let request = ListSnapshotsRequest { snapshotter: NAME.into(), ..Default::default() };
    let mut client = served.client.clone();
    let mut stream = client.list(request).await.unwrap().into_inner();
    let mut seen = 0;
    while let Some(block) = stream.message().await.unwrap() {
        for info in block.info {
            let request = StatSnapshotRequest { snapshotter: NAME.into(), key: info.name.clone() };
            let stat = served.client.clone().stat(request).await.unwrap().into_inner();
            assert_eq!(stat.info, Some(info));
            seen += 1;
        }
    }
    assert_eq!(seen, 250);
}
