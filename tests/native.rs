//! Promises of `turbobd convert --overlaybd`. The oracles are e2fsck, GNU tar, the kernel's ext4, the `lz4`
//! and `zstd` programs, and the TurboOCI conversion of the same image.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use crate::image;
use crate::machine;
use crate::registry_double::real;
use std::fs;
use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::image::{
    Images, OCI_CONFIG, OCI_GZIP, OCI_MANIFEST, OCI_TAR, done, gunzip, gzip, lower, noise, prose,
    refused, tar_of, upper,
};
use crate::listing::{differences, list};
use crate::registry_double::Double;
use crate::serve::serve;
use formats::oci::{Digest, RepositoryName};
use registry::store;
use registry::{ClientOptions, RegistryClient};
use serde_json::{Value, json};

const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
const DOCKER_TAR: &str = "application/vnd.docker.image.rootfs.diff.tar";
const OCI_ZSTD: &str = "application/vnd.oci.image.layer.v1.tar+zstd";
const NATIVE: &str = "application/vnd.containerd.overlaybd.native.v1+json";

/// Converts `latest` to the native image `obd` with a disk of 1 GiB.
fn native(images: &Images, more: &[&str]) -> String {
    let place = images.place();
    let mut args =
        vec!["convert", "-r", &place, "-i", "latest", "--overlaybd", "obd", "--vsize", "1"];
    args.extend(more);
    done(&args)
}

fn content(name: &str) -> String {
    done(&["export", name, "--digest"])
}

fn zstd(bytes: &[u8]) -> Vec<u8> {
    zstd::encode_all(bytes, 3).unwrap()
}

/// The `ZFile` in a native layer, found without turbobd: 1536 bytes of tar before it, its length in the pax
/// record.
fn zfile_of(blob: &[u8]) -> &[u8] {
    let record = std::str::from_utf8(&blob[512..1024]).unwrap();
    let size = record.split_once("size=").unwrap().1.split_once('\n').unwrap().0;
    &blob[1536..1536 + size.parse::<usize>().unwrap()]
}

fn le32(bytes: &[u8], at: usize) -> usize {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap()) as usize
}

fn le64(bytes: &[u8], at: usize) -> usize {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap()) as usize
}

/// The blocks of a `ZFile` without their checksums, by the jump table.
fn blocks_of(zfile: &[u8]) -> Vec<&[u8]> {
    let (table, count) = (le64(zfile, 40), le64(zfile, 48));
    let mut at = 512;
    let blocks = (0..count).map(|block| {
        let len = le32(zfile, table + 4 * block);
        at += len;
        &zfile[at - len..at - 4]
    });
    blocks.collect()
}

/// Runs a program over bytes.
fn filter(program: &str, args: &[&str], input: &[u8]) -> Vec<u8> {
    let mut child = Command::new(program)
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let input = input.to_vec();
    let feeder = std::thread::spawn(move || stdin.write_all(&input).unwrap());
    let output = child.wait_with_output().unwrap();
    feeder.join().unwrap();
    assert!(output.status.success(), "{program} {args:?}");
    output.stdout
}

/// The LSMT stream of a native layer, decompressed by the programs `lz4` and `zstd`.
fn lsmt_by_others(blob: &[u8]) -> Vec<u8> {
    let zfile = zfile_of(blob);
    let plain = match zfile[76] {
        1 => {
            // A frame of independent blocks of at most 64 KiB without checksums.
            let mut frame = vec![0x04, 0x22, 0x4d, 0x18, 0x60, 0x40, 0x82];
            for block in blocks_of(zfile) {
                frame.extend_from_slice(&(block.len() as u32).to_le_bytes());
                frame.extend_from_slice(block);
            }
            frame.extend_from_slice(&[0; 4]);
            filter("lz4", &["-dc"], &frame)
        }
        2 => filter("zstd", &["-dc"], &blocks_of(zfile).concat()),
        other => panic!("compression {other}"),
    };
    assert_eq!(plain.len(), le64(zfile, 56));
    plain
}

/// Exports the lowest `count` layers of `tag` to `raw`.
fn export_prefix(images: &Images, tag: &str, count: usize, raw: &Path) {
    let lowers: Vec<Value> = (0..count)
        .map(|number| json!({"file": images.blob_path(&images.layer(tag, number))}))
        .collect();
    let config = raw.with_extension("config.json");
    fs::write(&config, json!({"repoBlobUrl": "", "lowers": lowers}).to_string()).unwrap();
    done(&["export", "--config", config.to_str().unwrap(), "-o", raw.to_str().unwrap()]);
}

