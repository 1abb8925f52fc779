//! What a command tells people: the one way to stderr.
//!
//! Nobody may be reading, and there is nobody else to tell: the command goes on. The standard library's macro panics
//! then, in the middle of what the command was doing, so a lint forbids it here.

use std::fmt;
use std::io::{self, Write as _};

/// Prints a line, by one write.
pub(super) fn line(text: impl fmt::Display) {
    let _ = io::stderr().lock().write_all(format!("{text}\n").as_bytes());
}
