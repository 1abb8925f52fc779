//! Comparison with an independent oracle: containerd unpacks the same image into overlayfs, and its tree must
//! equal the tree of the converted image mounted by the kernel.

use crate::listing;
use crate::machine;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crate::listing::{differences, list};
use crate::machine::{Mounted, layout, run, turbobd};

/// A containerd of this test, with all its state in one directory.
struct Containerd {
    process: Child,
    dir: tempfile::TempDir,
}

impl Containerd {
    fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name).display().to_string();
        let config = format!(
            "version = 2\nroot = \"{}\"\nstate = \"{}\"\ndisabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n\
             [grpc]\n  address = \"{}\"\n[ttrpc]\n  address = \"{}\"\n",
            at("root"),
            at("state"),
            at("sock"),
            at("ttrpc")
        );
        fs::write(dir.path().join("config.toml"), config).unwrap();
        let log = fs::File::create(dir.path().join("log")).unwrap();
        let process = Command::new("containerd")
            .arg("-c")
            .arg(dir.path().join("config.toml"))
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .expect("containerd is needed: scripts/install-needs test");
        let containerd = Self { process, dir };
        let start = Instant::now();
        while !containerd.ctr().arg("version").output().unwrap().status.success() {
            assert!(start.elapsed() < Duration::from_secs(20), "containerd does not answer");
            std::thread::sleep(Duration::from_millis(50));
        }
        containerd
    }

    fn ctr(&self) -> Command {
        let mut command = Command::new("ctr");
        command.arg("-a").arg(self.dir.path().join("sock"));
        command
    }

    /// Imports and unpacks an OCI layout; returns the mounted view.
    fn mount(&self, layout: &Path, name: &str) -> ContainerdMount<'_> {
        let tar = self.dir.path().join(format!("{name}.tar"));
        run(Command::new("tar").arg("-C").arg(layout).arg("-cf").arg(&tar).arg("."));
        run(self
            .ctr()
            .args(["images", "import", "--base-name", name, "--snapshotter", "overlayfs"])
            .arg(&tar));
        let dir = self.dir.path().join(format!("{name}.mnt"));
        fs::create_dir(&dir).unwrap();
        run(self
            .ctr()
            .args(["images", "mount", "--snapshotter", "overlayfs"])
            .arg(format!("{name}:latest"))
            .arg(&dir));
        ContainerdMount { containerd: self, dir }
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        let _ = Command::new("kill").arg(self.process.id().to_string()).status();
        let _ = self.process.wait();
    }
}

struct ContainerdMount<'c> {
    containerd: &'c Containerd,
    dir: PathBuf,
}

impl Drop for ContainerdMount<'_> {
    fn drop(&mut self) {
        let _ = self.containerd.ctr().args(["images", "unmount"]).arg(&self.dir).output();
    }
}

/// Converts `layers` and asserts that the kernel shows the same tree of the result as containerd of the
/// original.
fn assert_same_tree(containerd: &Containerd, work: &Path, name: &str, layers: &[PathBuf]) {
    let started = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs() as i64;
    let dir = work.join(name);
    let repository = layout(&dir, "latest", layers);
    let theirs_mounted = containerd.mount(&dir, name);
    let theirs = list(&theirs_mounted.dir);

    run(turbobd().args(["convert", "-r", &repository, "-i", "latest", "--turboOCI", "turbo"]));
    let raw = work.join(format!("{name}.raw"));
    run(turbobd().args(["export", &format!("{repository}:turbo"), "-o"]).arg(&raw));
    run(Command::new("e2fsck").arg("-fn").arg(&raw));
    let mounted = Mounted::ext4(&raw);
    let ours = list(mounted.path());

    // In containerd, directories that no layer describes get the time of the unpack.
    let unpacked_now =
        |_: &str, their: &listing::Listed| their.directory && their.mtime.0 >= started - 60;
    let skip = |path: &str| path == "." || path == "lost+found";
    let found = differences(&ours, &theirs, &skip, &unpacked_now);
    assert!(found.is_empty(), "{name}: {} differences\n{}", found.len(), found.join("\n"));
    assert!(ours.len() > 3, "{name}: the listing is empty");
    println!("{name}: {} names agree", ours.len());
}

/// Creates the layers of `interop/gen_layers.py`, without the hard links into lower layers that containerd
/// cannot unpack.
fn generated_layers(work: &Path) -> PathBuf {
    let dir = work.join("layers");
    let tests = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests");
    run(Command::new("python3").arg(tests.join("interop/gen_layers.py")).arg(&dir));
    run(Command::new("python3").arg(tests.join("interop/odd_layers.py")).arg(&dir));
    dir
}

#[test]
fn a_mounted_image_shows_what_containerd_shows() {
    machine::need_root();
    let work = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let layers = generated_layers(work.path());
    let containerd = Containerd::start();
    let gz = |name: &str| layers.join(format!("{name}.tar.gz"));
    for (name, stack) in [
        ("pax", vec![gz("base"), gz("upper-linkless")]),
        ("gnu", vec![gz("base-gnu"), gz("upper-gnu-linkless")]),
        ("multi", vec![gz("base-multi"), gz("upper-simple")]),
        ("stored", vec![gz("base-l0"), gz("upper-nex")]),
        ("named", vec![gz("base-l9name"), gz("through-symlink")]),
        ("odd", vec![gz("odd-lower"), gz("odd-middle"), gz("odd-upper")]),
        ("sparse", vec![gz("sparse-pax00"), gz("sparse-pax01"), gz("sparse-pax10")]),
    ] {
        assert_same_tree(&containerd, work.path(), name, &stack);
    }
}

/// The image that `scripts/demo` creates: a real Debian root and a layer of whiteouts.
#[test]
fn a_debian_root_shows_what_containerd_shows() {
    machine::need_root();
    let demo =
        std::env::var_os("TURBOBD_DEMO_DIR").map_or("/var/tmp/turbobd-demo".into(), PathBuf::from);
    let layers = [demo.join("lower.tar.gz"), demo.join("upper.tar.gz")];
    if !layers.iter().all(|layer| layer.exists()) {
        let required = std::env::var_os("TURBOBD_REQUIRE_ALL").is_some_and(|value| value == "1");
        assert!(!required, "run scripts/demo first: it makes the image in {}", demo.display());
        println!("SKIPPED: scripts/demo has not made its image in {}", demo.display());
        return;
    }
    let work = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    assert_same_tree(&Containerd::start(), work.path(), "debian", &layers);
}

#[test]
fn a_hard_link_into_a_lower_layer_shares_its_inode_and_sets_its_attributes() {
    machine::need_root();
    let work = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let layers = generated_layers(work.path());
    let repository = layout(
        &work.path().join("oci"),
        "latest",
        &[layers.join("base.tar.gz"), layers.join("upper.tar.gz")],
    );
    run(turbobd().args(["convert", "-r", &repository, "-i", "latest", "--turboOCI", "turbo"]));
    let raw = work.path().join("raw");
    run(turbobd().args(["export", &format!("{repository}:turbo"), "-o"]).arg(&raw));
    run(Command::new("e2fsck").arg("-fn").arg(&raw));
    let mounted = Mounted::ext4(&raw);
    let tree = list(mounted.path());
    assert_eq!(
        tree["files/t100000"].what,
        tree["links/hard-lower"].what.replace(" same-as=files/t100000", "")
    );
    assert!(
        tree["links/hard-lower"].what.contains("links=2 same-as=files/t100000"),
        "{}",
        tree["links/hard-lower"].what
    );
}
