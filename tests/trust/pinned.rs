//! An image named by digest shows what its layers contain, whatever meta image lies beside it.
//!
//! The forged meta image here is one whose file system was made from another image: it fits the plain image by every
//! digest and annotation, and shows a file `bin/evil` where the layers have `bin/good`. Which of the two a name shows
//! is told by the digest of the disk.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use formats::oci::Digest;
use registry::store::{ImageStore as _, LayoutStore};
use serde_json::{Value, json};

use crate::image::{
    Images, OCI_CONFIG, OCI_GZIP, OCI_INDEX, OCI_MANIFEST, done, end, gunzip, gzip, members_of,
    prose, tar_of, turbobd,
};
use crate::registry_double::{Double, Fault};
use crate::run_dir::RunDir;
use crate::serve::serve;

const META: &str = "application/vnd.containerd.overlaybd.turbo.v1+json";
const BUNDLE: &str = "application/vnd.dev.sigstore.bundle.v0.3+json";
const SIMPLE_SIGNING: &str = "application/vnd.dev.cosign.simplesigning.v1+json";

/// What a name shows.
#[derive(Debug, PartialEq, Eq)]
enum Shown {
    /// What the layers contain.
    Good,
    /// What the forged meta image says.
    Forged,
    /// Nothing; the error.
    Refused(String),
}

/// A plain image and a forged meta image of it, in a registry.
struct Scene {
    images: Images,
    registry: Double,
    host: tempfile::TempDir,
    good: String,
    forged: String,
}

impl Scene {
    fn new() -> Self {
        let layer = |name: &str| {
            gzip(&tar_of(&[("bin/", b""), (name, b"#!/bin/sh\n"), ("big", &prose(3, 3 << 20))]))
        };
        let images = Images::new();
        images.add("latest", &[(OCI_GZIP, layer("bin/good"))]);
        images.add("other", &[(OCI_GZIP, layer("bin/evil"))]);
        let place = images.place();
        for (plain, meta) in [("latest", "turbo"), ("other", "evil")] {
            done(&["convert", "-r", &place, "-i", plain, "--turboOCI", meta]);
        }
        let is_fs = |(name, _): &(String, Vec<u8>)| name == "ext4.fs.meta";
        let evil = members_of(&gunzip(&images.blob(&images.layer("evil", 0))));
        let evil = evil.into_iter().find(is_fs).unwrap();
        images.forge("forged", 0, |members| {
            *members.iter_mut().find(|one| is_fs(one)).unwrap() = evil
        });
        let shown = |tag| done(&["export", &images.name(tag), "--digest"]);
        let (good, forged) = (shown("turbo"), shown("forged"));
        assert_ne!(good, forged);
        let host = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        Self { images, registry: Double::start(), host, good, forged }
    }

    fn plain(&self) -> String {
        self.images.tagged("latest")["digest"].as_str().unwrap().to_owned()
    }

    /// The forged manifest as a referrer of the plain image.
    fn referrer(&self) -> Vec<u8> {
        let mut manifest = self.images.manifest("forged");
        let plain = self.images.tagged("latest");
        manifest["subject"] =
            json!({"mediaType": OCI_MANIFEST, "digest": plain["digest"], "size": plain["size"]});
        manifest["artifactType"] = META.into();
        manifest["mediaType"] = OCI_MANIFEST.into();
        manifest.to_string().into_bytes()
    }

    /// A repository with the plain image and all blobs, and the forged meta image beside it in this way. Returns its name,
    /// and the digest of the meta image.
    fn beside(&self, way: Way) -> (String, String) {
        let repository = format!("team/{}", format!("{way:?}").to_lowercase());
        serve(&self.images, &self.registry, &repository);
        let add = |tag: &str, media_type: &str, bytes: &[u8]| {
            self.registry.add_manifest(&repository, tag, media_type, bytes).to_string()
        };
        let forged = self.referrer();
        let digest = Digest::of(&forged).to_string();
        let entry = json!({
            "mediaType": OCI_MANIFEST, "digest": digest, "size": forged.len(), "artifactType": META
        });
        match way {
            Way::Nothing => {}
            Way::Referrer => drop(add(&digest, OCI_MANIFEST, &forged)),
            Way::Fallback => {
                let asked = format!("/v2/{repository}/referrers/");
                self.registry.fault(&asked, Fault::Status(404), u32::MAX);
                add(&digest, OCI_MANIFEST, &forged);
                add(&self.plain().replace(':', "-"), OCI_INDEX, &index(&[entry]));
            }
            Way::Suffix => {
                // Without a subject, so that nothing but the tag leads to it.
                let mut manifest: Value = serde_json::from_slice(&forged).unwrap();
                manifest.as_object_mut().unwrap().remove("subject");
                let digest = add("latest_turbo", OCI_MANIFEST, manifest.to_string().as_bytes());
                return (self.name(&repository), digest);
            }
            Way::Index => {
                add(&digest, OCI_MANIFEST, &forged);
                self.registry.fault(
                    &format!("/v2/{repository}/referrers/"),
                    Fault::Status(404),
                    u32::MAX,
                );
                add("latest", OCI_INDEX, &self.both());
            }
        }
        (self.name(&repository), digest)
    }

