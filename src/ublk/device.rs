//! One device: created, started, stopped and deleted by a control thread of its own.
//!
//! libublk keeps its control ring in thread-local storage, so all commands for a device must come
//! from one thread. Each device has one; it sleeps in a channel between start and stop.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use libublk::UblkFlags;
use libublk::ctrl::{UblkCtrl, UblkCtrlBuilder};
use libublk::io::UblkDev;
use libublk::sys;

use super::counters::{QueueCounters, QueueTotals};
use super::queue::{self, QueueContext};
use super::{UblkError, probe, system_error};
use crate::units::SECTOR;
use crate::volume::Volume;

/// How long to wait for the block node after the device was started. devtmpfs makes it at once; udev
/// may need a while on a busy host.
const NODE_SECONDS: u64 = 10;

/// Shape of a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UblkOptions {
    /// Queues, each with a thread. A request goes to the queue of the CPU that submits it, so more
    /// queues than CPUs are never used. Default: 2, or 1 on one CPU; two threads saturate the inflate
    /// workers of the hosts this was measured on, and each queue costs kernel memory.
    pub queues: u16,
    /// Requests in flight per queue, 1 to 4096. Default 64: enough to keep 16 MiB of reads in flight
    /// at the default chunk, for about 100 KiB of kernel memory a queue.
    pub depth: u16,
    /// Bytes of the largest request, a power of two, 4 KiB to 32 MiB. No request crosses a multiple
    /// of it. Default 256 KiB: a quarter or half of the usual decode unit, so that most requests lie
    /// in one decoded chunk, while a sequential reader still gets big requests.
    pub chunk: u32,
    /// Whether the kernel may refuse writes before they reach us. Always `true`, but in the test that
    /// writes which do reach us do no harm.
    pub read_only: bool,
}

