//! One device: its options, and its lifetime from start to stop.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use libublk::sys;

use super::recovery::{self, DeviceToken, KernelDevice, RecoveryStep};
use super::running::RunningDevice;
use super::writer::{DeviceWriter, WriterThreads};
use super::{UblkError, probe};
use crate::counters::{FrontCounters, FrontTotals};
use disk::volume::{Volume, WritableVolume};
use formats::units::SECTOR;

/// Seconds to wait for the block node after the device was started. devtmpfs creates it at once; udev may
/// need a while on a busy host.
const NODE_SECONDS: u64 = 10;

/// Sectors of the largest discard, 1 GiB: 129 records of the writable layer.
const MOST_ZEROED: u32 = 1 << 21;

/// Options of a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UblkOptions {
    /// Number of queues. A request goes to the queue of the CPU that submits it, so more queues than CPUs are
    /// never used. Default: 2, or 1 on one CPU; two queue threads saturate the decode threads of the hosts
    /// that were measured, and each queue costs kernel memory.
    pub queues: u16,
    /// Requests in flight per queue, 1 to 4096. Default 64: enough to keep 16 MiB of reads in flight at the
    /// default chunk, for about 100 KiB of kernel memory a queue.
    pub depth: u16,
    /// Bytes of the largest request, a power of two, 4 KiB to 32 MiB. No request crosses a multiple of it.
    /// Default 256 KiB: a quarter or half of the usual decoded chunk, so that most requests lie in one
    /// decoded chunk, while a sequential reader still gets large requests.
    pub chunk: u32,
    /// Token of a device that shall survive this process: see [`recovery`](super::recovery). `None`: the kernel removes the
    /// device when this process dies. A device that can be written is removed in any case, because acknowledged writes may
    /// still be in the memory of its server.
    pub token: Option<DeviceToken>,
    /// True if the kernel may refuse writes before they reach this process, when the volume cannot be
    /// written. Always `true`, except in the test that writes which do arrive are harmless.
    pub read_only: bool,
}

impl Default for UblkOptions {
    fn default() -> Self {
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        Self {
            queues: cpus.clamp(1, 2) as u16,
            depth: 64,
            chunk: 256 * 1024,
            token: None,
            read_only: true,
        }
    }
}

impl UblkOptions {
    fn check(&self, volume: &dyn Volume) -> Result<(), UblkError> {
        let rule = |fits: bool, what, value: u64, rule| {
            if fits { Ok(()) } else { Err(UblkError::Option { what, value, rule }) }
        };
        rule((1..=4096).contains(&self.queues), "queues", self.queues.into(), "1 to 4096")?;
        rule((1..=4096).contains(&self.depth), "depth", self.depth.into(), "1 to 4096")?;
        let chunk_fits = self.chunk.is_power_of_two() && (4096..=32 << 20).contains(&self.chunk);
        rule(chunk_fits, "chunk", self.chunk.into(), "a power of two, 4 KiB to 32 MiB")?;
        let size = volume.size();
        rule(
            size > 0 && size.is_multiple_of(SECTOR),
            "size",
            size,
            "a multiple of 512 bytes, not 0",
        )
    }
}

/// A disk to serve, with its options.
#[derive(Clone)]
pub(super) struct Backing {
    /// The disk.
    pub(super) volume: Arc<dyn Volume>,
    /// Threads that change it, if it can be changed.
    pub(super) writer: Option<DeviceWriter>,
    /// The options.
    pub(super) options: UblkOptions,
    /// The queues' counters.
    pub(super) counters: Arc<FrontCounters>,
}

impl Backing {
    /// True if the device shall survive this process.
    pub(super) fn survives(&self) -> bool {
        self.options.token.is_some() && self.writer.is_none()
    }

