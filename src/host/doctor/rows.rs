//! From facts to rows: pure, so that hosts which are not available can be tested.

use super::kernel::{DeviceNode, Facts};
use super::{FactState, Report, Row};
use frontends::ublk::probe::{DriverPresence, RingSupport, feature_names};

/// Feature bits that this program uses, and the loss without them.
const NEED_GET_DATA: u64 = 1 << 2;

pub(super) fn report(facts: &Facts) -> Report {
    // With root, the module is loaded when it is needed.
    let driver = match facts.ublk.driver {
        DriverPresence::Present => facts.control == DeviceNode::Opens,
        DriverPresence::Loadable => facts.sys_admin,
        DriverPresence::Absent => false,
    };
    let usable = |node: DeviceNode| {
        node == DeviceNode::Opens || (node == DeviceNode::Loadable && facts.sys_admin)
    };
    let ublk = driver
        && facts.sys_admin
        && facts.ublk.ring == RingSupport::Works
        && facts.ublk.known_bad.is_none()
        && facts.ublk.features.is_none_or(|mask| mask & NEED_GET_DATA != 0);
    let looped = usable(facts.fuse) && usable(facts.loop_control) && facts.sys_admin;
    let rows = vec![
        kernel(facts, looped),
        privileges(facts),
        driver_row(facts, looped),
        features(facts),
        devices(facts),
        ring(facts, looped),
        node("FUSE", facts.fuse, "/dev/fuse", "fuse", ublk),
        node("loop", facts.loop_control, "/dev/loop-control", "loop", ublk),
        ext4(facts),
        memlock(facts),
        namespace(facts),
    ];
    Report { rows, ublk, looped }
}

/// A fact that rules out one front end is a failure only if the other does not work either.
fn unless(other: bool) -> FactState {
    if other { FactState::Warn } else { FactState::Fail }
}

fn kernel(facts: &Facts, looped: bool) -> Row {
    match facts.ublk.known_bad {
        Some(reason) => Row::new(
            "kernel",
            unless(looped),
            format!("{}: known bad for ublk: {reason}", facts.ublk.kernel),
            "boot another kernel; until then turbobd uses the loop front end",
        ),
        None => Row::new("kernel", FactState::Ok, facts.ublk.kernel.clone(), ""),
    }
}

fn privileges(facts: &Facts) -> Row {
    let state = if facts.sys_admin { FactState::Ok } else { FactState::Fail };
    let detail = if facts.sys_admin {
        "CAP_SYS_ADMIN is effective"
    } else {
        "CAP_SYS_ADMIN is missing: no device, no mount"
    };
    Row::new(
        "privileges",
        state,
        detail,
        "run as root (the rows below may be wrong without root rights)",
    )
}

fn driver_row(facts: &Facts, looped: bool) -> Row {
    let what = "ublk driver";
    match (facts.ublk.driver, facts.control) {
        (DriverPresence::Present, DeviceNode::Opens) => {
            Row::new(what, FactState::Ok, "/dev/ublk-control opens", "")
        }
        (DriverPresence::Present, _) => Row::new(
            what,
            unless(looped),
            "/dev/ublk-control does not open",
            "run as root; in a container, allow the device",
        ),
        (DriverPresence::Loadable, _) => Row::new(
            what,
            FactState::Warn,
            "the module ublk_drv is not loaded",
            "modprobe ublk_drv (attach does it too)",
        ),
        (DriverPresence::Absent, _) => Row::new(
            what,
            unless(looped),
            "neither /dev/ublk-control nor a module ublk_drv",
            "a kernel with CONFIG_BLK_DEV_UBLK, such as Debian's 6.12 (for Debian 12: in bookworm-security)",
        ),
    }
}

fn features(facts: &Facts) -> Row {
    let what = "ublk features";
    match facts.ublk.features {
        Some(mask) => {
            let state = if mask & NEED_GET_DATA == 0 { FactState::Fail } else { FactState::Ok };
            let detail = format!("{mask:#x}: {}", feature_names(mask).join(", "));
            Row::new(
                what,
                state,
                detail,
                "need-get-data is missing: without it stray writes reach the cache; use --frontend loop",
            )
        }
        None if facts.ublk.driver == DriverPresence::Present => Row::new(
            what,
            FactState::Warn,
            "not told",
            "the kernel is older than 6.5, or this is not root: only 6.1's features are used",
        ),
        None => Row::new(what, FactState::Ok, "no driver to ask", ""),
    }
}

fn devices(facts: &Facts) -> Row {
    let what = "ublk devices";
    match facts.ublk.ublks_max {
        Some(most) => Row::new(
            what,
            FactState::Ok,
            format!(
                "ublks_max={most}: counts all devices until 6.14, only unprivileged ones from 6.15"
            ),
            "",
        ),
        None => Row::new(what, FactState::Ok, "no limit known", ""),
    }
}

fn ring(facts: &Facts, looped: bool) -> Row {
    let what = "io_uring";
    let disabled = facts.ublk.io_uring_disabled;
    match &facts.ublk.ring {
        RingSupport::Works => {
            let sysctl = disabled
                .map_or_else(String::new, |value| format!(" (kernel.io_uring_disabled={value})"));
            Row::new(what, FactState::Ok, format!("rings with driver commands{sysctl}"), "")
        }
        RingSupport::NoDriverCommands => Row::new(
            what,
            unless(looped),
            "rings without driver commands",
            "Linux 5.19 or newer (ublk: 6.0)",
        ),
        RingSupport::Refused(why) => {
            let remedy = match disabled {
                Some(1 | 2) => "sysctl kernel.io_uring_disabled=0",
                _ => "look for a seccomp profile or an LSM that denies io_uring_setup",
            };
            Row::new(what, unless(looped), format!("refused: {why}"), remedy)
        }
    }
}

