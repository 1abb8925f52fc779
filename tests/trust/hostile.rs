//! Images whose bytes were changed on purpose or by accident, opened and read as `export` does, in this process.
//!
//! * [`mutations`] meta images whose author lies in any field, with digests that fit
//! * [`flips`]     single bits that change after the image was made
//!
//! Nothing here is mounted: what the kernel would do with such a filesystem is tried in a guest only (`guest.rs`).
//! `scripts/mutations` runs the same with many more cases: `TURBOBD_CASES` is their number.

mod flips;
mod mutations;

use std::collections::HashMap;
use std::io::{Cursor, Read};
use std::path::Path;
use std::process::abort;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

use blobs::cache::{Cache, CacheOptions};
use blobs::fetch::FetchOptions;
use blobs::tier::Tiers;
use disk::digest::content_digest;
use disk::image::open_image;
use disk::{Disk, DiskRange};
use formats::oci::{Descriptor, Digest, Document, Manifest};
use registry::store::{ImageStore, Selector, StoreError, StoredManifest};
use serde_json::Value;
use source::failure::with_causes;
use source::{ByteSource, MemoryBudget, SourceError};

use crate::image::{Images, OCI_GZIP, OCI_TAR, gunzip, gzip, members_of, noise, prose, tar_of};

const OCI_ZSTD: &str = "application/vnd.oci.image.layer.v1.tar+zstd";
const NOTE: &str = "containerd.io/snapshot/overlaybd";
/// Memory of an open image.
const BUDGET: u64 = 64 << 20;
/// A case that takes longer hangs. The slowest takes a part of a second alone.
const PATIENCE: Duration = Duration::from_secs(60);

/// Number of cases: `TURBOBD_CASES`, or these.
fn cases(usual: u64) -> u64 {
    std::env::var("TURBOBD_CASES").map_or(usual, |text| text.parse().unwrap())
}

/// Numbers that look random, and are the same in each run.
struct Dice(u64);

impl Dice {
    fn new(seed: u64) -> Self {
        Self(u64::from_le_bytes(noise(seed + 1, 8).try_into().unwrap()) | 1)
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// A number below `end`.
    fn below(&mut self, end: usize) -> usize {
        (self.next() % end.max(1) as u64) as usize
    }
}

/// Ends the process when a case takes too long, and says which.
struct Watch {
    begun: Option<mpsc::Sender<u64>>,
    thread: Option<JoinHandle<()>>,
}

impl Watch {
    fn new(what: &'static str) -> Self {
        let (begun, seen) = mpsc::channel();
        let thread = std::thread::spawn(move || {
            let mut last = 0;
            loop {
                match seen.recv_timeout(PATIENCE) {
                    Ok(number) => last = number,
                    Err(mpsc::RecvTimeoutError::Disconnected) => return,
                    Err(mpsc::RecvTimeoutError::Timeout) => {
                        eprintln!("{what} {last} hangs");
                        abort();
                    }
                }
            }
        });
        Self { begun: Some(begun), thread: Some(thread) }
    }

    fn begin(&self, number: u64) {
        self.begun.as_ref().unwrap().send(number).unwrap();
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        drop(self.begun.take());
        let _ = self.thread.take().unwrap().join();
    }
}

/// A meta image taken apart, and its layers.
#[derive(Clone)]
struct Specimen {
    manifest: Value,
    /// Members of each archive.
    archives: Vec<Vec<(String, Vec<u8>)>>,
    /// Archives that are not what their members say.
    raw: HashMap<usize, Vec<u8>>,
    /// The original layers.
    layers: HashMap<Digest, Arc<[u8]>>,
}

impl Specimen {
    /// Layers of gzip with several checkpoints, of zstd with a long frame, and a bare tar.
    fn new() -> Self {
        let images = Images::new();
        let first = tar_of(&[("etc/", b""), ("etc/a", b"one\n"), ("text", &prose(5, 700_000))]);
        let (small, long) = first.split_at(600);
        let frames = [small, long].map(|part| zstd::encode_all(part, 3).unwrap()).concat();
        let upper =
            tar_of(&[("etc/b", b"two\n"), ("noise", &noise(6, 200_000)), ("etc/.wh.a", b"")]);
        let layers = [(OCI_GZIP, gzip(&first)), (OCI_ZSTD, frames), (OCI_TAR, upper)];
        images.add("latest", &layers);
        images.convert(&["--span", "64"]);
        let manifest = images.manifest("turbo");
        let archive = |number| members_of(&gunzip(&images.blob(&images.layer("turbo", number))));
        let archives = (0..layers.len()).map(archive).collect();
        let layers = layers.into_iter().map(|(_, blob)| (Digest::of(&blob), blob.into())).collect();
        Self { manifest, archives, raw: HashMap::new(), layers }
    }

