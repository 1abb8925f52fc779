//! Calls over a socket, as containerd makes them, and what containerd's own suite does not ask for.

mod answers;
mod codes;
mod crashes;
mod roots;
mod together;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tonic::transport::Channel;

use super::{Snapshotter, SnapshotterConfig};
use crate::api::snapshots::snapshots_client::SnapshotsClient;
use crate::api::snapshots::{
    CommitSnapshotRequest, KindCode, ListSnapshotsRequest, MountsRequest, PrepareSnapshotRequest,
    RemoveSnapshotRequest, SnapshotInfo, StatSnapshotRequest, UsageRequest, UsageResponse,
    ViewSnapshotRequest,
};
use crate::api::types::Mount;

/// Name of the plugin in these tests.
const NAME: &str = "overlaybd";

type Answer<T> = Result<T, tonic::Status>;

fn config(root: &Path) -> SnapshotterConfig {
    SnapshotterConfig { root: root.to_owned(), ..SnapshotterConfig::default() }
}

fn open(root: &Path) -> Snapshotter {
    Snapshotter::open(config(root)).unwrap()
}

fn labels(list: &[(&str, &str)]) -> BTreeMap<String, String> {
    list.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
}

/// A snapshotter that answers on a socket, and its root.
struct Served {
    dir: tempfile::TempDir,
    snapshotter: Arc<Snapshotter>,
    client: SnapshotsClient<Channel>,
    server: tokio::task::JoinHandle<()>,
}

impl Drop for Served {
    fn drop(&mut self) {
        self.server.abort();
    }
}

impl Served {
    async fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let snapshotter = Arc::new(open(&dir.path().join("root")));
        let socket = dir.path().join("s");
        let listener = tokio::net::UnixListener::bind(&socket).unwrap();
        let serving = super::service::serve(snapshotter.clone(), listener, std::future::pending());
        let server = tokio::spawn(async { serving.await.unwrap() });
        let channel = tonic::transport::Endpoint::try_from(format!("unix://{}", socket.display()))
            .unwrap()
            .connect()
            .await
            .unwrap();
        Self { dir, snapshotter, client: SnapshotsClient::new(channel), server }
    }

    fn root(&self) -> PathBuf {
        self.dir.path().join("root")
    }

    async fn prepare(&self, key: &str, parent: &str, with: &[(&str, &str)]) -> Answer<Vec<Mount>> {
        let request = PrepareSnapshotRequest {
            snapshotter: NAME.into(),
            key: key.into(),
            parent: parent.into(),
            labels: labels(with),
        };
        Ok(self.client.clone().prepare(request).await?.into_inner().mounts)
    }

    async fn view(&self, key: &str, parent: &str) -> Answer<Vec<Mount>> {
        let request = ViewSnapshotRequest {
            snapshotter: NAME.into(),
            key: key.into(),
            parent: parent.into(),
            labels: BTreeMap::new(),
        };
        Ok(self.client.clone().view(request).await?.into_inner().mounts)
    }

    async fn mounts(&self, key: &str) -> Answer<Vec<Mount>> {
        let request = MountsRequest { snapshotter: NAME.into(), key: key.into() };
        Ok(self.client.clone().mounts(request).await?.into_inner().mounts)
    }

    async fn commit(
        &self,
        name: &str,
        key: &str,
        parent: &str,
        with: &[(&str, &str)],
    ) -> Answer<()> {
        let request = CommitSnapshotRequest {
            snapshotter: NAME.into(),
            name: name.into(),
            key: key.into(),
            parent: parent.into(),
            labels: labels(with),
        };
        self.client.clone().commit(request).await?;
        Ok(())
    }

    async fn remove(&self, key: &str) -> Answer<()> {
        let request = RemoveSnapshotRequest { snapshotter: NAME.into(), key: key.into() };
        self.client.clone().remove(request).await?;
        Ok(())
    }

    async fn stat(&self, key: &str) -> Answer<SnapshotInfo> {
        let request = StatSnapshotRequest { snapshotter: NAME.into(), key: key.into() };
        Ok(self.client.clone().stat(request).await?.into_inner().info.unwrap())
    }

    async fn usage(&self, key: &str) -> Answer<UsageResponse> {
        let request = UsageRequest { snapshotter: NAME.into(), key: key.into() };
        Ok(self.client.clone().usage(request).await?.into_inner())
    }

    /// Snapshots of a plugin, and the sizes of the messages that they came in.
    async fn list_of(
        &self,
        snapshotter: &str,
        filters: &[&str],
    ) -> Answer<(Vec<SnapshotInfo>, Vec<usize>)> {
        let request = ListSnapshotsRequest {
            snapshotter: snapshotter.into(),
            filters: filters.iter().map(|filter| (*filter).to_owned()).collect(),
        };
        let mut stream = self.client.clone().list(request).await?.into_inner();
        let (mut found, mut sizes) = (Vec::new(), Vec::new());
        while let Some(block) = stream.message().await? {
            sizes.push(block.info.len());
            found.extend(block.info);
        }
        Ok((found, sizes))
    }

    async fn list(&self, filters: &[&str]) -> Answer<Vec<SnapshotInfo>> {
        Ok(self.list_of(NAME, filters).await?.0)
    }

    /// Makes a committed snapshot, as an unpacked layer is one.
    async fn layer(&self, name: &str, parent: &str) {
        let key = format!("extract {name}");
        self.prepare(&key, parent, &[]).await.unwrap();
        self.commit(name, &key, "", &[]).await.unwrap();
    }
}

/// Folders of snapshots in a root.
fn folders(root: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(root.join("snapshots")).unwrap();
    let mut names: Vec<String> =
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn kind(info: &SnapshotInfo) -> KindCode {
    KindCode::try_from(info.kind).unwrap()
}
