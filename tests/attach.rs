//! Devices from start to end, by the real program: their contents, and that nothing remains of them.
//!
//! By the loop front end, which every machine has; `frontends.rs` tests the same of ublk.

use crate::block;
use crate::image;
use crate::listing;
use crate::machine;
use std::fs::{self, File};
use std::io::Read as _;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use crate::image::{Ended, Images, OCI_GZIP, done, end, gzip, noise, prose, tar_of};
use crate::machine::Mounted;
use crate::registry_double::{Double, Fault};
use crate::run_dir::RunDir;
use crate::serve::serve;
use formats::oci::Digest;
use serde_json::Value;

/// A run directory of this test, and all processes that serve out of it: ended when dropped.
///
/// [One at a time](block::alone).
struct Host {
    dir: RunDir,
    /// Devices that were created, with the kernel's number of each use of a device.
    devices: Mutex<Vec<(String, String)>>,
    _turn: MutexGuard<'static, ()>,
}

/// The kernel's number of this use of the loop device.
fn diskseq(device: &str) -> String {
    fs::read_to_string(format!("/sys/block/{}/diskseq", device.trim_start_matches("/dev/")))
        .unwrap_or_default()
}

impl Host {
    fn new() -> Self {
        machine::need_root();
        let turn = block::alone();
        Self { dir: RunDir::new(), devices: Mutex::default(), _turn: turn }
    }

    fn mnt(&self) -> PathBuf {
        self.dir.mnt()
    }

    /// Another mount point.
    fn place(&self, name: &str) -> PathBuf {
        let place = self.dir.path().join(name);
        fs::create_dir(&place).unwrap();
        place
    }

    fn turbobd(&self, args: &[&str]) -> Command {
        self.dir.turbobd(args)
    }

    #[track_caller]
    fn done(&self, args: &[&str]) -> String {
        let ended = end(&mut self.turbobd(args));
        assert_eq!(ended.code, Some(0), "turbobd {args:?}: {}", ended.stderr);
        ended.stdout.trim_end().to_owned()
    }

    #[track_caller]
    fn refused(&self, args: &[&str], needles: &[&str]) -> String {
        image::is_refusal(&end(&mut self.turbobd(args)), args, needles)
    }

    /// Attaches through loop; returns the device.
    #[track_caller]
    fn attach(&self, name: &str) -> String {
        let device = self.done(&["attach", name, "--frontend", "loop"]);
        assert!(device.starts_with("/dev/loop") && !device.contains([' ', '\n']), "{device:?}");
        self.note(&device);
        device
    }

    /// Attaches through loop and mounts at `mnt`; returns the device.
    #[track_caller]
    fn mount(&self, name: &str) -> String {
        let mnt = self.mnt();
        let line =
            self.done(&["attach", name, "--frontend", "loop", "--mount", mnt.to_str().unwrap()]);
        let (device, place) = line.split_once(' ').unwrap();
        assert_eq!(Path::new(place), fs::canonicalize(mnt).unwrap());
        self.note(device);
        device.to_owned()
    }

    fn note(&self, device: &str) {
        self.devices.lock().unwrap().push((device.to_owned(), diskseq(device)));
    }

    fn list(&self) -> Vec<Value> {
        serde_json::from_str(&self.done(&["ls", "--json"])).unwrap()
    }

    /// Processes with this run directory.
    fn processes(&self) -> Vec<u32> {
        let ours = format!("TURBOBD_RUN_DIR={}", self.dir.path().join("run").display());
        let processes = fs::read_dir("/proc")
            .unwrap()
            .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
        let is_ours = |pid: &u32| {
            let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
            environment.split(|&byte| byte == 0).any(|entry| entry == ours.as_bytes())
        };
        processes.filter(is_ours).collect()
    }

    /// Devices of this test that still have a file behind them.
    fn loops(&self) -> Vec<String> {
        let devices = self.devices.lock().unwrap();
        let lives = |(device, seq): &&(String, String)| {
            let name = device.trim_start_matches("/dev/");
            Path::new(&format!("/sys/block/{name}/loop/backing_file")).exists()
                && diskseq(device) == *seq
        };
        devices.iter().filter(lives).map(|(device, _)| device.clone()).collect()
    }

    /// Mounts in this directory.
    fn mounts(&self) -> Vec<String> {
        let ours = self.dir.path().display().to_string();
        let text = fs::read_to_string("/proc/self/mountinfo").unwrap();
        text.lines().filter(|line| line.contains(&ours)).map(str::to_owned).collect()
    }

    /// Asserts that no mount and no device is left, and no process but `processes`.
    #[track_caller]
    fn assert_clean(&self, processes: usize) {
        let start = Instant::now();
        while !self.loops().is_empty() && start.elapsed() < Duration::from_secs(3) {
            std::thread::sleep(Duration::from_millis(20)); // the kernel frees it after the last close
        }
        assert_eq!(self.mounts(), Vec::<String>::new());
        assert_eq!(self.loops(), Vec::<String>::new());
        assert!(self.processes().len() <= processes, "{:?}", self.processes());
    }