    /// An index that lists the plain image and the forged meta image.
    fn both(&self) -> Vec<u8> {
        let forged = self.referrer();
        let mut plain = self.images.tagged("latest");
        plain.as_object_mut().unwrap().remove("annotations");
        plain["platform"] =
            json!({"architecture": crate::image::host_architecture(), "os": "linux"});
        let digest = Digest::of(&forged).to_string();
        let meta = json!({
            "mediaType": OCI_MANIFEST, "digest": digest, "size": forged.len(), "artifactType": META,
            "platform": {"architecture": "unknown", "os": "unknown"},
        });
        index(&[plain, meta])
    }

    fn name(&self, repository: &str) -> String {
        format!("{}/{repository}", self.registry.host())
    }

    /// Where this host keeps its meta images.
    fn meta_dir(&self) -> PathBuf {
        self.host.path().join("meta")
    }

    /// What a name shows on a host that has built nothing yet.
    fn shows(&self, name: &str, own: &Value) -> Shown {
        let _ = fs::remove_dir_all(self.meta_dir());
        self.still_shows(name, own)
    }

    /// What a name shows now, with these keys of `turbobd` in the configuration.
    fn still_shows(&self, name: &str, own: &Value) -> Shown {
        let mut own = own.clone();
        own["metaDir"] = self.meta_dir().to_str().unwrap().into();
        let service = self.host.path().join("service.json");
        let quiet = json!({
            "cacheConfig": {"cacheSizeGB": 0}, "gzipCacheConfig": {"enable": false}, "turbobd": own
        });
        fs::write(&service, quiet.to_string()).unwrap();
        let mut command = turbobd();
        let ended =
            end(command.args(["export", name, "--digest", "--service-config"]).arg(&service));
        match ended.stdout.trim_end() {
            "" => Shown::Refused(ended.stderr),
            shown if shown == self.good => Shown::Good,
            shown if shown == self.forged => Shown::Forged,
            other => panic!("{name}: {other} {}", ended.stderr),
        }
    }
}

/// How a meta image lies beside the plain image.
#[derive(Clone, Copy, Debug)]
enum Way {
    Nothing,
    Referrer,
    Fallback,
    Suffix,
    Index,
}

const WAYS: [Way; 4] = [Way::Referrer, Way::Fallback, Way::Suffix, Way::Index];

fn index(entries: &[Value]) -> Vec<u8> {
    json!({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries})
        .to_string()
        .into_bytes()
}

fn trust(policy: &str) -> Value {
    json!({ "metaTrust": policy })
}

/// A key pair of `openssl`, which signs as cosign does.
struct Pair {
    dir: tempfile::TempDir,
}

impl Pair {
    /// A new pair, or the reason on stderr why there is none.
    fn make() -> Option<Self> {
        if Command::new("openssl").arg("version").stdout(Stdio::null()).status().is_err() {
            let text = "signatures not checked: apt install openssl";
            let required = std::env::var_os("TURBOBD_REQUIRE_ALL").is_some_and(|all| all == "1");
            assert!(!required, "{text}");
            eprintln!("{text}");
            return None;
        }
        let pair = Self { dir: tempfile::tempdir().unwrap() };
        let curve = ["ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", "key"];
        pair.openssl(&curve);
        pair.openssl(&["ec", "-in", "key", "-pubout", "-out", "cosign.pub"]);
        Some(pair)
    }

    fn openssl(&self, arguments: &[&str]) {
        let done = Command::new("openssl").args(arguments).current_dir(self.dir.path()).output();
        let done = done.unwrap();
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    }

