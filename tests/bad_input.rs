//! For any input: an error with its reason and place, status 1, and nothing left behind. Never a panic, never
//! wrong bytes.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use crate::image;
use std::fs;
use std::time::{Duration, Instant};

use crate::image::{
    Images, OCI_CONFIG, OCI_GZIP, OCI_INDEX, OCI_MANIFEST, config_of, done, end, gunzip, gzip,
    is_refusal, lower, members_of, noise, refused, tar_of, turbobd, upper,
};
use crate::registry_double::{Access, Double, Fault};
use crate::serve::serve;
use formats::oci::Digest;
use serde_json::{Value, json};

/// Converts `latest`, which must be refused and change nothing in the layout.
#[track_caller]
fn no_conversion(images: &Images, needles: &[&str]) -> String {
    let before = images.snapshot();
    let text = refused(
        &["convert", "-r", &images.place(), "-i", "latest", "--turboOCI", "turbo"],
        needles,
    );
    assert_eq!(images.snapshot(), before, "the failed conversion left something");
    text
}

/// Replaces the bytes of a blob under the same name.
fn damage(images: &Images, digest: &str, change: impl FnOnce(&mut Vec<u8>)) {
    let mut bytes = images.blob(digest);
    change(&mut bytes);
    fs::write(images.blob_path(digest), bytes).unwrap();
}

#[test]
fn a_damaged_layer_blob_is_told_as_damage_and_not_as_what_it_led_to() {
    let images = Images::sample();
    let layer = images.layer("latest", 0);
    let whole = images.blob(&layer);
    let name = format!("Layer 0 ({layer})");
    for at in [0, 1, 3, 10, 200, whole.len() / 2, whole.len() - 9, whole.len() - 1] {
        damage(&images, &layer, |bytes| bytes[at] ^= 4);
        no_conversion(&images, &[&name, "arrived with", "digest sha256:"]);
        fs::write(images.blob_path(&layer), &whole).unwrap();
    }
    for len in [0, 1, 17, whole.len() / 2, whole.len() - 1] {
        fs::write(images.blob_path(&layer), &whole[..len]).unwrap();
        no_conversion(
            &images,
            &[
                &name,
                "arrived with",
                &format!("{len} bytes"),
                &format!("says {} bytes", whole.len()),
            ],
        );
    }
    damage(&images, &layer, |bytes| bytes.extend(whole));
    no_conversion(&images, &[&name, "arrived with"]);
}

#[test]
fn a_missing_blob_is_named() {
    for (number, what) in [(0, "layer"), (1, "layer"), (0, "config"), (0, "manifest")] {
        let images = Images::sample();
        let digest = match what {
            "layer" => images.layer("latest", number),
            "config" => images.manifest("latest")["config"]["digest"].as_str().unwrap().to_owned(),
            _ => images.tagged("latest")["digest"].as_str().unwrap().to_owned(),
        };
        fs::remove_file(images.blob_path(&digest)).unwrap();
        no_conversion(&images, &[digest.trim_start_matches("sha256:")]);
    }
}

#[test]
fn a_gzip_stream_that_is_broken_under_a_right_digest_is_told_where() {
    let whole = gzip(&lower());
    let flipped = |at: usize| {
        let mut bytes = whole.clone();
        bytes[at] ^= 0x10;
        bytes
    };
    let len = whole.len();
    let cases = [
        (whole[..len - 1].to_vec(), "ends at byte"),
        (whole[..len / 2].to_vec(), "ends at byte"),
        (whole[..5].to_vec(), "ends at byte"),
        (flipped(len - 2), "trailer"),
        (flipped(len - 6), "trailer"),
        ([whole.clone(), b"junk".to_vec()].concat(), "follows the last gzip member"),
        (flipped(2), "gzip"),
    ];
    for (bytes, needle) in cases {
        let images = Images::new();
        images.tag("latest", &images.image(&config_of(&[]), &[(OCI_GZIP, bytes)]));
        no_conversion(&images, &["Layer 0 (sha256:", needle]);
    }
    // In the middle, a flip is found by one rule or another, at the latest by the trailer.
    for part in 1..20 {
        let images = Images::new();
        images
            .tag("latest", &images.image(&config_of(&[]), &[(OCI_GZIP, flipped(len * part / 20))]));
        no_conversion(&images, &["Layer 0 (sha256:"]);
    }
}

