//! Small images in layout directories, built byte by byte here, and changed to simulate faults.

#![allow(dead_code, unreachable_pub, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::Command;

use disk::Disk;
use disk::explain::{Placed, What};
use formats::oci::Digest;
use formats::tar::archive::Archive;
use serde_json::{Value, json};

pub const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
pub const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
pub const OCI_CONFIG: &str = "application/vnd.oci.image.config.v1+json";
pub const OCI_GZIP: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
pub const OCI_TAR: &str = "application/vnd.oci.image.layer.v1.tar";
pub const REF_NAME: &str = "org.opencontainers.image.ref.name";

/// Result of a command.
#[derive(Debug)]
pub struct Ended {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

/// A `turbobd` without any of its user's settings.
pub fn turbobd() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_turbobd"));
    command
        .env_remove("RUST_LOG")
        .env("DOCKER_CONFIG", "/nonexistent")
        // Reads of one test must not be in memory, or be fetched ahead, for another.
        .env(
            "TURBOBD_SERVICE_CONFIG",
            Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/machine/service.json"),
        )
        .env_remove("http_proxy")
        .env_remove("HTTP_PROXY");
    command
}

/// Runs a command to its end.
pub fn end(command: &mut Command) -> Ended {
    let output = command.output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("output is UTF-8");
    Ended { code: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) }
}

/// Runs `turbobd`, which must succeed; returns its stdout without the line end.
pub fn done(args: &[&str]) -> String {
    let ended = end(turbobd().args(args));
    assert_eq!(ended.code, Some(0), "turbobd {args:?}: {}", ended.stderr);
    ended.stdout.trim_end().to_owned()
}

/// Runs `turbobd`, which must fail according to the contract: status 1, and one line on stderr that names the
/// command and contains all of `needles`.
#[track_caller]
pub fn refused(args: &[&str], needles: &[&str]) -> String {
    is_refusal(&end(turbobd().args(args)), args, needles)
}

/// Asserts a failure in the form that [`refused`] requires.
#[track_caller]
pub fn is_refusal(ended: &Ended, args: &[&str], needles: &[&str]) -> String {
    let Ended { code, stdout, stderr } = ended;
    assert!(!stderr.contains("panicked"), "turbobd {args:?}: {stderr}");
    assert_eq!(*code, Some(1), "turbobd {args:?}: stdout {stdout} stderr {stderr}");
    assert_eq!(stdout, "", "turbobd {args:?} failed and still wrote data");
    assert_eq!(stderr.lines().count(), 1, "turbobd {args:?}: not one line:\n{stderr}");
    assert!(stderr.starts_with(&format!("turbobd: {}: ", args[0])), "turbobd {args:?}: {stderr}");
    for needle in needles {
        assert!(stderr.contains(needle), "turbobd {args:?}: no {needle:?} in: {stderr}");
    }
    stderr.clone()
}

/// Random bytes, equal in every run.
pub fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

/// Text that compresses to about half.
pub fn prose(seed: u64, len: usize) -> Vec<u8> {
    noise(seed, len).iter().map(|byte| b'a' + byte % 16).collect()
}

/// A tar of these files, in this order; a name that ends in `/` is a directory.
pub fn tar_of(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    for (name, data) in files {
        let mut header = tar::Header::new_ustar();
        let dir = name.ends_with('/');
        header.set_entry_type(if dir {
            tar::EntryType::Directory
        } else {
            tar::EntryType::Regular
        });
        header.set_mode(if dir { 0o755 } else { 0o644 });
        header.set_mtime(1_600_000_000);
        header.set_size(data.len() as u64);
        tar.append_data(&mut header, name, *data).unwrap();
    }
    tar.into_inner().unwrap()
}

/// One gzip member.
pub fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::new(6));
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// All gzip members of `bytes`, unpacked.
pub fn gunzip(bytes: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    flate2::read::MultiGzDecoder::new(bytes).read_to_end(&mut out).unwrap();
    out
}

/// Names and contents of a tar's members, by an independent reader.
pub fn members_of(archive: &[u8]) -> Vec<(String, Vec<u8>)> {
    let mut tar = tar::Archive::new(archive);
    let entries = tar.entries().unwrap().map(|entry| {
        let mut entry = entry.unwrap();
        let mut data = Vec::new();
        entry.read_to_end(&mut data).unwrap();
        (entry.path().unwrap().display().to_string(), data)
    });
    entries.collect()
}

