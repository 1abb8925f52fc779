//! Disks built by upstream's own tools: they must read byte for byte as upstream reads them, and mount as the
//! same tree.
//!
//! `tests/interop/cases.json` lists them with a digest of their content. One case needs a layer that
//! is not stored here (upstream's base layer `ext4_64`): it runs when `TURBOBD_INTEROP_EXTRA` names a
//! folder that has it.
//!
//! The expected tree of a disk is that of its raw file, which the kernel mounts without any turbobd device,
//! after the file was found to have the digest of upstream's reading.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use crate::block;
use crate::image;
use crate::listing;
use crate::machine;
use std::env;
use std::fs::{self, File};
use std::io::Read as _;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::machine::Mounted;
use crate::run_dir::RunDir;
use blobs::cache::Cache;
use disk::config::{self, TargetOpener};
use disk::digest::{content_digest, export_raw};
use disk::volume::Volume as _;
use disk::{Disk, DiskError};
use flate2::read::MultiGzDecoder;
use rustix::fs::SeekFrom;
use sha2::{Digest as _, Sha256};
use source::chunk::{ChunkSource, PlainChunks};
use source::{ByteSource, MemorySource};

/// Inflates a whole target by zlib's rules: an oracle without the index.
struct Inflated;

impl TargetOpener for Inflated {
    fn open_indexed(
        &self,
        blob: Arc<dyn ByteSource>,
        _index: Option<Vec<u8>>,
        _sidecar: Option<Vec<u8>>,
        digest: Option<&str>,
    ) -> Result<Arc<dyn ChunkSource>, DiskError> {
        let mut packed = vec![0; blob.len() as usize];
        blob.read_exact_at(&mut packed, 0)?;
        let mut tar = Vec::new();
        MultiGzDecoder::new(&packed[..]).read_to_end(&mut tar).unwrap();
        let id = digest.unwrap().to_owned();
        Ok(Arc::new(PlainChunks::new(id.clone(), Arc::new(MemorySource::new(id, tar)))))
    }
}

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/interop")
}

/// The path of a layer file: stored, or among the extra ones.
fn locate(name: &str) -> Option<PathBuf> {
    let stored = folder().join(name);
    let extra = env::var_os("TURBOBD_INTEROP_EXTRA")
        .map(|extra| Path::new(&extra).join(Path::new(name).file_name().unwrap()));
    [Some(stored), extra].into_iter().flatten().find(|path| path.exists())
}

/// The configuration of a case with absolute paths, or the name of a missing file.
fn config_of(case: &serde_json::Value) -> Result<serde_json::Value, String> {
    let mut config = case["config"].clone();
    for lower in config["lowers"].as_array_mut().unwrap() {
        for key in ["file", "targetFile", "gzipIndex"] {
            if let Some(name) = lower.get(key).and_then(|name| name.as_str()) {
                let path = locate(name).ok_or_else(|| name.to_owned())?;
                lower[key] = path.to_str().unwrap().into();
            }
        }
    }
    Ok(config)
}

fn cases() -> serde_json::Map<String, serde_json::Value> {
    serde_json::from_str(&fs::read_to_string(folder().join("cases.json")).unwrap()).unwrap()
}

fn open(case: &serde_json::Value, budget: u64) -> Result<Disk, String> {
    let work = tempfile::tempdir().unwrap();
    let path = work.path().join("config.v1.json");
    fs::write(&path, config_of(case)?.to_string()).unwrap();
    Ok(config::open(&path, Cache::new(budget, 2), &Inflated).unwrap())
}

fn digest_of(disk: &Disk) -> (String, u64) {
    let (digest, size) = content_digest(disk, disk.mapped()).unwrap();
    (digest.hex(), size)
}

/// Runs a test of each case that has its files, prints the cases without, and asserts that most have them.
fn with_each_case(test: impl Fn(&str, &serde_json::Value)) {
    let mut ran = 0;
    for (name, case) in &cases() {
        match config_of(case) {
            Ok(_) => {
                test(name, case);
                ran += 1;
            }
            Err(file) => {
                println!("{name}: not run: {file} is not stored here; set TURBOBD_INTEROP_EXTRA");
            }
        }
    }
    assert!(ran >= 4, "only {ran} cases ran");
}

/// Result of upstream's reading of a case: the digest of the content, and the size.
fn expected_of(case: &serde_json::Value) -> (String, u64) {
    (case["content_sha256"].as_str().unwrap().to_owned(), case["vsize"].as_u64().unwrap())
}

#[test]
fn every_disk_of_upstream_reads_as_upstream_reads_it() {
    with_each_case(|name, case| {
        assert_eq!(digest_of(&open(case, 64 << 20).unwrap()), expected_of(case), "{name}");
    });
}

