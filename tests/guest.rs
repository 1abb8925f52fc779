//! The whole path on the real driver: an image converted here, attached over ublk in a kernel that has it,
//! mounted, and compared name by name with the tree of the same disk without ublk.
//!
//! Without ublk on this machine, [`an_image_attached_over_ublk_shows_the_same_tree`] runs this binary again
//! inside `scripts/vm`. If no guest is available it prints that and passes, or fails with `TURBOBD_GUEST=1`,
//! which `scripts/test` sets.

use crate::block;
use crate::machine;
use std::fs;
use std::path::Path;
use std::process::Command;

use crate::listing::list;
use crate::machine::{Mounted, layout, run, turbobd};

/// Folder of the image and the expected listing, left by the host.
const WORK: &str = "TURBOBD_GUEST_WORK";

/// A tree as lines of text. Kernels are built with and without `security.*` attributes on ext4, so
/// those are left out; containerd.rs compares them.
fn lines(root: &Path) -> String {
    let mut text = String::new();
    for (name, listed) in list(root) {
        let words: Vec<&str> =
            listed.what.split(' ').filter(|word| !word.starts_with("security.")).collect();
        text.push_str(&format!("{name} {} {:?}\n", words.join(" "), listed.mtime));
    }
    text
}

#[test]
fn an_image_attached_over_ublk_shows_the_same_tree() {
    machine::need_root();
    let work = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let layers = work.path().join("layers");
    let generator = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/interop/gen_layers.py");
    run(Command::new("python3").arg(generator).arg(&layers));
    let stack = [layers.join("base.tar.gz"), layers.join("upper.tar.gz")];
    let repository = layout(&work.path().join("oci"), "latest", &stack);
    run(turbobd().args(["convert", "-r", &repository, "-i", "latest", "--turboOCI", "turbo"]));
    let raw = work.path().join("raw");
    run(turbobd().args(["export", &format!("{repository}:turbo"), "-o"]).arg(&raw));
    let mounted = Mounted::ext4(&raw);
    fs::write(work.path().join("expected"), lines(mounted.path())).unwrap();
    drop(mounted);

    let _turn = block::guest_turn();
    let output = machine::output(
        machine::script("vm")
            .args(["--timeout", "1800", "--"])
            .arg(std::env::current_exe().unwrap())
            .args(["--exact", "guest::in_the_guest", "--nocapture"])
            .env(WORK, work.path()),
    );
    let text = [&output.stdout[..], &output.stderr].concat();
    let text = String::from_utf8_lossy(&text);
    let required = std::env::var_os("TURBOBD_GUEST").is_some_and(|value| value == "1");
    if matches!(output.status.code(), None | Some(125..=127)) && !required {
        println!(
            "SKIPPED: no guest with ublk could be started: nothing was attached over ublk\n{text}"
        );
        return;
    }
    assert!(output.status.success() && text.contains("the trees agree"), "{text}");
}

/// Runs only when the test above starts it; otherwise it does nothing.
#[test]
fn in_the_guest() {
    let Some(work) = std::env::var_os(WORK) else { return };
    let work = Path::new(&work);
    let run_dir = tempfile::tempdir().unwrap();
    let mount = tempfile::tempdir().unwrap();
    let turbobd = || {
        let mut command = turbobd();
        command.env("TURBOBD_RUN_DIR", run_dir.path());
        command
    };
    let image = format!("oci:{}:turbo", work.join("oci").display());
    let attach = ["attach", &image, "--frontend", "ublk", "--mount"];
    let printed = run(turbobd().args(attach).arg(mount.path()));
    let device = printed.split(' ').next().unwrap();
    assert!(device.starts_with("/dev/ublkb"), "{printed}");

    let expected = fs::read_to_string(work.join("expected")).unwrap();
    let found = lines(mount.path());
    for (ours, theirs) in found.lines().zip(expected.lines()) {
        assert_eq!(ours, theirs);
    }
    assert_eq!(found.lines().count(), expected.lines().count());
    assert!(run(turbobd().args(["ls", "--json"])).contains("\"ublk\""));

    run(turbobd().arg("detach").arg(mount.path()));
    assert!(!Path::new(device).exists(), "{device} is left");
    assert_eq!(run(turbobd().args(["ls", "--json"])), "[]");
    run(turbobd().args(["daemon", "--stop"]));
    println!("the trees agree: {} names over {device}", found.lines().count());
}
