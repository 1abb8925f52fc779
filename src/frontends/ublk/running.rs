//! A device of the kernel whose queues the [queue threads](super::threads) serve: its setup and its end.

use std::fs::{File, OpenOptions};
use std::io;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, unbounded};
use libublk::sys;

use super::UblkError;
use super::control::{Control, DeviceInfo};
use super::device::{Backing, wait_for_node, without_scheduler};
use super::features;
use super::queue::{NewQueue, wait_until_gone};
use super::recovery::{self, DeviceToken, RecoveryStep};
use super::threads::QueueThreads;

/// Seconds to wait for the character node: devtmpfs creates it at once, udev on a busy host later.
const NODE_SECONDS: u64 = 10;

/// A device that is being served.
pub(super) struct RunningDevice {
    id: u32,
    threads: Arc<QueueThreads>,
    gone: Receiver<()>,
    /// The character node, held beyond the deletion: see [`RunningDevice::end`].
    node: Option<Arc<File>>,
}

impl RunningDevice {
    /// Creates and starts a device; after an error nothing remains.
    pub(super) fn start(backing: &Backing) -> Result<Self, UblkError> {
        let mut control = Control::open()?;
        let options = &backing.options;
        let mut info = DeviceInfo {
            nr_hw_queues: options.queues,
            queue_depth: options.depth,
            max_io_buf_bytes: options.chunk,
            ublksrv_pid: std::process::id() as i32,
            flags: features::wanted(control.features(), backing.survives()),
            ublksrv_flags: options.token.map_or(0, DeviceToken::number),
            ..DeviceInfo::default()
        };
        control.add(&mut info)?;
        if backing.survives() && !features::survives(info.flags) {
            tracing::warn!(
                device = info.dev_id,
                "This kernel's ublk keeps no device whose server dies: its reads will fail then"
            );
        }
        let (mut device, gone) = Self::new(info.dev_id);
        let served = device.serve(&mut control, &info, backing, gone);
        match served {
            Ok(()) => Ok(device),
            Err(error) => {
                // Undo the steps so far; the first error is the one to report.
                let _ = device.end(&mut control);
                Err(error)
            }
        }
    }

    /// Takes a device back whose server has died: see [`recovery`]. After an error that does not
    /// [leave the device](UblkError::leaves_the_device), the device is gone.
    pub(super) fn take_back(
        backing: &Backing,
        id: u32,
        before: Option<RecoveryStep>,
        note: &mut dyn FnMut(RecoveryStep) -> io::Result<()>,
    ) -> Result<Self, UblkError> {
        let mut noted = |step| {
            note(step).map_err(|source| UblkError::Control { what: "wait for a note", source })
        };
        let mut control = Control::with_limit(Some(recovery::PATIENCE))?;
        let gone = || UblkError::Control {
            what: "take back a device that is gone",
            source: io::Error::from_raw_os_error(libc::ENODEV),
        };
        let info = control.info(id)?.ok_or_else(gone)?;
        if let Some(token) = backing.options.token {
            recovery::check(&info, token)?;
        }
        let (mut device, gone) = Self::new(id);
        device.threads.prepare(info.nr_hw_queues)?;
        noted(RecoveryStep::Recovering)?;
        recovery::begin(&mut control, id, before)?;
        let node = Arc::new(open_node(id)?);
        noted(RecoveryStep::Arming)?;
        device.node = Some(node);
        let mut ended = device.arm(&mut control, &info, backing, gone);
        if ended.is_ok() {
            ended = noted(RecoveryStep::Armed).and_then(|()| control.end_recovery(id));
        }
        match ended {
            Ok(()) => Ok(device),
            Err(error) => {
                // Armed tags can be taken back by a stop alone. The control may be stuck in the command that failed.
                drop(control);
                if let Ok(mut control) = Control::with_limit(Some(recovery::PATIENCE)) {
                    let _ = device.end(&mut control);
                }
                Err(UblkError::LostInRecovery { id, source: Box::new(error) })
            }
        }
    }

    /// A device without a served queue, and the sender that its queues hold.
    fn new(id: u32) -> (Self, Sender<()>) {
        let (gone_sender, gone) = unbounded();
        (Self { id, threads: QueueThreads::shared(), gone, node: None }, gone_sender)
    }

