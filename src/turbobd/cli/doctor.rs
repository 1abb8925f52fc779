//! `turbobd doctor`: the abilities of this host.

use std::process::ExitCode;

use super::{Outcome, stdout, table};
use host::doctor;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// Examines the host; exit status 1 if no front end can work.
pub(super) fn run(args: &Args) -> Outcome {
    let report = doctor::examine();
    if args.json {
        table::print_json(&report)?;
    } else {
        stdout::lines(&report)?;
    }
    Ok(ExitCode::from(report.exit_status()))
}
