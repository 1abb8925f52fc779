//! Limits of a process.

use std::io;

/// Raises the limit on descriptors: every device takes a few, and the usual limit of 1024 is for programs
/// that use `select`.
///
/// # Errors
/// Returns the system's refusal; the limit is then unchanged.
pub fn raise_descriptor_limit() -> io::Result<()> {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    Ok(setrlimit(Resource::Nofile, limit)?)
}
