//! Output of a command for programs: the only way to stdout.
//!
//! A reader may close the pipe early: `turbobd ls | head -1`. That is no failure and does not end the command, which
//! may serve a device or verify an image; later output is lost. Any other error of a write, for example a full disk, is
//! a failure of the command. The standard library's macros panic at both, so a lint forbids them here.

use std::fmt;
use std::io::{self, ErrorKind, Write as _};

use super::Failure;

/// Prints a line.
pub(super) fn line(text: impl fmt::Display) -> Result<(), Failure> {
    lines(format_args!("{text}\n"))
}

/// Prints a text that contains its line ends, by one write if it is short.
pub(super) fn lines(text: impl fmt::Display) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    match out.write_all(text.to_string().as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            Err(Failure::Failed(format!("Cannot write to stdout: {error}")))
        }
        _ => Ok(()),
    }
}
