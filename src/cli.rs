//! The command line.

use std::process::ExitCode;

/// Runs the command the process was started with.
#[must_use]
pub fn main() -> ExitCode {
    ExitCode::SUCCESS
}
