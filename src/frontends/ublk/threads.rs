//! The queue driver of libublk: a thread for each queue of each device, and one for its commands.
//!
//! libublk keeps its control ring in thread-local storage, so all commands for a device must come from one
//! thread. Each device has a control thread; it sleeps in a channel between start and stop.

use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread::JoinHandle;

use libublk::UblkFlags;
use libublk::ctrl::{UblkCtrl, UblkCtrlBuilder};
use libublk::io::UblkDev;
use libublk::sys;

use super::device::{Backing, Running, wait_for_node, without_scheduler};
use super::queue::{self, QueueContext};
use super::{UblkError, system_error};

/// A device with threads of its own.
pub(super) struct OwnThreads {
    id: u32,
    stop: Sender<()>,
    control: JoinHandle<Result<(), UblkError>>,
}

impl OwnThreads {
    /// Creates and starts a device; after an error nothing remains.
    pub(super) fn start(backing: Backing) -> Result<Self, UblkError> {
        let (stop, stopped) = mpsc::channel();
        let (started, start) = mpsc::channel();
        let control = spawn("ublk-control", move || control(&backing, &started, &stopped))?;
        match start.recv() {
            Ok(id) => Ok(Self { id, stop, control }),
            // The thread ended before it had a device: its result holds the reason.
            Err(_) => Err(joined(control).err().unwrap_or(UblkError::ControlThreadGone)),
        }
    }
}

impl Running for OwnThreads {
    fn id(&self) -> u32 {
        self.id
    }

    fn stop(self: Box<Self>) -> Result<(), UblkError> {
        drop(self.stop);
        joined(self.control)
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
    backing: &Backing,
    started: &Sender<u32>,
    stopped: &Receiver<()>,
) -> Result<(), UblkError> {
    let ctrl = add(&backing.options)?;
    let id = ctrl.dev_info().dev_id;
    let result = serve(&ctrl, backing, || {
        let _ = started.send(id);
        // Ends when the sender is dropped.
        let _ = stopped.recv();
    });
    // By now no file or mapping of the character device is left in this process; otherwise the deletion would
    // wait for it. The asynchronous form does not wait for an opener of the block node either (6.6+); before
    // that, a reader that keeps the node open delays this call.
    let deleted = ctrl.del_dev_async().or_else(|_| ctrl.del_dev());
    result?;
    match deleted.map_err(system_error) {
        Err(source) if source.raw_os_error() != Some(libc::ENODEV) => {
            Err(UblkError::Control { what: "delete the device", source })
        }
        _ => Ok(()),
    }
}

fn add(options: &super::UblkOptions) -> Result<UblkCtrl, UblkError> {
    UblkCtrlBuilder::default()
        .name("turbobd")
        // The kernel chooses the number. A fixed number is dangerous: when ADD_DEV fails because the number
        // is taken, libublk 0.4.8 deletes the device that has it (the control object's Drop).
        .id(-1)
        .nr_queues(options.queues)
        .depth(options.depth)
        .io_buf_bytes(options.chunk)
        .ctrl_flags(u64::from(sys::UBLK_F_NEED_GET_DATA))
        .dev_flags(UblkFlags::UBLK_DEV_F_ADD_DEV)
        .build()
        .map_err(|error| UblkError::Control { what: "add a device", source: system_error(error) })
}

/// Runs the device from its parameters to its stop; calls `live` while it serves.
fn serve(ctrl: &UblkCtrl, backing: &Backing, live: impl FnOnce()) -> Result<(), UblkError> {
    let refused = |what| move |error| UblkError::Control { what, source: system_error(error) };
    let info = ctrl.dev_info();
    if info.flags & u64::from(sys::UBLK_F_NEED_GET_DATA) == 0 {
        // Without it a stray write would be copied into the cache.
        let source = std::io::Error::from_raw_os_error(libc::EOPNOTSUPP);
        return Err(UblkError::Control { what: "announce writes (UBLK_F_NEED_GET_DATA)", source });
    }
    let params = backing.params();
    let dev = UblkDev::new(
        "turbobd".into(),
        |dev| {
            dev.tgt.dev_size = backing.volume.size();
            dev.tgt.params = params;
            Ok(())
        },
        ctrl,
    );
    let dev = Arc::new(dev.map_err(refused("open the character device"))?);
    let zeros = Arc::new(vec![0; backing.options.chunk as usize]);
    let (ready, readiness) = mpsc::channel();
    let mut threads = Vec::new();
    let mut result = Ok(());
    for queue in 0..info.nr_hw_queues {
        let context = QueueContext {
            queue,
            dev: dev.clone(),
            volume: backing.volume.clone(),
            writer: backing.writer.clone(),
            counters: backing.counters.clone(),
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
