//! `turbobd attach`: make the block device of an image, and mount it.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::Arc;
use std::time::Instant;

use clap::ValueEnum;

use client::{DaemonClient, DeviceSpec, Frontend, mounts, protocol};
use host::daemon::DeviceTable;
use host::daemon::signals::Signals;
use host::images::HostImages;

use super::{Failure, Outcome, Service, image, stderr, stdout};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Mount the device at this directory, which is made if it is missing: read-only, unless the device has a writable layer.
    #[arg(long, value_name = "DIR")]
    mount: Option<PathBuf>,
    /// Let programs of the image get the user, group and capabilities that their files name. Without it the mount is nosuid.
    #[arg(long, requires = "mount")]
    suid: bool,
    /// Let device nodes of the image be devices. Without it the mount is nodev.
    #[arg(long, requires = "mount")]
    dev: bool,
    /// Make the device writable. Writes go to a writable layer in this directory, which is created if it is missing
    /// and stays after detach. `turbobd commit` makes a native layer from it.
    #[arg(long, value_name = "DIR")]
    upper: Option<PathBuf>,
    /// Front end of the device: ublk, or loop (a loop device over FUSE). auto is ublk where the kernel has it.
    #[arg(long, value_enum, default_value_t = FrontendName::Auto)]
    frontend: FrontendName,
    /// Serve the device from this process until a signal ends it, without the daemon.
    #[arg(long)]
    foreground: bool,
    /// Identifier of the device in requests to the snapshot service.
    #[arg(long, value_name = "ID")]
    dev_id: Option<String>,
    #[command(flatten)]
    image: image::Args,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum FrontendName {
    Auto,
    Ublk,
    Loop,
}

impl Args {
    fn rights(&self) -> mounts::MountRights {
        mounts::MountRights { suid: self.suid, dev: self.dev }
    }

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
    // The daemon has another working directory.
    let config = service.file.as_deref().map(std::path::absolute).transpose();
    let config = config.map_err(Failure::because)?;
    let daemon = || daemon_command(config.as_deref());
    let mut client =
        DaemonClient::connect_or_spawn(&protocol::run_dir(), daemon).map_err(Failure::because)?;
    tracing::info!("the daemon answers after {:.1?}", start.elapsed());
    let (device, note) = match &args.mount {
        Some(dir) => client.attach_and_mount(spec, dir, args.rights()),
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

/// Prints the device and its mount point.
fn announce(device: &Path, mountpoint: Option<&Path>) -> Result<(), Failure> {
    match mountpoint {
        Some(dir) => stdout::line(format_args!("{} {}", device.display(), dir.display())),
        None => stdout::line(device.display()),
    }
}

/// Command that starts a daemon if none runs. A running daemon keeps its own configuration.
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
    let mount = args.mount.as_deref().map(mounts::MountPoint::new);
    let mount = mount.transpose().map_err(Failure::because)?;
    let run_dir = protocol::run_dir();
    sys::private::folder(&run_dir).map_err(Failure::because)?;
    let policy = images.read_policy();
    let table = DeviceTable::new(run_dir, images.clone(), policy);
    let (device, note) = table.attach(spec).map_err(Failure::because)?;
    if let Some(note) = note {
        stderr::line(format_args!("turbobd: attach: {note}"));
    }
    if let Some(place) = mount {
        // On failure the table goes, and the device with it.
        mounts::mount_image(&device.device, place.dir(), args.rights())
            .map_err(Failure::because)?;
        place.keep();
    }
    tracing::info!("attached after {:.1?}", start.elapsed());
    // Without its name printed the device is useless: remove it again.
    let announced = announce(&device.device, args.mount.as_deref());
    if announced.is_ok() {
        signals.wait();
    }
    for place in mounts::mounted_from(&device.device).map_err(Failure::because)?.iter().rev() {
        mounts::unmount_dir(place).map_err(Failure::because)?;
    }
    table.detach(device.id).map_err(Failure::because)?;
    images.flush_audit();
    announced.map(|()| ExitCode::SUCCESS)
}
