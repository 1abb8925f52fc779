//! `turbobd snapshotter` as a process, with containerd's own code as its client (`tests/containerd_suite`).

use std::io::{Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use crate::machine::{need_root, output, run, script, turbobd};

/// Tests of containerd's suite for snapshotters, v2.4.2.
const SUITE: usize = 21;

/// Longest time that a process of these tests may take for a step, on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// The tests in Go, built once.
static IN_GO: LazyLock<PathBuf> = LazyLock::new(|| {
    let program = Path::new(env!("CARGO_TARGET_TMPDIR")).join("containerd_suite.test");
    run(script("go")
        .args(["test", "-c", "-o"])
        .arg(&program)
        .arg(".")
        .current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/containerd_suite"))
        .env("CGO_ENABLED", "0")
        .env("GOFLAGS", "-mod=readonly"));
    program
});

/// Runs one of the tests in Go against the program under test; returns what it prints.
fn in_go(test: &str) -> String {
    need_root();
    let dir = tempfile::tempdir().unwrap();
    let mut command = Command::new(&*IN_GO);
    command
        .args(["-test.v", "-test.timeout=10m", "-test.run"])
        .arg(format!("^{test}$"))
        .current_dir(dir.path())
        .env("TMPDIR", dir.path())
        .env("TURBOBD", env!("CARGO_BIN_EXE_turbobd"));
    let output = output(&mut command);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}\n{errors}");
    text
}

#[test]
fn containerds_own_suite_passes_over_the_socket() {
    let text = in_go("TestSuite");
    let passed = text.lines().filter(|line| line.starts_with("    --- PASS: TestSuite/")).count();
    assert_eq!(passed, SUITE, "{text}");
    assert!(!text.contains("--- SKIP"), "{text}");
}

#[test]
fn a_thousand_snapshots_are_answered_beside_overlayfs() {
    let text = in_go("TestThousand");
    for call in ["Prepare", "Mounts", "Stat", "Remove"] {
        assert!(text.contains(&format!("{call}: p50 ")), "{text}");
    }
}

/// A process `turbobd snapshotter`, killed when dropped.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Process {
    fn start(root: &Path, socket: &Path) -> Self {
        let child = turbobd()
            .args(["snapshotter", "--root"])
            .arg(root)
            .arg("--address")
            .arg(socket)
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let process = Self(child);
        process.wait_for(|| UnixStream::connect(socket).is_ok());
        process
    }

    fn wait_for(&self, mut done: impl FnMut() -> bool) {
        let start = Instant::now();
        while !done() {
            assert!(start.elapsed() < PATIENCE, "the snapshotter does not get there");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn terminate(&mut self) {
        run(Command::new("kill").arg(self.0.id().to_string()));
        assert!(self.0.wait().unwrap().success());
    }
}

/// What a refused start says.
fn refused(root: &Path, socket: &Path) -> String {
    let output =
        output(turbobd().args(["snapshotter", "--root"]).arg(root).arg("--address").arg(socket));
    assert_eq!(output.status.code(), Some(1));
    String::from_utf8(output.stderr).unwrap()
}

/// Says hello in HTTP/2, and waits for the other side's hello: a SETTINGS frame.
fn hello(stream: &mut UnixStream) {
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").unwrap();
    let mut frame = [0; 9];
    stream.read_exact(&mut frame).unwrap();
    assert_eq!(frame[3], 4, "no SETTINGS frame: {frame:?}");
}

#[test]
fn a_socket_in_use_and_a_root_in_use_are_refused_by_name_and_a_signal_ends_it() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let mut first = Process::start(&at("r"), &at("run/s"));
    hello(&mut UnixStream::connect(at("run/s")).unwrap());
    let text = refused(&at("other"), &at("run/s"));
    assert!(text.contains(at("run/s").to_str().unwrap()) && text.contains("--address"), "{text}");
    let text = refused(&at("r"), &at("t"));
    assert!(text.contains(at("r").to_str().unwrap()), "{text}");
    first.terminate();
    assert!(!at("run/s").exists());
    // kill -9 leaves the file of the socket, which the next one replaces.
    let second = Process::start(&at("r"), &at("run/s"));
    drop(second);
    assert!(at("run/s").exists());
    hello_of_another(&at("r"), &at("run/s"));
}

fn hello_of_another(root: &Path, socket: &Path) {
    let mut process = Process::start(root, socket);
    hello(&mut UnixStream::connect(socket).unwrap());
    process.terminate();
}

#[test]
fn with_a_socket_of_systemd_a_call_waits_while_the_process_restarts() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let listener = UnixListener::bind(at("s")).unwrap();
    let told = UnixDatagram::bind(at("notify")).unwrap();
    told.set_read_timeout(Some(PATIENCE)).unwrap();
    let heard = |what: &str| {
        let mut message = [0; 256];
        let length = told.recv(&mut message).unwrap();
        assert_eq!(String::from_utf8_lossy(&message[..length]).trim(), what);
    };
    // As systemd passes it: the descriptor 3, and the number of the process.
    let start = || {
        let passed: OwnedFd = listener.try_clone().unwrap().into();
        let child = Command::new("sh")
            .args(["-c", r#"LISTEN_PID=$$ LISTEN_FDS=1 exec "$0" snapshotter --root "$1" 3<&0"#])
            .arg(env!("CARGO_BIN_EXE_turbobd"))
            .arg(at("r"))
            .env("NOTIFY_SOCKET", at("notify"))
            .stdin(passed)
            .spawn()
            .unwrap();
        Process(child)
    };
    let first = start();
    heard("READY=1");
    hello(&mut UnixStream::connect(at("s")).unwrap());
    drop(first);
    let mut early = UnixStream::connect(at("s")).unwrap();
    let mut second = start();
    hello(&mut early);
    heard("READY=1");
    second.terminate();
    heard("STOPPING=1");
    assert!(at("s").exists(), "the socket is systemd's");
}

#[test]
fn a_configuration_names_root_and_socket_and_flags_win() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).display().to_string();
    let file = dir.path().join("c.json");
    let text = format!(r#"{{"root":"{}","address":"{}","rwMode":"dev"}}"#, at("r"), at("s"));
    std::fs::write(&file, text).unwrap();
    let start = |more: &[&str]| {
        let child = turbobd()
            .args(["snapshotter", "--config"])
            .arg(&file)
            .args(more)
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        Process(child)
    };
    let process = start(&[]);
    process.wait_for(|| UnixStream::connect(at("s")).is_ok());
    assert!(Path::new(&at("r/snapshots")).is_dir());
    drop(process);
    let process = start(&["--address", &at("t"), "--root", &at("q")]);
    process.wait_for(|| UnixStream::connect(at("t")).is_ok());
    assert!(Path::new(&at("q/snapshots")).is_dir());
}
