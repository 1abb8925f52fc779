//! Promises of `turbobd commit`. The kernel's ext4 makes the changes, e2fsck and the raw disk are the
//! oracles.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use crate::machine;
use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::Command;

use crate::image::{Images, OCI_GZIP, done, end, gzip, noise, refused, tar_of, turbobd};
use disk::DiskRange;
use disk::writable::{WritableFiles, WritableLayer};
use formats::lsmt::LayerIdentity;
use formats::units::Bytes;
use serde_json::json;

const DISK: u64 = 1 << 30;

fn content(name: &str) -> String {
    done(&["export", name, "--digest"])
}

/// An image of one layer, converted to `obd` and `turbo`.
fn base() -> Images {
    let images = Images::new();
    let tar = tar_of(&[("etc/", b""), ("etc/name", b"old\n"), ("data", &noise(1, 300_000))]);
    images.add("latest", &[(OCI_GZIP, gzip(&tar))]);
    let place = images.place();
    let args = ["convert", "-r", &place, "-i", "latest", "--vsize", "1"];
    done(&[&args[..], &["--overlaybd", "obd", "--turboOCI", "turbo"]].concat());
    images
}

/// Lets the kernel change the disk of `image` and writes every block that differs to the layer in `upper`;
/// leaves the changed disk in `raw`.
fn change(image: &str, raw: &Path, upper: &Path) {
    done(&["export", image, "-o", raw.to_str().unwrap()]);
    let before = raw.with_extension("before");
    machine::run(Command::new("cp").arg("--sparse=always").arg(raw).arg(&before));
    let dir = tempfile::tempdir().unwrap();
    machine::run(Command::new("mount").args(["-o", "loop,rw"]).arg(raw).arg(dir.path()));
    fs::write(dir.path().join("etc/name"), "new\n").unwrap();
    fs::write(dir.path().join("etc/more"), noise(2, 70_000)).unwrap();
    fs::remove_file(dir.path().join("data")).unwrap();
    fs::write(dir.path().join("zeros"), vec![0; 200_000]).unwrap();
    machine::run(Command::new("umount").arg(dir.path()));
    machine::run(Command::new("e2fsck").arg("-fn").arg(raw));

    let mut layer =
        WritableLayer::create(&WritableFiles::in_dir(upper), Bytes(DISK), LayerIdentity::default())
            .unwrap();
    let (old, new) = (File::open(&before).unwrap(), File::open(raw).unwrap());
    let (mut a, mut b) = (vec![0; 1 << 20], vec![0; 1 << 20]);
    for at in (0..DISK).step_by(1 << 20) {
        old.read_exact_at(&mut a, at).unwrap();
        new.read_exact_at(&mut b, at).unwrap();
        if a == b {
            continue;
        }
        for (number, (old, new)) in a.chunks(4096).zip(b.chunks(4096)).enumerate() {
            let at = at + 4096 * number as u64;
            if old != new && new.iter().all(|&byte| byte == 0) {
                layer.discard(DiskRange::new(at, 4096)).unwrap();
            } else if old != new {
                layer.write(at, new).unwrap();
            }
        }
    }
    layer.flush().unwrap();
}

