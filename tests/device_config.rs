//! Files of upstream's tools, and upstream's device configurations that name them, read by the real program.
//!
//! Forms without a file in `interop/` are created here by a writer that is based on the specification alone
//! (`checker/writer.rs`): sealed, sparse and merged layers, ZFiles of every kind, wrapped or not, and erofs.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use crate::block;
use crate::checker::field;
use crate::erofs;
use crate::image;
use std::fs;
use std::path::PathBuf;
use std::process::Command;

use crate::checker::writer::{
    NOBODY, Way, ZFileOptions, entry, layer, wrap_pax, wrap_ustar, zfile,
};
use crate::image::{
    Images, OCI_GZIP, OCI_TAR, done, end, gzip, is_refusal, noise, refused, tar_of, turbobd,
};
use crate::registry_double::{Access, Double};
use crate::run_dir::RunDir;
use crate::serve::serve;
use blobs::cache::Cache;
use disk::config::{self, Purpose};
use disk::image::IndexedTargets;
use formats::oci::Digest;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

const MIB: u64 = 1 << 20;

/// A folder with a `config.v1.json` and its layers.
struct Device(tempfile::TempDir);

impl Device {
    fn new() -> Self {
        Self(tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap())
    }

    fn path(&self) -> PathBuf {
        self.0.path().join("config.v1.json")
    }

    fn write(&self, name: &str, bytes: &[u8]) {
        let path = self.0.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }

    fn config(&self, config: &Value) {
        self.write("config.v1.json", config.to_string().as_bytes());
    }

    /// A configuration of these layer files, lowest first.
    fn stack(&self, files: &[Vec<u8>]) {
        let lowers: Vec<Value> = files
            .iter()
            .enumerate()
            .map(|(number, file)| {
                self.write(&format!("layer{number}"), file);
                json!({"file": format!("layer{number}")})
            })
            .collect();
        self.config(&json!({"lowers": lowers}));
    }

    fn export(&self) -> String {
        done(&["export", "--config", self.path().to_str().unwrap(), "--digest"])
    }

    #[track_caller]
    fn refused(&self, needles: &[&str]) {
        let path = self.path();
        refused(&["export", "--config", path.to_str().unwrap(), "--digest"], needles);
    }
}

/// The expected output of `export --digest` for this disk.
fn content(disk: &[u8]) -> String {
    let mut hasher = Sha256::new();
    for (number, block) in disk.chunks(4096).enumerate() {
        if block.iter().any(|&byte| byte != 0) {
            hasher.update((number as u64 * 4096).to_le_bytes());
            hasher.update(block);
        }
    }
    format!("content_sha256={} vsize={}", field::hex(&hasher.finalize()), disk.len())
}

/// A layer of 100 sectors from sector 16 on, with the resulting disk.
fn sample(way: Way) -> (Vec<u8>, Vec<u8>) {
    let data = noise(9, 100 * 512);
    let mut disk = vec![0; MIB as usize];
    disk[16 * 512..116 * 512].copy_from_slice(&data);
    let (payload, entries) = match way {
        // A sparse file holds sector n at byte 4096 + 512 n.
        Way::SealedSparse => {
            ([vec![0; 16 * 512], data].concat(), vec![entry(16, 100, 24, false, 0)])
        }
        // A merge keeps the numbers of the layers as tags, and its entries do not continue each other.
        Way::Merged => (
            data,
            vec![
                entry(16, 40, 8, false, 3),
                entry(56, 60, 48, false, 7),
                entry(200, 9, 108, true, 2),
            ],
        ),
        _ => (data, vec![entry(16, 100, 8, false, 0)]),
    };
    (layer(way, &payload, &entries, MIB, NOBODY), disk)
}

