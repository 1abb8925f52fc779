//! The command line: one file a command.
//!
//! Data goes to stdout, messages for people go to stderr. Exit status: 0 done, 1 the operation failed,
//! 2 wrong usage. An error is one line: the command, the failure, and every cause.

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
mod output;
mod registry_flags;
mod rpull;
mod snapshotter;
mod stderr;
mod stdout;
mod table;
mod trace;

use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use clap::{ArgAction, CommandFactory as _, Parser, Subcommand};
use thiserror::Error;

use ::convert::child as convert_child;
use host::config::ServiceConfig;
use host::config::log_file::LogFile;
use host::daemon::keeper;
use host::images::OpenError;
use source::failure::with_causes;

/// Start containers from unmodified OCI images before they are downloaded.
#[derive(Debug, Parser)]
#[command(name = "turbobd", version, propagate_version = true, max_term_width = 100)]
struct Cli {
    /// Log more: once for each step and its time, twice for everything.
    #[arg(short, long, global = true, action = ArgAction::Count, help_heading = GLOBAL)]
    verbose: u8,
    #[command(flatten)]
    service: Service,
    #[command(subcommand)]
    command: Command,
}

/// Heading of the options that every command takes.
const GLOBAL: &str = "Global options";

/// The service configuration that the user named.
#[derive(Debug, clap::Args)]
#[group(skip)]
struct Service {
    /// Configuration of this host, in overlaybd's JSON format (CONFIG.md) [default: $TURBOBD_SERVICE_CONFIG, or the
    /// first existing file of /etc/turbobd/config.json, /etc/overlaybd/overlaybd.json, /etc/overlaybd/config.json].
    #[arg(long = "service-config", value_name = "FILE", global = true, help_heading = GLOBAL)]
    file: Option<PathBuf>,
}

impl Service {
    fn load(&self) -> Result<Arc<ServiceConfig>, Failure> {
        ServiceConfig::load(self.file.as_deref()).map(Arc::new).map_err(Failure::because)
    }

    /// Loads the configuration of a daemon and begins its log, which the configuration describes; `own` is its file if the
    /// configuration names none.
    fn load_with_log(
        &self,
        verbose: u8,
        own: Option<&Path>,
    ) -> Result<(Arc<ServiceConfig>, Option<LogFile>), Failure> {
        let (config, warnings) =
            ServiceConfig::read(self.file.as_deref()).map_err(Failure::because)?;
        let log = log::begin_for_daemon(verbose, &config, own)?;
        for warning in warnings {
            tracing::warn!("{warning}");
        }
        Ok((Arc::new(config), log))
    }
}

// In the order of use, which is the order of the help text.
#[derive(Debug, Subcommand)]
enum Command {
    /// Make the block device of an image, and mount it.
    Attach(attach::Args),
    /// Unmount and remove a device.
    Detach(detach::Args),
    /// List the devices of this host.
    Ls(ls::Args),
    /// Show the layer, blob and segment behind a file or byte of a device, and the reads that wait.
    Explain(explain::Args),
    /// Pull an image into containerd, with a snapshotter that fetches its data when it is read.
    Rpull(rpull::Args),
    /// Build the meta image or the native image of an OCI image, or both, beside it.
    Convert(Box<convert::Args>),
    /// Show the layers of an image, their sizes and indexes.
    Inspect(inspect::Args),
    /// Verify an image.
    Check(check::Args),
    /// Write the virtual disk of an image to a raw file, or print its digest, without a block device.
    Export(export::Args),
    /// Make a native layer from the writable layer of a device.
    Commit(commit::Args),
    /// Record, show or publish the reads of a container's start.
    Trace(trace::Args),
    /// Show, verify or prune the caches on disk.
    Cache(cache::Args),
    /// Show the abilities of this host, and a remedy for each that is missing.
    Doctor(doctor::Args),
    /// Serve the devices of this host.
    Daemon(daemon::Args),
    /// Serve the snapshots of containerd, as a proxy plugin.
    Snapshotter(snapshotter::Args),
}

/// Reason for an end without success.
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
    /// An argument with an invalid value: exit status 2.
    fn usage(error: impl Error) -> Self {
        Self::Usage(with_causes(&error))
    }

    fn because(error: impl Error + Send + Sync + 'static) -> Self {
        Self::Because(Box::new(error))
    }

    /// An image that cannot be opened; exit status 2 if its name is invalid.
    fn open(error: OpenError) -> Self {
        match error {
            OpenError::Name(error) => Self::usage(error),
            error => Self::because(error),
        }
    }
}

type Outcome = Result<ExitCode, Failure>;

/// The definition of the command line, for man pages and completions.
#[must_use]
pub fn command() -> clap::Command {
    Cli::command()
}

