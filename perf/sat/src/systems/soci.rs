//! SOCI: layers as they are, with an index of each in the image's list of manifests.
//!
//! *Lazy* mounts each layer over FUSE and fetches spans on demand. *Parallel pull* uses no index: it downloads in pieces
//! and unpacks layers side by side, with the values of its guide. It talks to containerd 2 only: older ones do not
//! tell a snapshotter which layer it is asked for.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use super::containerd::{self, Containerd, Plugin, Snapshotter};
use super::{Converted, Running, Site, System, programs};
use crate::failure::{Attempt as _, Failure};
use crate::images::{Image, TAG};
use crate::measure::group::Group;
use crate::place::Place;
use crate::program::{self, Daemon};

/// Longest conversion.
const CONVERT: Duration = Duration::from_secs(1800);

/// Tag of the converted image.
const CONVERTED: &str = "soci";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Lazy,
    Prefetch,
    Parallel,
}

struct Soci {
    mode: Mode,
}

/// The rows of this system.
pub(super) fn rows() -> Vec<Box<dyn System>> {
    let modes = [Mode::Lazy, Mode::Prefetch, Mode::Parallel];
    modes.into_iter().map(|mode| Box::new(Soci { mode }) as Box<dyn System>).collect()
}

impl System for Soci {
    fn name(&self) -> &'static str {
        match self.mode {
            Mode::Lazy => "soci-lazy",
            Mode::Prefetch => "soci-prefetch",
            Mode::Parallel => "soci-parallel",
        }
    }

    fn title(&self) -> String {
        match self.mode {
            Mode::Lazy => "OCI gzip + SOCI index, lazy",
            Mode::Prefetch => "OCI gzip + SOCI index, lazy, prefetch",
            Mode::Parallel => "OCI gzip, SOCI parallel pull",
        }
        .into()
    }

    fn peer(&self) -> &'static str {
        "soci"
    }

    fn install(&self, place: &Place) -> Result<(), Failure> {
        containerd::installed(place)?;
        containerd::need_second(place, "tells SOCI which layer it prepares")?;
        let remedy = "`perf/sat/peers soci` builds it from its Go modules";
        for name in ["soci", "soci-snapshotter-grpc", "fusermount3"] {
            program::find(name, &programs(place)).ok_or_else(|| Failure::missing(name, remedy))?;
        }
        if self.mode == Mode::Prefetch {
            program::find("strace", &[]).ok_or_else(|| {
                Failure::missing("strace", "apt-get install strace (it lists the files of a start)")
            })?;
        }
        Ok(())
    }

    fn versions(&self, place: &Place) -> Vec<String> {
        let Some(file) = program::find("soci", &programs(place)) else { return Vec::new() };
        let said = program::run(Command::new(file).arg("--version"), Duration::from_secs(5));
        let version = said.unwrap_or_default();
        let version = version.split_whitespace().find(|word| word.starts_with('v'));
        vec![format!("SOCI {}", version.filter(|word| word.len() > 1).unwrap_or("v0.16.1"))]
    }

    fn convert(&self, site: &Site, image: &Image, repository: &str) -> Result<Converted, Failure> {
        if self.mode == Mode::Parallel {
            let (_, bytes) = site.registry.blobs(repository, TAG);
            return Ok(Converted { tag: TAG.into(), bytes, seconds: None });
        }
        let soci = program::find("soci", &site.programs())
            .ok_or_else(|| Failure::missing("soci", "perf/sat/peers soci"))?;
        let to = site.place.folder("work")?.join("soci");
        let prefetch = match self.mode {
            Mode::Prefetch => files_of_a_start(site, image)?,
            Mode::Lazy | Mode::Parallel => Vec::new(),
        };
        let start = Instant::now();
        let mut command = Command::new(soci);
        command.args(["convert", "--standalone", "--format", "oci-dir"]);
        for file in &prefetch {
            command.args(["--prefetch-file", file]);
        }
        command.arg(&image.layout).arg(&to);
        program::run(&command, CONVERT)?;
        site.registry.push_all(&to, repository, CONVERTED)?;
        let seconds = start.elapsed().as_secs_f64();
        let (_, bytes) = site.registry.blobs(repository, CONVERTED);
        site.place.clean()?;
        Ok(Converted { tag: CONVERTED.into(), bytes, seconds: Some(seconds) })
    }

    fn start(
        &self,
        site: &Site,
        _image: &Image,
        group: &Group,
        store: &Path,
    ) -> Result<Box<dyn Running>, Failure> {
        let program = program::find("soci-snapshotter-grpc", &site.programs())
            .ok_or_else(|| Failure::missing("soci-snapshotter-grpc", "perf/sat/peers soci"))?;
        let dir = store.join("soci");
        fs::create_dir_all(&dir).attempt(|| format!("make {}", dir.display()))?;
        let socket = dir.join("sock");
        let plugin = Plugin { name: "soci", socket: socket.clone() };
        let containerd = Containerd::start(site, group, store, Some(&plugin), None)?;
        let config = dir.join("config.toml");
        let text = configuration(self.mode, containerd.socket());
        fs::write(&config, text).attempt(|| format!("write {}", config.display()))?;
        let mut command = Command::new(program);
        command.arg("--address").arg(&socket).arg("--root").arg(dir.join("root"));
        command.arg("--config").arg(&config);
        let mut daemon = Daemon::start(&command, Some(group), &dir.join("log"))?;
        daemon.wait_until(Duration::from_secs(20), || socket.exists())?;
        Ok(Box::new(Snapshotter { containerd, name: "soci", daemons: vec![daemon] }))
    }
}