    fn public(&self) -> PathBuf {
        self.dir.path().join("cosign.pub")
    }

    fn sign(&self, bytes: &[u8]) -> String {
        fs::File::create(self.dir.path().join("text")).unwrap().write_all(bytes).unwrap();
        self.openssl(&["dgst", "-sha256", "-sign", "key", "-out", "signature", "text"]);
        BASE64.encode(fs::read(self.dir.path().join("signature")).unwrap())
    }

    /// Signs as cosign 2 does.
    fn simple(&self, registry: &Double, repository: &str, digest: &str) {
        let text = json!({"critical": {
            "identity": {"docker-reference": format!("registry.example/{repository}")},
            "image": {"docker-manifest-digest": digest},
            "type": "cosign container image signature"
        }, "optional": null})
        .to_string();
        let config = b"{}";
        let manifest = json!({
            "schemaVersion": 2, "mediaType": OCI_MANIFEST,
            "config": blob(registry, repository, OCI_CONFIG, config),
            "layers": [{
                "annotations": {"dev.cosignproject.cosign/signature": self.sign(text.as_bytes())},
                "mediaType": SIMPLE_SIGNING,
                "digest": registry.add_blob(repository, text.as_bytes()).to_string(),
                "size": text.len(),
            }],
        });
        let tag = format!("{}.sig", digest.replace(':', "-"));
        registry.add_manifest(repository, &tag, OCI_MANIFEST, manifest.to_string().as_bytes());
    }

    /// Signs as cosign 3 does.
    fn bundle(&self, registry: &Double, repository: &str, digest: &str) {
        let payload = json!({
            "_type": "https://in-toto.io/Statement/v1",
            "subject": [{"digest": {"sha256": digest.trim_start_matches("sha256:")}}],
            "predicateType": "https://sigstore.dev/cosign/sign/v1",
            "predicate": {},
        })
        .to_string();
        let kind = "application/vnd.in-toto+json";
        let signed = format!("DSSEv1 {} {kind} {} {payload}", kind.len(), payload.len());
        let bundle = json!({
            "mediaType": BUNDLE,
            "verificationMaterial": {"publicKey": {"hint": "any"}},
            "dsseEnvelope": {
                "payload": BASE64.encode(&payload), "payloadType": kind,
                "signatures": [{"sig": self.sign(signed.as_bytes())}],
            },
        })
        .to_string();
        let manifest = json!({
            "schemaVersion": 2, "mediaType": OCI_MANIFEST, "artifactType": BUNDLE,
            "config": blob(registry, repository, "application/vnd.oci.empty.v1+json", b"{}"),
            "layers": [blob(registry, repository, BUNDLE, bundle.as_bytes())],
            "subject": {"mediaType": OCI_MANIFEST, "digest": digest, "size": 1},
        })
        .to_string();
        let own = Digest::of(manifest.as_bytes()).to_string();
        registry.add_manifest(repository, &own, OCI_MANIFEST, manifest.as_bytes());
    }
}

fn blob(registry: &Double, repository: &str, media_type: &str, bytes: &[u8]) -> Value {
    let digest = registry.add_blob(repository, bytes).to_string();
    json!({"mediaType": media_type, "digest": digest, "size": bytes.len()})
}

fn repository_of(name: &str) -> &str {
    name.split_once('/').unwrap().1
}

#[test]
fn a_reference_by_digest_shows_what_the_layers_contain_whatever_lies_beside_it() {
    let scene = Scene::new();
    for way in [&WAYS[..], &[Way::Nothing]].concat() {
        let (name, _) = scene.beside(way);
        for reference in
            [format!("{name}@{}", scene.plain()), format!("{name}:latest@{}", scene.plain())]
        {
            assert_eq!(scene.shows(&reference, &json!({})), Shown::Good, "{way:?} {reference}");
            assert_eq!(
                scene.shows(&reference, &trust("signed")),
                Shown::Good,
                "{way:?} {reference}"
            );
        }
    }
    // The policy that asks for nothing shows what is beside it: the forgery would be seen.
    let (name, _) = scene.beside(Way::Referrer);
    let pinned = format!("{name}@{}", scene.plain());
    assert_eq!(scene.shows(&pinned, &trust("any")), Shown::Forged);
}

