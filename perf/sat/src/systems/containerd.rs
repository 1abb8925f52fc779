//! containerd with overlayfs: the image is downloaded and unpacked, then the container starts.
//!
//! Also containerd as it is used by all rows: a daemon of its own for each run, with all its state in the run's store.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use super::{Converted, Phase, Running, Site, System, programs};
use crate::failure::{Attempt as _, Failure};
use crate::images::{Image, TAG};
use crate::measure::group::Group;
use crate::place::{Place, unmount_below};
use crate::program::{self, Daemon};

/// Longest pull: 2 GB over 25 Mbit/s would take 11 minutes.
const PULL: Duration = Duration::from_secs(1200);

/// Longest start of a container, of fifty at once on two cores.
const RUN: Duration = Duration::from_secs(300);

/// A snapshotter that containerd reaches over a socket.
#[derive(Clone, Debug)]
pub(super) struct Plugin {
    /// Its name for `--snapshotter`.
    pub(super) name: &'static str,
    /// Its socket.
    pub(super) socket: PathBuf,
}

/// A containerd that runs.
#[derive(Debug)]
pub(super) struct Containerd {
    daemon: Option<Daemon>,
    ctr: PathBuf,
    socket: PathBuf,
    store: PathBuf,
    group: Group,
}

/// Finds containerd and its companions.
pub(super) fn installed(place: &Place) -> Result<(), Failure> {
    let remedy =
        "apt-get install containerd, or perf/sat/peers containerd for the release of RESULTS.md";
    for name in ["containerd", "ctr", "runc", "containerd-shim-runc-v2"] {
        program::find(name, &programs(place)).ok_or_else(|| Failure::missing(name, remedy))?;
    }
    Ok(())
}

/// Version of containerd and runc.
pub(super) fn versions(place: &Place) -> Vec<String> {
    let ask = |name: &str| {
        let file = program::find(name, &programs(place))?;
        let text = program::run(Command::new(file).arg("--version"), RUN).ok()?;
        // "containerd github.com/containerd/containerd/v2 2.4.2 …", "runc version 1.1.5"
        let version = text.lines().next()?.split_whitespace().nth(2)?;
        Some(format!("{name} {version}"))
    };
    ["containerd", "runc"].iter().filter_map(|name| ask(name)).collect()
}

/// Fails if containerd is of the first generation; the second `does` what is needed.
pub(super) fn need_second(place: &Place, does: &str) -> Result<(), Failure> {
    if is_second(place) {
        return Ok(());
    }
    let why = format!("only containerd 2 {does}, and here is {}", versions(place).join(", "));
    Err(Failure::cannot("use this containerd", why))
}

/// Whether the containerd that is found is of the second generation, whose pulls go through the transfer service.
fn is_second(place: &Place) -> bool {
    let version = versions(place).into_iter().find(|text| text.starts_with("containerd "));
    version.is_some_and(|text| {
        !text.trim_start_matches("containerd ").trim_start_matches('v').starts_with("1.")
    })
}

impl Containerd {
    /// Starts containerd with its state below `store`.
    pub(super) fn start(
        site: &Site,
        group: &Group,
        store: &Path,
        plugin: Option<&Plugin>,
        unpacks: Option<u32>,
    ) -> Result<Self, Failure> {
        let folders = programs(&site.place);
        let found = |name: &str| {
            program::find(name, &folders)
                .ok_or_else(|| Failure::missing(name, "apt-get install containerd"))
        };
        let (containerd, ctr) = (found("containerd")?, found("ctr")?);
        let dir = store.join("containerd");
        fs::create_dir_all(&dir).attempt(|| format!("make {}", dir.display()))?;
        let second = is_second(&site.place);
        let socket = dir.join("sock");
        let config = dir.join("config.toml");
        fs::write(&config, configuration(&dir, second, plugin, unpacks))
            .attempt(|| format!("write {}", config.display()))?;
        let mut command = Command::new(&containerd);
        command.arg("-c").arg(&config);
        // The shim is looked up on the PATH: that of the same release must come first.
        let beside = containerd.parent().unwrap_or(Path::new("/usr/bin")).to_owned();
        let path = std::env::var_os("PATH").unwrap_or_default();
        let usual = ["/usr/sbin", "/sbin"].map(PathBuf::from);
        let path = std::env::join_paths(
            [beside].into_iter().chain(std::env::split_paths(&path)).chain(usual),
        );
        command.env("PATH", path.attempt(|| "set the PATH of containerd".into())?);
        let mut daemon = Daemon::start(&command, Some(group), &dir.join("log"))?;
        let mut version = Command::new(&ctr);
        version.arg("-a").arg(&socket).arg("version");
        daemon.wait_until(Duration::from_secs(30), || {
            socket.exists() && program::run(&version, Duration::from_secs(5)).is_ok()
        })?;
        Ok(Self {
            daemon: Some(daemon),
            ctr,
            socket,
            store: store.to_owned(),
            group: group.clone(),
        })
    }