/// The digest and the size of a raw disk, by the rule of `cases.json` and without turbobd's code: each block
/// of 4 KiB that is not zero, after its place.
fn digest_of_file(path: &Path) -> (String, u64) {
    let file = File::open(path).unwrap();
    let (mut hasher, mut block) = (Sha256::new(), [0; 4096]);
    let mut at = 0;
    // It fails where only a hole is left.
    while let Ok(data) = rustix::fs::seek(&file, SeekFrom::Data(at)) {
        at = rustix::fs::seek(&file, SeekFrom::Hole(data)).unwrap();
        for offset in (data..at).step_by(block.len()) {
            file.read_exact_at(&mut block, offset).unwrap();
            if block.iter().any(|&byte| byte != 0) {
                hasher.update(offset.to_le_bytes());
                hasher.update(block);
            }
        }
    }
    let digest = hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    (digest, file.metadata().unwrap().len())
}

/// A device mounted by a daemon of this test.
struct Attached(RunDir);

impl Attached {
    /// Attaches and mounts with the commands of a user.
    fn new(config: &Path, frontend: &str) -> Self {
        let host = RunDir::new();
        let line = machine::run(
            host.turbobd(&["attach", "--frontend", frontend, "--config"])
                .arg(config)
                .arg("--mount")
                .arg(host.mnt()),
        );
        let device = if frontend == "ublk" { "/dev/ublkb" } else { "/dev/loop" };
        assert!(line.starts_with(device), "{line}");
        Self(host)
    }

    fn place(&self) -> PathBuf {
        self.0.mnt()
    }

    fn detach(&self) {
        machine::run(self.0.turbobd(&["detach"]).arg(self.place()));
        assert_eq!(machine::run(&mut self.0.turbobd(&["ls", "--json"])), "[]");
    }
}

/// Attaches and mounts each case by this front end, and compares the whole tree with that of its raw file.
fn every_disk_mounts(frontend: &str) {
    machine::need_root();
    let _alone = block::alone();
    with_each_case(|name, case| {
        // A filesystem that keeps holes: in a guest, the working directory is a filesystem of the host's.
        let work = tempfile::tempdir().unwrap();
        let (config, raw) = (work.path().join("config.v1.json"), work.path().join("raw"));
        fs::write(&config, config_of(case).unwrap().to_string()).unwrap();
        machine::run(
            image::turbobd().args(["export", "--config"]).arg(&config).arg("-o").arg(&raw),
        );
        assert_eq!(digest_of_file(&raw), expected_of(case), "{name}");

        let attached = Attached::new(&config, frontend);
        let exported = Mounted::ext4(&raw);
        let (ours, theirs) = (listing::list(&attached.place()), listing::list(exported.path()));
        let found = listing::differences(&ours, &theirs, &|_| false, &|_, _| false);
        assert!(found.is_empty(), "{name} over {frontend}:\n{}", found.join("\n"));
        assert!(ours.len() > 500, "{name}: only {} names", ours.len());
        attached.detach();
        println!("{name} over {frontend}: {} names agree", ours.len());
    });
}

#[test]
fn over_loop_every_disk_of_upstream_mounts_as_the_tree_of_its_raw_file() {
    every_disk_mounts("loop");
}

#[test]
fn over_ublk_every_disk_of_upstream_mounts_as_the_tree_of_its_raw_file() {
    if block::ublk_here() {
        every_disk_mounts("ublk");
    } else {
        println!("SKIPPED here: every_disk_of_upstream_mounts_in_a_guest_with_ublk does it");
    }
}

#[test]
fn every_disk_of_upstream_mounts_in_a_guest_with_ublk() {
    block::in_a_guest_with_ublk(module_path!(), &["over_ublk_"], 1);
}

#[test]
fn a_cache_smaller_than_a_chunk_changes_nothing_but_the_time() {
    let case = &cases()["mix-native-first"];
    let disk = open(case, 1000).unwrap();
    assert_eq!(digest_of(&disk).0, case["content_sha256"].as_str().unwrap());
}

#[test]
fn an_exported_disk_has_the_same_content_and_holes() {
    use std::os::unix::fs::{FileExt as _, MetadataExt as _};
    let disk = open(&cases()["turbooci-2-gz"], 64 << 20).unwrap();
    let out = tempfile::tempfile().unwrap();
    export_raw(&disk, &out).unwrap();
    let meta = out.metadata().unwrap();
    assert_eq!(meta.len(), disk.size());
    assert!(meta.blocks() * 512 < 100 << 20, "{} blocks allocated", meta.blocks());
    for (lba, len) in disk.mapped() {
        let (mut ours, mut theirs) =
            (vec![0; len.bytes().0 as usize], vec![0; len.bytes().0 as usize]);
        disk.read_at(&mut ours, lba.bytes().0).unwrap();
        out.read_exact_at(&mut theirs, lba.bytes().0).unwrap();
        assert!(ours == theirs, "sector {}", lba.0);
    }
}
