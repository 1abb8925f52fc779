//! turbobd: the image's layers stay in the registry, the container starts on a device of the image.
//!
//! Each row differs in what is there beside the image. *As it is*: nothing, the host builds the index when it attaches.
//! *First start*: a meta image was built before, no start of it was seen. *Learned*: this host has seen one start.
//! *Published*: another host has seen one and put its trace beside the image. *Native*: the image was converted
//! whole. The container's root is an overlay with an empty upper directory over the mounted device. The configuration
//! is the default one, with its folders in the run's store; rows with `-nofill` are without the background fill.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::mount::{MountFlags, mount};
use serde_json::json;

use super::containerd::{Containerd, From};
use super::{Converted, Phase, Running, Site, System, containerd};
use crate::failure::{Attempt as _, Failure};
use crate::images::{Image, TAG};
use crate::measure::group::Group;
use crate::place::{Place, unmount_below};
use crate::program::{self, Daemon};

/// Longest conversion of an image of gigabytes.
const CONVERT: Duration = Duration::from_secs(1800);

/// Longest attach: one without a meta image reads all layers.
const ATTACH: Duration = Duration::from_secs(1200);

/// Longest wait for the answer of a start that is recorded.
const RECORD: Duration = Duration::from_secs(300);

/// Longest wait until no device is in use after a run.
const STOP: Duration = Duration::from_secs(20);

/// Tag of what a conversion has made.
const CONVERTED: &str = "converted";

/// What is there beside the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Beside {
    /// Nothing.
    Nothing,
    /// A meta image.
    Meta,
    /// A meta image, and on this host the trace of a start.
    Learned,
    /// A meta image, and in the registry the trace of a start.
    Published,
    /// The native image.
    Native,
}

struct Turbobd {
    beside: Beside,
    fill: bool,
}

/// The rows of this system.
pub(super) fn rows() -> Vec<Box<dyn System>> {
    let row = |beside, fill| Box::new(Turbobd { beside, fill }) as Box<dyn System>;
    vec![
        row(Beside::Nothing, true),
        row(Beside::Meta, true),
        row(Beside::Meta, false),
        row(Beside::Learned, true),
        row(Beside::Learned, false),
        row(Beside::Published, true),
        row(Beside::Native, true),
    ]
}

/// The program: `$SAT_TURBOBD`, or the one that was built here.
fn binary(place: &Place) -> Result<PathBuf, Failure> {
    let file = std::env::var_os("SAT_TURBOBD")
        .map_or_else(|| place.repository.join("target/release/turbobd"), PathBuf::from);
    match file.is_file() {
        true => Ok(file),
        false => Err(Failure::missing(&file.display().to_string(), "cargo build --release")),
    }
}

impl Turbobd {
    /// Folder with the trace that a start has left, of this row and image.
    fn traces(&self, place: &Place, image: &Image) -> Result<PathBuf, Failure> {
        place.folder(&format!("traces/{}/{}", image.name, self.name()))
    }

    /// Starts the image once and removes its device, which ends the recording; the trace's file.
    fn record(&self, site: &Site, image: &Image, reference: &str) -> Result<PathBuf, Failure> {
        let kept = self.traces(&site.place, image)?;
        let cannot = || format!("keep a trace in {}", kept.display());
        fs::remove_dir_all(&kept).attempt(cannot)?;
        site.place.clean()?;
        let store = site.place.folder("work")?;
        let group = Group::new()?;
        // No trace is kept, so this start has none.
        let mut running = self.start(site, image, &group, &store)?;
        let started = running.pull(reference).and_then(|_| running.run(image, reference, 0));
        let answered = started.and_then(|_| {
            let answered = image.question(0).wait(Instant::now() + RECORD);
            answered.map_err(|seen| Failure::Late {
                what: "a correct answer of the start to be recorded".into(),
                seconds: RECORD.as_secs(),
                detail: format!(": {seen}; {}", running.said(0)),
            })
        });
        let stopped = running.stop();
        answered?;
        stopped?;
        let traces = store.join("traces");
        let found = trace_in(&traces).ok_or_else(|| {
            Failure::Invalid("the start to be recorded left no trace behind".into())
        })?;
        fs::create_dir_all(&kept).attempt(cannot)?;
        let copy = kept.join(found.file_name().unwrap_or_default());
        fs::copy(&found, &copy).attempt(cannot)?;
        site.place.clean()?;
        Ok(copy)
    }
}

/// The trace in a folder, if there is one.
fn trace_in(folder: &Path) -> Option<PathBuf> {
    let entries = fs::read_dir(folder).ok()?.flatten().map(|entry| entry.path());
    entries.into_iter().find(|path| path.extension().is_some_and(|extension| extension == "trace"))
}

