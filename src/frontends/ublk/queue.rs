//! The queue thread of the libublk driver: one thread for one queue, one ring, no data buffers.
//!
//! `unsafe` is needed for one call, pushing submission entries: the kernel will read memory at an address in
//! the entry, so the caller must keep that memory alive. The call and its argument are in [`Worker::push`].
#![allow(unsafe_code)]

use std::cell::RefCell;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::mpsc::Sender;

use io_uring::{IoUring, cqueue, opcode, squeue, types};
use libublk::ctrl::UblkCtrl;
use libublk::io::{UblkDev, UblkQueue, ublk_init_task_ring, with_task_io_ring_mut};
use libublk::sys;

use super::answer::{Answers, Verdict};
use super::counters::{QueueCounters, count};
use super::mailbox::{Letter, Mailbox, Outcome};
use super::request::{Op, Request};
use super::writer::{QueueWrites, Writer};
use super::{UblkError, system_error};
use disk::volume::Volume;

/// `user_data` of the poll on the mailbox's eventfd; a tag is below 4096.
const MAILBOX: u64 = u64::MAX;

/// Result of a tag's command once the device is being removed: `-ENODEV`.
const ABORTED: i32 = sys::UBLK_IO_RES_ABORT;

/// The one message of a queue thread to the thread that started it.
pub(super) type Ready = Result<libc::pid_t, UblkError>;

/// Input of a queue thread.
pub(super) struct QueueContext {
    /// Number of the queue.
    pub(super) queue: u16,
    /// libublk's open character device.
    pub(super) dev: Arc<UblkDev>,
    /// The disk.
    pub(super) volume: Arc<dyn Volume>,
    /// Threads that change it, if it can be changed.
    pub(super) writer: Option<Writer>,
    /// Its device's counters.
    pub(super) counters: Arc<QueueCounters>,
    /// As many zeros as the longest request, shared by all queues.
    pub(super) zeros: Arc<Vec<u8>>,
}

/// Body of a queue thread: sets up, reports on `ready`, serves until the device is stopped.
pub(super) fn run(context: &QueueContext, ready: &Sender<Ready>) {
    // Memory that this thread allocates must not wait for I/O that this thread would have to serve: libublk
    // sets PR_SET_IO_FLUSHER here.
    let tid = UblkCtrl::init_queue_thread();
    let failed = |what, source| UblkError::Queue { queue: context.queue, what, source };
    if let Err(error) = make_ring(context.dev.dev_info.queue_depth) {
        let _ = ready.send(Err(failed("making its ring", error)));
        return;
    }
    let queue = match UblkQueue::new(context.queue, &context.dev) {
        Ok(queue) => queue,
        Err(error) => {
            let _ = ready.send(Err(failed("mapping its requests", system_error(error))));
            return;
        }
    };
    let mut worker = match Worker::new(context, &queue) {
        Ok(worker) => worker,
        Err(error) => {
            let _ = ready.send(Err(failed("arming its tags", error)));
            return;
        }
    };
    let _ = ready.send(Ok(tid));
    if let Err(error) = worker.serve() {
        count(&context.counters.lost_queues, 1);
        tracing::error!(queue = context.queue, %error, "A ublk queue has ended: its requests will fail");
    }
}

/// Creates the thread's ring, before libublk creates its default one. Only this thread submits, and task work
/// runs only inside its enters: no interrupts, bigger batches (6.1+).
fn make_ring(depth: u16) -> io::Result<()> {
    // One command a tag and the poll: the submission queue is never full within one turn.
    let entries = (u32::from(depth) + 1).next_power_of_two();
    let build = || {
        IoUring::<squeue::Entry, cqueue::Entry>::builder()
            .setup_single_issuer()
            .setup_defer_taskrun()
            // Without it an enter that does not wait would not know that task work is due.
            .setup_taskrun_flag()
            .build(entries)
            .or_else(|_| IoUring::builder().setup_coop_taskrun().build(entries))
    };
    ublk_init_task_ring(|cell| {
        let ring = build().map_err(libublk::UblkError::IOError)?;
        cell.set(RefCell::new(ring)).map_err(|_| libublk::UblkError::OtherError(-libc::EEXIST))
    })
    .map_err(system_error)
}

struct Worker<'a> {
    context: &'a QueueContext,
    queue: &'a UblkQueue<'a>,
    mailbox: Arc<Mailbox<Letter>>,
    writes: Option<QueueWrites>,
    /// Per tag: the wait that is open, if any.
    waiting: Vec<Option<u32>>,
    /// Number of the last wait.
    ticket: u32,
    /// Number of tags that the driver still holds or that this thread works on.
    live: u32,
    answers: Answers,
    /// Mask of the command numbers: kernels before 6.4 know only the short ones.
    command_mask: u32,
}

