//! The block device: `/dev/ublkbN`, served from this process.
//!
//! # Path of a read
//!
//! The kernel's ublk driver hands each block request of the disk to a *queue thread* of this process, as the
//! completion of an `io_uring` command that the thread left with the driver: one command for each *tag*
//! (request slot) of each queue. The thread looks the bytes up ([`Volume::locate`]) and answers with the next
//! command, `COMMIT_AND_FETCH`, which carries the result and re-arms the tag: one submission and one
//! completion a request.
//!
//! In the driver's copy mode the commit carries the address to copy *from*, and every commit may name another
//! address. So the commit names the address of the decoded chunk itself: the kernel copies from this
//! process's cache into the reader's pages, without a copy in user space. A hole commits a shared zero area.
//! Only a request whose bytes lie in several places is gathered first into a scratch buffer (counted in
//! [`FrontTotals::gathered`]). The request size is bounded by [`UblkOptions::chunk`], so most requests lie in one
//! place.
//!
//! The kernel copies while it *issues* the commit, that is, inside `io_uring_enter`. A chunk's guard is
//! therefore kept until the enter that issued the commit has returned, and the ring uses no feature that
//! would issue later (no SQPOLL, no links, no `IOSQE_ASYNC`).
//!
//! # Threads
//!
//! A few queue threads serve all devices (`threads`): a thousand devices have two thousand queues and still
//! two threads.
//!
//! # Waiting
//!
//! A queue thread never blocks on anything but its ring: otherwise one slow fetch would stop all its queues,
//! the kernel's partition scan included. For bytes that are not there yet, the volume keeps a waiter that
//! puts the tag into the thread's mailbox, and writes an eventfd only if the thread sleeps.
//!
//! # Writes
//!
//! With `UBLK_F_NEED_GET_DATA` the driver announces a write before its data are copied, and the queue thread
//! names their destination. A volume that can be written ([`WritableVolume`]) makes a writable device: a
//! write gets a buffer of its own, is stored by a thread that may wait for the disk, and then committed
//! (`writer`). The same threads flush, and write zeros for discards.
//!
//! Any other disk is read-only, but the kernel's block layer only warns about a write that arrives anyway:
//! its data are copied into a dummy buffer, and it is refused. Without the flag they would be copied to the
//! address of the tag's last commit: into the cache.
//!
//! # Contents
//!
//! * [`probe`]    features of this kernel's ublk, and kernels that must not use it
//! * `features`   features that are requested
//! * `device`     a device's options and lifetime
//! * `running`    a device on the queue threads, set up by the commands of `control`
//! * [`recovery`] a device that outlives its server, and its next server
//! * `threads`    the queue threads
//! * `driver`     body of a queue thread
//! * `queue`      a queue that a thread serves, with its request `descriptors`
//! * `ring`       a thread's ring, with the memory that its commits point to
//! * `request`    requests from the driver
//! * `answer`     from a request to the address that is committed for it
//! * `writer`     additions for a writable device: buffers, and threads that store them
//! * `mailbox`    from waiters to a queue thread
//!
//! Only this module names the crate `libublk`, whose interface changes between releases.
//!
//! [`FrontTotals::gathered`]: crate::FrontTotals::gathered
//! [`Volume::locate`]: disk::volume::Volume::locate
//! [`WritableVolume`]: disk::volume::WritableVolume

mod answer;
mod control;
mod descriptors;
mod device;
mod driver;
mod features;
mod mailbox;
pub mod probe;
mod queue;
pub mod recovery;
mod request;
mod ring;
mod running;
mod threads;
mod writer;

pub use device::{UblkDevice, UblkOptions};

use thiserror::Error;

/// Reasons why a ublk device could not be created or removed.
#[derive(Debug, Error)]
pub enum UblkError {
    /// This kernel has no ublk.
    #[error("This kernel ({kernel}) has no ublk: {reason}")]
    Unavailable {
        /// `uname -r`.
        kernel: String,
        /// The missing part.
        reason: String,
    },
    /// The kernel would crash.
    #[error("Kernel {kernel} must not be used with ublk: {reason}")]
    KnownBadKernel {
        /// `uname -r`.
        kernel: String,
        /// The known defect.
        reason: &'static str,
    },
    /// An option is outside the driver's limits.
    #[error("A ublk device cannot have {what} {value}: {rule}")]
    Option {
        /// The option.
        what: &'static str,
        /// Its value.
        value: u64,
        /// The allowed values.
        rule: &'static str,
    },
    /// The driver refused a control command.
    #[error("The ublk driver refused to {what}")]
    Control {
        /// The command.
        what: &'static str,
        /// The driver's answer.
        #[source]
        source: std::io::Error,
    },
    /// A queue thread could not be set up.
    #[error("Queue {queue} of the ublk device failed at {what}")]
    Queue {
        /// Number of the queue.
        queue: u16,
        /// The step.
        what: &'static str,
        /// The step's failure.
        #[source]
        source: std::io::Error,
    },
    /// A device could not be taken back, and is gone.
    #[error("ublk device {id} is lost: its readers got EIO")]
    LostInRecovery {
        /// Its number.
        id: u32,
        /// The step that failed.
        #[source]
        source: Box<UblkError>,
    },
    /// A thread could not be started.
    #[error("Cannot start the thread {name}")]
    Thread {
        /// Its name.
        name: String,
        /// The system's answer.
        #[source]
        source: std::io::Error,
    },
    /// The device was started but its node did not appear.
    #[error("{path} did not appear within {seconds} s: is /dev a devtmpfs, or does udev run here?")]
    Node {
        /// The expected path.
        path: String,
        /// Seconds waited.
        seconds: u64,
    },
}

impl UblkError {
    /// True if a device that could not be [taken back](UblkDevice::take_back) is as it was before: quiesced, for another try.
    #[must_use]
    pub fn leaves_the_device(&self) -> bool {
        !matches!(self, Self::LostInRecovery { .. })
    }
}
