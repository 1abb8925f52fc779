//! `turbobd cache`: show, verify and prune the tiers on disk.
//!
//! A tier belongs to one process at a time. A running daemon holds its tiers open: its figures are in its metrics, and
//! it keeps the size limits and drops damaged chunks itself. So this command never talks to the daemon.

use std::process::ExitCode;

use clap::Subcommand;
use serde_json::json;

use host::images::tiers;

use super::{Failure, Outcome, Service, table};
use blobs::tier::{Tier, TierError, Usage};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(subcommand)]
    action: Option<CacheAction>,
    /// Print JSON.
    #[arg(long, global = true)]
    json: bool,
}

#[derive(Clone, Copy, Debug, Subcommand)]
enum CacheAction {
    /// Show the size of each cache. This is the default.
    Usage,
    /// Read each cache, and drop damaged chunks; they are fetched again when they are needed.
    Verify,
    /// Drop the chunks that are least worth keeping.
    Prune {
        /// Bytes to keep in each cache.
        #[arg(long, value_name = "BYTES", default_value_t = 0)]
        to: u64,
    },
}

/// Shows, verifies or prunes the caches of the service configuration.
pub(super) fn run(args: &Args, service: &Service) -> Outcome {
    let mut rows = Vec::new();
    let mut damaged = 0;
    for (kind, options) in tiers::tier_options(&*service.load()?) {
        let tier = Tier::open(kind, &options).map_err(|error| match error {
            TierError::InUse { .. } => Failure::Failed(format!(
                "{error}: a daemon's numbers are in `turbobd ls --metrics`; to verify or prune, stop it first"
            )),
            error => Failure::because(error),
        })?;
        match args.action.unwrap_or(CacheAction::Usage) {
            CacheAction::Usage => {}
            CacheAction::Verify => damaged += tier.verify().damaged,
            CacheAction::Prune { to } => _ = tier.prune(to),
        }
        let Usage { bytes, capacity, blobs, chunks } = tier.usage();
        rows.push(json!({
            "kind": kind.name(), "dir": options.dir, "bytes": bytes, "capacity": capacity,
            "blobs": blobs, "chunks": chunks,
        }));
    }
    if args.json {
        table::print_json(&rows)?;
    } else {
        let row = |row: &serde_json::Value| {
            let number = |key: &str| row[key].as_u64().unwrap_or_default();
            vec![
                row["kind"].as_str().unwrap_or_default().to_owned(),
                table::size(number("bytes")),
                table::size(number("capacity")),
                number("blobs").to_string(),
                number("chunks").to_string(),
                row["dir"].as_str().unwrap_or_default().to_owned(),
            ]
        };
        let head = ["KIND", "BYTES", "CAPACITY", "BLOBS", "CHUNKS", "DIRECTORY"];
        table::print(&head, &rows.iter().map(row).collect::<Vec<_>>())?;
    }
    if damaged > 0 {
        return Err(Failure::Failed(format!("{damaged} chunks were damaged and are forgotten")));
    }
    Ok(ExitCode::SUCCESS)
}
