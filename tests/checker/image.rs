//! Converted images in an OCI layout directory (spec turbooci 2, 3.1 and 3.5), and upstream's device configurations.

use std::io::Read as _;
use std::path::Path;

use serde_json::Value;

use super::Report;
use super::archive::{Wrapped, members, unwrap};
use super::field::digest;
use super::index::{check_meta, check_sidecar};
use super::inflate;
use super::lsmt::{self, Made};
use super::segments::check_segments;
use super::stack::Stacked;
use super::zfile;

const SNAPSHOT: &str = "containerd.io/snapshot/overlaybd";
const DOCKER: [&str; 2] = [
    "application/vnd.docker.distribution.manifest.v2+json",
    "application/vnd.docker.container.image.v1+json",
];
const OCI: [&str; 2] =
    ["application/vnd.oci.image.manifest.v1+json", "application/vnd.oci.image.config.v1+json"];
/// Media types of a gzip layer, and of a bare tar: Docker's, then OCI's.
const GZIP_TYPES: [&str; 2] = [
    "application/vnd.docker.image.rootfs.diff.tar.gzip",
    "application/vnd.oci.image.layer.v1.tar+gzip",
];
const TAR_TYPES: [&str; 2] =
    ["application/vnd.docker.image.rootfs.diff.tar", "application/vnd.oci.image.layer.v1.tar"];

/// Blobs by digest.
pub trait Blobs {
    fn blob(&self, digest: &str) -> Option<Vec<u8>>;
}

impl Blobs for Path {
    fn blob(&self, digest: &str) -> Option<Vec<u8>> {
        std::fs::read(self.join("blobs/sha256").join(digest.strip_prefix("sha256:")?)).ok()
    }
}

/// Checks the image of `manifest` and all its layers; returns them for [`super::stack::content`].
pub fn check_manifest<B: Blobs + ?Sized>(
    blobs: &B,
    manifest: &[u8],
    report: &mut Report,
) -> Vec<Stacked> {
    let Some(manifest) =
        report.ok::<Value, _>("manifest.is-json", serde_json::from_slice(manifest))
    else {
        return Vec::new();
    };
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    report.hold("manifest.schema-version-is-2", manifest["schemaVersion"] == 2, || {
        manifest["schemaVersion"].to_string()
    });
    let types = [text(&manifest["mediaType"]), text(&manifest["config"]["mediaType"])];
    let family = [DOCKER, OCI].iter().position(|family| types == *family);
    if !report
        .hold("manifest.media-types-are-of-one-family", family.is_some(), || format!("{types:?}"))
    {
        return Vec::new();
    }
    let family = family.unwrap();
    let config = fetch(blobs, &manifest["config"], report);
    let config: Value = serde_json::from_slice(&config.unwrap_or_default()).unwrap_or_default();
    let diff_ids = config["rootfs"]["diff_ids"].as_array().cloned().unwrap_or_default();
    let empty = Vec::new();
    let layers = manifest["layers"].as_array().unwrap_or(&empty);
    report.hold("config.has-a-diff-id-for-each-layer", diff_ids.len() == layers.len(), || {
        format!("{} for {}", diff_ids.len(), layers.len())
    });
    if let Some(subject) = manifest.get("subject") {
        fetch(blobs, subject, report);
        report.hold("manifest.referrer-is-oci", family == 1, || types[0].clone());
    }
    let mut stacked = Vec::new();
    for (number, layer) in layers.iter().enumerate() {
        let diff_id = diff_ids.get(number).map(&text).unwrap_or_default();
        stacked.extend(check_layer(blobs, layer, &diff_id, family, report));
    }
    stacked
}

/// Reads the blob of a descriptor and compares it with the descriptor.
fn fetch<B: Blobs + ?Sized>(blobs: &B, descriptor: &Value, report: &mut Report) -> Option<Vec<u8>> {
    let name = descriptor["digest"].as_str().unwrap_or_default();
    let blob = report.ok("blob.is-there", blobs.blob(name).ok_or(name.to_owned()))?;
    report.hold("blob.has-its-digest", digest(&blob) == name, || name.to_owned());
    report.hold("blob.has-its-size", descriptor["size"] == blob.len(), || {
        descriptor["size"].to_string()
    });
    Some(blob)
}

fn check_layer<B: Blobs + ?Sized>(
    blobs: &B,
    layer: &Value,
    diff_id: &str,
    family: usize,
    report: &mut Report,
) -> Option<Stacked> {
    let note =
        |key: &str| layer["annotations"][format!("{SNAPSHOT}/{key}")].as_str().unwrap_or_default();
    let blob = fetch(blobs, layer, report)?;
    report.hold("annotation.blob-digest", layer["digest"] == note("blob-digest"), || {
        note("blob-digest").into()
    });
    report.hold("annotation.blob-size", note("blob-size") == blob.len().to_string(), || {
        note("blob-size").into()
    });
    let turbo = !note("turbo-oci/target-digest").is_empty();
    let version = if turbo { "0.1.0-turbo.ociv1" } else { "0.1.0" };
    report.hold("annotation.version", note("version") == version, || note("version").into());
    if !turbo {
        report.hold("layer.native-is-a-tar", layer["mediaType"] == TAR_TYPES[family], || {
            layer["mediaType"].to_string()
        });
        report.hold("layer.native-diff-id-is-its-digest", diff_id == digest(&blob), || {
            diff_id.into()
        });
        let (layer, wrapped) = check_native(&blob, report)?;
        report.hold("layer.native-is-wrapped", wrapped != Wrapped::Bare, || "bare".into());
        return Some(Stacked { layer, target: None });
    }
    report.hold("layer.turbo-is-gzip", layer["mediaType"] == GZIP_TYPES[family], || {
        layer["mediaType"].to_string()
    });
    let target = report.ok(
        "annotation.target-is-in-the-repository",
        blobs
            .blob(note("turbo-oci/target-digest"))
            .ok_or(note("turbo-oci/target-digest").to_owned()),
    )?;
    let media_type = note("turbo-oci/target-media-type");
    let gzip = target.starts_with(&[0x1f, 0x8b]);
    // Upstream takes any layer that is not gzip for a bare tar, and refuses gzip without a gzip.meta.
    let right = if gzip || is_zstd(&target) { GZIP_TYPES } else { TAR_TYPES }.contains(&media_type);
    report.hold("annotation.target-media-type-is-of-the-content", right, || media_type.into());
    check_archive(&blob, &target, gzip, diff_id, report)
}

