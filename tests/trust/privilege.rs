//! The daemon has the rights that it needs, and no more; what it makes is for its user alone.

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read as _, Write as _};
use std::net::TcpListener;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _, symlink};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use client::DaemonClient;
use serde_json::json;

use crate::block::alone;
use crate::image::{Ended, Images, done, end, turbobd};
use crate::machine::need_root;
use crate::registry_double::{Access, Double};
use crate::run_dir::RunDir;
use crate::serve::serve;

/// A daemon with everything that makes files and threads, and its folders below `own`.
struct Host {
    dir: RunDir,
    images: Images,
}

impl Host {
    fn new() -> Self {
        let dir = RunDir::new();
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let at = |name: &str| dir.at("own").join(name);
        let config = json!({
            "cacheConfig": {"cacheDir": at("encoded"), "cacheSizeGB": 1},
            "gzipCacheConfig": {"cacheDir": at("decoded"), "cacheSizeGB": 1},
            "logConfig": {"logPath": at("log/turbobd.log")},
            "enableAudit": true,
            "auditPath": at("log/audit.log"),
            "exporterConfig": {"enable": true, "port": port},
            "serviceConfig": {"enable": true, "address": format!("unix:{}", at("api/snapshots.sock").display())},
            "turbobd": {"traces": {"dir": at("traces")}, "metaDir": at("meta")},
        });
        fs::write(dir.at("service.json"), config.to_string()).unwrap();
        Self { dir, images: Images::sample() }
    }

    fn turbobd(&self, args: &[&str]) -> Command {
        let mut command = self.dir.turbobd(args);
        command.env("TURBOBD_SERVICE_CONFIG", self.dir.at("service.json"));
        command
    }

    #[track_caller]
    fn done(&self, args: &[&str]) -> Ended {
        let ended = end(&mut self.turbobd(args));
        assert_eq!(ended.code, Some(0), "{}", ended.stderr);
        ended
    }

    /// Attaches the plain image, whose meta image is then built here, and reads it.
    fn attach(&self, more: &[&str]) {
        let (name, mnt) = (self.images.name("latest"), self.dir.mnt());
        let args = ["attach", &name, "--frontend", "loop", "--mount", mnt.to_str().unwrap()];
        self.done(&[&args[..], more].concat());
        let read = Command::new("find")
            .arg(&mnt)
            .args(["-type", "f", "-exec", "cat", "{}", "+"])
            .output()
            .unwrap();
        assert!(read.status.success());
    }

    fn detach(&self) {
        self.done(&["detach", self.dir.mnt().to_str().unwrap()]);
    }

    fn pid(&self) -> u32 {
        DaemonClient::connect(&self.dir.at("run")).unwrap().unwrap().pid()
    }
}

/// The fields of a `status` of proc(5).
fn status(path: &Path) -> BTreeMap<String, String> {
    let text = fs::read_to_string(path).unwrap();
    let fields = text.lines().filter_map(|line| line.split_once(":\t"));
    fields.map(|(name, value)| (name.to_owned(), value.trim().to_owned())).collect()
}

/// Threads of a process, with their fields. One that ends meanwhile is left out.
fn threads(pid: u32) -> Vec<BTreeMap<String, String>> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let paths: Vec<PathBuf> = tasks.map(|task| task.unwrap().path().join("status")).collect();
    paths.iter().filter(|path| path.exists()).map(|path| status(path)).collect()
}

#[test]
fn the_daemon_keeps_the_rights_that_it_needs_and_no_more() {
    need_root();
    let _alone = alone();
    let host = Host::new();
    host.attach(&[]);
    let needed = sys::privilege::NEEDED.iter().fold(0, |all, (one, _)| all | one.bits());
    let threads = threads(host.pid());
    assert!(threads.len() > 8, "{} threads", threads.len());
    for thread in &threads {
        let name = &thread["Name"];
        assert_eq!(thread["NoNewPrivs"], "1", "{name}");
        assert_eq!(thread["Seccomp"], "2", "{name}");
        for set in ["CapPrm", "CapEff", "CapBnd", "CapInh", "CapAmb"] {
            let has = u64::from_str_radix(&thread[set], 16).unwrap();
            assert_eq!(has & !needed, 0, "{set} of {name}");
        }
    }
    // Threads that work on open files alone have a filter more.
    let filters = |name: &str| {
        let thread = threads.iter().find(|thread| thread["Name"] == name);
        thread.unwrap_or_else(|| panic!("no thread {name}"))["Seccomp_filters"].clone()
    };
    let main = filters("turbobd");
    for name in ["audit", "metrics", "tier-encoded", "tier-decoded"] {
        assert_eq!(
            filters(name).parse::<u32>().unwrap(),
            main.parse::<u32>().unwrap() + 1,
            "{name}"
        );
    }
    host.detach();
}

