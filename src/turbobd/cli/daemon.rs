//! `turbobd daemon`: serve the devices of this host.

use std::process::ExitCode;
use std::sync::Arc;

use client::{DaemonClient, protocol};
use host::daemon::keeper::KeeperOptions;
use host::daemon::{self, DaemonOptions};
use host::images::HostImages;

use super::{Failure, Outcome, Service};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Tell the running daemon to remove its unused devices and to exit. It goes on if a device is in use.
    #[arg(long)]
    stop: bool,
    /// Run in the background until no device is left; `attach` starts the daemon so.
    #[arg(long, hide = true, conflicts_with = "stop")]
    auto: bool,
    /// Number of daemons before this one that died before their devices were back.
    #[arg(long, hide = true, requires = "auto", default_value_t = 0)]
    deaths: u32,
}

impl Args {
    /// The process that starts the next daemon if this one is killed. An init system does that for a daemon that it started.
    fn keeper(&self, service: &Service, verbose: u8) -> Option<KeeperOptions> {
        if !self.auto {
            return None;
        }
        let file = service.file.as_ref().and_then(|file| std::path::absolute(file).ok());
        let file = file.map(|file| ["--service-config".into(), file.into_os_string()]);
        let verbose = (0..verbose).map(|_| "-v".into());
        Some(KeeperOptions {
            program: std::env::current_exe().ok()?,
            arguments: verbose.chain(file.into_iter().flatten()).collect(),
            deaths: self.deaths,
        })
    }
}

/// Serves until a signal or `--stop` ends it; with `--stop`, ends the running daemon.
pub(super) fn run(args: &Args, service: &Service, verbose: u8) -> Outcome {
    let run_dir = protocol::run_dir();
    if args.stop {
        super::log_to_stderr(verbose, true);
        let busy =
            DaemonClient::stop_any_version(&run_dir).map_err(Failure::because)?.unwrap_or_default();
        if busy.is_empty() {
            return Ok(ExitCode::SUCCESS);
        }
        let names: Vec<String> = busy.iter().map(|device| device.display().to_string()).collect();
        return Err(Failure::Failed(format!(
            "The daemon goes on, because {} is in use: unmount or detach it first",
            names.join(", ")
        )));
    }
    let own = args.auto.then(|| protocol::log(&run_dir));
    let (config, log) = service.load_with_log(verbose, own.as_deref())?;
    let api = &config.api;
    let snapshots = api.enable.then(|| api.address.clone());
    let images = HostImages::new(config.clone()).audited().map_err(Failure::because)?;
    let images = Arc::new(images.logged(log));
    let options = DaemonOptions {
        run_dir,
        auto: args.auto,
        reads: images.read_policy(),
        exporter: images.exporter(),
        snapshots,
        keeper: args.keeper(service, verbose),
    };
    let ended = daemon::run(&options, images.clone());
    images.flush_audit();
    ended.map_err(Failure::because)?;
    Ok(ExitCode::SUCCESS)
}