    /// The image with digests that fit, and a store that has it.
    fn build(&self) -> Result<(Manifest, SpecimenStore), String> {
        let mut manifest = self.manifest.clone();
        let mut blobs = self.layers.clone();
        for (number, members) in self.archives.iter().enumerate() {
            let bytes = match self.raw.get(&number) {
                Some(raw) => raw.clone(),
                None => quick_gzip(&tar_of_members(members)),
            };
            let digest = Digest::of(&bytes);
            let Some(layer) = manifest["layers"].get_mut(number) else { break };
            layer["digest"] = digest.to_string().into();
            layer["size"] = bytes.len().into();
            if let Some(notes) = layer["annotations"].as_object_mut() {
                notes.insert(format!("{NOTE}/blob-digest"), digest.to_string().into());
                notes.insert(format!("{NOTE}/blob-size"), bytes.len().to_string().into());
            }
            blobs.insert(digest, bytes.into());
        }
        let text = manifest.to_string();
        match Document::parse(text.as_bytes(), manifest["mediaType"].as_str()) {
            Ok(Document::Manifest(manifest)) => Ok((manifest, SpecimenStore::of(blobs))),
            Ok(_) => Err("no manifest".into()),
            Err(error) => Err(with_causes(&error)),
        }
    }

    /// A member of an archive, if it has that.
    fn member(&mut self, layer: usize, name: &str) -> Option<&mut Vec<u8>> {
        let members = self.archives.get_mut(layer)?;
        members.iter_mut().find(|(member, _)| member == name).map(|(_, bytes)| bytes)
    }
}

fn tar_of_members(members: &[(String, Vec<u8>)]) -> Vec<u8> {
    let list: Vec<(&str, &[u8])> =
        members.iter().map(|(name, data)| (name.as_str(), &data[..])).collect();
    let mut tar = Vec::new();
    for (name, data) in list {
        tar.extend(formats::tar::archive::header(name, data.len() as u64).unwrap());
        tar.extend_from_slice(data);
        tar.resize(tar.len().next_multiple_of(512), 0);
    }
    tar.resize(tar.len() + 1024, 0);
    tar
}

fn quick_gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::read::GzEncoder::new(bytes, flate2::Compression::fast());
    let mut out = Vec::new();
    encoder.read_to_end(&mut out).unwrap();
    out
}

/// A flipped bit of a layer.
#[derive(Clone, Copy)]
struct Flip {
    layer: Digest,
    at: usize,
    mask: u8,
    /// Number of deliveries of the byte that are wrong.
    times: u64,
}

/// Blobs in memory, which count as those of a registry.
#[derive(Clone)]
struct SpecimenStore {
    blobs: Arc<HashMap<Digest, Arc<[u8]>>>,
    flip: Option<Flip>,
}

impl SpecimenStore {
    fn of(blobs: HashMap<Digest, Arc<[u8]>>) -> Self {
        Self { blobs: Arc::new(blobs), flip: None }
    }

    fn blob(&self, digest: &Digest) -> Result<Arc<[u8]>, StoreError> {
        let missing = || StoreError::NotFound { store: "memory".into(), what: digest.to_string() };
        self.blobs.get(digest).cloned().ok_or_else(missing)
    }
}

