//! Layers of more than 4 GiB: they find every length and offset of only 32 bits.
//!
//! The tar is zeros except for a few bytes at its ends, so that its gzip and zstd are small and fast to
//! create: one member or frame of 64 MiB of zeros, many times over.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::io::Write as _;
use std::process::Command;

use crate::image::{Images, OCI_GZIP, done, gzip};
use serde_json::Value;

const OCI_ZSTD: &str = "application/vnd.oci.image.layer.v1.tar+zstd";
const CONFIG: &str = r#"{"rootfs": {"diff_ids": []}}"#;
/// Length of the repeated part.
const PART: usize = 64 << 20;
/// Number of repetitions: 4.5 GiB.
const PARTS: u64 = 72;
const LARGE: u64 = PART as u64 * PARTS;

fn header(name: &str, size: u64) -> Vec<u8> {
    let mut header = tar::Header::new_gnu();
    header.set_path(name).unwrap();
    header.set_size(size);
    header.set_mode(0o644);
    header.set_cksum();
    header.as_bytes().to_vec()
}

/// A layer of a file of zeros and one after it, each part encoded alone.
fn layer(encode: &dyn Fn(&[u8]) -> Vec<u8>) -> Vec<u8> {
    let zeros = encode(&vec![0; PART]);
    let mut layer = encode(&header("zeros", LARGE));
    (0..PARTS).for_each(|_| layer.extend(&zeros));
    layer.extend(encode(&tail()));
    layer
}

/// A small file, and the end of the tar.
fn tail() -> Vec<u8> {
    let mut tail = header("after", 6);
    tail.extend(b"after\n");
    tail.resize(1024 + 1024, 0);
    tail
}

/// The tar as one frame.
fn one_frame() -> Vec<u8> {
    let mut encoder = zstd::Encoder::new(Vec::new(), 1).unwrap();
    let zeros = vec![0; PART];
    encoder.write_all(&header("zeros", LARGE)).unwrap();
    (0..PARTS).for_each(|_| encoder.write_all(&zeros).unwrap());
    encoder.write_all(&tail()).unwrap();
    encoder.finish().unwrap()
}

/// A file of an image, read by the independent program `debugfs`.
fn debugfs(images: &Images, request: &str) -> String {
    let raw = images.path().join("raw");
    let output = Command::new("debugfs").args(["-R", request]).arg(&raw).output().unwrap();
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn layers_of_more_than_4_gib_are_converted_and_read() {
    let zstd = |bytes: &[u8]| zstd::encode_all(bytes, 1).unwrap();
    let mut digests = Vec::new();
    for (kind, layer) in
        [(OCI_GZIP, layer(&gzip)), (OCI_ZSTD, layer(&zstd)), (OCI_ZSTD, one_frame())]
    {
        let images = Images::new();
        images.tag("latest", &images.image(CONFIG, &[(kind, layer)]));
        let (place, name) = (images.place(), images.name("turbo"));
        let convert = ["convert", "-r", &place, "-i", "latest", "--turboOCI", "turbo"];
        done(&[&convert[..], &["--vsize", "16", "--span", "16384"]].concat());
        let told: Value = serde_json::from_str(&done(&["inspect", "--json", &name])).unwrap();
        let tar = told["layers"][0]["target"]["uncompressed"].as_u64().unwrap();
        assert_eq!(tar, LARGE + 512 + 2048);
        let raw = images.path().join("raw");
        done(&["export", &name, "-o", raw.to_str().unwrap()]);
        assert_eq!(debugfs(&images, "cat /after"), "after\n");
        let stat = debugfs(&images, "stat /zeros");
        assert!(stat.contains(&format!("Size: {LARGE}")), "{stat}");
        digests.push(done(&["export", &name, "--digest"]));
    }
    assert!(digests.iter().all(|digest| *digest == digests[0]), "{digests:?}");
}
