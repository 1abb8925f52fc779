//! `turbobd cache`: what is kept on disk, whether it is right, and making it smaller.
//!
//! A tier belongs to one process at a time. While a daemon has it, its numbers are on the page of metrics, and it
//! keeps within its bounds and forgets damage by itself; so nothing here asks the daemon.

use std::process::ExitCode;

use clap::Subcommand;
use serde_json::json;

use host::images::tiers;

use super::{Failure, Outcome, Service, table};
use blobs::tier::{Tier, TierError, Usage};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(subcommand)]
    what: Option<What>,
    /// Print JSON.
    #[arg(long, global = true)]
    json: bool,
}

#[derive(Clone, Copy, Debug, Subcommand)]
enum What {
    /// What is kept (the default).
    Usage,
    /// Read everything, and forget what is damaged: it is fetched again when it is needed.
    Verify,
    /// Give up what is least worth keeping.
    Prune {
        /// Bytes that may stay in each cache; without it, nothing stays.
        #[arg(long, value_name = "BYTES", default_value_t = 0)]
        to: u64,
    },
}

/// Shows, verifies or prunes the caches that the service configuration names.
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
        match args.what.unwrap_or(What::Usage) {
            What::Usage => {}
            What::Verify => damaged += tier.verify().damaged,
            What::Prune { to } => _ = tier.prune(to),
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