/// The lower layer of the sample: a large file between small ones.
pub fn lower() -> Vec<u8> {
    let big = prose(1, 5 << 20);
    tar_of(&[
        ("etc/", b""),
        ("etc/first", b"first\n"),
        ("big", &big),
        ("etc/last", b"last\n"),
        ("gone", b"x"),
    ])
}

/// The upper layer: a replaced file, a removed one, a file of exactly one page.
pub fn upper() -> Vec<u8> {
    tar_of(&[("etc/first", b"second\n"), (".wh.gone", b""), ("page", &noise(2, 4096))])
}

/// Name of this machine's architecture in an image.
pub fn host_architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

/// A layout directory that is removed when dropped.
pub struct Images {
    dir: tempfile::TempDir,
}

impl Images {
    /// An empty layout.
    pub fn new() -> Self {
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        fs::create_dir_all(dir.path().join("blobs/sha256")).unwrap();
        fs::write(dir.path().join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
        let index = json!({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": []});
        fs::write(dir.path().join("index.json"), index.to_string()).unwrap();
        Self { dir }
    }

    /// The sample of two gzip layers, tagged `latest`.
    pub fn sample() -> Self {
        let images = Self::new();
        let layers = [(OCI_GZIP, gzip(&lower())), (OCI_GZIP, gzip(&upper()))];
        images.add("latest", &layers);
        images
    }

    /// [`sample`](Self::sample) with the meta image `turbo` beside it.
    pub fn converted() -> Self {
        let images = Self::sample();
        images.convert(&[]);
        images
    }

    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// `oci:DIR`.
    pub fn place(&self) -> String {
        format!("oci:{}", self.dir.path().display())
    }

    /// `oci:DIR:TAG`.
    pub fn name(&self, tag: &str) -> String {
        format!("{}:{tag}", self.place())
    }

    /// Converts `latest` to `turbo` with a disk of 1 GiB.
    pub fn convert(&self, more: &[&str]) -> String {
        let place = self.place();
        let mut args =
            vec!["convert", "-r", &place, "-i", "latest", "--turboOCI", "turbo", "--vsize", "1"];
        args.extend(more);
        done(&args)
    }

    /// Stores a blob.
    pub fn put(&self, bytes: &[u8]) -> Digest {
        let digest = Digest::of(bytes);
        fs::write(self.blob_path(&digest.to_string()), bytes).unwrap();
        digest
    }

    pub fn blob_path(&self, digest: &str) -> PathBuf {
        self.dir.path().join("blobs/sha256").join(digest.trim_start_matches("sha256:"))
    }

    pub fn blob(&self, digest: &str) -> Vec<u8> {
        fs::read(self.blob_path(digest)).unwrap()
    }

    /// Stores a blob; returns its descriptor.
    pub fn descriptor(&self, media_type: &str, bytes: &[u8]) -> Value {
        json!({"mediaType": media_type, "digest": self.put(bytes).to_string(), "size": bytes.len()})
    }

    /// Points a tag at a descriptor.
    pub fn tag(&self, tag: &str, descriptor: &Value) {
        let path = self.dir.path().join("index.json");
        let mut index: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        let mut entry = descriptor.clone();
        entry["annotations"][REF_NAME] = tag.into();
        let entries = index["manifests"].as_array_mut().unwrap();
        entries.retain(|entry| entry["annotations"][REF_NAME] != tag);
        entries.push(entry);
        fs::write(path, index.to_string()).unwrap();
    }

    /// The descriptor of a tag.
    pub fn tagged(&self, tag: &str) -> Value {
        let index: Value =
            serde_json::from_slice(&fs::read(self.dir.path().join("index.json")).unwrap()).unwrap();
        let entries = index["manifests"].as_array().unwrap();
        entries
            .iter()
            .find(|entry| entry["annotations"][REF_NAME] == tag)
            .expect("no such tag")
            .clone()
    }

    pub fn document(&self, digest: &Value) -> Value {
        serde_json::from_slice(&self.blob(digest.as_str().unwrap())).unwrap()
    }

    /// The manifest of a tag.
    pub fn manifest(&self, tag: &str) -> Value {
        self.document(&self.tagged(tag)["digest"])
    }

    /// Digest of layer `number` of a tag.
    pub fn layer(&self, tag: &str, number: usize) -> String {
        self.manifest(tag)["layers"][number]["digest"].as_str().unwrap().to_owned()
    }

    /// Stores a manifest of these layers (media type, bytes); returns its descriptor.
    pub fn image(&self, config: &str, layers: &[(&str, Vec<u8>)]) -> Value {
        let layers: Vec<Value> =
            layers.iter().map(|(kind, bytes)| self.descriptor(kind, bytes)).collect();
        let config = self.descriptor(OCI_CONFIG, config.as_bytes());
        let manifest = json!({"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": config, "layers": layers});
        self.descriptor(OCI_MANIFEST, manifest.to_string().as_bytes())
    }

    /// Adds an image of these layers.
    pub fn add(&self, tag: &str, layers: &[(&str, Vec<u8>)]) {
        let config = config_of(layers);
        self.tag(tag, &self.image(&config, layers));
    }

    /// Stores `manifest` and points `tag` at it.
    pub fn set_manifest(&self, tag: &str, manifest: &Value) {
        let media_type = manifest["mediaType"].as_str().unwrap();
        self.tag(tag, &self.descriptor(media_type, manifest.to_string().as_bytes()));
    }

    /// Makes another image, `to`, of the meta image `turbo`, in which `edit` changed the members of layer
    /// `number`'s archive; digests, sizes and annotations are corrected, so that only the parsers can detect
    /// the change.
    pub fn forge(&self, to: &str, number: usize, edit: impl FnOnce(&mut Vec<(String, Vec<u8>)>)) {
        let mut members = members_of(&gunzip(&self.blob(&self.layer("turbo", number))));
        edit(&mut members);
        let mut archive = Vec::new();
        let list: Vec<(&str, &[u8])> =
            members.iter().map(|(name, data)| (name.as_str(), &data[..])).collect();
        Archive::write(&mut archive, &list).unwrap();
        self.forge_blob(to, number, &gzip(&archive));
    }

    /// Form of [`forge`](Self::forge) that replaces the whole layer blob.
    pub fn forge_blob(&self, to: &str, number: usize, blob: &[u8]) {
        let mut manifest = self.manifest("turbo");
        let layer = &mut manifest["layers"][number];
        let digest = self.put(blob).to_string();
        layer["annotations"]["containerd.io/snapshot/overlaybd/blob-digest"] =
            digest.as_str().into();
        layer["annotations"]["containerd.io/snapshot/overlaybd/blob-size"] =
            blob.len().to_string().into();
        layer["digest"] = digest.into();
        layer["size"] = blob.len().into();
        self.set_manifest(to, &manifest);
    }

    /// Every file and the digest of its content.
    pub fn snapshot(&self) -> BTreeMap<PathBuf, Digest> {
        let mut files = BTreeMap::new();
        let mut pending = vec![self.dir.path().to_owned()];
        while let Some(dir) = pending.pop() {
            for entry in fs::read_dir(dir).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    pending.push(path);
                } else {
                    let name = path.strip_prefix(self.dir.path()).unwrap().to_owned();
                    files.insert(name, Digest::of(&fs::read(&path).unwrap()));
                }
            }
        }
        files
    }
}

/// A plain config for these layers.
pub fn config_of(layers: &[(&str, Vec<u8>)]) -> String {
    let ids = layers.iter().map(|(_, bytes)| {
        let tar = if bytes.starts_with(&[0x1f, 0x8b]) {
            Digest::of(&gunzip(bytes))
        } else {
            Digest::of(bytes)
        };
        tar.to_string()
    });
    let ids: Vec<String> = ids.collect();
    json!({"architecture": host_architecture(), "os": "linux", "rootfs": {"type": "layers", "diff_ids": ids}}).to_string()
}

/// For each chunk of the layer's data: its first byte on the disk, its number, and its place in the blob.
pub fn chunks(disk: &Disk) -> Vec<(u64, u32, u64)> {
    let mut found: Vec<(u64, u32, u64)> = Vec::new();
    for (lba, len) in disk.mapped() {
        let (start, end) = (lba.bytes().0, (lba + len).bytes().0);
        for Placed { range, what, chunk, .. } in disk.explain((start..end).into(), usize::MAX) {
            if let (What::Data, Some(chunk)) = (what, chunk)
                && found.iter().all(|(_, index, _)| *index != chunk.index)
            {
                found.push((range.offset, chunk.index, chunk.start));
            }
        }
    }
    found
}
