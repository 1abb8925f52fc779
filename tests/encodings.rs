//! In every encoding of a layer, the image is the same disk: bare tar, zstd of one frame and of many,
//! zstd:chunked.
//!
//! The layers are created by other programs: libzstd, `pzstd`, `skopeo`; their expected contents come from
//! the gzip image of the same tar. From a registry they are read by ranges; damaged bytes are fetched again,
//! and a long frame is decoded once.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use crate::image::{
    Images, OCI_GZIP, OCI_TAR, chunks, done, end, gunzip, gzip, lower, members_of, noise, prose,
    refused, tar_of, turbobd, upper,
};
use crate::registry_double::{Double, Fault};
use crate::run_dir::RunDir;
use crate::serve::serve;
use blobs::cache::{Cache, CacheOptions};
use blobs::fetch::{FetchOptions, FillOptions};
use blobs::tier::{Tier, TierKind, TierOptions, Tiers};
use disk::Disk;
use disk::image::{host_manifest, open_image};
use disk::volume::Volume as _;
use formats::oci::Digest;
use registry::store::{self, ImageStore};
use registry::{ClientOptions, RegistryClient};
use serde_json::Value;

const OCI_ZSTD: &str = "application/vnd.oci.image.layer.v1.tar+zstd";
const MIB: usize = 1 << 20;

/// One frame.
fn zstd(bytes: &[u8]) -> Vec<u8> {
    zstd::encode_all(bytes, 3).unwrap()
}

/// Frames of so many bytes each, one after the other.
fn frames(bytes: &[u8], len: usize) -> Vec<u8> {
    bytes.chunks(len).flat_map(zstd).collect()
}

/// The seekable format of zstd's contrib folder: frames, and a table of them in a skippable one.
fn seekable(bytes: &[u8], len: usize) -> Vec<u8> {
    let (mut layer, mut table) = (Vec::new(), Vec::new());
    for part in bytes.chunks(len) {
        let frame = zstd(part);
        table.extend((frame.len() as u32).to_le_bytes());
        table.extend((part.len() as u32).to_le_bytes());
        layer.extend(frame);
    }
    let count = table.len() / 8;
    layer.extend([0x5e, 0x2a, 0x4d, 0x18]);
    layer.extend((table.len() as u32 + 9).to_le_bytes());
    layer.extend(table);
    layer.extend((count as u32).to_le_bytes());
    layer.extend([0, 0xb1, 0xea, 0x92, 0x8f]);
    layer
}

/// The output of the program `pzstd`, at a level at which it makes a frame of each 2 MiB.
fn pzstd(bytes: &[u8]) -> Vec<u8> {
    let mut child = Command::new("pzstd")
        .args(["-1", "-p", "2", "-q", "-c"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let (mut input, bytes) = (child.stdin.take().unwrap(), bytes.to_vec());
    let writer = std::thread::spawn(move || input.write_all(&bytes));
    let output = child.wait_with_output().unwrap();
    writer.join().unwrap().unwrap();
    assert!(output.status.success());
    output.stdout
}

/// The layers of `latest`, compressed by skopeo: zstd:chunked has a frame for each file.
fn by_skopeo(images: &Images, format: &str) -> Vec<(&'static str, Vec<u8>)> {
    let copy = Images::new();
    let mut skopeo = Command::new("skopeo");
    skopeo.args(["--insecure-policy", "copy", "-q", "--dest-compress-format", format]);
    let ended = end(skopeo.args([images.name("latest"), copy.name("copied")]));
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    let manifest = copy.manifest("copied");
    let layers = manifest["layers"].as_array().unwrap().iter().map(|layer| {
        assert_eq!(layer["mediaType"], OCI_ZSTD);
        (OCI_ZSTD, copy.blob(layer["digest"].as_str().unwrap()))
    });
    layers.collect()
}

/// Number of frames that are not skipped, by libzstd.
fn count_frames(layer: &[u8]) -> usize {
    let (mut rest, mut count) = (layer, 0);
    while !rest.is_empty() {
        let len = zstd::zstd_safe::find_frame_compressed_size(rest).unwrap();
        count += usize::from(rest.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]));
        rest = &rest[len..];
    }
    count
}

fn folder() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