impl Default for UblkOptions {
    fn default() -> Self {
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        Self { queues: cpus.clamp(1, 2) as u16, depth: 64, chunk: 256 * 1024, read_only: true }
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

    fn params(&self, volume: &dyn Volume) -> sys::ublk_params {
        let chunk_shift = self.chunk.trailing_zeros() as u8;
        sys::ublk_params {
            types: sys::UBLK_PARAM_TYPE_BASIC,
            basic: sys::ublk_param_basic {
                // Read-only; not VOLATILE_CACHE, so no flush is ever sent; not ROTATIONAL.
                attrs: if self.read_only { sys::UBLK_ATTR_READ_ONLY } else { 0 },
                // 512: images whose size is no multiple of 4 KiB exist, and readers may ask for a sector.
                logical_bs_shift: 9,
                // 4 KiB: what a page-cache read asks for at least, and ext4's block size in our images.
                physical_bs_shift: 12,
                io_min_shift: 12,
                // Sets the default read-ahead to twice this: 512 KiB at the default chunk.
                io_opt_shift: chunk_shift,
                max_sectors: self.chunk >> 9,
                // No request crosses a chunk: it then lies in one decoded piece more often.
                chunk_sectors: self.chunk >> 9,
                dev_sectors: volume.size() / SECTOR,
                virt_boundary_mask: 0,
            },
            ..Default::default()
        }
    }
}

/// A block device that is being served. Dropping it stops it.
pub struct UblkDevice {
    path: PathBuf,
    id: u32,
    counters: Arc<QueueCounters>,
    stop: Option<Sender<()>>,
    control: Option<JoinHandle<Result<(), UblkError>>>,
}

impl UblkDevice {
    /// Creates a device for `volume`, starts it and waits for its node. Nothing is left behind on
    /// an error. Needs `CAP_SYS_ADMIN`; loads the module `ublk_drv` if it must.
    ///
    /// # Errors
    /// [`UblkError`]; [`UblkError::Unavailable`] and [`UblkError::KnownBadKernel`] come before
    /// anything was touched, and mean that another front end should be used.
    pub fn start(volume: Arc<dyn Volume>, options: &UblkOptions) -> Result<Self, UblkError> {
        options.check(&*volume)?;
        probe::examine_and_load().verdict()?;
        let counters = Arc::new(QueueCounters::default());
        let (stop, stopped) = mpsc::channel();
        let (started, start) = mpsc::channel();
        let control = {
            let (options, counters) = (options.clone(), counters.clone());
            spawn("ublk-control", move || {
                control(&volume, &options, &counters, &started, &stopped)
            })?
        };
        match start.recv() {
            Ok(id) => {
                let path = PathBuf::from(format!("/dev/ublkb{id}"));
                Ok(Self { path, id, counters, stop: Some(stop), control: Some(control) })
            }
            // The thread ended before it had a device to tell of: its result says why.
            Err(_) => Err(joined(control).err().unwrap_or(UblkError::ControlThreadGone)),
        }
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

    /// What the queues did so far.
    #[must_use]
    pub fn counters(&self) -> QueueTotals {
        self.counters.totals()
    }

    /// Stops and deletes the device, and joins its threads. Requests in flight are answered first, so
    /// this takes as long as the volume takes. Unmount first: the device of a mounted file system
    /// is torn away from it, and every later read there fails.
    ///
    /// # Errors
    /// The driver's refusal.
    pub fn stop(mut self) -> Result<(), UblkError> {
        self.end()
    }

    fn end(&mut self) -> Result<(), UblkError> {
        drop(self.stop.take());
        self.control.take().map_or(Ok(()), joined)
    }
}

impl Drop for UblkDevice {
    fn drop(&mut self) {
        if let Err(error) = self.end() {
            tracing::error!(device = %self.path.display(), error = &error as &dyn std::error::Error, "Cannot remove the device");
        }
    }
}

fn spawn<T: Send + 'static>(
    name: &str,
    body: impl FnOnce() -> T + Send + 'static,
) -> Result<JoinHandle<T>, UblkError> {
    std::thread::Builder::new()
        .name(name.into())
        .spawn(body)
        .map_err(|source| UblkError::Thread { name: name.into(), source })
}

fn joined(thread: JoinHandle<Result<(), UblkError>>) -> Result<(), UblkError> {
    thread.join().unwrap_or(Err(UblkError::ControlThreadGone))
}

/// Body of the control thread.
fn control(
    volume: &Arc<dyn Volume>,
    options: &UblkOptions,
    counters: &Arc<QueueCounters>,
    started: &Sender<u32>,
    stopped: &Receiver<()>,
) -> Result<(), UblkError> {
    let ctrl = add(options)?;
    let id = ctrl.dev_info().dev_id;
    let result = serve(&ctrl, volume, options, counters, || {
        let _ = started.send(id);
        // Ends when the sender is dropped.
        let _ = stopped.recv();
    });
    // By now no file or mapping of the character device is left in this process, or the deletion would
    // wait for it. The asynchronous form does not wait for an opener of the block node either (6.6+);
    // before that, a reader that keeps the node open delays us.
    let deleted = ctrl.del_dev_async().or_else(|_| ctrl.del_dev());
    result?;
    match deleted.map_err(system_error) {
        Err(source) if source.raw_os_error() != Some(libc::ENODEV) => {
            Err(UblkError::Control { what: "delete the device", source })
        }
        _ => Ok(()),
    }
}

fn add(options: &UblkOptions) -> Result<UblkCtrl, UblkError> {
    UblkCtrlBuilder::default()
        .name("turbobd")
        // The kernel chooses the number. Never ask for one: when ADD_DEV fails because the number is taken,
        // libublk 0.4.8 deletes the device that has it (the control object's Drop).
        .id(-1)
        .nr_queues(options.queues)
        .depth(options.depth)
        .io_buf_bytes(options.chunk)
        .ctrl_flags(u64::from(sys::UBLK_F_NEED_GET_DATA))
        .dev_flags(UblkFlags::UBLK_DEV_F_ADD_DEV)
        .build()
        .map_err(|error| UblkError::Control { what: "add a device", source: system_error(error) })
}

/// Runs the device from its parameters to its stop; `live` is called while it serves.
fn serve(
    ctrl: &UblkCtrl,
    volume: &Arc<dyn Volume>,
    options: &UblkOptions,
    counters: &Arc<QueueCounters>,
    live: impl FnOnce(),
) -> Result<(), UblkError> {
    let refused = |what| move |error| UblkError::Control { what, source: system_error(error) };
    let info = ctrl.dev_info();
    if info.flags & u64::from(sys::UBLK_F_NEED_GET_DATA) == 0 {
        // Without it a stray write would be copied into the cache.
        let source = std::io::Error::from_raw_os_error(libc::EOPNOTSUPP);
        return Err(UblkError::Control { what: "announce writes (UBLK_F_NEED_GET_DATA)", source });
    }
    let params = options.params(&**volume);
    let dev = UblkDev::new(
        "turbobd".into(),
        |dev| {
            dev.tgt.dev_size = volume.size();
            dev.tgt.params = params;
            Ok(())
        },
        ctrl,
    );
    let dev = Arc::new(dev.map_err(refused("open the character device"))?);
    let zeros = Arc::new(vec![0; options.chunk as usize]);
    let (ready, readiness) = mpsc::channel();
    let mut threads = Vec::new();
    let mut result = Ok(());
    for queue in 0..info.nr_hw_queues {
        let context = QueueContext {
            queue,
            dev: dev.clone(),
            volume: volume.clone(),
            counters: counters.clone(),
            zeros: zeros.clone(),
        };
        let ready = ready.clone();
        let name = format!("ublk{}-q{queue}", info.dev_id);
        match spawn(&name, move || queue::run(&context, &ready)) {
            Ok(thread) => threads.push(thread),
            Err(error) => {
                result = Err(error);
                break;
            }
        }
        // One after the other: the queue's number belongs to the thread id.
        match readiness.recv() {
            // The kernel's choice of CPUs: those whose requests go to this queue.
            Ok(Ok(tid)) => ctrl.set_thread_affinity(queue, tid),
            Ok(Err(error)) => {
                result = Err(error);
                break;
            }
            Err(_) => {
                result = Err(UblkError::ControlThreadGone);
                break;
            }
        }
    }
    // START waits until all tags of all queues are armed, so it must not be sent when one is missing.
    if result.is_ok() {
        result = ctrl.start_dev(&dev).map(drop).map_err(refused("start the device"));
    }
    if result.is_ok() {
        result = wait_for_node(info.dev_id);
    }
    if result.is_ok() {
        without_scheduler(info.dev_id);
        live();
    }
    // Also for a device that never started: it takes the armed tags back, so that the threads end.
    let stopped = ctrl.kill_dev().map_err(refused("stop the device"));
    for thread in threads {
        let _ = thread.join();
    }
    result.and(stopped.map(drop))
}

/// Merging and sorting are of no use to a device without seeks. A device of several queues has no
/// scheduler from the start; to write its name again would freeze the queues all the same, which took
/// 60 of the 90 ms that a device took to make (user-mode Linux 7.3). A kernel without schedulers is
/// no error.
fn without_scheduler(id: u32) {
    let path = format!("/sys/block/ublkb{id}/queue/scheduler");
    if std::fs::read_to_string(&path).is_ok_and(|now| !now.contains("[none]")) {
        let _ = std::fs::write(&path, "none");
    }
}

/// Waits until the block node can be seen: the kernel announces the disk, somebody makes the node.
fn wait_for_node(id: u32) -> Result<(), UblkError> {
    use std::os::unix::fs::FileTypeExt;
    let path = format!("/dev/ublkb{id}");
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
    use crate::volume::MemoryVolume;

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
        if probe::examine().driver == probe::Driver::Present {
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