#[test]
fn a_tar_that_is_none_is_told_where() {
    let good = lower();
    let mut checksum = good.clone();
    checksum[150] ^= 1;
    let mut size = good.clone();
    size[512 + 124..512 + 136].copy_from_slice(b"zzzzzzzzzzz\0");
    let cases = [
        (noise(5, 10_000), "byte 0"),
        (b"not a tar".to_vec(), ""),
        (checksum, "byte 0"),
        (size, "byte 512"),
        (good[..2000].to_vec(), ""),
        (good[..good.len() / 2].to_vec(), ""),
    ];
    for (number, (tar, needle)) in cases.into_iter().enumerate() {
        for bytes in [gzip(&tar), tar.clone()] {
            let images = Images::new();
            images.tag(
                "latest",
                &images.image(&config_of(&[]), &[(OCI_GZIP, gzip(&upper())), (OCI_GZIP, bytes)]),
            );
            let text = no_conversion(&images, &["Layer 1 (sha256:", needle]);
            println!("{number}: {text}");
        }
    }
}

#[test]
fn an_entry_that_cannot_be_is_named() {
    let hard_link = {
        let mut tar = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_ustar();
        header.set_entry_type(tar::EntryType::Link);
        header.set_size(0);
        header.set_mode(0o644);
        tar.append_link(&mut header, "alias", "nowhere").unwrap();
        tar.into_inner().unwrap()
    };
    let images = Images::new();
    images.add("latest", &[(OCI_GZIP, gzip(&hard_link))]);
    no_conversion(&images, &["Layer 0 (sha256:", "alias", "nowhere"]);
    let long = format!("{}/x", "n".repeat(300));
    let images = Images::new();
    images.add("latest", &[(OCI_GZIP, gzip(&tar_of(&[(&long, b"x")])))]);
    no_conversion(&images, &["Layer 0 (sha256:", "nnnnnnnn"]);
}

#[test]
fn a_disk_too_small_for_the_image_is_told() {
    let images = Images::new();
    let header = |name: &str, size: u64| {
        let mut header = tar::Header::new_gnu();
        header.set_path(name).unwrap();
        header.set_size(size);
        header.set_mode(0o644);
        header.set_cksum();
        header.as_bytes().to_vec()
    };
    // 1.1 GB of zeros compress well.
    let size = 1_100_000_000u64;
    let mut tar = header("zeros", size);
    tar.resize(512 + size.next_multiple_of(512) as usize + 1024, 0);
    let layers = [(OCI_GZIP, {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        std::io::Write::write_all(&mut encoder, &tar).unwrap();
        encoder.finish().unwrap()
    })];
    drop(tar);
    images.tag("latest", &images.image(&json!({"rootfs": {"diff_ids": []}}).to_string(), &layers));
    let before = images.snapshot();
    let place = images.place();
    let text = refused(
        &["convert", "-r", &place, "-i", "latest", "--turboOCI", "t", "--vsize", "1"],
        &["Layer 0"],
    );
    println!("{text}");
    assert_eq!(images.snapshot(), before);
}

#[test]
fn a_manifest_that_is_none_is_told_with_its_digest() {
    let layer = json!([]);
    let config =
        json!({"mediaType": OCI_CONFIG, "digest": Digest::of(b"{}").to_string(), "size": 2});
    let manifest = |version: Value| json!({"schemaVersion": version, "mediaType": OCI_MANIFEST, "config": config, "layers": layer});
    let mut negative = manifest(json!(2));
    negative["config"]["size"] = json!(-1);
    let mut no_digest = manifest(json!(2));
    no_digest["config"]["digest"] = json!("sha256:xyz");
    let mut huge = manifest(json!(2));
    huge["config"]["size"] = json!(1u64 << 40);
    let both = json!({"schemaVersion": 2, "manifests": [], "layers": [], "config": config});
    let cases: Vec<(Vec<u8>, &str)> = vec![
        (b"garbage".to_vec(), "not a valid JSON text"),
        (b"".to_vec(), "not a valid JSON text"),
        (b"[]".to_vec(), ""),
        (vec![b'['; 100_000], ""),
        (b"{\"schemaVersion\":2,\"mediaType\":\"a/b\"}".to_vec(), "a/b"),
        (b"{\"schemaVersion\":1,\"fsLayers\":[]}".to_vec(), "schema 1"),
        (manifest(json!(3)).to_string().into_bytes(), "schema version 3"),
        (manifest(json!("2")).to_string().into_bytes(), "not a valid manifest"),
        (negative.to_string().into_bytes(), "not a valid manifest"),
        (no_digest.to_string().into_bytes(), "sha256:xyz"),
        (huge.to_string().into_bytes(), "1099511627776 bytes"),
        (both.to_string().into_bytes(), "a manifest and an index at once"),
        (
            [manifest(json!(2)).to_string().into_bytes(), vec![b' '; 5 << 20]].concat(),
            "at most 4194304",
        ),
    ];
    for (bytes, needle) in cases {
        let images = Images::new();
        images.put(b"{}");
        let mut descriptor = images.descriptor(OCI_MANIFEST, &bytes);
        let digest = Digest::of(&bytes);
        images.tag("latest", &descriptor);
        let named = if needle == "sha256:xyz" || needle.ends_with(" bytes") {
            String::new()
        } else {
            digest.hex()
        };
        no_conversion(&images, &[needle, &named]);
        for command in ["export", "check", "inspect"] {
            let name = images.name("latest");
            let more: &[&str] = if command == "export" { &["--digest"] } else { &[] };
            if !needle.ends_with(" bytes") {
                refused(&[&[command, name.as_str()][..], more].concat(), &[needle]);
            }
        }
        // A descriptor that promises another size or media type.
        descriptor["size"] = json!(bytes.len() + 1);
        images.tag("latest", &descriptor);
        no_conversion(&images, &[]);
    }
}