#[test]
fn a_tag_is_what_its_repository_says_and_under_signed_what_the_layers_contain() {
    let scene = Scene::new();
    for way in WAYS {
        let (name, _) = scene.beside(way);
        let tag = format!("{name}:latest");
        for (policy, shown) in
            [("verify", Shown::Forged), ("any", Shown::Forged), ("signed", Shown::Good)]
        {
            assert_eq!(scene.shows(&tag, &trust(policy)), shown, "{way:?} {policy}");
        }
    }
}

#[test]
fn a_meta_image_that_is_named_is_used_and_under_signed_only_with_a_signature() {
    let scene = Scene::new();
    let (name, digest) = scene.beside(Way::Referrer);
    let both = scene.both();
    scene.registry.add_manifest(repository_of(&name), "both", OCI_INDEX, &both);
    for reference in [format!("{name}@{digest}"), format!("{name}:forged")] {
        assert_eq!(scene.shows(&reference, &trust("verify")), Shown::Forged, "{reference}");
        let Shown::Refused(error) = scene.shows(&reference, &trust("signed")) else {
            panic!("{reference} is shown unsigned");
        };
        assert!(error.contains("turbobd.metaKeys") && error.contains("cosign"), "{error}");
    }
    // Who names the index by digest names both; unsigned, the image is built.
    let index = format!("{name}@{}", Digest::of(&both));
    assert_eq!(scene.shows(&index, &trust("verify")), Shown::Forged);
    assert_eq!(scene.shows(&index, &trust("signed")), Shown::Good);
}

#[test]
fn an_index_by_digest_pins_only_what_it_lists() {
    let scene = Scene::new();
    let (name, _) = scene.beside(Way::Referrer);
    let mut plain = scene.images.tagged("latest");
    plain.as_object_mut().unwrap().remove("annotations");
    let other = json!({"architecture": "riscv64", "os": "linux"});
    let mut foreign = plain.clone();
    foreign["platform"] = other;
    plain["platform"] = json!({"architecture": crate::image::host_architecture(), "os": "linux"});
    let two = index(&[foreign, plain]);
    scene.registry.add_manifest(repository_of(&name), "two", OCI_INDEX, &two);
    let pinned = format!("{name}@{}", Digest::of(&two));
    assert_eq!(scene.shows(&pinned, &json!({})), Shown::Good);
    assert_eq!(scene.shows(&format!("{name}:two"), &json!({})), Shown::Forged);
}

#[test]
fn a_signature_by_a_listed_key_vouches_for_a_meta_image_in_both_forms_of_cosign() {
    let (Some(ours), Some(others)) = (Pair::make(), Pair::make()) else { return };
    let keys = |policy: &str| json!({"metaTrust": policy, "metaKeys": [ours.public()]});
    for form in [Pair::simple, Pair::bundle] {
        let scene = Scene::new();
        let (name, digest) = scene.beside(Way::Referrer);
        let repository = repository_of(&name);
        let references = [
            format!("{name}@{}", scene.plain()),
            format!("{name}:latest"),
            format!("{name}@{digest}"),
        ];
        form(&others, &scene.registry, repository, &digest);
        assert_eq!(scene.shows(&references[0], &keys("verify")), Shown::Good);
        assert_eq!(scene.shows(&references[1], &keys("signed")), Shown::Good);
        assert!(matches!(scene.shows(&references[2], &keys("signed")), Shown::Refused(_)));
        // A signature of the plain image says nothing about the meta image.
        form(&ours, &scene.registry, repository, &scene.plain());
        assert_eq!(scene.shows(&references[0], &keys("verify")), Shown::Good);
        form(&ours, &scene.registry, repository, &digest);
        for reference in &references {
            for policy in ["verify", "signed"] {
                let shown = scene.shows(reference, &keys(policy));
                assert_eq!(shown, Shown::Forged, "{reference} {policy}");
            }
        }
    }
}

#[test]
fn a_signature_of_an_index_covers_the_meta_image_that_it_lists() {
    let Some(ours) = Pair::make() else { return };
    let scene = Scene::new();
    let (name, _) = scene.beside(Way::Index);
    let keys = json!({"metaTrust": "signed", "metaKeys": [ours.public()]});
    assert_eq!(scene.shows(&format!("{name}:latest"), &keys), Shown::Good);
    let index = Digest::of(&scene.both()).to_string();
    ours.simple(&scene.registry, repository_of(&name), &index);
    assert_eq!(scene.shows(&format!("{name}:latest"), &keys), Shown::Forged);
}