fn node(what: &'static str, node: DeviceNode, path: &str, module: &str, ublk: bool) -> Row {
    match node {
        DeviceNode::Opens => Row::new(what, FactState::Ok, format!("{path} opens"), ""),
        DeviceNode::Refused => Row::new(
            what,
            unless(ublk),
            format!("{path} does not open"),
            "run as root; in a container, allow the device",
        ),
        DeviceNode::Loadable => Row::new(
            what,
            FactState::Warn,
            format!("{path} is missing"),
            format!("modprobe {module}"),
        ),
        DeviceNode::Absent => Row::new(
            what,
            unless(ublk),
            format!("{path} is missing"),
            format!("a kernel with the module {module}"),
        ),
    }
}

fn ext4(facts: &Facts) -> Row {
    match facts.ext4 {
        DeviceNode::Opens => Row::new("ext4", FactState::Ok, "known to the kernel", ""),
        DeviceNode::Loadable => {
            Row::new("ext4", FactState::Ok, "a module, loaded by the first mount", "")
        }
        _ => Row::new(
            "ext4",
            FactState::Fail,
            "unknown to the kernel: devices work, mounts do not",
            "a kernel with CONFIG_EXT4_FS",
        ),
    }
}

fn memlock(facts: &Facts) -> Row {
    let what = "locked memory";
    match facts.memlock {
        _ if facts.ipc_lock => Row::new(what, FactState::Ok, "CAP_IPC_LOCK: no limit", ""),
        None => Row::new(what, FactState::Ok, "no limit", ""),
        Some(bytes) => {
            let state = if bytes < 64 << 20 { FactState::Warn } else { FactState::Ok };
            Row::new(
                what,
                state,
                format!("{} MiB", bytes >> 20),
                "ulimit -l unlimited, or LimitMEMLOCK=infinity in the unit: metadata may be paged out under pressure",
            )
        }
    }
}

fn namespace(facts: &Facts) -> Row {
    let what = "mount namespace";
    match facts.first_namespace {
        Some(true) => Row::new(what, FactState::Ok, "the host's", ""),
        Some(false) => Row::new(
            what,
            FactState::Warn,
            "not that of process 1",
            "mounts of attach are visible in this namespace only; nsenter -t 1 -m for the host's",
        ),
        None => Row::new(
            what,
            FactState::Warn,
            "cannot be compared with that of process 1",
            "run as root",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use frontends::ublk::probe::{Findings, known_bad};

    /// A host with everything, with the facts of Debian's 7.3.
    fn good() -> Facts {
        Facts {
            ublk: Findings {
                kernel: "7.3.4".into(),
                known_bad: None,
                driver: DriverPresence::Present,
                features: Some(0x1f_ffff),
                ublks_max: Some(64),
                ring: RingSupport::Works,
                io_uring_disabled: Some(0),
            },
            control: DeviceNode::Opens,
            fuse: DeviceNode::Opens,
            loop_control: DeviceNode::Opens,
            sys_admin: true,
            ipc_lock: true,
            memlock: Some(8 << 20),
            ext4: DeviceNode::Opens,
            first_namespace: Some(true),
        }
    }

    fn state(report: &Report, what: &str) -> FactState {
        report.rows.iter().find(|row| row.what == what).unwrap().state
    }

    #[test]
    fn a_host_with_everything_has_no_remedy_to_offer() {
        let report = report(&good());
        assert!(report.rows.iter().all(|row| row.state == FactState::Ok && row.remedy.is_empty()));
        assert!(report.ublk && report.looped && report.exit_status() == 0);
    }

    #[test]
    fn without_ublk_loop_is_enough_and_without_both_it_fails() {
        let mut facts = good();
        facts.ublk.driver = DriverPresence::Absent;
        facts.ublk.features = None;
        facts.control = DeviceNode::Absent;
        let found = report(&facts);
        assert!(!found.ublk && found.looped && found.exit_status() == 0);
        assert_eq!(state(&found, "ublk driver"), FactState::Warn);
        assert!(found.to_string().contains("bookworm-security"));
        facts.fuse = DeviceNode::Absent;
        let found = report(&facts);
        assert_eq!(
            (found.exit_status(), state(&found, "ublk driver"), state(&found, "FUSE")),
            (1, FactState::Fail, FactState::Fail)
        );
    }

    #[test]
    fn a_kernel_that_crashes_is_never_called_fit_for_ublk() {
        let mut facts = good();
        facts.ublk.kernel = "6.18.4".into();
        facts.ublk.known_bad = known_bad("6.18.4");
        let found = report(&facts);
        assert!(!found.ublk && found.looped);
        assert_eq!(state(&found, "kernel"), FactState::Warn);
    }

    #[test]
    fn a_closed_io_uring_names_the_switch_that_closed_it() {
        let mut facts = good();
        facts.ublk.ring = RingSupport::Refused("Operation not permitted".into());
        facts.ublk.io_uring_disabled = Some(2);
        let found = report(&facts);
        assert!(!found.ublk && found.to_string().contains("sysctl kernel.io_uring_disabled=0"));
    }

    #[test]
    fn without_privileges_nothing_can_be_served() {
        let mut facts = good();
        facts.sys_admin = false;
        assert_eq!(report(&facts).exit_status(), 1);
    }

    #[test]
    fn this_host_gets_a_whole_report() {
        let report = super::super::examine();
        assert_eq!(report.rows.len(), 11);
        let json = serde_json::to_value(&report).unwrap();
        assert_eq!(json["rows"].as_array().unwrap().len(), 11);
        assert!(["ok", "warn", "fail"].contains(&json["rows"][0]["state"].as_str().unwrap()));
    }
}
