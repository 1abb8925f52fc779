//! The host in the tests: its commands, mounts and the `turbobd` under test.

// Each test program uses a part.
#![allow(dead_code)] // each test uses its part

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// Runs a command that must succeed; returns its stdout.
pub fn run(command: &mut Command) -> String {
    let output = output(command);
    assert!(
        output.status.success(),
        "{command:?} ended with {}:\n{}\n{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).trim_end().to_owned()
}

/// Runs a command to its end, with any status.
pub fn output(command: &mut Command) -> Output {
    command.output().unwrap_or_else(|error| panic!("{command:?} cannot be run: {error}"))
}

/// The `turbobd` under test.
pub fn turbobd() -> Command {
    Command::new(env!("CARGO_BIN_EXE_turbobd"))
}

/// A script of this repository.
pub fn script(name: &str) -> Command {
    Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts").join(name))
}

/// Creates an OCI layout out of gzip layers; returns its reference `oci:DIR`.
pub fn layout(dir: &Path, tag: &str, layers: &[PathBuf]) -> String {
    run(script("oci-layout").arg(dir).arg(tag).args(layers));
    format!("oci:{}", dir.display())
}

/// A filesystem image mounted read-only by the kernel, unmounted when dropped.
pub struct Mounted {
    dir: tempfile::TempDir,
}

impl Mounted {
    /// Mounts the ext4 in `file`.
    pub fn ext4(file: &Path) -> Self {
        let dir = tempfile::tempdir().unwrap();
        run(Command::new("mount")
            .args(["-t", "ext4", "-o", "loop,ro,noload"])
            .arg(file)
            .arg(dir.path()));
        Self { dir }
    }

    /// The mount point.
    pub fn path(&self) -> &Path {
        self.dir.path()
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.dir.path()).status();
    }
}

/// Asserts that this process may mount: tests that need it fail with this sentence.
pub fn need_root() {
    assert!(rustix::process::geteuid().is_root(), "this test mounts filesystems: run it as root");
}
