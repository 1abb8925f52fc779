//! Promises of `turbobd convert`, tested on the real program.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use crate::registry_double::real;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use crate::image::{
    Images, OCI_CONFIG, OCI_GZIP, OCI_INDEX, OCI_MANIFEST, OCI_TAR, config_of, done, end, gunzip,
    gzip, host_architecture, lower, members_of, prose, refused, tar_of, turbobd, upper,
};
use crate::registry_double::{Access, Double, Fault};
use crate::serve::serve;
use formats::oci::{Digest, RepositoryName};
use registry::store;
use registry::{ClientOptions, RegistryClient};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
const DOCKER_CONFIG: &str = "application/vnd.docker.container.image.v1+json";
const DOCKER_GZIP: &str = "application/vnd.docker.image.rootfs.diff.tar.gzip";
const DOCKER_TAR: &str = "application/vnd.docker.image.rootfs.diff.tar";
const TURBO: &str = "application/vnd.containerd.overlaybd.turbo.v1+json";

fn content(name: &str) -> String {
    done(&["export", name, "--digest"])
}

/// Reads a file of an image by `export` and the independent program `debugfs`.
fn file_in(name: &str, path: &str) -> Vec<u8> {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let raw = dir.path().join("raw");
    done(&["export", name, "-o", raw.to_str().unwrap()]);
    let out = dir.path().join("out");
    let request = format!("dump {path} {}", out.display());
    let debugfs = Command::new("debugfs").args(["-R", &request]).arg(&raw).output().unwrap();
    assert!(out.exists(), "{}", String::from_utf8_lossy(&debugfs.stderr));
    fs::read(out).unwrap()
}

#[test]
fn two_conversions_give_identical_bytes() {
    let (one, two) = (Images::converted(), Images::converted());
    assert_eq!(one.snapshot(), two.snapshot());
    // A second conversion in the same place changes nothing either.
    one.convert(&[]);
    assert_eq!(one.snapshot(), two.snapshot());
}

#[test]
fn a_layer_archive_has_upstreams_members_in_upstreams_order_and_its_digest_is_the_diff_id() {
    let images = Images::converted();
    let manifest = images.manifest("turbo");
    let config = images.document(&manifest["config"]["digest"]);
    for number in 0..2 {
        let tar = gunzip(&images.blob(&images.layer("turbo", number)));
        assert_eq!(config["rootfs"]["diff_ids"][number], Digest::of(&tar).to_string());
        let file = images.path().join("archive.tar");
        fs::write(&file, &tar).unwrap();
        let listed = Command::new("tar").args(["--utc", "-tvf"]).arg(&file).output().unwrap();
        let listed = String::from_utf8(listed.stdout).unwrap();
        let lines: Vec<Vec<&str>> =
            listed.lines().map(|line| line.split_whitespace().collect()).collect();
        let names: Vec<&str> = lines.iter().map(|fields| fields[5]).collect();
        assert_eq!(names, ["ext4.fs.meta", ".turbo.ociv1", "gzip.meta", "turbobd.segments"]);
        assert_eq!(lines[1][2], "0");
        for fields in lines {
            assert_eq!((fields[0], fields[1], fields[3]), ("-rw-r--r--", "0/0", "1970-01-01"));
        }
    }
}

#[test]
fn annotations_say_what_the_layer_is_and_where_its_data_stays() {
    let images = Images::converted();
    let manifest = images.manifest("turbo");
    for (number, layer) in manifest["layers"].as_array().unwrap().iter().enumerate() {
        assert_eq!(layer["size"], images.blob(layer["digest"].as_str().unwrap()).len());
        let expected = json!({
            "containerd.io/snapshot/overlaybd/version": "0.1.0-turbo.ociv1",
            "containerd.io/snapshot/overlaybd/blob-digest": layer["digest"],
            "containerd.io/snapshot/overlaybd/blob-size": layer["size"].to_string(),
            "containerd.io/snapshot/overlaybd/turbo-oci/target-digest": images.layer("latest", number),
            "containerd.io/snapshot/overlaybd/turbo-oci/target-media-type": OCI_GZIP,
        });
        assert_eq!(layer["annotations"], expected);
    }
}