/// Layers with difficult contents: whiteouts, an opaque directory, links down, holes, zeros, odd sizes.
fn hard_layers() -> Vec<Vec<u8>> {
    let mut zeros = noise(7, 50_000);
    zeros[8192..40_960].fill(0);
    let zeros = zeros;
    let all_zero = vec![0; 100_000];
    let first = tar_of(&[
        ("a/", b""),
        ("a/one", &noise(3, 1)),
        ("a/page", &noise(4, 4096)),
        ("a/more", &noise(5, 4097)),
        ("a/text", &prose(6, 3 << 20)),
        ("a/empty", b""),
        ("twice", &noise(8, 20_000)),
        ("twice", &prose(9, 9_000)),
        ("zeros", &zeros),
        ("all-zero", &all_zero),
        ("b/", b""),
        ("b/x", b"x"),
        ("last", &noise(10, 511)),
    ]);
    let second = tar_of(&[
        ("a/.wh.one", b""),
        ("a/text", &prose(11, 123_456)),
        ("b/.wh..wh..opq", b""),
        ("b/y", b"why"),
        ("all-zero", &zeros),
        ("zeros", &all_zero),
    ]);
    let third = tar_of(&[("a/text", &[0; 70_000]), ("c/", b""), ("c/new", &noise(12, 600_000))]);
    vec![first, second, third]
}

#[test]
fn a_native_image_is_the_same_disk_as_the_turbo_image_and_clean_after_every_layer() {
    let images = Images::new();
    let layers = hard_layers();
    images.add(
        "latest",
        &[
            (OCI_GZIP, gzip(&layers[0])),
            (OCI_TAR, layers[1].clone()),
            (OCI_GZIP, layers[2].chunks(200_000).flat_map(gzip).collect()),
        ],
    );
    let digests = native(&images, &["--turboOCI", "turbo"]);
    let tags = [images.tagged("turbo"), images.tagged("obd")];
    let lines: Vec<&str> = digests.lines().collect();
    assert_eq!(lines, tags.each_ref().map(|tag| tag["digest"].as_str().unwrap()));
    assert_eq!(content(&images.name("obd")), content(&images.name("turbo")));
    let work = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    for count in 1..=3 {
        let raw = work.path().join(format!("raw{count}"));
        export_prefix(&images, "obd", count, &raw);
        machine::run(Command::new("e2fsck").arg("-fn").arg(&raw));
    }
    // One format alone gives the same bytes as both together.
    let alone = Images::new();
    alone.add(
        "latest",
        &[
            (OCI_GZIP, gzip(&layers[0])),
            (OCI_TAR, layers[1].clone()),
            (OCI_GZIP, layers[2].chunks(200_000).flat_map(gzip).collect()),
        ],
    );
    assert_eq!(native(&alone, &[]), tags[1]["digest"].as_str().unwrap());
    assert!(alone.manifest("obd") == images.manifest("obd"));
}

#[test]
fn the_kernel_shows_what_gnu_tar_unpacks() {
    let work = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let files = work.path().join("files");
    for (dir, seed) in [("", 20), ("deep/er", 30), ("deep", 40)] {
        fs::create_dir_all(files.join(dir)).unwrap();
        for (number, size) in [0, 1, 511, 512, 513, 4095, 4096, 4097, 300_000].iter().enumerate() {
            let mut data = noise(seed + number as u64, *size);
            if number % 2 == 0 {
                let len = data.len();
                data[len / 4..len / 2].fill(0);
            }
            fs::write(files.join(dir).join(format!("f{number}")), data).unwrap();
        }
    }
    std::os::unix::fs::symlink("../deep/f1", files.join("deep/link")).unwrap();
    fs::hard_link(files.join("f8"), files.join("deep/hard")).unwrap();
    let sparse = fs::File::create(files.join("sparse")).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&sparse, b"far", (5 << 20) + 100).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&sparse, &noise(50, 9000), 1 << 20).unwrap();
    let tar = Command::new("tar")
        .args(["--format=posix", "--sparse", "--xattrs", "-C"])
        .arg(&files)
        .args(["-cf", "-", "."])
        .output()
        .unwrap();
    assert!(tar.status.success());
    for layer in [(OCI_GZIP, gzip(&tar.stdout)), (OCI_ZSTD, zstd(&tar.stdout))] {
        for more in [&[][..], &["--algorithm", "zstd", "--bs", "16"]] {
            let images = Images::new();
            images.add("latest", std::slice::from_ref(&layer));
            native(&images, more);
            let raw = work.path().join("raw");
            done(&["export", &images.name("obd"), "-o", raw.to_str().unwrap()]);
            machine::run(Command::new("e2fsck").arg("-fn").arg(&raw));
            let mounted = machine::Mounted::ext4(&raw);
            let (ours, theirs) = (list(mounted.path()), list(&files));
            let skip = |path: &str| path == "." || path == "lost+found";
            let found = differences(&ours, &theirs, &skip, &|_, _| false);
            assert!(found.is_empty(), "{}", found.join("\n"));
            drop(mounted);
            fs::remove_file(&raw).unwrap();
        }
    }
}