    /// Waits until the daemon has ended by itself.
    fn wait_for_end(&self) {
        let start = Instant::now();
        while !self.processes().is_empty() {
            assert!(start.elapsed() < Duration::from_secs(15), "the daemon does not end");
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        for line in self.mounts().iter().rev() {
            if let Some(place) = line.split(' ').nth(4) {
                let _ = Command::new("umount").arg("-l").arg(place).status();
            }
        }
        let _ = self.turbobd(&["daemon", "--stop"]).stderr(Stdio::null()).status();
        for pid in self.processes() {
            let _ = Command::new("kill").arg("-9").arg(pid.to_string()).status();
        }
    }
}

#[test]
fn a_device_is_detached_by_device_by_mount_point_and_by_image() {
    let (host, images) = (Host::new(), Images::converted());
    let name = images.name("turbo");
    let device = host.attach(&name);
    host.done(&["detach", &device]);
    host.assert_clean(1);
    host.mount(&name);
    host.done(&["detach", host.mnt().to_str().unwrap()]);
    host.assert_clean(1);
    host.mount(&name);
    host.done(&["detach", &name]);
    host.assert_clean(1);
    host.refused(&["detach", &name], &["No device", &name, "turbobd ls"]);
    host.wait_for_end();
    host.refused(&["detach", &name], &["not attached", "no daemon"]);
    host.assert_clean(0);
}

#[test]
fn a_mounted_image_is_the_exported_one() {
    let (host, images) = (Host::new(), Images::converted());
    host.mount(&images.name("turbo"));
    let raw = images.path().join("raw");
    done(&["export", &images.name("turbo"), "-o", raw.to_str().unwrap()]);
    let exported = Mounted::ext4(&raw);
    listing::same_trees(&host.mnt(), exported.path());
    assert_eq!(fs::read(host.mnt().join("big")).unwrap(), prose(1, 5 << 20));
    assert_eq!(fs::read(host.mnt().join("etc/first")).unwrap(), b"second\n");
    assert!(!host.mnt().join("gone").exists());
    assert!(File::create(host.mnt().join("new")).is_err(), "it is writable");
}

#[test]
fn nothing_is_mounted_over_a_mount_and_a_missing_mount_point_is_made() {
    let (host, images) = (Host::new(), Images::converted());
    let name = images.name("turbo");
    let place = host.mnt().parent().unwrap().join("new/folder");
    let dir = place.to_str().unwrap().to_owned();
    host.refused(&["attach", &images.name("none"), "--mount", &dir], &["none"]);
    assert!(!place.exists());
    host.done(&["attach", &name, "--frontend", "loop", "--mount", &dir]);
    assert!(place.join("big").exists());
    for mode in [&[][..], &["--foreground"]] {
        let again = ["attach", &name, "--frontend", "loop", "--mount", &dir];
        host.refused(&[&again[..], mode].concat(), &[&dir, "mount point already", "ext4 on"]);
    }
    assert_eq!(host.list().len(), 1);
    host.done(&["detach", &dir]);
    host.done(&["daemon", "--stop"]);
}

#[test]
fn a_device_is_made_and_served_though_nobody_reads_its_name() {
    let (host, images) = (Host::new(), Images::converted());
    let name = images.name("turbo");
    let unread = |args: &[&str]| {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let child = host.turbobd(args).stdout(writer).stderr(Stdio::piped()).spawn().unwrap();
        let output = child.wait_with_output().unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(0), "turbobd {args:?}: {stderr}");
        assert!(!stderr.contains("panicked"), "turbobd {args:?}: {stderr}");
    };
    let mnt = host.mnt();
    let mnt = mnt.to_str().unwrap();
    unread(&["attach", &name, "--frontend", "loop", "--mount", mnt]);
    let device = host.list()[0]["device"].as_str().unwrap().to_owned();
    host.note(&device);
    for args in [&["ls"][..], &["ls", "--metrics"], &["explain", mnt], &["explain", mnt, "big"]] {
        unread(args);
    }
    assert_eq!(fs::read(host.mnt().join("etc/first")).unwrap(), b"second\n");
    unread(&["detach", &device]);
    host.assert_clean(1);
}

