//! `turbobd detach`: unmount and remove a device.

use std::process::ExitCode;

use super::{Failure, Outcome};
use client::{ClientError, DaemonClient, protocol};
use formats::oci::ImageName;
use host::daemon::orphans::remove_orphan;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Device, its mount point, or its image.
    #[arg(value_name = "DEVICE|MOUNTPOINT|IMAGE")]
    target: String,
}

/// Detaches.
pub(super) fn run(args: &Args) -> Outcome {
    let none =
        || Failure::Failed(format!("{} is not attached: no daemon runs on this host", args.target));
    let client = DaemonClient::connect(&protocol::run_dir()).map_err(Failure::because)?;
    let Some(mut client) = client else {
        let orphan = remove_orphan(&args.target, &[]).map_err(Failure::because)?;
        let orphan = orphan.ok_or_else(none)?;
        tracing::info!("removed {}", orphan.device.display());
        return Ok(ExitCode::SUCCESS);
    };
    // The daemon knows an image by its absolute name.
    let absolute = args.target.parse::<ImageName>().ok().and_then(|image| image.absolute().ok());
    let target = match absolute {
        Some(image @ ImageName::Layout(_)) => image.to_string(),
        _ => args.target.clone(),
    };
    let detached = match client.detach(&target) {
        // It may be a device of a daemon that is dead.
        Err(missing @ ClientError::NotFound(_)) => {
            let known = client.list().map_err(Failure::because)?;
            let orphan = remove_orphan(&target, &known).map_err(Failure::because)?;
            orphan.ok_or(missing)
        }
        detached => detached,
    };
    let record = detached.map_err(Failure::because)?;
    tracing::info!("removed {}", record.device.display());
    Ok(ExitCode::SUCCESS)
}
