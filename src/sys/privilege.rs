//! Rights that the daemon gives up at its start, before it has a second thread or has read a byte of an image.
//!
//! The daemon is root because ublk, loop devices and mounts of FUSE want `CAP_SYS_ADMIN`. It parses what strangers wrote. So that a fault
//! in it gives as little as possible, it keeps only the capabilities of [`NEEDED`], no program that it starts gains any
//! (`no_new_privs`, and an empty rest of the bounding set), and a seccomp filter refuses the system calls of [`DENIED`], which
//! none of its threads makes.
//!
//! The filter allows by default: the kernel's answers, `io_uring`, TLS and the allocator of the C library use many calls, which
//! differ by release, and a call that is refused in the middle of a page fault hangs a container. The list has what
//! takes over other processes or the kernel. Threads that only work on what is open (the page of metrics, the audit log, the writers of the
//! disk tiers) have a second filter ([`DENIED_TO_CLERKS`]): they start no program, open no connection and mount nothing. The
//! threads that fetch, decode and serve have no second one: each of them may start another that opens a connection or asks a
//! credential program, and a thread inherits its filters.
//!
//! Landlock is not used for the process: the paths of layouts, writable layers, device configs and certificates are named by clients later,
//! at any place, and a rule of Landlock cannot be added to once it is in force.
//!
//! Every thread inherits all of this from the one that starts it.

use std::collections::BTreeMap;
use std::io;
use std::sync::OnceLock;

use libc::c_long;
use rustix::thread::{
    CapabilitySet, capabilities, remove_capability_from_bounding_set, set_capabilities,
    set_no_new_privs,
};
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, TargetArch};

/// Capabilities that the daemon needs, with the reason of each.
pub const NEEDED: [(CapabilitySet, &str); 5] = [
    (CapabilitySet::SYS_ADMIN, "control commands of ublk, loop devices, mounts of FUSE"),
    (CapabilitySet::SYS_RESOURCE, "PR_SET_IO_FLUSHER of threads that serve devices"),
    (
        CapabilitySet::DAC_OVERRIDE,
        "layouts, layers and credentials in folders of other users, which root names",
    ),
    (CapabilitySet::IPC_LOCK, "rings and buffers of io_uring beyond RLIMIT_MEMLOCK"),
    (CapabilitySet::NET_BIND_SERVICE, "metrics at a port below 1024, if they are configured there"),
];

/// System calls that no thread of the daemon makes: those that control other processes, load code into the kernel,
/// use its keys, or change the host.
pub const DENIED: &[(&str, c_long)] = &[
    // Other processes.
    ("ptrace", libc::SYS_ptrace),
    ("process_vm_readv", libc::SYS_process_vm_readv),
    ("process_vm_writev", libc::SYS_process_vm_writev),
    ("process_madvise", libc::SYS_process_madvise),
    ("pidfd_getfd", libc::SYS_pidfd_getfd),
    ("kcmp", libc::SYS_kcmp),
    // Code in the kernel.
    ("init_module", libc::SYS_init_module),
    ("finit_module", libc::SYS_finit_module),
    ("delete_module", libc::SYS_delete_module),
    ("kexec_load", libc::SYS_kexec_load),
    ("kexec_file_load", libc::SYS_kexec_file_load),
    ("bpf", libc::SYS_bpf),
    ("perf_event_open", libc::SYS_perf_event_open),
    ("userfaultfd", libc::SYS_userfaultfd),
    // Its keys and its log.
    ("add_key", libc::SYS_add_key),
    ("request_key", libc::SYS_request_key),
    ("keyctl", libc::SYS_keyctl),
    ("syslog", libc::SYS_syslog),
    // The host.
    ("reboot", libc::SYS_reboot),
    ("swapon", libc::SYS_swapon),
    ("swapoff", libc::SYS_swapoff),
    ("acct", libc::SYS_acct),
    ("quotactl", libc::SYS_quotactl),
    ("sethostname", libc::SYS_sethostname),
    ("setdomainname", libc::SYS_setdomainname),
    ("settimeofday", libc::SYS_settimeofday),
    ("clock_settime", libc::SYS_clock_settime),
    ("clock_adjtime", libc::SYS_clock_adjtime),
    ("adjtimex", libc::SYS_adjtimex),
    #[cfg(target_arch = "x86_64")]
    ("iopl", libc::SYS_iopl),
    #[cfg(target_arch = "x86_64")]
    ("ioperm", libc::SYS_ioperm),
    // Ways around paths and namespaces.
    ("pivot_root", libc::SYS_pivot_root),
    ("chroot", libc::SYS_chroot),
    ("setns", libc::SYS_setns),
    ("unshare", libc::SYS_unshare),
    ("name_to_handle_at", libc::SYS_name_to_handle_at),
    ("open_by_handle_at", libc::SYS_open_by_handle_at),
    ("vhangup", libc::SYS_vhangup),
];

