//! Features that are requested from a kernel's ublk, by those that it offers.
//!
//! | kernel | offers | used |
//! |---|---|---|
//! | 6.1 | no list of features | the flags every driver knows; commands by number |
//! | 6.5 | `GET_FEATURES` | as offered |
//! | 6.6 | `DEL_DEV_ASYNC` | a deletion does not wait for other users of the node |
//! | 7.0 | `NO_AUTO_PART_SCAN` | no reads of the partition scan, and no wait for them at the start |
//!
//! `NEED_GET_DATA` is always required: without it a stray write would be copied to the address of the tag's
//! last commit, that is, into the cache. A device that [survives](super::recovery) its server needs `USER_RECOVERY` and
//! `USER_RECOVERY_REISSUE`; drivers clear flags that they do not know, so the flags that they return are compared.
//! Features that are not requested: user copy and the zero copy modes,
//! which turn the copy at commit time off; batches of commands (7.0), which do not support `NEED_GET_DATA`.

use libublk::sys;

use super::UblkError;

/// Flags of a device that survives its server: the kernel keeps it and its requests, and asks the next server again for those
/// that were in flight.
const SURVIVAL: u64 = (sys::UBLK_F_USER_RECOVERY | sys::UBLK_F_USER_RECOVERY_REISSUE) as u64;

/// Flags for `ADD_DEV`, where the driver lists `offered`; `None` before it could (6.5). With `survives`, those of a device that
/// survives its server.
pub(super) fn wanted(offered: Option<u64>, survives: bool) -> u64 {
    let needed = u64::from(sys::UBLK_F_NEED_GET_DATA) | if survives { SURVIVAL } else { 0 };
    let helpful = u64::from(sys::UBLK_F_CMD_IOCTL_ENCODE | sys::UBLK_F_NO_AUTO_PART_SCAN);
    needed | offered.map_or(0, |offered| offered & helpful)
}

/// True if a device with the driver's `flags` survives its server.
pub(super) fn survives(flags: u64) -> bool {
    flags & SURVIVAL == SURVIVAL
}

/// Checks that a device with the driver's `flags` may be used.
///
/// # Errors
/// Returns [`UblkError::Control`] when the driver removed a required flag.
pub(super) fn check(flags: u64) -> Result<(), UblkError> {
    if flags & u64::from(sys::UBLK_F_NEED_GET_DATA) != 0 {
        return Ok(());
    }
    let source = std::io::Error::from_raw_os_error(libc::EOPNOTSUPP);
    Err(UblkError::Control { what: "announce writes (UBLK_F_NEED_GET_DATA)", source })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Masks as the drivers of these kernels report them.
    #[test]
    fn each_kernel_is_asked_for_what_it_has() {
        let need = u64::from(sys::UBLK_F_NEED_GET_DATA);
        let encode = u64::from(sys::UBLK_F_CMD_IOCTL_ENCODE);
        let no_scan = u64::from(sys::UBLK_F_NO_AUTO_PART_SCAN);
        for (kernel, offered, flags) in [
            ("6.1", None, need),
            ("6.12", Some(0x1fe), need | encode),
            ("6.16", Some(0x3fff), need | encode),
            ("7.3", Some(0x1f_ffff), need | encode | no_scan),
        ] {
            assert_eq!(wanted(offered, false), flags, "{kernel}");
            assert_eq!(wanted(offered, true), flags | 0x18, "{kernel}");
            assert!(survives(wanted(offered, true)) && !survives(flags) && !survives(flags | 8));
            assert!(check(flags).is_ok());
        }
        assert!(check(encode).is_err());
    }
}