impl<'a> Worker<'a> {
    /// Arms the mailbox and all tags.
    fn new(context: &'a QueueContext, queue: &'a UblkQueue<'a>) -> io::Result<Self> {
        let info = &context.dev.dev_info;
        let encoded = info.flags & u64::from(sys::UBLK_F_CMD_IOCTL_ENCODE) != 0;
        let mut worker = Self {
            context,
            queue,
            mailbox: Arc::new(Mailbox::new()?),
            writes: context.writer.clone().map(|writer| QueueWrites::new(writer, info.queue_depth)),
            waiting: vec![None; info.queue_depth.into()],
            ticket: 0,
            live: 0,
            answers: Answers::new(context.zeros.clone()),
            command_mask: if encoded { u32::MAX } else { 0xff },
        };
        worker.poll_mailbox()?;
        for tag in 0..info.queue_depth {
            // No address: with NEED_GET_DATA the driver takes it from later commands.
            worker.command(tag, sys::UBLK_U_IO_FETCH_REQ, 0, 0)?;
            worker.live += 1;
        }
        worker.enter(0)?;
        // libublk would wait for per-tag buffers; this driver has none.
        context.dev.notify_buffer_registration_complete(false);
        Ok(worker)
    }

    /// Serves until the driver has taken every tag back.
    fn serve(&mut self) -> io::Result<()> {
        let mut completions = Vec::new();
        while self.live > 0 {
            while let Some(letter) = self.mailbox.take() {
                if self.waiting.get(usize::from(letter.tag)) == Some(&Some(letter.ticket)) {
                    self.waiting[usize::from(letter.tag)] = None;
                    self.resume(letter.tag, &letter.outcome)?;
                }
            }
            let sleep = self.mailbox.park();
            self.enter(usize::from(sleep))?;
            self.mailbox.unpark();
            with_task_io_ring_mut(|ring| {
                completions
                    .extend(ring.completion().map(|c| (c.user_data(), c.result(), c.flags())));
            });
            for (data, result, flags) in completions.drain(..) {
                self.complete(data, result, flags)?;
            }
        }
        Ok(())
    }

    fn complete(&mut self, data: u64, result: i32, flags: u32) -> io::Result<()> {
        if data == MAILBOX {
            // The letters are read at the top of the loop; the eventfd's count is never drained,
            // since a multishot poll reports every write and not the level.
            return if cqueue::more(flags) { Ok(()) } else { self.poll_mailbox() };
        }
        let Ok(tag) = u16::try_from(data) else { return Ok(()) };
        count(&self.context.counters.completions, 1);
        match u32::try_from(result) {
            Ok(sys::UBLK_IO_RES_OK) => self.request(tag),
            Ok(sys::UBLK_IO_RES_NEED_GET_DATA) => self.let_write_in(tag),
            _ => {
                if result != ABORTED {
                    tracing::error!(
                        queue = self.context.queue,
                        tag,
                        result,
                        "The ublk driver gave up a request slot"
                    );
                }
                if let Some(writes) = &mut self.writes {
                    writes.gave_up(tag);
                }
                self.live -= 1;
                Ok(())
            }
        }
    }

    /// Handles a new request in the tag's descriptor.
    fn request(&mut self, tag: u16) -> io::Result<()> {
        let asked = self.asked(tag);
        if asked.op == Op::Read {
            return self.read(tag);
        }
        self.ticket = self.ticket.wrapping_add(1);
        let (mailbox, counters, ticket) = (&self.mailbox, &self.context.counters, self.ticket);
        let done = || mailbox.waiter(counters, (0, tag), ticket);
        if self.writes.as_mut().is_some_and(|writes| writes.begin(tag, &asked, done)) {
            self.waiting[usize::from(tag)] = Some(ticket);
            return Ok(());
        }
        let verdict = self.answers.refused(counters, &asked);
        self.carry_out(tag, &verdict)
    }

    /// The request in the tag's descriptor.
    fn asked(&self, tag: u16) -> Request {
        Request::of(self.queue.get_iod(tag))
    }

    fn read(&mut self, tag: u16) -> io::Result<()> {
        let range = self.asked(tag).range();
        self.ticket = self.ticket.wrapping_add(1);
        let (mailbox, ticket) = (&self.mailbox, self.ticket);
        let context = self.context;
        let verdict = self.answers.read(&*context.volume, &context.counters, range, &mut || {
            mailbox.waiter(&context.counters, (0, tag), ticket)
        });
        if verdict == Verdict::Wait {
            self.waiting[usize::from(tag)] = Some(ticket);
        }
        self.carry_out(tag, &verdict)
    }

