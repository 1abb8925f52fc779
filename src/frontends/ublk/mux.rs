//! Many devices on few threads.
//!
//! A *queue thread* has one ring and serves the tags of any number of queues of any number of devices: the
//! number of each completion names its queue and tag. Queue `q` of every device goes to thread `q` modulo the
//! number of threads, and each thread runs on the CPUs whose requests go to those queues, so that a reader
//! and its server share a cache, and on a small machine a CPU, which saves the most expensive part of a read:
//! waking a thread on another CPU. Queues are added to a thread through its mailbox, and removed when the
//! driver has taken their last tag back.
//!
//! The threads start with the first device and end with the last.
//!
//! `unsafe` is needed for two calls. The first pushes submission entries, as in [`queue`](super::queue): see
//! [`Driver::push`]. The second reads request descriptors, which the kernel writes into memory that it shares
//! with this process: see [`Descriptors::get`].
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::mpsc::{self, channel};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::thread::JoinHandle;

use crossbeam_channel::{Receiver, Sender};
use io_uring::{IoUring, cqueue, opcode, squeue, types};
use libublk::sys;
use memmap2::{MmapOptions, MmapRaw};
use rustix::thread::CpuSet;

use super::answer::{Answers, Verdict};
use super::counters::{QueueCounters, count};
use super::mailbox::{Letter, Mailbox, Outcome};
use super::request::{Op, Request};
use super::writer::{QueueWrites, Writer};
use super::UblkError;
use disk::volume::Volume;

/// Limit on queue threads: the requests of one queue keep a thread below half busy, and a few threads feed
/// more decode threads than most hosts have.
const MOST_THREADS: usize = 4;

/// Entries of a submission queue: pushes beyond it are issued at once.
const SUBMISSIONS: u32 = 1024;

/// Entries of a completion queue. More than are usually due in one turn; the kernel keeps the overflow, more
/// slowly.
const COMPLETIONS: u32 = 16 << 10;

/// Places in a ring's table of files. Further devices are named by descriptor, which costs some 20 ns more.
const FILES: u32 = 1024;

/// `user_data` of the poll on the mailbox's eventfd.
const MAILBOX: u64 = u64::MAX;

/// Bits of `user_data` that hold the tag; a tag is below 4096.
const TAG_BITS: u32 = 16;

/// A queue to be served.
pub(super) struct NewQueue {
    /// Its number in its device.
    pub(super) number: u16,
    /// Limit on requests in flight.
    pub(super) depth: u16,
    /// Length of the longest request in bytes.
    pub(super) longest: usize,
    /// False on kernels before 6.4, which know the commands by number only.
    pub(super) encoded: bool,
    /// The device's character node.
    pub(super) node: Arc<File>,
    /// The disk.
    pub(super) volume: Arc<dyn Volume>,
    /// Threads that change it, if it can be changed.
    pub(super) writer: Option<Writer>,
    /// Its device's counters.
    pub(super) counters: Arc<QueueCounters>,
    /// CPUs whose requests come here.
    pub(super) cpus: Option<CpuSet>,
    /// Receives a message when all tags are armed, or the reason why they are not.
    pub(super) armed: mpsc::Sender<io::Result<()>>,
    /// Dropped when the queue is gone.
    pub(super) gone: Sender<()>,
}

/// A message to a queue thread.
enum Post {
    Letter(Letter),
    Queue(Box<NewQueue>),
    End,
}

impl From<Letter> for Post {
    fn from(letter: Letter) -> Self {
        Self::Letter(letter)
    }
}

/// The queue threads of this process.
pub(super) struct Mux {
    threads: Mutex<Vec<Thread>>,
}

struct Thread {
    mailbox: Arc<Mailbox<Post>>,
    handle: JoinHandle<()>,
}

/// The threads, while a device uses them.
static SHARED: Mutex<Weak<Mux>> = Mutex::new(Weak::new());

