//! `turbobd attach`: make a block device of an image, and mount it.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::Arc;
use std::time::Instant;

use clap::ValueEnum;

use client::{Client, DeviceSpec, Frontend, mounts, protocol};
use host::daemon::Table;
use host::daemon::signals::Signals;
use host::images::HostImages;

use super::{Failure, Outcome, Service, image, stderr, stdout};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    image: image::Args,
    /// Make the device writable: what is written goes to a layer in this folder, made if there is none. It
    /// stays there, and `turbobd commit` makes an image layer of it.
    #[arg(long, value_name = "DIR")]
    upper: Option<PathBuf>,
    /// What the device is called by who asks for a snapshot of it.
    #[arg(long, value_name = "ID")]
    dev_id: Option<String>,
    /// Mount the device at this directory, read-only unless it has a writable layer.
    #[arg(long, value_name = "DIR")]
    mount: Option<PathBuf>,
    /// How the device is made: ublk, or a loop device over FUSE where the kernel has no ublk.
    #[arg(long, value_enum, default_value_t = FrontendName::Auto)]
    frontend: FrontendName,
    /// Serve from this process until it is interrupted, without a daemon.
    #[arg(long)]
    foreground: bool,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum FrontendName {
    Auto,
    Ublk,
    Loop,
}

impl Args {
    fn spec(&self) -> Result<DeviceSpec, Failure> {
        let upper = self.upper.as_ref().map(std::path::absolute).transpose();
        Ok(DeviceSpec {
            image: self.image.spec()?,
            frontend: match self.frontend {
                FrontendName::Auto => Frontend::Auto,
                FrontendName::Ublk => Frontend::Ublk,
                FrontendName::Loop => Frontend::Loop,
            },
            upper: upper.map_err(Failure::because)?,
            dev_id: self.dev_id.clone(),
        })
    }
}

/// Attaches; prints the device, and the mount point if there is one, on stdout.
pub(super) fn run(args: &Args, service: &Service) -> Outcome {
    let start = Instant::now();
    let spec = args.spec()?;
    if args.foreground {
        return serve_here(args, &spec, service, start);
    }
    // A daemon's working directory is another.
    let config = service.file.as_deref().map(std::path::absolute).transpose();
    let config = config.map_err(Failure::because)?;
    let daemon = || daemon_command(config.as_deref());
    let mut client =
        Client::connect_or_spawn(&protocol::run_dir(), daemon).map_err(Failure::because)?;
    tracing::info!("the daemon answers after {:.1?}", start.elapsed());
    let (device, note) = match &args.mount {
        Some(dir) => client.attach_and_mount(spec, dir),
        None => client.attach(spec),
    }
    .map_err(Failure::because)?;
    if let Some(note) = note {
        stderr::line(format_args!("turbobd: attach: {note}"));
    }
    tracing::info!("attached after {:.1?}", start.elapsed());
    announce(&device.device, device.mountpoint.as_deref())?;
    Ok(ExitCode::SUCCESS)
}

/// Tells the device, and where it is mounted.
fn announce(device: &Path, mountpoint: Option<&Path>) -> Result<(), Failure> {
    match mountpoint {
        Some(dir) => stdout::line(format_args!("{} {}", device.display(), dir.display())),
        None => stdout::line(device.display()),
    }
}

/// What the client starts when no daemon runs. One that runs keeps the configuration it has.
fn daemon_command(config: Option<&Path>) -> Command {
    let program = std::env::current_exe().unwrap_or_else(|_| "turbobd".into());
    let mut command = Command::new(program);
    command.args(["daemon", "--auto"]);
    if let Some(config) = config {
        command.arg("--service-config").arg(config);
    }
    command
}

/// Serves from this process: mounts, waits for a signal, unmounts, removes.
fn serve_here(args: &Args, spec: &DeviceSpec, service: &Service, start: Instant) -> Outcome {
    let images = HostImages::new(service.load()?).audited().map_err(Failure::because)?;
    let images = Arc::new(images);
    let mut signals = Signals::new().map_err(Failure::because)?;
    let run_dir = protocol::run_dir();
    std::fs::create_dir_all(&run_dir).map_err(Failure::because)?;
    let policy = images.read_policy();
    let table = Table::new(run_dir, images.clone(), policy);
    let (device, note) = table.attach(spec).map_err(Failure::because)?;
    if let Some(note) = note {
        stderr::line(format_args!("turbobd: attach: {note}"));
    }
    if let Some(dir) = &args.mount {
        // On failure the table goes, and the device with it.
        mounts::mount_image(&device.device, dir).map_err(Failure::because)?;
    }
    tracing::info!("attached after {:.1?}", start.elapsed());
    // A device that nobody can be told of is taken back as one that is not wanted any more.
    let told = announce(&device.device, args.mount.as_deref());
    if told.is_ok() {
        signals.wait();
    }
    for place in mounts::mounted_from(&device.device).map_err(Failure::because)?.iter().rev() {
        mounts::unmount_dir(place).map_err(Failure::because)?;
    }
    table.detach(device.id).map_err(Failure::because)?;
    images.flush_audit();
    told.map(|()| ExitCode::SUCCESS)
}