#[test]
fn ls_tells_image_device_mount_point_state_and_traffic() {
    let (host, images) = (Host::new(), Images::converted());
    assert_eq!(host.list(), Vec::<Value>::new());
    assert_eq!(host.processes(), Vec::<u32>::new(), "ls has started a daemon");
    let registry = Double::start();
    serve(&images, &registry, "team/app");
    let name = format!("{}/team/app:turbo", registry.host());
    let device = host.mount(&name);
    let other = host.attach(&images.name("turbo"));
    fs::read(host.mnt().join("big")).unwrap();
    let [first, second] = &host.list()[..] else { panic!("{:?}", host.list()) };
    assert_eq!(
        (&first["image"], &first["device"], &first["state"]),
        (&name.as_str().into(), &device.into(), &"in_use".into())
    );
    assert_eq!(first["mountpoint"], fs::canonicalize(host.mnt()).unwrap().to_str().unwrap());
    assert_eq!(first["size_bytes"], 1u64 << 30);
    assert_eq!(first["frontend"], "loop");
    assert_eq!(first["errors"], 0);
    assert!(first["bytes_read"].as_u64().unwrap() >= 5 << 20, "{first}");
    let target: Digest = images.layer("latest", 0).parse().unwrap();
    registry.until_counted(&target, || host.list()[0]["bytes_fetched"].as_u64().unwrap());
    assert!(first["bytes_cached"].as_u64().unwrap() >= 5 << 20, "{first}");
    assert_eq!((&second["device"], &second["state"]), (&other.into(), &"ready".into()));
    assert_eq!(second["mountpoint"], Value::Null);
    let table = host.done(&["ls"]);
    let lines: Vec<Vec<&str>> =
        table.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(
        lines[0],
        [
            "IMAGE",
            "DEVICE",
            "MOUNTPOINT",
            "STATE",
            "READ",
            "FETCHED",
            "CACHED",
            "RETRIES",
            "ERRORS"
        ]
    );
    assert_eq!(lines.len(), 3);
    assert_eq!(lines[1][0], name);
}

#[test]
fn an_image_can_be_attached_twice_and_is_then_detached_by_device() {
    let (host, images) = (Host::new(), Images::converted());
    let name = images.name("turbo");
    let (one, two) = (host.attach(&name), host.attach(&name));
    assert_ne!(one, two);
    host.refused(&["detach", &name], &[&one, &two, "name one of them"]);
    host.done(&["detach", &one]);
    host.done(&["detach", &name]);
    host.assert_clean(1);
}

#[test]
fn a_cold_small_read_fetches_one_segment() {
    let host = Host::new();
    let images = Images::new();
    let page = noise(8, 4096);
    let layer = gzip(&tar_of(&[
        ("before", &prose(3, 6 << 20)),
        ("page", &page),
        ("after", &prose(4, 6 << 20)),
    ]));
    images.add("latest", &[(OCI_GZIP, layer)]);
    images.convert(&["--span", "256"]);
    let registry = Double::start();
    serve(&images, &registry, "team/app");
    host.mount(&format!("{}/team/app:turbo", registry.host()));
    let target: Digest = images.layer("latest", 0).parse().unwrap();
    assert_eq!(registry.traffic(&target), (0, 0), "attaching and mounting read data");
    assert_eq!(fs::read(host.mnt().join("page")).unwrap(), page);
    let (requests, bytes) = registry.traffic(&target);
    // The page may lie across a boundary of segments; one of 256 KiB of this text has about 150 KB.
    assert!(requests <= 2 && bytes < 320_000, "{requests} requests, {bytes} bytes");
    if requests == 2 {
        println!("the page lies in two segments");
    }
}

#[test]
fn what_cannot_be_attached_leaves_no_device_no_mount_and_no_process() {
    let (host, images) = (Host::new(), Images::converted());
    let turbo = images.name("turbo");
    let mount = |name: &str, place: &str, needles: &[&str]| {
        host.refused(&["attach", name, "--frontend", "loop", "--mount", place], needles);
        host.refused(
            &["attach", name, "--frontend", "loop", "--mount", place, "--foreground"],
            needles,
        );
        host.assert_clean(1);
    };
    fs::write(host.dir.path().join("file"), "").unwrap();
    let file = host.dir.path().join("file");
    mount(&turbo, file.to_str().unwrap(), &[file.to_str().unwrap(), "Not a directory"]);
    let below = file.join("mnt");
    mount(&turbo, below.to_str().unwrap(), &[below.to_str().unwrap(), "Not a directory"]);
    let mnt = host.mnt();
    let mnt = mnt.to_str().unwrap();
    mount(&images.name("none"), mnt, &["no image \"none\""]);
    mount("127.0.0.1:1/no/registry:here", mnt, &["127.0.0.1:1"]);
    images.forge("forged", 0, |members| drop(members.remove(0)));
    mount(&images.name("forged"), mnt, &["Layer 0", "no ext4.fs.meta"]);
    host.wait_for_end();
    host.assert_clean(0);
}

#[test]
fn a_disk_that_is_no_ext4_is_not_left_attached() {
    let (host, images) = (Host::new(), Images::converted());
    // The upper layer alone is not a filesystem.
    let mut manifest = images.manifest("turbo");
    manifest["layers"].as_array_mut().unwrap().remove(0);
    images.set_manifest("half", &manifest);
    let (name, mnt) = (images.name("half"), host.mnt());
    host.refused(
        &["attach", &name, "--frontend", "loop", "--mount", mnt.to_str().unwrap()],
        &[&name, "neither an ext4 nor an erofs"],
    );
    host.assert_clean(1);
    assert_eq!(host.list(), Vec::<Value>::new());
}