    /// A `ctr` command.
    pub(super) fn ctr(&self) -> Command {
        let mut command = Command::new(&self.ctr);
        command.arg("-a").arg(&self.socket);
        command
    }

    /// Its socket.
    pub(super) fn socket(&self) -> &Path {
        &self.socket
    }

    /// Pulls an image through a snapshotter.
    pub(super) fn pull(&self, reference: &str, snapshotter: &str) -> Result<(), Failure> {
        let mut command = self.ctr();
        command.args(["images", "pull", "--plain-http", "--snapshotter", snapshotter, reference]);
        program::run_in(&command, Some(&self.group), PULL).map(drop)
    }

    /// Starts a container: from the image of a snapshotter, or from a tree that is mounted.
    pub(super) fn run(&self, image: &Image, from: &From<'_>, number: u32) -> Result<(), Failure> {
        let mut command = self.ctr();
        command.args(["run", "--detach", "--net-host", "--cgroup", &Group::container(number)]);
        command.arg("--log-uri").arg(format!("file://{}", self.output(number).display()));
        for variable in &image.environment {
            command.args(["--env", variable]);
        }
        if !image.port_variable.is_empty() {
            let port = image.question(number).port;
            command.args(["--env", &format!("{}={port}", image.port_variable)]);
        }
        if !image.directory.is_empty() {
            command.args(["--cwd", &image.directory]);
        }
        if !image.user.is_empty() {
            command.args(["--user", &image.user]);
        }
        match from {
            From::Image { reference, snapshotter } => {
                command.args(["--snapshotter", snapshotter, reference]);
            }
            From::Tree(tree) => {
                command.arg("--rootfs").arg(tree);
            }
        }
        command.arg(format!("container-{number}")).args(&image.command);
        program::run_in(&command, Some(&self.group), RUN).map(drop)
    }

    fn output(&self, number: u32) -> PathBuf {
        self.store.join(format!("output-{number}"))
    }

    /// The end of what a container wrote, and of what containerd did.
    pub(super) fn said(&self, number: u32) -> String {
        let text = fs::read(self.output(number)).unwrap_or_default();
        program::tail(&String::from_utf8_lossy(&text))
    }

    /// Ends the containers, then containerd, and unmounts what they used.
    pub(super) fn stop(mut self) -> Result<(), Failure> {
        let mut list = self.ctr();
        list.args(["tasks", "list", "--quiet"]);
        let tasks = program::run(&list, RUN).unwrap_or_default();
        for task in tasks.lines().filter(|line| !line.is_empty()) {
            let mut end = self.ctr();
            end.args(["tasks", "delete", "--force", task]);
            // What does not end so is ended with the run's cgroup.
            let _ = program::run(&end, Duration::from_secs(20));
        }
        self.daemon.take();
        unmount_below(&self.store.join("containerd"))
    }
}

/// Where the root of a container comes from.
pub(super) enum From<'a> {
    /// An image that a snapshotter has.
    Image {
        /// Its reference.
        reference: &'a str,
        /// The snapshotter's name.
        snapshotter: &'a str,
    },
    /// A mounted tree that can be written.
    Tree(&'a Path),
}

/// The configuration file.
fn configuration(
    dir: &Path,
    second: bool,
    plugin: Option<&Plugin>,
    unpacks: Option<u32>,
) -> String {
    let at = |name: &str| dir.join(name).display().to_string();
    // CRI is not used, and would want networks.
    let cri = match second {
        true => {
            "\"io.containerd.grpc.v1.cri\", \"io.containerd.cri.v1.images\", \"io.containerd.cri.v1.runtime\""
        }
        false => "\"io.containerd.grpc.v1.cri\"",
    };
    let version = if second { 3 } else { 2 };
    let mut text = format!(
        "version = {version}\nroot = \"{}\"\nstate = \"{}\"\ndisabled_plugins = [{cri}]\n\
         [grpc]\n  address = \"{}\"\n[ttrpc]\n  address = \"{}\"\n",
        at("root"),
        at("state"),
        at("sock"),
        at("ttrpc")
    );
    if let Some(plugin) = plugin {
        text += &format!(
            "[proxy_plugins.{}]\n  type = \"snapshot\"\n  address = \"{}\"\n",
            plugin.name,
            plugin.socket.display()
        );
        if second {
            text += &format!(
                "  [proxy_plugins.{}.exports]\n    enable_remote_snapshot_annotations = \"true\"\n",
                plugin.name
            );
        }
    }
    if second && (plugin.is_some() || unpacks.is_some()) {
        text += "[plugins.\"io.containerd.transfer.v1.local\"]\n";
        if let Some(unpacks) = unpacks {
            text += &format!("  max_concurrent_unpacks = {unpacks}\n");
        }
        // An entry replaces the built-in ones, so overlayfs is named too.
        if let Some(plugin) = plugin {
            for name in ["overlayfs", plugin.name] {
                text += &format!(
                    "  [[plugins.\"io.containerd.transfer.v1.local\".unpack_config]]\n    platform = \"linux\"\n    snapshotter = \"{name}\"\n"
                );
            }
        }
    }
    text
}