/// System calls that a thread which works on open files alone does not make, besides [`DENIED`].
pub const DENIED_TO_CLERKS: &[(&str, c_long)] = &[
    ("execve", libc::SYS_execve),
    ("execveat", libc::SYS_execveat),
    ("socket", libc::SYS_socket),
    ("connect", libc::SYS_connect),
    ("bind", libc::SYS_bind),
    ("listen", libc::SYS_listen),
    ("mount", libc::SYS_mount),
    ("umount2", libc::SYS_umount2),
    ("fsopen", libc::SYS_fsopen),
    ("fsmount", libc::SYS_fsmount),
    ("move_mount", libc::SYS_move_mount),
    ("open_tree", libc::SYS_open_tree),
    ("mount_setattr", libc::SYS_mount_setattr),
    ("setuid", libc::SYS_setuid),
    ("setgid", libc::SYS_setgid),
    ("capset", libc::SYS_capset),
];

/// Gives up what the daemon does not need. Call it while the process has one thread. Each step that the system refuses is
/// returned with its reason, and the others are made.
#[must_use]
pub fn give_up() -> Vec<(&'static str, io::Error)> {
    let mut refused = Vec::new();
    let mut step = |name: &'static str, result: io::Result<()>| {
        if let Err(error) = result {
            refused.push((name, error));
        }
    };
    step("no_new_privs", set_no_new_privs(true).map_err(Into::into));
    step("capabilities", drop_capabilities());
    step("seccomp filter", install(DENIED));
    refused
}

/// Takes from the calling thread what a thread that works on open files alone does not need; threads that it starts inherit
/// that. A kernel without seccomp is no error: the thread then has the rights of its process.
pub fn become_clerk() {
    let done =
        set_no_new_privs(true).map_err(io::Error::from).and_then(|()| install(DENIED_TO_CLERKS));
    if let Err(error) = done {
        CLERKS_REFUSED.get_or_init(|| error.to_string());
    }
}

/// The reason why [`become_clerk`] had no effect, if it had none.
#[must_use]
pub fn clerks_refused() -> Option<&'static str> {
    CLERKS_REFUSED.get().map(String::as_str)
}

static CLERKS_REFUSED: OnceLock<String> = OnceLock::new();

fn drop_capabilities() -> io::Result<()> {
    let needed =
        NEEDED.iter().fold(CapabilitySet::empty(), |all, (capability, _)| all | *capability);
    let mut sets = capabilities(None)?;
    // Known to this kernel or not: an unknown one is refused, and is in no set.
    for bit in (0..u64::BITS).map(|number| CapabilitySet::from_bits_retain(1 << number)) {
        if !needed.contains(bit) {
            let _ = remove_capability_from_bounding_set(bit);
        }
    }
    sets.permitted &= needed;
    sets.effective &= needed;
    sets.inheritable = CapabilitySet::empty();
    Ok(set_capabilities(None, sets)?)
}

/// Refuses these calls to the calling thread with EPERM.
fn install(denied: &[(&str, c_long)]) -> io::Result<()> {
    let program = filter(denied).map_err(io::Error::other)?;
    seccompiler::apply_filter(&program).map_err(io::Error::other)
}

fn filter(denied: &[(&str, c_long)]) -> Result<BpfProgram, seccompiler::BackendError> {
    // No rule: the number of the call alone decides.
    let rules: BTreeMap<i64, _> =
        denied.iter().map(|(_, number)| (i64::from(*number), Vec::new())).collect();
    let refuse = SeccompAction::Errno(libc::EPERM as u32);
    let arch: TargetArch = std::env::consts::ARCH.try_into()?;
    SeccompFilter::new(rules, SeccompAction::Allow, refuse, arch)?.try_into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_that_has_given_up_rights_has_none_of_the_denied_calls_and_works() {
        std::thread::spawn(|| {
            let refused = give_up();
            assert!(refused.is_empty(), "{refused:?}");
            become_clerk();
            assert_eq!(clerks_refused(), None);
            assert!(rustix::thread::no_new_privs().unwrap());
            let kept = capabilities(None).unwrap().permitted;
            let needed = NEEDED.iter().fold(CapabilitySet::empty(), |all, (one, _)| all | *one);
            assert!(needed.contains(kept), "{kept:?}");
            assert!(std::process::Command::new("true").status().is_err(), "it started a program");
            assert!(std::net::UdpSocket::bind("127.0.0.1:0").is_err(), "it opened a socket");
            let chrooted = rustix::process::chroot("/");
            assert_eq!(chrooted, Err(rustix::io::Errno::PERM));
            assert!(std::fs::read("/proc/self/status").is_ok());
        })
        .join()
        .unwrap();
    }
}
