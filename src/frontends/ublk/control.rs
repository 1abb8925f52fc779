//! Commands to the driver about a device: add, set up, start, stop, delete.
//!
//! A command is a 32-byte `ublksrv_ctrl_cmd` in a large submission entry on the control node, and may sleep;
//! the caller waits for it. Each [`Control`] has a ring of its own, so any thread may have one. A control with a time limit
//! gives up a command that sleeps for longer, and takes no other one after it.
//!
//! `unsafe` is needed to push an entry that points to the command's buffer. The buffer is dropped only after the
//! completion has been seen; that of a command that was given up is never dropped.
#![allow(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use io_uring::{IoUring, cqueue, opcode, squeue, types};
use libublk::sys;
use rustix::thread::CpuSet;

use super::{UblkError, probe};

/// Number of the kernel's device, and the driver's settings for it.
pub(super) type DeviceInfo = sys::ublksrv_ctrl_dev_info;

/// An open control node.
pub(super) struct Control {
    ring: IoUring<squeue::Entry128, cqueue::Entry>,
    node: File,
    /// Mask of the command numbers: kernels before 6.4 know only the short ones.
    mask: u32,
    /// Features that the driver offers; `None` before 6.5.
    features: Option<u64>,
    /// Longest time that a command may take; `None`: any.
    limit: Option<Duration>,
    /// True after a command that was given up: its completion may come at any time.
    stuck: bool,
}

impl Control {
    /// Opens the control node.
    ///
    /// # Errors
    /// Returns [`UblkError::Control`]: no root, no ring, no descriptors.
    pub(super) fn open() -> Result<Self, UblkError> {
        Self::with_limit(None)
    }

    /// Opens the control node; a command that takes longer than `limit` fails with [`io::ErrorKind::TimedOut`].
    ///
    /// # Errors
    /// Those of [`open`](Self::open).
    pub(super) fn with_limit(limit: Option<Duration>) -> Result<Self, UblkError> {
        let refused = |what| move |source| UblkError::Control { what, source };
        let node = OpenOptions::new().read(true).write(true).open(probe::CONTROL);
        let node = node.map_err(refused("open its control node"))?;
        let ring = IoUring::builder().build(4).map_err(refused("make a control ring"))?;
        let mut control = Self { ring, node, mask: u32::MAX, features: None, limit, stuck: false };
        let mut features = [0; 8];
        // Known from 6.5 on; since 6.4 the other commands have their long numbers.
        match control.command(sys::UBLK_U_CMD_GET_FEATURES, 0, 0, &mut features) {
            Ok(()) => control.features = Some(u64::from_ne_bytes(features)),
            Err(_) => control.mask = 0xff,
        }
        Ok(control)
    }

    /// Features that the driver offers; `None` before it could report them (6.5).
    pub(super) fn features(&self) -> Option<u64> {
        self.features
    }

    /// Adds a device like `info` and reads back the driver's settings. The kernel chooses the number.
    pub(super) fn add(&mut self, info: &mut DeviceInfo) -> Result<(), UblkError> {
        info.dev_id = u32::MAX;
        let mut bytes = [0; size_of::<DeviceInfo>()];
        put_info(&mut bytes, info);
        let command = sys::UBLK_U_CMD_ADD_DEV;
        self.queue_command(command, (u32::MAX, u16::MAX), 0, &mut bytes)
            .map_err(|source| UblkError::Control { what: "add a device", source })?;
        get_info(&bytes, info);
        Ok(())
    }

    /// Sets the parameters of a device that is not started yet.
    pub(super) fn set_params(
        &mut self,
        id: u32,
        params: &sys::ublk_params,
    ) -> Result<(), UblkError> {
        let mut bytes = [0; size_of::<sys::ublk_params>()];
        put_params(&mut bytes, params);
        self.ask("set its parameters", sys::UBLK_U_CMD_SET_PARAMS, id, 0, &mut bytes)
    }

    /// Starts a device with all its tags armed; returns when the kernel shows the disk.
    pub(super) fn start(&mut self, id: u32) -> Result<(), UblkError> {
        let pid = u64::from(std::process::id());
        self.ask("start the device", sys::UBLK_U_CMD_START_DEV, id, pid, &mut [])
    }

