//! Containers under real containerd, from images that nothing has fetched: the snapshotter, the daemon, FUSE and a loop
//! device (or ublk), the kernel's overlay, and runc.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::image::{Images, OCI_GZIP, done, end, gzip, noise, tar_of};
use crate::machine::{self, run};
use crate::registry_double::real::{self, RealRegistry};
use crate::stack::{Release, Stack};

/// Name of the plugin; nerdctl knows it.
pub const PLUGIN: &str = "overlaybd";

/// Longest time for what must happen soon, on a loaded machine.
const SOON: Duration = Duration::from_secs(60);

/// A program that runs without any other file.
pub fn program() -> Vec<u8> {
    let program = ["/bin/busybox", "/usr/bin/busybox"].iter().find(|path| Path::new(path).exists());
    let bytes = fs::read(program.expect("busybox-static is needed: scripts/install-needs test"));
    let bytes = bytes.unwrap();
    let mut tar = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_ustar();
    header.set_mode(0o755);
    header.set_size(bytes.len() as u64);
    tar.append_data(&mut header, "busybox", &bytes[..]).unwrap();
    tar.into_inner().unwrap()
}

/// A registry with one image in three forms: `latest` is plain, `turbo` its meta image, `native` its native image. The plain
/// one has a fourth layer in `more`.
pub struct Published {
    registry: RealRegistry,
    images: Images,
}

impl Published {
    pub fn new() -> Option<Self> {
        let registry = real::start()?;
        let images = Images::new();
        let layers = vec![
            (OCI_GZIP, gzip(&program())),
            (OCI_GZIP, gzip(&tar_of(&[("etc/", b""), ("etc/text", b"first\n"), ("gone", b"x")]))),
            (
                OCI_GZIP,
                gzip(&tar_of(&[
                    ("etc/text", b"second\n"),
                    (".wh.gone", b""),
                    ("noise", &noise(1, 3 << 20)),
                ])),
            ),
        ];
        images.add("latest", &layers);
        let mut more = layers;
        more.push((OCI_GZIP, gzip(&tar_of(&[("etc/text", b"third\n")]))));
        images.add("more", &more);
        let place = images.place();
        images.convert(&["--oci"]);
        done(&[
            "convert",
            "-r",
            &place,
            "-i",
            "latest",
            "--overlaybd",
            "native",
            "--vsize",
            "1",
            "--oci",
        ]);
        let published = Self { registry, images };
        for tag in ["latest", "more", "turbo", "native"] {
            published.push(&published.images, tag);
        }
        Some(published)
    }

    /// Puts an image of `images` into the registry, with its digests as they are.
    pub fn push(&self, images: &Images, tag: &str) {
        let mut skopeo = Command::new("skopeo");
        skopeo.args(["--insecure-policy", "copy", "--quiet", "--preserve-digests"]);
        skopeo.arg("--dest-tls-verify=false").arg(images.name(tag));
        run(skopeo.arg(format!("docker://{}", self.name(tag))));
    }

    pub fn name(&self, tag: &str) -> String {
        format!("{}/team/app:{tag}", self.registry.host())
    }

    pub fn layers(&self, tag: &str) -> Vec<String> {
        (0..self.images.manifest(tag)["layers"].as_array().unwrap().len())
            .map(|number| self.images.layer(tag, number))
            .collect()
    }
}

/// A program that runs until it is killed.
struct Running(Child);

impl Running {
    fn start(command: &mut Command, log: &Path) -> Self {
        let log = fs::File::options().create(true).append(true).open(log).unwrap();
        Self(command.stdout(Stdio::null()).stderr(log).spawn().unwrap())
    }