impl System for Turbobd {
    fn name(&self) -> &'static str {
        match (self.beside, self.fill) {
            (Beside::Nothing, _) => "turbobd-plain",
            (Beside::Meta, true) => "turbobd-first",
            (Beside::Meta, false) => "turbobd-first-nofill",
            (Beside::Learned, true) => "turbobd-learned",
            (Beside::Learned, false) => "turbobd-learned-nofill",
            (Beside::Published, _) => "turbobd-published",
            (Beside::Native, _) => "turbobd-native",
        }
    }

    fn title(&self) -> String {
        let what = match self.beside {
            Beside::Nothing => "OCI gzip as it is, turbobd",
            Beside::Meta => "TurboOCI, turbobd, first start",
            Beside::Learned => "TurboOCI, turbobd, learned trace",
            Beside::Published => "TurboOCI, turbobd, published trace",
            Beside::Native => "overlaybd native, turbobd",
        };
        if self.fill { what.into() } else { format!("{what}, fill off") }
    }

    fn peer(&self) -> &'static str {
        "turbobd"
    }

    fn install(&self, place: &Place) -> Result<(), Failure> {
        containerd::installed(place)?;
        binary(place).map(drop)
    }

    fn versions(&self, place: &Place) -> Vec<String> {
        let Ok(file) = binary(place) else { return Vec::new() };
        let said = program::run(Command::new(file).arg("--version"), Duration::from_secs(5));
        said.into_iter().map(|text| text.trim().to_owned()).collect()
    }

    fn convert(&self, site: &Site, image: &Image, repository: &str) -> Result<Converted, Failure> {
        let registry = site.registry.address();
        let bytes = |tag: &str| site.registry.blobs(repository, tag).1;
        let option = match self.beside {
            Beside::Nothing => {
                return Ok(Converted { tag: TAG.into(), bytes: bytes(TAG), seconds: None });
            }
            Beside::Native => "--overlaybd",
            Beside::Meta | Beside::Learned | Beside::Published => "--turboOCI",
        };
        let turbobd = binary(&site.place)?;
        let start = Instant::now();
        let mut command = Command::new(&turbobd);
        command.args([
            "convert",
            "-r",
            &format!("{registry}/{repository}"),
            "-i",
            TAG,
            option,
            CONVERTED,
        ]);
        program::run(&command, CONVERT)?;
        let seconds = start.elapsed().as_secs_f64();
        // A meta image is used together with the layers that it describes.
        let layers = if self.beside == Beside::Native { 0 } else { bytes(TAG) };
        let converted = Converted {
            tag: CONVERTED.into(),
            bytes: layers + bytes(CONVERTED),
            seconds: Some(seconds),
        };
        if matches!(self.beside, Beside::Learned | Beside::Published) {
            let reference = format!("{}/{repository}:{CONVERTED}", site.proxy.host());
            let trace = self.record(site, image, &reference)?;
            if self.beside == Beside::Published {
                let mut publish = Command::new(&turbobd);
                publish.args(["trace", "publish", "-t"]).arg(&trace);
                publish.arg(format!("{registry}/{repository}:{CONVERTED}"));
                program::run(&publish, CONVERT)?;
                // It is in the registry now, and only there.
                fs::remove_file(&trace).attempt(|| format!("remove {}", trace.display()))?;
            }
        }
        Ok(converted)
    }

    fn start(
        &self,
        site: &Site,
        image: &Image,
        group: &Group,
        store: &Path,
    ) -> Result<Box<dyn Running>, Failure> {
        let turbobd = binary(&site.place)?;
        let containerd = Containerd::start(site, group, store, None, None)?;
        let at = |name: &str| store.join(name);
        for name in ["run", "mnt", "traces"] {
            fs::create_dir_all(at(name)).attempt(|| format!("make {}", at(name).display()))?;
        }
        if let Some(trace) = trace_in(&self.traces(&site.place, image)?) {
            let to = at("traces").join(trace.file_name().unwrap_or_default());
            fs::copy(&trace, &to).attempt(|| format!("give the host {}", trace.display()))?;
        }
        let mut config = json!({
            "cacheConfig": { "cacheDir": at("encoded") },
            "gzipCacheConfig": { "cacheDir": at("decoded") },
            "turbobd": { "traces": { "dir": at("traces") }, "metaDir": at("meta") },
        });
        if !self.fill {
            config["download"] = json!({ "enable": false });
        }
        let file = at("turbobd.json");
        fs::write(&file, config.to_string()).attempt(|| format!("write {}", file.display()))?;
        let with = |command: &mut Command| {
            command.env("TURBOBD_RUN_DIR", at("run")).env("TURBOBD_SERVICE_CONFIG", &file);
            command.env("RUST_LOG", "turbobd=info,turbobd_client=info");
        };
        let mut command = Command::new(&turbobd);
        command.arg("daemon");
        with(&mut command);
        let mut daemon = Daemon::start(&command, Some(group), &at("turbobd.log"))?;
        daemon.wait_until(Duration::from_secs(20), || at("run/turbobd.sock").exists())?;
        let mut attach = Command::new(&turbobd);
        attach.arg("attach");
        with(&mut attach);
        let mut end = Command::new(&turbobd);
        end.args(["daemon", "--stop"]);
        with(&mut end);
        let store = store.to_owned();
        Ok(Box::new(Attached { containerd, daemon, attach, end, store, group: group.clone() }))
    }
}

