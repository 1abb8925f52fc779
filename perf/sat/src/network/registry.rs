//! Debian's `docker-registry` on loopback, and what is pushed to it.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::failure::{Attempt as _, Failure};
use crate::place::Place;
use crate::program::{self, Daemon};

/// Longest upload of an image: gigabytes to a local disk.
const PUSH: Duration = Duration::from_secs(900);

/// A registry that runs.
#[derive(Debug)]
pub(crate) struct Registry {
    /// Ends with the registry.
    _daemon: Daemon,
    address: SocketAddr,
    storage: PathBuf,
}

impl Registry {
    /// Starts the registry over the storage of earlier runs.
    pub(crate) fn start(place: &Place, port: u16) -> Result<Self, Failure> {
        let program = program::find("docker-registry", &[]).ok_or_else(|| {
            Failure::missing("docker-registry", "apt-get install docker-registry")
        })?;
        let address = SocketAddr::from(SocketAddrV4::new(Ipv4Addr::LOCALHOST, port));
        if TcpStream::connect(address).is_ok() {
            let why = "another program listens there; SAT_PORT=N takes another one, and the next";
            return Err(Failure::cannot(format!("start the registry on port {port}"), why));
        }
        let storage = place.folder("registry")?;
        let config = place.base.join("registry.yml");
        let text = format!(
            "version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: {}}}}}\n\
             http: {{addr: \"{address}\"}}\n",
            storage.display()
        );
        fs::write(&config, text).attempt(|| format!("write {}", config.display()))?;
        let mut command = Command::new(program);
        command.arg("serve").arg(&config);
        let mut daemon = Daemon::start(&command, None, &place.base.join("registry.log"))?;
        daemon.wait_until(Duration::from_secs(20), || TcpStream::connect(address).is_ok())?;
        Ok(Self { _daemon: daemon, address, storage })
    }

    /// Its address, without shaping.
    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Pushes an image from a layout (`oci:DIR:TAG`) or another place that skopeo knows to `repository:tag`.
    pub(crate) fn push(&self, from: &str, repository: &str, tag: &str) -> Result<(), Failure> {
        let skopeo = program::find("skopeo", &[])
            .ok_or_else(|| Failure::missing("skopeo", "apt-get install skopeo"))?;
        let mut command = Command::new(skopeo);
        command.args(["copy", "--quiet", "--dest-tls-verify=false"]);
        command.args([from, &format!("docker://{}/{repository}:{tag}", self.address)]);
        program::run(&command, PUSH).map(drop)
    }

    /// Pushes a layout with all manifests of its list to `repository:tag`.
    pub(crate) fn push_all(
        &self,
        layout: &Path,
        repository: &str,
        tag: &str,
    ) -> Result<(), Failure> {
        let skopeo = program::find("skopeo", &[])
            .ok_or_else(|| Failure::missing("skopeo", "apt-get install skopeo"))?;
        let mut command = Command::new(skopeo);
        command.args(["copy", "--all", "--quiet", "--dest-tls-verify=false"]);
        command.arg(format!("oci:{}", layout.display()));
        command.arg(format!("docker://{}/{repository}:{tag}", self.address));
        program::run(&command, PUSH).map(drop)
    }

    /// Reads the stored blobs into the page cache: the registry stands for a machine far away, whose disk is not part
    /// of what is measured.
    pub(crate) fn warm(&self, blobs: &[String]) {
        let mut buffer = vec![0; 1 << 20];
        for blob in blobs {
            let file = self.blob(blob);
            let Ok(mut file) = fs::File::open(file) else { continue };
            while matches!(std::io::Read::read(&mut file, &mut buffer), Ok(read) if read > 0) {}
        }
    }

    /// The file of a blob, `sha256:…`.
    fn blob(&self, digest: &str) -> PathBuf {
        let hex = digest.strip_prefix("sha256:").unwrap_or(digest);
        let start = hex.get(..2).unwrap_or_default();
        self.storage.join("docker/registry/v2/blobs/sha256").join(start).join(hex).join("data")
    }

    /// Digest of the manifest of a tag; none if there is no such tag.
    pub(crate) fn tagged(&self, repository: &str, tag: &str) -> Option<String> {
        let link = self.storage.join("docker/registry/v2/repositories").join(repository);
        let link = link.join("_manifests/tags").join(tag).join("current/link");
        fs::read_to_string(link).ok().map(|text| text.trim().to_owned())
    }

    /// Digests of all blobs of the image of a tag, its manifest and those of a list included, and their bytes.
    pub(crate) fn blobs(&self, repository: &str, tag: &str) -> (Vec<String>, u64) {
        let mut open: Vec<String> = self.tagged(repository, tag).into_iter().collect();
        let mut found: Vec<String> = Vec::new();
        let mut bytes = 0;
        while let Some(digest) = open.pop() {
            if found.contains(&digest) {
                continue;
            }
            bytes += self.bytes(&digest);
            if let Some(document) = self.document(&digest) {
                let lists = ["manifests", "layers"].map(|key| document[key].as_array().cloned());
                let entries = lists.into_iter().flatten().flatten();
                let digests = entries.chain([document["config"].clone()]);
                open.extend(digests.filter_map(|entry| Some(entry["digest"].as_str()?.to_owned())));
            }
            found.push(digest);
        }
        (found, bytes)
    }

    fn bytes(&self, digest: &str) -> u64 {
        fs::metadata(self.blob(digest)).map_or(0, |found| found.len())
    }

    /// A manifest or an index. Layers are not read: both begin with an opening brace and are small.
    fn document(&self, digest: &str) -> Option<serde_json::Value> {
        let file = self.blob(digest);
        if self.bytes(digest) > 4 << 20 {
            return None;
        }
        let bytes = fs::read(file).ok()?;
        (bytes.first() == Some(&b'{')).then(|| serde_json::from_slice(&bytes).ok()).flatten()
    }
}
