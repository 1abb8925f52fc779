//! `turbobd detach`: unmount and remove a device.

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::{Failure, Outcome, stderr};
use client::daemon::PROMPT;
use client::{ClientError, DaemonClient, DeviceRecord, Patience, detaching, mounts, protocol};
use formats::oci::ImageName;
use host::daemon::orphans::remove_orphan;
use host::daemon::signals::Signals;
use host::leftovers::{self, DeadLoop};

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
    let client = DaemonClient::connect_within(&protocol::run_dir(), PROMPT);
    let Some(mut client) = client.map_err(Failure::because)? else {
        let none = Failure::Failed(format!(
            "{} is not attached: no daemon runs on this host",
            args.target
        ));
        return dead(&args.target, &[], none);
    };
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
    match client.detach_within(&target, patience) {
        Ok(record) => tracing::info!("removed {}", record.device.display()),
        Err(error @ ClientError::NotFound(_)) => {
            let known = client.list().map_err(Failure::because)?;
            return dead(&target, &known, Failure::because(error));
        }
        Err(error) => return Err(Failure::because(error)),
    }
    Ok(ExitCode::SUCCESS)
}

/// Removes a device whose daemon has died, by its node or its mount point; `missing` if there is none of this name. `known` are
/// the devices of the living daemon.
fn dead(target: &str, known: &[DeviceRecord], missing: Failure) -> Outcome {
    if let Some(orphan) = remove_orphan(target, known).map_err(Failure::because)? {
        stderr::line(format_args!("turbobd: detach: removed {}", orphan.device.display()));
        return Ok(ExitCode::SUCCESS);
    }
    let place = std::fs::canonicalize(target).unwrap_or_else(|_| target.into());
    let is_it = |device: &DeadLoop| {
        device.path == place
            || mounts::mounted_from(&device.path).is_ok_and(|places| places.contains(&place))
    };
    let device = leftovers::dead_devices().into_iter().find(is_it).ok_or(missing)?;
    let all = leftovers::remove_device(&device);
    all.removed
        .iter()
        .for_each(|what| stderr::line(format_args!("turbobd: detach: removed {what}")));
    match all.left.first() {
        None => Ok(ExitCode::SUCCESS),
        Some(left) => Err(Failure::Failed(format!("not removed: {left}"))),
    }
}