#[test]
fn layers_of_every_origin_read_alike_in_every_wrapping() {
    let device = Device::new();
    for way in [Way::Committed, Way::Sealed, Way::SealedSparse, Way::Merged] {
        let (stream, disk) = sample(way);
        let mut forms = vec![stream.clone()];
        for algo in [1, 2] {
            for block_size in [4, 8, 16, 32, 64] {
                for verify in [true, false] {
                    let options = ZFileOptions { algo, block_size: block_size << 10, verify };
                    forms.push(zfile(&stream, &options));
                }
            }
        }
        // One process a form takes most of the time: all wrappings of some, and some of all.
        for (number, form) in forms.iter().enumerate() {
            let wrapped = match number % 3 {
                0 => form.clone(),
                1 => wrap_pax(form),
                _ => wrap_ustar(form),
            };
            device.stack(&[wrapped]);
            assert_eq!(device.export(), content(&disk), "{way:?}, form {number}");
        }
        for wrapped in [wrap_pax(&stream), wrap_ustar(&stream)] {
            device.stack(&[wrapped]);
            assert_eq!(device.export(), content(&disk), "{way:?}, uncompressed in tar");
        }
    }
}

#[test]
fn an_upper_layer_hides_adds_and_may_leave_the_size_to_the_lower_one() {
    let device = Device::new();
    let (lower, mut disk) = sample(Way::Sealed);
    let data = noise(10, 8 * 512);
    let entries =
        [entry(20, 30, 8, true, 0), entry(60, 8, 8, false, 0), entry(2000, 40, 12, true, 0)];
    let upper = layer(Way::Committed, &data, &entries, 0, NOBODY);
    disk[20 * 512..50 * 512].fill(0);
    disk[60 * 512..68 * 512].copy_from_slice(&data);
    device.stack(&[
        lower,
        wrap_pax(&zfile(&upper, &ZFileOptions { algo: 2, block_size: 16 << 10, verify: true })),
    ]);
    assert_eq!(device.export(), content(&disk));
}

#[test]
fn as_many_layers_as_upstream_stacks_and_no_more() {
    let device = Device::new();
    let one = |number: u64| {
        let entries = [entry(number * 2, 1, 8, false, 0)];
        layer(Way::Committed, &[(number as u8).wrapping_add(1); 512], &entries, MIB, NOBODY)
    };
    let mut layers: Vec<_> = (0..255).map(one).collect();
    let mut disk = vec![0; MIB as usize];
    for number in 0..255 {
        disk[number * 1024..number * 1024 + 512].fill(number as u8 + 1);
    }
    device.stack(&layers);
    assert_eq!(device.export(), content(&disk));
    layers.push(one(255));
    device.stack(&layers);
    device.refused(&["Key lowers of", "at most 255 layers"]);
}

const A: &str = "AAAAAAAA-0000-4000-8000-000000000001";
const B: &str = "BBBBBBBB-0000-4000-8000-000000000002";
const C: &str = "CCCCCCCC-0000-4000-8000-000000000003";

#[test]
fn a_stack_with_a_gap_a_cycle_or_in_the_wrong_order_is_refused_by_name() {
    let device = Device::new();
    let nobody = NOBODY.0;
    let stack = |identities: &[(&str, &str)]| {
        let layers: Vec<_> = identities
            .iter()
            .map(|identity| {
                layer(Way::Committed, &[1; 512], &[entry(0, 1, 8, false, 0)], MIB, *identity)
            })
            .collect();
        device.stack(&layers);
    };
    stack(&[(A, nobody), (B, A), (C, B)]);
    device.export();
    // A layer without identity may be at any place.
    stack(&[(A, nobody), NOBODY, (C, B)]);
    device.export();
    stack(&[(A, nobody), (C, B)]);
    device.refused(&[
        "Layer 1",
        "is not in its place",
        &format!("it was made on {B}, and lies on {A}"),
    ]);
    stack(&[(B, A), (C, B)]);
    device.refused(&["Layer 0", &format!("it was made on {A}, and no layer is below it")]);
    stack(&[(A, nobody), (B, A), (A, B)]);
    device.refused(&["Layer 2", "is that of layer 0 too"]);
    stack(&[(A, A)]);
    device.refused(&["Layer 0"]);
}