#[test]
fn what_the_daemon_makes_is_for_its_user_alone() {
    need_root();
    let _alone = alone();
    let host = Host::new();
    host.attach(&[]);
    host.detach();
    let mut open = vec![host.dir.at("run"), host.dir.at("own")];
    let (mut folders, mut files, mut sockets) = (0, 0, 0);
    while let Some(path) = open.pop() {
        let meta = fs::symlink_metadata(&path).unwrap();
        let mode = meta.permissions().mode() & 0o7777;
        assert_eq!((meta.uid(), mode & 0o7077), (0, 0), "{} has the mode {mode:o}", path.display());
        if meta.is_dir() {
            folders += 1;
            open.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
        } else if meta.file_type().is_socket() {
            sockets += 1;
        } else {
            files += 1;
        }
    }
    assert!(folders >= 8 && files >= 8, "{folders} folders, {files} files");
    assert_eq!(sockets, 2);
}

#[test]
fn a_folder_that_others_can_change_is_not_used() {
    need_root();
    let _alone = alone();
    let host = Host::new();
    let chmod = |name: &str, mode| {
        let path = host.dir.at(name);
        fs::create_dir_all(&path).unwrap();
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    };
    chmod("run", 0o777);
    let name = host.images.name("latest");
    for args in [
        &["attach", &name, "--frontend", "loop"][..],
        &["daemon"],
        &["attach", &name, "--foreground"],
    ] {
        let ended = end(&mut host.turbobd(args));
        assert_eq!(ended.code, Some(1), "{args:?}: {}", ended.stdout);
        let told = format!(
            "{}{}",
            ended.stderr,
            fs::read_to_string(host.dir.at("own/log/turbobd.log")).unwrap_or_default()
        );
        assert!(told.contains("others than its owner can write to it"), "{args:?}: {told}");
        assert!(
            fs::read_dir(host.dir.at("run")).unwrap().next().is_none(),
            "{args:?} made files there"
        );
    }
    chmod("run", 0o700);
    // A cache is missed, and a device is not.
    for part in ["encoded", "decoded", "traces"] {
        chmod(&format!("own/{part}"), 0o777);
    }
    host.attach(&[]);
    host.detach();
    for part in ["encoded", "decoded", "traces"] {
        let entries = fs::read_dir(host.dir.at("own").join(part)).unwrap().count();
        assert_eq!(entries, 0, "{part} was used");
    }
}

#[test]
fn a_meta_image_is_not_taken_from_a_folder_that_others_can_change() {
    need_root();
    let _alone = alone();
    let host = Host::new();
    let meta = host.dir.at("own/meta");
    fs::create_dir_all(&meta).unwrap();
    fs::set_permissions(&meta, fs::Permissions::from_mode(0o777)).unwrap();
    let ended = end(&mut host.turbobd(&["export", &host.images.name("latest"), "--digest"]));
    assert_eq!(ended.code, Some(1));
    assert!(ended.stderr.contains("others than its owner can write to it"), "{}", ended.stderr);
}

#[test]
fn a_log_is_written_through_no_link_in_a_folder_that_others_can_write() {
    let folder = tempfile::tempdir().unwrap();
    let (victim, log) = (folder.path().join("victim"), folder.path().join("log"));
    fs::write(&victim, "old").unwrap();
    symlink(&victim, &log).unwrap();
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o1777)).unwrap();
    let rotation = host::config::log_file::Rotation { size: 1 << 20, keep: 1 };
    assert!(host::config::log_file::LogFile::open(&log, rotation).is_err());
    assert_eq!(fs::read_to_string(&victim).unwrap(), "old");
}

#[test]
fn a_client_tells_nothing_to_a_daemon_of_another_user() {
    need_root();
    let dir = tempfile::tempdir().unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o777)).unwrap();
    let path = dir.path().join("turbobd.sock");
    let bound = std::thread::spawn(move || {
        let nobody = rustix::process::Uid::from_raw(65534);
        rustix::thread::set_thread_res_uid(nobody, nobody, nobody).unwrap();
        UnixListener::bind(path).unwrap()
    });
    let listener = bound.join().unwrap();
    let error = DaemonClient::connect(dir.path()).err().unwrap();
    let told = source::failure::with_causes(&error);
    assert!(told.contains("its server runs as the user 65534"), "{told}");
    let mut sent = Vec::new();
    listener.accept().unwrap().0.read_to_end(&mut sent).unwrap();
    assert_eq!(sent, b"");
}