/// The first layer of `turbo`, from `inspect --json`.
fn target(images: &Images) -> Value {
    let told: Value =
        serde_json::from_str(&done(&["inspect", "--json", &images.name("turbo")])).unwrap();
    told["layers"][0]["target"].clone()
}

/// Images whose lower layer is in each encoding, with its name, and true if it has a long frame.
fn encodings() -> Vec<(&'static str, Images, bool)> {
    let of = |layers: &[(&str, Vec<u8>)]| {
        let images = Images::new();
        images.add("latest", layers);
        images
    };
    let two = |lower: (&'static str, Vec<u8>)| of(&[lower, (OCI_GZIP, gzip(&upper()))]);
    let sample = Images::sample();
    let parallel = pzstd(&lower());
    assert!(count_frames(&parallel) > 1, "pzstd made one frame");
    let chunked = by_skopeo(&sample, "zstd:chunked");
    assert!(count_frames(&chunked[0].1) > 1, "skopeo made one frame of zstd:chunked");
    let whole = by_skopeo(&sample, "zstd");
    assert_eq!(count_frames(&whole[0].1), 1);
    vec![
        ("gzip", sample, false),
        ("tar", two((OCI_TAR, lower())), false),
        ("zstd of one frame", two((OCI_ZSTD, zstd(&lower()))), true),
        ("zstd by skopeo", of(&whole), true),
        ("zstd of small frames", two((OCI_ZSTD, frames(&lower(), 100_000))), false),
        ("seekable zstd", two((OCI_ZSTD, seekable(&lower(), 2 * MIB))), false),
        ("pzstd", two((OCI_ZSTD, parallel)), false),
        // The big file is one frame, longer than the limit of one decoding.
        ("zstd:chunked", of(&chunked), true),
        ("zstd under the media type of gzip", two((OCI_GZIP, zstd(&lower()))), true),
    ]
}

#[test]
fn every_encoding_of_a_layer_is_the_same_disk() {
    let mut expected: Option<String> = None;
    for (name, images, is_long) in encodings() {
        let store = folder();
        let meta_dir = store.path().to_str().unwrap();
        let plain = done(&["export", &images.name("latest"), "--digest", "--meta-dir", meta_dir]);
        done(&["convert", "-r", &images.place(), "-i", "latest", "--turboOCI", "turbo"]);
        let converted = done(&["export", &images.name("turbo"), "--digest"]);
        assert_eq!(plain, converted, "{name}");
        assert_eq!(*expected.get_or_insert(plain), converted, "{name}");
        let checked = done(&["check", &images.name("turbo"), "--data"]);
        assert!(checked.contains("layer 0: "), "{name}: {checked}");
        let target = target(&images);
        assert_eq!(target["verified"], true, "{name}: {target}");
        assert_eq!(target["longest_frame"] != 0, is_long, "{name}: {target}");
        let encoding = if name.contains("zstd") { "zstd" } else { name };
        assert_eq!(target["encoding"], encoding, "{name}");
        assert!(done(&["inspect", &images.name("turbo")]).contains(encoding), "{name}");
    }
}

#[test]
fn upstream_refuses_a_zstd_layer_when_it_opens_it_and_reads_a_tar_as_before() {
    const TYPE: &str = "containerd.io/snapshot/overlaybd/turbo-oci/target-media-type";
    let images = Images::new();
    images.add("latest", &[(OCI_ZSTD, zstd(&lower())), (OCI_TAR, upper())]);
    images.convert(&[]);
    // It takes any layer that is not gzip for a bare tar, and opens no gzip layer without a gzip.meta.
    for (number, media_type) in [OCI_GZIP, OCI_TAR].into_iter().enumerate() {
        let layer = images.manifest("turbo")["layers"][number].clone();
        assert_eq!(layer["annotations"][TYPE], media_type);
        let archive = gunzip(&images.blob(layer["digest"].as_str().unwrap()));
        let names: Vec<String> = members_of(&archive).into_iter().map(|(name, _)| name).collect();
        assert_eq!(names, ["ext4.fs.meta", ".turbo.ociv1", "turbobd.segments"]);
    }
}

#[test]
fn layers_that_were_converted_before_are_known_again_whatever_they_are() {
    let images = Images::new();
    images.add("latest", &[(OCI_ZSTD, zstd(&lower())), (OCI_TAR, upper())]);
    images.convert(&[]);
    let (first, kept) = (images.manifest("turbo"), folder());
    let more = ["--force", "--layer-store", kept.path().to_str().unwrap()];
    for _ in 0..3 {
        // From the tag, then from the store, in which the second finds the results of the first.
        images.convert(&more);
        assert_eq!(images.manifest("turbo")["layers"], first["layers"]);
        images.tag("turbo", &images.tagged("latest"));
    }
}

#[test]
fn a_zstd_layer_that_is_cut_off_or_needs_too_much_memory_is_refused_by_name() {
    let place = |images: &Images| images.place();
    let refuse = |layer: Vec<u8>, needles: &[&str]| {
        let images = Images::new();
        images.add("latest", &[(OCI_ZSTD, layer)]);
        let before = images.snapshot();
        let place = place(&images);
        for format in ["--turboOCI", "--overlaybd"] {
            refused(&["convert", "-r", &place, "-i", "latest", format, "t"], needles);
        }
        assert_eq!(images.snapshot(), before);
    };
    let mut cut = zstd(&lower());
    cut.truncate(cut.len() - 5);
    refuse(cut, &["Layer 0 (sha256:", "inside a frame"]);
    let mut encoder = zstd::Encoder::new(Vec::new(), 1).unwrap();
    encoder.window_log(28).unwrap();
    encoder.write_all(&lower()).unwrap();
    refuse(encoder.finish().unwrap(), &["window of 268435456 bytes", "134217728", "--long"]);
    let mut garbage = zstd(&lower());
    garbage.extend(b"behind");
    refuse(garbage, &["neither a frame nor a skippable frame"]);
    let mut damaged = zstd(&lower());
    damaged[MIB] ^= 0x20;
    let images = Images::new();
    images.add("latest", &[(OCI_ZSTD, damaged)]);
    let ended =
        end(turbobd().args(["convert", "-r", &images.place(), "-i", "latest", "--turboOCI", "t"]));
    // Without a checksum of the content, damage may pass for data; it must not cause a panic.
    assert!(matches!(ended.code, Some(0 | 1)) && !ended.stderr.contains("panicked"), "{ended:?}");
}

#[test]
fn a_sidecar_that_breaks_a_rule_is_refused_by_name() {
    let images = Images::new();
    images.add("latest", &[(OCI_ZSTD, frames(&lower(), MIB)), (OCI_TAR, upper())]);
    images.convert(&[]);
    let forge = |layer: usize, edit: &dyn Fn(&mut Vec<u8>), needles: &[&str]| {
        images.forge("forged", layer, |members| {
            let (_, file) =
                members.iter_mut().find(|(name, _)| name == "turbobd.segments").unwrap();
            file.truncate(file.len() - 4);
            edit(file);
            let crc = crc32(file);
            file.extend(crc.to_le_bytes());
        });
        for command in ["export", "check", "inspect"] {
            let name = images.name("forged");
            let more = if command == "export" { &["--digest"][..] } else { &[] };
            refused(&[&[command, &name], more].concat(), needles);
        }
    };
    forge(0, &|file| file[8] = 3, &["turbobd.segments is damaged at byte 8", "version"]);
    forge(0, &|file| file[10] = 1, &["turbobd.segments is damaged", "contradict its encoding"]);
    forge(0, &|file| file[10] = 9, &["damaged at byte 10", "encoding"]);
    forge(0, &|file| file[11] = 1, &["damaged at byte 11", "flags"]);
    forge(0, &|file| file[12] += 1, &["turbobd.segments is damaged"]);
    forge(0, &|file| file[15] = 0x7f, &["does not fit the file"]);
    forge(0, &|file| file[16] ^= 1, &["The index belongs to another layer"]);
    forge(0, &|file| file[48] ^= 1, &["turbobd"]);
    forge(0, &|file| file[56] ^= 1, &["do not cover the output"]);
    forge(0, &|file| file.push(0), &["bytes follow"]);
    forge(1, &|file| file[10] = 2, &["the target is zstd", "say that it is tar"]);
    // A wrong checksum fails at a read, not at the opening.
    images.forge("forged", 0, |members| {
        let (_, file) = members.iter_mut().find(|(name, _)| name == "turbobd.segments").unwrap();
        let end = file.len() - 4;
        file[end - 1] ^= 1;
        let crc = crc32(&file[..end]);
        file[end..].copy_from_slice(&crc.to_le_bytes());
    });
    let ended = end(turbobd().args(["check", &images.name("forged"), "--data"]));
    assert_eq!(ended.code, Some(1));
    assert!(ended.stderr.contains("does not match its CRC-32"), "{}", ended.stderr);
}

fn crc32(bytes: &[u8]) -> u32 {
    let mut crc = flate2::Crc::new();
    crc.update(bytes);
    crc.sum()
}

/// An image of one layer with segments of 256 KiB, in a registry, with its expected disk.
struct Served {
    registry: Double,
    target: String,
    truth: File,
    _images: Images,
}

/// About 15 MiB in files large and small.
fn tar() -> Vec<u8> {
    tar_of(&[
        ("a", &prose(1, 6 * MIB)),
        ("b", &noise(2, 6 * MIB)),
        ("c", b"small"),
        ("d/", b""),
        ("d/e", &prose(3, 3 * MIB)),
    ])
}

impl Served {
    fn new(media_type: &str, layer: Vec<u8>) -> Self {
        let images = Images::new();
        images.add("latest", &[(media_type, layer)]);
        images.convert(&["--span", "256"]);
        let of_gzip = Images::new();
        of_gzip.add("latest", &[(OCI_GZIP, gzip(&tar()))]);
        of_gzip.convert(&[]);
        let raw = images.path().join("raw");
        done(&["export", &of_gzip.name("turbo"), "-o", raw.to_str().unwrap()]);
        let registry = Double::start();
        serve(&images, &registry, "team/app");
        let target = images.layer("latest", 0);
        Self { registry, target, truth: File::open(raw).unwrap(), _images: images }
    }

    /// Opens it with a cache of its own, over these tiers.
    fn open(&self, tiers: Tiers) -> Arc<Disk> {
        self.open_in(tiers, 64 << 20)
    }

    fn open_in(&self, tiers: Tiers, budget: u64) -> Arc<Disk> {
        let client = RegistryClient::new(ClientOptions::default()).unwrap();
        let name = format!("{}/team/app:turbo", self.registry.host()).parse().unwrap();
        let (store, selector) = store::open(&name, &client).unwrap();
        let (_, manifest) = host_manifest(&*store, &selector).unwrap();
        let targets: Arc<dyn ImageStore> = store.clone();
        let fetch = FetchOptions { workers: 2, connections: 8, ahead: None };
        let cache = Cache::over(CacheOptions { budget, fetch }, tiers);
        Arc::new(open_image(&*store, &*targets, &manifest, cache).unwrap().disk)
    }

    /// Reads a block and compares it.
    #[track_caller]
    fn is_right(&self, disk: &Disk, offset: u64) {
        let (mut read, mut truth) = ([0; 512], [1; 512]);
        disk.read_at(&mut read, offset).unwrap();
        self.truth.read_exact_at(&mut truth, offset).unwrap();
        assert!(read == truth, "wrong bytes at {offset}");
    }
}

/// A tier in a folder.
fn tier(kind: TierKind, dir: &Path) -> Arc<Tier> {
    let options = TierOptions { dir: dir.to_owned(), capacity: 1 << 30, floor: 0 };
    Arc::new(Tier::open(kind, &options).unwrap())
}

fn decoded(dir: &Path) -> Tiers {
    Tiers { decoded: Some(tier(TierKind::Decoded, dir)), encoded: None }
}

#[test]
fn a_wrong_byte_of_any_encoding_is_fetched_again_counted_and_never_served() {
    let layers = [(OCI_TAR, tar()), (OCI_ZSTD, frames(&tar(), 300_000)), (OCI_ZSTD, zstd(&tar()))];
    for (number, (media_type, layer)) in layers.into_iter().enumerate() {
        let served = Served::new(media_type, layer);
        let disk = served.open(Tiers::default());
        let counters = disk.cache().fetched().clone();
        let chunks = chunks(&disk);
        let (first, _, place) = chunks[2];
        served.registry.fault(&served.target, Fault::Flip(place + 50, 8), 1);
        served.is_right(&disk, first);
        assert_eq!((counters.damaged.get(), counters.failed.get()), (1, 0), "layer {number}");
        // A third damage is an error with a reason, and none of the data are kept. (Near enough to be in the
        // next request of a long frame, far enough not to be read ahead.)
        let (last, _, place) = chunks[8];
        served.registry.fault(&served.target, Fault::Flip(place + 50, 8), 3);
        let mut read = [0; 512];
        let error = disk.read_at(&mut read, last).unwrap_err();
        let source = std::error::Error::source(&error).map(ToString::to_string);
        let told = format!("{error}: {source:?}");
        assert!(told.contains("SHA-256"), "layer {number}: {told}");
        assert_eq!(counters.damaged.get(), 4, "layer {number}");
        served.registry.clear_faults();
        served.is_right(&disk, last);
    }
}

#[test]
fn layers_are_fetched_by_ranges() {
    for (media_type, layer) in [(OCI_TAR, tar()), (OCI_ZSTD, frames(&tar(), 300_000))] {
        let len = layer.len() as u64;
        let served = Served::new(media_type, layer);
        let disk = served.open(Tiers::default());
        let (at, _, _) = chunks(&disk)[3];
        served.is_right(&disk, at);
        let fetched = disk.cache().fetched().bytes.get();
        assert!(fetched > 0 && fetched < len / 8, "{fetched} of {len} bytes for one block");
        let path = format!("blobs/{}", served.target);
        let log = served.registry.log();
        let blob: Vec<_> = log.iter().filter(|seen| seen.line.contains(&path)).collect();
        assert!(blob.iter().all(|seen| seen.range.is_some() || seen.line.starts_with("HEAD")));
    }
}

#[test]
fn what_is_to_be_skipped_between_frames_is_not_fetched() {
    let skipped = 300_000_u32;
    let mut layer = Vec::new();
    for part in tar().chunks(700_000) {
        layer.extend(zstd(part));
        layer.extend([0x51, 0x2a, 0x4d, 0x18]);
        layer.extend(skipped.to_le_bytes());
        layer.resize(layer.len() + skipped as usize, 0x33);
    }
    let gaps = u64::from(skipped) * tar().len().div_ceil(700_000) as u64;
    let len = layer.len() as u64;
    let served = Served::new(OCI_ZSTD, layer);
    let disk = served.open(Tiers::default());
    for (at, _, _) in chunks(&disk) {
        served.is_right(&disk, at);
    }
    let counters = disk.cache().fetched();
    assert_eq!((counters.damaged.get(), counters.failed.get()), (0, 0));
    assert!(counters.bytes.get() <= len - gaps, "{} bytes", counters.bytes.get());
}

#[test]
fn a_long_frame_is_decoded_once_into_the_tier_however_many_read_it_in_whatever_order() {
    let layer = zstd(&tar());
    let len = layer.len() as u64;
    let served = Served::new(OCI_ZSTD, layer);
    let dir = folder();
    let disk = served.open(decoded(dir.path()));
    let counters = disk.cache().fetched().clone();
    let mut order = chunks(&disk);
    assert!(order.len() > 40, "{} chunks", order.len());
    // From the middle outwards, by four readers at once.
    order.sort_by_key(|(_, index, _)| index.abs_diff(20));
    std::thread::scope(|scope| {
        for reader in 0..4 {
            let (order, disk, served) = (&order, &disk, &served);
            scope.spawn(move || {
                for (at, _, _) in order.iter().skip(reader).step_by(4) {
                    served.is_right(disk, *at);
                }
            });
        }
    });
    assert_eq!(counters.frames.get(), 1, "the frame was begun again");
    assert!(counters.bytes.get() <= len, "{} of {len}", counters.bytes.get());
    assert_eq!(counters.failed.get(), 0);
    // The frame's thread continues to its end by itself.
    let source = disk.chunk_sources()[0].clone().unwrap();
    let blob = disk.blobs()[0].clone().unwrap();
    let begun = std::time::Instant::now();
    while !(0..source.chunk_count()).all(|chunk| blob.stored().has(chunk)) {
        assert!(begun.elapsed() < Duration::from_secs(30), "the tier does not get it all");
        std::thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(counters.bytes.get(), len);
    drop((blob, source, disk));

    // The next process needs no server, and no decoder.
    let disk = served.open(decoded(dir.path()));
    let counters = disk.cache().fetched().clone();
    for (at, _, _) in &order {
        served.is_right(&disk, *at);
    }
    assert_eq!((counters.frames.get(), counters.bytes.get()), (0, 0));
}

#[test]
fn a_damaged_piece_of_the_tier_is_decoded_again() {
    let served = Served::new(OCI_ZSTD, zstd(&tar()));
    let dir = folder();
    let at = {
        let disk = served.open(decoded(dir.path()));
        let all = chunks(&disk);
        served.is_right(&disk, all[all.len() - 1].0);
        let tiers = disk.cache().tiers().clone();
        tiers.decoded.unwrap().flush();
        all[3].0
    };
    let mut damaged = 0;
    for entry in fs::read_dir(dir.path()).unwrap() {
        let path = entry.unwrap().path();
        let bytes = fs::read(&path).unwrap();
        if bytes.len() > 6 * MIB {
            let file = File::options().write(true).open(&path).unwrap();
            for place in (0..bytes.len() as u64).step_by(1000) {
                file.write_all_at(b"?", place).unwrap();
            }
            damaged += 1;
        }
    }
    assert_eq!(damaged, 1, "no data file was found");
    let disk = served.open(decoded(dir.path()));
    served.is_right(&disk, at);
    assert_eq!(disk.cache().fetched().frames.get(), 1);
}

#[test]
fn without_a_tier_a_long_frame_is_right_in_any_order_and_decoded_once_in_its_own() {
    let served = Served::new(OCI_ZSTD, zstd(&tar()));
    // A cache that holds a few chunks only.
    let disk = served.open_in(Tiers::default(), 1 << 20);
    let counters = disk.cache().fetched().clone();
    let order = chunks(&disk);
    for (at, _, _) in &order {
        served.is_right(&disk, *at);
    }
    assert_eq!(counters.frames.get(), 1, "reading on began the frame again");
    for (at, _, _) in order.iter().rev().step_by(7) {
        served.is_right(&disk, *at);
    }
    assert!(counters.frames.get() > 1, "a cache of a few chunks held them all");
    assert_eq!(counters.failed.get(), 0);
}

/// A tar in frames of 5 MiB with a window of so many bits.
fn long_frames(tar: &[u8], window_log: u32) -> Vec<u8> {
    let frame = |part: &[u8]| {
        let mut encoder = zstd::Encoder::new(Vec::new(), 1).unwrap();
        encoder.window_log(window_log).unwrap();
        encoder.write_all(part).unwrap();
        encoder.finish().unwrap()
    };
    tar.chunks(5 * MIB).flat_map(frame).collect()
}

#[test]
fn several_long_frames_are_decoded_at_the_same_time_each_once() {
    let served = Served::new(OCI_ZSTD, long_frames(&tar(), 21));
    let disk = served.open_in(Tiers::default(), 1 << 20);
    let order = chunks(&disk);
    std::thread::scope(|scope| {
        // One reader for each third, in order; they begin at the same time.
        for part in order.chunks(order.len().div_ceil(3)) {
            let (disk, served) = (&disk, &served);
            scope.spawn(move || part.iter().for_each(|(at, _, _)| served.is_right(disk, *at)));
        }
    });
    let frames = disk.cache().fetched().frames.get();
    // Where the thirds meet, two readers are in one frame.
    assert!((3..=6).contains(&frames), "{frames} decodes of 3 frames");
}

#[test]
fn frames_of_the_largest_windows_wait_for_each_others_memory_and_are_all_read() {
    // Three of 128 MiB; two of them fit.
    let served = Served::new(OCI_ZSTD, long_frames(&tar(), 27));
    let disk = served.open_in(Tiers::default(), 64 << 20);
    let order = chunks(&disk);
    std::thread::scope(|scope| {
        for part in order.chunks(order.len().div_ceil(3)) {
            let (disk, served) = (&disk, &served);
            scope.spawn(move || part.iter().for_each(|(at, _, _)| served.is_right(disk, *at)));
        }
    });
    assert_eq!(disk.cache().fetched().failed.get(), 0);
}

#[test]
fn the_encoded_tier_keeps_a_long_frame_as_it_came() {
    let layer = zstd(&tar());
    let len = layer.len() as u64;
    let served = Served::new(OCI_ZSTD, layer);
    let dir = folder();
    let tiers = || Tiers { encoded: Some(tier(TierKind::Encoded, dir.path())), decoded: None };
    let disk = served.open(tiers());
    let order = chunks(&disk);
    served.is_right(&disk, order[order.len() - 1].0);
    disk.cache().tiers().encoded.as_ref().unwrap().flush();
    let fetched = disk.cache().fetched().bytes.get();
    assert!(fetched <= len);
    drop(disk);
    let disk = served.open(tiers());
    for (at, _, _) in order.iter().rev().step_by(9) {
        served.is_right(&disk, *at);
    }
    let again = disk.cache().fetched().bytes.get();
    assert!(again < len / 4, "{again} bytes were fetched again");
}

#[test]
fn the_background_fill_brings_a_long_frame_into_either_tier() {
    let layer = zstd(&tar());
    let len = layer.len() as u64;
    let served = Served::new(OCI_ZSTD, layer);
    for kind in [TierKind::Decoded, TierKind::Encoded] {
        let dir = folder();
        let mut tiers = Tiers::default();
        match kind {
            TierKind::Decoded => tiers.decoded = Some(tier(kind, dir.path())),
            TierKind::Encoded => tiers.encoded = Some(tier(kind, dir.path())),
        }
        let disk = served.open(tiers);
        let blobs = disk.blobs().into_iter().flatten().collect();
        let filling = disk.cache().fill(blobs, FillOptions::default());
        let begun = std::time::Instant::now();
        while !filling.progress().ended {
            assert!(begun.elapsed() < Duration::from_secs(60), "{:?}", filling.progress());
            std::thread::sleep(Duration::from_millis(20));
        }
        let progress = filling.progress();
        assert_eq!(progress.near, progress.chunks, "{kind:?}");
        assert_eq!(disk.cache().fetched().bytes.get(), len, "{kind:?}");
        assert!(disk.cache().fetched().frames.get() <= 1);
        for (at, _, _) in chunks(&disk).iter().step_by(5) {
            served.is_right(&disk, *at);
        }
        assert_eq!(disk.cache().fetched().bytes.get(), len, "{kind:?}: fetched again");
    }
}

#[test]
fn a_registry_that_fails_in_the_middle_of_a_frame_is_an_error_once_and_no_reader_hangs() {
    let served = Served::new(OCI_ZSTD, zstd(&tar()));
    let disk = served.open(Tiers::default());
    let order = chunks(&disk);
    // 404 is not tried again.
    served.registry.fault(&served.target, Fault::Status(404), 1);
    let mut block = [0; 512];
    assert!(disk.read_at(&mut block, order[10].0).is_err());
    served.is_right(&disk, order[10].0);
}

#[test]
fn a_chunk_of_a_long_frame_loads_alone_by_decoding_what_is_before_it() {
    let served = Served::new(OCI_ZSTD, zstd(&tar()));
    let disk = served.open(Tiers::default());
    let source = disk.chunk_sources()[0].clone().unwrap();
    let tar = tar();
    for chunk in [0, 7, source.chunk_count() - 1] {
        let span = source.span(chunk).unwrap();
        let range = span.start as usize..span.start as usize + span.len as usize;
        assert!(source.load(chunk).unwrap()[..] == tar[range], "chunk {chunk}");
    }
    let mut decoder = source.serial().unwrap().begin_frame(0).unwrap();
    let wrong = source::chunk::EncodedChunk::new(&source.encoded(0).unwrap(), Vec::new());
    assert!(decoder.decode_next(&wrong, &mut vec![0; source.room(0)]).is_err());
}

#[test]
fn a_single_frame_image_attaches_and_its_files_are_read() {
    let (images, host) = (Images::new(), RunDir::new());
    images.add("latest", &[(OCI_ZSTD, zstd(&lower())), (OCI_TAR, upper())]);
    let place = host.mnt();
    let mut attach =
        host.turbobd(&["attach", &images.name("latest"), "--frontend", "loop", "--mount"]);
    attach.arg(&place);
    let ended = end(attach.arg("--meta-dir").arg(host.at("meta")));
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    let (first, big) = (fs::read(place.join("etc/first")), fs::read(place.join("big")));
    let explained = end(host.turbobd(&["explain"]).arg(&place).arg("big"));
    let detached = end(host.turbobd(&["detach"]).arg(&place));
    assert_eq!(detached.code, Some(0), "{}", detached.stderr);
    assert_eq!(first.unwrap(), b"second\n");
    assert_eq!(Digest::of(&big.unwrap()), Digest::of(&prose(1, 5 << 20)));
    assert_eq!(explained.code, Some(0), "{}", explained.stderr);
    assert!(explained.stdout.contains("5 from 0"), "{}", explained.stdout);
}

#[test]
fn what_is_published_of_a_zstd_image_is_found_by_the_next_host() {
    let (images, registry) = (Images::new(), Double::start());
    images.add("latest", &[(OCI_ZSTD, frames(&lower(), MIB)), (OCI_ZSTD, zstd(&upper()))]);
    serve(&images, &registry, "team/app");
    let name = format!("{}/team/app:latest", registry.host());
    let export = |store: &Path, more: &[&str]| {
        let mut command = turbobd();
        command.args(["-v", "export", &name, "--digest", "--meta-dir"]).arg(store).args(more);
        let ended = end(&mut command);
        assert_eq!(ended.code, Some(0), "{}", ended.stderr);
        (ended.stdout, ended.stderr)
    };
    let (here, there) = (folder(), folder());
    let (built, _) = export(here.path(), &["--publish"]);
    let (found, log) = export(there.path(), &[]);
    assert_eq!(found, built);
    assert!(log.contains("found=Referrer"), "{log}");
}

#[test]
fn a_device_config_finds_the_sidecar_where_the_snapshotter_unpacks_it() {
    for (encoded, is_gzip) in [(zstd(&tar()), true), (frames(&tar(), 50_000), true), (tar(), false)]
    {
        let (images, dir) = (Images::new(), folder());
        images.add("latest", &[(if is_gzip { OCI_ZSTD } else { OCI_TAR }, encoded.clone())]);
        images.convert(&[]);
        let archive = gunzip(&images.blob(&images.layer("turbo", 0)));
        for (name, bytes) in members_of(&archive) {
            fs::write(dir.path().join(name), bytes).unwrap();
        }
        fs::write(dir.path().join("layer"), encoded).unwrap();
        let mut lower = serde_json::json!({"file": "ext4.fs.meta", "targetFile": "layer"});
        if is_gzip {
            // Annotated as gzip: there is no such file.
            lower["gzipIndex"] = "gzip.meta".into();
        } else {
            lower["gzipSidecar"] = "turbobd.segments".into();
        }
        let config = dir.path().join("config.v1.json");
        let write = |lower: &Value| {
            let text = serde_json::json!({"lowers": [lower], "upper": {}}).to_string();
            fs::write(&config, text).unwrap();
        };
        write(&lower);
        let export = ["export", "--config", config.to_str().unwrap(), "--digest"];
        assert_eq!(done(&export), done(&["export", &images.name("turbo"), "--digest"]));
        if is_gzip {
            lower.as_object_mut().unwrap().remove("gzipIndex");
            write(&lower);
            refused(&export, &["its target is a zstd file"]);
        }
    }
}

#[test]
fn attach_warns_of_a_frame_that_no_tier_holds_and_says_what_helps() {
    let (images, host) = (Images::new(), RunDir::new());
    images.add("latest", &[(OCI_ZSTD, zstd(&lower()))]);
    images.convert(&[]);
    let with_tier = host.at("service.json");
    let config = serde_json::json!({
        "gzipCacheConfig": {"enable": true, "cacheDir": host.at("cache"), "cacheSizeGB": 1},
        "turbobd": {"traces": {"enable": false}},
    });
    fs::write(&with_tier, config.to_string()).unwrap();
    for has_tier in [false, true] {
        let name = images.name("turbo");
        let mut attach = host.turbobd(&["attach", &name, "--frontend", "loop", "--foreground"]);
        if has_tier {
            attach.env("TURBOBD_SERVICE_CONFIG", &with_tier);
        }
        let mut server = attach.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        let mut stdout = BufReader::new(server.stdout.take().unwrap());
        stdout.read_line(&mut line).unwrap();
        let signalled = Command::new("kill").arg("-INT").arg(server.id().to_string()).status();
        assert!(signalled.unwrap().success());
        let output = server.wait_with_output().unwrap();
        let told = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.success() && line.starts_with("/dev/loop"), "{line} {told}");
        assert_eq!(told.contains("zstd frame"), !has_tier, "{told}");
        assert!(has_tier || told.contains("gzipCacheConfig") && told.contains("zstd:chunked"));
    }
}
