//! Settings of a host and of a device, by the real program: what the logs get, what the audit log tells, and what
//! a device config says of background download.

use crate::block;
use crate::image;
use crate::machine;
use std::fs;
use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::sync::MutexGuard;
use std::time::{Duration, Instant};

use crate::image::{Images, end, prose};
use crate::registry_double::Double;
use crate::run_dir::RunDir;
use crate::serve::serve;
use serde_json::{Value, json};

/// A host with a configuration of its own. [One at a time](block::alone).
struct Host {
    dir: RunDir,
    _turn: MutexGuard<'static, ()>,
}

impl Host {
    fn new() -> Self {
        machine::need_root();
        let turn = block::alone();
        Self { dir: RunDir::new(), _turn: turn }
    }

    /// Writes the service configuration: these settings, and nothing that would fetch ahead or keep on disk.
    fn configure(&self, settings: &Value) {
        let mut config = json!({
            "cacheConfig": {"cacheSizeGB": 0}, "gzipCacheConfig": {"enable": false}, "download": {"enable": false},
            "turbobd": {
                // A second request for a slow answer would be counted by the registry alone.
                "hedge": {"enable": false}, "traces": {"enable": false}, "freeSpaceFloorGB": 0,
            },
        });
        config.as_object_mut().unwrap().extend(settings.as_object().unwrap().clone());
        fs::write(self.service(), config.to_string()).unwrap();
    }

    fn service(&self) -> PathBuf {
        self.dir.at("service.json")
    }

    fn turbobd(&self, args: &[&str]) -> std::process::Command {
        let mut command = self.dir.turbobd(args);
        command.arg("--service-config").arg(self.service());
        command
    }

    #[track_caller]
    fn done(&self, args: &[&str]) -> String {
        let ended = end(&mut self.turbobd(args));
        assert_eq!(ended.code, Some(0), "turbobd {args:?}: {}", ended.stderr);
        ended.stdout.trim_end().to_owned()
    }

    /// A daemon that was started by hand, once it answers.
    fn daemon(&self, args: &[&str]) -> Daemon<'_> {
        let mut command = self.turbobd(&[&["daemon"], args].concat());
        let process = command.stderr(Stdio::piped()).spawn().unwrap();
        let begun = Instant::now();
        while end(&mut self.turbobd(&["ls"])).code != Some(0)
            || !self.dir.at("run/turbobd.sock").exists()
        {
            assert!(begun.elapsed() < Duration::from_secs(20), "it does not answer");
            std::thread::sleep(Duration::from_millis(20));
        }
        Daemon { host: self, process }
    }

    /// The lines of a JSON log.
    fn lines(&self, name: &str) -> Vec<Value> {
        let text = fs::read_to_string(self.dir.at(name)).unwrap_or_default();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    /// The value of a metric, which has no labels or one set of them.
    fn metric(&self, name: &str) -> u64 {
        let page = self.done(&["ls", "--metrics"]);
        let line = page
            .lines()
            .find(|line| line.strip_prefix(name).is_some_and(|rest| rest.starts_with([' ', '{'])));
        line.and_then(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).unwrap_or(0.0) as u64
    }
}

struct Daemon<'a> {
    host: &'a Host,
    process: Child,
}

impl Daemon<'_> {
    /// Ends it, and gives what it said on standard error.
    fn stop(self) -> String {
        self.host.done(&["daemon", "--stop"]);
        String::from_utf8(self.process.wait_with_output().unwrap().stderr).unwrap()
    }
}

#[test]
fn the_log_file_gets_what_its_level_says_and_standard_error_nothing() {
    let host = Host::new();
    let (name, log) = ("log/turbobd.log", host.dir.at("log/turbobd.log"));
    let images = Images::converted();
    let logged = |level: u64, args: &[&str]| {
        let _ = fs::remove_file(&log);
        let config = json!({"logPath": host.dir.at(name), "logLevel": level});
        host.configure(&json!({"logConfig": config, "ioEngine": 1, "unheard": 0}));
        let daemon = host.daemon(args);
        let device = host.done(&["attach", &images.name("turbo"), "--frontend", "loop"]);
        host.done(&["detach", &device]);
        assert_eq!(daemon.stop(), "");
        fs::read_to_string(&log).unwrap()
    };
    let service = host.service().display().to_string();
    let unused = format!("Key ioEngine of {service} is accepted, without effect here");
    let unknown = format!("Key unheard of {service} is unknown and ignored");
    let info = logged(1, &[]);
    for needle in [&unused, &unknown, ": opened in ", " INFO ", " WARN "] {
        assert!(info.contains(needle), "{needle:?} is not in\n{info}");
    }
    assert!(!info.contains('\x1b'), "colours in a file:\n{info}");
    let warnings = logged(2, &[]);
    assert!(warnings.contains(&unused) && !warnings.contains(" INFO "), "{warnings}");
    assert_eq!(logged(3, &[]), "");
    // The command line goes before the file.
    assert!(logged(3, &["-v"]).contains(" INFO "));
}