/// A row of containerd's own snapshotter.
struct Overlayfs {
    unpacks: Option<u32>,
}

/// The rows of this system.
pub(super) fn rows() -> Vec<Box<dyn System>> {
    vec![Box::new(Overlayfs { unpacks: None }), Box::new(Overlayfs { unpacks: Some(3) })]
}

impl System for Overlayfs {
    fn name(&self) -> &'static str {
        if self.unpacks.is_some() { "overlayfs-3" } else { "overlayfs" }
    }

    fn title(&self) -> String {
        match self.unpacks {
            None => "OCI gzip, containerd + overlayfs".into(),
            Some(unpacks) => format!("OCI gzip, overlayfs, max_concurrent_unpacks = {unpacks}"),
        }
    }

    fn peer(&self) -> &'static str {
        "containerd"
    }

    fn install(&self, place: &Place) -> Result<(), Failure> {
        installed(place)?;
        if self.unpacks.is_some() && !is_second(place) {
            let why = format!(
                "containerd 2.2 or newer has this setting, and here is {}",
                versions(place).join(", ")
            );
            return Err(Failure::cannot("unpack layers side by side", why));
        }
        Ok(())
    }

    fn versions(&self, place: &Place) -> Vec<String> {
        versions(place)
    }

    fn convert(&self, site: &Site, _image: &Image, repository: &str) -> Result<Converted, Failure> {
        let (_, bytes) = site.registry.blobs(repository, TAG);
        Ok(Converted { tag: TAG.into(), bytes, seconds: None })
    }

    fn start(
        &self,
        site: &Site,
        _image: &Image,
        group: &Group,
        store: &Path,
    ) -> Result<Box<dyn Running>, Failure> {
        let containerd = Containerd::start(site, group, store, None, self.unpacks)?;
        Ok(Box::new(Snapshotter { containerd, name: "overlayfs", daemons: Vec::new() }))
    }
}

/// A snapshotter of containerd, with the daemons behind it.
#[derive(Debug)]
pub(super) struct Snapshotter {
    /// The containerd that uses it.
    pub(super) containerd: Containerd,
    /// Its name.
    pub(super) name: &'static str,
    /// Its own daemons; they end after containerd.
    pub(super) daemons: Vec<Daemon>,
}

impl Snapshotter {
    /// Starts the daemon of the snapshotter `name`, which listens at `dir/sock`, and a containerd that uses it.
    ///
    /// # Errors
    /// [`Failure`] if one of them does not start.
    pub(super) fn behind(
        site: &Site,
        group: &Group,
        store: &Path,
        name: &'static str,
        (command, dir): (&Command, &Path),
    ) -> Result<Self, Failure> {
        let socket = dir.join("sock");
        let mut daemon = Daemon::start(command, Some(group), &dir.join("log"))?;
        daemon.wait_until(Duration::from_secs(20), || socket.exists())?;
        let plugin = Plugin { name, socket };
        let containerd = Containerd::start(site, group, store, Some(&plugin), None)?;
        Ok(Self { containerd, name, daemons: vec![daemon] })
    }
}

impl Running for Snapshotter {
    fn pull(&mut self, reference: &str) -> Result<Vec<Phase>, Failure> {
        self.containerd.pull(reference, self.name)?;
        Ok(Vec::new())
    }

    fn run(&self, image: &Image, reference: &str, number: u32) -> Result<Vec<Phase>, Failure> {
        let from = From::Image { reference, snapshotter: self.name };
        self.containerd.run(image, &from, number)?;
        Ok(Vec::new())
    }

    fn said(&self, number: u32) -> String {
        self.containerd.said(number)
    }

    fn stop(self: Box<Self>) -> Result<(), Failure> {
        let Self { containerd, daemons, .. } = *self;
        let stopped = containerd.stop();
        drop(daemons);
        stopped
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_snapshotter_is_named_to_the_transfer_service_beside_overlayfs() {
        let plugin = Plugin { name: "soci", socket: "/s/soci.sock".into() };
        let text = configuration(Path::new("/s"), true, Some(&plugin), Some(3));
        assert!(
            text.contains("snapshotter = \"overlayfs\"") && text.contains("snapshotter = \"soci\"")
        );
        assert!(text.contains("max_concurrent_unpacks = 3"));
        assert!(text.starts_with("version = 3\n"));
        let first = configuration(Path::new("/s"), false, Some(&plugin), None);
        assert!(first.starts_with("version = 2\n") && !first.contains("transfer"), "{first}");
    }
}