/// turbobd's daemon beside a containerd.
struct Attached {
    containerd: Containerd,
    daemon: Daemon,
    /// `attach` without its arguments.
    attach: Command,
    /// What ends the daemon.
    end: Command,
    store: PathBuf,
    group: Group,
}

impl Running for Attached {
    fn pull(&mut self, reference: &str) -> Result<Vec<Phase>, Failure> {
        let mut command = Command::new(self.attach.get_program());
        for (name, value) in self.attach.get_envs() {
            if let Some(value) = value {
                command.env(name, value);
            }
        }
        command.args(["attach", reference, "--mount"]).arg(self.store.join("mnt"));
        let (_, said) = program::both(&command, Some(&self.group), ATTACH)?;
        Ok(phases(&said))
    }

    fn run(&self, image: &Image, _reference: &str, number: u32) -> Result<Vec<Phase>, Failure> {
        let start = Instant::now();
        let at = |name: &str| self.store.join(format!("{name}-{number}"));
        for name in ["upper", "overlay", "root"] {
            fs::create_dir_all(at(name)).attempt(|| format!("make {}", at(name).display()))?;
        }
        let options = format!(
            "lowerdir={},upperdir={},workdir={}",
            self.store.join("mnt").display(),
            at("upper").display(),
            at("overlay").display()
        );
        let cannot = || format!("mount the overlay {}", at("root").display());
        let options = std::ffi::CString::new(options).attempt(cannot)?;
        mount("overlay", at("root"), "overlay", MountFlags::empty(), Some(options.as_c_str()))
            .attempt(cannot)?;
        let seconds = start.elapsed().as_secs_f64();
        self.containerd.run(image, &From::Tree(&at("root")), number)?;
        Ok(vec![("overlay".into(), seconds)])
    }

    fn said(&self, number: u32) -> String {
        let daemon = program::tail(&self.daemon.said());
        format!("{} (daemon: {daemon})", self.containerd.said(number))
    }

    fn stop(self: Box<Self>) -> Result<(), Failure> {
        let Self { containerd, daemon, end, store, .. } = *self;
        containerd.stop()?;
        unmount_below(&store)?;
        // A device is in use until the last process of a container and its mounts are gone.
        let until = Instant::now() + STOP;
        let ended = loop {
            let ended = program::run(&end, STOP);
            if ended.is_ok() || Instant::now() > until {
                break ended;
            }
            std::thread::sleep(Duration::from_millis(50));
        };
        drop(daemon);
        ended.map(drop)
    }
}

/// Phases of an attach, from its log: `opened in 1.2 ms, device made in 3.4 ms`, `mounted in 5.6 ms`.
fn phases(log: &str) -> Vec<Phase> {
    let known = [("opened in ", "open"), ("device made in ", "device"), ("mounted in ", "mount")];
    let find = |(start, name): (&str, &str)| {
        let (_, rest) = log.split_once(start)?;
        let mut words = rest.split([' ', ',', '\n']);
        let (value, unit): (f64, &str) = (words.next()?.parse().ok()?, words.next()?);
        (unit == "ms").then(|| (name.to_owned(), value / 1e3))
    };
    known.into_iter().filter_map(find).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_phases_of_an_attach_are_read_from_its_log() {
        let log = "INFO turbobd_client: opened in 12.5 ms, device made in 3.4 ms\nINFO mounted in 5.6 ms\n";
        let expected = [("open", 0.0125), ("device", 0.0034), ("mount", 0.0056)];
        assert_eq!(phases(log), expected.map(|(name, seconds)| (name.to_owned(), seconds)));
        assert!(phases("nothing of the kind").is_empty());
    }
}
