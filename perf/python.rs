//! A Python image with a large framework, made of this machine's Debian packages and PyPI's, and starts in it.

#![allow(unreachable_pub, dead_code, reason = "each benchmark uses a part")]

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use client::mounts;
use disk::volume::{Located, Volume, VolumeError, Waiter};
use disk::{Disk, DiskRange};
use frontends::looped::LoopedDevice;

/// The first imports of a data scientist's program: about 1,500 files.
pub const FRAMEWORK: &str = "import numpy, scipy.stats, pandas, sklearn.linear_model";
/// The first imports of a small service.
pub const SERVICE: &str = "import json, ssl, sqlite3, email, xml.dom, asyncio";

/// A layout with the image and its meta image under the tag `turbo`, created once: a layer of Debian with
/// Python, and on it a layer of pip's packages.
pub fn layout() -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let dir = root.join("target/perf/python");
    if !dir.join("made").exists() {
        eprintln!(
            "making {} once: apt's python3.11 must be installed, and pip reach PyPI",
            dir.display()
        );
        let script = r#"
set -euo pipefail
dir=$1; rm -rf "$dir"; mkdir -p "$dir/site/usr/local/lib/python3.11/dist-packages"
for package in libc6 libc-bin dash coreutils findutils tar grep sed gzip bash debianutils util-linux \
        libacl1 libattr1 libgmp10 libselinux1 libpcre2-8-0 libtinfo6 libgcc-s1 libstdc++6 libssl3 zlib1g libbz2-1.0 \
        liblzma5 libffi8 libexpat1 libsqlite3-0 libuuid1 libdb5.3 libncursesw6 libreadline8 media-types tzdata perl-base \
        python3.11 python3.11-minimal libpython3.11-minimal libpython3.11-stdlib; do
    dpkg -L "$package" 2>/dev/null || echo "no package $package" >&2
done | sort -u | while read -r path; do
    if [ -d "$path" ] && [ ! -L "$path" ]; then :; elif [ -e "$path" ]; then echo "${path#/}"; fi
done > "$dir/list"
find /usr/lib/python3.11 -name '*.pyc' | sed 's,^/,,' >> "$dir/list"
echo etc/ld.so.cache >> "$dir/list"
sed -i -E 's,^(bin|sbin|lib|lib64)/,usr/\1/,' "$dir/list"
{ printf "%s\n" bin sbin lib lib64; cat "$dir/list"; } | sort -u > "$dir/list.all"
tar -C / --numeric-owner --no-recursion -T "$dir/list.all" -cf - 2> "$dir/missing" | gzip -6 > "$dir/base.tar.gz" || true
python3.11 -m pip --version > /dev/null 2>&1 && pip="python3.11 -m pip" || pip=pip
$pip install --quiet --python-version 3.11 --only-binary=:all: --target "$dir/site/usr/local/lib/python3.11/dist-packages" numpy scipy pandas scikit-learn 2>&1 | grep -v WARNING || true
python3.11 -m compileall -q "$dir/site/usr/local/lib/python3.11/dist-packages" > /dev/null || true
tar -C "$dir/site" --numeric-owner --owner=0 --group=0 -cf - usr | gzip -6 > "$dir/site.tar.gz"
scripts/oci-layout "$dir/oci" latest "$dir/base.tar.gz" "$dir/site.tar.gz" > /dev/null
"$2" convert -r "oci:$dir/oci" -i latest --turboOCI turbo > /dev/null
touch "$dir/made"
"#;
        let turbobd = env!("CARGO_BIN_EXE_turbobd");
        let made = Command::new("bash")
            .args(["-c", script, "bash"])
            .arg(&dir)
            .arg(turbobd)
            .current_dir(root)
            .status();
        assert!(made.unwrap().success());
    }
    dir.join("oci")
}

/// A read of the disk: its first byte and its length.
pub type Read = (u64, u32);

/// A disk whose reads are recorded.
pub struct Watched {
    pub disk: Disk,
    pub reads: Mutex<Vec<Read>>,
}

impl Volume for Watched {
    fn size(&self) -> u64 {
        self.disk.size()
    }
    fn locate(
        &self,
        range: DiskRange,
        waiter: &mut dyn FnMut() -> Waiter,
    ) -> Result<Located, VolumeError> {
        self.reads.lock().unwrap().push((range.offset, range.len as u32));
        self.disk.locate(range, waiter)
    }
}

/// Mounts a disk, runs one of its commands in it (chroot), and unmounts it; returns the time of the command.
pub fn run(disk: &Arc<Watched>, command: &[&str]) -> Duration {
    let dir = tempfile::tempdir().unwrap();
    let place = dir.path().join("mnt");
    std::fs::create_dir(&place).unwrap();
    let device = LoopedDevice::start(disk.clone(), &dir.path().join("fuse"))
        .expect("root, FUSE and loop devices");
    mounts::mount_image(device.path(), &place, mounts::MountRights::default()).unwrap();
    let start = Instant::now();
    let status = Command::new("chroot").arg(&place).args(command).stdout(Stdio::null()).status();
    let time = start.elapsed();
    mounts::unmount_dir(&place).unwrap();
    device.stop().unwrap();
    assert!(status.unwrap().success(), "{command:?}");
    time
}
