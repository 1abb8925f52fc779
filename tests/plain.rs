//! A plain image attaches like a converted one: its meta image is found, or built and kept.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs;
use std::num::NonZeroUsize;
use std::path::Path;

use client::mounts::MountRights;
use client::{ClientError, Code, DaemonClient, DeviceSpec, Frontend, ImageSpec};
use formats::oci::Digest;

use crate::image::{
    Images, OCI_GZIP, OCI_TAR, done, end, gzip, lower, prose, refused, turbobd, upper,
};
use crate::machine;
use crate::registry_double::Double;
use crate::run_dir::RunDir;
use crate::serve::serve;

/// Runs `export --digest` with a local store; returns its output and its log.
fn export(name: &str, store: &Path, more: &[&str]) -> (String, String) {
    let mut command = turbobd();
    command.args(["-v", "export", name, "--digest", "--meta-dir"]).arg(store).args(more);
    let ended = end(&mut command);
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    (ended.stdout.trim_end().to_owned(), ended.stderr)
}

/// The digest of the image after a conversion, with the size that a meta image has.
fn converted(images: &Images) -> String {
    done(&["convert", "-r", &images.place(), "-i", "latest", "--turboOCI", "beforehand"]);
    done(&["export", &images.name("beforehand"), "--digest"])
}

fn folder() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

#[test]
fn a_plain_image_is_what_its_conversion_is_and_is_built_once() {
    let (images, store) = (Images::sample(), folder());
    let expected = converted(&images);
    let before = images.snapshot();
    let (first, log) = export(&images.name("latest"), store.path(), &[]);
    assert_eq!(first, expected);
    assert!(!log.contains("found="), "{log}");
    let (second, log) = export(&images.name("latest"), store.path(), &[]);
    assert_eq!(second, expected);
    assert!(log.contains("found=Local"), "{log}");
    assert_eq!(images.snapshot(), before, "something was written beside the image");
    for command in ["check", "inspect"] {
        done(&[command, &images.name("latest"), "--meta-dir", store.path().to_str().unwrap()]);
    }
}

#[test]
fn the_service_configuration_says_where_meta_images_are_kept() {
    let (images, store) = (Images::sample(), folder());
    let service = store.path().join("service.json");
    let kept = store.path().join("kept");
    fs::write(&service, serde_json::json!({"turbobd": {"metaDir": kept}}).to_string()).unwrap();
    let mut command = turbobd();
    command.args(["export", &images.name("latest"), "--digest", "--service-config"]).arg(&service);
    assert_eq!(end(&mut command).code, Some(0));
    assert!(kept.join("index.json").exists());
}

#[test]
fn what_is_published_to_a_registry_is_found_by_the_next_host() {
    let (images, registry) = (Images::sample(), Double::start());
    serve(&images, &registry, "team/app");
    let expected = converted(&images);
    let name = format!("{}/team/app:latest", registry.host());
    let (here, there) = (folder(), folder());
    assert_eq!(export(&name, here.path(), &[]).0, expected);
    // It is in the local store already, and is pushed from there.
    assert_eq!(export(&name, here.path(), &["--publish"]).0, expected);
    let (found, log) = export(&name, there.path(), &[]);
    assert_eq!(found, expected);
    assert!(log.contains("found=Referrer"), "{log}");
    assert!(!there.path().join("index.json").exists());
}

#[test]
fn an_uncompressed_layer_needs_no_conversion_of_its_own_either() {
    let (images, store) = (Images::new(), folder());
    images.add("latest", &[(OCI_TAR, lower()), (OCI_GZIP, gzip(&upper()))]);
    let expected = converted(&images);
    assert_eq!(export(&images.name("latest"), store.path(), &[]).0, expected);
}

#[test]
fn a_store_that_cannot_be_written_is_named_with_the_remedy() {
    let (images, store) = (Images::sample(), folder());
    let file = store.path().join("file");
    fs::write(&file, prose(1, 10)).unwrap();
    let below = file.join("store");
    refused(
        &["export", &images.name("latest"), "--digest", "--meta-dir", below.to_str().unwrap()],
        &["see --meta-dir"],
    );
}

#[test]
fn a_plain_image_attaches() {
    let (images, host) = (Images::sample(), RunDir::new());
    let (place, meta) = (host.mnt(), host.at("meta"));
    let mut attach =
        host.turbobd(&["attach", &images.name("latest"), "--frontend", "loop", "--mount"]);
    attach.arg(&place);
    let ended = end(attach.arg("--meta-dir").arg(&meta));
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    let read = fs::read(place.join("etc/first"));
    let detached = end(host.turbobd(&["detach"]).arg(&place));
    assert_eq!(detached.code, Some(0), "{}", detached.stderr);
    assert_eq!(read.unwrap(), b"second\n");
    assert!(meta.join("index.json").exists());
}

/// Attaches by the control socket and reads a file; returns it, or the error.
fn shown(host: &RunDir, spec: ImageSpec, file: &str) -> Result<Vec<u8>, ClientError> {
    let run_dir = host.at("run");
    let daemon = || host.turbobd(&["daemon", "--auto"]);
    let mut client = DaemonClient::connect_or_spawn(&run_dir, daemon)?;
    let spec = DeviceSpec { frontend: Frontend::Loop, ..DeviceSpec::of(spec) };
    let (record, _) = client.attach_and_mount(spec, &host.mnt(), MountRights::default())?;
    let read = fs::read(host.mnt().join(file)).unwrap();
    client.detach(&record.device.to_string_lossy())?;
    Ok(read)
}

#[test]
fn a_tag_is_opened_as_the_client_resolved_it_and_with_as_many_layers_as_it_wants() {
    machine::need_root();
    let (images, registry, host) = (Images::sample(), Double::start(), RunDir::new());
    serve(&images, &registry, "team/app");
    let resolved: Digest = images.tagged("latest")["digest"].as_str().unwrap().parse().unwrap();
    // The tag moves to an image of the lower layer alone.
    images.add("latest", &[(OCI_GZIP, gzip(&lower()))]);
    serve(&images, &registry, "team/app");
    let spec = || ImageSpec {
        meta_dir: Some(host.at("meta")),
        ..ImageSpec::of_reference(format!("{}/team/app:latest", registry.host()))
    };
    let resolved = || ImageSpec { manifest: Some(resolved), ..spec() };
    let lowest = |count| ImageSpec { layers: NonZeroUsize::new(count), ..resolved() };
    let first = shown(&host, spec(), "etc/first").unwrap();
    assert_eq!(shown(&host, resolved(), "etc/first").unwrap(), b"second\n");
    assert_eq!(shown(&host, lowest(2), "etc/first").unwrap(), b"second\n");
    assert_ne!(first, b"second\n");
    assert_eq!(shown(&host, lowest(1), "etc/first").unwrap(), first);
    let error = shown(&host, lowest(3), "etc/first").unwrap_err();
    assert_eq!(error.code(), Code::Invalid);
    assert!(error.to_string().contains("has 2 layers"), "{error}");
}
