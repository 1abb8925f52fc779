//! Where this program says what it does: standard error, or a daemon's log file.
//!
//! How much is said: `RUST_LOG`, else `-v`, else the service configuration's `logLevel`, else what a command or a
//! server says by default. A log file counts as asked for: it begins at level 1.

use std::io::IsTerminal as _;

use tracing_subscriber::fmt::writer::BoxMakeWriter;

use super::Failure;
use host::config::{LogLevel, ServiceConfig};

/// What a server says that nobody has asked to say more.
pub(super) const OF_A_SERVER: &str = "warn,fuser=error,fuser::reply=off";

/// What is said at each level.
fn at(level: LogLevel) -> &'static str {
    match level {
        LogLevel::Debug => "turbobd=debug,info",
        LogLevel::Info => "turbobd=info,warn,fuser=error,fuser::reply=off",
        LogLevel::Warnings => OF_A_SERVER,
        LogLevel::Errors => "error,fuser::reply=off",
    }
}

/// Begins the log of a daemon, which may go to a file.
pub(super) fn begin_for_daemon(verbose: u8, config: &ServiceConfig) -> Result<(), Failure> {
    let log = &config.log;
    let stated = match (verbose, log.level) {
        (0, level) => level.map(at),
        (verbose, _) => Some(super::verbosity(verbose)),
    };
    match &log.path {
        None => to_stderr(stated.unwrap_or(OF_A_SERVER)),
        Some(path) => {
            let file = config.open_log(log.key, path).map_err(Failure::because)?;
            begin(
                stated.unwrap_or(at(LogLevel::Info)),
                BoxMakeWriter::new(move || file.clone()),
                false,
            );
        }
    }
    Ok(())
}

/// Begins the log of this process on standard error.
pub(super) fn to_stderr(level: &str) {
    begin(level, BoxMakeWriter::new(std::io::stderr), std::io::stderr().is_terminal());
}

fn begin(level: &str, writer: BoxMakeWriter, colours: bool) {
    let filter =
        tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| level.into());
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(writer)
        .with_ansi(colours)
        .with_target(false)
        // It would tell of a log that nobody reads by a macro that panics then.
        .log_internal_errors(false)
        .try_init();
}