#[test]
fn a_damaged_layer_is_refused_with_the_rule_that_it_breaks() {
    let device = Device::new();
    let make = |entries: &[[u8; 16]]| layer(Way::Committed, &[1; 1024], entries, MIB, NOBODY);
    let good = make(&[entry(0, 2, 8, false, 0)]);
    let mut damaged: Vec<(&str, Vec<u8>, &[&str])> = Vec::new();
    damaged.push((
        "past the disk",
        make(&[entry(2047, 2, 8, false, 0)]),
        &["Layer 0", "the disk ends at byte 1048576"],
    ));
    damaged.push((
        "outside",
        make(&[entry(0, 3, 8, false, 0)]),
        &["points outside the layer's payload"],
    ));
    damaged.push((
        "before",
        make(&[entry(0, 1, 7, false, 0)]),
        &["points outside the layer's payload"],
    ));
    let overlapping = [entry(0, 2, 8, false, 0), entry(1, 1, 8, false, 0)];
    damaged.push(("order", make(&overlapping), &["begins before the end"]));
    damaged.push(("empty", make(&[entry(5, 0, 8, false, 0)]), &["it has no sectors"]));
    let change = |at: i64, bytes: &[u8]| {
        let mut file = good.clone();
        let at = if at < 0 { file.len() - at.unsigned_abs() as usize } else { at as usize };
        file[at..at + bytes.len()].copy_from_slice(bytes);
        file
    };
    damaged.push(("magic", change(3, b"X"), &["Header", "magic"]));
    damaged.push(("trailer", change(-4096, b"X"), &["Trailer", "magic"]));
    damaged.push(("unsealed", change(-4068, &[2]), &["Trailer", "sealed"]));
    damaged.push(("many", change(-4056, &1_000_001_u64.to_le_bytes()), &["1000001 index entries"]));
    damaged.push(("index", change(-4064, &u64::MAX.to_le_bytes()), &["does not lie between"]));
    damaged.push(("size", change(-4048, &u64::MAX.to_le_bytes()), &["cannot have"]));
    damaged.push(("short", good[..5000].to_vec(), &["at least 8192 bytes"]));
    let packed = zfile(&good, &ZFileOptions { algo: 1, block_size: 4096, verify: true });
    let flipped = |at: usize| {
        let mut file = packed.clone();
        file[at] ^= 0x10;
        file
    };
    damaged.push(("block", flipped(515), &["checksum"]));
    damaged.push(("header digest", flipped(400), &["Header"]));
    let mut cut = packed.clone();
    cut.truncate(packed.len() - 100);
    damaged.push(("cut", cut, &["Trailer"]));
    damaged.push(("nothing", b"not a layer at all".to_vec(), &["at least 8192 bytes"]));
    for (what, file, needles) in damaged {
        println!("{what}");
        device.stack(&[file]);
        device.refused(needles);
    }
}

#[test]
fn a_malformed_configuration_is_refused_by_its_key() {
    let device = Device::new();
    let (file, _) = sample(Way::Committed);
    device.write("layer", &file);
    device.write("packed", &gzip(&file));
    for (config, needles) in [
        (json!([]), &["Key (all)", "must be an object"][..]),
        (json!({"lowers": []}), &["Key lowers", "at least one layer"]),
        (json!({"lowers": {"file": "layer"}}), &["Key lowers", "must be an array"]),
        (json!({"lowers": [{"file": 5}]}), &["Key lowers[0].file", "must be a string"]),
        (json!({"lowers": [{"file": "none"}]}), &["Layer 0", "none of its local files exists"]),
        (json!({"lowers": [{}]}), &["Layer 0", "neither file, dir nor digest"]),
        (json!({"lowers": [{"digest": "md5:1"}]}), &["Key lowers[0].digest"]),
        (
            json!({"lowers": [{"digest": Digest::of(b"x").to_string()}]}),
            &["Key repoBlobUrl", "no registry is given"],
        ),
        (
            json!({"repoBlobUrl": "ftp://x", "lowers": [{"digest": Digest::of(b"x").to_string()}]}),
            &["Cannot reach the layer", "https://host/v2/<name>/blobs"],
        ),
        (
            json!({"lowers": [{"file": "layer"}], "accelerationLayer": true, "recordTracePath": "t"}),
            &["Key accelerationLayer", "cannot be combined with recordTracePath"],
        ),
        (
            json!({"lowers": [{"file": "layer"}], "download": 5}),
            &["Key download", "must be an object"],
        ),
        (
            json!({"lowers": [{"file": "layer"}], "download": {"maxMBps": "fast"}}),
            &["Key download.maxMBps", "whole number"],
        ),
        (
            json!({"lowers": [{"file": "layer", "targetFile": "packed"}]}),
            &["Layer 0 (packed)", "there is no gzipIndex"],
        ),
    ] {
        device.config(&config);
        device.refused(needles);
    }
    device.write("config.v1.json", b"{");
    device.refused(&["it is not a JSON object"]);
}

