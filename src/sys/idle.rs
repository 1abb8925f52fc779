//! Work of the idle class: it runs when nothing else wants the processor, or the disk.
//!
//! A thread of the class `SCHED_IDLE` gets a processor that no other thread wants, and of a busy one some thousandths (its
//! weight is 3, that of an ordinary thread 1024). So a thread of this class that is stopped half-way may stay stopped for
//! a second, with all that it holds. Two rules follow.
//!
//! * **A lock is never held in this class.** A thread enters it for one computation on memory of its own
//!   ([`IdleThread::run`]), and is back in its ordinary class before it touches what others share. The allocator has
//!   locks too, and so has the kernel's map of the process's memory, which a page fault holds: memory is taken before, and
//!   [touched](fault_in). What a decoder allocates for itself remains: some hundred nanoseconds of some milliseconds.
//! * **What a reader waits for is not left in this class.** The thread that is asked for its result is
//!   [raised](IdleThread::raise) by the one that asks.
//!
//! A thread may return to the ordinary class if the limit `RLIMIT_NICE` allows nice 0. The daemon may raise this limit
//! (`CAP_SYS_RESOURCE`); where it cannot be raised, no thread enters the class, because none would come out of it. A
//! thread of a cgroup competes with the threads of its own cgroup only: between cgroups their weights decide.
//!
//! The idle class of the disk (`IOPRIO_CLASS_IDLE`) counts for the schedulers that know it (BFQ, mq-deadline). It is set for
//! threads that write or read ahead of all readers, for good.
//!
//! `unsafe` is needed for `sched_setscheduler(2)` and `ioprio_set(2)`, which neither the standard library nor `rustix` offers.
#![allow(unsafe_code)]

use std::io;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use libc::{c_int, pid_t};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// The value of `RLIMIT_NICE` that allows nice 0: 20 less the nice value (`getrlimit(2)`).
const NICE_0: u64 = 20;

/// Least size of a page of memory on all systems.
const PAGE: usize = 4096;

/// `IOPRIO_WHO_PROCESS`: one thread, whatever the name says (`ioprio_set(2)`).
const ONE_THREAD: c_int = 1;

/// The idle class of `ioprio_set(2)`, at its place above the 13 bits of the priority within the class.
const DISK_IDLE: c_int = 3 << 13;

/// A thread that does some of its work in the idle class, as others see it.
#[derive(Debug)]
pub struct IdleThread {
    id: pid_t,
    /// True when the work is waited for: the thread stays in, or returns to, its ordinary class.
    urgent: AtomicBool,
}

/// Leaves the class at the end of the work, or at its panic.
struct Leave<'a>(&'a IdleThread);

impl Drop for Leave<'_> {
    fn drop(&mut self) {
        set_class(self.0.id, libc::SCHED_OTHER);
    }
}

impl IdleThread {
    /// The calling thread.
    #[must_use]
    pub fn current() -> Self {
        let id = rustix::thread::gettid().as_raw_nonzero().get();
        Self { id, urgent: AtomicBool::new(false) }
    }

    /// Begins a new piece of work, which is not urgent yet. Call it before others can find the piece.
    pub fn begin(&self) {
        self.urgent.store(false, Ordering::SeqCst);
    }

    /// Computes in the idle class, unless the piece is urgent or the class cannot be left again. Only the thread itself
    /// calls this, and `work` takes no lock.
    pub fn run<T>(&self, work: impl FnOnce() -> T) -> T {
        if self.urgent.load(Ordering::SeqCst) || !can_return() {
            return work();
        }
        let _leave = Leave(self);
        set_class(self.id, libc::SCHED_IDLE);
        // Raised between the look above and the change: the change came last.
        if self.urgent.load(Ordering::SeqCst) {
            set_class(self.id, libc::SCHED_OTHER);
        }
        work()
    }

    /// Makes the present piece of work urgent: the thread continues in its ordinary class. The caller makes sure that the
    /// thread exists.
    pub fn raise(&self) {
        self.urgent.store(true, Ordering::SeqCst);
        if can_return() {
            set_class(self.id, libc::SCHED_OTHER);
        }
    }
}

