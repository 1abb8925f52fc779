//! All of it in order: images, conversions, runs, report. What fails is said and recorded, the rest goes on.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use crate::arguments::Arguments;
use crate::failure::{Attempt as _, Failure};
use crate::images::{self, Definition, Image, TAG};
use crate::measure::Run;
use crate::network::proxy::Proxy;
use crate::network::registry::Registry;
use crate::network::shape::{SHAPES, Shape};
use crate::place::{self, Place};
use crate::plan::{self, Batch};
use crate::program;
use crate::record::{About, Cell, Records, RunRecord};
use crate::report;
use crate::systems::{self, Converted, Site, System};

/// Port of the registry; the proxy has the next one. `$SAT_PORT` is another.
const PORT: u16 = 5580;

/// Does what the command line asks for; true if every cell that can be measured here was.
pub(crate) fn run(arguments: &Arguments) -> Result<bool, Failure> {
    let place = Place::new()?;
    if arguments.clean {
        place.clean()?;
        return Ok(true);
    }
    let definitions = Definition::all(&place)?;
    if arguments.list {
        list(&place, &definitions);
        return Ok(true);
    }
    let kept = if arguments.image.is_some() { "records-yours" } else { "records" };
    let mut records = Records::open(&place.base.join(kept))?;
    let all = if arguments.report {
        true
    } else {
        let batches = plan::batches(arguments, &definitions)?;
        let rows = plan::rows(arguments, systems::all())?;
        let mut session = Session::start(&place, arguments, &rows)?;
        session.batches(&batches, &definitions, &mut records)?
    };
    let written = report::write(&place, &records, arguments)?;
    eprintln!("the report: {}", written.display());
    Ok(all)
}

/// Prints images, rows and networks.
fn list(place: &Place, definitions: &[Definition]) {
    println!("images");
    for image in definitions {
        println!("  {:<22} {}; {} MB of disk", image.name, image.like, image.disk_mb);
    }
    println!("rows (--formats), by system (--peers)");
    for row in systems::all() {
        let state =
            row.install(place).err().map_or(String::new(), |failure| format!(" -- {failure}"));
        println!("  {:<24} {:<11} {}{state}", row.name(), row.peer(), row.title());
    }
    println!("networks");
    for shape in SHAPES {
        println!("  {:<9} {}", shape.name, shape.told());
    }
}

/// One run that is due.
struct Turn {
    /// Number of its row.
    number: usize,
    cell: Cell,
    shape: Shape,
    round: u32,
    /// What the row has of the image, or why it has none.
    form: Result<Converted, Failure>,
}

/// Everything that lasts over the runs.
struct Session<'a> {
    site: Site,
    arguments: &'a Arguments,
    rows: &'a [Box<dyn System>],
    /// Of each row: why it cannot run here, or its versions.
    installed: Vec<Result<Vec<String>, Failure>>,
    commit: String,
    machine: String,
    /// True until a cell that can be measured here was not.
    complete: bool,
}

impl<'a> Session<'a> {
    /// Ends what an earlier run left, and starts the registry and the proxy.
    fn start(
        place: &Place,
        arguments: &'a Arguments,
        rows: &'a [Box<dyn System>],
    ) -> Result<Self, Failure> {
        if !rustix::process::geteuid().is_root() {
            return Err(Failure::Invalid("root is needed, for mounts, devices and cgroups".into()));
        }
        place.clean()?;
        let port = std::env::var("SAT_PORT").ok().map_or(Ok(PORT), |text| {
            text.parse()
                .map_err(|_| Failure::Invalid(format!("SAT_PORT is {text:?}, which is no port")))
        })?;
        let installed: Vec<_> =
            rows.iter().map(|row| row.install(place).map(|()| row.versions(place))).collect();
        for (row, found) in rows.iter().zip(&installed) {
            if let Err(failure) = found {
                eprintln!("{}: not measured: {failure}", row.name());
            }
        }
        let registry = Registry::start(place, port)?;
        let proxy = Proxy::start(port.saturating_add(1), registry.address())?;
        Ok(Self {
            site: Site { place: place.clone(), registry, proxy },
            arguments,
            rows,
            installed,
            commit: commit(&place.repository),
            machine: machine(),
            complete: true,
        })
    }