#[test]
fn the_lz4_and_zstd_programs_decode_every_block_and_all_recipes_hold_the_same_stream() {
    let images = Images::new();
    images.add("latest", &[(OCI_GZIP, gzip(&hard_layers()[0]))]);
    let mut streams = Vec::new();
    for (algorithm, code) in [("lz4", 1), ("zstd", 2)] {
        for kib in ["4", "8", "16", "32"] {
            native(&images, &["--algorithm", algorithm, "--bs", kib]);
            let blob = images.blob(&images.layer("obd", 0));
            let zfile = zfile_of(&blob);
            assert_eq!((zfile[76], zfile[88]), (code, 1));
            assert_eq!(le32(zfile, 72), kib.parse::<usize>().unwrap() << 10);
            streams.push(lsmt_by_others(&blob));
            done(&["export", &images.name("obd"), "--digest"]);
        }
    }
    assert!(streams.iter().all(|stream| *stream == streams[0]));
    refused(
        &["convert", "-r", &images.place(), "-i", "latest", "--overlaybd", "x", "--bs", "64"],
        &["smaller blocks"],
    );
}

#[test]
fn blocks_of_zeros_are_not_stored_and_still_hide_what_lies_below() {
    let images = Images::new();
    let zeros = vec![0; 64 << 20];
    let before = noise(1, 2 << 20);
    let mut after = before.clone();
    after[1 << 20..].fill(0);
    images.add(
        "latest",
        &[
            (OCI_GZIP, gzip(&tar_of(&[("zeros", &zeros), ("file", &before)]))),
            (OCI_GZIP, gzip(&tar_of(&[("file", &after)]))),
        ],
    );
    native(&images, &["--turboOCI", "turbo"]);
    let plain = |number| lsmt_by_others(&images.blob(&images.layer("obd", number))).len();
    assert!(plain(0) < 4 << 20, "{}", plain(0));
    assert!(plain(1) < 2 << 20, "{}", plain(1));
    assert_eq!(content(&images.name("obd")), content(&images.name("turbo")));
}