/// An image of a native layer and a TurboOCI layer in a registry, with the files that a snapshotter would
/// have unpacked beside the configuration.
fn remote(device: &Device, registry: &Double) -> (Value, String) {
    let images = Images::new();
    images.add("latest", &[(OCI_GZIP, gzip(&image::lower())), (OCI_TAR, image::upper())]);
    images.convert(&[]);
    serve(&images, registry, "team/app");
    let mut lowers = Vec::new();
    for number in 0..2 {
        let archive = image::gunzip(&images.blob(&images.layer("turbo", number)));
        for (name, bytes) in image::members_of(&archive) {
            device.write(&format!("{number}/fs/{name}"), &bytes);
        }
        let mut lower = json!({
            "dir": format!("{number}/fs"), "file": format!("{number}/fs/ext4.fs.meta"),
            "targetDigest": images.layer("latest", number)
        });
        if number == 0 {
            lower["gzipIndex"] = "0/fs/gzip.meta".into();
        }
        lowers.push(lower);
    }
    let native = noise(11, 8 * 512);
    let entries = [entry(1000, 8, 8, false, 0)];
    let native = wrap_pax(&layer(Way::Committed, &native, &entries, 0, NOBODY));
    let digest = registry.add_blob("team/app", &native).to_string();
    lowers.push(json!({"dir": "2/fs", "digest": digest, "size": native.len()}));
    device.write("local", &native);
    let url = format!("{}/v2/team/app/blobs", registry.base_url());
    let remote = json!({"repoBlobUrl": url, "lowers": lowers});
    // The disk from local files alone.
    let mut local = remote.clone();
    for (number, lower) in local["lowers"].as_array_mut().unwrap().iter_mut().enumerate() {
        match number {
            2 => *lower = json!({"file": "local"}),
            _ => {
                device.write(
                    &format!("target{number}"),
                    &images.blob(&images.layer("latest", number)),
                );
                lower["targetFile"] = format!("target{number}").into();
            }
        }
    }
    local["repoBlobUrl"] = "".into();
    device.config(&local);
    (remote, device.export())
}

#[test]
fn blobs_that_are_not_here_come_from_the_registry_that_the_configuration_names() {
    let (device, registry) = (Device::new(), Double::start());
    let (config, expected) = remote(&device, &registry);
    registry.set_access(Access::Open);
    device.config(&config);
    assert_eq!(device.export(), expected);
    assert!(registry.count("/blobs/") > 0);
    // With the slash that upstream's snapshotter may append.
    let mut slashed = config.clone();
    slashed["repoBlobUrl"] = format!("{}/", config["repoBlobUrl"].as_str().unwrap()).into();
    device.config(&slashed);
    assert_eq!(device.export(), expected);
    // A layer that upstream has downloaded is not fetched.
    device.write("2/fs/overlaybd.commit", &fs::read(device.0.path().join("local")).unwrap());
    registry.clear_log();
    device.config(&config);
    assert_eq!(device.export(), expected);
    let digest = config["lowers"][2]["digest"].as_str().unwrap();
    assert_eq!(registry.count(digest), 0);
}

#[test]
fn credentials_for_a_device_configuration_are_those_of_this_host() {
    let (device, registry) = (Device::new(), Double::start());
    let (config, expected) = remote(&device, &registry);
    registry.set_access(Access::Basic("u:p".into()));
    device.config(&config);
    let path = device.path();
    let path = path.to_str().unwrap();
    let service = device.0.path().join("service.json");
    let auths = json!({"auths": {registry.host(): {"username": "u", "password": "p"}}});
    device.write("cred.json", auths.to_string().as_bytes());
    let credentials =
        json!({"credentialConfig": {"mode": "file", "path": device.0.path().join("cred.json")}});
    fs::write(&service, credentials.to_string()).unwrap();
    let args = ["export", "--config", path, "--digest"];
    let without = end(turbobd().args(args));
    is_refusal(&without, &args, &["Cannot reach the layer"]);
    let with = end(turbobd().args(args).arg("--service-config").arg(&service));
    assert_eq!(with.stdout.trim_end(), expected, "{}", with.stderr);
}