    /// Handles the volume's answer to a wait.
    fn resume(&mut self, tag: u16, outcome: &Outcome) -> io::Result<()> {
        let (asked, counters) = (self.asked(tag), &self.context.counters);
        let verdict = match outcome {
            outcome if asked.op != Op::Read => self.answers.changed(counters, &asked, outcome),
            Outcome::Ready => return self.read(tag),
            Outcome::Failed(error) => self.answers.failed(counters, asked.range(), Some(error)),
            Outcome::Forgotten => self.answers.failed(counters, asked.range(), None),
        };
        self.carry_out(tag, &verdict)
    }

    /// Handles an announced write. It can be refused only after its data have been copied, so they go into a
    /// buffer that is never read.
    fn let_write_in(&mut self, tag: u16) -> io::Result<()> {
        let asked = self.asked(tag);
        let own = self.writes.as_mut().and_then(|writes| writes.let_in(tag, &asked));
        let address = own.unwrap_or_else(|| self.answers.bin());
        self.command(tag, sys::UBLK_U_IO_NEED_GET_DATA, address, 0)
    }

    /// Ends the tag's request and arms the tag again.
    fn carry_out(&mut self, tag: u16, verdict: &Verdict) -> io::Result<()> {
        match *verdict {
            Verdict::Commit { address, result } => {
                self.command(tag, sys::UBLK_U_IO_COMMIT_AND_FETCH_REQ, address, result)
            }
            Verdict::Wait => Ok(()),
        }
    }

    /// `struct ublksrv_io_cmd` of `ublk_cmd.h`: queue, tag, result, address.
    fn command(&mut self, tag: u16, op: u32, address: u64, result: i32) -> io::Result<()> {
        let mut body = [0; 16];
        body[0..2].copy_from_slice(&self.context.queue.to_ne_bytes());
        body[2..4].copy_from_slice(&tag.to_ne_bytes());
        body[4..8].copy_from_slice(&result.to_ne_bytes());
        body[8..16].copy_from_slice(&address.to_ne_bytes());
        count(&self.context.counters.submissions, 1);
        // Fixed file 0 is the device's character node (registered by UblkQueue::new).
        let entry =
            opcode::UringCmd16::new(types::Fixed(0), op & self.command_mask).cmd(body).build();
        self.push(&entry.user_data(tag.into()))
    }

    fn poll_mailbox(&mut self) -> io::Result<()> {
        let event = types::Fd(self.mailbox.event().as_raw_fd());
        let entry = opcode::PollAdd::new(event, libc::POLLIN as u32).multi(true).build();
        self.push(&entry.user_data(MAILBOX))
    }

    fn push(&mut self, entry: &squeue::Entry) -> io::Result<()> {
        for _ in 0..2 {
            let pushed = with_task_io_ring_mut(|ring| {
                // SAFETY: the only memory an entry points to is the address of a COMMIT (read by the kernel)
                // or of NEED_GET_DATA (written). The first is read while the entry is issued, which happens
                // inside `enter`: `self.answers` keeps that memory until the submission queue was seen empty,
                // or it is its zero area, which outlives the worker. The second is written before the tag's
                // completion is seen: it is the tag's buffer, which `self.writes` keeps until then, or leaks
                // if it never comes; or the refuse buffer, which is never resized or read. The poll names the
                // eventfd by number; the mailbox is dropped after the last enter of this worker, and a closed
                // number could only wake this thread without need. FETCH has no address.
                unsafe { ring.submission().push(entry) }
            });
            if pushed.is_ok() {
                return Ok(());
            }
            self.enter(0)?; // does not happen: the queue holds a command for every tag
        }
        Err(io::Error::other("The submission queue stays full"))
    }

    /// Issues the pushed entries and waits for `want` completions (0 or 1), then releases the memory that the
    /// issued commits pointed to.
    fn enter(&mut self, want: usize) -> io::Result<()> {
        let issued = with_task_io_ring_mut(|ring| {
            match ring.submit_and_wait(want) {
                Ok(_) => {}
                // EBUSY: completions must be reaped first.
                Err(error)
                    if matches!(
                        error.raw_os_error(),
                        Some(libc::EINTR | libc::EAGAIN | libc::EBUSY)
                    ) => {}
                Err(error) => return Err(error),
            }
            Ok(ring.submission().is_empty())
        })?;
        if issued {
            self.answers.issued();
        }
        Ok(())
    }
}
