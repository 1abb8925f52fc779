//! `turbobd ls`: the devices of this host.

use std::process::ExitCode;

use super::{Failure, Outcome, table};
use crate::daemon::protocol::{self, State};
use crate::daemon::{Client, DeviceRecord};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// Lists; nothing attached and no daemon is an empty list.
pub(super) fn run(args: &Args) -> Outcome {
    let devices = match Client::connect(&protocol::run_dir()).map_err(Failure::because)? {
        Some(mut client) => client.list().map_err(Failure::because)?,
        None => Vec::new(),
    };
    if args.json {
        table::print_json(&devices)?;
    } else {
        let head =
            ["IMAGE", "DEVICE", "MOUNTPOINT", "STATE", "READ", "FETCHED", "CACHED", "ERRORS"];
        table::print(&head, &devices.iter().map(row).collect::<Vec<_>>());
    }
    Ok(ExitCode::SUCCESS)
}

fn row(device: &DeviceRecord) -> Vec<String> {
    let state = match device.state {
        State::Ready => "ready",
        State::InUse => "in use",
        State::Failed => "failed",
    };
    vec![
        device.image.clone(),
        device.device.display().to_string(),
        device.mountpoint.as_ref().map_or_else(|| "-".into(), |dir| dir.display().to_string()),
        state.into(),
        table::size(device.bytes_read),
        table::size(device.bytes_fetched),
        table::size(device.bytes_cached),
        device.errors.to_string(),
    ]
}
