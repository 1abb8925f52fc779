//! Disks that upstream's own tools built read as upstream reads them, byte for byte.
//!
//! `tests/interop/cases.json` lists them with a digest of their content. One case needs a layer that
//! is not stored here (upstream's base layer `ext4_64`): it runs when `TURBOBD_INTEROP_EXTRA` names a
//! folder that has it.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::env;
use std::fs;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use flate2::read::MultiGzDecoder;
use turbobd::cache::Cache;
use turbobd::chunk::{ChunkSource, PlainChunks};
use turbobd::disk::config::{self, TargetOpener};
use turbobd::disk::digest::{content_digest, export_raw};
use turbobd::disk::{Disk, DiskError};
use turbobd::source::{ByteSource, MemorySource};
use turbobd::volume::Volume as _;

/// Inflates a target whole with zlib's rules: an oracle that does not know the index.
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

/// The configuration of a case with absolute paths, or the file that it lacks.
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

#[test]
fn every_disk_of_upstream_reads_as_upstream_reads_it() {
    let mut ran = 0;
    for (name, case) in &cases() {
        match open(case, 64 << 20) {
            Ok(disk) => {
                let expected = (
                    case["content_sha256"].as_str().unwrap().to_owned(),
                    case["vsize"].as_u64().unwrap(),
                );
                assert_eq!(digest_of(&disk), expected, "{name}");
                ran += 1;
            }
            Err(file) => {
                println!("{name}: not run: {file} is not stored here; set TURBOBD_INTEROP_EXTRA");
            }
        }
    }
    assert!(ran >= 4, "only {ran} cases ran");
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
