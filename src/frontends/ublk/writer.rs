//! The write path of a writable device.
//!
//! The kernel announces a write without its data. The queue thread answers with the address of a buffer as
//! long as the write (`NEED_GET_DATA`); the kernel copies the data there, at the latest when it completes
//! that command, and so hands the request over. The volume then stores the bytes, and after that the tag is
//! committed.
//!
//! Storing is file I/O: an append may wait for memory to be written back, a flush for the disk. A queue
//! thread, which serves other tags and other devices, must not wait; so a few *write threads* of the device
//! do it, and answer through the mailbox as a fetch does. Each device has its own, because the slow disk of
//! one device must not hold up another. They are marked with `PR_SET_IO_FLUSHER`: memory that they allocate
//! never waits for pages to be written to the very device that they serve.
//!
//! The block layer sends a flush after the writes that it covers were answered, and keeps no other order; so
//! this code keeps no other order either. A write with FUA is a write and a flush.
//!
//! A buffer belongs to its tag from the announcement on, then to the write thread that stores it. There are
//! never more than the device has tags (2 × 64 × 256 KiB for a device with default options), and a few are
//! kept. A read-only device has no buffers and no write threads.

use std::sync::Arc;

use crossbeam_channel::{Receiver, Sender, unbounded};
use parking_lot::Mutex;

use super::UblkError;
use super::request::{BlockRequest, Op};
use disk::DiskRange;
use disk::volume::{Volume, VolumeError, Waiter, WritableVolume};
use threads::{Pool, mark_io_thread};

/// Number of write threads of a device. One may be in a flush for long, and each queue's block layer sends
/// one at a time.
const THREADS: usize = 4;

/// Name of the write threads, before their number.
const THREAD_NAME: &str = "ublk-write";

/// Number of returned buffers that are kept for reuse.
const SPARE: usize = 8;

/// A change of the disk.
enum DiskChange {
    Write { bytes: Vec<u8>, durable: bool },
    Zero,
    Flush,
}

struct WriteJob {
    /// Empty for a flush.
    range: DiskRange,
    change: DiskChange,
    done: Waiter,
}

/// Unused buffers.
type Spare = Arc<Mutex<Vec<Vec<u8>>>>;

/// Hands changes to a device's write threads.
#[derive(Clone)]
pub(super) struct DeviceWriter {
    jobs: Sender<Option<WriteJob>>,
    spare: Spare,
}

impl DeviceWriter {
    fn buffer(&self, len: usize) -> Vec<u8> {
        let spare = self.spare.lock().pop();
        let mut buffer = spare.unwrap_or_default();
        buffer.resize(len, 0);
        buffer
    }
}

/// The write threads of a device. Dropping it ends them.
pub(super) struct WriterThreads {
    writer: DeviceWriter,
    threads: Pool,
}

impl WriterThreads {
    /// Starts threads that change `volume`; `None` if it cannot be changed.
    pub(super) fn start(volume: &Arc<dyn Volume>) -> Result<Option<Self>, UblkError> {
        if volume.writable().is_none() {
            return Ok(None);
        }
        let (jobs, queue) = unbounded();
        let writer = DeviceWriter { jobs, spare: Spare::default() };
        let mut this = Self { writer, threads: Pool::default() };
        for number in 0..THREADS {
            let (volume, queue, spare) = (volume.clone(), queue.clone(), this.writer.spare.clone());
            let body = move || {
                mark_io_thread();
                if let Some(volume) = volume.writable() {
                    serve(volume, &queue, &spare);
                }
            };
            let name = || format!("{THREAD_NAME}-{number}");
            let started = this.threads.spawn(THREAD_NAME, body);
            started.map_err(|source| UblkError::Thread { name: name(), source })?;
        }
        Ok(Some(this))
    }

    /// A sender for the queues.
    pub(super) fn writer(&self) -> DeviceWriter {
        self.writer.clone()
    }
}

