//! The layer that all benchmarks use.

#![allow(
    unreachable_pub,
    dead_code,
    reason = "each benchmark is a program of its own and uses a part"
)]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

/// A real layer: this machine's /usr, its first 850 MB of tar, compressed in the way of `docker build`.
pub fn layer() -> PathBuf {
    if let Some(path) = std::env::var_os("TURBOBD_BENCH_LAYER") {
        return path.into();
    }
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/perf");
    let path = dir.join("usr.tar.gz");
    if !path.exists() {
        eprintln!("making {} once", path.display());
        // Whole files only, so that the tar is whole: paths in order until their sizes reach the limit.
        let script = format!(
            "set -e; mkdir -p {dir}; cd /; find usr -xdev \\( -type f -o -type l -o -type d \\) -printf '%s %p\\n' | sort -k2 \
             | awk '{{ total += $1 + 1024; if (total > 850e6) exit; $1 = \"\"; print substr($0, 2) }}' > {dir}/list; \
             tar --no-recursion --numeric-owner -T {dir}/list -cf - | gzip -6 > {dir}/usr.tmp; mv {dir}/usr.tmp {out}",
            dir = dir.display(),
            out = path.display()
        );
        assert!(Command::new("bash").args(["-c", &script]).status().unwrap().success());
    }
    path
}

/// Wall time of `gzip -dc` of a file.
pub fn gzip_dc(path: &Path) -> Duration {
    let start = Instant::now();
    let sink = std::fs::File::create("/dev/null").unwrap();
    assert!(Command::new("gzip").arg("-dc").arg(path).stdout(sink).status().unwrap().success());
    start.elapsed()
}

/// The median of an odd number of runs.
pub fn median(mut runs: Vec<f64>) -> f64 {
    runs.sort_by(f64::total_cmp);
    runs[runs.len() / 2]
}
