//! The command line: one file a command.
//!
//! Data goes to stdout, everything for people to stderr. Exit status: 0 done, 1 the operation failed,
//! 2 wrong usage. An error is printed as one line: the command, what failed, and every cause.

mod attach;
mod bars;
mod cache;
mod check;
mod commit;
mod convert;
mod daemon;
mod detach;
mod doctor;
mod explain;
mod export;
mod image;
mod inspect;
mod log;
mod ls;
mod registry_flags;
mod stderr;
mod stdout;
mod table;
mod trace;

use std::error::Error;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use clap::{ArgAction, Parser, Subcommand};
use thiserror::Error;

use host::config::ServiceConfig;
use host::images::OpenError;
use source::failure::with_causes;

/// Start containers from unmodified OCI images before they are downloaded.
#[derive(Debug, Parser)]
#[command(name = "turbobd", version, propagate_version = true, max_term_width = 100)]
struct Cli {
    /// Say more: once for what is done and how long it takes, twice for everything.
    #[arg(short, long, global = true, action = ArgAction::Count)]
    verbose: u8,
    #[command(flatten)]
    service: Service,
    #[command(subcommand)]
    command: Command,
}

/// The service configuration, as the user named it.
#[derive(Debug, clap::Args)]
#[group(skip)]
struct Service {
    /// Settings of this host, overlaybd's JSON (CONFIG.md); else $TURBOBD_SERVICE_CONFIG, else the first that
    /// exists of /etc/turbobd/config.json, /etc/overlaybd/overlaybd.json, /etc/overlaybd/config.json.
    #[arg(long = "service-config", value_name = "FILE", global = true)]
    file: Option<PathBuf>,
}

impl Service {
    fn load(&self) -> Result<Arc<ServiceConfig>, Failure> {
        ServiceConfig::load(self.file.as_deref()).map(Arc::new).map_err(Failure::because)
    }

    /// The same for a daemon, whose log begins with it.
    fn load_with_log(&self, verbose: u8) -> Result<Arc<ServiceConfig>, Failure> {
        let (config, warnings) =
            ServiceConfig::read(self.file.as_deref()).map_err(Failure::because)?;
        log::begin_for_daemon(verbose, &config)?;
        for warning in warnings {
            tracing::warn!("{warning}");
        }
        Ok(Arc::new(config))
    }
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Build the meta image of an OCI image, or its native image, or both, beside it.
    Convert(Box<convert::Args>),
    /// Make a native layer of what was written to a device.
    Commit(commit::Args),
    /// Make a block device of an image, and mount it.
    Attach(attach::Args),
    /// Unmount and remove a device.
    Detach(detach::Args),
    /// List the devices of this host.
    Ls(ls::Args),
    /// Say where a file or byte of a device comes from, and what a device waits for.
    Explain(explain::Args),
    /// Read an image's whole virtual disk without any kernel.
    Export(export::Args),
    /// Say what an image is: layers, sizes, indexes.
    Inspect(inspect::Args),
    /// Verify an image.
    Check(check::Args),
    /// Say what this host can do, and the remedy for what it cannot.
    Doctor(doctor::Args),
    /// Show, verify or prune what is kept on disk.
    Cache(cache::Args),
    /// Serve the devices of this host.
    Daemon(daemon::Args),
    /// Record what a start reads, or show what was recorded.
    Trace(trace::Args),
}

/// Why a command ended without success.
#[derive(Debug, Error)]
enum Failure {
    /// Arguments that parse but make no sense together: exit status 2.
    #[error("{0}")]
    Usage(String),
    /// Exit status 1.
    #[error("{0}")]
    Failed(String),
    /// Exit status 1, with its causes.
    #[error(transparent)]
    Because(#[from] Box<dyn Error + Send + Sync>),
}

impl Failure {
    /// An argument that cannot be what it is given as: exit status 2.
    fn usage(error: impl Error) -> Self {
        Self::Usage(with_causes(&error))
    }

    fn because(error: impl Error + Send + Sync + 'static) -> Self {
        Self::Because(Box::new(error))
    }

    /// An image that cannot be opened; exit status 2 if its name is none.
    fn open(error: OpenError) -> Self {
        match error {
            OpenError::Name(error) => Self::usage(error),
            error => Self::because(error),
        }
    }
}

type Outcome = Result<ExitCode, Failure>;

/// Runs the command that the process was started with.
#[must_use]
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    match &cli.command {
        // Its configuration says where to.
        Command::Daemon(_) => {}
        Command::Attach(_) => log_to_stderr(cli.verbose, true),
        _ => log_to_stderr(cli.verbose, false),
    }
    let (name, outcome) = match cli.command {
        Command::Convert(args) => ("convert", convert::run(&args, &cli.service)),
        Command::Commit(args) => ("commit", commit::run(&args, &cli.service)),
        Command::Attach(args) => ("attach", attach::run(&args, &cli.service)),
        Command::Detach(args) => ("detach", detach::run(&args)),
        Command::Ls(args) => ("ls", ls::run(&args)),
        Command::Explain(args) => ("explain", explain::run(&args)),
        Command::Export(args) => ("export", export::run(&args, &cli.service)),
        Command::Inspect(args) => ("inspect", inspect::run(&args, &cli.service)),
        Command::Check(args) => ("check", check::run(&args, &cli.service)),
        Command::Doctor(args) => ("doctor", doctor::run(&args)),
        Command::Cache(args) => ("cache", cache::run(&args, &cli.service)),
        Command::Daemon(args) => ("daemon", daemon::run(&args, &cli.service, cli.verbose)),
        Command::Trace(args) => ("trace", trace::run(&args, &cli.service)),
    };
    match outcome {
        Ok(code) => code,
        Err(failure) => {
            stderr::line(format_args!("turbobd: {name}: {}", with_causes(&failure)));
            ExitCode::from(if matches!(failure, Failure::Usage(_)) { 2 } else { 1 })
        }
    }
}

/// `RUST_LOG` wins over `-v`. What was mended by fetching it again is news for who keeps the log of a server;
/// a command that reads an image tells only what it could not mend, as its one error.
fn log_to_stderr(verbose: u8, serves: bool) {
    // fuser warns of each request that a read-only file has no use for, and calls it an error when the answer
    // of a read ahead comes after the last close has ended the connection.
    log::to_stderr(match verbose {
        0 if serves => log::OF_A_SERVER,
        0 => "warn,turbobd_blobs::fetch=error,turbobd_registry=error,fuser=error,fuser::reply=off",
        verbose => verbosity(verbose),
    });
}

/// Filter of the log for `-v`, and for more of them.
fn verbosity(verbose: u8) -> &'static str {
    match verbose {
        0 | 1 => "turbobd=info,warn,fuser=error",
        _ => "turbobd=debug,info",
    }
}