/// Puts the forged meta image into a layout under the tag that the local store uses.
fn plant(scene: &Scene, dir: &Path) {
    let store = LayoutStore::open_or_create(dir).unwrap();
    let forged = scene.referrer();
    let manifest: Value = serde_json::from_slice(&forged).unwrap();
    for part in manifest["layers"].as_array().unwrap().iter().chain([&manifest["config"]]) {
        store.put_blob(&scene.images.blob(part["digest"].as_str().unwrap())).unwrap();
    }
    let tag = scene.plain().replace(':', "-");
    store.put_manifest(Some(&tag), OCI_MANIFEST, &forged).unwrap();
}

#[test]
fn a_meta_image_in_the_hosts_store_counts_only_if_this_host_built_it() {
    let scene = Scene::new();
    let (name, _) = scene.beside(Way::Nothing);
    for reference in [format!("{name}@{}", scene.plain()), format!("{name}:latest")] {
        for (policy, shown) in
            [("verify", Shown::Good), ("signed", Shown::Good), ("any", Shown::Forged)]
        {
            let _ = fs::remove_dir_all(scene.meta_dir());
            plant(&scene, &scene.meta_dir());
            let seen = scene.still_shows(&reference, &trust(policy));
            assert_eq!(seen, shown, "{reference} {policy}");
        }
    }
}

#[test]
fn what_a_tag_showed_decides_nothing_for_a_digest_and_what_was_built_stays() {
    let scene = Scene::new();
    let (name, _) = scene.beside(Way::Referrer);
    let (tag, pinned) = (format!("{name}:latest"), format!("{name}@{}", scene.plain()));
    assert_eq!(scene.shows(&tag, &json!({})), Shown::Forged);
    assert_eq!(scene.still_shows(&pinned, &json!({})), Shown::Good);
    // The second time nothing is built, and the tag shows what was built too.
    scene.registry.clear_log();
    assert_eq!(scene.still_shows(&pinned, &json!({})), Shown::Good);
    assert_eq!(scene.still_shows(&tag, &json!({})), Shown::Good);
    let layer = scene.images.layer("latest", 0);
    let is_stream = |line: &str, range: &Option<String>| line.contains(&layer) && range.is_none();
    let log = scene.registry.log();
    assert!(!log.iter().any(|seen| is_stream(&seen.line, &seen.range)), "{log:?}");
}

#[test]
fn a_layout_by_digest_shows_what_the_layers_contain_too() {
    let scene = Scene::new();
    let images = &scene.images;
    let forged = scene.referrer();
    images.put(&forged);
    let entry = images.descriptor(OCI_MANIFEST, &forged);
    images.tag("anything", &entry);
    let place = images.place();
    assert_eq!(scene.shows(&format!("{place}:latest"), &json!({})), Shown::Forged);
    for pinned in
        [format!("{place}@{}", scene.plain()), format!("{place}:latest@{}", scene.plain())]
    {
        assert_eq!(scene.shows(&pinned, &json!({})), Shown::Good, "{pinned}");
    }
}

#[test]
fn a_key_file_that_cannot_be_used_is_named_at_the_start() {
    let scene = Scene::new();
    let (name, _) = scene.beside(Way::Nothing);
    let own = json!({"metaKeys": [scene.host.path().join("missing.pub")]});
    let Shown::Refused(error) = scene.shows(&format!("{name}:latest"), &own) else {
        panic!("it is shown");
    };
    assert!(error.contains("turbobd.metaKeys") && error.contains("missing.pub"), "{error}");
    let unknown = json!({"metaTrust": "maybe"});
    let Shown::Refused(error) = scene.shows(&format!("{name}:latest"), &unknown) else {
        panic!("it is shown");
    };
    assert!(error.contains("verify, signed or any"), "{error}");
}

#[test]
fn check_tells_a_meta_image_that_does_not_show_what_its_layers_contain() {
    let scene = Scene::new();
    let images = &scene.images;
    let checked = done(&["check", &images.name("turbo")]);
    assert!(checked.ends_with("contents: those of the layers"), "{checked}");
    for more in [&[][..], &["--data"]] {
        let name = images.name("forged");
        let args = [&["check", &name], more].concat();
        let ended = end(turbobd().args(&args));
        assert_eq!(ended.code, Some(1), "{args:?}: {}", ended.stdout);
        for part in ["does not show what its layers contain", "bin/good", "bin/evil"] {
            assert!(ended.stderr.contains(part), "{args:?}: no {part} in {}", ended.stderr);
        }
    }
}