#[test]
fn a_detach_of_a_busy_mount_fails_and_the_device_stays() {
    let (host, images) = (Host::new(), Images::converted());
    let device = host.mount(&images.name("turbo"));
    let mnt = host.mnt();
    let file = File::open(mnt.join("big")).unwrap();
    let holder = format!("process {} (", std::process::id());
    let needles = [mnt.to_str().unwrap(), "in use", "stays as it was", &holder];
    host.refused(&["detach", &device, "--timeout", "0"], &needles);
    let mut bytes = [0; 4096];
    file.read_exact_at(&mut bytes, 1 << 20).unwrap();
    assert_eq!(bytes[..], prose(1, 5 << 20)[1 << 20..][..4096]);
    assert_eq!(host.list()[0]["state"], "in_use");
    let text = host.refused(&["daemon", "--stop"], &[&device, "in use"]);
    assert!(text.contains("detach it first"), "{text}");
    drop(file);
    // Held by another user than a mount.
    host.done(&["detach", &device]);
    let device = host.attach(&images.name("turbo"));
    let other = host.place("other");
    assert!(
        Command::new("mount")
            .args(["-o", "ro,noload", &device])
            .arg(&other)
            .status()
            .unwrap()
            .success()
    );
    // All mounts that this process sees are unmounted, by whatever process they were made.
    host.done(&["detach", &device]);
    host.assert_clean(1);
}

#[test]
fn stop_removes_what_nobody_uses() {
    let (host, images) = (Host::new(), Images::converted());
    host.done(&["daemon", "--stop"]);
    host.attach(&images.name("turbo"));
    host.attach(&images.name("turbo"));
    assert_eq!(host.loops().len(), 2);
    host.done(&["daemon", "--stop"]);
    host.wait_for_end();
    host.assert_clean(0);
}

#[test]
fn a_run_directory_that_takes_no_socket_is_named_with_what_to_do() {
    let (host, images) = (Host::new(), Images::converted());
    let long = host.dir.at(&"long".repeat(30));
    let name = images.name("turbo");
    let cases = [&["daemon"][..], &["ls"], &["attach", &name, "--frontend", "loop"]];
    for args in cases {
        let ended = end(host.turbobd(args).env("TURBOBD_RUN_DIR", &long));
        let socket = long.join("turbobd.sock").display().to_string();
        image::is_refusal(&ended, args, &[&socket, "TURBOBD_RUN_DIR", "take a short path"]);
    }
}

/// A process that is ended when dropped.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_foreground_server_leaves_nothing_when_it_is_told_to_end() {
    let (host, images) = (Host::new(), Images::converted());
    let (name, mnt) = (images.name("turbo"), host.mnt());
    for signal in ["-TERM", "-INT"] {
        let args = [
            "attach",
            &name,
            "--frontend",
            "loop",
            "--foreground",
            "--mount",
            mnt.to_str().unwrap(),
        ];
        let mut server = Running(
            host.turbobd(&args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap(),
        );
        let mut line = Vec::new();
        let mut stdout = server.0.stdout.take().unwrap();
        let mut byte = [0];
        while byte != *b"\n" && stdout.read(&mut byte).unwrap() == 1 {
            line.push(byte[0]);
        }
        let line = String::from_utf8(line).unwrap();
        let device = line.split(' ').next().unwrap();
        assert!(device.starts_with("/dev/loop"), "{line:?}");
        host.note(device);
        assert_eq!(host.loops(), [device]);
        assert_eq!(fs::read(mnt.join("etc/first")).unwrap(), b"second\n");
        assert_eq!(host.processes(), [server.0.id()], "a daemon was started");
        let _ = Command::new("kill").arg(signal).arg(server.0.id().to_string()).status().unwrap();
        let start = Instant::now();
        while server.0.try_wait().unwrap().is_none() {
            assert!(start.elapsed() < Duration::from_secs(10), "it does not end");
            std::thread::sleep(Duration::from_millis(20));
        }
        assert_eq!(server.0.wait().unwrap().code(), Some(0));
        host.assert_clean(0);
    }
}