#[test]
fn media_types_are_dockers_unless_oci_is_asked_for() {
    let images = Images::converted();
    let kinds = |manifest: &Value| {
        let kinds = [
            &manifest["mediaType"],
            &manifest["config"]["mediaType"],
            &manifest["layers"][0]["mediaType"],
        ];
        kinds.map(|kind| kind.as_str().unwrap().to_owned())
    };
    assert_eq!(kinds(&images.manifest("turbo")), [DOCKER_MANIFEST, DOCKER_CONFIG, DOCKER_GZIP]);
    assert_eq!(images.tagged("turbo")["mediaType"], DOCKER_MANIFEST);
    assert_eq!(images.manifest("turbo").get("subject"), None);
    let before = content(&images.name("turbo"));
    images.convert(&["--oci"]);
    assert_eq!(kinds(&images.manifest("turbo")), [OCI_MANIFEST, OCI_CONFIG, OCI_GZIP]);
    assert_eq!(images.manifest("turbo").get("artifactType"), None);
    assert_eq!(content(&images.name("turbo")), before);
}

#[test]
fn a_docker_source_has_docker_targets_by_content_and_not_by_media_type() {
    let images = Images::new();
    images.add("latest", &[(DOCKER_GZIP, lower()), (DOCKER_TAR, gzip(&upper()))]);
    images.convert(&["--oci"]);
    let manifest = images.manifest("turbo");
    let target = |number: usize| &manifest["layers"][number]["annotations"]["containerd.io/snapshot/overlaybd/turbo-oci/target-media-type"];
    assert_eq!((target(0), target(1)), (&json!(DOCKER_TAR), &json!(DOCKER_GZIP)));
    assert_eq!(file_in(&images.name("turbo"), "/etc/first"), b"second\n");
}

#[test]
fn a_referrer_names_its_subject_and_is_oci() {
    let images = Images::sample();
    images.convert(&["--referrer"]);
    let manifest = images.manifest("turbo");
    let source = images.tagged("latest");
    assert_eq!(manifest["mediaType"], OCI_MANIFEST);
    assert_eq!(manifest["config"]["mediaType"], OCI_CONFIG);
    assert_eq!(manifest["artifactType"], TURBO);
    assert_eq!(
        manifest["subject"],
        json!({"mediaType": OCI_MANIFEST, "digest": source["digest"], "size": source["size"]})
    );
}

#[test]
fn a_config_keeps_every_byte_but_its_diff_ids() {
    let images = Images::new();
    let layers = [(OCI_GZIP, gzip(&lower()))];
    let id = Digest::of(&lower());
    let before = r#"{ "zeta":1, "config" : {"Healthcheck":{"Test":["CMD","x"],"Interval":30000000000},
        "OnBuild":["RUN true"],"Shell":["/bin/\u0073h","<&>"],"Labels":null},
        "big":123456789012345678901234567890, "e":1.50e+0, "architecture":"amd64","os":"linux",
        "rootfs":{"more":[1], "diff_ids":"#;
    let after =
        r#", "type":"layers"}, "history":[{"created_by":"a \"diff_ids\": [] b"}], "alpha":[] }"#;
    let text = format!("{before}[ \"{id}\" ]{after}\n");
    images.tag("latest", &images.image(&text, &layers));
    images.convert(&[]);
    let manifest = images.manifest("turbo");
    let new_id = Digest::of(&gunzip(&images.blob(&images.layer("turbo", 0))));
    let config = images.blob(manifest["config"]["digest"].as_str().unwrap());
    assert_eq!(String::from_utf8(config).unwrap(), format!("{before}[\"{new_id}\"]{after}\n"));
}