/// Options of the mount at `dir`.
fn mount_options(dir: &Path) -> Vec<String> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let line = mounts.lines().find(|line| line.split(' ').nth(4) == dir.to_str()).unwrap();
    line.split(' ').nth(5).unwrap().split(',').map(str::to_owned).collect()
}

#[test]
fn programs_and_nodes_of_an_image_have_no_rights_unless_they_are_asked_for() {
    need_root();
    let _alone = alone();
    let host = Host::new();
    let mnt = fs::canonicalize(host.dir.mnt()).unwrap();
    let cases: [(&[&str], &[&str]); 4] = [
        (&[], &["nosuid", "nodev"]),
        (&["--suid"], &["nodev"]),
        (&["--dev"], &["nosuid"]),
        (&["--suid", "--dev"], &[]),
    ];
    for (more, options) in cases {
        host.attach(more);
        let has = mount_options(&mnt);
        for option in ["nosuid", "nodev"] {
            let wanted = options.contains(&option);
            assert_eq!(has.iter().any(|one| one == option), wanted, "{more:?}: {has:?}");
        }
        host.detach();
    }
}

#[test]
fn a_password_comes_from_standard_input_in_each_command_that_takes_one() {
    let images = Images::converted();
    let registry = Double::start();
    serve(&images, &registry, "team/app");
    registry.set_access(Access::Basic("me:se:cret".into()));
    let repository = format!("{}/team/app", registry.host());
    let name = format!("{repository}:turbo");
    let told = |args: &[&str], password: &str| {
        let mut command = turbobd();
        command.args(args).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let _ = child.stdin.take().unwrap().write_all(password.as_bytes());
        let output = child.wait_with_output().unwrap();
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    let stdin = ["-u", "me", "--password-stdin"];
    for command in [
        &["inspect", &name][..],
        &["check", &name],
        &["export", &name, "--digest"],
        &["convert", "-r", &repository, "-i", "latest", "--turboOCI", "again", "--vsize", "1"],
    ] {
        let args = [command, &stdin].concat();
        for password in ["se:cret\n", "se:cret", "se:cret\r\nmore"] {
            let (code, stderr) = told(&args, password);
            assert!(code == Some(0) && !stderr.contains("warning"), "{args:?}: {stderr}");
        }
        assert_eq!(told(&args, "wrong\n").0, Some(1), "{args:?}");
        let (code, stderr) = told(&args, "");
        assert!(code == Some(1) && stderr.contains("no password on standard input"), "{stderr}");
    }
    let (code, stderr) = told(&["inspect", &name, "-u", "me:x", "--password-stdin"], "se:cret");
    assert!(code == Some(2) && stderr.contains("the user's name alone"), "{stderr}");
}

#[test]
fn a_password_on_the_command_line_is_warned_of() {
    let images = Images::converted();
    let ended = end(turbobd().args(["inspect", &images.name("turbo"), "-u", "me:secret"]));
    assert_eq!(ended.code, Some(0));
    assert!(
        ended.stderr.contains("--password-stdin") && !ended.stderr.contains("secret"),
        "{}",
        ended.stderr
    );
    let ended = end(turbobd().args(["inspect", &images.name("turbo"), "-u", "me"]));
    assert_eq!(ended.stderr, "");
}

#[test]
fn each_command_that_takes_a_user_takes_the_password_from_standard_input() {
    let help = |args: &[&str]| done(&[args, &["--help"]].concat());
    let top = help(&[]);
    let commands = top.split("Commands:").nth(1).unwrap().lines().skip(1);
    let names: Vec<&str> = commands
        .take_while(|line| !line.trim().is_empty())
        .filter(|line| line.starts_with("  ") && !line.starts_with("   "))
        .filter_map(|line| line.split_whitespace().next())
        .filter(|name| *name != "help")
        .collect();
    let mut with_user = 0;
    for name in names {
        let subs: Vec<Vec<&str>> = match name {
            "trace" => vec![vec![name, "record"], vec![name, "publish"]],
            name => vec![vec![name]],
        };
        for command in subs {
            let text = help(&command);
            assert_eq!(
                text.contains("--username"),
                text.contains("--password-stdin"),
                "{command:?}"
            );
            with_user += u32::from(text.contains("--username"));
        }
    }
    assert!(with_user >= 7, "{with_user} commands");
}
