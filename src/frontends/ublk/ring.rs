//! The ring of a queue thread, with the memory that its commits point to.
//!
//! `unsafe` is needed for one call, pushing submission entries: the kernel will read or write memory at an
//! address in the entry, so that memory must stay. See [`Ring::push`].
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use io_uring::{IoUring, opcode, squeue, types};

use super::answer::Answers;
use super::queue::ServedQueue;

/// Entries of a submission queue: pushes beyond it are issued at once.
const SUBMISSIONS: u32 = 1024;

/// Entries of a completion queue. More than are usually due in one turn; the kernel keeps the overflow, more
/// slowly.
const COMPLETIONS: u32 = 16 << 10;

/// Places in a ring's table of files. Further devices are named by descriptor, which costs some 20 ns more.
const FILES: u32 = 1024;

/// `user_data` of the poll on the mailbox's eventfd.
pub(super) const MAILBOX: u64 = u64::MAX;

/// Bits of `user_data` that hold the tag; a tag is below 4096.
const TAG_BITS: u32 = 16;

/// `user_data`, result and flags of a completion.
pub(super) type Completion = (u64, i32, u32);

/// Slot of the queue and tag that a completion's `user_data` names.
pub(super) fn target(data: u64) -> (usize, u16) {
    ((data >> TAG_BITS) as usize, (data & ((1 << TAG_BITS) - 1)) as u16)
}

/// The ring of one queue thread.
pub(super) struct Ring {
    ring: IoUring,
    files: u32,
    /// Memory that the commits in the ring point to.
    pub(super) answers: Answers,
}

impl Ring {
    /// Creates the ring. Only this thread submits, and task work runs only inside its enters: no interrupts,
    /// bigger batches (6.1+).
    ///
    /// # Errors
    /// Returns the kernel's refusal.
    pub(super) fn new() -> io::Result<Self> {
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
        Ok(Self { ring, files, answers: Answers::default() })
    }

    /// Puts the queue's node into the table of files, if it has a place for `slot`.
    pub(super) fn register(&self, slot: usize, queue: &mut ServedQueue) {
        let node = queue.node.as_raw_fd();
        queue.fixed = slot < self.files as usize
            && self.ring.submitter().register_files_update(slot as u32, &[node]).is_ok();
    }

    /// Takes a node that was [registered](Self::register) out of the table of files.
    pub(super) fn unregister(&self, slot: usize) {
        let _ = self.ring.submitter().register_files_update(slot as u32, &[-1]);
    }

    /// Pushes a command for a tag: `struct ublksrv_io_cmd` of `ublk_cmd.h`: queue, tag, result, address.
    ///
    /// # Errors
    /// Returns the kernel's refusal to issue what was pushed before.
    pub(super) fn command(
        &mut self,
        queue: &ServedQueue,
        (slot, tag): (usize, u16),
        op: u32,
        address: u64,
        result: i32,
    ) -> io::Result<()> {
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
        queue.counters.submissions.add(1);
        self.push(&entry.user_data((slot as u64) << TAG_BITS | u64::from(tag)))
    }

    /// Pushes a poll on the mailbox's eventfd, which completes at every write of it.
    ///
    /// # Errors
    /// Returns the kernel's refusal to issue what was pushed before.
    pub(super) fn poll(&mut self, event: BorrowedFd<'_>) -> io::Result<()> {
        let event = types::Fd(event.as_raw_fd());
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
    ///
    /// # Errors
    /// Returns the kernel's refusal.
    pub(super) fn enter(&mut self, want: usize) -> io::Result<()> {
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

    /// Moves the completions that are there into `completions`.
    pub(super) fn reap(&mut self, completions: &mut Vec<Completion>) {
        let done = self.ring.completion();
        completions.extend(done.map(|done| (done.user_data(), done.result(), done.flags())));
    }
}