#[test]
fn the_daemon_does_not_hold_what_the_host_unmounts() {
    let (host, images) = (Host::new(), Images::converted());
    let disk = host.dir.path().join("disk.ext4");
    File::create(&disk).unwrap().set_len(8 << 20).unwrap();
    assert!(Command::new("mkfs.ext4").arg("-q").arg(&disk).status().unwrap().success());
    // On a host whose mounts are shared, as systemd makes them: mounted before the daemon starts, unmounted
    // while it runs; then the loop device must be free.
    let script = format!(
        "set -e; mount -o loop {disk} {mnt}; loop=$(findmnt -no SOURCE {mnt}); {turbobd} attach {image} --frontend loop >&2; \
         umount {mnt}; sleep 0.2; held=$(losetup -nO BACK-FILE $loop 2>/dev/null || true); {turbobd} daemon --stop; \
         case $held in *disk.ext4*) echo \"held: $held\" >&2; exit 9;; esac",
        disk = disk.display(),
        mnt = host.mnt().display(),
        turbobd = env!("CARGO_BIN_EXE_turbobd"),
        image = images.name("turbo"),
    );
    let mut shared = Command::new("unshare");
    shared.args(["--mount", "--propagation", "shared", "sh", "-c", &script]);
    let ended = end(shared.env("TURBOBD_RUN_DIR", host.dir.path().join("run")));
    assert_eq!(ended.code, Some(0), "the device is held: {}", ended.stderr);
}

#[test]
fn a_device_config_is_attached_too() {
    let (host, images) = (Host::new(), Images::converted());
    let lowers: Vec<Value> = (0..2)
        .map(|number| {
            for (name, bytes) in image::members_of(&image::gunzip(&images.blob(&images.layer("turbo", number)))) {
                fs::write(images.path().join(format!("{number}-{name}")), bytes).unwrap();
            }
            serde_json::json!({"file": format!("{number}-ext4.fs.meta"), "gzipIndex": format!("{number}-gzip.meta"),
                "targetFile": images.blob_path(&images.layer("latest", number))})
        })
        .collect();
    let config = images.path().join("config.v1.json");
    fs::write(&config, serde_json::json!({"lowers": lowers}).to_string()).unwrap();
    let mnt = host.mnt();
    host.done(&[
        "attach",
        "--config",
        config.to_str().unwrap(),
        "--frontend",
        "loop",
        "--mount",
        mnt.to_str().unwrap(),
    ]);
    assert_eq!(fs::read(mnt.join("big")).unwrap(), prose(1, 5 << 20));
    host.done(&["detach", mnt.to_str().unwrap()]);
    host.assert_clean(1);
}

#[test]
fn verbose_says_how_long_its_parts_took() {
    let (host, images) = (Host::new(), Images::converted());
    let Ended { code, stdout, stderr } =
        end(&mut host.turbobd(&["attach", &images.name("turbo"), "--frontend", "loop", "-v"]));
    assert_eq!(code, Some(0), "{stderr}");
    assert!(stdout.starts_with("/dev/loop") && stdout.lines().count() == 1, "{stdout}");
    assert!(
        stderr.contains("the daemon answers after") && stderr.contains("attached after"),
        "{stderr}"
    );
    let quiet = end(&mut host.turbobd(&["attach", &images.name("turbo"), "--frontend", "loop"]));
    assert_eq!(quiet.stderr, "");
}

#[test]
fn a_read_error_reaches_its_reader_alone_and_is_counted() {
    let (host, images) = (Host::new(), Images::new());
    let (a, b) = (prose(11, 3 << 20), prose(12, 3 << 20));
    images.add("latest", &[(OCI_GZIP, gzip(&tar_of(&[("a", &a), ("b", &b)])))]);
    images.convert(&["--span", "256"]);
    host.mount(&images.name("turbo"));
    // After it was attached; early in the layer, so in the file a.
    let target = images.blob_path(&images.layer("latest", 0));
    let file = File::options().read(true).write(true).open(&target).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, 500_000).unwrap();
    file.write_all_at(&[byte[0] ^ 0x20], 500_000).unwrap();
    let error = fs::read(host.mnt().join("a")).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(5), "{error}");
    assert_eq!(fs::read(host.mnt().join("b")).unwrap(), b);
    let record = host.list().remove(0);
    assert!(record["errors"].as_u64().unwrap() > 0, "{record}");
    // The daemon's log has the reason.
    let log = fs::read_to_string(host.dir.path().join("run/turbobd.log")).unwrap();
    assert!(log.contains("SHA-256"), "{log}");
    // It recovers: no bad data was kept.
    file.write_all_at(&byte, 500_000).unwrap();
    assert_eq!(fs::read(host.mnt().join("a")).unwrap(), a);
    host.done(&["detach", host.mnt().to_str().unwrap()]);
    host.assert_clean(1);
}

#[test]
fn a_registry_that_lies_gives_eio_and_a_slip_does_not() {
    let (host, images) = (Host::new(), Images::converted());
    let registry = Double::start();
    serve(&images, &registry, "team/app");
    host.mount(&format!("{}/team/app:turbo", registry.host()));
    let target = images.layer("latest", 0);
    let big = host.mnt().join("big");
    for fault in
        [Fault::Flip(200_000, 1), Fault::IgnoreRange, Fault::Status(404), Fault::Status(403)]
    {
        registry.fault(&target, fault.clone(), 1000);
        let error = fs::read(&big).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(5), "{fault:?}: {error}");
        registry.clear_faults();
    }
    assert!(host.list()[0]["errors"].as_u64().unwrap() > 0);
    registry.fault(&target, Fault::Flip(200_000, 1), 1);
    registry.fault(&target, Fault::Status(503), 1);
    assert_eq!(fs::read(&big).unwrap(), prose(1, 5 << 20));
}

