//! `turbobd detach`: unmount and remove a device.

use std::process::ExitCode;

use super::{Failure, Outcome};
use client::{DaemonClient, protocol};
use formats::oci::ImageName;

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
    let mut client =
        DaemonClient::connect(&protocol::run_dir()).map_err(Failure::because)?.ok_or_else(none)?;
    // The daemon knows an image by its absolute name.
    let absolute = args.target.parse::<ImageName>().ok().and_then(|image| image.absolute().ok());
    let target = match absolute {
        Some(image @ ImageName::Layout(_)) => image.to_string(),
        _ => args.target.clone(),
    };
    let record = client.detach(&target).map_err(Failure::because)?;
    tracing::info!("removed {}", record.device.display());
    Ok(ExitCode::SUCCESS)
}
