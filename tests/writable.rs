//! Promises of `turbobd attach --upper` over either front end: a device that can be written, survives, and
//! becomes a layer. The kernel's ext4 writes, e2fsck and a copy of the tree are the oracles.
//!
//! Without ublk on this machine, [`in_a_guest_with_ublk`] runs the tests that are named after it inside
//! `scripts/vm`.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use crate::block;
use crate::machine;
use std::fs;
use std::io::{BufRead as _, BufReader, Read as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::block::{alone, ublk_here};
use crate::image::{Images, OCI_GZIP, done, gzip, noise, refused, tar_of, turbobd};
use crate::listing::same_trees;
use disk::writable::{WritableFiles, WritableLayer};

/// A device that is served by a process of its own.
struct Device {
    server: Child,
    path: PathBuf,
}

impl Device {
    /// Attaches `image` over `frontend` with the layer in `upper`; mounts it at `dir` if there is one.
    fn attach(
        frontend: &str,
        image: &str,
        upper: &Path,
        dir: Option<&Path>,
        run_dir: &Path,
    ) -> Self {
        let mut command = turbobd();
        command
            .args(["attach", image, "--foreground", "--frontend", frontend, "--upper"])
            .arg(upper);
        if let Some(dir) = dir {
            command.arg("--mount").arg(dir);
        }
        command.env("TURBOBD_RUN_DIR", run_dir).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut server = command.spawn().unwrap();
        let mut line = String::new();
        BufReader::new(server.stdout.take().unwrap()).read_line(&mut line).unwrap();
        if line.is_empty() {
            let mut text = String::new();
            server.stderr.take().unwrap().read_to_string(&mut text).unwrap();
            panic!("not attached: {text}");
        }
        let path: PathBuf = line.split_whitespace().next().unwrap().into();
        let kind = if frontend == "ublk" { "/dev/ublkb" } else { "/dev/loop" };
        assert!(path.to_str().unwrap().starts_with(kind), "{}", path.display());
        Self { server, path }
    }

    /// Ends it regularly.
    fn detach(mut self) {
        let pid = rustix::process::Pid::from_child(&self.server);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        assert!(self.server.wait().unwrap().success());
    }

    /// Kills the server; the device is gone then.
    fn kill(mut self) {
        // A loop device stays, for its next user.
        let backing = block::sys_block(&self.path).join("loop/backing_file");
        let before = fs::read(&backing).ok();
        let path = self.path.clone();
        let is_there = || match &before {
            Some(file) => fs::read(&backing).ok().as_ref() == Some(file),
            None => path.exists(),
        };
        self.server.kill().unwrap();
        self.server.wait().unwrap();
        let until = Instant::now() + Duration::from_secs(10);
        while is_there() {
            assert!(Instant::now() < until, "{} stays", path.display());
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

/// A folder for a test's files: one that keeps everything that `cp -a` keeps, in a guest too.
fn work(frontend: &str) -> tempfile::TempDir {
    match frontend {
        "ublk" => tempfile::tempdir().unwrap(),
        _ => tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap(),
    }
}

fn base() -> Images {
    let images = Images::new();
    let tar = tar_of(&[
        ("etc/", b""),
        ("etc/name", b"old\n"),
        ("data", &noise(1, 3_000_000)),
        ("kept", &noise(2, 70_000)),
    ]);
    images.add("latest", &[(OCI_GZIP, gzip(&tar))]);
    let place = images.place();
    let args = ["convert", "-r", &place, "-i", "latest", "--vsize", "1"];
    done(&[&args[..], &["--overlaybd", "obd", "--turboOCI", "turbo"]].concat());
    images
}

/// Changes a mounted tree in all the ways of a build.
fn build(root: &Path) {
    fs::write(root.join("etc/name"), "new\n").unwrap();
    fs::remove_file(root.join("data")).unwrap();
    fs::create_dir_all(root.join("srv/deep")).unwrap();
    for number in 0..200 {
        fs::write(root.join(format!("srv/deep/{number}")), noise(number, 100 * number as usize))
            .unwrap();
    }
    fs::write(root.join("srv/large"), noise(7, 20_000_000)).unwrap();
    fs::hard_link(root.join("kept"), root.join("srv/kept")).unwrap();
    std::os::unix::fs::symlink("large", root.join("srv/link")).unwrap();
    fs::rename(root.join("srv/deep/150"), root.join("srv/moved")).unwrap();
}

fn is_there_again_and_becomes_an_image(frontend: &str) {
    for form in ["turbo", "obd"] {
        let images = base();
        let work = work(frontend);
        let at = |name: &str| work.path().join(name);
        for dir in ["mnt", "run", "copy"] {
            fs::create_dir(at(dir)).unwrap();
        }
        let device = Device::attach(
            frontend,
            &images.name(form),
            &at("upper"),
            Some(&at("mnt")),
            &at("run"),
        );
        build(&at("mnt"));
        machine::run(Command::new("cp").arg("-a").arg(at("mnt").join(".")).arg(at("copy")));
        // A second writer of the same layer is refused.
        let upper = at("upper");
        refused(&["commit", upper.to_str().unwrap(), "-o", "/dev/null"], &["in use"]);
        device.detach();

        // The layer is there at the next attach, with a clean filesystem.
        let device = Device::attach(frontend, &images.name(form), &at("upper"), None, &at("run"));
        machine::run(Command::new("e2fsck").arg("-fn").arg(&device.path));
        machine::run(Command::new("mount").args(["-o", "ro"]).arg(&device.path).arg(at("mnt")));
        same_trees(&at("mnt"), &at("copy"));
        machine::run(Command::new("umount").arg(at("mnt")));
        device.detach();

        // And as an image.
        let place = images.place();
        done(&["commit", upper.to_str().unwrap(), "-r", &place, "-i", form, "--tag", "built"]);
        let raw = at("raw");
        done(&["export", &images.name("built"), "-o", raw.to_str().unwrap()]);
        machine::run(Command::new("e2fsck").arg("-fn").arg(&raw));
        let mounted = machine::Mounted::ext4(&raw);
        same_trees(mounted.path(), &at("copy"));
    }
}

fn survives_the_death_of_its_server(frontend: &str) {
    let images = base();
    let work = work(frontend);
    let at = |name: &str| work.path().join(name);
    fs::create_dir(at("run")).unwrap();
    // On the device itself: an ext4 without a journal guarantees nothing after a crash.
    let write = |device: &Path, seek: u64, byte: u8, sync: bool| {
        let input = at("input");
        fs::write(&input, vec![byte; 1 << 20]).unwrap();
        let mut command = Command::new("dd");
        command.arg(format!("if={}", input.display())).arg(format!("of={}", device.display()));
        command.args(["bs=1M", &format!("seek={seek}"), "oflag=direct", "status=none"]);
        command.args(sync.then_some("conv=fsync"));
        machine::run(&mut command);
    };
    let attach = || Device::attach(frontend, &images.name("obd"), &at("upper"), None, &at("run"));
    let device = attach();
    write(&device.path, 500, 0xaa, true);
    write(&device.path, 600, 0xbb, true);
    write(&device.path, 500, 0xcc, false);
    device.kill();
    let device = attach();
    let read = |seek: u64| {
        let of = at("output");
        let mut command = Command::new("dd");
        command.arg(format!("if={}", device.path.display())).arg(format!("of={}", of.display()));
        machine::run(command.args(["bs=1M", "count=1", &format!("skip={seek}"), "status=none"]));
        fs::read(of).unwrap()
    };
    assert!(read(600) == vec![0xbb; 1 << 20]);
    // Each block is old or new, never anything else.
    let mixed = read(500);
    assert!(mixed.chunks(512).all(|s| s == [0xaa; 512] || s == [0xcc; 512]));
    // A discarded range reads as zeros, and does not show the layer below.
    machine::run(Command::new("blkdiscard").args(["-o", "0", "-l", "1048576"]).arg(&device.path));
    assert!(read(0) == vec![0; 1 << 20]);
    device.detach();
}

#[test]
fn what_is_written_over_loop_is_there_again_and_becomes_an_image() {
    machine::need_root();
    is_there_again_and_becomes_an_image("loop");
}

#[test]
fn what_was_synced_over_loop_survives_the_death_of_its_server() {
    machine::need_root();
    survives_the_death_of_its_server("loop");
}

#[test]
fn what_is_written_over_ublk_is_there_again_and_becomes_an_image() {
    let _alone = alone();
    if ublk_here() {
        is_there_again_and_becomes_an_image("ublk");
    }
}

#[test]
fn what_was_synced_over_ublk_survives_the_death_of_its_server() {
    let _alone = alone();
    if ublk_here() {
        survives_the_death_of_its_server("ublk");
    }
}

/// Runs the tests over ublk in a guest that has it.
#[test]
fn in_a_guest_with_ublk() {
    machine::need_root();
    block::in_a_guest_with_ublk(module_path!(), &["over_ublk"], 2);
}

#[test]
fn an_upper_of_another_disk_is_refused() {
    let images = base();
    let work = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let upper = work.path().join("upper");
    let size = formats::units::Bytes(1 << 20);
    let files = WritableFiles::in_dir(&upper);
    drop(WritableLayer::create(&files, size, Default::default()).unwrap());
    let name = images.name("obd");
    let args = ["attach", &name, "--foreground", "--upper", upper.to_str().unwrap()];
    refused(&args, &["another size"]);
}