    /// Reads the driver's settings of a device and its state; `None`: there is no such device.
    pub(super) fn info(&mut self, id: u32) -> Result<Option<DeviceInfo>, UblkError> {
        let mut bytes = [0; size_of::<DeviceInfo>()];
        match self.command(sys::UBLK_U_CMD_GET_DEV_INFO, id, 0, &mut bytes) {
            Ok(()) => {
                let mut info = DeviceInfo::default();
                get_info(&bytes, &mut info);
                Ok(Some(info))
            }
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(None),
            Err(source) => Err(UblkError::Control { what: "tell its state", source }),
        }
    }

    /// Begins the recovery of a device whose server has gone. `EBUSY` as long as that one has not closed its node.
    pub(super) fn start_recovery(&mut self, id: u32) -> io::Result<()> {
        self.command(sys::UBLK_U_CMD_START_USER_RECOVERY, id, 0, &mut [])
    }

    /// Ends the recovery: waits until all tags are armed by this process; then the device is live.
    pub(super) fn end_recovery(&mut self, id: u32) -> Result<(), UblkError> {
        let pid = u64::from(std::process::id());
        self.ask("end the recovery", sys::UBLK_U_CMD_END_USER_RECOVERY, id, pid, &mut [])
    }

    /// Stops a device; returns when no request is in flight and all tags are back.
    pub(super) fn stop(&mut self, id: u32) -> Result<(), UblkError> {
        self.ask("stop the device", sys::UBLK_U_CMD_STOP_DEV, id, 0, &mut [])
    }

    /// Deletes a device, then closes its character node, if this process has it open. On a kernel that
    /// supports it (6.6+), the deletion does not wait for others who still have a node open; on older ones
    /// this process's node must be closed first.
    pub(super) fn delete(&mut self, id: u32, node: Option<Arc<File>>) -> Result<(), UblkError> {
        let mut deleted = self.command(sys::UBLK_U_CMD_DEL_DEV_ASYNC, id, 0, &mut []);
        drop(node);
        if deleted.is_err() {
            deleted = self.command(sys::UBLK_U_CMD_DEL_DEV, id, 0, &mut []);
        }
        match deleted {
            Err(error) if error.raw_os_error() != Some(libc::ENODEV) => {
                Err(UblkError::Control { what: "delete the device", source: error })
            }
            _ => Ok(()),
        }
    }

    /// True if the driver may lose a device whose new server dies while it arms the tags. It is told from others by a later
    /// feature, `QUIESCE_DEV`.
    pub(super) fn arming_is_deadly(&self) -> bool {
        self.features.is_none_or(|features| features & u64::from(sys::UBLK_F_QUIESCE) == 0)
    }

    /// Deletes a device that this process does not have open; does not wait for its mounts to go where the kernel has
    /// that (6.6+).
    pub(super) fn delete_soon(&mut self, id: u32) -> Result<(), UblkError> {
        self.delete(id, None)
    }

    /// The CPUs whose requests go to a queue; `None` if the kernel does not report them.
    pub(super) fn affinity(&mut self, id: u32, queue: u16) -> Option<CpuSet> {
        // The driver requires room for all CPUs that the kernel can have.
        let mut bits = [0; 1024];
        let data = u64::from(queue);
        self.command(sys::UBLK_U_CMD_GET_QUEUE_AFFINITY, id, data, &mut bits).ok()?;
        let mut set = CpuSet::new();
        let cpus = (0..CpuSet::MAX_CPU.min(bits.len() * 8))
            .filter(|cpu| bits[cpu / 8] >> (cpu % 8) & 1 == 1);
        let mut any = false;
        for cpu in cpus {
            set.set(cpu);
            any = true;
        }
        any.then_some(set)
    }

    fn ask(
        &mut self,
        what: &'static str,
        op: u32,
        id: u32,
        data: u64,
        buffer: &mut [u8],
    ) -> Result<(), UblkError> {
        self.command(op, id, data, buffer).map_err(|source| UblkError::Control { what, source })
    }

    fn command(&mut self, op: u32, id: u32, data: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.queue_command(op, (id, u16::MAX), data, buffer)
    }