#[test]
fn a_layer_of_many_members_has_no_gzip_meta_and_reads_right() {
    let images = Images::new();
    let data = prose(7, 3 << 20);
    let tar = tar_of(&[("big", &data), ("after", b"after\n")]);
    let members: Vec<u8> = tar.chunks(300_000).flat_map(gzip).collect();
    images.add("latest", &[(OCI_GZIP, members)]);
    images.convert(&[]);
    let archive = members_of(&gunzip(&images.blob(&images.layer("turbo", 0))));
    let names: Vec<&str> = archive.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["ext4.fs.meta", ".turbo.ociv1", "turbobd.segments"]);
    assert_eq!(file_in(&images.name("turbo"), "/big"), data);
    assert_eq!(file_in(&images.name("turbo"), "/after"), b"after\n");
    done(&["check", &images.name("turbo"), "--data"]);
}

#[test]
fn an_uncompressed_layer_needs_no_gzip_index_but_a_sidecar_that_verifies_it() {
    let images = Images::new();
    images.add("latest", &[(OCI_TAR, lower()), (OCI_GZIP, gzip(&upper()))]);
    images.convert(&[]);
    let archive = members_of(&gunzip(&images.blob(&images.layer("turbo", 0))));
    let names: Vec<&str> = archive.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["ext4.fs.meta", ".turbo.ociv1", "turbobd.segments"]);
    assert_eq!(file_in(&images.name("turbo"), "/big"), prose(1, 5 << 20));
    let compressed = Images::converted();
    assert_eq!(content(&images.name("turbo")), content(&compressed.name("turbo")));
}

#[test]
fn an_empty_layer_is_a_layer() {
    let images = Images::new();
    let empty = vec![0; 1024];
    images.add("latest", &[(OCI_GZIP, gzip(&lower())), (OCI_GZIP, gzip(&empty)), (OCI_TAR, empty)]);
    images.convert(&[]);
    assert_eq!(file_in(&images.name("turbo"), "/etc/first"), b"first\n");
}

#[test]
fn a_layer_of_a_compression_that_no_specification_knows_is_refused_with_the_remedy() {
    let images = Images::new();
    let layers = [("application/vnd.oci.image.layer.v1.tar+bzip2", b"BZh91AY&SY".to_vec())];
    images.tag("latest", &images.image(&config_of(&layers), &layers));
    let before = images.snapshot();
    refused(
        &["convert", "-r", &images.place(), "-i", "latest", "--turboOCI", "turbo"],
        &["Layer 0 (sha256:", "bzip2", "rebuild the image with gzip or zstd layers"],
    );
    assert_eq!(images.snapshot(), before);
}

#[test]
fn span_and_vsize_are_as_asked_and_bounded() {
    let images = Images::sample();
    let place = images.place();
    let base = ["convert", "-r", &place, "-i", "latest", "--turboOCI", "turbo"];
    let inspect = || -> Value {
        serde_json::from_str(&done(&["inspect", "--json", &images.name("turbo")])).unwrap()
    };
    done(&[&base[..], &["--vsize", "1", "--span", "64"]].concat());
    let fine = inspect();
    assert_eq!(fine["vsize"], 1u64 << 30);
    assert_eq!(fine["layers"][0]["target"]["span"], 64 << 10);
    assert!(fine["layers"][0]["target"]["segments"].as_u64().unwrap() > 40, "{fine}");
    let fine_content = content(&images.name("turbo"));
    done(&[&base[..], &["--vsize", "1", "--span", "4096"]].concat());
    assert!(inspect()["layers"][0]["target"]["segments"].as_u64().unwrap() <= 3);
    assert_eq!(content(&images.name("turbo")), fine_content);
    done(&base);
    assert_eq!(inspect()["vsize"], 64u64 << 30);
    for wrong in [["--span", "63"], ["--span", "65537"], ["--vsize", "0"], ["--vsize", "16385"]] {
        let ended = end(turbobd().args([&base[..], &wrong].concat()));
        assert_eq!(ended.code, Some(2), "{wrong:?}: {}", ended.stderr);
    }
}

