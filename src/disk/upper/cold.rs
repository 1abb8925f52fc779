//! Reads of what was written that the page cache does not hold any more.
//!
//! Whoever asks a volume where bytes are must not be kept waiting, so a read that would wait for the disk is
//! done by a thread here. When it is done, the waiter is called, the same read is asked for again, and finds
//! its bytes kept. They are kept by their place in the data file, whose bytes never change: what was
//! overwritten meanwhile is never asked for again. That is the one case in which bytes stay, so the oldest go
//! when there are too many.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use crossbeam_channel::{Receiver, Sender, unbounded};

use crate::lsmt::{SharedLayer, WritableError};
use crate::units::{SECTOR, Sectors};
use crate::volume::{VolumeError, Waiter};

/// Reads that wait for the disk at a time. Those of one file, most often on one disk: more threads do not
/// make it faster.
const THREADS: usize = 2;

/// Bytes kept at most: twice what the queues of a ublk device of the default shape can ask for at a time.
const KEPT: usize = 64 << 20;

/// A part of the data file.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Part {
    at: Sectors,
    len: Sectors,
}

/// Somebody who waits for a part.
struct Job {
    part: Part,
    /// Byte of the disk, for messages.
    offset: u64,
    waiter: Waiter,
}

/// Parts that were read and not asked for again yet, the oldest first.
#[derive(Default)]
struct Kept {
    parts: VecDeque<(Part, Arc<Vec<u8>>)>,
    bytes: usize,
}

impl Kept {
    fn put(&mut self, part: Part, bytes: Vec<u8>) {
        self.bytes += bytes.len();
        self.parts.push_back((part, Arc::new(bytes)));
        while self.bytes > KEPT && self.parts.len() > 1 {
            self.bytes -= self.parts.pop_front().map_or(0, |(_, bytes)| bytes.len());
        }
    }

    fn take(&mut self, part: Part) -> Option<Arc<Vec<u8>>> {
        let index = self.parts.iter().position(|(own, _)| *own == part)?;
        let (_, bytes) = self.parts.remove(index)?;
        self.bytes -= bytes.len();
        Some(bytes)
    }
}

/// The threads.
pub(super) struct ColdReads {
    layer: Arc<SharedLayer>,
    kept: Arc<Mutex<Kept>>,
    jobs: Option<Sender<Job>>,
    threads: Vec<JoinHandle<()>>,
}

impl ColdReads {
    /// Threads that read from `layer`.
    pub(super) fn start(layer: &Arc<SharedLayer>) -> io::Result<Self> {
        let (jobs, queue) = unbounded();
        let kept = Arc::default();
        let mut this = Self {
            layer: layer.clone(),
            kept,
            jobs: Some(jobs),
            threads: Vec::with_capacity(THREADS),
        };
        for number in 0..THREADS {
            let (layer, kept, queue) = (layer.clone(), this.kept.clone(), queue.clone());
            let thread = std::thread::Builder::new()
                .name(format!("upper-read-{number}"))
                .spawn(move || serve(&layer, &kept, &queue))?;
            this.threads.push(thread);
        }
        Ok(this)
    }

    /// Sectors `at..at + len` of the data file, which are byte `offset` of the disk. `None`: the waiter was
    /// taken.
    pub(super) fn read(
        &self,
        at: Sectors,
        len: Sectors,
        offset: u64,
        waiter: &mut dyn FnMut() -> Waiter,
    ) -> Option<Arc<Vec<u8>>> {
        let part = Part { at, len };
        let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner).take(part);
        if kept.is_some() {
            return kept;
        }
        let mut sectors = vec![0; (len.0 * SECTOR) as usize];
        if self.layer.read_cached(at, &mut sectors) {
            return Some(Arc::new(sectors));
        }
        self.fetch(Job { part, offset, waiter: waiter() });
        None
    }

    fn fetch(&self, job: Job) {
        if let Some(jobs) = &self.jobs {
            // There is a sender until the drop, and threads that receive; else the waiter is dropped with the job.
            let _ = jobs.send(job);
        }
    }
}

impl Drop for ColdReads {
    /// Joins the threads: afterwards nobody has the layer's files open.
    fn drop(&mut self) {
        self.jobs = None;
        for thread in self.threads.drain(..) {
            if thread.thread().id() != std::thread::current().id() {
                let _ = thread.join();
            }
        }
    }
}

/// Body of a thread.
fn serve(layer: &SharedLayer, kept: &Mutex<Kept>, queue: &Receiver<Job>) {
    crate::fetch::mark_io_thread();
    while let Ok(Job { part, offset, waiter }) = queue.recv() {
        let mut sectors = vec![0; (part.len.0 * SECTOR) as usize];
        let read: Result<(), WritableError> = layer.read_data(part.at, &mut sectors);
        waiter(match read {
            Ok(()) => {
                kept.lock().unwrap_or_else(PoisonError::into_inner).put(part, sectors);
                Ok(())
            }
            Err(source) => Err(VolumeError::Upper { offset, source: Arc::new(source) }),
        });
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;
    use crate::lsmt::WritableLayer;
    use crate::lsmt::writer::Identity;
    use crate::units::Bytes;

    #[test]
    fn what_a_thread_has_read_is_kept_for_the_one_who_asks_again() {
        let dir = tempfile::tempdir().unwrap();
        let mut layer =
            WritableLayer::create(dir.path(), Bytes(1 << 20), Identity::default()).unwrap();
        let bytes: Vec<u8> = (0..4096_u32).map(|at| (at / 7) as u8).collect();
        layer.write(0, &bytes).unwrap();
        let cold = ColdReads::start(&Arc::new(SharedLayer::new(layer))).unwrap();
        let fetch = |at, len| {
            let (sender, receiver) = channel();
            let waiter: Waiter = Box::new(move |result| sender.send(result).unwrap());
            let part = Part { at: Sectors(at), len: Sectors(len) };
            cold.fetch(Job { part, offset: 512, waiter });
            receiver.recv().unwrap()
        };
        fetch(8 + 2, 3).unwrap();
        assert_eq!(cold.kept.lock().unwrap().bytes, 3 * 512);
        let mut unasked = || -> Waiter { panic!("it was kept") };
        let found = cold.read(Sectors(8 + 2), Sectors(3), 512, &mut unasked).unwrap();
        assert_eq!(found[..], bytes[2 * 512..5 * 512]);
        assert_eq!(cold.kept.lock().unwrap().bytes, 0);
        let error = fetch(1 << 30, 1).unwrap_err();
        assert!(matches!(error, VolumeError::Upper { offset: 512, .. }), "{error}");
    }

    #[test]
    fn what_nobody_asks_for_again_does_not_stay_for_ever() {
        let mut kept = Kept::default();
        for at in 0..100 {
            let part = Part { at: Sectors(at), len: Sectors(2048) };
            kept.put(part, vec![0; 1 << 20]);
        }
        assert_eq!((kept.bytes, kept.parts.len()), (KEPT, 64));
        assert!(kept.take(Part { at: Sectors(35), len: Sectors(2048) }).is_none());
        assert!(kept.take(Part { at: Sectors(36), len: Sectors(2048) }).is_some());
    }
}