impl ImageStore for SpecimenStore {
    fn name(&self) -> &'static str {
        "memory"
    }

    fn manifest(&self, _: &Selector) -> Result<StoredManifest, StoreError> {
        Err(StoreError::NotFound { store: "memory".into(), what: "manifest".into() })
    }

    fn open_blob(&self, blob: &Descriptor) -> Result<Box<dyn Read + Send>, StoreError> {
        Ok(Box::new(Cursor::new(self.blob(&blob.digest)?)))
    }

    fn blob_source(
        &self,
        digest: &Digest,
        _: Option<u64>,
    ) -> Result<Arc<dyn ByteSource>, StoreError> {
        let bytes = self.blob(digest)?;
        let flip = self.flip.filter(|flip| flip.layer == *digest);
        let wrong = AtomicU64::new(flip.map_or(0, |flip| flip.times));
        Ok(Arc::new(SpecimenSource { bytes, flip, wrong }))
    }

    fn put_blob(&self, _: &[u8]) -> Result<(), StoreError> {
        unreachable!("it is read only")
    }

    fn put_blob_from(
        &self,
        _: &Digest,
        _: u64,
        _: &mut dyn FnMut() -> Result<Box<dyn Read + Send>, StoreError>,
    ) -> Result<(), StoreError> {
        unreachable!("it is read only")
    }

    fn has_blob(&self, digest: &Digest, _: u64) -> Result<bool, StoreError> {
        Ok(self.blobs.contains_key(digest))
    }

    fn put_manifest(&self, _: Option<&str>, _: &str, _: &[u8]) -> Result<(), StoreError> {
        unreachable!("it is read only")
    }
}

struct SpecimenSource {
    bytes: Arc<[u8]>,
    flip: Option<Flip>,
    wrong: AtomicU64,
}

impl ByteSource for SpecimenSource {
    fn len(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> Result<(), SourceError> {
        let end = offset.saturating_add(buf.len() as u64);
        if end > self.len() {
            return Err(SourceError::PastEnd {
                name: "memory".into(),
                offset,
                end,
                size: self.len(),
            });
        }
        buf.copy_from_slice(&self.bytes[offset as usize..end as usize]);
        if let Some(flip) = self.flip
            && (offset..end).contains(&(flip.at as u64))
            && self
                .wrong
                .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1))
                .is_ok()
        {
            buf[flip.at - offset as usize] ^= flip.mask;
        }
        Ok(())
    }

    fn is_local(&self) -> bool {
        false
    }

    fn name(&self) -> &str {
        "memory"
    }
}

/// A cache over `tiers`; what images claim is within [`BUDGET`].
fn cache(tiers: Tiers) -> (Arc<Cache>, MemoryBudget) {
    let fetch = FetchOptions { workers: 1, connections: 2, ahead: None };
    let budget = MemoryBudget::new(BUDGET);
    (Cache::within(CacheOptions { budget: 8 << 20, fetch }, tiers, budget.clone()), budget)
}

fn opened(manifest: &Manifest, store: &SpecimenStore, cache: &Arc<Cache>) -> Result<Disk, String> {
    let opened = open_image(store, store, manifest, cache.clone());
    opened.map(|image| image.disk).map_err(|error| with_causes(&error))
}

/// The digest of all that the image shows.
fn shown(disk: &Disk) -> Result<Digest, String> {
    content_digest(disk, disk.mapped())
        .map(|(digest, _)| digest)
        .map_err(|error| with_causes(&error))
}

/// Reads what is mapped, up to `most` bytes: a mapping of 16 bytes can claim 8 MiB of zeros.
fn read_some(disk: &Disk, most: u64) -> Result<(), String> {
    use disk::volume::Volume as _;
    let mut left = most;
    let mut buf = vec![0; 1 << 20];
    for (lba, len) in disk.mapped() {
        let (mut at, end) = (lba.0 * 512, ((lba.0 + len.0) * 512).min(disk.size()));
        while at < end {
            let range = DiskRange::new(at, (end - at).min(buf.len() as u64));
            disk.read_at(&mut buf[..range.len as usize], at)
                .map_err(|error| with_causes(&error))?;
            at = range.end();
            left = left.saturating_sub(range.len);
            if left == 0 {
                return Ok(());
            }
        }
    }
    Ok(())
}

/// Most memory that this process had so far, in bytes.
fn peak() -> u64 {
    let status = std::fs::read_to_string(Path::new("/proc/self/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
}