#[test]
fn check_compares_files_and_not_bytes_if_another_converter_made_the_meta_image() {
    let images = Images::sample();
    let place = images.place();
    // Other checkpoints, and so other archives.
    let convert = ["convert", "-r", &place, "-i", "latest", "--turboOCI", "other", "--vsize", "2"];
    done(&[&convert[..], &["--span", "4096"]].concat());
    let checked = done(&["check", &images.name("other")]);
    assert!(checked.ends_with("contents: those of the layers"), "{checked}");
    // Upstream's own meta image of its sample, with its own file system.
    let stored = |name: &str| {
        fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/interop/blobs").join(name))
            .unwrap()
    };
    let images = Images::new();
    images.add("latest", &[(OCI_GZIP, stored("base.tar.gz")), (OCI_GZIP, stored("upper.tar.gz"))]);
    images.convert(&[]);
    for number in 0..2 {
        let member = |end: &str| stored(&format!("turbooci-2-gz-L{number}-{end}"));
        images.forge("turbo", number, |members| {
            let upstream =
                [("ext4.fs.meta", member("ext4.fs.meta")), ("gzip.meta", member("gzip.meta"))];
            *members = upstream.map(|(name, bytes)| (name.to_owned(), bytes)).into();
        });
    }
    let checked = done(&["check", &images.name("turbo")]);
    assert!(checked.ends_with("contents: those of the layers"), "{checked}");
}

/// A daemon that fetches whole layers, and so compares.
struct Host {
    run: RunDir,
    service: PathBuf,
}

impl Host {
    fn new() -> Self {
        let run = RunDir::new();
        let service = run.at("service.json");
        let keep = |name: &str| run.at(name).to_str().unwrap().to_owned();
        let config = json!({
            "cacheConfig": {"cacheDir": keep("encoded")},
            "gzipCacheConfig": {"cacheDir": keep("decoded")},
            "logConfig": {"logPath": keep("log")},
            "turbobd": {"metaDir": keep("meta"), "traces": {"enable": false}},
        });
        fs::write(&service, config.to_string()).unwrap();
        Self { run, service }
    }

    fn turbobd(&self, args: &[&str]) -> Command {
        let mut command = self.run.turbobd(args);
        command.env("TURBOBD_SERVICE_CONFIG", &self.service);
        command
    }

    fn attach(&self, name: &str) {
        let mut attach = self.turbobd(&["attach", name, "--frontend", "loop", "--mount"]);
        let ended = end(attach.arg(self.run.mnt()));
        assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    }

    fn detach(&self) {
        let ended = end(self.turbobd(&["detach"]).arg(self.run.mnt()));
        assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    }