/// Runs the command of the process's arguments.
#[must_use]
pub fn main() -> ExitCode {
    // Not a command for users: a daemon starts itself so, and speaks through pipes.
    if std::env::args_os().nth(1).is_some_and(|first| first == convert_child::COMMAND) {
        return match convert_child::serve() {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                stderr::line(format_args!("turbobd: {}: {error}", convert_child::COMMAND));
                ExitCode::FAILURE
            }
        };
    }
    // Nor this.
    if std::env::args_os().nth(1).is_some_and(|first| first == keeper::COMMAND) {
        return match keeper::keep(std::env::args_os().skip(2)) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                stderr::line(format_args!("turbobd: {}: {error}", keeper::COMMAND));
                ExitCode::FAILURE
            }
        };
    }
    let cli = Cli::parse();
    match &cli.command {
        // Its configuration says where to.
        Command::Daemon(_) => {}
        Command::Attach(_) | Command::Snapshotter(_) => log_to_stderr(cli.verbose, true),
        _ => log_to_stderr(cli.verbose, false),
    }
    let (name, outcome) = match cli.command {
        Command::Convert(args) => ("convert", convert::run(&args, &cli.service)),
        Command::Commit(args) => ("commit", commit::run(&args, &cli.service)),
        Command::Attach(args) => ("attach", attach::run(&args, &cli.service)),
        Command::Detach(args) => ("detach", detach::run(&args)),
        Command::Ls(args) => ("ls", ls::run(&args)),
        Command::Explain(args) => ("explain", explain::run(&args)),
        Command::Rpull(args) => ("rpull", rpull::run(&args, &cli.service)),
        Command::Export(args) => ("export", export::run(&args, &cli.service)),
        Command::Inspect(args) => ("inspect", inspect::run(&args, &cli.service)),
        Command::Check(args) => ("check", check::run(&args, &cli.service)),
        Command::Doctor(args) => ("doctor", doctor::run(&args)),
        Command::Cache(args) => ("cache", cache::run(&args, &cli.service)),
        Command::Daemon(args) => ("daemon", daemon::run(&args, &cli.service, cli.verbose)),
        Command::Snapshotter(args) => ("snapshotter", snapshotter::run(&args)),
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

/// Starts the log on stderr. `RUST_LOG` wins over `-v`. A command that serves a device logs each failure, also one that a
/// second fetch repairs. A command that only reads an image reports the failures that remain, as its one error.
fn log_to_stderr(verbose: u8, serves: bool) {
    // fuser warns of each request that a read-only file does not implement. It logs an error when the answer to a
    // read-ahead comes after the last close has ended the connection.
    log::to_stderr(match verbose {
        0 if serves => log::OF_A_SERVER,
        0 => QUIET,
        verbose => verbosity(verbose),
    });
}

/// Filter of the log of a command that reads an image: a failure that a second fetch repairs is no news, and one that
/// remains is the command's error.
const QUIET: &str =
    "warn,turbobd_blobs::fetch=error,turbobd_registry=error,fuser=error,fuser::reply=off";

/// Filter of the log by the number of `-v`, at least 1.
fn verbosity(verbose: u8) -> &'static str {
    match verbose {
        0 | 1 => "turbobd=info,warn,fuser=error",
        _ => "turbobd=debug,info",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// All commands without subcommands, by name.
    fn commands() -> Vec<clap::Command> {
        let mut open = vec![command()];
        let mut found = Vec::new();
        while let Some(command) = open.pop() {
            if command.has_subcommands() {
                open.extend(command.get_subcommands().cloned());
            } else {
                found.push(command);
            }
        }
        found
    }

    fn under(command: &clap::Command, heading: &str) -> Vec<String> {
        let arguments = command.get_arguments();
        let ids = arguments.filter(|argument| argument.get_help_heading() == Some(heading));
        ids.map(|argument| argument.get_id().to_string()).collect()
    }

    #[test]
    fn the_definition_is_sound() {
        command().debug_assert();
    }

    #[test]
    fn the_registry_heading_has_the_options_of_registries_and_no_others() {
        let registry =
            ["user", "password_stdin", "plain", "insecure", "root_ca", "cert_dir", "client_cert"];
        let with = commands()
            .iter()
            .filter(|command| {
                let found = under(command, "Registry");
                assert!(found.is_empty() || found == registry, "{}: {found:?}", command.get_name());
                !found.is_empty()
            })
            .count();
        assert!(with >= 5);
    }

    #[test]
    fn options_of_a_command_itself_have_no_heading() {
        let attach = commands().into_iter().find(|command| command.get_name() == "attach").unwrap();
        for own in ["mount", "upper", "frontend", "foreground", "dev_id"] {
            let argument =
                attach.get_arguments().find(|argument| argument.get_id() == own).unwrap();
            assert_eq!(argument.get_help_heading(), None, "{own}");
        }
    }

    #[test]
    fn trace_record_takes_an_image_and_then_a_command() {
        let line = ["turbobd", "trace", "record", "oci:a:b", "--", "sh", "-c", "true"];
        let cli = Cli::try_parse_from(line).unwrap();
        let text = format!("{:?}", cli.command);
        assert!(text.contains(r#"image: Some("oci:a:b")"#), "{text}");
        assert!(text.contains(r#"command: ["sh", "-c", "true"]"#), "{text}");
    }

    #[test]
    fn publish_is_shown_where_a_device_is_made() {
        let shown = |command: &clap::Command| {
            command
                .get_arguments()
                .any(|argument| argument.get_id() == "publish" && !argument.is_hide_set())
        };
        let mut names: Vec<String> = commands()
            .iter()
            .filter(|command| shown(command))
            .map(|command| command.get_name().to_owned())
            .collect();
        names.sort();
        assert_eq!(names, ["attach", "record"]);
    }

    #[test]
    fn every_visible_option_has_a_help_text_in_plain_words() {
        for command in commands() {
            for argument in command.get_arguments().filter(|argument| !argument.is_hide_set()) {
                let help = argument.get_help().map(ToString::to_string).unwrap_or_default();
                let name = format!("{} {}", command.get_name(), argument.get_id());
                assert!(!help.is_empty(), "{name} has no help");
                for riddle in ["nobody", "somebody", "whoever", "whom", " who ", "of which"] {
                    assert!(!help.to_lowercase().contains(riddle), "{name}: {help}");
                }
            }
        }
    }
}