    /// Parameters of the disk for the driver.
    ///
    /// A writable disk has a volatile cache: a write is durable after the next flush, as the writable layer's
    /// is. It takes FUA, which saves the block layer a flush of its own after such a write. A read-only disk
    /// has no cache, so no flush is ever sent.
    pub(super) fn params(&self) -> sys::ublk_params {
        let chunk = self.options.chunk;
        let chunk_shift = chunk.trailing_zeros() as u8;
        let (attrs, discard) = if self.writer.is_some() {
            let discards = self.volume.writable().is_some_and(WritableVolume::discards);
            let discard = if discards { sys::UBLK_PARAM_TYPE_DISCARD } else { 0 };
            (sys::UBLK_ATTR_VOLATILE_CACHE | sys::UBLK_ATTR_FUA, discard)
        } else if self.options.read_only {
            (sys::UBLK_ATTR_READ_ONLY, 0)
        } else {
            (0, 0)
        };
        sys::ublk_params {
            types: sys::UBLK_PARAM_TYPE_BASIC | discard,
            basic: sys::ublk_param_basic {
                attrs, // never ROTATIONAL
                // 512: images whose size is no multiple of 4 KiB exist, and readers may ask for a sector.
                logical_bs_shift: 9,
                // 4 KiB: the smallest read of the page cache, and ext4's block size in this project's images.
                physical_bs_shift: 12,
                io_min_shift: 12,
                // Sets the default read-ahead to twice this: 512 KiB at the default chunk.
                io_opt_shift: chunk_shift,
                max_sectors: chunk >> 9,
                // No request crosses a chunk: so it lies in one decoded piece more often.
                chunk_sectors: chunk >> 9,
                dev_sectors: self.volume.size() / SECTOR,
                virt_boundary_mask: 0,
            },
            discard: sys::ublk_param_discard {
                discard_alignment: 0,
                // Any sector can be zeroed; less than a block is not worth a record of its own.
                discard_granularity: 4096,
                max_discard_sectors: MOST_ZEROED,
                max_write_zeroes_sectors: MOST_ZEROED,
                max_discard_segments: 1, // the driver's maximum
                reserved0: 0,
            },
            ..Default::default()
        }
    }
}

/// A block device that is being served. Dropping it stops it.
pub struct UblkDevice {
    path: PathBuf,
    id: u32,
    counters: Arc<FrontCounters>,
    running: Option<RunningDevice>,
    /// Ends after the queues, which hand it their writes.
    writers: Option<WriterThreads>,
}

impl UblkDevice {
    /// Creates a device for `volume`, writable if the volume is, starts it and waits for its node. After an
    /// error nothing remains. Needs `CAP_SYS_ADMIN`; loads the module `ublk_drv` if necessary.
    ///
    /// # Errors
    /// Returns [`UblkError`]; [`UblkError::Unavailable`] and [`UblkError::KnownBadKernel`] are returned
    /// before anything was changed, and mean that another front end should be used.
    pub fn start(volume: Arc<dyn Volume>, options: &UblkOptions) -> Result<Self, UblkError> {
        options.check(&*volume)?;
        probe::examine_and_load().verdict()?;
        Self::run(volume, options, RunningDevice::start)
    }

    /// Takes a device back whose server has died, by the order of [`recovery`]. `volume` must be
    /// the disk that it showed. `before` is the last step of an earlier try; `note` is called before each step, and an error of it
    /// ends the try.
    ///
    /// # Errors
    /// Returns [`UblkError`]. The device is as it was if [`UblkError::leaves_the_device`], and gone otherwise: its readers got
    /// EIO.
    pub fn take_back(
        volume: Arc<dyn Volume>,
        device: &KernelDevice,
        before: Option<RecoveryStep>,
        note: &mut dyn FnMut(RecoveryStep) -> io::Result<()>,
    ) -> Result<Self, UblkError> {
        let options = UblkOptions { token: device.token, ..UblkOptions::default() };
        options.check(&*volume)?;
        Self::run(volume, &options, |backing| {
            RunningDevice::take_back(backing, device.id, before, note)
        })
    }

