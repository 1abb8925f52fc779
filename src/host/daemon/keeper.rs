//! The keeper of a daemon that a client started: a small process that starts the next daemon when this one dies.
//!
//! Readers of a device whose daemon has died wait for the next daemon. A daemon that runs as a service is started again by its
//! init system. For a daemon that `turbobd attach` started, this process does it. The two share a pipe: the daemon writes a byte when
//! it ends in order, and the kernel closes the pipe when it dies.
//!
//! It is started before the daemon gives up rights and enters its mount namespace, because the next daemon needs the one and leaves
//! the other. It opens nothing and holds no device, so that it never keeps the kernel from freeing one. It becomes the next daemon by
//! `exec`, and that one starts a keeper of its own. A daemon that dies again and again before its devices are
//! back is started after longer and longer pauses. Without records of devices in the run directory nothing waits, and the keeper ends.

use std::ffi::OsString;
use std::io::{self, Read as _, Write as _};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, Command, Stdio};
use std::time::Duration;

use parking_lot::Mutex;

use super::journal;
use client::protocol::run_dir;

/// First argument of a keeper. Not a command for users.
pub const COMMAND: &str = "keep";

/// Byte of a daemon whose devices are all back.
const SETTLED: u8 = b's';

/// Byte of a daemon that ends in order.
const END: u8 = b'e';

/// Pause after the first death of a daemon that had not brought its devices back.
const FIRST_PAUSE: Duration = Duration::from_millis(100);

/// Longest pause: readers wait so much longer.
const LONGEST_PAUSE: Duration = Duration::from_secs(10);

/// How to start a keeper, and the daemon after this one.
#[derive(Clone, Debug)]
pub struct KeeperOptions {
    /// The program of this process, which takes [`COMMAND`] and `daemon --auto`.
    pub program: PathBuf,
    /// Arguments of this daemon, besides `daemon --auto`.
    pub arguments: Vec<OsString>,
    /// Number of daemons before this one that died before their devices were back.
    pub deaths: u32,
}

/// A daemon's end of the pipe to its keeper.
#[derive(Debug, Default)]
pub(super) struct Keeper {
    pipe: Mutex<Option<ChildStdin>>,
}

impl Keeper {
    /// Starts a keeper; without options, or on a host without ublk, there is none. A failure is logged.
    pub(super) fn start(options: Option<&KeeperOptions>) -> Self {
        let ublk = Path::new(frontends::ublk::probe::CONTROL);
        let Some(options) = options.filter(|_| ublk.exists()) else { return Self::default() };
        let child = Command::new(&options.program)
            .arg(COMMAND)
            .arg(options.deaths.to_string())
            .args(&options.arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            // A signal from the client's terminal is not for it.
            .process_group(0)
            .spawn();
        match child {
            Ok(child) => Self { pipe: Mutex::new(child.stdin) },
            Err(error) => {
                tracing::warn!(%error, "No process can be started that would restart a killed daemon");
                Self::default()
            }
        }
    }

    /// Says that all devices of the daemon before are back.
    pub(super) fn settled(&self) {
        if let Some(pipe) = &mut *self.pipe.lock() {
            let _ = pipe.write_all(&[SETTLED]);
        }
    }

    /// Says that this daemon ends in order.
    pub(super) fn end(&self) {
        if let Some(mut pipe) = self.pipe.lock().take() {
            let _ = pipe.write_all(&[END]);
        }
    }
}

/// The keeper: waits for the end of the daemon at standard input, and becomes the next one if that one died with devices.
/// `arguments` are those after [`COMMAND`].
///
/// # Errors
/// The system's, when it cannot run the next daemon.
pub fn keep(mut arguments: impl Iterator<Item = OsString>) -> io::Result<()> {
    let program = std::env::current_exe()?;
    let given = arguments.next().unwrap_or_default();
    let mut deaths = given.to_str().and_then(|given| given.parse().ok()).unwrap_or(0_u32);
    let mut pipe = io::stdin().lock();
    let mut byte = [0];
    loop {
        match pipe.read(&mut byte) {
            Ok(0) => break,
            Ok(_) if byte[0] == END => return Ok(()),
            Ok(_) => deaths = 0,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    if !journal::has_records(&run_dir()) {
        return Ok(());
    }
    std::thread::sleep(pause(deaths));
    let next = deaths.saturating_add(1).to_string();
    let mut command = Command::new(program);
    command.args(["daemon", "--auto", "--deaths", &next]).args(arguments);
    Err(command.stdin(Stdio::null()).exec())
}

/// Pause before the next daemon, after so many deaths in a row of daemons that had not brought their devices back.
fn pause(deaths: u32) -> Duration {
    match deaths {
        0 => Duration::ZERO,
        more => FIRST_PAUSE.saturating_mul(1 << (more - 1).min(16)).min(LONGEST_PAUSE),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_daemon_that_dies_at_once_again_and_again_is_started_ever_more_seldom() {
        assert_eq!(pause(0), Duration::ZERO);
        assert_eq!(pause(1), FIRST_PAUSE);
        assert_eq!(pause(2), FIRST_PAUSE * 2);
        assert_eq!(pause(u32::MAX), LONGEST_PAUSE);
    }
}