/// A configuration in which reads fail after `seconds`, and metrics are served at `port`.
fn service_config(host: &Host, seconds: u64, on_error: &str, port: u16) -> String {
    let path = host.dir.path().join("service.json");
    let text = serde_json::json!({
        "exporterConfig": { "enable": port > 0, "port": port.max(1), "uriPrefix": "/numbers" },
        // Without these, data from earlier reads, from read-ahead or on disk would need no wait.
        "cacheConfig": { "cacheSizeGB": 0 },
        "gzipCacheConfig": { "enable": false },
        "download": { "enable": false },
        "turbobd": {
            "readDeadlineSeconds": seconds, "onError": on_error, "traces": { "enable": false },
        },
    });
    fs::write(&path, text.to_string()).unwrap();
    path.to_str().unwrap().to_owned()
}

/// The value of one sample on a page of metrics; `labels` are found in any order.
fn sample(page: &str, name: &str, labels: &[&str]) -> Option<f64> {
    let is_it = |line: &&str| {
        let rest = line.strip_prefix(name).filter(|rest| rest.starts_with(['{', ' ']));
        rest.is_some_and(|rest| labels.iter().all(|label| rest.contains(label)))
    };
    page.lines().find(is_it)?.rsplit(' ').next()?.parse().ok()
}

#[test]
fn a_read_that_waits_is_seen_explained_and_ended_by_its_deadline() {
    let (host, images) = (Host::new(), Images::converted());
    let registry = Double::start();
    serve(&images, &registry, "team/app");
    let name = format!("{}/team/app:turbo", registry.host());
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let config = service_config(&host, 8, "eio", port);
    let mnt = host.mnt();
    let args = ["attach", &name, "--frontend", "loop", "--service-config", &config, "--mount"];
    let line = host.done(&[&args[..], &[mnt.to_str().unwrap()]].concat());
    let device = line.split_once(' ').unwrap().0.to_owned();
    host.note(&device);
    let target = images.layer("latest", 0);
    registry.fault(&target, Fault::Status(503), 1_000_000);
    let big = mnt.join("big");
    let begun = Instant::now();
    let reader = std::thread::spawn(move || (fs::read(big), begun.elapsed()));
    let stalled = loop {
        let record = host.list().remove(0);
        if record["state"] == "stalled" {
            break record;
        }
        assert!(begun.elapsed() < Duration::from_secs(7), "{record}");
        std::thread::sleep(Duration::from_millis(100));
    };
    assert!(stalled["oldest_wait_ms"].as_u64().unwrap() >= 5000, "{stalled}");
    assert!(stalled["retries"].as_u64().unwrap() > 2, "{stalled}");
    assert!(host.done(&["ls"]).contains("stalled 5"), "{}", host.done(&["ls"]));
    let told = host.done(&["explain", &device]);
    let short = &target[.."sha256:".len() + 12];
    for needle in
        ["stalled", "wait", &format!("segment 0 of {short}"), "trying again", "503", "next in"]
    {
        assert!(told.contains(needle), "{needle:?} is not in\n{told}");
    }
    let told: Value = serde_json::from_str(&host.done(&["explain", &device, "--json"])).unwrap();
    assert!(told["waiting"][0]["waits_ms"].as_u64().unwrap() > 4000, "{told}");
    let page = host.done(&["ls", "--metrics"]);
    let labels = [&*format!("device=\"{device}\""), &*format!("image=\"{name}\"")];
    assert!(sample(&page, "turbobd_device_oldest_wait_seconds", &labels).unwrap() > 5.0, "{page}");
    let (read, after) = reader.join().unwrap();
    assert_eq!(read.unwrap_err().raw_os_error(), Some(5));
    // The kernel repeats the rest of a failed read-ahead once more, page by page.
    assert!(after >= Duration::from_secs(7) && after < Duration::from_secs(20), "{after:?}");
    registry.clear_faults();
    // What has just waited in vain fails at once for a second: the kernel asks twice.
    let again = || fs::read(host.mnt().join("big")).ok();
    assert!(block::soon(|| again().is_some()), "no read succeeds");
    assert_eq!(again().unwrap(), prose(1, 5 << 20));

    let target = target.parse().unwrap();
    registry.until_counted(&target, || host.list()[0]["bytes_fetched"].as_u64().unwrap());

    // The same page over HTTP, and upstream's names on it.
    let mut stream = std::net::TcpStream::connect(("127.0.0.1", port)).unwrap();
    std::io::Write::write_all(&mut stream, b"GET /numbers HTTP/1.0\r\n\r\n").unwrap();
    let mut page = String::new();
    stream.read_to_string(&mut page).unwrap();
    assert!(page.starts_with("HTTP/1.0 200 OK"), "{page}");
    let counts = |name: &str| sample(&page, name, &labels).unwrap();
    assert!(counts("turbobd_device_errors_total") >= 1.0);
    assert!(counts("turbobd_device_read_bytes_total") >= f64::from(5 << 20));
    assert_eq!(counts("turbobd_device_oldest_wait_seconds"), 0.0);
    assert!(counts("turbobd_device_wait_seconds_count") >= 1.0);
    assert_eq!(counts("turbobd_device_fetched_bytes_total"), registry.traffic(&target).1 as f64);
    assert!(sample(&page, "turbobd_inflate_out_bytes_total", &[]).unwrap() >= f64::from(5 << 20));
    assert!(sample(&page, "turbobd_cache_misses_total", &[]).unwrap() >= 1.0);
    assert_eq!(sample(&page, "OverlayBD_Alive", &["node="]), Some(1.0));
    let pread = sample(&page, "OverlayBD_Count", &["type=\"pread\""]).unwrap();
    assert!(pread >= f64::from(5 << 20), "{pread}");
}

