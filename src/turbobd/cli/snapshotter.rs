//! `turbobd snapshotter`: serve containerd's snapshots.

use std::path::PathBuf;
use std::process::ExitCode;

use containerd::snapshotter::{self, SnapshotterConfig};

use super::{Failure, Outcome};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Folder of the snapshots [default: "root" of the configuration, or
    /// /var/lib/containerd/io.containerd.snapshotter.v1.overlaybd, where CRI looks for it].
    #[arg(long, value_name = "DIR")]
    root: Option<PathBuf>,
    /// Unix socket for containerd [default: "address" of the configuration, or
    /// /run/turbobd-snapshotter/snapshotter.sock]. A socket of systemd goes before it.
    #[arg(long, value_name = "SOCKET")]
    address: Option<PathBuf>,
    /// Configuration of the snapshotter (CONFIG.md) [default: the first existing file of /etc/turbobd/snapshotter.json,
    /// /etc/overlaybd-snapshotter/config.json].
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

/// Serves until a signal ends it.
pub(super) fn run(args: &Args) -> Outcome {
    let (mut config, warnings) =
        SnapshotterConfig::read(args.config.as_deref()).map_err(Failure::because)?;
    for warning in warnings {
        tracing::warn!("{warning}");
    }
    if let Some(root) = &args.root {
        config.root.clone_from(root);
    }
    if let Some(address) = &args.address {
        config.address.clone_from(address);
    }
    snapshotter::run(config).map_err(Failure::because)?;
    Ok(ExitCode::SUCCESS)
}