impl Drop for WriterThreads {
    /// After an orderly stop of the device no work is left. Otherwise a later change fails, as its waiter is
    /// dropped with the channel.
    fn drop(&mut self) {
        for _ in 0..self.threads.len() {
            let _ = self.writer.jobs.send(None);
        }
        self.threads.take().join();
    }
}

/// Body of a write thread; `None` in the queue ends one.
fn serve(volume: &dyn WritableVolume, queue: &Receiver<Option<WriteJob>>, spare: &Spare) {
    while let Ok(Some(WriteJob { range, change, done })) = queue.recv() {
        let result = match change {
            DiskChange::Write { bytes, durable } => {
                let result = write(volume, range.offset, &bytes, durable);
                let mut spare = spare.lock();
                if spare.len() < SPARE {
                    spare.push(bytes);
                }
                result
            }
            DiskChange::Zero => volume.discard(range),
            DiskChange::Flush => volume.flush(),
        };
        done(result);
    }
}

fn write(
    volume: &dyn WritableVolume,
    offset: u64,
    bytes: &[u8],
    durable: bool,
) -> Result<(), VolumeError> {
    volume.write_at(bytes, offset)?;
    if durable { volume.flush() } else { Ok(()) }
}

/// Writes in progress of one queue of a writable device.
pub(super) struct QueueWrites {
    writer: DeviceWriter,
    /// Per tag: the buffer that the kernel fills; empty if there is none.
    filling: Vec<Vec<u8>>,
}

impl QueueWrites {
    /// Creates the state of a queue with `depth` tags.
    pub(super) fn new(writer: DeviceWriter, depth: u16) -> Self {
        Self { writer, filling: vec![Vec::new(); depth.into()] }
    }

    /// Destination of the data of an announced write. `None` for a request without data (6.1 announces
    /// flushes).
    pub(super) fn let_in(&mut self, tag: u16, request: &BlockRequest) -> Option<u64> {
        let place = self.filling.get_mut(usize::from(tag))?;
        if !matches!(request.op, Op::Write { .. }) || request.range.is_empty() {
            return None;
        }
        *place = self.writer.buffer(request.range.buffer_len());
        Some(place.as_mut_ptr() as u64)
    }

    /// Records that the driver has taken the tag back, and with it the announced write.
    pub(super) fn gave_up(&mut self, tag: u16) {
        if let Some(place) = self.filling.get_mut(usize::from(tag)) {
            *place = Vec::new();
        }
    }

    /// Begins a change; `done` is called when it has ended. `false`: the request is not a change that this
    /// device supports.
    pub(super) fn begin(
        &mut self,
        tag: u16,
        request: &BlockRequest,
        done: impl FnOnce() -> Waiter,
    ) -> bool {
        let change = match request.op {
            Op::Write { durable } => {
                let place = self.filling.get_mut(usize::from(tag));
                let mut bytes = place.map(std::mem::take).unwrap_or_default();
                // The kernel may have copied less than it announced, and then asks for less: the rest comes
                // as another request.
                if (bytes.len() as u64) < request.range.len {
                    return false;
                }
                bytes.truncate(request.range.buffer_len());
                DiskChange::Write { bytes, durable }
            }
            Op::Zero => DiskChange::Zero,
            Op::Flush => DiskChange::Flush,
            Op::Read | Op::Other => return false,
        };
        // Fails when the threads have ended; the waiter is then dropped, which fails the request.
        let _ =
            self.writer.jobs.send(Some(WriteJob { range: request.range, change, done: done() }));
        true
    }
}

