//! `turbobd ls`: the devices of this host.

use std::process::ExitCode;

use super::{Failure, Outcome, stderr, stdout, table};
use client::daemon::PROMPT;
use client::protocol::{self, DeviceState};
use client::{DaemonClient, DeviceRecord};
use host::daemon::orphans::orphans;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Print JSON.
    #[arg(long)]
    json: bool,
    /// Print all metrics of the daemon in Prometheus' text format (METRICS.md).
    #[arg(long, conflicts_with = "json")]
    metrics: bool,
}

/// Lists the devices of the daemon, and those of dead ones.
pub(super) fn run(args: &Args) -> Outcome {
    let client =
        DaemonClient::connect_within(&protocol::run_dir(), PROMPT).map_err(Failure::because)?;
    if args.metrics {
        let Some(mut client) = client else {
            return Err(Failure::Failed("no daemon runs on this host: nothing is counted".into()));
        };
        let page = client.metrics().map_err(Failure::because)?;
        stdout::lines(page)?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut devices = match client {
        Some(mut client) => client.list().map_err(Failure::because)?,
        None => Vec::new(),
    };
    devices.extend(orphans(&devices));
    if args.json {
        table::print_json(&devices)?;
    } else {
        let head = [
            "IMAGE",
            "DEVICE",
            "MOUNTPOINT",
            "STATE",
            "READ",
            "FETCHED",
            "CACHED",
            "RETRIES",
            "ERRORS",
        ];
        table::print(&head, &devices.iter().map(row).collect::<Vec<_>>())?;
        for (device, trouble) in
            devices.iter().filter_map(|device| Some((device, device.trouble.as_ref()?)))
        {
            stderr::line(format_args!("turbobd: ls: {}: {trouble}", device.device.display()));
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn row(device: &DeviceRecord) -> Vec<String> {
    vec![
        device.image.clone(),
        device.device.display().to_string(),
        device.mountpoint.as_ref().map_or_else(|| "-".into(), |dir| dir.display().to_string()),
        state(device),
        table::size(device.bytes_read),
        table::size(device.bytes_fetched),
        table::size(device.bytes_cached),
        device.retries.to_string(),
        device.errors.to_string(),
    ]
}

/// State of a device; of a stalled one with the time.
pub(super) fn state(device: &DeviceRecord) -> String {
    match device.state {
        DeviceState::Failed if device.trouble.is_some() => "no server".into(),
        _ if device.trouble.is_some() => "returning".into(),
        DeviceState::Ready => "ready".into(),
        DeviceState::InUse => "in use".into(),
        DeviceState::Stalled => format!("stalled {}", table::duration(device.oldest_wait_ms)),
        DeviceState::Failed => "failed".into(),
    }
}