    fn run(
        volume: Arc<dyn Volume>,
        options: &UblkOptions,
        run: impl FnOnce(&Backing) -> Result<RunningDevice, UblkError>,
    ) -> Result<Self, UblkError> {
        let counters = Arc::new(FrontCounters::default());
        let writers = WriterThreads::start(&volume)?;
        let backing = Backing {
            volume,
            writer: writers.as_ref().map(WriterThreads::writer),
            options: options.clone(),
            counters: counters.clone(),
        };
        let running = run(&backing)?;
        let id = running.id();
        Ok(Self { path: recovery::node(id), id, counters, running: Some(running), writers })
    }

    /// The device as the driver knows it now.
    ///
    /// # Errors
    /// Returns the driver's refusal.
    pub fn kernel_device(&self) -> Result<Option<KernelDevice>, UblkError> {
        recovery::kernel_device(self.id)
    }

    /// `/dev/ublkbN`.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// N of `/dev/ublkbN`.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.id
    }

    /// Counters of the queues.
    #[must_use]
    pub fn counters(&self) -> FrontTotals {
        self.counters.totals()
    }

    /// Stops and deletes the device. Requests in flight are answered first, so this takes as long as the
    /// volume takes. Unmount first: otherwise the mounted file system loses its device, and every later read
    /// there fails.
    ///
    /// # Errors
    /// Returns the driver's refusal.
    pub fn stop(mut self) -> Result<(), UblkError> {
        self.end()
    }

    fn end(&mut self) -> Result<(), UblkError> {
        let stopped = self.running.take().map_or(Ok(()), RunningDevice::stop);
        self.writers = None;
        stopped
    }
}

impl Drop for UblkDevice {
    fn drop(&mut self) {
        if let Err(error) = self.end() {
            tracing::error!(device = %self.path.display(), error = &error as &dyn std::error::Error, "Cannot remove the device");
        }
    }
}

/// Selects no I/O scheduler: merging and sorting are of no use to a device without seeks. A device of several
/// queues has no scheduler from the start; to write its name again would still freeze the queues, which took
/// 60 of the 90 ms to create a device (user-mode Linux 7.3). A kernel without schedulers is no error.
pub(super) fn without_scheduler(id: u32) {
    let path = format!("/sys/block/ublkb{id}/queue/scheduler");
    if std::fs::read_to_string(&path).is_ok_and(|now| !now.contains("[none]")) {
        let _ = std::fs::write(&path, "none");
    }
}

/// Waits until the block node is visible: the kernel announces the disk, then devtmpfs or udev creates the
/// node.
pub(super) fn wait_for_node(id: u32) -> Result<(), UblkError> {
    use std::os::unix::fs::FileTypeExt;
    let path = recovery::node(id).display().to_string();
    let until = Instant::now() + Duration::from_secs(NODE_SECONDS);
    loop {
        if std::fs::metadata(&path).is_ok_and(|found| found.file_type().is_block_device()) {
            return Ok(());
        }
        if Instant::now() >= until {
            return Err(UblkError::Node { path, seconds: NODE_SECONDS });
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use disk::testing::MemoryVolume;

    #[test]
    fn options_that_the_driver_would_refuse_are_refused_with_a_rule() {
        let volume = MemoryVolume::new(vec![0; 4096]);
        let good = UblkOptions::default();
        assert!(good.check(&volume).is_ok());
        for bad in [
            UblkOptions { queues: 0, ..good.clone() },
            UblkOptions { depth: 4097, ..good.clone() },
            UblkOptions { chunk: 3 << 12, ..good.clone() },
            UblkOptions { chunk: 2048, ..good.clone() },
        ] {
            assert!(matches!(bad.check(&volume), Err(UblkError::Option { .. })), "{bad:?}");
        }
        assert!(good.check(&MemoryVolume::new(Vec::new())).is_err());
    }

    #[test]
    fn a_host_without_ublk_is_told_so_before_anything_is_made() {
        if probe::examine().driver == probe::DriverPresence::Present {
            return; // the tests of front ends cover that case
        }
        let volume = Arc::new(MemoryVolume::new(vec![0; 4096]));
        let error = UblkDevice::start(volume, &UblkOptions::default()).err();
        assert!(
            matches!(error, Some(UblkError::Unavailable { .. } | UblkError::KnownBadKernel { .. })),
            "{error:?}"
        );
    }
}
