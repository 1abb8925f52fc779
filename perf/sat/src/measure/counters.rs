//! What a run used, from the kernel's own counters.

use std::fs;

use rustix::param::clock_ticks_per_second;

/// CPU seconds of all threads of the kernel since it started.
///
/// A loop device, a writeback or a FUSE request is work of a kernel thread that belongs to no process of the run. The
/// difference over a run has it; what other programs let the kernel do meanwhile is in it too, so this needs an idle
/// machine.
pub(crate) fn kernel_threads() -> f64 {
    let mut ticks = 0;
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        if !entry.file_name().to_string_lossy().bytes().all(|byte| byte.is_ascii_digit()) {
            continue;
        }
        let stat = fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
        ticks += kernel_ticks(&stat).unwrap_or(0);
    }
    ticks as f64 / clock_ticks_per_second() as f64
}

/// User and system ticks of a line of `/proc/PID/stat`, if it is a kernel thread's.
fn kernel_ticks(stat: &str) -> Option<u64> {
    // The name may hold blanks and brackets: the fields begin behind its last bracket, with the state.
    let (_, fields) = stat.rsplit_once(") ")?;
    let fields: Vec<&str> = fields.split(' ').collect();
    // Kernel threads are children of kthreadd, process 2.
    if *fields.get(1)? != "2" {
        return None;
    }
    Some(fields.get(11)?.parse::<u64>().ok()? + fields.get(12)?.parse::<u64>().ok()?)
}

/// Begins the peak of the resident memory of a process anew.
pub(crate) fn reset_peak(process: u32) {
    // 5 resets the peak (proc_pid_clear_refs). Without it the peak counts from the start of the daemon.
    let _ = fs::write(format!("/proc/{process}/clear_refs"), "5");
}

/// Peak of the resident memory of a process, in bytes.
pub(crate) fn peak_memory(process: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{process}/status")).unwrap_or_default();
    kibibytes(&status, "VmHWM:").unwrap_or(0) * 1024
}

/// Bytes that a process has written to disks, or will when its pages are written back.
pub(crate) fn written(process: u32) -> u64 {
    let io = fs::read_to_string(format!("/proc/{process}/io")).unwrap_or_default();
    let line = io.lines().find_map(|line| line.strip_prefix("write_bytes: "));
    line.and_then(|bytes| bytes.trim().parse().ok()).unwrap_or(0)
}

/// Bytes of files in the page cache.
pub(crate) fn page_cache() -> u64 {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    kibibytes(&text, "Cached:").unwrap_or(0) * 1024
}

fn kibibytes(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_those_of_kernel_threads_whatever_their_name() {
        let line = |parent: &str| {
            format!("9 (kworker/u8:1 (x) y) S {parent} 0 0 0 -1 69238880 0 0 0 0 7 35 0 0 20 0")
        };
        assert_eq!(kernel_ticks(&line("2")), Some(42));
        assert_eq!(kernel_ticks(&line("1")), None);
        assert_eq!(kernel_ticks("9 (x"), None);
    }

    #[test]
    fn the_peak_of_this_process_is_counted() {
        assert!(peak_memory(std::process::id()) > 1 << 20);
        assert_eq!(peak_memory(0), 0);
    }
}