/// True if a thread of the idle class may return to its ordinary class. The first call raises the limit, and tries it on a
/// thread of its own.
#[must_use]
pub fn can_return() -> bool {
    static RESULT: OnceLock<bool> = OnceLock::new();
    *RESULT.get_or_init(|| {
        let limit = getrlimit(Resource::Nice);
        if limit.current.is_some_and(|now| now < NICE_0) {
            let maximum = limit.maximum.map(|most| most.max(NICE_0));
            let _ = setrlimit(Resource::Nice, Rlimit { current: Some(NICE_0), maximum });
        }
        let there_and_back = || set_class(0, libc::SCHED_IDLE) && set_class(0, libc::SCHED_OTHER);
        std::thread::spawn(there_and_back).join().unwrap_or(false)
    })
}

/// Touches each page of memory that will be overwritten, so that it is there before the idle class is entered.
pub fn fault_in(memory: &mut [u8]) {
    memory.iter_mut().step_by(PAGE).for_each(|byte| *byte = 1);
    std::hint::black_box(memory);
}

/// Puts a thread (0: the calling one) into a scheduling class; false if the system refuses.
fn set_class(thread: pid_t, class: c_int) -> bool {
    // SAFETY: every field of the structure is a number, for which zero is a value.
    let none: libc::sched_param = unsafe { std::mem::zeroed() };
    // SAFETY: the call reads the structure, and changes nothing in this process's memory.
    unsafe { libc::sched_setscheduler(thread, class, &raw const none) == 0 }
}

/// Puts the disk accesses of the calling thread into the idle class, for good.
///
/// # Errors
/// Returns the system's refusal: the thread's accesses then compete with others.
pub fn yield_disk() -> io::Result<()> {
    // SAFETY: the call takes three numbers, and changes nothing in this process's memory.
    let result = unsafe { libc::syscall(libc::SYS_ioprio_set, ONE_THREAD, 0, DISK_IDLE) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::mpsc::channel;

    use super::*;

    /// The scheduling class of a thread of this process (`sched_getscheduler(2)`).
    fn class(thread: pid_t) -> c_int {
        // SAFETY: the call takes a number and returns one.
        unsafe { libc::sched_getscheduler(thread) }
    }

    #[test]
    fn work_is_of_the_idle_class_only_while_it_lasts_and_where_it_can_be_left() {
        let thread = IdleThread::current();
        let expected = if can_return() { libc::SCHED_IDLE } else { libc::SCHED_OTHER };
        assert_eq!(thread.run(|| class(0)), expected);
        assert_eq!(class(0), libc::SCHED_OTHER);
        let panicked = std::panic::catch_unwind(|| thread.run(|| panic!("the work panics")));
        assert!(panicked.is_err() && class(0) == libc::SCHED_OTHER);
    }

    #[test]
    fn a_thread_whose_work_is_waited_for_is_raised_by_the_one_that_waits() {
        let ((give, take), (ask, answer), (go, wait)) = (channel(), channel(), channel());
        let worker = std::thread::spawn(move || {
            let own = Arc::new(IdleThread::current());
            give.send(own.clone()).unwrap();
            own.run(|| {
                ask.send(()).unwrap();
                wait.recv().unwrap();
                class(0)
            })
        });
        let thread: Arc<IdleThread> = take.recv().unwrap();
        answer.recv().unwrap();
        thread.raise();
        go.send(()).unwrap();
        assert_eq!(worker.join().unwrap(), libc::SCHED_OTHER);
    }

    #[test]
    fn urgent_work_never_enters_the_class_and_the_next_piece_does_again() {
        let thread = IdleThread::current();
        thread.raise();
        assert_eq!(thread.run(|| class(0)), libc::SCHED_OTHER);
        thread.begin();
        assert_eq!(thread.run(|| class(0)) == libc::SCHED_IDLE, can_return());
    }

    #[test]
    fn the_disk_accesses_of_a_thread_can_yield() {
        let class = std::thread::spawn(|| {
            yield_disk().unwrap();
            // SAFETY: the call takes two numbers and returns one.
            unsafe { libc::syscall(libc::SYS_ioprio_get, ONE_THREAD, 0) }
        });
        assert_eq!(class.join().unwrap(), libc::c_long::from(DISK_IDLE));
    }
}