impl Drop for QueueWrites {
    /// A queue whose thread has failed may leave buffers that the kernel still fills: they must stay.
    fn drop(&mut self) {
        self.filling.drain(..).for_each(std::mem::forget);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;
    use disk::testing::MemoryVolume;
    use disk::volume::Located;

    /// Records its calls, and fails those that it is told to.
    #[derive(Default)]
    struct Noted(Mutex<Vec<String>>);

    impl Volume for Noted {
        fn size(&self) -> u64 {
            1 << 20
        }
        fn locate(
            &self,
            range: DiskRange,
            _: &mut dyn FnMut() -> Waiter,
        ) -> Result<Located, VolumeError> {
            Err(VolumeError::Closed { offset: range.offset })
        }
        fn writable(&self) -> Option<&dyn WritableVolume> {
            Some(self)
        }
    }

    impl Noted {
        fn note(&self, text: String) -> Result<(), VolumeError> {
            self.0.lock().push(text);
            Ok(())
        }
    }

    impl WritableVolume for Noted {
        fn write_at(&self, bytes: &[u8], offset: u64) -> Result<(), VolumeError> {
            if offset == 512 {
                return Err(VolumeError::Injected { offset });
            }
            self.note(format!("write {offset} {}", bytes.len()))
        }
        fn discard(&self, range: DiskRange) -> Result<(), VolumeError> {
            self.note(format!("zero {range}"))
        }
        fn flush(&self) -> Result<(), VolumeError> {
            self.note("flush".into())
        }
    }

    /// Runs one request to its end; `None`: the request is not supported.
    fn run(writes: &mut QueueWrites, op: Op, offset: u64, len: u64) -> Option<bool> {
        let request = BlockRequest { op, range: DiskRange::new(offset, len) };
        let announced = writes.let_in(3, &request).is_some();
        assert_eq!(announced, matches!(op, Op::Write { .. }));
        let (sender, receiver) = channel();
        let done = || -> Waiter { Box::new(move |result| sender.send(result.is_ok()).unwrap()) };
        writes.begin(3, &request, done).then(|| receiver.recv().unwrap())
    }

    #[test]
    fn each_request_becomes_what_the_volume_knows_and_fua_a_flush_after_the_write() {
        let noted = Arc::new(Noted::default());
        let volume: Arc<dyn Volume> = noted.clone();
        let threads = WriterThreads::start(&volume).unwrap().unwrap();
        let mut writes = QueueWrites::new(threads.writer(), 4);
        assert_eq!(run(&mut writes, Op::Write { durable: false }, 4096, 1024), Some(true));
        assert_eq!(run(&mut writes, Op::Write { durable: true }, 0, 512), Some(true));
        assert_eq!(run(&mut writes, Op::Write { durable: true }, 512, 512), Some(false));
        assert_eq!(run(&mut writes, Op::Zero, 8192, 1 << 32), Some(true));
        assert_eq!(run(&mut writes, Op::Flush, u64::MAX, 0), Some(true));
        assert_eq!(run(&mut writes, Op::Other, 0, 512), None);
        let expected =
            ["write 4096 1024", "write 0 512", "flush", "zero 8192..4294975488", "flush"];
        assert_eq!(*noted.0.lock(), expected);
        // A write whose data never came does not happen.
        let request =
            BlockRequest { op: Op::Write { durable: false }, range: DiskRange::new(0, 512) };
        assert!(!writes.begin(3, &request, || Box::new(|_| ())));
    }

    #[test]
    fn what_comes_after_the_end_is_told_that_nobody_does_it() {
        let volume: Arc<dyn Volume> = Arc::new(Noted::default());
        let threads = WriterThreads::start(&volume).unwrap().unwrap();
        let mut writes = QueueWrites::new(threads.writer(), 1);
        drop(threads);
        let (sender, receiver) = channel::<()>();
        let request = BlockRequest { op: Op::Flush, range: DiskRange::new(0, 0) };
        writes.begin(0, &request, || {
            Box::new(move |result| {
                if result.is_ok() {
                    let _ = sender.send(());
                }
            })
        });
        assert!(receiver.recv().is_err(), "its waiter was dropped");
    }

    #[test]
    fn a_disk_that_cannot_be_written_has_no_threads() {
        let volume: Arc<dyn Volume> = Arc::new(MemoryVolume::new(vec![0; 512]));
        assert!(WriterThreads::start(&volume).unwrap().is_none());
    }
}
