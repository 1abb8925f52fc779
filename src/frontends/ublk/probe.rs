//! Features of this kernel's ublk, found without creating a device.
//!
//! Some kernels crash on the first `ADD_DEV`, so the release string is checked before any command but the
//! query of features.

use std::path::Path;
use std::process::{Command, Stdio};

use super::UblkError;

/// The driver's control node.
pub const CONTROL: &str = "/dev/ublk-control";

/// Feature bits by number, as in the kernel's `ublk_cmd.h` (7.3).
const FEATURES: [&str; 21] = [
    "zero-copy",
    "complete-in-task",
    "need-get-data",
    "user-recovery",
    "recovery-reissue",
    "unprivileged",
    "ioctl-encode",
    "user-copy",
    "zoned",
    "recovery-fail-io",
    "update-size",
    "auto-buffer",
    "quiesce",
    "per-io-daemon",
    "register-off-daemon",
    "batch-io",
    "integrity",
    "safe-stop",
    "no-partition-scan",
    "shared-memory",
    "descriptor-size",
];

/// Names of the bits set in a feature mask; a bit that this program does not know is `bit-N`.
#[must_use]
pub fn feature_names(mask: u64) -> Vec<String> {
    (0..64)
        .filter(|bit| mask >> bit & 1 == 1)
        .map(|bit: usize| {
            FEATURES.get(bit).map_or_else(|| format!("bit-{bit}"), |name| (*name).into())
        })
        .collect()
}

/// The reason why a kernel must not be used with ublk, or `None`.
///
/// A change of NUMA allocation was backported into 6.18.4 and some Ubuntu 6.17 cloud kernels without
/// the reordering it needs: the first `ADD_DEV` oopses and never releases the driver's lock. Fixed in
/// 6.18.6. Seen in public reports for 6.18.4, 6.18.5, 6.17.0-1015-azure, -1018-azure, -1017-aws;
/// builds 1015 to 1018 of the cloud flavours are refused together.
#[must_use]
pub fn known_bad(release: &str) -> Option<&'static str> {
    const OOPS: &str =
        "ADD_DEV oopses (fixed in 6.18.6); boot another kernel, or use the loop front end";
    let numbers: Vec<&str> = release.split(['.', '-', '+']).collect();
    match numbers.as_slice() {
        ["6", "18", "4" | "5", ..] => Some(OOPS),
        ["6", "17", "0", "1015" | "1016" | "1017" | "1018", flavour, ..]
            if ["aws", "azure", "gcp", "oracle"].contains(flavour) =>
        {
            Some(OOPS)
        }
        _ => None,
    }
}

/// `uname -r`.
#[must_use]
pub fn kernel_release() -> String {
    rustix::system::uname().release().to_string_lossy().into_owned()
}

/// Availability of the driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DriverPresence {
    /// The control node exists.
    Present,
    /// A module can be loaded: `modprobe ublk_drv`.
    Loadable,
    /// There is neither a node nor a module.
    Absent,
}

/// Availability of the ring that ublk needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RingSupport {
    /// A ring was created, with driver commands.
    Works,
    /// Rings work, but have no driver commands (before 5.19).
    NoDriverCommands,
    /// The kernel refused, with this reason.
    Refused(String),
}

/// Result of [`examine`].
#[derive(Clone, Debug)]
pub struct Findings {
    /// `uname -r`.
    pub kernel: String,
    /// The reason why this kernel must not be used.
    pub known_bad: Option<&'static str>,
    /// Availability of the driver.
    pub driver: DriverPresence,
    /// The driver's feature mask; `None` if it was not asked or did not answer (before 6.5, no root).
    pub features: Option<u64>,
    /// Module parameter `ublks_max`: limit on the devices of the host (until 6.14), or on the unprivileged
    /// ones.
    pub ublks_max: Option<u64>,
    /// Availability of `io_uring` for this process.
    pub ring: RingSupport,
    /// `kernel.io_uring_disabled` (6.6+): 0 free, 1 restricted to a group, 2 off.
    pub io_uring_disabled: Option<u64>,
}

impl Findings {
    /// Decides if a device may be created.
    ///
    /// # Errors
    /// Returns the first reason against it.
    pub fn verdict(&self) -> Result<(), UblkError> {
        if let Some(reason) = self.known_bad {
            return Err(UblkError::KnownBadKernel { kernel: self.kernel.clone(), reason });
        }
        let unavailable =
            |reason: String| Err(UblkError::Unavailable { kernel: self.kernel.clone(), reason });
        match &self.ring {
            RingSupport::Works => {}
            RingSupport::NoDriverCommands => {
                return unavailable("its io_uring has no driver commands".into());
            }
            RingSupport::Refused(why) => {
                return unavailable(format!("io_uring cannot be used ({why})"));
            }
        }
        match self.driver {
            DriverPresence::Present => Ok(()),
            DriverPresence::Loadable => {
                unavailable("the module ublk_drv is not loaded (modprobe ublk_drv)".into())
            }
            DriverPresence::Absent => {
                unavailable("there is neither /dev/ublk-control nor a module ublk_drv".into())
            }
        }
    }
}

