//! Traces by the real program: recorded, learned, kept, replayed; and upstream's traces, read.

use crate::image;
use crate::machine;
use crate::registry_double::real;
use std::fs;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::block::alone;
use crate::image::{Ended, Images, OCI_GZIP, OCI_TAR, end, gzip, prose, tar_of};
use crate::registry_double::Double;
use crate::run_dir::RunDir;
use crate::serve::serve;
use blobs::trace::upstream;
use formats::oci::Digest;
use formats::trace::Trace;
use serde_json::{Value, json};

/// A run directory, with learned traces in a folder of it.
struct Host(RunDir);

impl Host {
    fn new() -> Self {
        machine::need_root();
        let dir = RunDir::new();
        let config = json!({
            "cacheConfig": {"cacheSizeGB": 0}, "gzipCacheConfig": {"enable": false},
            "download": {"enable": false},
            "turbobd": {"traces": {"enable": true, "dir": dir.at("traces")}},
        });
        fs::write(dir.at("service.json"), config.to_string()).unwrap();
        Self(dir)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.at(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }

    fn turbobd(&self, args: &[&str]) -> Command {
        let mut command = self.0.turbobd(args);
        command.env("TURBOBD_SERVICE_CONFIG", self.path("service.json"));
        command
    }

    #[track_caller]
    fn done(&self, args: &[&str]) -> Ended {
        let ended = end(&mut self.turbobd(args));
        assert_eq!(ended.code, Some(0), "turbobd {args:?}: {}", ended.stderr);
        ended
    }

    #[track_caller]
    fn refused(&self, args: &[&str], needles: &[&str]) {
        image::is_refusal(&end(&mut self.turbobd(args)), args, needles);
    }

    /// Attaches and mounts at `mnt`.
    #[track_caller]
    fn mount(&self, name: &str) -> String {
        let line =
            self.done(&["attach", name, "--frontend", "loop", "--mount", &self.text("mnt")]).stdout;
        line.split(' ').next().unwrap().to_owned()
    }

    /// Reads page 100 of a file past the page cache.
    fn read_page(&self, file: u64) {
        let input = format!("if={}", self.path(&format!("mnt/file{file}")).display());
        let args = [&input, "bs=4096", "skip=100", "count=1", "iflag=direct", "status=none"];
        let read = Command::new("dd").args(args).output().unwrap();
        let whole = prose(file, 2 << 20);
        assert_eq!(read.stdout, whole[100 * 4096..101 * 4096]);
    }

    fn learned(&self) -> Vec<Trace> {
        let entries = fs::read_dir(self.path("traces")).map(Iterator::collect::<Vec<_>>);
        let paths = entries.unwrap_or_default().into_iter().map(|entry| entry.unwrap().path());
        paths.map(|path| Trace::parse(&fs::read(path).unwrap()).unwrap()).collect()
    }
}

/// An image of one layer with files of 2 MiB, converted with a span in KiB.
fn files(spans: &[(&str, &str)]) -> Images {
    let images = Images::new();
    let contents: Vec<_> = (0..6).map(|seed| prose(seed, 2 << 20)).collect();
    let names: Vec<_> = (0..6).map(|number| format!("file{number}")).collect();
    let members = names.iter().map(String::as_str).zip(contents.iter().map(Vec::as_slice));
    images.add("latest", &[(OCI_GZIP, gzip(&tar_of(&members.collect::<Vec<_>>())))]);
    for (tag, span) in spans {
        images.convert(&["--span", span]);
        images.tag(tag, &images.tagged("turbo"));
    }
    images
}

fn wait(what: impl Fn() -> bool) {
    let start = Instant::now();
    while !what() {
        assert!(start.elapsed() < Duration::from_secs(20), "it does not come");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn the_second_start_has_what_the_first_read_before_it_reads_by_another_index_too() {
    let _alone = alone();
    let host = Host::new();
    let images = files(&[("fine", "128"), ("coarse", "512")]);
    let registry = Double::start();
    serve(&images, &registry, "team/app");
    let target: Digest = images.layer("latest", 0).parse().unwrap();
    let name = |tag: &str| format!("{}/team/app:{tag}", registry.host());
    host.mount(&name("fine"));
    assert_eq!(registry.traffic(&target), (0, 0), "nothing is known yet");
    // Single pages, so that only the trace fetches ahead: neither the kernel nor the cache.
    let read = || [0, 3, 5].iter().for_each(|&file| host.read_page(file));
    read();
    host.done(&["detach", &host.text("mnt")]);
    let [trace] = &host.learned()[..] else { panic!("one image, one trace") };
    assert_eq!((trace.starts, &trace.blobs[..]), (1, &[target][..]));
    assert!((1..6).contains(&trace.touches.len()), "{:?}", trace.touches);
    host.done(&["daemon", "--stop"]);

    registry.clear_log();
    host.mount(&name("coarse"));
    // Until no more bytes arrive.
    let fetched = || registry.traffic(&target).1;
    wait(|| {
        let before = fetched();
        std::thread::sleep(Duration::from_millis(500));
        before > 0 && fetched() == before
    });
    let bytes = fetched();
    read();
    assert_eq!(fetched(), bytes, "it was fetched before it was read");
    host.done(&["detach", &host.text("mnt")]);
    let [trace] = &host.learned()[..] else { panic!("it is the same image") };
    assert_eq!(trace.starts, 2);
}

#[test]
fn a_command_in_an_image_a_device_and_what_was_recorded() {
    let _alone = alone();
    let host = Host::new();
    let images = files(&[("turbo", "128")]);
    let out = host.text("out.trace");
    let device = host.mount(&images.name("turbo"));
    // Reads from now on, of a device that is served already.
    let head = host.path("mnt/file1");
    let read = format!("cat {}", head.display());
    host.done(&["trace", "record", &device, "-o", &out, "--", "sh", "-c", &read]);
    let trace = Trace::parse(&fs::read(&out).unwrap()).unwrap();
    assert!((2 << 20..4 << 20).contains(&trace.bytes()), "{}", trace.bytes());
    let shown: Value =
        serde_json::from_str(&host.done(&["trace", "show", &out, "--json"]).stdout).unwrap();
    assert_eq!(shown["blobs"][0], images.layer("latest", 0));
    assert_eq!(shown["touches"].as_array().unwrap().len(), trace.touches.len());
    assert!(host.done(&["trace", "show", &out]).stdout.starts_with("SECONDS"));
    // A good trace is not replaced by accident, and never by that of a command that failed.
    host.refused(&["trace", "record", &device, "-o", &out, "--", "true"], &[&out, "--force"]);
    let failed = ["trace", "record", &device, "-f", "-o", &out, "--", "false"];
    host.refused(&failed, &["exit status: 1", &out, "the trace of before"]);
    assert_eq!(Trace::parse(&fs::read(&out).unwrap()).unwrap().touches, trace.touches);
    // `record` returns the command's exit status; its trace is kept where there was none.
    let second = host.text("second.trace");
    let ended = end(&mut host.turbobd(&["trace", "record", &device, "-o", &second, "--", "false"]));
    assert_eq!(ended.code, Some(1));
    assert!(ended.stderr.contains("exit status: 1"), "{}", ended.stderr);
    assert_eq!(Trace::parse(&fs::read(&second).unwrap()).unwrap().touches, []);
    let nowhere = ["trace", "record", "/dev/loop9999", "-o", &host.text("third.trace")];
    host.refused(&nowhere, &["/dev/loop9999", "turbobd ls"]);
    let third = host.text("third.trace");
    host.refused(&["trace", "record", &images.name("none"), "-o", &third], &["no image \"none\""]);
    assert!(!Path::new(&third).exists());
    fs::write(&out, b"turbotrc\x09\0").unwrap();
    host.refused(&["trace", "show", &out], &[&out, "ends within its head"]);
    fs::write(&out, b"hello").unwrap();
    host.refused(&["trace", "show", &out], &[&out, "not a trace"]);
}

/// The image of two native layers that upstream built, with an acceleration layer on top if there is one.
fn native(trace: Option<&[u8]>) -> Images {
    let images = Images::new();
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/interop/blobs");
    let config =
        r#"{"architecture":"amd64","os":"linux","rootfs":{"type":"layers","diff_ids":[]}}"#;
    let image = images.image(config, &[]);
    let mut manifest = images.document(&image["digest"]);
    let mut layers = Vec::new();
    for number in 0..2 {
        let blob = fs::read(folder.join(format!("native-2-L{number}-overlaybd.commit"))).unwrap();
        let mut layer = images.descriptor(OCI_TAR, &blob);
        layer["annotations"] = json!({
            "containerd.io/snapshot/overlaybd/version": "0.1.0",
            "containerd.io/snapshot/overlaybd/blob-digest": layer["digest"],
        });
        layers.push(layer);
    }
    if let Some(trace) = trace {
        let archive = tar_of(&[("trace", trace)]);
        let mut layer = images.descriptor(OCI_TAR, &archive);
        layer["annotations"] =
            json!({"containerd.io/snapshot/overlaybd/acceleration-layer": "yes"});
        layers.push(layer);
    }
    manifest["layers"] = layers.into();
    images.set_manifest("app", &manifest);
    images
}

#[test]
fn upstreams_trace_is_written_and_as_an_acceleration_layer_replayed() {
    let _alone = alone();
    let host = Host::new();
    let out = host.text("trace");
    let plain = native(None);
    let args = ["trace", "record", &plain.name("app"), "-o", &out, "--format", "overlaybd"];
    let mut command = host.turbobd(&args);
    // Long enough for the reads below on a busy machine.
    let mut recording = command.args(["--seconds", "10"]).stdout(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(recording.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let mount = line.trim_end().split_once(' ').unwrap().1;
    let largest = Command::new("find")
        .args([mount, "-type", "f", "-size", "+200k", "-exec", "cat", "{}", "+"])
        .stdout(Stdio::null())
        .status()
        .unwrap();
    assert!(largest.success() && recording.wait().unwrap().success());
    let bytes = fs::read(&out).unwrap();
    let reads = upstream::parse(&bytes).unwrap();
    assert!(reads.iter().any(|read| read.layer == 0), "{reads:?}");
    assert!(host.done(&["trace", "show", &out]).stdout.starts_with("LAYER"));

    fs::remove_dir_all(host.path("traces")).unwrap();
    let images = native(Some(&bytes));
    let registry = Double::start();
    serve(&images, &registry, "team/app");
    let layer: Digest = images.layer("app", 0).parse().unwrap();
    let name = format!("{}/team/app:app", registry.host());
    // The trace is not a layer of the disk.
    let export = |name: &str| host.done(&["export", name, "--digest"]).stdout;
    assert_eq!(export(&name), export(&plain.name("app")));
    registry.clear_log();
    host.done(&["attach", &name, "--frontend", "loop"]);
    let wanted: u64 = reads.iter().filter(|read| read.layer == 0).map(|read| read.count).sum();
    // In compressed form it is at least a tenth.
    wait(|| registry.traffic(&layer).1 as u64 > wanted / 10);
    host.done(&["detach", &name]);

    // A broken trace is ignored.
    let broken = native(Some(&bytes[..bytes.len() - 1]));
    assert_eq!(export(&broken.name("app")), export(&plain.name("app")));
}

impl Host {
    /// Records the touches of a read in the middle of `file1` of the image.
    fn record(&self, name: &str) -> String {
        let out = self.text("published.trace");
        let device = self.mount(name);
        let read = format!("dd if={} bs=4k skip=100 count=1", self.text("mnt/file1"));
        self.done(&["trace", "record", &device, "-o", &out, "--", "sh", "-c", &read]);
        self.done(&["detach", &self.text("mnt")]);
        self.done(&["daemon", "--stop"]);
        out
    }

    /// A counter of the daemon's cache.
    fn counter(&self, name: &str) -> u64 {
        let page = self.done(&["ls", "--metrics"]).stdout;
        let line = page.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        line.trim().parse().unwrap()
    }

    /// Attaches, reads nothing, and waits until some chunks were loaded and no more arrive.
    fn mount_and_wait(&self, name: &str, more: &[&str]) {
        let (mnt, at) = (self.text("mnt"), ["attach", name, "--frontend", "loop", "--mount"]);
        self.done(&[&at[..], &[&mnt], more].concat());
        let loads = || self.counter("turbobd_cache_loads_total");
        wait(|| {
            let before = loads();
            std::thread::sleep(Duration::from_millis(300));
            before > 0 && loads() == before
        });
    }

    /// Reads the recorded parts, which must be there.
    fn read_without_a_miss(&self) {
        let misses = || self.counter("turbobd_cache_misses_total");
        let before = misses();
        self.read_page(1);
        assert_eq!(misses(), before, "it was fetched before it was read");
    }
}

#[test]
fn a_published_trace_spares_other_hosts_the_start_that_knows_nothing() {
    let _alone = alone();
    let images = files(&[("turbo", "128")]);
    let registry = Double::start();
    serve(&images, &registry, "team/app");
    let target: Digest = images.layer("latest", 0).parse().unwrap();
    let name = |tag: &str| format!("{}/team/app:{tag}", registry.host());
    let first = Host::new();
    let trace = first.record(&name("turbo"));
    // The image itself is unchanged, and a second publication of the same trace changes nothing.
    let manifest = registry.manifest("team/app", "turbo");
    for said in ["published beside", "published already beside"] {
        let told = first.done(&["trace", "publish", &name("turbo"), "--trace", &trace]).stderr;
        assert!(told.contains(said), "{told}");
    }
    assert_eq!(registry.manifest("team/app", "turbo"), manifest);

    let next = Host::new();
    registry.clear_log();
    next.mount_and_wait(&name("turbo"), &[]);
    let fetched = registry.traffic(&target);
    next.read_without_a_miss();
    assert_eq!(registry.traffic(&target), fetched);
    next.done(&["detach", &next.text("mnt")]);
    // The published trace is the first part of this host's own; after that the registry is not asked any
    // more.
    let [learned] = &next.learned()[..] else { panic!("one image, one trace") };
    assert_eq!(learned.starts, 2);
    registry.clear_log();
    next.mount_and_wait(&name("turbo"), &[]);
    assert_eq!(registry.count("/referrers/"), 0);
    next.done(&["detach", &next.text("mnt")]);

    // The plain image has no trace, and the next host builds the meta image through which it is read.
    first.done(&[
        "trace",
        "publish",
        &name("latest"),
        "--trace",
        &trace,
        "--meta-dir",
        &first.text("meta"),
    ]);
    let plain = Host::new();
    plain.mount_and_wait(&name("latest"), &["--meta-dir", &first.text("meta")]);
    plain.read_without_a_miss();
    plain.done(&["detach", &plain.text("mnt")]);
}

#[test]
fn who_does_not_want_published_traces_does_not_ask_for_them() {
    let _alone = alone();
    let images = files(&[("turbo", "128")]);
    let registry = Double::start();
    serve(&images, &registry, "team/app");
    let name = format!("{}/team/app:turbo", registry.host());
    let host = Host::new();
    let trace = host.record(&name);
    host.done(&["trace", "publish", &name, "--trace", &trace]);
    let next = Host::new();
    let path = next.path("service.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    config["turbobd"]["traces"]["published"] = false.into();
    fs::write(&path, config.to_string()).unwrap();
    registry.clear_log();
    next.mount(&name);
    next.read_page(1);
    next.done(&["detach", &next.text("mnt")]);
    assert_eq!(registry.count("/referrers/"), 0);
}

#[test]
fn the_reference_registry_and_a_layout_keep_a_trace_without_a_list_of_their_own() {
    let _alone = alone();
    let Some(registry) = real::start() else { return };
    let images = files(&[("turbo", "128")]);
    let host = Host::new();
    let trace = host.record(&images.name("turbo"));
    let app = format!("{}/team/app", registry.host());
    let from = format!("oci:{}:latest", images.path().display());
    let to = format!("docker://{app}:latest");
    let copied = Command::new("skopeo")
        .args(["copy", "--quiet", "--dest-tls-verify=false", &from, &to])
        .status();
    assert!(copied.unwrap().success());
    host.done(&["convert", "-r", &app, "-i", "latest", "--turboOCI", "turbo"]);
    for name in [format!("{app}:turbo"), images.name("turbo")] {
        host.done(&["trace", "publish", &name, "--trace", &trace]);
        let next = Host::new();
        next.mount_and_wait(&name, &[]);
        next.read_without_a_miss();
        next.done(&["detach", &next.text("mnt")]);
    }
}

#[test]
fn what_is_no_trace_of_the_image_is_not_published() {
    let _alone = alone();
    let host = Host::new();
    let images = files(&[("turbo", "128")]);
    let name = images.name("turbo");
    let before = images.snapshot();
    let file = host.text("some.trace");
    let refused = |image: &str, needles: &[&str]| {
        host.refused(&["trace", "publish", image, "--trace", &file], needles);
    };
    refused(&name, &["some.trace", "No such file"]);
    fs::write(&file, b"hello").unwrap();
    refused(&name, &["some.trace", "not a trace"]);
    fs::write(&file, Trace::default().to_bytes()).unwrap();
    refused(&name, &["None of the 0 pieces", &name]);
    let other = formats::trace::Touch { blob: 0, start: 0, len: 1, at: 0, weight: 1 };
    let other = Trace { starts: 1, blobs: vec![Digest::of(b"other")], touches: vec![other] };
    fs::write(&file, other.to_bytes()).unwrap();
    refused(&name, &["None of the 1 pieces", &name]);
    fs::write(&file, upstream::to_bytes(&[])).unwrap();
    refused(&name, &["overlaybd's format", "--format turbobd"]);
    let usage = end(&mut host.turbobd(&["trace", "publish", "/dev/loop0", "--trace", &file]));
    assert_eq!(usage.code, Some(2));
    assert!(usage.stderr.contains("name the image rather than /dev/loop0"), "{}", usage.stderr);
    assert_eq!(images.snapshot(), before);
}
