//! Files written by turbobd, read by a checker that is based on the specification alone.
//!
//! First upstream's own files, which prove the checker right; then all files that turbobd writes: each rule
//! holds, and each disk has the content that `turbobd export --digest` reports. The last test proves that the
//! checker can fail.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use crate::image;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::checker::Report;
use crate::checker::image::{check_config, check_manifest};
use crate::checker::stack::content;
use crate::image::{Images, OCI_GZIP, OCI_TAR, done};
use serde_json::Value;

pub(crate) fn interop() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/interop")
}

/// `content_sha256=… vsize=…` of an image, by the program under test.
fn exported(name: &str) -> (String, u64) {
    let line = done(&["export", name, "--digest"]);
    let (digest, size) =
        line.strip_prefix("content_sha256=").unwrap().split_once(" vsize=").unwrap();
    (digest.to_owned(), size.parse().unwrap())
}

/// Checks the image `tag` and compares its content, and that of every prefix of its layers.
fn check_image(images: &Images, tag: &str) -> Report {
    let mut report = Report::default();
    let manifest = images.manifest(tag);
    let layers = manifest["layers"].as_array().unwrap().len();
    for count in 1..=layers {
        let (name, manifest) = prefix(images, tag, &manifest, count);
        let stacked = check_manifest(images.path(), &manifest, &mut report);
        assert_eq!(stacked.len(), count, "{tag}: {:#?}", report.broken);
        assert_eq!(
            content(&stacked, &mut report),
            exported(&images.name(&name)),
            "{tag}, {count} layers"
        );
    }
    report.clean(tag);
    report
}

/// The image of the lowest `count` layers: its tag, and its manifest's bytes.
fn prefix(images: &Images, tag: &str, manifest: &Value, count: usize) -> (String, Vec<u8>) {
    if count == manifest["layers"].as_array().unwrap().len() {
        return (tag.to_owned(), images.blob(images.tagged(tag)["digest"].as_str().unwrap()));
    }
    let mut manifest = manifest.clone();
    let mut config = images.document(&manifest["config"]["digest"]);
    config["rootfs"]["diff_ids"].as_array_mut().unwrap().truncate(count);
    manifest["layers"].as_array_mut().unwrap().truncate(count);
    let media_type = manifest["config"]["mediaType"].as_str().unwrap();
    manifest["config"] = images.descriptor(media_type, config.to_string().as_bytes());
    let name = format!("{tag}-{count}");
    images.set_manifest(&name, &manifest);
    (name, manifest.to_string().into_bytes())
}

#[test]
fn upstreams_own_disks_keep_every_rule_and_have_their_content() {
    let cases: Value =
        serde_json::from_str(&fs::read_to_string(interop().join("cases.json")).unwrap()).unwrap();
    let mut ran = 0;
    for (name, case) in cases.as_object().unwrap() {
        let lowers = case["config"]["lowers"].as_array().unwrap();
        let files = lowers.iter().flat_map(|lower| lower.as_object().unwrap().values());
        let missing = files
            .filter_map(Value::as_str)
            .find(|file| file.starts_with("blobs/") && !interop().join(file).exists());
        if let Some(file) = missing {
            println!("{name}: not run: {file} is not stored here");
            continue;
        }
        let mut report = Report::default();
        let stacked = check_config(&interop(), &case["config"], &mut report);
        let found = content(&stacked, &mut report);
        report.clean(name);
        assert_eq!(found.0, case["content_sha256"].as_str().unwrap(), "{name}");
        assert_eq!(found.1, case["vsize"].as_u64().unwrap(), "{name}");
        ran += 1;
    }
    assert!(ran >= 4, "only {ran} cases ran");
}

/// The layers of `interop/gen_layers.py` and `odd_layers.py`.
fn generated() -> tempfile::TempDir {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    for script in ["gen_layers.py", "odd_layers.py"] {
        let made = Command::new("python3").arg(interop().join(script)).arg(dir.path()).status();
        assert!(made.unwrap().success(), "{script}");
    }
    dir
}

#[test]
fn images_of_every_kind_of_layer_keep_every_rule_at_every_layer() {
    let dir = generated();
    let layer = |name: &str| fs::read(dir.path().join(name)).unwrap();
    for names in [
        &["base.tar.gz", "upper.tar.gz"][..],
        &["base-gnu.tar.gz", "upper-gnu.tar"],
        &["base-l1.tar.gz", "through-symlink.tar.gz"],
        &["base-l9name.tar.gz", "upper-nex.tar.gz"],
        &["base-multi.tar.gz", "upper-simple.tar"],
        &["base-l0.tar.gz", "upper-hardlower.tar"],
        &["odd-lower.tar.gz", "odd-middle.tar.gz", "odd-upper.tar.gz"],
        &["sparse-gnu.tar.gz", "sparse-pax00.tar.gz", "sparse-pax01.tar.gz", "sparse-pax10.tar.gz"],
    ] {
        let images = Images::new();
        let kind = |name: &str| if name.ends_with(".gz") { OCI_GZIP } else { OCI_TAR };
        let layers: Vec<_> = names.iter().map(|name| (kind(name), layer(name))).collect();
        images.add("latest", &layers);
        images.convert(&["--oci"]);
        let report = check_image(&images, "turbo");
        println!("{names:?}: {} rules", report.checked.len());
    }
}

#[test]
fn images_of_zstd_layers_of_one_frame_and_of_many_keep_every_rule() {
    let frames = |tar: Vec<u8>, len: usize| -> Vec<u8> {
        tar.chunks(len).flat_map(|part| zstd::encode_all(part, 3).unwrap()).collect()
    };
    let kind = "application/vnd.oci.image.layer.v1.tar+zstd";
    for len in [usize::MAX, 1 << 20, 50_000] {
        let images = Images::new();
        let layers = [(kind, frames(image::lower(), len)), (kind, frames(image::upper(), len))];
        images.add("latest", &layers);
        images.convert(&["--oci"]);
        check_image(&images, "turbo");
    }
}

#[test]
fn a_referrer_and_a_finely_cut_image_keep_every_rule() {
    let images = Images::sample();
    images.convert(&["--referrer"]);
    check_image(&images, "turbo");
    images.convert(&["--span", "64"]);
    check_image(&images, "turbo");
}