    /// Makes all runs that are not recorded; true if none failed that can be made here.
    fn batches(
        &mut self,
        batches: &[Batch],
        definitions: &[Definition],
        records: &mut Records,
    ) -> Result<bool, Failure> {
        let needed =
            batches.iter().map(|batch| disk_mb(&batch.image, definitions)).max().unwrap_or(0);
        let free = place::free_bytes(&self.site.place.base)? / 1_000_000;
        eprintln!("the largest image needs {needed} MB of disk; {free} MB are free");
        let mut images: BTreeMap<String, Result<Image, Failure>> = BTreeMap::new();
        for (number, batch) in batches.iter().enumerate() {
            eprintln!("[{}/{}] {} on {}", number + 1, batches.len(), batch.image, batch.network);
            let image = match images.get(&batch.image) {
                Some(image) => image.clone(),
                None => {
                    let image = self.image(&batch.image, definitions);
                    images.insert(batch.image.clone(), image.clone());
                    image
                }
            };
            match image {
                Ok(image) => self.batch(batch, &image, records)?,
                Err(failure) => {
                    eprintln!("{}: not measured: {failure}", batch.image);
                    self.complete = false;
                }
            }
        }
        Ok(self.complete)
    }

    /// Builds an image, or copies the user's.
    fn image(&self, name: &str, definitions: &[Definition]) -> Result<Image, Failure> {
        let place = &self.site.place;
        plan::need_disk(name, disk_mb(name, definitions), place::free_bytes(&place.base)?)?;
        if let (Some(reference), Some(ready)) = (&self.arguments.image, &self.arguments.ready) {
            let expect = self.arguments.expect.as_deref().unwrap_or_default();
            let command = self.arguments.cmd.as_deref();
            return images::layout::of_the_user(place, reference, command, ready, expect);
        }
        let definition = definitions.iter().find(|definition| definition.name == name);
        let definition =
            definition.ok_or_else(|| Failure::Invalid(format!("there is no image {name}")))?;
        Image::build(place, definition)
    }

    /// Makes the runs of one image on one network.
    fn batch(
        &mut self,
        batch: &Batch,
        image: &Image,
        records: &mut Records,
    ) -> Result<(), Failure> {
        let shape = Shape::named(batch.network)
            .ok_or_else(|| Failure::Invalid(format!("there is no network {}", batch.network)))?;
        let mut converted: Vec<Option<Result<Converted, Failure>>> = vec![None; self.rows.len()];
        for round in 0..batch.rounds {
            for &count in &batch.counts {
                for (number, row) in self.rows.iter().enumerate() {
                    let cell = Cell {
                        image: image.name.clone(),
                        network: batch.network.into(),
                        count,
                        system: row.name().into(),
                    };
                    if !self.arguments.again && records.has(&cell, round) {
                        eprintln!("  {:<24} round {round}: recorded already", row.name());
                        continue;
                    }
                    let failed = self.installed[number].as_ref().err().cloned();
                    // What is absent is absent in each round: one record is enough.
                    if failed.is_some() && round > 0 {
                        continue;
                    }
                    let form = match failed {
                        Some(failure) => Err(failure),
                        None => converted[number]
                            .get_or_insert_with(|| self.converted(row.as_ref(), image))
                            .clone(),
                    };
                    let turn = Turn { number, cell, shape, round, form };
                    self.one(image, turn, records)?;
                }
            }
        }
        Ok(())
    }

    /// Makes one run and records it.
    fn one(&mut self, image: &Image, turn: Turn, records: &mut Records) -> Result<(), Failure> {
        let Turn { number, cell, shape, round, form } = turn;
        let row = self.rows[number].as_ref();
        let repository = repository(image, row);
        let count = cell.count;
        let measured = form.clone().and_then(|converted| {
            let run = Run {
                site: &self.site,
                system: row,
                image,
                converted: &converted,
                repository: &repository,
                shape,
                count,
                round,
                patience: Duration::from_secs(self.arguments.patience),
            };
            run.measure()
        });
        let (measured, failed) = match measured {
            Ok(measured) => {
                eprintln!(
                    "  {:<24} round {round}: {:6.2} s, {:.1} MB, {} requests, CPU {:.2} s, load {:.1}",
                    row.name(),
                    measured.available,
                    measured.wire_bytes as f64 / 1e6,
                    measured.requests,
                    measured.cpu(),
                    measured.load
                );
                (Some(measured), String::new())
            }
            Err(failure) => {
                self.complete &= self.installed[number].is_err();
                eprintln!("  {:<24} round {round}: failed: {failure}", row.name());
                self.site.place.clean()?;
                (None, failure.to_string())
            }
        };
        let form = form.unwrap_or_default();
        let versions = self.installed[number].clone().unwrap_or_default();
        records.add(RunRecord {
            cell,
            round,
            date: jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string(),
            commit: self.commit.clone(),
            machine: self.machine.clone(),
            versions,
            title: row.title(),
            about: About {
                like: image.like.clone(),
                compressed: image.compressed,
                unpacked: image.unpacked,
                layers: image.layers,
                row_bytes: form.bytes,
                conversion: form.seconds,
            },
            measured,
            failed,
        })
    }

