//! `turbobd detach`: unmount and remove a device.

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::{Failure, Outcome, stderr};
use client::{DaemonClient, Patience, detaching, protocol};
use formats::oci::ImageName;
use host::daemon::signals::Signals;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Device, its mount point, or its image.
    #[arg(value_name = "DEVICE|MOUNTPOINT|IMAGE")]
    target: String,
    /// Seconds to wait for a device in use. Afterwards it is gone, or everything is as it was and the message names the
    /// processes that hold it.
    #[arg(long, value_name = "SECONDS", default_value_t = detaching::TIMEOUT.as_secs())]
    timeout: u64,
}

/// Detaches.
pub(super) fn run(args: &Args) -> Outcome {
    let none =
        || Failure::Failed(format!("{} is not attached: no daemon runs on this host", args.target));
    let mut client =
        DaemonClient::connect(&protocol::run_dir()).map_err(Failure::because)?.ok_or_else(none)?;
    // The daemon knows an image by its absolute name.
    let absolute = args.target.parse::<ImageName>().ok().and_then(|image| image.absolute().ok());
    let target = match absolute {
        Some(image @ ImageName::Layout(_)) => image.to_string(),
        _ => args.target.clone(),
    };
    // An interrupt ends the wait, not the process: between two steps a device would be left without its mounts.
    let stopped = Arc::new(AtomicBool::new(false));
    let mut signals = Signals::new().map_err(Failure::because)?;
    let stop = stopped.clone();
    let watch = std::thread::Builder::new().name("signals".into()).spawn(move || {
        signals.wait();
        stop.store(true, Ordering::SeqCst);
    });
    watch.map_err(Failure::because)?;
    let patience = Patience {
        timeout: Duration::from_secs(args.timeout),
        tell: &mut |waits| stderr::line(format_args!("turbobd: detach: {waits}")),
        enough: &|| stopped.load(Ordering::SeqCst),
    };
    let record = client.detach_within(&target, patience).map_err(Failure::because)?;
    tracing::info!("removed {}", record.device.display());
    Ok(ExitCode::SUCCESS)
}