impl Mux {
    /// The threads that all devices share.
    pub(super) fn shared() -> Arc<Self> {
        let mut shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(mux) = shared.upgrade() {
            return mux;
        }
        let mux = Arc::new(Self { threads: Mutex::default() });
        *shared = Arc::downgrade(&mux);
        mux
    }

    /// Gives a queue to its thread, which is started if necessary.
    ///
    /// # Errors
    /// Returns [`UblkError::Thread`], [`UblkError::Queue`].
    pub(super) fn serve(&self, queue: NewQueue) -> Result<(), UblkError> {
        let number = queue.number;
        let failed = |what| move |source| UblkError::Queue { queue: number, what, source };
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        let place = usize::from(number) % cpus.min(MOST_THREADS);
        let mut threads = self.threads.lock().unwrap_or_else(PoisonError::into_inner);
        while threads.len() <= place {
            let thread = Thread::start(threads.len()).map_err(failed("starting its thread"))?;
            threads.push(thread);
        }
        threads[place].mailbox.post(Post::Queue(Box::new(queue)));
        Ok(())
    }
}

impl Drop for Mux {
    fn drop(&mut self) {
        let mut threads = self.threads.lock().unwrap_or_else(PoisonError::into_inner);
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
        let body = move || match Driver::new(own) {
            Ok(mut driver) => {
                let _ = ready.send(Ok(()));
                driver.run();
            }
            Err(error) => drop(ready.send(Err(error))),
        };
        let handle = std::thread::Builder::new().name(format!("ublk-{number}")).spawn(body)?;
        readiness.recv().unwrap_or_else(|_| Err(io::ErrorKind::BrokenPipe.into()))?;
        Ok(Self { mailbox, handle })
    }
}

/// The requests of one queue, as the kernel writes them.
struct Descriptors(MmapRaw);

impl Descriptors {
    fn map(node: &File, queue: u16, depth: u16) -> io::Result<Self> {
        let one = size_of::<sys::ublksrv_io_desc>() as u64;
        let offset = u64::from(sys::UBLKSRV_CMD_BUF_OFFSET)
            + u64::from(queue) * u64::from(sys::UBLK_MAX_QUEUE_DEPTH) * one;
        let len = usize::from(depth) * one as usize;
        let len = len.next_multiple_of(rustix::param::page_size());
        MmapOptions::new().offset(offset).len(len).map_raw_read_only(node).map(Self)
    }

    /// The request of a tag that the driver has given to this process and that was not committed yet.
    fn get(&self, tag: u16) -> sys::ublksrv_io_desc {
        let all = self.0.as_ptr().cast::<sys::ublksrv_io_desc>();
        // SAFETY: the mapping has a descriptor for every tag below the depth, and only such tags are passed:
        // `Queue::has`. The kernel writes a descriptor before it completes the tag's command and not again
        // before the tag is committed; the read is volatile because the compiler cannot know of the kernel's
        // writes.
        unsafe { all.add(usize::from(tag)).read_volatile() }
    }
}

/// A queue that is served.
struct Queue {
    number: u16,
    node: Arc<File>,
    /// True if the node is in the ring's table, at the queue's slot.
    fixed: bool,
    mask: u32,
    requests: Descriptors,
    volume: Arc<dyn Volume>,
    writes: Option<QueueWrites>,
    counters: Arc<QueueCounters>,
    /// Per tag: the wait that is open, if any.
    waiting: Vec<Option<u32>>,
    /// Number of tags that the driver still holds or that this thread works on.
    live: u32,
    _gone: Sender<()>,
}

impl Queue {
    fn has(&self, tag: u16) -> bool {
        usize::from(tag) < self.waiting.len()
    }

    /// The request of a tag.
    fn request(&self, tag: u16) -> Request {
        Request::of(&self.requests.get(tag))
    }
}

/// State of a queue thread.
struct Driver {
    ring: IoUring,
    files: u32,
    mailbox: Arc<Mailbox<Post>>,
    queues: Vec<Option<Queue>>,
    answers: Answers,
    /// Number of the last wait.
    ticket: u32,
    pinned: bool,
    ending: bool,
}