/// The configuration file. Parallel pull has the values of docs/parallel-mode.md, which keep containerd's own store.
fn configuration(mode: Mode, containerd: &Path) -> String {
    let containerd = containerd.display();
    match mode {
        Mode::Lazy => String::new(),
        Mode::Prefetch => "[prefetch]\nenable = true\n".into(),
        Mode::Parallel => format!(
            "[content_store]\ntype = \"containerd\"\ncontainerd_address = \"{containerd}\"\n\
             [pull_modes.soci_v2]\nenable = false\n[pull_modes.parallel_pull_unpack]\nenable = true\n\
             max_concurrent_downloads = 50\nmax_concurrent_downloads_per_image = 10\n\
             concurrent_download_chunk_size = \"8mb\"\nmax_concurrent_unpacks = 20\n\
             max_concurrent_unpacks_per_image = 10\ndiscard_unpacked_layers = true\n"
        ),
    }
}

/// Files that a start of the image opens, by `strace` of its service in an unpacked image.
///
/// SOCI leaves to its user which files to prefetch. These are exactly those of the start that is measured: the best
/// list that there can be.
fn files_of_a_start(site: &Site, image: &Image) -> Result<Vec<String>, Failure> {
    let strace = program::find("strace", &[])
        .ok_or_else(|| Failure::missing("strace", "apt-get install strace"))?;
    let work = site.place.folder("work")?;
    let (root, trace) = (work.join("traced"), work.join("strace"));
    super::unpacked(image, &root)?;
    let mut command = Command::new(strace);
    command.args(["-f", "-qq", "-z", "-e", "trace=open,openat,execve", "-o"]).arg(&trace);
    command.arg("env").arg("-i").args(&image.environment);
    command.arg(format!("PORT={}", image.question(0).port));
    command.arg("chroot").arg(&root).args(&image.command);
    let group = Group::new()?;
    let daemon = Daemon::start(&command, Some(&group), &work.join("traced.log"))?;
    let answered = image.question(0).wait(Instant::now() + Duration::from_secs(120));
    let said = daemon.said();
    drop(daemon);
    answered.map_err(|seen| {
        Failure::Invalid(format!("the traced start gave {seen}: {}", program::tail(&said)))
    })?;
    let text = fs::read_to_string(&trace).attempt(|| format!("read {}", trace.display()))?;
    let mut files: Vec<String> =
        opened(&text).filter(|file| root.join(&file[1..]).is_file()).collect();
    files.sort();
    files.dedup();
    Ok(files)
}

/// Absolute names in the lines of an `strace`.
fn opened(trace: &str) -> impl Iterator<Item = String> {
    trace.lines().filter_map(|line| {
        let name = line.split('"').nth(1)?;
        name.starts_with('/').then(|| name.to_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_names_of_opened_files_are_taken_from_a_trace() {
        let trace = "7 openat(AT_FDCWD, \"/etc/ld.so.cache\", O_RDONLY|O_CLOEXEC) = 3\n\
                     7 execve(\"/usr/bin/python3\", [\"python3\"], 0x7 /* 2 vars */) = 0\n\
                     8 openat(AT_FDCWD, \"lib\", O_RDONLY) = 4\n+++ exited with 0 +++\n";
        assert_eq!(opened(trace).collect::<Vec<_>>(), ["/etc/ld.so.cache", "/usr/bin/python3"]);
    }
}