#[test]
fn a_layout_that_is_none_is_told() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let place = format!("oci:{}", dir.path().display());
    let absent = format!("{place}/absent");
    for at in [&place, &absent] {
        refused(
            &["convert", "-r", at, "-i", "x", "--turboOCI", "y"],
            &[&at[4..], "not an OCI image layout", "oci-layout"],
        );
        refused(&["export", at, "--digest"], &["not an OCI image layout"]);
    }
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    let images = Images::sample();
    refused(
        &["convert", "-r", &images.place(), "-i", "x", "--turboOCI", "y"],
        &["no image \"x\"", "it has latest"],
    );
    refused(&["export", &images.name("x"), "--digest"], &["no image \"x\""]);
    for text in ["", "{", "[]", "{\"schemaVersion\":2,\"manifests\":7}"] {
        fs::write(images.path().join("index.json"), text).unwrap();
        refused(&["export", &images.name("latest"), "--digest"], &["index.json"]);
        no_conversion(&images, &["index.json"]);
    }
    fs::write(images.path().join("oci-layout"), r#"{"imageLayoutVersion":"9"}"#).unwrap();
    no_conversion(&images, &["1.0.0"]);
}

#[test]
fn a_place_with_other_files_is_not_written_to() {
    let images = Images::sample();
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    fs::write(dir.path().join("letter"), "mine").unwrap();
    let to = format!("oci:{}", dir.path().display());
    refused(
        &["convert", "-r", &images.place(), "-i", "latest", "--turboOCI", "t", "--to", &to],
        &["not an OCI image layout", "other files"],
    );
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
}