impl Driver {
    fn new(mailbox: Arc<Mailbox<Post>>) -> io::Result<Self> {
        ::sys::thread::mark_io_thread();
        let ring = IoUring::builder()
            .setup_single_issuer()
            .setup_defer_taskrun()
            // Without it an enter that does not wait would not know that task work is due.
            .setup_taskrun_flag()
            .setup_cqsize(COMPLETIONS)
            .build(SUBMISSIONS)
            .or_else(|_| {
                IoUring::builder().setup_coop_taskrun().setup_cqsize(COMPLETIONS).build(SUBMISSIONS)
            })?;
        let files = if ring.submitter().register_files_sparse(FILES).is_ok() { FILES } else { 0 };
        let mut driver = Self {
            ring,
            files,
            mailbox,
            queues: Vec::new(),
            answers: Answers::new(Arc::default()),
            ticket: 0,
            pinned: false,
            ending: false,
        };
        driver.poll_mailbox()?;
        driver.enter(0)?;
        Ok(driver)
    }

    fn run(&mut self) {
        if let Err(error) = self.serve() {
            for queue in self.queues.iter().flatten() {
                count(&queue.counters.lost_queues, 1);
            }
            tracing::error!(%error, "A ublk queue thread has ended: requests of its devices will fail");
        }
    }

    /// Serves until it is told to end and has no queue left.
    fn serve(&mut self) -> io::Result<()> {
        let mut completions = Vec::new();
        loop {
            while let Some(post) = self.mailbox.take() {
                match post {
                    Post::Letter(letter) => self.resume(&letter)?,
                    Post::Queue(queue) => self.add(*queue),
                    Post::End => self.ending = true,
                }
            }
            if self.ending && self.queues.iter().all(Option::is_none) {
                return Ok(());
            }
            let sleep = self.mailbox.park();
            let entered = self.enter(usize::from(sleep));
            self.mailbox.unpark();
            entered?;
            let done = self.ring.completion();
            completions.extend(done.map(|done| (done.user_data(), done.result(), done.flags())));
            for (data, result, flags) in completions.drain(..) {
                self.complete(data, result, flags)?;
            }
        }
    }

    /// Takes over a queue: maps its requests and arms its tags.
    fn add(&mut self, new: NewQueue) {
        if let Some(cpus) = new.cpus.as_ref().filter(|_| !self.pinned) {
            // The same queue of every device has the same CPUs.
            self.pinned = rustix::thread::sched_setaffinity(None, cpus).is_ok();
        }
        let armed = new.armed.clone();
        let result = self.arm(new);
        let _ = armed.send(result);
    }

    fn arm(&mut self, new: NewQueue) -> io::Result<()> {
        let requests = Descriptors::map(&new.node, new.number, new.depth)?;
        self.answers.prepare(new.longest);
        let free = self.queues.iter().position(Option::is_none);
        let slot = free.unwrap_or(self.queues.len());
        let fixed = slot < self.files as usize
            && self
                .ring
                .submitter()
                .register_files_update(slot as u32, &[new.node.as_raw_fd()])
                .is_ok();
        let queue = Queue {
            number: new.number,
            node: new.node,
            fixed,
            mask: if new.encoded { u32::MAX } else { 0xff },
            requests,
            volume: new.volume,
            writes: new.writer.map(|writer| QueueWrites::new(writer, new.depth)),
            counters: new.counters,
            waiting: vec![None; new.depth.into()],
            live: new.depth.into(),
            _gone: new.gone,
        };
        match self.queues.get_mut(slot) {
            Some(place) => *place = Some(queue),
            None => self.queues.push(Some(queue)),
        }
        for tag in 0..new.depth {
            // No address: with NEED_GET_DATA the driver takes it from later commands.
            self.command(slot, tag, sys::UBLK_U_IO_FETCH_REQ, 0, 0)?;
        }
        self.enter(0)
    }