#[test]
fn a_level_without_a_file_holds_for_standard_error() {
    let host = Host::new();
    host.configure(&json!({"ioEngine": 1}));
    let said = host.daemon(&[]).stop();
    assert!(said.contains("ioEngine"), "{said}");
    host.configure(&json!({"ioEngine": 1, "logLevel": 3}));
    assert_eq!(host.daemon(&[]).stop(), "");
}

#[test]
fn a_log_that_cannot_be_written_stops_the_daemon_by_its_key_and_a_full_disk_does_not() {
    let host = Host::new();
    fs::write(host.dir.at("file"), "").unwrap();
    let nowhere = host.dir.at("file").join("log");
    for (key, settings) in [
        ("logConfig.logPath", json!({"logConfig": {"logPath": nowhere}})),
        ("logPath", json!({"logPath": nowhere})),
        ("auditPath", json!({"enableAudit": true, "auditPath": nowhere})),
    ] {
        host.configure(&settings);
        let service = host.service().display().to_string();
        let named = format!(
            "turbobd: daemon: Key {key} of {service} names {}, which cannot be written: ",
            nowhere.display()
        );
        let ended = end(&mut host.turbobd(&["daemon"]));
        assert_eq!(ended.code, Some(1), "{}", ended.stderr);
        assert!(ended.stderr.starts_with(&named), "{}", ended.stderr);
    }
    // Without enableAudit nothing is opened.
    host.configure(&json!({"auditPath": nowhere}));
    host.daemon(&[]).stop();
    host.configure(&json!({"logPath": "/dev/full", "enableAudit": true, "auditPath": "/dev/full"}));
    let daemon = host.daemon(&[]);
    let images = Images::converted();
    let device = host.done(&["attach", &images.name("turbo"), "--frontend", "loop"]);
    assert!(fs::read(&device).is_ok());
    assert!(block::soon(|| host.metric("turbobd_audit_dropped_total") > 0), "reads had to wait");
    assert_eq!(host.metric("turbobd_audit_lines_total"), 0);
    assert!(host.metric("turbobd_log_lost_total") > 0, "the attach is logged");
    host.done(&["detach", &device]);
    assert_eq!(daemon.stop(), "");
}

#[test]
fn the_audit_log_tells_each_download_and_each_read_that_was_not_in_memory() {
    let host = Host::new();
    let (images, registry) = (Images::converted(), Double::start());
    serve(&images, &registry, "team/app");
    let name = format!("{}/team/app:turbo", registry.host());
    host.configure(&json!({"enableAudit": true, "auditPath": host.dir.at("audit/log")}));
    let daemon = host.daemon(&[]);
    let mnt = host.dir.mnt();
    let mnt = mnt.to_str().unwrap();
    let line = host.done(&["attach", &name, "--frontend", "loop", "--mount", mnt]);
    let device = line.split_once(' ').unwrap().0;
    let read = || fs::read(host.dir.at("mnt/big")).unwrap();
    assert_eq!(read(), prose(1, 5 << 20));
    let is_all_told = || {
        let lines = host.lines("audit/log").len() as u64;
        lines > 0 && lines == host.metric("turbobd_audit_lines_total")
    };
    assert!(block::soon(is_all_told));
    let lines = host.lines("audit/log");
    let of = |event: &str| -> Vec<&Value> {
        lines.iter().filter(|line| line["event"] == event).collect()
    };
    let target = images.layer("latest", 0);
    let layer: Vec<_> = of("download").into_iter().filter(|line| line["blob"] == *target).collect();
    let bytes: u64 = layer.iter().map(|line| line["length_bytes"].as_u64().unwrap()).sum();
    let (requests, served) = registry.traffic(&target.parse().unwrap());
    assert!(!layer.is_empty() && layer.len() <= requests, "{} of {requests}", layer.len());
    assert_eq!(bytes, served as u64);
    for line in &layer {
        assert_eq!(line["source_host"], *registry.host(), "{line}");
        assert!(line["duration_us"].as_u64().unwrap() > 0, "{line}");
        assert_eq!(line["error"], Value::Null, "{line}");
    }
    // Its metadata too, which was fetched to open it.
    assert!(of("download").len() > layer.len(), "{lines:?}");
    let waited: Vec<_> = of("read").into_iter().filter(|line| line["device"] == *device).collect();
    assert!(!waited.is_empty(), "{lines:?}");
    for line in waited {
        assert_eq!(line["image"], *name, "{line}");
        assert!(line["length_bytes"].as_u64().unwrap() >= 512, "{line}");
    }
    // What is in memory leaves no line, however it is read.
    let disk = block::open(device.as_ref(), true);
    let read_through = || {
        for at in (0..16 << 20).step_by(64 << 10) {
            block::read(&disk, at, 64 << 10).unwrap();
        }
        assert!(block::soon(is_all_told));
        host.lines("audit/log").len()
    };
    let known = read_through();
    assert!(known >= lines.len());
    assert_eq!(read_through(), known);
    drop(disk);
    assert_eq!(host.metric("turbobd_audit_dropped_total"), 0);
    host.done(&["detach", mnt]);
    daemon.stop();
    assert!(host.lines("audit/log").len() >= known);
}