#[test]
fn an_index_without_this_platform_says_what_it_has() {
    let images = Images::converted();
    let mut child = images.tagged("turbo");
    child["annotations"] = json!({});
    child["platform"] = json!({"os": "plan9", "architecture": "mips"});
    let index = json!({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [child]});
    images.set_manifest("multi", &index);
    let name = images.name("multi");
    refused(&["export", &name, "--digest"], &["no manifest for linux/", "plan9/mips"]);
    let empty = json!({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": []});
    images.set_manifest("latest", &empty);
    no_conversion(&images, &["lists no image"]);
    refused(&["export", &images.name("latest"), "--digest"], &["no manifest for linux/"]);
}

#[test]
fn a_config_that_is_none_is_told_with_its_digest() {
    for (config, needle) in [
        ("garbage", "not JSON"),
        ("", "not JSON"),
        ("[]", "rootfs"),
        ("{}", "rootfs"),
        (r#"{"rootfs":{"diff_ids":7}}"#, "rootfs.diff_ids"),
        (r#"{"rootfs":{"diff_ids":[],"diff_ids":[]}}"#, "rootfs.diff_ids"),
        (r#"{"rootfs":{"diff_ids":["nonsense"]}}"#, "diff_ids"),
    ] {
        let images = Images::new();
        images.tag("latest", &images.image(config, &[(OCI_GZIP, gzip(&upper()))]));
        no_conversion(&images, &["Config sha256:", needle]);
    }
}

// The meta image.

/// The content digest, or the refusal, of an image; any other result fails.
#[track_caller]
fn right_or_refused(name: &str, right: &str, what: &str) -> Option<String> {
    let args = ["export", name, "--digest"];
    let ended = end(turbobd().args(args));
    if ended.code == Some(0) {
        assert_eq!(ended.stdout.trim_end(), right, "{what}: wrong bytes");
        return None;
    }
    Some(is_refusal(&ended, &args, &["ayer "]))
}

#[test]
fn flipped_bits_of_a_layer_archive_are_damage() {
    let images = Images::converted();
    let layer = images.layer("turbo", 0);
    let whole = images.blob(&layer);
    for part in 0..32 {
        damage(&images, &layer, |bytes| bytes[(whole.len() - 1) * part / 31] ^= 1 << (part % 8));
        let digest = layer.as_str();
        refused(
            &["export", &images.name("turbo"), "--digest"],
            &["Layer 0", digest, "is damaged: its bytes have digest"],
        );
        fs::write(images.blob_path(&layer), &whole).unwrap();
    }
}

/// Flips bits all over one member, and truncates it, with all digests corrected.
fn flip_member(member: &str, flips: usize) {
    let images = Images::sample();
    images.convert(&["--span", "256"]);
    let right = done(&["export", &images.name("turbo"), "--digest"]);
    let len = members_of(&gunzip(&images.blob(&images.layer("turbo", 0))))
        .iter()
        .find(|(name, _)| name == member)
        .map(|(_, bytes)| bytes.len())
        .unwrap();
    let mut refusals = 0;
    // Every byte of the head and the tail, and places between.
    let near = (0..12).chain(len.saturating_sub(12)..len);
    let places: Vec<usize> = near.chain((1..flips).map(|part| len * part / flips)).collect();
    for (number, &at) in places.iter().enumerate() {
        images.forge("forged", 0, |members| {
            let bytes = &mut members.iter_mut().find(|(name, _)| name == member).unwrap().1;
            bytes[at] ^= 1 << (number % 8);
        });
        refusals += usize::from(
            right_or_refused(&images.name("forged"), &right, &format!("{member} byte {at}"))
                .is_some(),
        );
    }
    println!("{member}: {refusals} of {} flips refused", places.len());
    assert!(
        refusals * 10 > places.len() * 5,
        "{member}: only {refusals} of {} flips refused",
        places.len()
    );
    for cut in [0, 1, 7, 511, 512, len / 2, len - 1] {
        images.forge("forged", 0, |members| {
            members.iter_mut().find(|(name, _)| name == member).unwrap().1.truncate(cut);
        });
        right_or_refused(&images.name("forged"), &right, &format!("{member} cut to {cut}"));
    }
    images.forge("forged", 0, |members| {
        let bytes = &mut members.iter_mut().find(|(name, _)| name == member).unwrap().1;
        *bytes = noise(9, bytes.len());
    });
    right_or_refused(&images.name("forged"), &right, "noise")
        .expect("noise was taken for a member");
}

#[test]
fn a_flipped_bit_in_the_metadata_never_shows_as_other_content() {
    flip_member("ext4.fs.meta", 50);
}

#[test]
fn a_flipped_bit_in_gzip_meta_never_shows_as_other_content() {
    flip_member("gzip.meta", 40);
}

#[test]
fn a_flipped_bit_in_the_sidecar_never_shows_as_other_content() {
    flip_member("turbobd.segments", 30);
}

#[test]
fn an_archive_without_its_members_says_what_it_lacks() {
    let images = Images::converted();
    let right = done(&["export", &images.name("turbo"), "--digest"]);
    let forged = images.name("forged");
    let export = ["export", forged.as_str(), "--digest"];
    images.forge("forged", 0, |members| members.retain(|(name, _)| name != "ext4.fs.meta"));
    refused(&export, &["Layer 0", "no ext4.fs.meta", "gzip.meta"]);
    images.forge("forged", 0, |members| members[0].0 = "erofs.fs.meta".into());
    // Its name decides how it is read, and the layer above is of another kind.
    refused(&export, &["Layer 1", "no erofs.fs.meta", "ext4.fs.meta"]);
    images.forge("forged", 0, |members| members.truncate(2));
    refused(&export, &["Layer 0", "no gzip index"]);
    // Upstream's index alone is enough; the sidecar without it is not.
    images.forge("forged", 0, |members| members.truncate(3));
    assert_eq!(done(&export), right);
    images.forge("forged", 0, |members| drop(members.remove(2)));
    refused(&export, &["Layer 0", "gzip.meta"]);
    images.forge("forged", 0, |members| {
        let first = members[0].clone();
        members.push(first);
    });
    refused(&export, &["Layer 0", "ext4.fs.meta"]);
    images.forge("forged", 0, |members| members.push(("../escape".into(), vec![1])));
    refused(&export, &["Layer 0"]);
    for blob in
        [&b""[..], b"nonsense", &gzip(b"nonsense"), &noise(3, 5000), &gzip(&noise(3, 5000))[..900]]
    {
        images.forge_blob("forged", 0, blob);
        refused(&export, &["Layer 0"]);
    }
    images.forge("forged", 0, |_| {});
    assert_eq!(done(&export), right);
}

#[test]
fn an_index_of_another_layer_is_told_as_such() {
    let images = Images::converted();
    let other = Images::new();
    // Another blob; and one of the same length.
    other.add("latest", &[(OCI_GZIP, gzip(&tar_of(&[("x", &noise(4, 100_000))])))]);
    other.convert(&[]);
    let theirs = members_of(&gunzip(&other.blob(&other.layer("turbo", 0))));
    let forged = images.name("forged");
    let export = ["export", forged.as_str(), "--digest"];
    images.forge("forged", 0, |members| {
        members[2] = theirs[2].clone();
        members[3] = theirs[3].clone();
    });
    refused(&export, &["Layer 0", "index belongs to another layer"]);
    images.forge("forged", 0, |members| members[3] = theirs[3].clone());
    refused(&export, &["Layer 0", "belongs to another layer"]);
    images.forge("forged", 0, |members| {
        members.truncate(3);
        members[2] = theirs[2].clone();
    });
    refused(&export, &["Layer 0", "belongs to another layer", "compressed length"]);
}

/// Points layer 0 of `turbo` at another target.
fn retarget(images: &Images, digest: &str) {
    let mut manifest = images.manifest("turbo");
    manifest["layers"][0]["annotations"]["containerd.io/snapshot/overlaybd/turbo-oci/target-digest"] =
        digest.into();
    images.set_manifest("forged", &manifest);
}

#[test]
fn a_target_that_is_another_blob_is_refused() {
    let images = Images::converted();
    let forged = images.name("forged");
    let export = ["export", forged.as_str(), "--digest"];
    // Another digest: the sidecar detects it.
    retarget(&images, &images.layer("latest", 1));
    refused(&export, &["Layer 0", "index belongs to another layer", &images.layer("latest", 1)]);
    retarget(&images, "sha256:short");
    refused(&export, &["Layer 0", "target-digest"]);
    // Another length under the right name; without a sidecar only the length shows it.
    let target = images.layer("latest", 0);
    let whole = images.blob(&target);
    fs::write(images.blob_path(&target), &whole[..whole.len() - 1]).unwrap();
    refused(
        &["export", &images.name("turbo"), "--digest"],
        &["Layer 0", "belongs to another layer", "compressed length"],
    );
    // The same length: detected at the first segment that differs.
    fs::write(images.blob_path(&target), noise(6, whole.len())).unwrap();
    refused(&["export", &images.name("turbo"), "--digest"], &["Chunk ", &target[7..], "SHA-256"]);
    let check = end(turbobd().args(["check", &images.name("turbo"), "--data"]));
    assert_eq!((check.code, check.stdout.as_str()), (Some(1), "meta image: ok (2 layers)\n"));
    assert!(
        check.stderr.starts_with("turbobd: check: Chunk ") && check.stderr.contains("SHA-256"),
        "{}",
        check.stderr
    );
    fs::remove_file(images.blob_path(&target)).unwrap();
    refused(&["export", &images.name("turbo"), "--digest"], &["Layer 0", &target]);
}

#[test]
fn a_target_of_the_wrong_kind_is_refused() {
    let images = Images::converted();
    let right = done(&["export", &images.name("turbo"), "--digest"]);
    let forged = images.name("forged");
    let kind = "containerd.io/snapshot/overlaybd/turbo-oci/target-media-type";
    let with = |edit: &dyn Fn(&mut Value)| {
        let mut manifest = images.manifest("turbo");
        edit(&mut manifest["layers"][0]["annotations"]);
        images.set_manifest("forged", &manifest);
    };
    with(&|notes| notes[kind] = "application/vnd.oci.image.layer.v1.tar+zstd".into());
    refused(&["export", &forged, "--digest"], &["Layer 0", "tar+zstd", "neither a tar nor a gzip"]);
    with(&|notes| drop(notes.as_object_mut().unwrap().remove(kind)));
    refused(&["export", &forged, "--digest"], &["Layer 0", kind]);
    with(&|notes| notes["containerd.io/snapshot/overlaybd/blob-digest"] = "sha256:00".into());
    refused(&["export", &forged, "--digest"], &["Layer 0", "of another blob"]);
    with(&|notes| *notes = json!({}));
    refused(
        &["export", &forged, "--digest"],
        &["Layer 0", "without a meta image", "turbobd convert"],
    );
    // Annotated as a plain tar, the mappings of a gzip layer point outside or to compressed bytes: never
    // wrong bytes.
    with(&|notes| notes[kind] = "application/vnd.oci.image.layer.v1.tar".into());
    right_or_refused(&forged, &right, "a gzip target called plain")
        .expect("a gzip target was read as a tar");
}

#[test]
fn an_export_that_fails_leaves_no_file() {
    let images = Images::converted();
    let target = images.layer("latest", 0);
    damage(&images, &target, |bytes| bytes[100_000] ^= 1);
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let raw = dir.path().join("raw");
    let text = refused(
        &["export", &images.name("turbo"), "-o", raw.to_str().unwrap()],
        &["Chunk ", &target[7..], "SHA-256"],
    );
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "{text}");
    let nowhere = dir.path().join("no/such/raw");
    refused(
        &["export", &images.name("turbo"), "-o", nowhere.to_str().unwrap()],
        &["Cannot write", "no/such/raw"],
    );
}

// The registry.

/// The converted sample in a registry, and its name there.
fn served() -> (Images, Double, String) {
    let images = Images::converted();
    let registry = Double::start();
    serve(&images, &registry, "team/app");
    let name = format!("{}/team/app:turbo", registry.host());
    (images, registry, name)
}

/// Result of `export --digest` when every matching request meets `fault`, `times` times.
#[track_caller]
fn with_fault(
    served: &(Images, Double, String),
    pattern: &str,
    fault: Fault,
    times: u32,
) -> (image::Ended, Duration) {
    let (_, registry, name) = served;
    registry.clear_faults();
    registry.fault(pattern, fault, times);
    let start = Instant::now();
    let ended = end(turbobd().args(["export", name, "--digest"]));
    registry.clear_faults();
    (ended, start.elapsed())
}

#[test]
fn a_registry_that_misbehaves_for_good_is_told_within_seconds() {
    let served = served();
    let target = served.0.layer("latest", 0);
    let meta = served.0.layer("turbo", 0);
    let cases: Vec<(&str, Fault, Vec<&str>)> = vec![
        (&target, Fault::IgnoreRange, vec!["ignores range requests", &target]),
        (&target, Fault::ShortBody(1), vec![&target, "Content-Length"]),
        (&target, Fault::LongBody(10), vec![&target]),
        (&target, Fault::ContentRange("bytes 5-9/10".into()), vec![&target]),
        (&target, Fault::ContentRange("nonsense".into()), vec![&target]),
        (&target, Fault::Status(404), vec!["Not found", &target]),
        (&target, Fault::Status(401), vec!["denied", "docker login"]),
        (&target, Fault::Status(403), vec!["denied", "docker login"]),
        (&target, Fault::Status(400), vec!["answered 400", &target]),
        (&target, Fault::LoginPage, vec![&target]),
        (&target, Fault::Flip(100_000, 1), vec!["Chunk ", &target, "SHA-256"]),
        (&meta, Fault::Flip(1000, 1), vec!["Layer 0", &meta]),
        (&meta, Fault::ShortBody(1), vec!["Layer 0", &meta]),
        (&meta, Fault::Status(404), vec!["Layer 0", "Not found", &meta]),
        (&meta, Fault::Garbage(b"<html>\nlog\nin</html>".to_vec()), vec!["Layer 0", &meta]),
        ("manifests/turbo", Fault::Garbage(b"{".to_vec()), vec!["team/app"]),
        ("manifests/turbo", Fault::LoginPage, vec!["team/app"]),
        ("manifests/turbo", Fault::Status(404), vec!["Not found", "turbo", "check the name"]),
        ("manifests/turbo", Fault::Garbage(vec![b' '; 9 << 20]), vec!["turbo", "4194304"]),
    ];
    // In parallel, each with a registry of its own: most of the time is waiting.
    std::thread::scope(|scope| {
        for (pattern, fault, needles) in cases {
            let images = &served.0;
            scope.spawn(move || {
                let registry = Double::start();
                serve(images, &registry, "team/app");
                let name = format!("{}/team/app:turbo", registry.host());
                registry.fault(pattern, fault.clone(), 1000);
                let start = Instant::now();
                let args = ["export", name.as_str(), "--digest"];
                let ended = end(turbobd().args(args));
                let time = start.elapsed();
                let what = format!("{fault:?}").chars().take(60).collect::<String>();
                println!("{what}: {:.1} s: {}", time.as_secs_f64(), ended.stderr.trim_end());
                is_refusal(&ended, &args, &needles);
                is_refusal(&ended, &args, &[&registry.host()]);
                assert!(time < Duration::from_secs(20), "{what} took {time:?}");
            });
        }
    });
    let (ended, _) = with_fault(&served, "nothing", Fault::Status(404), 0);
    assert_eq!(ended.code, Some(0));
}

#[test]
fn a_slip_of_the_registry_is_passed_over() {
    let served = served();
    let right = done(&["export", &served.0.name("turbo"), "--digest"]);
    let target = served.0.layer("latest", 0);
    let meta = served.0.layer("turbo", 0);
    for fault in [
        Fault::Status(503),
        Fault::Status(500),
        Fault::ShortBody(1),
        Fault::DropAfter(1000),
        Fault::Flip(100_000, 1),
        Fault::RetryAfter(429, "1".into()),
        Fault::ContentRange(format!("bytes 5-9/{}", served.0.blob(&target).len())),
        Fault::Delay(Duration::from_millis(300)),
    ] {
        for blob in [&target, &meta] {
            // Damage of a whole blob is reported by its size or digest; only pieces are fetched again.
            if blob == &meta
                && matches!(fault, Fault::Flip(..) | Fault::ContentRange(_) | Fault::ShortBody(_))
            {
                continue;
            }
            let (ended, time) = with_fault(&served, blob, fault.clone(), 1);
            assert_eq!(ended.stdout.trim_end(), right, "{fault:?} of {blob}: {}", ended.stderr);
            assert!(time < Duration::from_secs(15), "{fault:?} took {time:?}");
        }
    }
}

#[test]
fn a_stalled_answer_is_asked_for_again() {
    let served = served();
    let right = done(&["export", &served.0.name("turbo"), "--digest"]);
    let target = served.0.layer("latest", 0);
    let (ended, time) = with_fault(&served, &target, Fault::StallAfter(1000), 1);
    assert_eq!(ended.stdout.trim_end(), right, "{}", ended.stderr);
    assert!(time < Duration::from_secs(40), "{time:?}");
}

#[test]
#[ignore = "takes a minute: the deadline of a read"]
fn a_stalled_answer_for_ever_fails_in_bounded_time() {
    let served = served();
    let target = served.0.layer("latest", 0);
    let (ended, time) = with_fault(&served, &target, Fault::StallAfter(0), 1000);
    is_refusal(&ended, &["export", &served.2, "--digest"], &[&target]);
    assert!(time < Duration::from_secs(100), "{time:?}");
}

#[test]
fn a_registry_that_refuses_every_token_is_told_and_not_asked_for_ever() {
    let (_images, registry, name) = served();
    registry.set_access(Access::Bearer {
        login: None,
        stated_life: Duration::from_secs(60),
        real_life: Duration::ZERO,
        refusal: 401,
    });
    refused(&["export", &name, "--digest"], &["denied", "docker login", &registry.host()]);
    assert!(registry.count("/v2/") < 20, "{} requests", registry.count("/v2/"));
}

#[test]
fn a_conversion_from_a_broken_registry_publishes_nothing() {
    let images = Images::sample();
    let registry = Double::start();
    serve(&images, &registry, "team/app");
    let repository = format!("{}/team/app", registry.host());
    let args = ["convert", "-r", &repository, "-i", "latest", "--turboOCI", "turbo"];
    let layer = images.layer("latest", 1);
    let lowest = images.layer("latest", 0);
    for (pattern, fault, needle) in [
        (&lowest, Fault::Flip(100_000, 1), "digest"),
        (&lowest, Fault::Status(404), "Not found"),
        (&layer, Fault::Garbage(b"<html>".to_vec()), "Layer 1"),
    ] {
        registry.fault(pattern, fault, 1000);
        refused(&args, &[needle, pattern]);
        registry.clear_faults();
        assert!(registry.manifest("team/app", "turbo").is_none());
        assert_eq!(registry.count("PUT") + registry.count("POST"), 0);
    }
    // A tag that cannot be written: no tag, so no image.
    registry.fault("PUT /v2/team/app/manifests/turbo", Fault::Status(400), 1000);
    refused(&args, &["400"]);
    assert!(registry.manifest("team/app", "turbo").is_none());
}

#[test]
fn no_registry_at_all_is_told_within_seconds() {
    let start = Instant::now();
    refused(
        &["export", "127.0.0.1:1/team/app:turbo", "--digest"],
        &["127.0.0.1:1", "Cannot reach"],
    );
    assert!(start.elapsed() < Duration::from_secs(20));
}

// Device configurations.

/// A folder with the members of layer 0 and its target, laid out as upstream's snapshotter does.
fn unpacked(images: &Images) -> tempfile::TempDir {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    for number in 0..2 {
        for (name, bytes) in members_of(&gunzip(&images.blob(&images.layer("turbo", number)))) {
            fs::write(dir.path().join(format!("{number}-{name}")), bytes).unwrap();
        }
        fs::copy(
            images.blob_path(&images.layer("latest", number)),
            dir.path().join(format!("{number}-layer")),
        )
        .unwrap();
    }
    dir
}

fn lower_of(number: usize) -> Value {
    json!({"file": format!("{number}-ext4.fs.meta"), "targetFile": format!("{number}-layer"), "gzipIndex": format!("{number}-gzip.meta")})
}

#[test]
fn a_device_config_with_a_fault_is_told_by_file_and_key() {
    let images = Images::converted();
    let dir = unpacked(&images);
    let file = dir.path().join("config.v1.json");
    let name = file.to_str().unwrap().to_owned();
    let args = ["export", "--config", &name, "--digest"];
    refused(&args, &[&name]);
    let case = |config: Value, needles: &[&str]| {
        fs::write(&file, config.to_string()).unwrap();
        refused(&args, needles);
    };
    let with = |key: &str, value: Value| {
        let mut lower = lower_of(0);
        lower[key] = value;
        json!({"lowers": [lower]})
    };
    case(json!([]), &[&name, "must be an object"]);
    case(json!({}), &[&name, "lowers", "at least one layer"]);
    case(json!({"lowers": {}}), &["lowers", "must be an array"]);
    case(json!({"lowers": [5]}), &["lowers[0]", "must be an object"]);
    case(with("file", json!(1)), &["lowers[0].file", "must be a string"]);
    case(with("size", json!("1")), &["lowers[0].size", "whole number"]);
    case(with("file", json!("absent")), &["Layer 0", "absent", "exists"]);
    case(with("targetFile", json!("absent")), &["absent"]);
    case(with("gzipIndex", json!("absent")), &["absent"]);
    case(with("gzipIndex", json!("0-ext4.fs.meta")), &["0-layer", "gzip.meta is damaged"]);
    case(with("gzipIndex", json!("1-gzip.meta")), &["0-layer", "belongs to another layer"]);
    case(with("targetFile", json!("1-layer")), &["1-layer", "belongs to another layer"]);
    case(with("file", json!("0-gzip.meta")), &["0-gzip.meta"]);
    case(
        json!({"lowers": [lower_of(0)], "upper": {"index": "a", "data": "absent"}}),
        &["Cannot open the writable layer", "absent"],
    );
    fs::write(&file, "{\"lowers\": ").unwrap();
    refused(&args, &[&name, "not a JSON object"]);
}

#[test]
fn an_unknown_key_of_a_device_config_is_a_warning() {
    let images = Images::converted();
    let dir = unpacked(&images);
    let file = dir.path().join("config.v1.json");
    let mut lower = lower_of(0);
    lower["surprise"] = json!(1);
    fs::write(&file, json!({"lowers": [lower, lower_of(1)], "novelty": {}}).to_string()).unwrap();
    let ended = end(turbobd().args(["export", "--digest", "--config"]).arg(&file));
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    assert_eq!(ended.stdout.trim_end(), done(&["export", &images.name("turbo"), "--digest"]));
    assert!(
        ended.stderr.contains("WARN") && ended.stderr.contains("lowers[0].surprise"),
        "{}",
        ended.stderr
    );
    assert!(ended.stderr.contains("novelty"), "{}", ended.stderr);
}

// Usage.

#[test]
fn wrong_usage_has_status_2() {
    let images = Images::sample();
    let place = images.place();
    let cases: &[&[&str]] = &[
        &[],
        &["frobnicate"],
        &["convert"],
        &["convert", "-r", &place],
        &["convert", "-r", &place, "-i", "latest"],
        &["convert", "-r", &place, "-i", "latest", "-g", "sha256:00", "--turboOCI", "t"],
        &["convert", "-r", &place, "-g", "sha256:00", "--turboOCI", "t"],
        &["convert", "-r", &place, "-i", "latest", "--turboOCI", "t", "--fstype", "xfs"],
        &["convert", "-r", &place, "-i", "latest", "--turboOCI", "t", "--client-cert", "no-colon"],
        &["convert", "-r", "not a name", "-i", "latest", "--turboOCI", "t"],
        &["export"],
        &["export", &place],
        &["export", "not a name", "--digest"],
        &["export", &place, "--config", "x", "--digest"],
        &["inspect"],
        &["attach"],
        &["attach", "oci:"],
        &["attach", &place, "--frontend", "tape"],
        &["detach"],
        &["daemon", "--stop", "--auto"],
    ];
    for args in cases {
        let ended = end(turbobd().args(*args).env("TURBOBD_RUN_DIR", images.path().join("run")));
        assert_eq!(ended.code, Some(2), "{args:?}: {}", ended.stderr);
        assert_eq!(ended.stdout, "", "{args:?}");
        assert!(
            !ended.stderr.is_empty() && !ended.stderr.contains("panicked"),
            "{args:?}: {}",
            ended.stderr
        );
    }
    let before = images.snapshot();
    assert!(
        !before.keys().any(|path| path.starts_with("run")),
        "a daemon was started for wrong usage"
    );
}