    fn complete(&mut self, data: u64, result: i32, flags: u32) -> io::Result<()> {
        if data == MAILBOX {
            // The post is read at the top of the loop; the eventfd's count is never drained, since a
            // multishot poll reports every write and not the level.
            return if cqueue::more(flags) { Ok(()) } else { self.poll_mailbox() };
        }
        let (slot, tag) = ((data >> TAG_BITS) as usize, (data & ((1 << TAG_BITS) - 1)) as u16);
        let Some(queue) = self.queues.get_mut(slot).and_then(Option::as_mut) else { return Ok(()) };
        if !queue.has(tag) {
            return Ok(());
        }
        count(&queue.counters.completions, 1);
        match u32::try_from(result) {
            Ok(sys::UBLK_IO_RES_OK) => self.request(slot, tag),
            Ok(sys::UBLK_IO_RES_NEED_GET_DATA) => {
                let request = queue.request(tag);
                let own = queue.writes.as_mut().and_then(|writes| writes.let_in(tag, &request));
                // A write can be refused only after its data have been copied.
                let address = own.unwrap_or_else(|| self.answers.bin());
                self.command(slot, tag, sys::UBLK_U_IO_NEED_GET_DATA, address, 0)
            }
            _ => {
                if result != sys::UBLK_IO_RES_ABORT {
                    tracing::error!(tag, result, "The ublk driver gave up a request slot");
                }
                if let Some(writes) = &mut queue.writes {
                    writes.gave_up(tag);
                }
                queue.live -= 1;
                if queue.live == 0 {
                    self.remove(slot);
                }
                Ok(())
            }
        }
    }

    /// Removes a queue. The driver has every tag back: nothing points to the queue any more.
    fn remove(&mut self, slot: usize) {
        let queue = self.queues[slot].take();
        if queue.is_some_and(|queue| queue.fixed) {
            let _ = self.ring.submitter().register_files_update(slot as u32, &[-1]);
        }
    }

    /// Handles a new request in the tag's descriptor.
    fn request(&mut self, slot: usize, tag: u16) -> io::Result<()> {
        let Some(queue) = self.queues[slot].as_mut() else { return Ok(()) };
        let request = queue.request(tag);
        if request.op == Op::Read {
            return self.read(slot, tag);
        }
        self.ticket = self.ticket.wrapping_add(1);
        let (mailbox, counters, ticket) = (&self.mailbox, &queue.counters, self.ticket);
        let done = || mailbox.waiter(counters, (slot as u32, tag), ticket);
        if queue.writes.as_mut().is_some_and(|writes| writes.begin(tag, &request, done)) {
            queue.waiting[usize::from(tag)] = Some(ticket);
            return Ok(());
        }
        let verdict = self.answers.refused(&queue.counters, &request);
        self.carry_out(slot, tag, &verdict)
    }

    fn read(&mut self, slot: usize, tag: u16) -> io::Result<()> {
        let Some(queue) = self.queues[slot].as_mut() else { return Ok(()) };
        let range = queue.request(tag).range();
        self.ticket = self.ticket.wrapping_add(1);
        let (mailbox, ticket) = (&self.mailbox, self.ticket);
        let counters = &queue.counters;
        let verdict = self.answers.read(&*queue.volume, counters, range, &mut || {
            mailbox.waiter(counters, (slot as u32, tag), ticket)
        });
        if verdict == Verdict::Wait {
            queue.waiting[usize::from(tag)] = Some(ticket);
        }
        self.carry_out(slot, tag, &verdict)
    }

    /// Handles the volume's answer to a wait.
    fn resume(&mut self, letter: &Letter) -> io::Result<()> {
        let (slot, tag) = (letter.slot as usize, letter.tag);
        let Some(queue) = self.queues.get_mut(slot).and_then(Option::as_mut) else { return Ok(()) };
        // A late letter must not touch a later request.
        match queue.waiting.get_mut(usize::from(tag)) {
            Some(wait) if *wait == Some(letter.ticket) => *wait = None,
            _ => return Ok(()),
        }
        let (request, counters) = (queue.request(tag), &queue.counters);
        let verdict = match &letter.outcome {
            outcome if request.op != Op::Read => self.answers.changed(counters, &request, outcome),
            Outcome::Ready => return self.read(slot, tag),
            Outcome::Failed(error) => self.answers.failed(counters, request.range(), Some(error)),
            Outcome::Forgotten => self.answers.failed(counters, request.range(), None),
        };
        self.carry_out(slot, tag, &verdict)
    }

