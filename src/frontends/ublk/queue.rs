//! A queue of a device: its parts before it is served, and its state while it is.

use std::fs::File;
use std::io;
use std::sync::{Arc, mpsc};

use crossbeam_channel::{Receiver, Sender};
use rustix::thread::CpuSet;

use super::descriptors::Descriptors;
use super::request::BlockRequest;
use super::writer::{DeviceWriter, QueueWrites};
use crate::counters::FrontCounters;
use disk::volume::Volume;

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
    pub(super) writer: Option<DeviceWriter>,
    /// Its device's counters.
    pub(super) counters: Arc<FrontCounters>,
    /// True if its device survives this process: then a thread that fails must end the process.
    pub(super) survives: bool,
    /// CPUs whose requests come here.
    pub(super) cpus: Option<CpuSet>,
    /// Receives a message when all tags are armed, or the reason why they are not.
    pub(super) armed: mpsc::Sender<io::Result<()>>,
    /// Dropped when the queue is gone.
    pub(super) gone: Sender<()>,
}

/// A queue that is served.
pub(super) struct ServedQueue {
    /// Its number in its device.
    pub(super) number: u16,
    /// The device's character node.
    pub(super) node: Arc<File>,
    /// True if the node is in the ring's table, at the queue's slot.
    pub(super) fixed: bool,
    /// Mask of the command numbers: kernels before 6.4 know only the short ones.
    pub(super) mask: u32,
    requests: Descriptors,
    /// The disk.
    pub(super) volume: Arc<dyn Volume>,
    /// Writes in progress, if the disk can be changed.
    pub(super) writes: Option<QueueWrites>,
    /// Its device's counters.
    pub(super) counters: Arc<FrontCounters>,
    /// Per tag: the wait that is open, if any.
    pub(super) waiting: Vec<Option<u32>>,
    /// Number of tags that the driver still holds or that this thread works on.
    pub(super) live: u32,
    _gone: Sender<()>,
}

impl ServedQueue {
    /// Maps the requests of a new queue, and creates its state. The node is in no ring's table yet.
    ///
    /// # Errors
    /// Returns the system's refusal to map.
    pub(super) fn new(new: NewQueue) -> io::Result<Self> {
        let requests = Descriptors::map(&new.node, new.number, new.depth)?;
        Ok(Self {
            number: new.number,
            node: new.node,
            fixed: false,
            mask: if new.encoded { u32::MAX } else { 0xff },
            requests,
            volume: new.volume,
            writes: new.writer.map(|writer| QueueWrites::new(writer, new.depth)),
            counters: new.counters,
            waiting: vec![None; new.depth.into()],
            live: new.depth.into(),
            _gone: new.gone,
        })
    }

    /// True if the queue has this tag.
    pub(super) fn has(&self, tag: u16) -> bool {
        usize::from(tag) < self.waiting.len()
    }

    /// The request of a tag.
    pub(super) fn request(&self, tag: u16) -> BlockRequest {
        BlockRequest::of(&self.requests.get(tag))
    }
}

/// Waits until the queues with these `gone` senders are gone.
pub(super) fn wait_until_gone(gone: &Receiver<()>) {
    while gone.recv().is_ok() {}
}
