//! A real containerd of a test's own: Debian's, and the newest, which `scripts/containerd-stack` builds.

#![allow(dead_code)] // each test uses its part

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crate::machine::{run, script};

/// A containerd that tests run against.
#[derive(Clone, Debug)]
pub struct Release {
    /// Folder of its programs; `None`: those of the system.
    programs: Option<PathBuf>,
}

impl Release {
    /// Debian's.
    pub fn system() -> Self {
        Self { programs: None }
    }

    /// The newest. With `TURBOBD_REQUIRE_ALL=1` it is built if it is missing; else `None` then.
    pub fn newest() -> Option<Self> {
        let folder = std::env::var_os("TURBOBD_CONTAINERD_STACK").map_or_else(
            || Path::new(env!("CARGO_MANIFEST_DIR")).join("target/containerd"),
            PathBuf::from,
        );
        let programs = ["containerd", "ctr", "containerd-shim-runc-v2", "runc", "crictl"];
        if std::env::var_os("TURBOBD_REQUIRE_ALL").is_some_and(|value| value == "1") {
            run(script("containerd-stack").arg(&folder));
        } else if !programs.iter().all(|program| folder.join(program).exists()) {
            println!("not checked with the newest containerd: scripts/containerd-stack builds it");
            return None;
        }
        Some(Self { programs: Some(folder) })
    }

    /// All that there are.
    pub fn all() -> Vec<Self> {
        [Some(Self::system()), Self::newest()].into_iter().flatten().collect()
    }

    /// True for 2.x.
    pub fn is_newest(&self) -> bool {
        self.programs.is_some()
    }

    /// A program of it, which finds the others.
    pub fn command(&self, program: &str) -> Command {
        let mut path = OsString::new();
        if let Some(programs) = &self.programs {
            path.push(programs);
            path.push(":");
        }
        path.push(std::env::var_os("PATH").unwrap_or_default());
        path.push(":/usr/sbin:/sbin");
        let program = match &self.programs {
            Some(programs) => programs.join(program),
            None => program.into(),
        };
        let mut command = Command::new(program);
        command.env("PATH", path);
        command
    }
}

/// A containerd with all its state in one folder; ended when dropped.
pub struct Stack {
    release: Release,
    process: Child,
    dir: tempfile::TempDir,
}

/// Number of containers that this process has named.
static NAMED: AtomicUsize = AtomicUsize::new(0);

impl Stack {
    /// Starts one without CRI. `more` goes to the end of its configuration, of version 2.
    pub fn start(release: &Release, more: &str) -> Self {
        let disabled =
            "disabled_plugins = [\"io.containerd.grpc.v1.cri\", \"io.containerd.nri.v1.nri\"]\n";
        Self::with_config(release, tempfile::tempdir().unwrap(), 2, disabled, more)
    }

    /// Starts one in `dir`, with a configuration of this version: `head` are keys outside of all sections.
    pub fn with_config(
        release: &Release,
        dir: tempfile::TempDir,
        version: u32,
        head: &str,
        more: &str,
    ) -> Self {
        let at = |name: &str| dir.path().join(name).display().to_string();
        let config = format!(
            "version = {version}\nroot = \"{}\"\nstate = \"{}\"\n{head}\
             [grpc]\n  address = \"{}\"\n[ttrpc]\n  address = \"{}\"\n\
             [plugins.\"io.containerd.internal.v1.opt\"]\n  path = \"{}\"\n{more}",
            at("root"),
            at("state"),
            at("sock"),
            at("ttrpc"),
            at("opt"),
        );
        fs::write(dir.path().join("config.toml"), config).unwrap();
        let process = Self::spawn(release, dir.path());
        let stack = Self { release: release.clone(), process, dir };
        stack.until_ready();
        stack
    }

    fn spawn(release: &Release, dir: &Path) -> Child {
        let log = fs::File::options().create(true).append(true).open(dir.join("log")).unwrap();
        let mut command = release.command("containerd");
        command.arg("-c").arg(dir.join("config.toml")).stdout(Stdio::null()).stderr(log);
        command.spawn().expect("containerd is needed: scripts/install-needs test")
    }

    fn until_ready(&self) {
        let start = Instant::now();
        while !self.ctr().arg("version").output().unwrap().status.success() {
            assert!(start.elapsed() < Duration::from_secs(60), "containerd: {}", self.log());
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Ends it without a warning, as the kernel does, and starts it again.
    pub fn kill_and_start(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
        self.process = Self::spawn(&self.release, self.dir.path());
        self.until_ready();
    }

    pub fn release(&self) -> &Release {
        &self.release
    }

    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("sock")
    }

    /// What it has written on stderr.
    pub fn log(&self) -> String {
        fs::read_to_string(self.dir.path().join("log")).unwrap_or_default()
    }

    pub fn ctr(&self) -> Command {
        let mut command = self.release.command("ctr");
        command.arg("-a").arg(self.socket());
        command
    }

    /// Runs a program of an image to its end; returns its stdout.
    pub fn run_container(&self, snapshotter: &str, image: &str, program: &[&str]) -> String {
        let number = NAMED.fetch_add(1, Ordering::Relaxed);
        let id = format!("turbobd-test-{}-{number}", std::process::id());
        let mut ctr = self.ctr();
        ctr.args(["run", "--rm", "--snapshotter", snapshotter, image, &id]).args(program);
        run(&mut ctr)
    }

    /// Words of a listing by `ctr … -q`.
    pub fn listed(&self, args: &[&str]) -> BTreeSet<String> {
        run(self.ctr().args(args)).split_whitespace().map(str::to_owned).collect()
    }

    /// Digests of the blobs in the content store.
    pub fn blobs(&self) -> BTreeSet<String> {
        self.listed(&["content", "ls", "-q"])
    }

    /// Names and keys of the snapshots.
    pub fn snapshots(&self, snapshotter: &str) -> BTreeSet<String> {
        let table = run(self.ctr().args(["snapshots", "--snapshotter", snapshotter, "ls"]));
        table.lines().skip(1).map(|line| line.split("  ").next().unwrap().to_owned()).collect()
    }

    /// Collects garbage, to its end.
    pub fn collect(&self) {
        let lease = run(self.ctr().args(["leases", "create"]));
        run(self.ctr().args(["leases", "delete", "--sync", &lease]));
    }
}

impl Drop for Stack {
    fn drop(&mut self) {
        let _ = Command::new("kill").arg(self.process.id().to_string()).status();
        let _ = self.process.wait();
    }
}
