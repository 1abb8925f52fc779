//! stargz: images in eStargz, a gzip in which each file is a member of its own, mounted over FUSE.
//!
//! *Converted* has no knowledge of the start. *Optimized* has the files of a start in front, found by running it, and
//! they are fetched before the mount. *Plain* is what the snapshotter makes of an image that is not eStargz: a pull.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use super::containerd::{self, Containerd, Snapshotter};
use super::{Converted, Phase, Running, Site, System, programs};
use crate::failure::{Attempt as _, Failure};
use crate::images::{Image, TAG};
use crate::measure::group::Group;
use crate::place::Place;
use crate::program;

/// Longest conversion: eStargz compresses each file alone.
const CONVERT: Duration = Duration::from_secs(3600);

/// Longest pull.
const PULL: Duration = Duration::from_secs(1200);

/// Tag of the converted image.
const CONVERTED: &str = "esgz";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Converted,
    Optimized,
    Plain,
}

struct Stargz {
    mode: Mode,
}

/// The rows of this system.
pub(super) fn rows() -> Vec<Box<dyn System>> {
    let modes = [Mode::Optimized, Mode::Converted, Mode::Plain];
    modes.into_iter().map(|mode| Box::new(Stargz { mode }) as Box<dyn System>).collect()
}

impl System for Stargz {
    fn name(&self) -> &'static str {
        match self.mode {
            Mode::Converted => "stargz-converted",
            Mode::Optimized => "stargz-optimized",
            Mode::Plain => "stargz-plain",
        }
    }

    fn title(&self) -> String {
        match self.mode {
            Mode::Converted => "eStargz, converted only",
            Mode::Optimized => "eStargz, optimized by running it",
            Mode::Plain => "OCI gzip, stargz (falls back to a pull)",
        }
        .into()
    }

    fn peer(&self) -> &'static str {
        "stargz"
    }

    fn install(&self, place: &Place) -> Result<(), Failure> {
        containerd::installed(place)?;
        let remedy = "Debian's stargz-snapshotter has it";
        program::find("ctr-remote", &programs(place))
            .ok_or_else(|| Failure::missing("ctr-remote", remedy))?;
        let remedy = "no package has it: build it from its public source and put it on the PATH";
        program::find("containerd-stargz-grpc", &programs(place))
            .ok_or_else(|| Failure::missing("containerd-stargz-grpc", remedy))?;
        Ok(())
    }

    fn versions(&self, place: &Place) -> Vec<String> {
        let ask = |name: &str| {
            let file = program::find(name, &programs(place))?;
            let said =
                program::run(Command::new(file).arg("--version"), Duration::from_secs(5)).ok()?;
            Some(format!("{name} {}", said.split_whitespace().last()?))
        };
        ["ctr-remote", "containerd-stargz-grpc"].iter().filter_map(|name| ask(name)).collect()
    }

    fn convert(&self, site: &Site, image: &Image, repository: &str) -> Result<Converted, Failure> {
        if self.mode == Mode::Plain {
            let (_, bytes) = site.registry.blobs(repository, TAG);
            return Ok(Converted { tag: TAG.into(), bytes, seconds: None });
        }
        let store = site.place.folder("work")?;
        let group = Group::new()?;
        let containerd = Containerd::start(site, &group, &store, None, None)?;
        let reference = format!("{}/{repository}:{TAG}", site.registry.address());
        let converted = format!("{}/{repository}:{CONVERTED}", site.registry.address());
        let start = Instant::now();
        let done = containerd.pull(&reference, "overlayfs").and_then(|()| {
            let mut command = remote(site, &containerd)?;
            match self.mode {
                Mode::Optimized => {
                    let args = serde_json::to_string(&image.command)
                        .attempt(|| "write the command as JSON".into())?;
                    command.args(["image", "optimize", "--oci", "--plain-http", "--net-host"]);
                    // It runs the container as long as this and keeps what was read.
                    command.args(["--period", "20", "--entrypoint", &args, "--args", "[]"]);
                    command.args(["--env", &format!("PORT={}", image.question(0).port)]);
                }
                Mode::Converted | Mode::Plain => {
                    command.args(["image", "convert", "--oci", "--estargz"]);
                }
            }
            command.args([&reference, &converted]);
            program::run_in(&command, Some(&group), CONVERT)?;
            let mut push = containerd.ctr();
            push.args(["images", "push", "--plain-http", &converted]);
            program::run_in(&push, Some(&group), CONVERT)
        });
        containerd.stop()?;
        site.place.clean()?;
        done?;
        let seconds = start.elapsed().as_secs_f64();
        let (_, bytes) = site.registry.blobs(repository, CONVERTED);
        Ok(Converted { tag: CONVERTED.into(), bytes, seconds: Some(seconds) })
    }

    fn start(
        &self,
        site: &Site,
        _image: &Image,
        group: &Group,
        store: &Path,
    ) -> Result<Box<dyn Running>, Failure> {
        let program = program::find("containerd-stargz-grpc", &site.programs())
            .ok_or_else(|| Failure::missing("containerd-stargz-grpc", "its public source"))?;
        let dir = store.join("stargz");
        fs::create_dir_all(&dir).attempt(|| format!("make {}", dir.display()))?;
        let socket = dir.join("sock");
        let config = dir.join("config.toml");
        // The registry is plain HTTP; everything else is its default.
        let host = site.proxy.host();
        let text =
            format!("[[resolver.host.\"{host}\".mirrors]]\nhost = \"{host}\"\ninsecure = true\n");
        fs::write(&config, text).attempt(|| format!("write {}", config.display()))?;
        let mut command = Command::new(program);
        command.arg("--address").arg(&socket).arg("--root").arg(dir.join("root"));
        command.arg("--config").arg(&config).args(["--log-level", "warn"]);
        let behind = Snapshotter::behind(site, group, store, "stargz", (&command, &dir))?;
        let pull = remote(site, &behind.containerd)?;
        Ok(Box::new(Remote { behind, pull, group: group.clone() }))
    }
}

/// `ctr-remote` at this containerd.
fn remote(site: &Site, containerd: &Containerd) -> Result<Command, Failure> {
    let program = program::find("ctr-remote", &site.programs())
        .ok_or_else(|| Failure::missing("ctr-remote", "apt-get install stargz-snapshotter"))?;
    let mut command = Command::new(program);
    command.arg("-a").arg(containerd.socket());
    Ok(command)
}

/// stargz' snapshotter beside a containerd. Its own pull names the layers to the snapshotter.
struct Remote {
    behind: Snapshotter,
    pull: Command,
    group: Group,
}

impl Running for Remote {
    fn pull(&mut self, reference: &str) -> Result<Vec<Phase>, Failure> {
        let mut command = Command::new(self.pull.get_program());
        command.args(self.pull.get_args());
        command.args(["image", "rpull", "--plain-http", reference]);
        program::run_in(&command, Some(&self.group), PULL)?;
        Ok(Vec::new())
    }

    fn run(&self, image: &Image, reference: &str, number: u32) -> Result<Vec<Phase>, Failure> {
        self.behind.run(image, reference, number)
    }

    fn said(&self, number: u32) -> String {
        self.behind.said(number)
    }

    fn stop(self: Box<Self>) -> Result<(), Failure> {
        Box::new(self.behind).stop()
    }
}
