//! `turbobd detach`: unmount and remove a device.

use std::process::ExitCode;

use super::{Failure, Outcome};
use client::{Client, protocol};
use formats::oci::ImageName;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The device, where it is mounted, or the image.
    #[arg(value_name = "DEVICE|MOUNTPOINT|IMAGE")]
    what: String,
}

/// Detaches.
pub(super) fn run(args: &Args) -> Outcome {
    let none =
        || Failure::Failed(format!("{} is not attached: no daemon runs on this host", args.what));
    let mut client =
        Client::connect(&protocol::run_dir()).map_err(Failure::because)?.ok_or_else(none)?;
    // An image is known to the daemon by its absolute name.
    let absolute = args.what.parse::<ImageName>().ok().and_then(|image| image.absolute().ok());
    let what = match absolute {
        Some(image @ ImageName::Layout(_)) => image.to_string(),
        _ => args.what.clone(),
    };
    let record = client.detach(&what).map_err(Failure::because)?;
    tracing::info!("removed {}", record.device.display());
    Ok(ExitCode::SUCCESS)
}
