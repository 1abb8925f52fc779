//! Programs that are found, started and ended.
//!
//! All programs of a run are started through a shell that first enters the run's cgroup, and short ones also
//! through `timeout`: then a program that hangs cannot hold up the table.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use crate::failure::{Attempt as _, Failure};
use crate::measure::group::Group;

/// Most of a program's output that is shown in a failure.
const SHOWN: usize = 300;

/// Finds a program in `first`, the folders of PATH or those of administrators' programs.
pub(crate) fn find(name: &str, first: &[PathBuf]) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = first.iter().cloned().chain(std::env::split_paths(&path));
    // debootstrap and runc are in folders that the PATH of a user may lack.
    let folders = folders.chain(["/usr/sbin".into(), "/sbin".into()]);
    folders.map(|folder: PathBuf| folder.join(name)).find(|file| file.is_file())
}

/// Runs a command to its end; its standard output. It is ended after `limit`.
pub(crate) fn run(command: &Command, limit: Duration) -> Result<String, Failure> {
    run_in(command, None, limit)
}

/// Runs a command to its end in a group; its standard output. It is ended after `limit`.
pub(crate) fn run_in(
    command: &Command,
    group: Option<&Group>,
    limit: Duration,
) -> Result<String, Failure> {
    let (output, _) = both(command, group, limit)?;
    Ok(output)
}

/// Runs a command to its end in a group; its standard output and its standard error. It is ended after `limit`.
pub(crate) fn both(
    command: &Command,
    group: Option<&Group>,
    limit: Duration,
) -> Result<(String, String), Failure> {
    let mut limited = Command::new("timeout");
    limited.args(["--kill-after=5", &limit.as_secs().to_string()]);
    limited.arg(command.get_program()).args(command.get_args());
    same_surroundings(command, &mut limited);
    let mut entered = in_group(&limited, group);
    let output =
        entered.stdin(Stdio::null()).output().attempt(|| format!("start {}", shown(command)))?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    if output.status.success() {
        return Ok((text(&output.stdout), text(&output.stderr)));
    }
    // `timeout` says by 124 that it ended the program.
    if output.status.code() == Some(124) {
        let detail = match tail(&text(&output.stderr)) {
            tail if tail.is_empty() => tail,
            tail => format!(": {tail}"),
        };
        return Err(Failure::Late {
            what: format!("the end of {}", shown(command)),
            seconds: limit.as_secs(),
            detail,
        });
    }
    let said = if output.stderr.is_empty() { &output.stdout } else { &output.stderr };
    Err(Failure::Program { command: shown(command), output: tail(&text(said)) })
}

/// The command, with a shell before it that enters the group.
fn in_group(command: &Command, group: Option<&Group>) -> Command {
    let Some(group) = group else {
        let mut same = Command::new(command.get_program());
        same.args(command.get_args());
        same_surroundings(command, &mut same);
        return same;
    };
    let mut entered = Command::new("sh");
    entered.args(["-c", "echo 0 > \"$1\" && shift && exec \"$@\"", "sh"]);
    entered.arg(group.processes_file()).arg(command.get_program()).args(command.get_args());
    same_surroundings(command, &mut entered);
    entered
}

fn same_surroundings(from: &Command, to: &mut Command) {
    for (name, value) in from.get_envs() {
        match value {
            Some(value) => to.env(name, value),
            None => to.env_remove(name),
        };
    }
    if let Some(dir) = from.get_current_dir() {
        to.current_dir(dir);
    }
}

/// The program and its first arguments, for a message.
fn shown(command: &Command) -> String {
    let name = Path::new(command.get_program()).file_name().unwrap_or_default();
    let words = command.get_args().take(3).map(|word| word.to_string_lossy().into_owned());
    std::iter::once(name.to_string_lossy().into_owned()).chain(words).collect::<Vec<_>>().join(" ")
}

/// The end of an output, in one line.
pub(crate) fn tail(text: &str) -> String {
    let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
    let start = line.char_indices().rev().nth(SHOWN - 1).map_or(0, |(at, _)| at);
    line[start..].to_owned()
}

/// A program that runs beside the harness and is ended with it.
#[derive(Debug)]
pub(crate) struct Daemon {
    name: String,
    child: Child,
    log: PathBuf,
}

impl Daemon {
    /// Starts a program; its output goes to `log`.
    pub(crate) fn start(
        command: &Command,
        group: Option<&Group>,
        log: &Path,
    ) -> Result<Self, Failure> {
        let file = File::create(log).attempt(|| format!("make {}", log.display()))?;
        let errors = file.try_clone().attempt(|| format!("make {}", log.display()))?;
        let child = in_group(command, group)
            .stdin(Stdio::null())
            .stdout(file)
            .stderr(errors)
            .spawn()
            .attempt(|| format!("start {}", shown(command)))?;
        Ok(Self { name: shown(command), child, log: log.to_owned() })
    }

    /// Waits until `ready` is true; fails if the program ends before, or after `limit`.
    pub(crate) fn wait_until(
        &mut self,
        limit: Duration,
        mut ready: impl FnMut() -> bool,
    ) -> Result<(), Failure> {
        let start = Instant::now();
        while !ready() {
            if let Ok(Some(status)) = self.child.try_wait() {
                let output = format!("{status}: {}", tail(&self.said()));
                return Err(Failure::Program { command: self.name.clone(), output });
            }
            if start.elapsed() > limit {
                return Err(Failure::Late {
                    what: format!("the start of {}", self.name),
                    seconds: limit.as_secs(),
                    detail: format!(": {}", tail(&self.said())),
                });
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }

    /// What the program wrote until now.
    pub(crate) fn said(&self) -> String {
        std::fs::read(&self.log)
            .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
            .unwrap_or_default()
    }
}

impl Drop for Daemon {
    /// Asks the program to end, and ends it if it does not.
    fn drop(&mut self) {
        if let Some(pid) = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw) {
            // It may have ended already.
            let _ = kill_process(pid, Signal::TERM);
        }
        let start = Instant::now();
        while start.elapsed() < Duration::from_secs(8) {
            if !matches!(self.child.try_wait(), Ok(None)) {
                return;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_that_fails_says_the_end_of_its_output_in_one_line() {
        let mut command = Command::new("sh");
        command.args(["-c", "echo first >&2; echo second >&2; exit 3"]);
        let failure = run(&command, Duration::from_secs(5)).unwrap_err();
        let Failure::Program { output, .. } = failure else { panic!("{failure}") };
        assert_eq!(output, "first second");
    }

    #[test]
    fn a_program_that_hangs_is_ended() {
        let mut command = Command::new("sleep");
        command.arg("60");
        let start = Instant::now();
        let failure = run(&command, Duration::from_secs(1)).unwrap_err();
        assert!(matches!(failure, Failure::Late { .. }), "{failure}");
        assert!(start.elapsed() < Duration::from_secs(30));
    }

    #[test]
    fn the_tail_of_a_long_output_has_its_last_letters() {
        let text = "é".repeat(1000) + " end";
        let tail = tail(&text);
        assert_eq!(tail.chars().count(), SHOWN);
        assert!(tail.ends_with("é end"));
    }
}