#[test]
fn no_upload_builds_and_leaves_nothing() {
    let images = Images::sample();
    let before = images.snapshot();
    let room = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let other = room.path().join("not-made");
    let to = format!("oci:{}", other.display());
    let digest =
        done(&["convert", "-r", &images.place(), "-i", "latest", "--no-upload", "--vsize", "1"]);
    done(&["convert", "-r", &images.place(), "-i", "latest", "--no-upload", "--to", &to]);
    assert_eq!(images.snapshot(), before);
    assert!(!other.exists(), "an empty layout was made");
    images.convert(&[]);
    assert_eq!(images.tagged("turbo")["digest"], digest);
}

#[test]
fn an_image_is_converted_by_digest_too() {
    let images = Images::sample();
    let digest = images.tagged("latest")["digest"].as_str().unwrap().to_owned();
    let by_tag = images.convert(&[]);
    let by_digest = done(&[
        "convert",
        "-r",
        &images.place(),
        "-g",
        &digest,
        "--turboOCI",
        "t2",
        "--vsize",
        "1",
    ]);
    assert_eq!(by_tag, by_digest);
}

/// An index of two platforms, an attestation, and a nested index of a third.
fn many_platforms(images: &Images) -> Value {
    let child = |seed: u64| {
        let layers = [(OCI_GZIP, gzip(&tar_of(&[("which", &prose(seed, 70_000))])))];
        images.image(&config_of(&layers), &layers)
    };
    let with = |mut descriptor: Value, more: Value| {
        descriptor.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        descriptor
    };
    let other = if host_architecture() == "arm64" { "amd64" } else { "arm64" };
    let attestation =
        images.descriptor(OCI_MANIFEST, br#"{"schemaVersion":2,"config":{},"layers":[]}"#);
    let nested = json!({"schemaVersion": 2, "mediaType": OCI_INDEX, "annotations": {"nested": "yes"}, "manifests": [
        with(child(3), json!({"platform": {"os": "linux", "architecture": "riscv64"}})),
    ]});
    let nested = images.descriptor(OCI_INDEX, nested.to_string().as_bytes());
    json!({
        "schemaVersion": 2,
        "mediaType": OCI_INDEX,
        "manifests": [
            with(child(1), json!({"platform": {"os": "linux", "architecture": other, "variant": "v8", "os.features": ["x"]},
                "annotations": {"first": "1"}, "x-unknown": [1, {"a": null}]})),
            with(child(2), json!({"platform": {"os": "linux", "architecture": host_architecture()}, "urls": ["https://example.com/u"]})),
            with(attestation, json!({"platform": {"os": "unknown", "architecture": "unknown"}, "annotations": {
                "vnd.docker.reference.type": "attestation-manifest", "vnd.docker.reference.digest": "sha256:00"}})),
            nested,
        ],
        "annotations": {"org.example": "kept"},
        "x-index": {"kept": 12345678901234567u64},
    })
}

/// `value` without these fields.
fn without(value: &Value, fields: &[&str]) -> Value {
    let mut value = value.clone();
    for field in fields {
        value.as_object_mut().unwrap().remove(*field);
    }
    value
}

#[test]
fn an_index_keeps_everything_but_digests_and_attestations() {
    let images = Images::new();
    let index = many_platforms(&images);
    images.set_manifest("latest", &index);
    images.convert(&[]);
    let result = images.manifest("turbo");
    assert_eq!(without(&result, &["manifests"]), without(&index, &["manifests"]));
    let entries = result["manifests"].as_array().unwrap();
    assert_eq!(entries.len(), 3, "{result}");
    let changed = ["digest", "size", "mediaType"];
    for (new, old) in entries.iter().zip([0, 1, 3]) {
        let old = &index["manifests"][old];
        assert_eq!(without(new, &changed), without(old, &changed));
        assert_ne!(new["digest"], old["digest"]);
        assert_eq!(new["size"], images.blob(new["digest"].as_str().unwrap()).len());
    }
    assert_eq!(entries[0]["mediaType"], DOCKER_MANIFEST);
    assert_eq!(entries[2]["mediaType"], OCI_INDEX);
    let nested = images.document(&entries[2]["digest"]);
    assert_eq!(nested["annotations"], json!({"nested": "yes"}));
    assert_eq!(nested["manifests"][0]["platform"]["architecture"], "riscv64");
    assert_eq!(nested["manifests"][0]["mediaType"], DOCKER_MANIFEST);
    // The children have no tags.
    let top: Value =
        serde_json::from_slice(&fs::read(images.path().join("index.json")).unwrap()).unwrap();
    assert_eq!(top["manifests"].as_array().unwrap().len(), 2);
    assert_eq!(file_in(&images.name("turbo"), "/which"), prose(2, 70_000));
}

#[test]
fn every_document_of_an_index_refers_to_its_source() {
    let images = Images::new();
    let index = many_platforms(&images);
    images.set_manifest("latest", &index);
    images.convert(&["--referrer"]);
    let result = images.manifest("turbo");
    assert_eq!(result["subject"]["digest"], images.tagged("latest")["digest"]);
    assert_eq!(result["artifactType"], TURBO);
    for (new, old) in [(0, 0), (1, 1), (2, 3)] {
        let child = images.document(&result["manifests"][new]["digest"]);
        assert_eq!(child["subject"]["digest"], index["manifests"][old]["digest"]);
        assert_eq!(child["subject"]["mediaType"], index["manifests"][old]["mediaType"]);
        assert_eq!(child["artifactType"], TURBO);
    }
}

#[test]
fn one_platform_that_fails_leaves_nothing() {
    let images = Images::new();
    let mut index = many_platforms(&images);
    let layers = [(OCI_GZIP, gzip(&vec![7; 5000]))];
    let bad = images.image(r#"{"rootfs":{"diff_ids":[]}}"#, &layers);
    index["manifests"].as_array_mut().unwrap().push(bad);
    images.set_manifest("latest", &index);
    let before = images.snapshot();
    let place = images.place();
    refused(
        &["convert", "-r", &place, "-i", "latest", "--turboOCI", "turbo"],
        &["Layer 0 (sha256:"],
    );
    assert_eq!(images.snapshot(), before);
}

#[test]
fn a_registry_and_a_directory_get_the_same_bytes() {
    let images = Images::sample();
    let registry = Double::start();
    serve(&images, &registry, "team/app");
    let repository = format!("{}/team/app", registry.host());
    let there = done(&[
        "convert",
        "-r",
        &repository,
        "-i",
        "latest",
        "--turboOCI",
        "turbo",
        "--vsize",
        "1",
    ]);
    assert_eq!(there, images.convert(&[]));
    let (media_type, bytes) = registry.manifest("team/app", "turbo").unwrap();
    assert_eq!(media_type, DOCKER_MANIFEST);
    assert_eq!(&bytes[..], images.blob(&there));
    // Each layer was downloaded once, whole.
    for number in 0..2 {
        let digest: Digest = images.layer("latest", number).parse().unwrap();
        let size = images.blob(&digest.to_string()).len();
        assert_eq!(registry.traffic(&digest), (1, size), "layer {number}");
    }
    registry.clear_log();
    assert_eq!(content(&format!("{repository}:turbo")), content(&images.name("turbo")));
    let ranged = registry.log().iter().filter(|seen| seen.status == 206).count();
    assert!(ranged > 1, "the data was read in {ranged} ranges");
}

#[test]
fn an_index_in_a_registry_has_untagged_children() {
    let images = Images::new();
    images.set_manifest("latest", &many_platforms(&images));
    let registry = Double::start();
    serve(&images, &registry, "team/app");
    let repository = format!("{}/team/app", registry.host());
    let digest = done(&[
        "convert",
        "-r",
        &repository,
        "-i",
        "latest",
        "--turboOCI",
        "turbo",
        "--vsize",
        "1",
    ]);
    let puts: Vec<String> = registry
        .log()
        .into_iter()
        .map(|seen| seen.line)
        .filter(|line| line.starts_with("PUT") && line.contains("/manifests/"))
        .collect();
    let (last, children) = puts.split_last().unwrap();
    assert_eq!(last, "PUT /v2/team/app/manifests/turbo");
    assert_eq!(children.len(), 4, "{puts:?}");
    assert!(children.iter().all(|line| line.contains("/manifests/sha256:")), "{puts:?}");
    assert_eq!(digest, images.convert(&[]));
    assert_eq!(content(&format!("{repository}:turbo")), content(&images.name("turbo")));
}

#[test]
fn tokens_that_run_out_within_a_conversion_are_renewed() {
    let images = Images::sample();
    let registry = Double::start();
    serve(&images, &registry, "team/app");
    registry.set_access(Access::Bearer {
        login: Some("me:secret".into()),
        stated_life: Duration::from_secs(60),
        real_life: Duration::from_secs(60),
        refusal: 401,
    });
    // Whatever lifetime the service stated, these requests find their token expired.
    let upper = images.layer("latest", 1);
    for late in ["manifests/latest", upper.as_str(), "POST ", "PUT ", "manifests/turbo"] {
        registry.fault(late, Fault::RevokeTokens, 1);
    }
    let repository = format!("{}/team/app", registry.host());
    let args = [
        "convert",
        "-r",
        &repository,
        "-i",
        "latest",
        "--turboOCI",
        "turbo",
        "--vsize",
        "1",
        "-u",
        "me:secret",
    ];
    let there = done(&args);
    assert_eq!(there, images.convert(&[]));
    assert!(registry.count("/token") >= 5, "{} tokens", registry.count("/token"));
    let name = format!("{repository}:turbo");
    registry.fault("GET /v2/team/app/blobs", Fault::RevokeTokens, 1);
    assert_eq!(
        done(&["export", &name, "--digest", "-u", "me:secret"]),
        content(&images.name("turbo"))
    );
    refused(
        &["export", &name, "--digest"],
        &["denied", "docker login", "-u USER --password-stdin"],
    );
}

#[test]
fn a_user_and_a_password_are_enough_for_basic_access() {
    let images = Images::sample();
    let registry = Double::start();
    serve(&images, &registry, "team/app");
    registry.set_access(Access::Basic("me:se:cret".into()));
    let repository = format!("{}/team/app", registry.host());
    let base =
        ["convert", "-r", &repository, "-i", "latest", "--turboOCI", "turbo", "--vsize", "1"];
    refused(&base, &["denied", &registry.host()]);
    let ended = end(turbobd().args([&base[..], &["-u", "me:wrong"]].concat()));
    assert_eq!(ended.code, Some(1));
    assert!(ended.stderr.contains("denied") && ended.stderr.contains("--password-stdin"));
    assert_eq!(done(&[&base[..], &["-u", "me:se:cret"]].concat()), images.convert(&[]));
}

#[test]
fn the_reference_registry_takes_and_serves_it() {
    let Some(registry) = real::start() else { return };
    let images = Images::new();
    images.set_manifest("latest", &many_platforms(&images));
    let repository = format!("{}/team/app", registry.host());
    let client = RegistryClient::new(ClientOptions::default()).unwrap();
    let place: RepositoryName = repository.parse().unwrap();
    let into = store::create_repository(&place, &client).unwrap();
    let push = |bytes: &[u8], tag: Option<&str>| {
        let document: Option<Value> = serde_json::from_slice(bytes).ok();
        let media_type = document.as_ref().and_then(|document| document["mediaType"].as_str());
        match media_type {
            Some(media_type) => into.put_manifest(tag, media_type, bytes).unwrap(),
            None => into.put_blob(bytes).unwrap(),
        }
    };
    let mut blobs: Vec<Vec<u8>> = fs::read_dir(images.path().join("blobs/sha256"))
        .unwrap()
        .map(|entry| fs::read(entry.unwrap().path()).unwrap())
        .collect();
    let is = |bytes: &Vec<u8>, what: &str| {
        bytes.starts_with(b"{") && String::from_utf8_lossy(bytes).contains(what)
    };
    // The attestation is not a real one: left out, like the index that names it.
    let index = images.blob(images.tagged("latest")["digest"].as_str().unwrap());
    blobs.retain(|bytes| *bytes != index && !is(bytes, r#""config":{},"#));
    blobs.sort_by_key(|bytes| (is(bytes, r#""manifests":"#), is(bytes, r#""layers":["#)));
    for bytes in &blobs {
        push(bytes, None);
    }
    let mut index: Value = serde_json::from_slice(&index).unwrap();
    index["manifests"].as_array_mut().unwrap().remove(2);
    images.set_manifest("latest", &index);
    push(index.to_string().as_bytes(), Some("latest"));

    let there = done(&[
        "convert",
        "-r",
        &repository,
        "-i",
        "latest",
        "--turboOCI",
        "turbo",
        "--vsize",
        "1",
    ]);
    assert_eq!(there, images.convert(&[]));
    assert_eq!(content(&format!("{repository}:turbo")), content(&images.name("turbo")));
    assert_eq!(content(&format!("{repository}@{there}")), content(&images.name("turbo")));
    done(&["check", &format!("{repository}:turbo"), "--data"]);
}

#[test]
fn a_meta_image_written_elsewhere_knows_its_origin() {
    let images = Images::sample();
    let registry = Double::start();
    serve(&images, &registry, "team/app");
    let repository = format!("{}/team/app", registry.host());
    let other = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let to = format!("oci:{}", other.path().join("meta").display());
    let puts = registry.count("PUT");
    let args = [
        "convert",
        "-r",
        &repository,
        "-i",
        "latest",
        "--turboOCI",
        "turbo",
        "--to",
        &to,
        "--vsize",
        "1",
    ];
    let digest = done(&args);
    assert_eq!(registry.count("PUT"), puts, "the origin was written to");
    let document = fs::read(blob_in(&other.path().join("meta"), &digest)).unwrap();
    let document: Value = serde_json::from_slice(&document).unwrap();
    assert_eq!(document["annotations"]["dev.turbobd.origin"], repository);
    images.convert(&[]);
    let export = |name: &str, origin: &str| done(&["export", name, "--digest", "--origin", origin]);
    assert_eq!(export(&format!("{to}:turbo"), &repository), content(&images.name("turbo")));
    // And the other way round: the data in a directory, the meta image in a registry.
    let back = format!("{}/meta/app", registry.host());
    let dir = images.place();
    done(&[
        "convert",
        "-r",
        &dir,
        "-i",
        "latest",
        "--turboOCI",
        "turbo",
        "--to",
        &back,
        "--vsize",
        "1",
    ]);
    assert_eq!(export(&format!("{back}:turbo"), &dir), content(&images.name("turbo")));
}

fn blob_in(dir: &Path, digest: &str) -> std::path::PathBuf {
    dir.join("blobs/sha256").join(digest.trim_start_matches("sha256:"))
}

#[test]
fn json_tells_layers_and_sizes() {
    let images = Images::sample();
    let text = images.convert(&["--json"]);
    let told: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(told["digest"], images.tagged("turbo")["digest"]);
    let layers = told["images"][0]["layers"].as_array().unwrap();
    for (number, layer) in layers.iter().enumerate() {
        assert_eq!(layer["source"], images.layer("latest", number));
        assert_eq!(layer["digest"], images.layer("turbo", number));
        assert_eq!(layer["sizes"]["blob"], images.blob(&images.layer("latest", number)).len());
    }
    assert_eq!(layers.len(), 2);
    assert_eq!(layers[0]["sizes"]["tar"], lower().len());
}

#[test]
fn the_content_digest_is_that_of_the_exported_disk() {
    let images = Images::converted();
    let raw = images.path().join("raw");
    let line = done(&["export", &images.name("turbo"), "-o", raw.to_str().unwrap(), "--digest"]);
    let bytes = fs::read(&raw).unwrap();
    // Of all 4096-byte blocks that are not zero: offset (little-endian u64) and content.
    let mut hasher = Sha256::new();
    for (number, block) in
        bytes.chunks(4096).enumerate().filter(|(_, block)| block.iter().any(|&byte| byte != 0))
    {
        hasher.update((number as u64 * 4096).to_le_bytes());
        hasher.update(block);
    }
    let digest = Digest::from_hasher(hasher);
    assert_eq!(line, format!("content_sha256={} vsize={}", digest.hex(), 1u64 << 30));
}