/// The line of `export --digest` of a raw disk, by an image with this disk as its only layer.
fn content_of_raw(raw: &Path, work: &Path) -> String {
    let upper = work.join("whole");
    let mut layer = WritableLayer::create(
        &WritableFiles::in_dir(&upper),
        Bytes(DISK),
        LayerIdentity::default(),
    )
    .unwrap();
    let file = File::open(raw).unwrap();
    let mut bytes = vec![0; 1 << 20];
    for at in (0..DISK).step_by(1 << 20) {
        file.read_exact_at(&mut bytes, at).unwrap();
        if bytes.iter().any(|&byte| byte != 0) {
            layer.write(at, &bytes).unwrap();
        }
    }
    drop(layer.commit(
        File::create(work.join("whole.lsmt")).unwrap(),
        Bytes(DISK),
        LayerIdentity::default(),
    ));
    let config = work.join("whole.json");
    fs::write(&config, r#"{"lowers": [{"file": "whole.lsmt"}]}"#).unwrap();
    done(&["export", "--config", config.to_str().unwrap(), "--digest"])
}

#[test]
fn a_committed_layer_on_top_of_its_image_is_the_disk_that_was_written() {
    machine::need_root();
    for form in ["obd", "turbo"] {
        let images = base();
        let work = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let (raw, upper) = (work.path().join("raw"), work.path().join("upper"));
        change(&images.name(form), &raw, &upper);
        let place = images.place();
        let upper_text = upper.to_str().unwrap();
        let args =
            ["commit", upper_text, "-r", &place, "-i", form, "--tag", "built", "-m", "a word"];
        let digest = done(&args);
        assert_eq!(images.tagged("built")["digest"], digest);
        assert_eq!(content(&images.name("built")), content_of_raw(&raw, work.path()));
        assert_ne!(content(&images.name("built")), content(&images.name(form)));
        // The image has the layers of the lower one and one more, and so has its config.
        let (base, built) = (images.manifest(form), images.manifest("built"));
        assert_eq!(built["mediaType"], base["mediaType"]);
        assert_eq!(built["layers"][0], base["layers"][0]);
        let layer = &built["layers"][1];
        assert_eq!(built["layers"].as_array().unwrap().len(), 2);
        assert_eq!(layer["mediaType"], "application/vnd.docker.image.rootfs.diff.tar");
        assert_eq!(
            layer["annotations"],
            json!({
                "containerd.io/snapshot/overlaybd/version": "0.1.0",
                "containerd.io/snapshot/overlaybd/blob-digest": layer["digest"],
                "containerd.io/snapshot/overlaybd/blob-size": layer["size"].to_string(),
            })
        );
        let config = images.document(&built["config"]["digest"]);
        assert_eq!(config["rootfs"]["diff_ids"][1], layer["digest"]);
        // A second commit has the same result; one on top of the first has another.
        assert_eq!(done(&args), digest);
        assert!(built["annotations"].get("dev.turbobd.chains").is_none());
    }
}

#[test]
fn a_layer_goes_to_a_file_that_is_not_replaced_by_accident() {
    let work = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let (upper, out) = (work.path().join("upper"), work.path().join("layer"));
    let mut layer = WritableLayer::create(
        &WritableFiles::in_dir(&upper),
        Bytes(DISK),
        LayerIdentity::default(),
    )
    .unwrap();
    layer.write(4096, &noise(3, 40_960)).unwrap();
    layer.flush().unwrap();
    let (upper, out) = (upper.to_str().unwrap(), out.to_str().unwrap());
    refused(&["commit", upper, "-o", out], &["in use"]);
    drop(layer);
    let digest = done(&["commit", upper, "-o", out]);
    let bytes = fs::read(out).unwrap();
    assert_eq!(digest, formats::oci::Digest::of(&bytes).to_string());
    refused(&["commit", upper, "-o", out], &["layer", "exists"]);
    let uuid = "0123ABCD-89AB-CDEF-0123-456789ABCDEF";
    let more = ["--algorithm", "zstd", "--bs", "16", "--uuid", uuid, "-p", uuid, "-m", "hello"];
    done(&[&["commit", upper, "-f", "-o", out], &more[..]].concat());
    let again = fs::read(out).unwrap();
    assert_ne!(again, bytes);
    // GNU tar sees one member.
    let listed = machine::run(Command::new("tar").arg("-tf").arg(out));
    assert_eq!(listed, "overlaybd.commit");
    let wrong = end(turbobd().args(["commit", upper, "-o", out, "--uuid", "x"]));
    assert_eq!(wrong.code, Some(2));
    refused(&["commit", "/nonexistent", "-o", out], &["/nonexistent"]);
}

#[test]
fn a_layer_does_not_go_on_top_of_a_plain_image() {
    let images = base();
    let work = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    drop(
        WritableLayer::create(
            &WritableFiles::in_dir(work.path()),
            Bytes(DISK),
            LayerIdentity::default(),
        )
        .unwrap(),
    );
    let place = images.place();
    let upper = work.path().to_str().unwrap();
    refused(
        &["commit", upper, "-r", &place, "-i", "latest", "--tag", "built"],
        &["plain image", "turbobd convert"],
    );
    assert_eq!(end(turbobd().args(["commit", upper])).code, Some(2));
}