/// Examines the system, and changes nothing.
#[must_use]
pub fn examine() -> Findings {
    let kernel = kernel_release();
    let known_bad = known_bad(&kernel);
    let driver = driver();
    let ring = ring();
    let features =
        (driver == DriverPresence::Present && ring == RingSupport::Works && known_bad.is_none())
            .then(features)
            .flatten();
    let number = |path: &str| std::fs::read_to_string(path).ok()?.trim().parse().ok();
    Findings {
        kernel,
        known_bad,
        driver,
        features,
        ublks_max: number("/sys/module/ublk_drv/parameters/ublks_max"),
        ring,
        io_uring_disabled: number("/proc/sys/kernel/io_uring_disabled"),
    }
}

/// Loads the module if the control node is missing and the module is there. A process that gives up its rights calls this before.
pub fn load() {
    let kernel = kernel_release();
    // The list of modules is read because it takes a fraction of the time of a modprobe that finds nothing.
    let list = format!("/lib/modules/{kernel}/modules.dep");
    let is_listed = || {
        std::fs::read(&list).is_ok_and(|list| String::from_utf8_lossy(&list).contains("ublk_drv"))
    };
    if !Path::new(CONTROL).exists() && known_bad(&kernel).is_none() && is_listed() {
        modprobe(&[]);
    }
}

/// Loads the module if the control node is missing, then examines the system like [`examine`].
#[must_use]
pub fn examine_and_load() -> Findings {
    let findings = examine();
    if findings.driver != DriverPresence::Loadable || findings.known_bad.is_some() || !modprobe(&[])
    {
        return findings;
    }
    examine()
}

fn driver() -> DriverPresence {
    if Path::new(CONTROL).exists() {
        DriverPresence::Present
    } else if modprobe(&["--dry-run"]) {
        DriverPresence::Loadable
    } else {
        DriverPresence::Absent
    }
}

fn modprobe(options: &[&str]) -> bool {
    Command::new("modprobe")
        .args(options)
        .args(["--quiet", "ublk_drv"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
}

fn ring() -> RingSupport {
    let ring = match io_uring::IoUring::new(2) {
        Ok(ring) => ring,
        Err(error) => return RingSupport::Refused(error.to_string()),
    };
    let mut probe = io_uring::Probe::new();
    if ring.submitter().register_probe(&mut probe).is_ok()
        && !probe.is_supported(io_uring::opcode::UringCmd16::CODE)
    {
        return RingSupport::NoDriverCommands;
    }
    RingSupport::Works
}

/// Asks the driver on a thread of its own: libublk keeps its control ring for the life of the thread.
fn features() -> Option<u64> {
    std::thread::Builder::new()
        .name("ublk-probe".into())
        .spawn(libublk::ctrl::UblkCtrl::get_features)
        .ok()?
        .join()
        .ok()?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_that_crash_are_refused_and_their_neighbours_are_not() {
        for bad in [
            "6.18.4",
            "6.18.5-arch1-1",
            "6.17.0-1015-azure",
            "6.17.0-1018-azure",
            "6.17.0-1017-aws",
        ] {
            assert!(known_bad(bad).is_some(), "{bad}");
        }
        for good in [
            "6.18.44",
            "6.18.6",
            "6.18.44-fc-v669",
            "6.17.0-1019-azure",
            "6.17.0-15-generic",
            "6.1.0-56-amd64",
            "7.3.4",
            "6.12.117+deb12-amd64",
            "6.18",
            "",
        ] {
            assert!(known_bad(good).is_none(), "{good}");
        }
    }

    #[test]
    fn feature_masks_of_real_kernels_have_names() {
        // Debian's 6.12 reports 0x1fe, Debian's 7.3 0x1fffff.
        assert_eq!(feature_names(0x1fe).len(), 8);
        assert_eq!(feature_names(0x1f_ffff).last().map(String::as_str), Some("descriptor-size"));
        assert_eq!(feature_names(1 << 33), ["bit-33"]);
    }

    #[test]
    fn a_bad_kernel_is_named_before_anything_else() {
        let findings = Findings {
            kernel: "6.18.4".into(),
            known_bad: known_bad("6.18.4"),
            driver: DriverPresence::Absent,
            features: None,
            ublks_max: None,
            ring: RingSupport::Refused("no".into()),
            io_uring_disabled: Some(2),
        };
        assert!(matches!(findings.verdict(), Err(UblkError::KnownBadKernel { .. })));
    }
}
