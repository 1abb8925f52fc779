//! The log: on stderr, or in a daemon's log file.
//!
//! The level comes from `RUST_LOG`, else `-v`, else the service configuration's `logLevel`, else the default of the
//! command. The default of a log file is `logLevel` 1. `RUST_LOG` takes targets with levels, such as
//! `turbobd=debug,warn`.
//!
//! The log of a server is bounded: repeated failures by `limited`, a daemon's own file in the run directory by its rotation.

mod limited;

use std::io::IsTerminal as _;
use std::path::Path;

use tracing_subscriber::filter::Targets;
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::fmt::writer::BoxMakeWriter;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;

use self::limited::LimitedLog;
use super::Failure;
use host::config::log_file::{LogFile, Rotation};
use host::config::{LogLevel, ServiceConfig};

/// Size of the log of a daemon that a client started: the run directory is usually in memory. With its one predecessor it takes
/// a mebibyte at most, some 4,000 lines.
const OWN: Rotation = Rotation { size: 512 << 10, keep: 1 };

/// Default filter of a command that serves devices.
pub(super) const OF_A_SERVER: &str = "warn,fuser=error,fuser::reply=off";

/// Filter of each level.
fn at(level: LogLevel) -> &'static str {
    match level {
        LogLevel::Debug => "turbobd=debug,info",
        LogLevel::Info => "turbobd=info,warn,fuser=error,fuser::reply=off",
        LogLevel::Warnings => OF_A_SERVER,
        LogLevel::Errors => "error,fuser::reply=off",
    }
}

/// Begins the log of a daemon; returns its file, if it goes to one. `own` is the file if the configuration names none.
pub(super) fn begin_for_daemon(
    verbose: u8,
    config: &ServiceConfig,
    own: Option<&Path>,
) -> Result<Option<LogFile>, Failure> {
    let log = &config.log;
    let stated = match (verbose, log.level) {
        (0, level) => level.map(at),
        (verbose, _) => Some(super::verbosity(verbose)),
    };
    let (file, default) = match (&log.path, own) {
        (Some(path), _) => {
            (config.open_log(log.key, path).map_err(Failure::because)?, at(LogLevel::Info))
        }
        (None, Some(own)) => (LogFile::open(own, OWN).map_err(Failure::because)?, OF_A_SERVER),
        (None, None) => {
            let (terminal, lines) =
                (std::io::stderr().is_terminal(), BoxMakeWriter::new(std::io::stderr));
            begin(stated.unwrap_or(OF_A_SERVER), LimitedLog::new(lines), terminal);
            return Ok(None);
        }
    };
    let lines = file.clone();
    let writer = LimitedLog::new(BoxMakeWriter::new(move || lines.clone()));
    begin(stated.unwrap_or(default), writer, false);
    Ok(Some(file))
}

/// Begins the log of this process on standard error.
pub(super) fn to_stderr(level: &str) {
    begin(level, BoxMakeWriter::new(std::io::stderr), std::io::stderr().is_terminal());
}

fn begin<W>(level: &str, writer: W, colours: bool)
where
    W: for<'a> MakeWriter<'a> + Send + Sync + 'static,
{
    let stated = std::env::var("RUST_LOG").ok().and_then(|level| level.parse::<Targets>().ok());
    let Some(filter) = stated.or_else(|| level.parse().ok()) else { return };
    let lines = tracing_subscriber::fmt::layer()
        .with_writer(writer)
        .with_ansi(colours)
        .with_target(false)
        // The message about a closed log pipe would go through a macro that panics on a closed pipe.
        .log_internal_errors(false);
    let _ = tracing_subscriber::registry().with(lines).with(filter).try_init();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_level_is_a_filter() {
        let levels = [LogLevel::Debug, LogLevel::Info, LogLevel::Warnings, LogLevel::Errors];
        let stated = levels.into_iter().map(at).chain([1, 2].map(super::super::verbosity));
        for level in stated.chain([super::super::QUIET]) {
            assert!(level.parse::<Targets>().is_ok(), "{level}");
        }
    }
}
