//! The body of a queue thread: from the completions of its ring to the next commands.
//!
//! The number of each completion names its queue and tag. Queues are added through the thread's mailbox, and
//! removed when the driver has taken their last tag back.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use io_uring::cqueue;
use libublk::sys;
use rustix::thread::{CapabilitySet, capabilities, set_capabilities};

use super::answer::Verdict;
use super::mailbox::{Letter, Mailbox, WaitOutcome};
use super::queue::{NewQueue, ServedQueue};
use super::request::Op;
use super::ring::{MAILBOX, Ring, target};

/// A message to a queue thread.
pub(super) enum Post {
    /// The volume's answer to a wait.
    Letter(Letter),
    /// A queue to serve.
    Queue(Box<NewQueue>),
    /// No queue will come any more: end when the last one is gone.
    End,
}

impl From<Letter> for Post {
    fn from(letter: Letter) -> Self {
        Self::Letter(letter)
    }
}

/// State of a queue thread.
pub(super) struct QueueDriver {
    ring: Ring,
    mailbox: Arc<Mailbox<Post>>,
    queues: Vec<Option<ServedQueue>>,
    /// Number of the last wait.
    ticket: u32,
    pinned: bool,
    ending: bool,
    /// True once it has served a queue of a device that survives this process.
    survivors: Arc<AtomicBool>,
}

impl QueueDriver {
    /// Creates the state of this thread, and polls its mailbox. `survivors` is set when it serves a device that survives this
    /// process.
    ///
    /// # Errors
    /// Returns the kernel's refusal of a ring.
    pub(super) fn new(mailbox: Arc<Mailbox<Post>>, survivors: Arc<AtomicBool>) -> io::Result<Self> {
        threads::mark_io_thread();
        become_unprivileged()?;
        let ring = Ring::new()?;
        let mut driver = Self {
            ring,
            mailbox,
            queues: Vec::new(),
            ticket: 0,
            pinned: false,
            ending: false,
            survivors,
        };
        driver.poll_mailbox()?;
        driver.ring.enter(0)?;
        Ok(driver)
    }

    /// Serves until the end; an error is counted for all queues and logged. Returns true without an error.
    pub(super) fn run(&mut self) -> bool {
        let served = self.serve();
        if let Err(error) = &served {
            for queue in self.queues.iter().flatten() {
                queue.counters.lost_queues.add(1);
            }
            tracing::error!(%error, "A ublk queue thread has ended: requests of its devices will fail");
        }
        served.is_ok()
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
            let entered = self.ring.enter(usize::from(sleep));
            self.mailbox.unpark();
            entered?;
            self.ring.reap(&mut completions);
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
        if new.survives {
            self.survivors.store(true, Ordering::Relaxed);
        }
        let (depth, longest) = (new.depth, new.longest);
        let mut queue = ServedQueue::new(new)?;
        self.ring.answers.prepare(longest);
        let free = self.queues.iter().position(Option::is_none);
        let slot = free.unwrap_or(self.queues.len());
        self.ring.register(slot, &mut queue);
        match self.queues.get_mut(slot) {
            Some(place) => *place = Some(queue),
            None => self.queues.push(Some(queue)),
        }
        for tag in 0..depth {
            // No address: with NEED_GET_DATA the driver takes it from later commands.
            self.command(slot, tag, sys::UBLK_U_IO_FETCH_REQ, 0, 0)?;
        }
        self.ring.enter(0)
    }

    fn complete(&mut self, data: u64, result: i32, flags: u32) -> io::Result<()> {
        if data == MAILBOX {
            // The post is read at the top of the loop; the eventfd's count is never drained, since a
            // multishot poll reports every write and not the level.
            return if cqueue::more(flags) { Ok(()) } else { self.poll_mailbox() };
        }
        let (slot, tag) = target(data);
        let Some(queue) = self.queues.get_mut(slot).and_then(Option::as_mut) else { return Ok(()) };
        if !queue.has(tag) {
            return Ok(());
        }
        queue.counters.completions.add(1);
        match u32::try_from(result) {
            Ok(sys::UBLK_IO_RES_OK) => self.request(slot, tag),
            Ok(sys::UBLK_IO_RES_NEED_GET_DATA) => {
                let request = queue.request(tag);
                let own = queue.writes.as_mut().and_then(|writes| writes.let_in(tag, &request));
                // A write can be refused only after its data have been copied.
                let address = own.unwrap_or_else(|| self.ring.answers.bin());
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
            self.ring.unregister(slot);
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
        let verdict = self.ring.answers.refused(&queue.counters, &request);
        self.carry_out(slot, tag, &verdict)
    }

    fn read(&mut self, slot: usize, tag: u16) -> io::Result<()> {
        let Some(queue) = self.queues[slot].as_mut() else { return Ok(()) };
        let range = queue.request(tag).range;
        self.ticket = self.ticket.wrapping_add(1);
        let (mailbox, ticket) = (&self.mailbox, self.ticket);
        let counters = &queue.counters;
        let verdict = self.ring.answers.read(&*queue.volume, counters, range, &mut || {
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
            outcome if request.op != Op::Read => {
                self.ring.answers.changed(counters, &request, outcome)
            }
            WaitOutcome::Ready => return self.read(slot, tag),
            WaitOutcome::Failed(error) => {
                self.ring.answers.failed(counters, request.range, Some(error))
            }
            WaitOutcome::Forgotten => self.ring.answers.failed(counters, request.range, None),
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

    fn command(
        &mut self,
        slot: usize,
        tag: u16,
        op: u32,
        address: u64,
        result: i32,
    ) -> io::Result<()> {
        let Some(queue) = &self.queues[slot] else { return Ok(()) };
        self.ring.command(queue, (slot, tag), op, address, result)
    }

    fn poll_mailbox(&mut self) -> io::Result<()> {
        self.ring.poll(self.mailbox.event())
    }
}

/// Gives up `CAP_SYS_ADMIN` on this thread, which then serves no partition scan: the driver looks for partitions only if every
/// queue is armed by a thread with that right. Images have none. Before 7.3 the scan runs inside `START_DEV`, and a server that dies in
/// it leaves a device that only a reboot removes.
fn become_unprivileged() -> io::Result<()> {
    let mut sets = capabilities(None)?;
    sets.effective.remove(CapabilitySet::SYS_ADMIN);
    Ok(set_capabilities(None, sets)?)
}