#[test]
fn a_native_layer_is_its_own_diff_id_and_carries_upstreams_annotations_and_identities() {
    let images = Images::sample();
    native(&images, &[]);
    let (manifest, source) = (images.manifest("obd"), images.manifest("latest"));
    assert_eq!(manifest["mediaType"], DOCKER_MANIFEST);
    let config = images.document(&manifest["config"]["digest"]);
    let ids = images.document(&source["config"]["digest"])["rootfs"]["diff_ids"].clone();
    // Chain ids by the image specification.
    let first: Digest = ids[0].as_str().unwrap().parse().unwrap();
    let second = Digest::of(format!("{first} {}", ids[1].as_str().unwrap()).as_bytes());
    let uuid = |digest: &Digest| {
        let hex = digest.hex().to_uppercase();
        format!("{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..32])
    };
    let null = "00000000-0000-0000-0000-000000000000".to_owned();
    let identities = [(uuid(&first), null), (uuid(&second), uuid(&first))];
    for (number, (own, parent)) in identities.iter().enumerate() {
        let layer = &manifest["layers"][number];
        assert_eq!(layer["mediaType"], DOCKER_TAR);
        assert_eq!(config["rootfs"]["diff_ids"][number], layer["digest"]);
        let blob = images.blob(layer["digest"].as_str().unwrap());
        assert_eq!(layer["size"], blob.len());
        assert_eq!(
            layer["annotations"],
            json!({
                "containerd.io/snapshot/overlaybd/version": "0.1.0",
                "containerd.io/snapshot/overlaybd/blob-digest": layer["digest"],
                "containerd.io/snapshot/overlaybd/blob-size": blob.len().to_string(),
            })
        );
        assert_eq!(le64(zfile_of(&blob), 32), 0x1b, "the header is the final one");
        let lsmt = lsmt_by_others(&blob);
        for at in [0, lsmt.len() - 4096] {
            assert_eq!(&lsmt[at + 56..at + 92], own.as_bytes());
            assert_eq!(&lsmt[at + 93..at + 129], parent.as_bytes());
            assert_eq!(le64(&lsmt, at + 48), 1 << 30, "as upstream, every layer says the size");
        }
    }
    native(&images, &["--referrer"]);
    let manifest = images.manifest("obd");
    assert_eq!(manifest["artifactType"], NATIVE);
    assert_eq!(manifest["layers"][0]["mediaType"], OCI_TAR);
    assert_eq!(manifest["config"]["mediaType"], OCI_CONFIG);
    assert_eq!(manifest["subject"]["digest"], images.tagged("latest")["digest"]);
    assert_eq!(manifest["subject"]["mediaType"], OCI_MANIFEST);
}

#[test]
fn a_zstd_layer_gives_both_forms_and_one_that_is_cut_off_neither() {
    let images = Images::new();
    images.add("latest", &[(OCI_ZSTD, zstd(&lower()))]);
    let place = images.place();
    let both = ["--turboOCI", "t", "--overlaybd", "o"];
    done(&[&["convert", "-r", &place, "-i", "latest"], &both[..]].concat());
    let digest = |tag| done(&["export", &images.name(tag), "--digest"]);
    assert_eq!(digest("t"), digest("o"));
    let mut cut = zstd(&lower());
    cut.truncate(cut.len() - 5);
    images.add("latest", &[(OCI_ZSTD, cut)]);
    let args = [&["convert", "-r", &place, "-i", "latest"], &both[..]].concat();
    refused(&args, &["inside a frame"]);
}

#[test]
fn a_second_conversion_reads_no_layer() {
    let images = Images::sample();
    native(&images, &["--turboOCI", "turbo"]);
    let before = images.snapshot();
    for number in 0..2 {
        fs::remove_file(images.blob_path(&images.layer("latest", number))).unwrap();
    }
    native(&images, &["--turboOCI", "turbo"]);
    let after = images.snapshot();
    assert!(after.iter().all(|(path, digest)| before.get(path) == Some(digest)));
    // Other options make another conversion.
    let place = images.place();
    let args = ["convert", "-r", &place, "-i", "latest", "--overlaybd", "obd", "--bs", "8"];
    refused(&args, &["has no blob"]);
}

#[test]
fn an_image_takes_the_layers_it_shares_with_another_from_wherever_they_are() {
    let images = Images::sample();
    let store = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let store_dir = store.path().join("layers");
    let kept = ["--turboOCI", "turbo", "--layer-store", store_dir.to_str().unwrap()];
    native(&images, &kept);
    let top = tar_of(&[("new", &noise(9, 10_000)), ("etc/first", b"third\n")]);
    let three = [(OCI_GZIP, gzip(&lower())), (OCI_GZIP, gzip(&upper())), (OCI_GZIP, gzip(&top))];
    let convert = |more: &[&str]| -> (Images, Value) {
        let other = Images::new();
        other.add("latest", &three);
        let mut args = vec!["--turboOCI", "turbo", "--json"];
        args.extend(more);
        let report = serde_json::from_str(&native(&other, &args)).unwrap();
        (other, report)
    };
    let (fresh, report) = convert(&[]);
    assert_eq!(report["images"][0]["layers"][0]["reused"], false);
    let (from_store, report) = convert(&["--layer-store", store_dir.to_str().unwrap()]);
    let reused = |number: usize| report["images"][0]["layers"][number]["reused"] == true;
    assert_eq!([reused(0), reused(1), reused(2)], [true, true, false]);
    let (obd, turbo) = (images.name("obd"), images.name("turbo"));
    let (from_image, _) = convert(&["--reuse", &obd, "--reuse", &turbo]);
    for other in [&from_store, &from_image] {
        assert!(other.snapshot() == fresh.snapshot());
    }
    // Blobs that the store has lost are created again.
    let blobs = store_dir.join("blobs/sha256");
    fs::remove_file(blobs.join(images.layer("obd", 0).trim_start_matches("sha256:"))).unwrap();
    let (again, _) = convert(&["--layer-store", store_dir.to_str().unwrap()]);
    assert!(again.snapshot() == fresh.snapshot());
}

#[test]
fn an_uncompressed_layer_gives_the_same_native_layer_as_a_compressed_one_but_for_its_source() {
    let (plain, packed, zstandard) = (Images::new(), Images::new(), Images::new());
    plain.add("latest", &[(OCI_TAR, lower())]);
    packed.add("latest", &[(OCI_GZIP, gzip(&lower()))]);
    let config = image::config_of(&[(OCI_TAR, lower())]);
    zstandard.tag("latest", &zstandard.image(&config, &[(OCI_ZSTD, zstd(&lower()))]));
    for images in [&plain, &packed, &zstandard] {
        native(images, &[]);
        assert_eq!(images.layer("obd", 0), plain.layer("obd", 0));
    }
    assert_eq!(gunzip(&gzip(&lower())), lower());
}

/// Converts `latest` of a repository to `obd` and `turbo`.
fn convert_in(repository: &str, more: &[&str]) -> String {
    let mut args = vec!["convert", "-r", repository, "-i", "latest", "--overlaybd", "obd"];
    args.extend(["--turboOCI", "turbo", "--vsize", "1"]);
    args.extend(more);
    done(&args)
}

#[test]
fn in_a_registry_a_second_conversion_reads_no_layer_and_another_repository_mounts_them() {
    let images = Images::sample();
    let registry = Double::start();
    serve(&images, &registry, "team/app");
    serve(&images, &registry, "team/other");
    let (app, other) =
        (format!("{}/team/app", registry.host()), format!("{}/team/other", registry.host()));
    let digests = convert_in(&app, &[]);
    let sources = [0, 1].map(|number| images.layer("latest", number).parse::<Digest>().unwrap());
    assert!(sources.iter().all(|source| registry.traffic(source).0 > 0));
    registry.clear_log();
    assert_eq!(convert_in(&app, &[]), digests);
    assert!(sources.iter().all(|source| registry.traffic(source) == (0, 0)));
    // Only the manifests are put again.
    assert_eq!(registry.count("PUT /v2/team/app/blobs"), 0);

    let (obd, turbo) = (format!("{app}:obd"), format!("{app}:turbo"));
    assert_eq!(convert_in(&other, &["--reuse", &obd, "--reuse", &turbo]), digests);
    assert!(sources.iter().all(|source| registry.traffic(source) == (0, 0)));
    assert_eq!(registry.count("mount="), 4, "two layers of each form");
    assert_eq!(registry.count("PUT /v2/team/other/blobs"), 2, "the two configs");
    images_are_equal(&app, &other);
}

/// Copies the image `latest` into a repository.
fn push(images: &Images, repository: &str) {
    let client = RegistryClient::new(ClientOptions::default()).unwrap();
    let place: RepositoryName = repository.parse().unwrap();
    let into = store::create_repository(&place, &client).unwrap();
    let manifest = images.manifest("latest");
    for blob in manifest["layers"].as_array().unwrap().iter().chain([&manifest["config"]]) {
        into.put_blob(&images.blob(blob["digest"].as_str().unwrap())).unwrap();
    }
    let bytes = images.blob(images.tagged("latest")["digest"].as_str().unwrap());
    into.put_manifest(Some("latest"), OCI_MANIFEST, &bytes).unwrap();
}

fn images_are_equal(one: &str, other: &str) {
    for tag in ["obd", "turbo"] {
        assert_eq!(content(&format!("{one}:{tag}")), content(&format!("{other}:{tag}")));
    }
}

#[test]
fn the_reference_registry_takes_native_layers_and_mounts_them() {
    let Some(registry) = real::start() else { return };
    let images = Images::sample();
    let place = images.place();
    let (app, other) =
        (format!("{}/team/app", registry.host()), format!("{}/team/other", registry.host()));
    for to in [&app, &other] {
        push(&images, to);
    }
    let digests = convert_in(&app, &[]);
    convert_in(&place, &[]);
    assert_eq!(content(&format!("{app}:obd")), content(&images.name("obd")));
    let (obd, turbo) = (format!("{app}:obd"), format!("{app}:turbo"));
    assert_eq!(convert_in(&other, &["--reuse", &obd, "--reuse", &turbo]), digests);
    images_are_equal(&app, &other);
}