    /// SIGKILL.
    fn kill(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A host: a daemon, a snapshotter and containerd.
pub struct Host {
    // Dropped in this order: containerd, then the snapshotter, then the daemon.
    pub stack: Stack,
    snapshotter: Running,
    daemon: Option<Running>,
    dir: tempfile::TempDir,
}

impl Host {
    fn start(release: &Release, config: &Value) -> Self {
        Self::with_stack(config, |plugin| {
            let more = format!(
                "{plugin}[[plugins.\"io.containerd.transfer.v1.local\".unpack_config]]\n  platform = \"linux\"\n  snapshotter = \"{PLUGIN}\"\n\
                 [[plugins.\"io.containerd.transfer.v1.local\".unpack_config]]\n  platform = \"linux\"\n  snapshotter = \"overlayfs\"\n",
            );
            Stack::start(release, &more)
        })
    }

    /// A host whose containerd `start` starts; it is given the section of the plugin for containerd's configuration.
    pub fn with_stack(config: &Value, start: impl FnOnce(&str) -> Stack) -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
        let daemon = Some(Self::start_daemon(dir.path()));
        let snapshotter = Self::start_snapshotter(dir.path());
        let stack = start(&format!(
            "[proxy_plugins.{PLUGIN}]\n  type = \"snapshot\"\n  address = \"{socket}\"\n\
             [proxy_plugins.{PLUGIN}.exports]\n  root = \"{root}\"\n  enable_remote_snapshot_annotations = \"true\"\n",
            socket = dir.path().join("snapshotter.sock").display(),
            root = dir.path().join("root").display(),
        ));
        Self { stack, snapshotter, daemon, dir }
    }

    fn start_daemon(dir: &Path) -> Running {
        let mut command = crate::image::turbobd();
        command.arg("daemon").env("TURBOBD_RUN_DIR", dir.join("run"));
        let service = json!({
            "cacheConfig": {"cacheSizeGB": 0}, "gzipCacheConfig": {"enable": false}, "download": {"enable": false},
            "turbobd": {"traces": {"enable": false}, "metaDir": dir.join("meta")}
        });
        fs::write(dir.join("service.json"), service.to_string()).unwrap();
        command.env("TURBOBD_SERVICE_CONFIG", dir.join("service.json"));
        let _ = fs::remove_file(dir.join("run/turbobd.sock"));
        let running = Running::start(&mut command, &dir.join("daemon.log"));
        until("the daemon answers", || dir.join("run/turbobd.sock").exists());
        running
    }

    fn start_snapshotter(dir: &Path) -> Running {
        let socket = dir.join("snapshotter.sock");
        let _ = fs::remove_file(&socket);
        let mut command = crate::image::turbobd();
        command
            .args(["-v", "snapshotter", "--root"])
            .arg(dir.join("root"))
            .arg("--address")
            .arg(&socket)
            .arg("--config")
            .arg(dir.join("config.json"))
            .env("TURBOBD_RUN_DIR", dir.join("run"));
        let running = Running::start(&mut command, &dir.join("snapshotter.log"));
        until("the snapshotter listens", || socket.exists());
        running
    }

    fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn log(&self) -> String {
        let read = |name| fs::read_to_string(self.at(name)).unwrap_or_default();
        format!("{}\n{}\n{}", read("snapshotter.log"), read("daemon.log"), self.stack.log())
    }

    fn kill_snapshotter(&mut self) {
        self.snapshotter.kill();
        self.snapshotter = Self::start_snapshotter(self.dir.path());
    }

    fn kill_daemon(&mut self) {
        self.daemon.take().unwrap().kill();
    }

    fn pull(&self, image: &str) {
        let mut ctr = self.stack.ctr();
        ctr.args(["images", "pull", "--plain-http", "--snapshotter", PLUGIN, image]);
        let ended = end(&mut ctr);
        assert_eq!(ended.code, Some(0), "{}\n{}", ended.stderr, self.log());
    }

    pub fn text(&self, image: &str) -> String {
        self.stack.run_container(PLUGIN, image, &["/busybox", "cat", "/etc/text"])
    }

    /// Devices of the daemon.
    pub fn devices(&self) -> Vec<Value> {
        let mut ls = crate::image::turbobd();
        let list = run(ls.args(["ls", "--json"]).env("TURBOBD_RUN_DIR", self.at("run")));
        serde_json::from_str::<Value>(&list).unwrap().as_array().unwrap().clone()
    }

    /// Folders of this host on which something is mounted.
    fn mounts(&self) -> BTreeSet<String> {
        let root = self.at("root").display().to_string();
        let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let places = table.lines().filter_map(|line| line.split(' ').nth(4));
        places.filter(|place| place.starts_with(&root)).map(str::to_owned).collect()
    }

    pub fn metrics(&self) -> String {
        fs::read_to_string(self.at("root/metrics.prom")).unwrap_or_default()
    }

    /// Removes all images, and waits until nothing of them is left.
    pub fn remove_all(&self) {
        for image in self.stack.listed(&["images", "ls", "-q"]) {
            run(self.stack.ctr().args(["images", "rm", "--sync", &image]));
        }
        self.stack.collect();
        assert_eq!(self.stack.snapshots(PLUGIN), BTreeSet::new());
        until("idle devices are removed", || self.devices().is_empty());
        until("their folders are removed", || {
            fs::read_dir(self.at("root/devices")).unwrap().next().is_none()
        });
        assert_eq!(self.mounts(), BTreeSet::new());
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // After a failure: the devices go with the daemon, and their mounts are lazily taken off.
        for place in self.mounts().iter().rev() {
            let _ = Command::new("umount").args(["-l", place]).stderr(Stdio::null()).status();
        }
    }
}

/// Waits for an event of another process.
#[track_caller]
pub fn until(what: &str, happened: impl Fn() -> bool) {
    let begun = Instant::now();
    while !happened() {
        assert!(begun.elapsed() < SOON, "waited in vain: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Devices that no container has are removed at once.
fn soon_idle() -> Value {
    json!({"idleSeconds": 0})
}

#[test]
fn a_container_runs_from_an_image_of_each_kind_whose_layers_were_not_fetched() {
    machine::need_root();
    let Some(published) = Published::new() else { return };
    let Some(release) = Release::newest() else { return };
    let host = Host::start(&release, &json!({}));
    for tag in ["latest", "turbo", "native"] {
        let image = published.name(tag);
        host.pull(&image);
        assert_eq!(host.text(&image), "second", "{tag}");
        let files = host.stack.run_container(PLUGIN, &image, &["/busybox", "ls", "/"]);
        assert!(files.contains("noise") && !files.contains("gone"), "{tag}: {files}");
        let written = ["/busybox", "sh", "-c", "echo new > /etc/text && /busybox cat /etc/text"];
        assert_eq!(host.stack.run_container(PLUGIN, &image, &written), "new", "{tag}");
    }
    let fetched = host.stack.blobs();
    for layer in published.layers("latest").iter().chain(&published.layers("native")) {
        assert!(!fetched.contains(layer), "{layer} was fetched");
    }
    // One device an image, whatever number of containers it had.
    assert_eq!(host.devices().len(), 3, "{:#?}", host.devices());
    let metrics = host.metrics();
    assert!(metrics.contains("turbobd_snapshotter_pulls_total{lazy=\"all\"} 3\n"), "{metrics}");
    let log = host.log();
    assert!(log.contains("team/app:latest pulled, layers: 3; lazy: 3 streamed"), "{log}");
    assert!(log.contains("team/app:native pulled, layers: 3; lazy: 3 native"), "{log}");
}

#[test]
fn another_image_shares_lower_layers_and_containers_at_once_share_a_device() {
    machine::need_root();
    let Some(published) = Published::new() else { return };
    let Some(release) = Release::newest() else { return };
    let host = Host::start(&release, &soon_idle());
    let (image, more) = (published.name("latest"), published.name("more"));
    host.pull(&image);
    host.pull(&more);
    let log = host.log();
    assert!(log.contains("team/app:more pulled, layers: 1; lazy: 1 streamed"), "{log}");
    let host = &host;
    std::thread::scope(|scope| {
        let texts: Vec<_> = (0..6)
            .map(|number| {
                let image = if number % 2 == 0 { &image } else { &more };
                (number, scope.spawn(move || host.text(image)))
            })
            .collect();
        for (number, text) in texts {
            assert_eq!(text.join().unwrap(), if number % 2 == 0 { "second" } else { "third" });
        }
    });
    // The image that the other one needs is removed, and the other one still runs.
    run(host.stack.ctr().args(["images", "rm", "--sync", &image]));
    host.stack.collect();
    assert_eq!(host.text(&more), "third");
    host.remove_all();
}

#[test]
fn containers_start_after_the_snapshotter_or_the_daemon_was_killed() {
    machine::need_root();
    let Some(published) = Published::new() else { return };
    let Some(release) = Release::newest() else { return };
    let mut host = Host::start(&release, &json!({}));
    let (image, native) = (published.name("latest"), published.name("native"));
    host.pull(&image);
    assert_eq!(host.text(&image), "second");
    host.kill_snapshotter();
    assert_eq!(host.text(&image), "second");
    assert_eq!(host.devices().len(), 1, "the device that was there is taken");
    host.kill_daemon();
    let begun = Instant::now();
    let mut ctr = host.stack.ctr();
    let failed = end(ctr.args([
        "run",
        "--rm",
        "--snapshotter",
        PLUGIN,
        &image,
        "without-daemon",
        "/busybox",
        "true",
    ]));
    assert_ne!(failed.code, Some(0));
    assert!(failed.stderr.contains("systemctl start turbobd"), "{}", failed.stderr);
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
    host.daemon = Some(Host::start_daemon(host.dir.path()));
    assert_eq!(host.text(&image), "second", "{}", host.log());
    host.pull(&native);
    assert_eq!(host.text(&native), "second");
    host.stack.kill_and_start();
    assert_eq!(host.text(&native), "second");
}

#[test]
fn a_daemon_that_is_missing_makes_a_pull_ordinary() {
    machine::need_root();
    let Some(published) = Published::new() else { return };
    let Some(release) = Release::newest() else { return };
    let mut host = Host::start(&release, &json!({}));
    host.kill_daemon();
    let image = published.name("latest");
    host.pull(&image);
    assert_eq!(host.text(&image), "second");
    let fetched = host.stack.blobs();
    assert!(published.layers("latest").iter().all(|layer| fetched.contains(layer)));
    let metrics = host.metrics();
    assert!(metrics.contains("turbobd_snapshotter_pulls_total{lazy=\"none\"} 1\n"), "{metrics}");
}

#[test]
fn containerd_without_labels_runs_native_images_and_says_what_a_meta_image_lacks() {
    machine::need_root();
    let Some(published) = Published::new() else { return };
    let host = Host::start(&Release::system(), &json!({}));
    for tag in ["latest", "native"] {
        let image = published.name(tag);
        host.pull(&image);
        assert_eq!(host.text(&image), "second", "{tag}: {}", host.log());
    }
    let mut ctr = host.stack.ctr();
    ctr.args(["images", "pull", "--plain-http", "--snapshotter", PLUGIN, &published.name("turbo")]);
    let failed = end(&mut ctr);
    assert_ne!(failed.code, Some(0));
    for needle in ["TurboOCI", "disable_snapshot_annotations = false", "turbobd rpull"] {
        assert!(failed.stderr.contains(needle), "{}", failed.stderr);
    }
}

#[test]
fn a_container_in_a_user_namespace_owns_its_files_and_none_is_copied() {
    machine::need_root();
    let Some(published) = Published::new() else { return };
    let Some(release) = Release::newest() else { return };
    let host = Host::start(&release, &soon_idle());
    // The user of the container enters containerd's folder.
    fs::set_permissions(host.stack.path(), fs::Permissions::from_mode(0o711)).unwrap();
    for tag in ["latest", "native"] {
        let image = published.name(tag);
        host.pull(&image);
        let id = format!("turbobd-test-{}-userns-{tag}", std::process::id());
        let mut ctr = host.stack.ctr();
        ctr.args(["run", "--rm", "--snapshotter", PLUGIN, "--remap-labels"]);
        ctr.args(["--uidmap", "0:100000:65536", "--gidmap", "0:200000:65536", &image, &id]);
        let script = "/busybox stat -c %u:%g /etc/text /busybox / && echo mine > /etc/text && \
                      /busybox stat -c %u:%g /etc/text && /busybox cat /proc/self/uid_map";
        let ended = end(ctr.args(["/busybox", "sh", "-c", script]));
        assert_eq!(ended.code, Some(0), "{}\n{}", ended.stderr, host.log());
        let lines: Vec<&str> = ended.stdout.lines().collect();
        assert_eq!(lines[..4], ["0:0"; 4], "{}", ended.stdout);
        assert!(lines[4].contains("100000"), "{}", ended.stdout);
    }
    host.remove_all();
}

#[test]
fn a_clone_of_a_layer_shows_mapped_owners_and_goes_without_touching_the_layer() {
    use containerd::labels::{GID_MAPPING, Labels, OwnerMap, UID_MAPPING};
    use containerd::snapshotter::idmap::{clone_lowers, remove_clones};
    use std::os::unix::fs::{MetadataExt as _, chown};
    machine::need_root();
    let dir = tempfile::tempdir().unwrap();
    let lowers = [dir.path().join("a"), dir.path().join("b")];
    for lower in &lowers {
        fs::create_dir(lower).unwrap();
        fs::write(lower.join("file"), "text").unwrap();
        chown(lower.join("file"), Some(5), Some(7)).unwrap();
    }
    let pairs = [(UID_MAPPING, "0:100000:65536"), (GID_MAPPING, "0:200000:65536")];
    let labels: Labels = pairs.map(|(key, value)| (key.to_owned(), value.to_owned())).into();
    let map = OwnerMap::of(&labels).unwrap().unwrap();
    let snapshot = dir.path().join("snapshot");
    fs::create_dir(&snapshot).unwrap();
    for _ in 0..2 {
        let clones = clone_lowers(&snapshot, &lowers, &map).unwrap();
        for clone in &clones {
            let meta = fs::metadata(clone.join("file")).unwrap();
            assert_eq!((meta.uid(), meta.gid()), (100_005, 200_007));
            assert!(fs::write(clone.join("file"), "changed").is_err(), "the clone is writable");
        }
        let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let place = snapshot.display().to_string();
        assert_eq!(table.lines().filter(|line| line.contains(&place)).count(), 2);
    }
    remove_clones(&snapshot).unwrap();
    assert_eq!(fs::read_dir(&snapshot).unwrap().count(), 0);
    for lower in &lowers {
        assert_eq!(fs::read_to_string(lower.join("file")).unwrap(), "text");
        assert_eq!(fs::metadata(lower.join("file")).unwrap().uid(), 5);
    }
}
