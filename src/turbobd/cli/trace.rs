//! `turbobd trace`: record, show and [publish] the reads of a container's start.

mod publish;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, ExitStatus};
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::{Subcommand, ValueEnum};

use super::output::OutputFile;
use super::{Failure, Outcome, Service, image, stderr, stdout, table};
use blobs::cache::Cache;
use blobs::trace::upstream;
use client::{DaemonClient, DeviceSpec, find, mounts, protocol};
use disk::Disk;
use formats::trace::Trace;
use host::daemon::DeviceTable;
use host::images::{self, HostImages, Registries};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(subcommand)]
    action: TraceAction,
}

#[derive(Debug, Subcommand)]
enum TraceAction {
    /// Record the reads of a start from an image, or the reads of a device from now on.
    Record(Box<RecordArgs>),
    /// Print a trace.
    Show(ShowArgs),
    /// Push a trace beside its image. Hosts without a trace of their own prefetch by it.
    Publish(Box<publish::PublishArgs>),
}

#[derive(Debug, clap::Args)]
// Each index is set, because `mut_arg` moves an argument to the end.
#[command(mut_arg("image", |arg| arg.index(1).help("Image, or a device of this host: its node or mount point")))]
struct RecordArgs {
    /// Write the trace to this file.
    #[arg(short, long, value_name = "FILE", default_value = "turbobd.trace")]
    output: PathBuf,
    /// Replace an existing file. It stays as it is if the command fails.
    #[arg(short, long)]
    force: bool,
    /// Format of the trace. overlaybd's format covers native layers only.
    #[arg(long, value_enum, default_value_t = TraceFormat::Turbobd)]
    format: TraceFormat,
    /// Length of the recording in seconds [default: 30, if there is no COMMAND].
    #[arg(long, value_name = "SECONDS", conflicts_with = "command")]
    seconds: Option<u64>,
    #[command(flatten)]
    image: image::Args,
    /// Command to run and record until it ends: in the mounted IMAGE (chroot), or on the host for a device.
    #[arg(last = true, index = 2, value_name = "COMMAND")]
    command: Vec<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum TraceFormat {
    Turbobd,
    Overlaybd,
}

#[derive(Debug, clap::Args)]
struct ShowArgs {
    /// Trace file, in the format of turbobd or overlaybd.
    file: PathBuf,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// Records, shows or publishes.
pub(super) fn run(args: &Args, service: &Service) -> Outcome {
    match &args.action {
        TraceAction::Record(args) => record(args, service),
        TraceAction::Show(args) => show(args),
        TraceAction::Publish(args) => publish::run(args, service),
    }
}

/// Length of a recording without `--seconds` and without a command.
const SECONDS: u64 = 30;

fn record(args: &RecordArgs, service: &Service) -> Outcome {
    let output = OutputFile::open(&args.output, args.force)?;
    let (trace, status) = match served_device(&args.image)? {
        Some((client, name)) => {
            if args.format == TraceFormat::Overlaybd {
                return Err(Failure::Usage(
                    "name the image, not a device, to record in overlaybd's format: it numbers the image's layers".into(),
                ));
            }
            record_device(args, client, &name)?
        }
        None => record_image(args, service)?,
    };
    let bytes = match args.format {
        TraceFormat::Turbobd => trace.to_bytes(),
        TraceFormat::Overlaybd => overlaybd(&trace, &open(args, service)?)?,
    };
    let failed = status.filter(|status| !status.success());
    if let Some(status) = failed.filter(|_| output.replaces()) {
        return Err(Failure::Failed(format!(
            "The command ended with {status}; {} is the trace of before",
            args.output.display()
        )));
    }
    output.write(&bytes)?;
    stderr::line(format_args!(
        "turbobd: trace: {} pieces, {}, in {}",
        trace.touches.len(),
        table::size(trace.bytes()),
        args.output.display()
    ));
    match failed {
        Some(status) => {
            Err(Failure::Failed(format!("The command ended with {status}; its trace is kept")))
        }
        None => Ok(ExitCode::SUCCESS),
    }
}

/// Connection to the daemon, and the device's name, if the argument is a device.
fn served_device(image: &image::Args) -> Result<Option<(DaemonClient, String)>, Failure> {
    let Some(name) = image.image.clone().filter(|name| name.starts_with('/')) else {
        return Ok(None);
    };
    let not_served =
        || Failure::Failed(format!("No device or mount point is called {name}: see turbobd ls"));
    let mut client = DaemonClient::connect(&protocol::run_dir())
        .map_err(Failure::because)?
        .ok_or_else(not_served)?;
    let devices = client.list().map_err(Failure::because)?;
    find(&devices, &name).map_err(|_| not_served())?;
    Ok(Some((client, name)))
}

fn record_device(
    args: &RecordArgs,
    mut client: DaemonClient,
    name: &str,
) -> Result<(Trace, Option<ExitStatus>), Failure> {
    let device = client.begin_trace(name).map_err(Failure::because)?;
    let status = wait(args, |command| command, None);
    let trace = client.end_trace(device.id).map_err(Failure::because)?;
    Ok((trace, status?))
}

/// Attaches the image in this process, mounts it, and records.
fn record_image(
    args: &RecordArgs,
    service: &Service,
) -> Result<(Trace, Option<ExitStatus>), Failure> {
    let images = Arc::new(HostImages::new(service.load()?));
    let run_dir = protocol::run_dir();
    sys::private::folder(&run_dir).map_err(Failure::because)?;
    let spec = DeviceSpec::of(args.image.spec()?);
    let mount =
        tempfile::Builder::new().prefix("trace-").tempdir_in(&run_dir).map_err(Failure::because)?;
    let policy = images.read_policy();
    let served = DeviceTable::new(run_dir, images, policy);
    let (device, note) = served.attach(&spec).map_err(Failure::because)?;
    if let Some(note) = note {
        tracing::info!("{note}");
    }
    served.begin_trace(device.id).map_err(Failure::because)?;
    // On failure the table goes, and the device with it.
    let rights = mounts::MountRights::default();
    mounts::mount_image(&device.device, mount.path(), rights).map_err(Failure::because)?;
    let dir = mount.path().to_owned();
    let place = format!("{} {}", device.device.display(), dir.display());
    let in_image = |mut command: Vec<String>| {
        command.splice(0..0, ["chroot".to_owned(), dir.display().to_string()]);
        command
    };
    let status = wait(args, in_image, Some(&place));
    let trace = served.end_trace(device.id).map_err(Failure::because);
    mounts::unmount_dir(&dir).map_err(Failure::because)?;
    served.detach(device.id).map_err(Failure::because)?;
    Ok((trace?, status?))
}

/// Runs the command, or waits for the length of the recording.
fn wait(
    args: &RecordArgs,
    place: impl FnOnce(Vec<String>) -> Vec<String>,
    announce: Option<&str>,
) -> Result<Option<ExitStatus>, Failure> {
    if args.command.is_empty() {
        let seconds = args.seconds.unwrap_or(SECONDS);
        if let Some(place) = announce {
            stdout::line(place)?;
        }
        stderr::line(format_args!("turbobd: trace: recording for {seconds} s"));
        let until = Instant::now() + Duration::from_secs(seconds);
        std::thread::sleep(until.saturating_duration_since(Instant::now()));
        return Ok(None);
    }
    let command = place(args.command.clone());
    let status = Command::new(&command[0]).args(&command[1..]).status();
    status.map(Some).map_err(|error| Failure::Failed(format!("Cannot run {}: {error}", command[0])))
}

/// Opens the image's disk, to number its layers.
fn open(args: &RecordArgs, service: &Service) -> Result<Disk, Failure> {
    Ok(images::open::open(&args.image.spec()?, &Registries::new(service.load()?), Cache::new(0, 1))
        .map_err(Failure::open)?
        .disk)
}

fn overlaybd(trace: &Trace, disk: &Disk) -> Result<Vec<u8>, Failure> {
    let native = disk.native_sources();
    let layers: Vec<_> = native.iter().map(Option::as_deref).collect();
    let reads = upstream::of_trace(trace, &layers);
    if reads.is_empty() && !trace.touches.is_empty() {
        return Err(Failure::Failed(
            "No native layer was read, and overlaybd's format covers no other layers: use --format turbobd".into(),
        ));
    }
    Ok(upstream::to_bytes(&reads))
}

fn show(args: &ShowArgs) -> Outcome {
    let name = args.file.display();
    let bytes = fs::read(&args.file)
        .map_err(|error| Failure::Failed(format!("Cannot read {name}: {error}")))?;
    let invalid = |error| Failure::Failed(format!("{name}: {error}"));
    if upstream::is_trace(&bytes) {
        show_upstream(&upstream::parse(&bytes).map_err(invalid)?, args.json)?;
    } else {
        show_ours(&Trace::parse(&bytes).map_err(invalid)?, &args.file, args.json)?;
    }
    Ok(ExitCode::SUCCESS)
}

fn show_upstream(reads: &[upstream::LayerRead], json: bool) -> Result<(), Failure> {
    if json {
        return table::print_json(&reads);
    }
    let row = |read: &upstream::LayerRead| {
        vec![read.layer.to_string(), read.offset.to_string(), read.count.to_string()]
    };
    table::print(&["LAYER", "OFFSET", "COUNT"], &reads.iter().map(row).collect::<Vec<_>>())
}

fn show_ours(trace: &Trace, file: &Path, json: bool) -> Result<(), Failure> {
    if json {
        return table::print_json(trace);
    }
    stderr::line(format_args!(
        "{}: {} pieces of {} blobs, {}, from {} starts",
        file.display(),
        trace.touches.len(),
        trace.blobs.len(),
        table::size(trace.bytes()),
        trace.starts
    ));
    let row = |touch: &formats::trace::Touch| {
        let blob = trace.blobs.get(touch.blob as usize).map(ToString::to_string);
        vec![
            format!("{:.2}", f64::from(touch.at) / 1e3),
            table::short(&blob.unwrap_or_default()),
            touch.start.to_string(),
            touch.len.to_string(),
            touch.weight.to_string(),
        ]
    };
    let rows: Vec<_> = trace.touches.iter().map(row).collect();
    table::print(&["SECONDS", "BLOB", "START", "BYTES", "WEIGHT"], &rows)
}
