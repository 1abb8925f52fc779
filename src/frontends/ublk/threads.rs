//! The queue threads: a few threads serve the queues of all devices.
//!
//! A *queue thread* has one ring and serves the tags of any number of queues of any number of devices
//! (`driver`). Queue `q` of every device goes to thread `q` modulo the number of threads, and each thread runs
//! on the CPUs whose requests go to those queues, so that a reader and its server share a cache, and on a small
//! machine a CPU, which saves the most expensive part of a read: waking a thread on another CPU.
//!
//! The threads start with the first device and end with the last.
//!
//! A device that survives its server becomes free for the next one only when this whole process has closed it. A queue thread
//! that ended alone would leave readers waiting for ever, so it ends the process.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;

use parking_lot::Mutex;

use super::UblkError;
use super::driver::{Post, QueueDriver};
use super::mailbox::Mailbox;
use super::queue::NewQueue;

/// Limit on queue threads: the requests of one queue keep a thread below half busy, and a few threads feed
/// more decode threads than most hosts have.
const MOST_THREADS: usize = 4;

/// The queue threads of this process.
pub(super) struct QueueThreads {
    threads: Mutex<Vec<Thread>>,
}

struct Thread {
    mailbox: Arc<Mailbox<Post>>,
    handle: JoinHandle<()>,
}

/// The threads, while a device uses them.
static SHARED: Mutex<Weak<QueueThreads>> = Mutex::new(Weak::new());

impl QueueThreads {
    /// The threads that all devices share.
    pub(super) fn shared() -> Arc<Self> {
        let mut shared = SHARED.lock();
        if let Some(threads) = shared.upgrade() {
            return threads;
        }
        let threads = Arc::new(Self { threads: Mutex::default() });
        *shared = Arc::downgrade(&threads);
        threads
    }

    /// Gives a queue to its thread, which is started if necessary.
    ///
    /// # Errors
    /// Returns [`UblkError::Thread`], [`UblkError::Queue`].
    pub(super) fn serve(&self, queue: NewQueue) -> Result<(), UblkError> {
        let number = queue.number;
        let failed = |what| move |source| UblkError::Queue { queue: number, what, source };
        let place = place(number);
        let mut threads = self.threads.lock();
        while threads.len() <= place {
            let thread = Thread::start(threads.len()).map_err(failed("starting its thread"))?;
            threads.push(thread);
        }
        threads[place].mailbox.post(Post::Queue(Box::new(queue)));
        Ok(())
    }

    /// Starts the threads of a device with so many queues, before it needs them.
    ///
    /// # Errors
    /// Returns [`UblkError::Queue`].
    pub(super) fn prepare(&self, queues: u16) -> Result<(), UblkError> {
        let failed =
            |queue| move |source| UblkError::Queue { queue, what: "starting its thread", source };
        let mut threads = self.threads.lock();
        for queue in 0..queues {
            while threads.len() <= place(queue) {
                let thread = Thread::start(threads.len()).map_err(failed(queue))?;
                threads.push(thread);
            }
        }
        Ok(())
    }
}

/// Number of the thread of a queue.
fn place(queue: u16) -> usize {
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    usize::from(queue) % cpus.min(MOST_THREADS)
}

/// Ends this process if it is dropped after the thread has served a device that survives it.
struct EndsProcess(Arc<AtomicBool>);

impl Drop for EndsProcess {
    fn drop(&mut self) {
        if self.0.load(Ordering::Relaxed) {
            tracing::error!("This process ends, so that the next one can take the devices back");
            // No core dump: the kernel frees the device only after it was written.
            let _ = rustix::process::kill_process(
                rustix::process::getpid(),
                rustix::process::Signal::KILL,
            );
        }
    }
}

impl Drop for QueueThreads {
    fn drop(&mut self) {
        let mut threads = self.threads.lock();
        for Thread { mailbox, handle } in threads.drain(..) {
            mailbox.post(Post::End);
            if handle.thread().id() != std::thread::current().id() {
                let _ = handle.join();
            }
        }
    }
}

impl Thread {
    fn start(number: usize) -> io::Result<Self> {
        let mailbox = Arc::new(Mailbox::new()?);
        let own = mailbox.clone();
        let (ready, readiness) = channel();
        let survivors = Arc::new(AtomicBool::new(false));
        let body = move || match QueueDriver::new(own, survivors.clone()) {
            Ok(mut driver) => {
                let _ = ready.send(Ok(()));
                // Dropped by a panic too.
                let ends = EndsProcess(survivors);
                if driver.run() {
                    std::mem::forget(ends);
                }
            }
            Err(error) => drop(ready.send(Err(error))),
        };
        let handle = std::thread::Builder::new().name(format!("ublk-{number}")).spawn(body)?;
        readiness.recv().unwrap_or_else(|_| Err(io::ErrorKind::BrokenPipe.into()))?;
        Ok(Self { mailbox, handle })
    }
}
