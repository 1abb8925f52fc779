//! A file that one process has at a time.
//!
//! The kernel lets a lock go with the last copy of its descriptor, and a process that starts another holds
//! copies of all of its descriptors for a moment. So a lock that seems to be taken is asked for again.

use std::fs::File;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

/// Longer than a process takes between its fork and its exec.
pub const MOMENT: Duration = Duration::from_millis(200);

/// Locks `file` for this process until it is closed. False when another has it all the time of `patience`.
///
/// # Errors
/// The system's refusal.
pub fn exclusive(file: &File, patience: Duration) -> std::io::Result<bool> {
    let until = Instant::now() + patience;
    loop {
        match flock(file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(true),
            Err(Errno::WOULDBLOCK) if Instant::now() < until => {
                std::thread::sleep(Duration::from_millis(20));
            }
            Err(Errno::WOULDBLOCK) => return Ok(false),
            Err(error) => return Err(error.into()),
        }
    }
}
