//! The kernel's facts about this process.

use std::fs;

/// This process now. A number that the kernel does not report is absent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Process {
    /// Seconds since 1970 at which the daemon began to serve.
    pub started: u64,
    /// Resident memory in bytes, shared pages included.
    pub resident: Option<u64>,
    /// Number of threads.
    pub threads: Option<u64>,
    /// Number of open file descriptors.
    pub descriptors: Option<u64>,
}

impl Process {
    /// Reads the present values; `started` is the time at which it began to serve.
    #[must_use]
    pub fn now(started: u64) -> Self {
        let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
        let number = |key: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(key))?;
            line.split_whitespace().next()?.parse::<u64>().ok()
        };
        let descriptors = fs::read_dir("/proc/self/fd").ok().map(|files| files.count() as u64);
        Self {
            started,
            resident: number("VmRSS:").map(|kib| kib << 10),
            threads: number("Threads:"),
            // Without the descriptor of the listing itself.
            descriptors: descriptors.map(|count| count.saturating_sub(1)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_has_memory_threads_and_files() {
        let now = Process::now(7);
        assert_eq!(now.started, 7);
        assert!(
            now.resident > Some(1 << 20) && now.threads >= Some(1) && now.descriptors >= Some(3)
        );
    }
}