#[test]
fn the_result_file_says_how_the_device_was_come_by() {
    let (device, host) = (Device::new(), RunDir::new());
    let (file, disk) = sample(Way::Committed);
    device.write("layer", &file);
    let attach = |config: &Value| {
        device.config(config);
        end(host.turbobd(&["attach", "--frontend", "loop", "--config"]).arg(device.path()))
    };
    let result = || fs::read_to_string(device.0.path().join("init-debug.log")).unwrap();
    let ended = attach(&json!({"lowers": [{"file": "none"}], "resultFile": "init-debug.log"}));
    assert_eq!(ended.code, Some(1));
    assert!(result().starts_with("failed:Layer 0 (none) is incomplete"), "{}", result());
    let ended = attach(
        &json!({"lowers": [{"file": "layer"}], "resultFile": "init-debug.log", "upper": {"vsize": 64}}),
    );
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    assert_eq!(result(), "success");
    let bytes = fs::read(ended.stdout.trim_end()).unwrap();
    assert!(bytes == disk, "the device has other bytes");
    let detached = end(&mut host.turbobd(&["detach", ended.stdout.trim_end()]));
    assert_eq!(detached.code, Some(0), "{}", detached.stderr);
}

#[test]
fn an_acceleration_layer_is_a_trace_and_no_layer() {
    let device = Device::new();
    let (file, disk) = sample(Way::Committed);
    device.write("layer", &file);
    device.write("trace/trace", b"what is no trace is passed over");
    let config =
        json!({"lowers": [{"file": "layer"}, {"dir": "trace"}], "accelerationLayer": true});
    device.config(&config);
    assert_eq!(device.export(), content(&disk));
    device.config(&json!({"lowers": [{"file": "layer"}], "recordTracePath": "none", "download": {"enable": true, "delay": 3}}));
    assert_eq!(device.export(), content(&disk));
}

#[test]
fn a_list_of_files_is_a_trace_of_reading_them() {
    let file = |seed, len| noise(seed, len);
    let (big, one, two, other) = (file(1, 700_000), file(2, 5000), file(3, 9000), file(4, 300_000));
    let mut files = tar_of(&[
        ("other", &other),
        ("lib/big", &big),
        ("dir/", b""),
        ("dir/one", &one),
        ("dir/sub/two", &two),
    ]);
    files.truncate(files.len() - 1024); // more follows
    let mut tar = tar::Builder::new(files);
    let mut link = tar::Header::new_ustar();
    link.set_entry_type(tar::EntryType::Symlink);
    link.set_size(0);
    tar.append_link(&mut link, "usr", "lib").unwrap();
    tar.append_link(&mut link, "loop", "/loop").unwrap();
    let tar = tar.into_inner().unwrap();
    let images = Images::new();
    images.add("latest", &[(OCI_TAR, tar.clone())]);
    images.convert(&[]);

    let device = Device::new();
    for (name, bytes) in image::members_of(&image::gunzip(&images.blob(&images.layer("turbo", 0))))
    {
        device.write(&name, &bytes);
    }
    device.write("layer.tar", &tar);
    device.config(&json!({
        "lowers": [{"file": "ext4.fs.meta", "targetFile": "layer.tar"}],
        "recordTracePath": "list",
    }));
    let listed = |list: &str| {
        device.write("list", list.as_bytes());
        let cache = Cache::new(16 << 20, 2);
        config::open_all(&device.path(), cache, &IndexedTargets, Purpose::Read).unwrap().trace
    };
    // Each touch is a range of the tar; whole blocks, as files have them on the disk.
    let bytes = |list: &str| -> Vec<u8> {
        let touches = listed(list).unwrap().touches;
        let range = |at: u64, len: u64| at as usize..tar.len().min((at + len) as usize);
        touches.iter().flat_map(|touch| tar[range(touch.start, touch.len)].to_vec()).collect()
    };
    let begins_with = |got: &[u8], file: &[u8]| {
        let whole = file.len().next_multiple_of(512);
        assert!(got.starts_with(file), "{} bytes", got.len());
        got[whole.min(got.len())..].to_vec()
    };
    let rest = begins_with(&bytes("/usr/../usr/big\n\n /dir/one \n/absent\n/loop\n"), &big);
    assert!(begins_with(&rest, &one).is_empty());
    // A directory alone is not a file; with a slash or a star it stands for everything below.
    assert!(bytes("/dir\n").is_empty());
    for list in ["/dir/\n", "/dir/*"] {
        let rest = begins_with(&bytes(list), &one);
        assert!(begins_with(&rest, &two).is_empty());
    }
    // A file that is not a list is skipped, and the image starts all the same.
    let too_long = "/other\n".repeat(10_000);
    for none in ["relative\n", "/fine\nrelative\n", "\u{1}", &too_long] {
        assert!(listed(none).is_none(), "{none:.20}");
        assert!(device.export().contains("content_sha256="));
    }
}