#[test]
fn with_the_policy_to_wait_a_reader_outlives_its_registrys_absence() {
    let (host, images) = (Host::new(), Images::converted());
    let registry = Double::start();
    serve(&images, &registry, "team/app");
    let name = format!("{}/team/app:turbo", registry.host());
    let config = service_config(&host, 1, "wait", 0);
    let mnt = host.mnt();
    let args = ["attach", &name, "--frontend", "loop", "--service-config", &config, "--mount"];
    let line = host.done(&[&args[..], &[mnt.to_str().unwrap()]].concat());
    host.note(line.split_once(' ').unwrap().0);
    registry.fault(&images.layer("latest", 0), Fault::Status(503), 1_000_000);
    let big = mnt.join("big");
    let reader = std::thread::spawn(move || fs::read(big));
    std::thread::sleep(Duration::from_secs(3));
    assert!(!reader.is_finished(), "it did not wait");
    let page = host.done(&["ls", "--metrics"]);
    assert!(sample(&page, "turbobd_device_repeated_total", &[]).unwrap() > 0.0, "{page}");
    registry.clear_faults();
    assert_eq!(reader.join().unwrap().unwrap(), prose(1, 5 << 20));
    assert_eq!(host.list()[0]["waiting"], 0);
    let page = host.done(&["ls", "--metrics"]);
    assert_eq!(sample(&page, "turbobd_device_errors_total", &[]), Some(0.0), "{page}");
}

#[test]
fn explain_tells_where_a_file_and_a_byte_of_the_disk_come_from() {
    let (host, images) = (Host::new(), Images::converted());
    let registry = Double::start();
    serve(&images, &registry, "team/app");
    let name = format!("{}/team/app:turbo", registry.host());
    let device = host.mount(&name);
    let explain = |args: &[&str]| -> Value {
        let text = host.done(&[&["explain", &device], args, &["--json"]].concat());
        serde_json::from_str(&text).unwrap()
    };
    let tar = image::gunzip(&images.blob(&images.layer("latest", 0)));
    let data = prose(1, 5 << 20);
    let told = explain(&["big"]);
    let mut at = 0;
    for part in told["parts"].as_array().unwrap() {
        let number = |value: &Value| value.as_u64().unwrap();
        let (offset, len) = (number(&part["file_offset"]), number(&part["length_bytes"]));
        assert_eq!(
            (offset, &part["what"], number(&part["layer"])),
            (at, &"data".into(), 0),
            "{part}"
        );
        let from = number(&part["chunk"]["at_bytes"]) as usize;
        let len_in_file = len.min(data.len() as u64 - offset) as usize;
        assert!(
            tar[from..from + len_in_file] == data[offset as usize..][..len_in_file],
            "{part} names another place of the tar"
        );
        assert_eq!(part["chunk"]["held"], "remote", "{part}");
        at += len;
    }
    assert!(at >= data.len() as u64, "{at} of {} bytes", data.len());
    fs::read(host.mnt().join("big")).unwrap();
    let told = explain(&["/big"]);
    assert!(told["parts"].as_array().unwrap().iter().all(|part| part["chunk"]["held"] == "memory"));
    assert!(told["blobs"][0]["fetched_bytes"].as_u64().unwrap() > 0);
    let below = host.mnt().join("etc/first");
    let of_mount = host.done(&["explain", &device, below.to_str().unwrap()]);
    let registry_host = registry.host();
    let only_host = registry_host.split(':').next().unwrap();
    for needle in ["SEGMENT", "data", only_host] {
        assert!(of_mount.contains(needle), "{needle:?} is not in\n{of_mount}");
    }
    // The superblock is metadata, and is in no blob.
    let told = explain(&["--offset", "1024"]);
    assert_eq!(told["parts"][0]["what"], "metadata", "{told}");
    assert_eq!(told["parts"][0]["chunk"], Value::Null);
    host.refused(&["explain", &device, "absent"], &["absent", "No such file"]);
    let behind = end(&mut host.turbobd(&["explain", &device, "--offset", "9999999999999"]));
    assert_eq!(behind.code, Some(2), "{}", behind.stderr);
    host.refused(&["explain", "/dev/nosuch"], &["/dev/nosuch", "turbobd ls"]);
}

