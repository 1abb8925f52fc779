//! A folder with a daemon of its own. The test program has the module `image` too.

#![allow(dead_code)] // each test uses its part

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// A folder for a test's files, with a daemon of its own and a mount point `mnt`: unmounted and ended when
/// dropped, also after a failure.
pub struct RunDir(tempfile::TempDir);

impl RunDir {
    /// In the system's folder for temporary files. In a guest of `scripts/vm` the build's folder is a share of the
    /// host's, where QEMU opens no socket; and its path may be too long for one.
    pub fn new() -> Self {
        Self::of(tempfile::tempdir().unwrap())
    }

    /// Uses an existing folder.
    pub fn of(dir: tempfile::TempDir) -> Self {
        std::fs::create_dir(dir.path().join("mnt")).unwrap();
        Self(dir)
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        self.0.path()
    }

    /// A path in it.
    pub fn at(&self, name: &str) -> PathBuf {
        self.path().join(name)
    }

    /// The mount point.
    pub fn mnt(&self) -> PathBuf {
        self.at("mnt")
    }

    /// The `turbobd` under test, with this daemon.
    pub fn turbobd(&self, args: &[&str]) -> Command {
        let mut command = crate::image::turbobd();
        command.args(args).env("TURBOBD_RUN_DIR", self.at("run"));
        command
    }
}

impl Drop for RunDir {
    fn drop(&mut self) {
        let quietly = |command: &mut Command| {
            let _ = command.stdout(Stdio::null()).stderr(Stdio::null()).status();
        };
        quietly(Command::new("umount").arg("-q").arg(self.mnt()));
        quietly(&mut self.turbobd(&["daemon", "--stop"]));
    }
}
