//! `turbobd rpull` with real containerd, against its overlayfs snapshotter: whatever the snapshotter is, the image is one
//! that containerd could have pulled itself.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use formats::oci::Digest;
use serde_json::{Value, json};

use crate::image::{
    self, Images, OCI_GZIP, OCI_INDEX, OCI_TAR, config_of, end, gzip, is_refusal, noise, tar_of,
};
use crate::machine::{self, run};
use crate::registry_double::{Access, Double, Fault};
use crate::serve::serve;
use crate::snapshotter_containers::{Host, PLUGIN, Published, program};
use crate::stack::{Release, Stack};

/// Repository of the images.
const REPOSITORY: &str = "team/app";

/// Three layers: a program, a text, and the text changed with noise beside it.
fn layers() -> Vec<(&'static str, Vec<u8>)> {
    vec![
        (OCI_GZIP, gzip(&program())),
        (OCI_GZIP, gzip(&tar_of(&[("etc/", b""), ("etc/text", b"first\n"), ("gone", b"x")]))),
        (
            OCI_TAR,
            tar_of(&[("etc/text", b"second\n"), (".wh.gone", b""), ("noise", &noise(1, 3 << 20))]),
        ),
    ]
}

/// A registry with the image `latest`, and its manifest.
fn registry() -> (Double, Value) {
    let images = Images::new();
    images.add("latest", &layers());
    let registry = Double::start();
    serve(&images, &registry, REPOSITORY);
    (registry, images.manifest("latest"))
}

fn name(registry: &Double) -> String {
    format!("{}/{REPOSITORY}:latest", registry.host())
}

/// Digests of the layers of a manifest.
fn blobs(manifest: &Value) -> Vec<String> {
    let layers = manifest["layers"].as_array().unwrap().iter();
    layers.map(|layer| layer["digest"].as_str().unwrap().to_owned()).collect()
}

/// `turbobd rpull` into a containerd.
fn rpull(stack: &Stack, args: &[&str]) -> Command {
    let mut command = image::turbobd();
    command.args(["rpull", "--snapshotter", "overlayfs", "--address"]).arg(stack.socket());
    command.args(args);
    command
}

/// Runs a pull that must succeed; returns its stderr.
#[track_caller]
fn pulled(stack: &Stack, args: &[&str]) -> String {
    let ended = end(&mut rpull(stack, args));
    assert_eq!(ended.code, Some(0), "{}\n{}", ended.stderr, stack.log());
    ended.stderr
}

/// Runs a pull that must fail in the common form.
#[track_caller]
fn refused(stack: &Stack, args: &[&str], needles: &[&str]) -> String {
    is_refusal(&end(&mut rpull(stack, args)), &["rpull"], needles)
}