/// Chunks that a device read, or that were filled in the background, are on disk: the next daemon needs no
/// registry for them; a check finds damage; and all of them can be removed.
#[test]
fn what_is_kept_on_disk_outlives_the_daemon_and_is_verified_and_pruned() {
    let (host, images) = (Host::new(), Images::converted());
    let registry = Double::start();
    serve(&images, &registry, "team/app");
    let name = format!("{}/team/app:turbo", registry.host());
    let target = images.layer("latest", 0);
    let (kept, service) = (host.dir.path().join("kept"), host.dir.path().join("service.json"));
    let config = serde_json::json!({
        "cacheConfig": { "cacheSizeGB": 0 },
        "gzipCacheConfig": { "enable": true, "cacheDir": kept, "cacheSizeGB": 1 },
        "turbobd": { "traces": { "enable": false }, "freeSpaceFloorGB": 0 },
    });
    fs::write(&service, config.to_string()).unwrap();
    let service = service.to_str().unwrap().to_owned();
    let mnt = host.mnt();
    let attach = || {
        let args = ["attach", &name, "--frontend", "loop", "--service-config", &service, "--mount"];
        let line = host.done(&[&args[..], &[mnt.to_str().unwrap()]].concat());
        host.note(line.split_once(' ').unwrap().0);
        line.split_once(' ').unwrap().0.to_owned()
    };
    let detach = |device: &str| {
        host.done(&["detach", device]);
        host.wait_for_end();
    };
    let device = attach();
    // Without a reader, the whole layer is fetched in the background.
    let begun = Instant::now();
    let filled = || {
        let page = host.done(&["ls", "--metrics"]);
        sample(&page, "turbobd_tier_writes_total", &[]).unwrap_or_default()
    };
    while filled() < 5.0 {
        assert!(begun.elapsed() < Duration::from_secs(60), "{}", host.done(&["ls", "--metrics"]));
        std::thread::sleep(Duration::from_millis(50));
    }
    let busy = host.refused(&["cache", "--service-config", &service], &["Another process", "ls"]);
    assert!(busy.contains(kept.to_str().unwrap()), "{busy}");
    assert_eq!(fs::read(mnt.join("big")).unwrap(), prose(1, 5 << 20));
    detach(&device);

    let usage = || -> Value {
        let told = host.done(&["cache", "--json", "--service-config", &service]);
        serde_json::from_str::<Value>(&told).unwrap()[0].clone()
    };
    assert_eq!(usage()["kind"], "decoded");
    let chunks = usage()["chunks"].as_u64().unwrap();
    assert!(chunks >= 5 && usage()["bytes"].as_u64().unwrap() > 5 << 20, "{}", usage());
    registry.fault(&target, Fault::Status(503), 1_000_000);
    let before = registry.traffic(&target.parse().unwrap());
    let device = attach();
    assert_eq!(fs::read(mnt.join("big")).unwrap(), prose(1, 5 << 20));
    assert_eq!(registry.traffic(&target.parse().unwrap()), before);
    detach(&device);

    // A byte flips in the largest file.
    let files = fs::read_dir(&kept).unwrap().map(|entry| entry.unwrap().path());
    let data = files.max_by_key(|path| path.metadata().unwrap().len()).unwrap();
    let file = File::options().read(true).write(true).open(data).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, 1 << 20).unwrap();
    file.write_all_at(&[byte[0] ^ 1], 1 << 20).unwrap();
    let verify = ["cache", "verify", "--service-config", &service];
    let ended = end(&mut host.turbobd(&verify));
    assert_eq!(ended.code, Some(1));
    assert!(ended.stderr.contains("1 chunks were damaged"), "{}", ended.stderr);
    assert_eq!(usage()["chunks"], chunks - 1);
    host.done(&verify);
    registry.clear_faults();
    let device = attach();
    assert_eq!(fs::read(mnt.join("big")).unwrap(), prose(1, 5 << 20));
    detach(&device);
    host.done(&["cache", "prune", "--service-config", &service]);
    assert_eq!((&usage()["chunks"], &usage()["bytes"]), (&0.into(), &0.into()));
    host.assert_clean(0);
}