#[test]
fn erofs_metadata_is_exported_and_mounted() {
    let data = noise(12, 10_000);
    let images = Images::new();
    let tar = tar_of(&[("hello", &data)]);
    for (kind, blob) in [(OCI_TAR, tar.clone()), (OCI_GZIP, gzip(&tar))] {
        images.add("latest", &[(kind, blob)]);
        images.convert(&[]);
        let meta = erofs::one_file("hello", data.len() as u32);
        let disk_size = 16 * MIB;
        // Metadata in blocks 0 to 2; the file's whole sectors from the tar at 512, as upstream maps them.
        let sectors = (data.len() as u64).div_ceil(512);
        let entries = [entry(0, 24, 8, false, 0), entry(24, sectors, 1, false, 1)];
        let fs_meta = layer(Way::Warp, &meta, &entries, disk_size, NOBODY);
        let fs_meta = zfile(&fs_meta, &ZFileOptions { algo: 1, block_size: 4096, verify: true });
        images.forge("erofs", 0, |members| members[0] = ("erofs.fs.meta".into(), fs_meta.clone()));
        let mut disk = meta;
        disk.extend(&data);
        disk.resize(disk_size as usize, 0);
        let name = images.name("erofs");
        assert_eq!(done(&["export", &name, "--digest"]), content(&disk));
        done(&["check", &name, "--data"]);
        mount_and_compare(&name, &data);
    }
    // With both, ext4 is used; with neither, the error has both names.
    let before = done(&["export", &images.name("turbo"), "--digest"]);
    images.forge("both", 0, |members| members.insert(0, ("erofs.fs.meta".into(), b"x".to_vec())));
    assert_eq!(done(&["export", &images.name("both"), "--digest"]), before);
    images.forge("none", 0, |members| drop(members.remove(0)));
    refused(
        &["export", &images.name("none"), "--digest"],
        &["has no ext4.fs.meta, only .turbo.ociv1"],
    );
}

/// Built in, or loaded.
fn kernel_has_erofs() -> bool {
    let _ = Command::new("modprobe").args(["--quiet", "erofs"]).status();
    fs::read_to_string("/proc/filesystems").unwrap().contains("erofs")
}

#[test]
fn erofs_is_mounted_in_a_guest() {
    block::in_a_guest(kernel_has_erofs(), module_path!(), &["erofs_metadata"], 1);
}

/// Mounts an erofs image by way of a loop device, and reads `hello`.
fn mount_and_compare(name: &str, data: &[u8]) {
    let host = RunDir::new();
    let place = host.mnt();
    if !kernel_has_erofs() {
        println!("SKIPPED here: erofs_is_mounted_in_a_guest does it");
        return;
    }
    let attach = ["attach", name, "--frontend", "loop", "--mount", place.to_str().unwrap()];
    let ended = end(&mut host.turbobd(&attach));
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    let read = fs::read(place.join("hello"));
    let detached = end(&mut host.turbobd(&["detach", place.to_str().unwrap()]));
    assert_eq!(detached.code, Some(0), "{}", detached.stderr);
    assert!(read.unwrap() == data, "the file has other bytes");
}