    /// Pushes the image to the row's repository and converts it there; once, for it is kept with the registry.
    fn converted(&self, row: &dyn System, image: &Image) -> Result<Converted, Failure> {
        let registry = &self.site.registry;
        let repository = repository(image, row);
        // The form belongs to the image that was pushed and to the programs that made it.
        let index = fs::read_to_string(image.layout.join("index.json"))
            .attempt(|| format!("read the layout of {}", image.name))?;
        let commit = if row.peer() == "turbobd" { self.commit.as_str() } else { "" };
        let made_of = format!("{index}\n{} {commit}", row.versions(&self.site.place).join(", "));
        let dir = self.site.place.folder("converted")?;
        let file = dir.join(format!("{}.{}.json", image.name, row.name()));
        if let Ok(text) = fs::read_to_string(&file) {
            let kept: Option<(String, Converted)> = serde_json::from_str(&text).ok();
            if let Some((of, converted)) = kept
                && of == made_of
                && registry.tagged(&repository, &converted.tag).is_some()
            {
                return Ok(converted);
            }
        }
        let start = Instant::now();
        registry.push(&format!("oci:{}:{TAG}", image.layout.display()), &repository, TAG)?;
        let converted = row.convert(&self.site, image, &repository)?;
        let text = serde_json::to_string(&(made_of, &converted))
            .attempt(|| "write a conversion's facts".into())?;
        fs::write(&file, text).attempt(|| format!("write {}", file.display()))?;
        eprintln!("  {:<24} prepared in {:.1} s", row.name(), start.elapsed().as_secs_f64());
        Ok(converted)
    }
}

/// Repository of a row: its own, so that no row finds what another has put beside the image.
fn repository(image: &Image, row: &dyn System) -> String {
    format!("{}/{}", image.name, row.name())
}

fn disk_mb(name: &str, definitions: &[Definition]) -> u64 {
    // The size of the user's image is not known before it is copied: room for a large one.
    definitions
        .iter()
        .find(|definition| definition.name == name)
        .map_or(4_000, |found| found.disk_mb)
}

/// Commit of the repository, `+` behind it if something is changed.
fn commit(repository: &Path) -> String {
    let git = |arguments: &[&str]| {
        let mut command = Command::new("git");
        command.arg("-C").arg(repository).args(arguments);
        program::run(&command, Duration::from_secs(20)).ok()
    };
    let Some(commit) = git(&["rev-parse", "--short=12", "HEAD"]) else { return "unknown".into() };
    let changed = git(&["status", "--porcelain", "--untracked-files=no"]);
    let mark = if changed.is_some_and(|text| !text.trim().is_empty()) { "+" } else { "" };
    format!("{}{mark}", commit.trim())
}

/// Processor, cores, memory, kernel, and the way of turbobd's devices.
fn machine() -> String {
    let read = |file: &str| fs::read_to_string(file).unwrap_or_default();
    let after = |text: &str, name: &str| {
        let line = text.lines().find(|line| line.starts_with(name))?;
        Some(line.split_once(':')?.1.trim().to_owned())
    };
    let processor =
        after(&read("/proc/cpuinfo"), "model name").unwrap_or_else(|| "unknown processor".into());
    let memory = after(&read("/proc/meminfo"), "MemTotal").unwrap_or_default();
    let kibibytes: f64 = memory.trim_end_matches(" kB").parse().unwrap_or(0.0);
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let kernel = read("/proc/sys/kernel/osrelease");
    let devices = match Path::new("/dev/ublk-control").exists() {
        true => "ublk",
        false => "FUSE and loop, no ublk",
    };
    format!(
        "{processor}, {cores} cores, {:.0} GB, Linux {}; turbobd over {devices}",
        kibibytes / 1e6,
        kernel.trim()
    )
}