    /// `struct ublksrv_ctrl_cmd` of `ublk_cmd.h`: device, queue, length and address of a buffer, a word.
    fn queue_command(
        &mut self,
        op: u32,
        (id, queue): (u32, u16),
        data: u64,
        buffer: &mut [u8],
    ) -> io::Result<()> {
        let mut body = [0; 80];
        body[0..4].copy_from_slice(&id.to_ne_bytes());
        body[4..6].copy_from_slice(&queue.to_ne_bytes());
        let len = u16::try_from(buffer.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
        body[6..8].copy_from_slice(&len.to_ne_bytes());
        if self.stuck {
            return Err(io::ErrorKind::TimedOut.into());
        }
        // Memory of the command itself, which can outlive this call.
        let mut own = buffer.to_vec();
        if len > 0 {
            body[8..16].copy_from_slice(&(own.as_mut_ptr() as u64).to_ne_bytes());
        }
        body[16..24].copy_from_slice(&data.to_ne_bytes());
        let node = types::Fd(self.node.as_raw_fd());
        let entry = opcode::UringCmd80::new(node, op & self.mask).cmd(body).build();
        // SAFETY: the entry points to `own`, which is dropped after its completion has been seen below, or never; no
        // other entry is ever in this ring, because a control that is stuck takes none.
        unsafe { self.ring.submission().push(&entry) }
            .map_err(|_| io::Error::other("the control ring is full"))?;
        let until = self.limit.map(|limit| Instant::now() + limit);
        let result = loop {
            let left = until.map(|until| until.saturating_duration_since(Instant::now()));
            if left == Some(Duration::ZERO) {
                self.stuck = true;
                std::mem::forget(own);
                return Err(io::ErrorKind::TimedOut.into());
            }
            let entered = match left {
                None => self.ring.submit_and_wait(1),
                Some(left) => {
                    let left = types::Timespec::from(left);
                    let args = types::SubmitArgs::new().timespec(&left);
                    self.ring.submitter().submit_with_args(1, &args)
                }
            };
            match entered {
                Ok(_) => {}
                Err(error) if matches!(error.raw_os_error(), Some(libc::EINTR | libc::ETIME)) => {}
                // The entry may be in flight: it must not be left there with this buffer.
                Err(error) => {
                    tracing::warn!(%error, "Waiting for the ublk driver");
                    std::thread::sleep(std::time::Duration::from_millis(10));
                }
            }
            if let Some(completion) = self.ring.completion().next() {
                break completion.result();
            }
        };
        buffer.copy_from_slice(&own);
        if result < 0 { Err(io::Error::from_raw_os_error(-result)) } else { Ok(()) }
    }
}

/// Writes the fields of `struct ublksrv_ctrl_dev_info` to their places.
fn put_info(bytes: &mut [u8; size_of::<DeviceInfo>()], info: &DeviceInfo) {
    bytes[0..2].copy_from_slice(&info.nr_hw_queues.to_ne_bytes());
    bytes[2..4].copy_from_slice(&info.queue_depth.to_ne_bytes());
    bytes[8..12].copy_from_slice(&info.max_io_buf_bytes.to_ne_bytes());
    bytes[12..16].copy_from_slice(&info.dev_id.to_ne_bytes());
    bytes[16..20].copy_from_slice(&info.ublksrv_pid.to_ne_bytes());
    bytes[24..32].copy_from_slice(&info.flags.to_ne_bytes());
    bytes[32..40].copy_from_slice(&info.ublksrv_flags.to_ne_bytes());
}

fn get_info(bytes: &[u8; size_of::<DeviceInfo>()], info: &mut DeviceInfo) {
    let [a, b, c, d, m, n, _, _, e, f, g, h, i, j, k, l, ..] = *bytes;
    info.nr_hw_queues = u16::from_ne_bytes([a, b]);
    info.queue_depth = u16::from_ne_bytes([c, d]);
    info.max_io_buf_bytes = u32::from_ne_bytes([e, f, g, h]);
    info.dev_id = u32::from_ne_bytes([i, j, k, l]);
    info.state = u16::from_ne_bytes([m, n]);
    let mut flags = [0; 8];
    flags.copy_from_slice(&bytes[24..32]);
    info.flags = u64::from_ne_bytes(flags);
    flags.copy_from_slice(&bytes[32..40]);
    info.ublksrv_flags = u64::from_ne_bytes(flags);
}

/// Writes the fields of `struct ublk_params` (its basic part and that about discards) to their places.
fn put_params(bytes: &mut [u8; size_of::<sys::ublk_params>()], params: &sys::ublk_params) {
    let basic = &params.basic;
    let len = bytes.len() as u32;
    bytes[0..4].copy_from_slice(&len.to_ne_bytes());
    bytes[4..8].copy_from_slice(&params.types.to_ne_bytes());
    bytes[8..12].copy_from_slice(&basic.attrs.to_ne_bytes());
    bytes[12..16].copy_from_slice(&[
        basic.logical_bs_shift,
        basic.physical_bs_shift,
        basic.io_opt_shift,
        basic.io_min_shift,
    ]);
    bytes[16..20].copy_from_slice(&basic.max_sectors.to_ne_bytes());
    bytes[20..24].copy_from_slice(&basic.chunk_sectors.to_ne_bytes());
    bytes[24..32].copy_from_slice(&basic.dev_sectors.to_ne_bytes());
    bytes[32..40].copy_from_slice(&basic.virt_boundary_mask.to_ne_bytes());
    let discard = &params.discard;
    bytes[40..44].copy_from_slice(&discard.discard_alignment.to_ne_bytes());
    bytes[44..48].copy_from_slice(&discard.discard_granularity.to_ne_bytes());
    bytes[48..52].copy_from_slice(&discard.max_discard_sectors.to_ne_bytes());
    bytes[52..56].copy_from_slice(&discard.max_write_zeroes_sectors.to_ne_bytes());
    bytes[56..58].copy_from_slice(&discard.max_discard_segments.to_ne_bytes());
}

#[cfg(test)]
mod tests {
    use std::mem::offset_of;