#[test]
fn without_enable_audit_there_is_no_audit_log() {
    let host = Host::new();
    let images = Images::converted();
    host.configure(&json!({"auditPath": host.dir.at("audit.log")}));
    let daemon = host.daemon(&[]);
    let device = host.done(&["attach", &images.name("turbo"), "--frontend", "loop"]);
    fs::read(&device).unwrap();
    host.done(&["detach", &device]);
    daemon.stop();
    assert!(!host.dir.at("audit.log").exists());
}

/// A TurboOCI device of one layer in a registry, by upstream's device config with this `download` section.
fn device_config(host: &Host, registry: &Double, download: Option<&Value>) -> String {
    let images = Images::converted();
    serve(&images, registry, "team/app");
    for (name, bytes) in image::members_of(&image::gunzip(&images.blob(&images.layer("turbo", 0))))
    {
        fs::write(host.dir.at(&name), bytes).unwrap();
    }
    let mut config = json!({
        "repoBlobUrl": format!("{}/v2/team/app/blobs", registry.base_url()),
        "lowers": [{"file": "ext4.fs.meta", "gzipIndex": "gzip.meta", "targetDigest": images.layer("latest", 0)}],
    });
    if let Some(download) = download {
        config["download"] = download.clone();
    }
    let path = host.dir.at("config.v1.json");
    fs::write(&path, config.to_string()).unwrap();
    path.to_str().unwrap().to_owned()
}

#[test]
fn the_download_section_of_a_device_replaces_that_of_the_host() {
    let host = Host::new();
    let at_once = json!({"enable": true, "delay": 0, "delayExtra": 0});
    let off = json!({"enable": false});
    // The setting of the host, the setting of the device, and true if the layer is fetched without a read.
    for (of_host, of_device, fills) in [
        (&off, Some(at_once.clone()), true),
        (&at_once, Some(off.clone()), false),
        // As a whole: a device that does not say `enable` has overlaybd's default.
        (&at_once, Some(json!({"maxMBps": 0})), false),
        (&at_once, None, true),
        (&off, None, false),
    ] {
        let registry = Double::start();
        let config = device_config(&host, &registry, of_device.as_ref());
        let kept = tempfile::tempdir_in(host.dir.path()).unwrap();
        host.configure(&json!({
            "gzipCacheConfig": {"cacheDir": kept.path(), "cacheSizeGB": 1}, "download": of_host,
        }));
        let daemon = host.daemon(&[]);
        let device = host.done(&["attach", "--config", &config, "--frontend", "loop"]);
        let filled = || host.metric("turbobd_fill_chunks_total") > 0;
        let came = if fills {
            // A busy machine has little time for what no process waits for.
            (0..12).any(|_| block::soon(filled))
        } else {
            // It would begin two seconds after the attach, when nothing was read.
            std::thread::sleep(Duration::from_secs(4));
            filled()
        };
        assert_eq!(came, fills, "{of_host} {of_device:?}");
        host.done(&["detach", &device]);
        daemon.stop();
    }
}
