//! `turbobd doctor`: the abilities of this host.

use std::process::ExitCode;

use super::{Outcome, stdout, table};
use client::protocol;
use host::{doctor, leftovers};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Print JSON.
    #[arg(long)]
    json: bool,
    /// Remove what dead daemons have left (loop devices, their mounts, folders, sockets), and name each.
    #[arg(long, conflicts_with = "json")]
    clean: bool,
}

/// Examines the host; exit status 1 if no front end can work.
pub(super) fn run(args: &Args) -> Outcome {
    if args.clean {
        return clean();
    }
    let report = doctor::examine();
    if args.json {
        table::print_json(&report)?;
    } else {
        stdout::lines(&report)?;
    }
    Ok(ExitCode::from(report.exit_status()))
}

/// Removes what dead daemons have left; exit status 1 if something is still in use.
fn clean() -> Outcome {
    let run_dir = protocol::run_dir();
    let lock = std::fs::File::open(run_dir.join("turbobd.lock")).ok();
    // The folder of a daemon that lives is its own.
    let is_free = lock
        .as_ref()
        .is_none_or(|lock| sys::flock::exclusive(lock, sys::flock::MOMENT).unwrap_or(false));
    let all = leftovers::remove(is_free.then_some(run_dir.as_path()));
    for what in &all.removed {
        stdout::line(format_args!("removed {what}"))?;
    }
    for what in &all.left {
        stdout::line(format_args!("left {what}"))?;
    }
    Ok(if all.left.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