    use super::*;

    #[test]
    fn the_driver_finds_every_field_where_its_header_has_it() {
        assert_eq!(size_of::<DeviceInfo>(), 64);
        assert_eq!(offset_of!(DeviceInfo, nr_hw_queues), 0);
        assert_eq!(offset_of!(DeviceInfo, queue_depth), 2);
        assert_eq!(offset_of!(DeviceInfo, max_io_buf_bytes), 8);
        assert_eq!(offset_of!(DeviceInfo, dev_id), 12);
        assert_eq!(offset_of!(DeviceInfo, ublksrv_pid), 16);
        assert_eq!(offset_of!(DeviceInfo, state), 4);
        assert_eq!(offset_of!(DeviceInfo, flags), 24);
        assert_eq!(offset_of!(DeviceInfo, ublksrv_flags), 32);
        assert_eq!(offset_of!(sys::ublk_params, types), 4);
        let basic = offset_of!(sys::ublk_params, basic);
        assert_eq!(basic, 8);
        assert_eq!(offset_of!(sys::ublk_param_basic, logical_bs_shift), 4);
        assert_eq!(offset_of!(sys::ublk_param_basic, physical_bs_shift), 5);
        assert_eq!(offset_of!(sys::ublk_param_basic, io_opt_shift), 6);
        assert_eq!(offset_of!(sys::ublk_param_basic, io_min_shift), 7);
        assert_eq!(offset_of!(sys::ublk_param_basic, max_sectors), 8);
        assert_eq!(offset_of!(sys::ublk_param_basic, chunk_sectors), 12);
        assert_eq!(offset_of!(sys::ublk_param_basic, dev_sectors), 16);
        assert_eq!(offset_of!(sys::ublk_param_basic, virt_boundary_mask), 24);
        assert_eq!(offset_of!(sys::ublk_params, discard), 40);
        assert_eq!(offset_of!(sys::ublk_param_discard, discard_granularity), 4);
        assert_eq!(offset_of!(sys::ublk_param_discard, max_discard_sectors), 8);
        assert_eq!(offset_of!(sys::ublk_param_discard, max_write_zeroes_sectors), 12);
        assert_eq!(offset_of!(sys::ublk_param_discard, max_discard_segments), 16);
    }
}