/// A layer file with all its data, wrapped or not.
pub fn check_native(file: &[u8], report: &mut Report) -> Option<(lsmt::Layer, Wrapped)> {
    let (inner, wrapped) = unwrap(file, report);
    if !report.hold("layer.native-is-a-zfile", zfile::is_zfile(inner), || "no magic".into()) {
        return None;
    }
    let (stream, _) = zfile::check(inner, false, report)?;
    Some((lsmt::check(stream, Made::Native, report)?, wrapped))
}

/// A TurboOCI layer archive.
fn check_archive(
    blob: &[u8],
    target: &[u8],
    gzip: bool,
    diff_id: &str,
    report: &mut Report,
) -> Option<Stacked> {
    let mut tar = Vec::new();
    let unpacked = flate2::read::GzDecoder::new(blob).read_to_end(&mut tar);
    report.ok("archive.is-gzip", unpacked)?;
    report.hold("archive.gzip-has-no-name-and-time", blob[3] == 0 && blob[4..8] == [0; 4], || {
        "header".into()
    });
    report.hold("archive.diff-id-is-of-its-tar", diff_id == digest(&tar), || diff_id.into());
    let members = members(&tar, report);
    let names: Vec<&str> = members.iter().map(|member| member.name.as_str()).collect();
    let get = |name: &str| {
        members.iter().find(|member| member.name == name).map(|member| &member.data[..])
    };
    let whole =
        if gzip { Some(report.ok("blob.is-whole-gzip", inflate::whole(target))?) } else { None };
    let one_member = whole.as_ref().is_some_and(|whole| whole.members.len() == 1);
    let expected: Vec<&str> = [
        ("ext4.fs.meta", true),
        (".turbo.ociv1", true),
        ("gzip.meta", one_member),
        ("turbobd.segments", true),
    ]
    .iter()
    .filter_map(|(name, there)| there.then_some(*name))
    .collect();
    report.hold("archive.members-and-their-order", names == expected, || format!("{names:?}"));
    report.hold("archive.marker-is-empty", get(".turbo.ociv1") == Some(b""), || "marker".into());
    if let Some(whole) = &whole {
        let meta = get("gzip.meta").and_then(|meta| check_meta(meta, target, whole, report));
        if let Some(sidecar) = get("turbobd.segments") {
            check_sidecar(sidecar, target, whole, meta.as_deref(), report);
        }
    }
    let tar = match whole {
        Some(whole) => whole.out,
        None if is_zstd(target) => report.ok("blob.is-whole-zstd", zstd::decode_all(target))?,
        None => target.to_vec(),
    };
    if let Some(sidecar) = get("turbobd.segments").filter(|_| !gzip) {
        check_segments(sidecar, target, &tar, 1 + u8::from(is_zstd(target)), report);
    }
    let layer = check_fs_meta(get("ext4.fs.meta")?, report)?;
    report.hold("lsmt.warp-gives-the-disks-size", layer.vsize > 0, || "0".into());
    Some(Stacked { layer, target: Some(tar) })
}

fn is_zstd(blob: &[u8]) -> bool {
    blob.starts_with(&[0x28, 0xb5, 0x2f, 0xfd])
}

/// The metadata of a TurboOCI layer: a bare ZFile.
pub fn check_fs_meta(file: &[u8], report: &mut Report) -> Option<lsmt::Layer> {
    if !report.hold("layer.fs-meta-is-a-bare-zfile", zfile::is_zfile(file), || "no magic".into()) {
        return None;
    }
    let (stream, _) = zfile::check(file, false, report)?;
    lsmt::check(stream, Made::Warp, report)
}

/// The layers of upstream's device configuration, whose files are below `folder`. A bare layer outside of a
/// TurboOCI image is upstream's old base layer.
pub fn check_config(folder: &Path, config: &Value, report: &mut Report) -> Vec<Stacked> {
    let mut stacked = Vec::new();
    for lower in config["lowers"].as_array().unwrap() {
        let read = |key: &str| Some(std::fs::read(folder.join(lower[key].as_str()?)).unwrap());
        let file = read("file").unwrap();
        let Some(target) = read("targetFile") else {
            let layer = if file.starts_with(b"ZFile") {
                zfile::check(&file, true, report)
                    .and_then(|(plain, _)| lsmt::check(plain, Made::Otherwise, report))
            } else {
                check_native(&file, report).map(|(layer, _)| layer)
            };
            stacked.extend(layer.map(|layer| Stacked { layer, target: None }));
            continue;
        };
        let tar = match read("gzipIndex") {
            None => target,
            Some(meta) => {
                let whole = inflate::whole(&target).unwrap();
                check_meta(&meta, &target, &whole, report);
                whole.out
            }
        };
        stacked
            .extend(check_fs_meta(&file, report).map(|layer| Stacked { layer, target: Some(tar) }));
    }
    stacked
}
