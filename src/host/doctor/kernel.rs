//! The facts, as this host's kernel reports them.

use std::path::Path;
use std::process::{Command, Stdio};

use rustix::process::{Resource, getrlimit};

use frontends::ublk::probe::{self, Findings};

/// Availability of a device node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum DeviceNode {
    /// It opens.
    Opens,
    /// It exists and does not open.
    Refused,
    /// It does not exist, but its module can be loaded.
    Loadable,
    /// There is neither a node nor a module.
    Absent,
}

/// Facts from which the rows are made.
#[derive(Clone, Debug)]
pub(super) struct Facts {
    pub(super) ublk: Findings,
    pub(super) control: DeviceNode,
    pub(super) fuse: DeviceNode,
    pub(super) loop_control: DeviceNode,
    /// `CAP_SYS_ADMIN` is effective.
    pub(super) sys_admin: bool,
    /// Effective `CAP_IPC_LOCK`: no limit on locked memory.
    pub(super) ipc_lock: bool,
    /// Soft limit on locked memory in bytes; `None`: no limit.
    pub(super) memlock: Option<u64>,
    /// ext4 is supported, or its module can be loaded.
    pub(super) ext4: DeviceNode,
    /// True if this process is in the mount namespace of process 1; `None`: it may not look.
    pub(super) first_namespace: Option<bool>,
}

/// Capability numbers of `linux/capability.h`.
const CAP_IPC_LOCK: u32 = 14;
const CAP_SYS_ADMIN: u32 = 21;

impl Facts {
    pub(super) fn of_this_host() -> Self {
        let effective = effective_capabilities();
        let has = |capability: u32| effective >> capability & 1 == 1;
        let file_systems = std::fs::read_to_string("/proc/filesystems").unwrap_or_default();
        let ext4 =
            if file_systems.lines().any(|line| line.split_whitespace().last() == Some("ext4")) {
                DeviceNode::Opens
            } else if loadable("ext4") {
                DeviceNode::Loadable
            } else {
                DeviceNode::Absent
            };
        let namespace = |process: &str| std::fs::read_link(format!("/proc/{process}/ns/mnt")).ok();
        Self {
            ublk: probe::examine(),
            control: node(probe::CONTROL, "ublk_drv"),
            fuse: node("/dev/fuse", "fuse"),
            loop_control: node("/dev/loop-control", "loop"),
            sys_admin: has(CAP_SYS_ADMIN),
            ipc_lock: has(CAP_IPC_LOCK),
            memlock: getrlimit(Resource::Memlock).current,
            ext4,
            first_namespace: namespace("1")
                .zip(namespace("self"))
                .map(|(first, ours)| first == ours),
        }
    }
}

/// Effective capabilities, from `CapEff` of proc_pid_status(5).
fn effective_capabilities() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    line.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0)
}

fn node(path: &str, module: &str) -> DeviceNode {
    if std::fs::OpenOptions::new().read(true).write(true).open(path).is_ok() {
        DeviceNode::Opens
    } else if Path::new(path).exists() {
        // A static node may belong to a module that is loaded when it is opened, or to none.
        DeviceNode::Refused
    } else if loadable(module) {
        DeviceNode::Loadable
    } else {
        DeviceNode::Absent
    }
}

fn loadable(module: &str) -> bool {
    Command::new("modprobe")
        .args(["--dry-run", "--quiet", module])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
}