    /// Waits until a metric is 1.
    fn until(&self, metric: &str) {
        let begun = Instant::now();
        loop {
            let page = end(&mut self.turbobd(&["ls", "--metrics"])).stdout;
            if page.lines().any(|line| line == format!("{metric} 1")) {
                return;
            }
            let seen: Vec<_> = page.lines().filter(|line| line.contains("turbobd_meta")).collect();
            assert!(begun.elapsed() < Duration::from_secs(60), "{metric}: {seen:?}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

#[test]
fn a_forged_meta_image_beside_a_tag_is_found_out_and_its_reads_fail() {
    let scene = Scene::new();
    let (name, _) = scene.beside(Way::Referrer);
    let (host, tag) = (Host::new(), format!("{name}:latest"));
    host.attach(&tag);
    assert!(host.run.mnt().join("bin/evil").exists());
    host.until("turbobd_meta_different_total");
    let read = fs::read(host.run.mnt().join("big")).unwrap_err();
    assert_eq!(read.raw_os_error(), Some(libc::EIO), "{read}");
    let log = fs::read_to_string(host.run.at("log")).unwrap();
    let told = log.lines().find(|line| line.contains("does not show what its layers contain"));
    assert!(told.is_some_and(|line| line.contains("bin/evil")), "{log}");
    host.detach();
    // What was built for the comparison is what a new device shows, by tag and by digest.
    for name in [tag, format!("{name}@{}", scene.plain())] {
        host.attach(&name);
        assert!(host.run.mnt().join("bin/good").exists(), "{name}");
        assert_eq!(fs::read(host.run.mnt().join("big")).unwrap(), prose(3, 3 << 20), "{name}");
        host.detach();
    }
}

#[test]
fn a_meta_image_beside_a_digest_is_compared_with_what_was_built_and_changes_nothing() {
    let scene = Scene::new();
    let (name, forged) = scene.beside(Way::Referrer);
    let (host, pinned) = (Host::new(), format!("{name}@{}", scene.plain()));
    host.attach(&pinned);
    host.until("turbobd_meta_different_total");
    let log = fs::read_to_string(host.run.at("log")).unwrap();
    let told = log.lines().find(|line| line.contains("does not show what its layers contain"));
    assert!(told.is_some_and(|line| line.contains("bin/evil") && line.contains(&forged)), "{log}");
    // The device shows what was built, and goes on.
    assert!(host.run.mnt().join("bin/good").exists());
    assert_eq!(fs::read(host.run.mnt().join("big")).unwrap(), prose(3, 3 << 20));
    host.detach();
    // The image that was built is found first from now on, and nothing is left to compare.
    host.attach(&pinned);
    host.until("turbobd_meta_different_total");
    assert_eq!(fs::read(host.run.mnt().join("big")).unwrap(), prose(3, 3 << 20));
    host.detach();
}

#[test]
fn an_honest_meta_image_beside_a_tag_is_compared_and_read_on() {
    let scene = Scene::new();
    let (name, _) = scene.beside(Way::Nothing);
    let repository = repository_of(&name);
    let turbo = scene.images.manifest("turbo").to_string();
    let media_type = scene.images.manifest("turbo")["mediaType"].as_str().unwrap().to_owned();
    scene.registry.add_manifest(repository, "latest_turbo", &media_type, turbo.as_bytes());
    let host = Host::new();
    host.attach(&format!("{name}:latest"));
    host.until("turbobd_meta_equal_total");
    assert_eq!(fs::read(host.run.mnt().join("big")).unwrap(), prose(3, 3 << 20));
    host.detach();
    let layer: Digest = scene.images.layer("latest", 0).parse().unwrap();
    let size = scene.images.blob(&layer.to_string()).len();
    // Once for the fill, which keeps it decoded, and once for the comparison.
    let (_, sent) = scene.registry.traffic(&layer);
    assert!(sent < size * 5 / 2, "{sent} bytes were sent of a layer of {size}");
    let end = end(&mut host.turbobd(&["ls", "--metrics"])).stdout;
    assert!(end.contains("turbobd_meta_different_total 0"), "{end}");
}

/// Part of `scripts/cosign-tests` alone, which builds cosign: `TURBOBD_COSIGN` lists the programs.
#[cfg(feature = "cosign-tests")]
#[test]
fn the_signatures_of_cosign_itself_count() {
    let programs = std::env::var_os("TURBOBD_COSIGN").expect("TURBOBD_COSIGN is set");
    for program in std::env::split_paths(&programs) {
        // A registry with the list of referrers, and one without.
        for without in [false, true] {
            let scene = Scene::new();
            let (name, digest) = scene.beside(Way::Suffix);
            if without {
                let repository = repository_of(&name);
                let asked = format!("/v2/{repository}/referrers/");
                scene.registry.fault(&asked, Fault::Status(404), u32::MAX);
            }
            let dir = scene.host.path();
            let cosign = |args: &[&str]| {
                let mut command = Command::new(&program);
                command.args(args).current_dir(dir).env("COSIGN_PASSWORD", "").env("HOME", dir);
                let ended = end(&mut command);
                assert_eq!(ended.code, Some(0), "cosign {args:?}: {}", ended.stderr);
                ended.stdout + &ended.stderr
            };
            cosign(&["generate-key-pair"]);
            let keys = json!({"metaTrust": "signed", "metaKeys": [dir.join("cosign.pub")]});
            let tag = format!("{name}:latest");
            assert_eq!(scene.shows(&tag, &keys), Shown::Good);
            let image = format!("{name}@{digest}");
            let is_3 = cosign(&["version"]).contains("v3.");
            if is_3 {
                cosign(&["signing-config", "create", "--out", "none.json"]);
                let config = ["--signing-config", "none.json"];
                cosign(
                    &[&["sign", "--yes", "--key", "cosign.key"], &config[..], &[&image]].concat(),
                );
            } else {
                let log = "--tlog-upload=false";
                cosign(&["sign", "--yes", "--key", "cosign.key", log, &image]);
            }
            assert_eq!(scene.shows(&tag, &keys), Shown::Forged, "{program:?} {without}");
        }
    }
}