    /// Ends the tag's request and arms the tag again.
    fn carry_out(&mut self, slot: usize, tag: u16, verdict: &Verdict) -> io::Result<()> {
        match *verdict {
            Verdict::Commit { address, result } => {
                self.command(slot, tag, sys::UBLK_U_IO_COMMIT_AND_FETCH_REQ, address, result)
            }
            Verdict::Wait => Ok(()),
        }
    }

    /// `struct ublksrv_io_cmd` of `ublk_cmd.h`: queue, tag, result, address.
    fn command(
        &mut self,
        slot: usize,
        tag: u16,
        op: u32,
        address: u64,
        result: i32,
    ) -> io::Result<()> {
        let Some(queue) = &self.queues[slot] else { return Ok(()) };
        let mut body = [0; 16];
        body[0..2].copy_from_slice(&queue.number.to_ne_bytes());
        body[2..4].copy_from_slice(&tag.to_ne_bytes());
        body[4..8].copy_from_slice(&result.to_ne_bytes());
        body[8..16].copy_from_slice(&address.to_ne_bytes());
        let op = op & queue.mask;
        let entry = if queue.fixed {
            opcode::UringCmd16::new(types::Fixed(slot as u32), op).cmd(body).build()
        } else {
            opcode::UringCmd16::new(types::Fd(queue.node.as_raw_fd()), op).cmd(body).build()
        };
        count(&queue.counters.submissions, 1);
        self.push(&entry.user_data((slot as u64) << TAG_BITS | u64::from(tag)))
    }

    fn poll_mailbox(&mut self) -> io::Result<()> {
        let event = types::Fd(self.mailbox.event().as_raw_fd());
        let entry = opcode::PollAdd::new(event, libc::POLLIN as u32).multi(true).build();
        self.push(&entry.user_data(MAILBOX))
    }

    fn push(&mut self, entry: &squeue::Entry) -> io::Result<()> {
        for _ in 0..2 {
            // SAFETY: the only memory an entry points to is the address of a COMMIT (read by the kernel) or
            // of NEED_GET_DATA (written). The first is read while the entry is issued, which happens inside
            // `enter`: `self.answers` keeps that memory until the submission queue was seen empty, or it is a
            // zero area that lives as long as the thread. The second is written by this thread, in the
            // kernel, before the tag's completion is seen (at once, or before 6.15 as task work): it is the
            // tag's buffer, which the queue's `writes` keep until then, or the refuse buffer, which lives as
            // long as the thread and is never read. The poll names the eventfd by number; the mailbox is
            // dropped after the last enter of this thread. FETCH has no address.
            if unsafe { self.ring.submission().push(entry) }.is_ok() {
                return Ok(());
            }
            self.enter(0)?;
        }
        Err(io::Error::other("the submission queue stays full"))
    }

    /// Issues the pushed entries and waits for `want` completions (0 or 1), then releases the memory that the
    /// issued commits pointed to.
    fn enter(&mut self, want: usize) -> io::Result<()> {
        match self.ring.submit_and_wait(want) {
            Ok(_) => {}
            // EBUSY: completions must be reaped first.
            Err(error)
                if matches!(
                    error.raw_os_error(),
                    Some(libc::EINTR | libc::EAGAIN | libc::EBUSY)
                ) => {}
            Err(error) => return Err(error),
        }
        if self.ring.submission().is_empty() {
            self.answers.issued();
        }
        Ok(())
    }
}

/// Waits until the queues with these `gone` senders are gone.
pub(super) fn wait_until_gone(gone: &Receiver<()>) {
    while gone.recv().is_ok() {}
}
