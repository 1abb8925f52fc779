//! The loop device over the FUSE file.
//!
//! `unsafe` is needed for `ioctl(2)`: the kernel reads a structure through a pointer, so its layout
//! must be that of `linux/loop.h`, and its type must belong to the request. All calls are in
//! [`control`].
#![allow(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::{LoopedError, step};

const LOOP_CLR_FD: u64 = 0x4C01;
const LOOP_GET_STATUS64: u64 = 0x4C05;
const LOOP_CONFIGURE: u64 = 0x4C0A; // Linux 5.8
const LOOP_CTL_GET_FREE: u64 = 0x4C82;

const LO_FLAGS_READ_ONLY: u32 = 1;
/// Flag: the loop device goes away when its last user closes it: this process, unless it is mounted.
const LO_FLAGS_AUTOCLEAR: u32 = 4;
/// Flag: direct I/O; the kernel drops it without an error if the file does not support it.
const LO_FLAGS_DIRECT_IO: u32 = 16;

/// `struct loop_info64` of `linux/loop.h`.
#[repr(C)]
struct Info {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    sizelimit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

impl Info {
    const EMPTY: Self = Self {
        device: 0,
        inode: 0,
        rdevice: 0,
        offset: 0,
        sizelimit: 0,
        number: 0,
        encrypt_type: 0,
        encrypt_key_size: 0,
        flags: 0,
        file_name: [0; 64],
        crypt_name: [0; 64],
        encrypt_key: [0; 32],
        init: [0; 2],
    };
}

/// `struct loop_config` of `linux/loop.h`.
#[repr(C)]
struct LoopConfig {
    fd: u32,
    block_size: u32,
    info: Info,
    reserved: [u64; 8],
}

/// Number of times that another program may take the loop device that was reported as free.
const ATTEMPTS: u32 = 64;

/// Time that a detached device may take to go away: the kernel removes it in the background after its last
/// user closes it; udev opens new and changed devices for a moment.
const GONE: Duration = Duration::from_secs(5);

/// A loop device, held open.
pub(super) struct LoopDevice {
    path: PathBuf,
    node: File,
}

/// The argument of a loop `ioctl`.
enum Argument<'a> {
    None,
    Config(&'a LoopConfig),
    Status(&'a mut Info),
}

fn control(file: &File, request: u64, argument: &mut Argument<'_>) -> io::Result<u32> {
    let pointer: *mut libc::c_void = match argument {
        Argument::None => std::ptr::null_mut(),
        Argument::Config(config) => std::ptr::from_ref::<LoopConfig>(config).cast_mut().cast(),
        Argument::Status(info) => std::ptr::from_mut::<Info>(info).cast(),
    };
    // SAFETY: LOOP_CTL_GET_FREE and LOOP_CLR_FD take no argument. LOOP_CONFIGURE reads a `struct
    // loop_config`, whose layout `LoopConfig` has (asserted in a test), from a reference that lives until the
    // call returns, and does not write to it. LOOP_GET_STATUS64 writes a `struct loop_info64`, whose layout `Info` has
    // (asserted too), and which is made of numbers alone, to a unique reference that lives as long.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), request as _, pointer) };
    u32::try_from(result).map_err(|_| io::Error::last_os_error())
}

impl LoopDevice {
    /// Sets up a free loop device over `backing`, shown in sysfs and by `losetup` as `name`.
    pub(super) fn attach(backing: &File, name: &Path, writable: bool) -> Result<Self, LoopedError> {
        let control_path = Path::new("/dev/loop-control");
        let controller = OpenOptions::new().read(true).write(true).open(control_path);
        let controller = controller.map_err(step("open", control_path))?;
        for _ in 0..ATTEMPTS {
            let number = control(&controller, LOOP_CTL_GET_FREE, &mut Argument::None)
                .map_err(step("find a free loop device through", control_path))?;
            let path = PathBuf::from(format!("/dev/loop{number}"));
            let node = match open_node(&path, writable) {
                Ok(node) => node,
                // Taken and removed in the meantime.
                Err(error) if error.raw_os_error() == Some(libc::ENXIO) => continue,
                Err(error) => return Err(step("open", &path)(error)),
            };
            match control(
                &node,
                LOOP_CONFIGURE,
                &mut Argument::Config(&config(backing, name, writable)),
            ) {
                Ok(_) => {
                    // Twice the largest FUSE read, as on a ublk device; a failure is harmless.
                    let _ = std::fs::write(
                        format!("/sys/block/loop{number}/queue/read_ahead_kb"),
                        "512",
                    );
                    return Ok(Self { path, node });
                }
                // Another program was faster.
                Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {}
                Err(error) => return Err(step("configure", &path)(error)),
            }
        }
        Err(LoopedError::NoFreeDevice(ATTEMPTS))
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    fn sysfs(&self) -> PathBuf {
        Path::new("/sys/block").join(self.path.file_name().unwrap_or_default()).join("loop")
    }

    /// True if the kernel accepted direct I/O.
    pub(super) fn reads_direct(&self) -> bool {
        std::fs::read_to_string(self.sysfs().join("dio")).is_ok_and(|dio| dio.trim() == "1")
    }

    /// Gives the device up if this process alone has it open: then it goes away at the last close, and takes no new users.
    /// `LOOP_CLR_FD` does nothing on a device that others have open, and answers `ENXIO` on one that is given up.
    pub(super) fn give_up(&self) -> Result<(), LoopedError> {
        for _ in 0..2 {
            match control(&self.node, LOOP_CLR_FD, &mut Argument::None) {
                Ok(_) => {}
                Err(error) if error.raw_os_error() == Some(libc::ENXIO) => return Ok(()),
                Err(error) => return Err(step("detach", &self.path)(error)),
            }
        }
        Err(LoopedError::Busy { path: self.path.clone() })
    }

    /// Detaches the file and waits until the kernel has released it.
    pub(super) fn detach(self) -> Result<(), LoopedError> {
        let sysfs = self.sysfs();
        let sequence = || std::fs::read_to_string(sysfs.with_file_name("diskseq")).ok();
        let ours = sequence();
        let Self { path, node } = self;
        match control(&node, LOOP_CLR_FD, &mut Argument::None) {
            Err(error) if error.raw_os_error() != Some(libc::ENXIO) => {
                return Err(step("detach", &path)(error));
            }
            _ => {}
        }
        // The last close detaches.
        drop(node);
        let until = Instant::now() + GONE;
        // Another program may use the device number at once: sysfs then shows another sequence number (since
        // 5.15).
        while sysfs.exists() && sequence() == ours {
            if Instant::now() >= until {
                return Err(LoopedError::Busy { path });
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(())
    }
}

/// The name that a loop device was given, at most its last 63 bytes.
pub(super) fn name_of(node: &File) -> io::Result<String> {
    let mut info = Info::EMPTY;
    control(node, LOOP_GET_STATUS64, &mut Argument::Status(&mut info))?;
    let end = info.file_name.iter().position(|&byte| byte == 0).unwrap_or(info.file_name.len());
    Ok(String::from_utf8_lossy(&info.file_name[..end]).into_owned())
}

/// Opens the node of a loop device that may just have been created: in a container without devtmpfs it
/// appears late or never.
fn open_node(path: &Path, writable: bool) -> io::Result<File> {
    let until = Instant::now() + GONE;
    loop {
        match OpenOptions::new()
            .read(true)
            .write(writable) // otherwise the kernel makes it read-only, whatever the flags are
            .custom_flags(libc::O_CLOEXEC)
            .open(path)
        {
            Err(error) if error.kind() == io::ErrorKind::NotFound && Instant::now() < until => {
                std::thread::sleep(Duration::from_millis(2));
            }
            result => return result,
        }
    }
}

fn config(backing: &File, name: &Path, writable: bool) -> LoopConfig {
    let read_only = if writable { 0 } else { LO_FLAGS_READ_ONLY };
    let mut file_name = [0; 64];
    // Of a long name the end: it tells the device from those of other programs.
    let bytes = name.as_os_str().as_encoded_bytes();
    let shown = &bytes[bytes.len().saturating_sub(63)..];
    file_name[..shown.len()].copy_from_slice(shown);
    LoopConfig {
        fd: backing.as_raw_fd() as u32,
        block_size: 512,
        info: Info {
            flags: read_only | LO_FLAGS_AUTOCLEAR | LO_FLAGS_DIRECT_IO,
            file_name,
            ..Info::EMPTY
        },
        reserved: [0; 8],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_structures_have_the_kernels_layout() {
        assert_eq!(size_of::<Info>(), 232);
        assert_eq!(size_of::<LoopConfig>(), 304);
        assert_eq!(std::mem::offset_of!(Info, flags), 52);
        assert_eq!(std::mem::offset_of!(LoopConfig, info), 8);
    }
}