/// Waits for an event of another process.
#[track_caller]
fn until(what: &str, happened: impl Fn() -> bool) {
    let begun = Instant::now();
    while !happened() {
        assert!(begun.elapsed() < Duration::from_secs(60), "waited in vain: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn an_image_pulled_by_rpull_runs_in_containerd() {
    machine::need_root();
    for release in Release::all() {
        let stack = Stack::start(&release, "");
        let (registry, manifest) = registry();
        let name = name(&registry);
        let told = pulled(&stack, &[&name]);
        assert!(told.contains("layers: 3 unpacked"), "{told}");
        assert!(stack.listed(&["images", "ls", "-q"]).contains(&name));
        let text = ["/busybox", "cat", "/etc/text"];
        assert_eq!(stack.run_container("overlayfs", &name, &text), "second");
        let files = ["/busybox", "ls", "/"];
        let files = stack.run_container("overlayfs", &name, &files);
        assert!(files.contains("noise") && !files.contains("gone"), "{files}");
        // containerd itself finds nothing missing, and its collection nothing to remove.
        let checked = run(stack.ctr().args(["images", "check", "--snapshotter", "overlayfs"]));
        assert!(checked.contains("complete (4/4)") && checked.contains("true"), "{checked}");
        let (content, snapshots) = (stack.blobs(), stack.snapshots("overlayfs"));
        assert!(blobs(&manifest).iter().all(|blob| content.contains(blob)));
        assert_eq!((content.len(), snapshots.len()), (5, 3));
        stack.collect();
        assert_eq!((stack.blobs(), stack.snapshots("overlayfs")), (content, snapshots));
        assert!(stack.listed(&["leases", "ls", "-q"]).is_empty(), "a lease is left");
        // All of it belongs to the image's name.
        run(stack.ctr().args(["images", "rm", "--sync", &name]));
        assert!(stack.blobs().is_empty() && stack.snapshots("overlayfs").is_empty());
    }
}

#[test]
fn a_second_rpull_asks_the_registry_for_the_tag_alone_and_containerd_for_no_change() {
    machine::need_root();
    for release in Release::all() {
        let stack = Stack::start(&release, "");
        let (registry, _) = registry();
        let name = name(&registry);
        pulled(&stack, &[&name]);
        registry.clear_log();
        let told = pulled(&stack, &[&name]);
        assert!(told.contains("3 there already; 0 B fetched"), "{told}");
        let asked: Vec<String> = registry.log().into_iter().map(|seen| seen.line).collect();
        assert_eq!(asked, [format!("GET /v2/{REPOSITORY}/manifests/latest")]);
        // What was removed is made again: here the snapshots' hold, the topmost snapshot and a blob.
        let config = stack.blobs().into_iter().find(|blob| {
            run(stack.ctr().args(["content", "get", blob])).starts_with("{\"architecture\"")
        });
        let config = config.unwrap();
        run(stack.ctr().args([
            "content",
            "label",
            &config,
            "containerd.io/gc.ref.snapshot.overlayfs=",
        ]));
        stack.collect();
        assert!(stack.snapshots("overlayfs").is_empty());
        let told = pulled(&stack, &[&name]);
        assert!(told.contains("3 unpacked; 0 B fetched"), "{told}");
        stack.collect();
        assert_eq!(stack.snapshots("overlayfs").len(), 3);
    }
}

#[test]
fn rpull_download_completes_what_push_needs() {
    machine::need_root();
    for release in Release::all() {
        let stack = Stack::start(&release, "");
        let (registry, manifest) = registry();
        let name = name(&registry);
        pulled(&stack, &[&name]);
        // As after a lazy pull: snapshots without their blobs.
        let layers = blobs(&manifest);
        for layer in &layers {
            run(stack.ctr().args(["content", "rm", layer]));
        }
        // Another registry than the image's own, which could take the layers from the image's repository.
        let elsewhere = Double::start();
        let target = format!("{}/team/copy:v1", elsewhere.host());
        let push = || {
            let mut ctr = stack.ctr();
            ctr.args(["images", "push", "--plain-http", &target, &name]);
            ctr.stdout(Stdio::null()).stderr(Stdio::null()).status().unwrap().success()
        };
        assert!(!push(), "containerd pushes what it has not");
        // Without the option the image counts as whole.
        assert!(pulled(&stack, &[&name]).contains("3 there already; 0 B fetched"));
        let told = pulled(&stack, &[&name, "--download"]);
        assert!(told.contains("3 there already") && !told.contains("; 0 B"), "{told}");
        assert!(push());
        let digest = manifest["layers"][2]["digest"].as_str().unwrap().parse::<Digest>().unwrap();
        assert!(elsewhere.blob("team/copy", &digest).is_some());
        let archive = stack.path().join("image.tar");
        run(stack.ctr().args(["images", "export"]).arg(&archive).arg(&name));
        assert!(fs::metadata(&archive).unwrap().len() > 3 << 20);
        stack.collect();
        let kept = stack.blobs();
        assert!(layers.iter().all(|layer| kept.contains(layer)), "what was completed is collected");
        assert!(pulled(&stack, &[&name, "--download"]).contains("3 there already; 0 B fetched"));
    }
}

/// Begins a pull whose last layer stops in the middle, and waits until containerd has a part of it.
fn stalled(stack: &Stack, registry: &Double, manifest: &Value) -> Child {
    let last = blobs(manifest).pop().unwrap();
    registry.fault(&format!("blobs/{last}"), Fault::StallAfter(2 << 20), 1);
    let mut command = rpull(stack, &[&name(registry)]);
    let child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    until("a part of the last layer", || {
        run(stack.ctr().args(["content", "active"])).contains("layer-")
            && stack.snapshots("overlayfs").len() >= 2
    });
    child
}

#[test]
fn a_killed_rpull_leaves_nothing_that_gc_keeps() {
    machine::need_root();
    for release in Release::all() {
        let stack = Stack::start(&release, "");
        let (registry, manifest) = registry();
        let mut child = stalled(&stack, &registry, &manifest);
        stack.collect();
        assert!(stack.snapshots("overlayfs").len() >= 2, "the lease does not hold");
        child.kill().unwrap();
        child.wait().unwrap();
        // The next pull, of whatever image, ends the dead one's lease.
        let other = Images::new();
        other.add("latest", &[(OCI_GZIP, gzip(&tar_of(&[("other", b"x")])))]);
        serve(&other, &registry, "team/other");
        pulled(&stack, &[&format!("{}/team/other:latest", registry.host())]);
        assert!(stack.listed(&["leases", "ls", "-q"]).is_empty());
        stack.collect();
        assert_eq!(stack.snapshots("overlayfs").len(), 1);
        let left = stack.blobs();
        assert_eq!(left.len(), 3, "{left:?}");
        assert!(!run(stack.ctr().args(["content", "active"])).contains("layer-"));
        // And the image can be pulled.
        pulled(&stack, &[&name(&registry)]);
    }
}

#[test]
fn an_interrupted_rpull_says_so_and_leaves_nothing() {
    machine::need_root();
    for release in Release::all() {
        let stack = Stack::start(&release, "");
        let (registry, manifest) = registry();
        for signal in ["INT", "TERM"] {
            let child = stalled(&stack, &registry, &manifest);
            run(Command::new("kill").args(["-s", signal, &child.id().to_string()]));
            let ended = child.wait_with_output().unwrap();
            let told = String::from_utf8(ended.stderr).unwrap();
            assert_eq!(ended.status.code(), Some(1), "{told}");
            assert_eq!(
                told,
                "turbobd: rpull: Interrupted; containerd removes what was pulled so far\n"
            );
            assert!(stack.listed(&["leases", "ls", "-q"]).is_empty());
            let (blobs, snapshots) = (stack.blobs(), stack.snapshots("overlayfs"));
            assert!(blobs.is_empty() && snapshots.is_empty(), "{blobs:?} {snapshots:?}");
        }
    }
}

#[test]
fn two_pulls_of_one_image_at_once_fetch_each_layer_once() {
    machine::need_root();
    for release in Release::all() {
        let stack = Stack::start(&release, "");
        let (registry, manifest) = registry();
        let name = name(&registry);
        // Long enough for the other to come: it then waits for the blobs of the first.
        registry.fault("/blobs/", Fault::Delay(Duration::from_millis(300)), 8);
        let pull = || {
            rpull(&stack, &[&name]).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
        };
        let both = [pull(), pull()].map(|child| child.wait_with_output().unwrap());
        for ended in both {
            assert!(ended.status.success(), "{}", String::from_utf8_lossy(&ended.stderr));
        }
        for layer in blobs(&manifest) {
            assert_eq!(registry.count(&format!("GET /v2/{REPOSITORY}/blobs/{layer}")), 1);
        }
        assert_eq!(
            stack.run_container("overlayfs", &name, &["/busybox", "cat", "/etc/text"]),
            "second"
        );
        assert_eq!(stack.snapshots("overlayfs").len(), 3);
    }
}

#[test]
fn a_private_image_of_several_platforms_is_pulled_with_its_name_by_digest() {
    machine::need_root();
    let release = Release::system();
    let stack = Stack::start(&release, "");
    let images = Images::new();
    let layers = layers();
    let mut own = images.image(&config_of(&layers), &layers);
    own["platform"] = json!({"os": "linux", "architecture": image::host_architecture()});
    let other_layers = [(OCI_GZIP, gzip(&tar_of(&[("other", b"x")])))];
    let mut other = images.image(&config_of(&other_layers), &other_layers);
    other["platform"] = json!({"os": "linux", "architecture": "s390x"});
    let index = json!({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [other, own]});
    let index = images.descriptor(OCI_INDEX, index.to_string().as_bytes());
    images.tag("latest", &index);
    let registry = Double::start();
    serve(&images, &registry, REPOSITORY);
    registry.set_access(Access::Basic("me:secret".to_owned()));
    let tagged = name(&registry);
    refused(&stack, &[&tagged], &["was denied", &registry.host()]);
    let digest = index["digest"].as_str().unwrap();
    let name = format!("{}/{REPOSITORY}@{digest}", registry.host());
    let mut pull = rpull(&stack, &["-u", "me", "--password-stdin", &name]);
    let mut child =
        pull.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    std::io::Write::write_all(&mut child.stdin.take().unwrap(), b"secret\n").unwrap();
    let ended = child.wait_with_output().unwrap();
    assert!(ended.status.success(), "{}", String::from_utf8_lossy(&ended.stderr));
    assert_eq!(String::from_utf8(ended.stdout).unwrap().trim_end(), digest);
    assert_eq!(
        stack.run_container("overlayfs", &name, &["/busybox", "cat", "/etc/text"]),
        "second"
    );
    // The index, the manifest of this platform, its config and its layers; nothing of the other platform.
    let content: BTreeSet<String> = stack.blobs();
    assert_eq!(content.len(), 6);
    assert!(!content.contains(other["digest"].as_str().unwrap()));
    stack.collect();
    assert_eq!(stack.blobs(), content);
}

#[test]
fn a_pull_that_cannot_be_says_what_to_do_and_leaves_nothing() {
    machine::need_root();
    let release = Release::system();
    let more =
        "[proxy_plugins.gone]\n  type = \"snapshot\"\n  address = \"/nonexistent/gone.sock\"\n";
    let stack = Stack::start(&release, more);
    let (registry, manifest) = registry();
    let name = name(&registry);
    let with = |snapshotter: &str, address: &Path| {
        let mut command = image::turbobd();
        command.args(["rpull", "--snapshotter", snapshotter, "--address"]).arg(address).arg(&name);
        command
    };
    let nowhere = stack.path().join("nowhere");
    is_refusal(
        &end(&mut with("overlayfs", &nowhere)),
        &["rpull"],
        &["No containerd answers at", "nowhere", "--address", "No such file"],
    );
    // Something listens that is no containerd.
    let silent = stack.path().join("silent");
    let _listener = std::os::unix::net::UnixListener::bind(&silent).unwrap();
    let begun = Instant::now();
    is_refusal(&end(&mut with("overlayfs", &silent)), &["rpull"], &["No containerd answers at"]);
    assert!(begun.elapsed() < Duration::from_secs(20));
    is_refusal(
        &end(&mut with("overlaybd", &stack.socket())),
        &["rpull"],
        &["has no snapshotter overlaybd", "[proxy_plugins.overlaybd]", "config.toml"],
    );
    is_refusal(
        &end(&mut with("gone", &stack.socket())),
        &["rpull"],
        &["does not reach its snapshotter gone", "start it"],
    );
    refused(&stack, &[&format!("{}/{REPOSITORY}:none", registry.host())], &["none"]);

    // A registry that lies about a layer.
    let layers = blobs(&manifest);
    let lied: Digest = layers[1].parse().unwrap();
    let truth = registry.blob(REPOSITORY, &lied).unwrap();
    let mut lie = truth.to_vec();
    lie[20] ^= 1;
    registry.add_lie(REPOSITORY, &lied, &lie);
    refused(&stack, &[&name], &["is damaged", &layers[1]]);
    registry.add_blob(REPOSITORY, &truth);
    // An image that lies about what is in a layer.
    let images = Images::new();
    let honest = self::layers();
    let config = config_of(&[(OCI_TAR, b"another tar".to_vec())]);
    images.tag("liar", &images.image(&config, &honest[1..2]));
    serve(&images, &registry, REPOSITORY);
    refused(
        &stack,
        &[&format!("{}/{REPOSITORY}:liar", registry.host())],
        &["another tar", &layers[1]],
    );
    images.tag("short", &images.image(&config, &honest[..2]));
    serve(&images, &registry, REPOSITORY);
    let short = format!("{}/{REPOSITORY}:short", registry.host());
    refused(&stack, &[&short], &["it has 2 layers, and its config lists 1"]);

    assert!(stack.listed(&["leases", "ls", "-q"]).is_empty());
    stack.collect();
    let (content, snapshots) = (stack.blobs(), stack.snapshots("overlayfs"));
    assert!(content.is_empty() && snapshots.is_empty(), "{content:?} {snapshots:?}");
    // The reference of the damaged blob is no obstacle.
    pulled(&stack, &[&name]);
}

/// A host with our snapshotter, and a containerd that has no setting for lazy pulls.
fn host(release: &Release) -> Host {
    Host::with_stack(&json!({}), |plugin| Stack::start(release, plugin))
}

/// Pulls with our snapshotter; returns what is told.
#[track_caller]
fn pulled_lazily(host: &Host, args: &[&str]) -> String {
    let mut command = image::turbobd();
    command.args(["rpull", "--address"]).arg(host.stack.socket()).args(args);
    let ended = end(&mut command);
    assert_eq!(ended.code, Some(0), "{}\n{}", ended.stderr, host.log());
    ended.stderr
}

#[test]
fn an_image_of_each_kind_is_pulled_lazily_whatever_containerd_is_set_to() {
    machine::need_root();
    let Some(published) = Published::new() else { return };
    for release in Release::all() {
        let host = host(&release);
        for (tag, outcome) in
            [("latest", "3 lazy; 0 B"), ("native", "3 lazy; 0 B"), ("turbo", "3 unpacked")]
        {
            let image = published.name(tag);
            let told = pulled_lazily(&host, &[&image]);
            assert!(told.contains(outcome), "{tag}: {told}{}", host.log());
            assert_eq!(host.text(&image), "second", "{tag}: {}", host.log());
            assert!(pulled_lazily(&host, &[&image]).contains("3 there already; 0 B"), "{tag}");
        }
        let (fetched, lazy) =
            (host.stack.blobs(), ["latest", "native"].map(|tag| published.layers(tag)));
        assert!(
            lazy.iter().flatten().all(|layer| !fetched.contains(layer)),
            "a lazy layer was fetched"
        );
        assert_eq!(host.devices().len(), 3, "{:#?}", host.devices());
        host.stack.collect();
        assert_eq!(
            host.text(&published.name("native")),
            "second",
            "what an image needs is collected"
        );
    }
}

#[test]
fn rpull_download_completes_a_lazy_image_for_push_and_for_another_snapshotter() {
    machine::need_root();
    let Some(published) = Published::new() else { return };
    for release in Release::all() {
        let host = host(&release);
        for tag in ["latest", "native"] {
            let image = published.name(tag);
            pulled_lazily(&host, &[&image]);
            let archive = host.stack.path().join(format!("{tag}.tar"));
            let export = || {
                let mut ctr = host.stack.ctr();
                ctr.args(["images", "export"]).arg(&archive).arg(&image);
                end(&mut ctr).code
            };
            assert_ne!(export(), Some(0), "containerd exports what it has not");
            let told = pulled_lazily(&host, &[&image, "--download"]);
            assert!(told.contains("3 there already") && !told.contains("; 0 B"), "{told}");
            assert_eq!(export(), Some(0));
            let copy = format!("{}:copy", image.rsplit_once(':').unwrap().0);
            run(host.stack.ctr().args(["images", "push", "--plain-http", &copy, &image]));
            assert_eq!(host.text(&image), "second");
        }
        // The plain image is one for containerd's own snapshotter too.
        let image = published.name("latest");
        let mut other = image::turbobd();
        other.args(["rpull", "--snapshotter", "overlayfs", "--address"]).arg(host.stack.socket());
        let told = end(other.arg(&image)).stderr;
        assert!(told.contains("3 unpacked; 0 B fetched"), "{told}");
        let text = ["/busybox", "cat", "/etc/text"];
        assert_eq!(host.stack.run_container("overlayfs", &image, &text), "second");
        assert_eq!(host.stack.run_container(PLUGIN, &image, &text), "second");
    }
}
