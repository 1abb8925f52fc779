//! What a command tells programs: the one way to stdout.
//!
//! Who reads may stop reading: `turbobd ls | head -1`. That is no failure, and it does not end the command, which
//! may have a device to serve, an image to check, or a status to tell: only what it says from then on is lost. All
//! else that can happen to a write, as a full disk, is a failure of the command. The standard library's macros
//! panic at both, so a lint forbids them here.

use std::fmt;
use std::io::{self, ErrorKind, Write as _};

use super::Failure;

/// Prints a line.
pub(super) fn line(text: impl fmt::Display) -> Result<(), Failure> {
    lines(format_args!("{text}\n"))
}

/// Prints a text that brings its line ends, by one write if it is not long.
pub(super) fn lines(text: impl fmt::Display) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    match out.write_all(text.to_string().as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            Err(Failure::Failed(format!("Cannot write to stdout: {error}")))
        }
        _ => Ok(()),
    }
}
