//! Messages for people: the only way to stderr.
//!
//! A command goes on if stderr is closed. The standard library's macro panics on a closed pipe, so a lint forbids it
//! here.

use std::fmt;
use std::io::{self, Write as _};

/// Prints a line, by one write.
pub(super) fn line(text: impl fmt::Display) {
    let _ = io::stderr().lock().write_all(format!("{text}\n").as_bytes());
}