    /// N of `/dev/ublkbN`.
    pub(super) fn id(&self) -> u32 {
        self.id
    }

    /// Stops and deletes the device after the requests in flight were answered, and releases its threads.
    ///
    /// # Errors
    /// Returns the driver's refusal.
    pub(super) fn stop(self) -> Result<(), UblkError> {
        let mut control = Control::open()?;
        self.end(&mut control)
    }

    fn serve(
        &mut self,
        control: &mut Control,
        info: &DeviceInfo,
        backing: &Backing,
        gone: Sender<()>,
    ) -> Result<(), UblkError> {
        features::check(info.flags)?;
        control.set_params(self.id, &backing.params())?;
        self.node = Some(Arc::new(open_node(self.id)?));
        self.arm(control, info, backing, gone)?;
        control.start(self.id)?;
        wait_for_node(self.id)?;
        without_scheduler(self.id);
        Ok(())
    }

    /// Gives the queues of the open device to their threads, which arm all tags.
    fn arm(
        &self,
        control: &mut Control,
        info: &DeviceInfo,
        backing: &Backing,
        gone: Sender<()>,
    ) -> Result<(), UblkError> {
        let (armed, arming) = channel();
        let node = self.node.clone().ok_or(UblkError::Queue {
            queue: 0,
            what: "opening its device",
            source: io::ErrorKind::NotFound.into(),
        })?;
        let survives = features::survives(info.flags);
        let queue = |number, cpus| NewQueue {
            number,
            depth: info.queue_depth,
            longest: info.max_io_buf_bytes as usize,
            encoded: info.flags & u64::from(sys::UBLK_F_CMD_IOCTL_ENCODE) != 0,
            node: node.clone(),
            volume: backing.volume.clone(),
            writer: backing.writer.clone(),
            counters: backing.counters.clone(),
            survives,
            cpus,
            armed: armed.clone(),
            gone: gone.clone(),
        };
        let mut result = Ok(());
        let mut given = 0;
        while given < info.nr_hw_queues && result.is_ok() {
            result = self.threads.serve(queue(given, control.affinity(self.id, given)));
            given += u16::from(result.is_ok());
        }
        drop((armed, gone, node));
        // START waits until all tags are armed, so it must not be sent when one is missing; and a STOP that
        // comes before a tag is armed does not take it back (6.12), so this waits for all of them even after
        // an error.
        for queue in 0..given {
            let armed = arming.recv().unwrap_or_else(|_| Err(io::ErrorKind::BrokenPipe.into()));
            let armed =
                armed.map_err(|source| UblkError::Queue { queue, what: "arming its tags", source });
            result = result.and(armed);
        }
        result
    }

    /// Ends the device, also one that never started: STOP takes the armed tags back.
    ///
    /// A deletion holds a lock of the whole driver, and the last one to release a device frees its tags,
    /// which takes some kernels 80 ms (kernel-notes/ublk.md). So the character node is closed after the
    /// deletion: many devices then wait at the same time, and outside of the lock.
    fn end(self, control: &mut Control) -> Result<(), UblkError> {
        let Self { id, gone, node, .. } = self;
        let stopped = control.stop(id);
        if stopped.is_ok() {
            // The queues' mappings and tags must not be released before the queues are gone.
            wait_until_gone(&gone);
        }
        let deleted = control.delete(id, node);
        stopped.and(deleted)
    }
}

/// Opens the device's character node when it appears.
fn open_node(id: u32) -> Result<File, UblkError> {
    let path = format!("/dev/ublkc{id}");
    let until = Instant::now() + Duration::from_secs(NODE_SECONDS);
    loop {
        match OpenOptions::new().read(true).write(true).open(&path) {
            Ok(node) => return Ok(node),
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(UblkError::Control {
                    what: "open the character device",
                    source: error,
                });
            }
            Err(_) if Instant::now() >= until => {
                return Err(UblkError::Node { path, seconds: NODE_SECONDS });
            }
            Err(_) => std::thread::sleep(Duration::from_millis(1)),
        }
    }
}
