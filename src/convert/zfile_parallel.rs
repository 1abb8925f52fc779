//! A `ZFile` writer on all cores, with exactly the output of [`ZFileWriter`].
//!
//! Blocks are independent, so they can be compressed in any order; only their positions depend on the lengths
//! of the blocks in front. The caller's bytes are cut into *batches* of whole blocks. Each batch goes to a
//! free worker, and a slot for its result goes into a queue in the order of the file. One more thread empties
//! that queue into the output.
//!
//! ```text
//! caller ── batch ──▶ worker ─┐
//!    │                worker ─┤ packed blocks
//!    └── slot, in order ──────┴──▶ output thread ──▶ ZFileWriter ──▶ file
//! ```
//!
//! Both queues are bounded, so a slow output slows the caller, and only a few batches are in memory.

use std::io::{self, Seek, Write};
use std::thread::{self, JoinHandle};

use crossbeam_channel::{Receiver, Sender, bounded};

use formats::zfile::ZFileError;
use formats::zfile::block::BlockEncoder;
use formats::zfile::writer::{Options, PackedBlocks, Summary, ZFileWriter};

/// Plain bytes of a batch: many blocks of any size, so that the cost of passing it on is negligible.
const BATCH: usize = 256 << 10;

/// Batches in progress per worker: one in work, one waiting, one being filled or written.
const AHEAD: usize = 4;

/// A batch, and the slot for its result.
struct CompressJob {
    plain: Vec<u8>,
    done: Sender<Result<PackedBlocks, ZFileError>>,
}

type Slot = Receiver<Result<PackedBlocks, ZFileError>>;

/// Compresses its input on several threads. Close it with [`finish`](Self::finish); if it is dropped before,
/// the output stays incomplete.
pub struct ParallelWriter<W> {
    batch: Vec<u8>,
    jobs: Option<Sender<CompressJob>>,
    slots: Option<Sender<Slot>>,
    /// Buffers returned by the workers.
    spare: Receiver<Vec<u8>>,
    workers: Vec<JoinHandle<()>>,
    output: Option<JoinHandle<Result<ZFileWriter<W>, ZFileError>>>,
    /// The first failure.
    failed: Option<ZFileError>,
}

impl<W: Write + Seek + Send + 'static> ParallelWriter<W> {
    /// Begins a file at the present position of `out`, with this number of workers (at least one).
    ///
    /// # Errors
    /// The errors of [`ZFileWriter::new`], and [`ZFileError::Write`] if a thread cannot be started.
    pub fn new(out: W, options: Options, workers: usize) -> Result<Self, ZFileError> {
        let writer = ZFileWriter::new(out, options)?;
        let workers = workers.max(1);
        let (jobs, job_queue) = bounded::<CompressJob>(workers * AHEAD);
        let (slots, slot_queue) = bounded::<Slot>(workers * AHEAD);
        let (give_back, spare) = bounded(workers * AHEAD * 2);
        let mut threads = Vec::with_capacity(workers);
        for _ in 0..workers {
            let encoder = BlockEncoder::new(&options)?;
            let (queue, give_back) = (job_queue.clone(), give_back.clone());
            let block_size = options.block_size as usize;
            threads.push(
                thread::Builder::new()
                    .name("zfile-block".into())
                    .spawn(move || compress(encoder, block_size, &queue, &give_back))?,
            );
        }
        let output = thread::Builder::new()
            .name("zfile-out".into())
            .spawn(move || put_in_order(writer, &slot_queue))?;
        Ok(Self {
            batch: Vec::with_capacity(BATCH),
            jobs: Some(jobs),
            slots: Some(slots),
            spare,
            workers: threads,
            output: Some(output),
            failed: None,
        })
    }

    /// Waits for all blocks and completes the file; the result is that of [`ZFileWriter::finish`].
    ///
    /// # Errors
    /// [`ZFileError::BlockTooLong`], [`ZFileError::Write`].
    pub fn finish(mut self) -> Result<(W, Summary), ZFileError> {
        let sent = self.send_batch();
        let writer = self.join()?;
        sent.map_err(ZFileError::from)?;
        writer.finish()
    }

    /// Sends the collected bytes to a worker.
    fn send_batch(&mut self) -> io::Result<()> {
        if self.batch.is_empty() {
            return Ok(());
        }
        let next = self.spare.try_recv().unwrap_or_else(|_| Vec::with_capacity(BATCH));
        let plain = std::mem::replace(&mut self.batch, next);
        let (done, slot) = bounded(1);
        let taken = match (&self.slots, &self.jobs) {
            (Some(slots), Some(jobs)) => {
                slots.send(slot).is_ok() && jobs.send(CompressJob { plain, done }).is_ok()
            }
            _ => false,
        };
        if taken {
            return Ok(());
        }
        // The output thread has ended; its result gives the reason.
        let error = match self.join() {
            Ok(_) => io::Error::other("The output of a ZFile ended early").into(),
            Err(error) => error,
        };
        Err(io::Error::other(error))
    }

    /// Ends all threads and returns the writer, or the first failure.
    fn join(&mut self) -> Result<ZFileWriter<W>, ZFileError> {
        (self.jobs, self.slots) = (None, None);
        for worker in self.workers.drain(..) {
            let _ = worker.join(); // its panic leaves a slot without a result
        }
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        let lost = || ZFileError::from(io::Error::other("A compression thread ended early"));
        let result = match self.output.take() {
            Some(output) => output.join().unwrap_or_else(|_| Err(lost())),
            None => Err(lost()),
        };
        if let Err(error) = &result {
            self.failed = Some(error.clone());
        }
        result
    }
}

impl<W: Write + Seek + Send + 'static> Write for ParallelWriter<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if let Some(error) = &self.failed {
            return Err(io::Error::other(error.clone()));
        }
        let taken = bytes.len().min(BATCH - self.batch.len());
        self.batch.extend_from_slice(&bytes[..taken]);
        if self.batch.len() == BATCH {
            self.send_batch()?;
        }
        Ok(taken)
    }

    /// Does nothing: only full blocks are complete.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The loop of a worker.
fn compress(
    mut encoder: BlockEncoder,
    block_size: usize,
    jobs: &Receiver<CompressJob>,
    give_back: &Sender<Vec<u8>>,
) {
    for CompressJob { mut plain, done } in jobs {
        let mut packed = PackedBlocks {
            bytes: Vec::with_capacity(plain.len()),
            lengths: Vec::with_capacity(plain.len() / block_size + 1),
            plain_len: plain.len() as u64,
        };
        let mut result = Ok(());
        for block in plain.chunks(block_size) {
            match encoder.encode(block, &mut packed.bytes) {
                Ok(stored) => packed.lengths.push(stored),
                Err(error) => {
                    result = Err(error);
                    break;
                }
            }
        }
        let _ = done.send(result.map(|()| packed)); // after a failure the receiver is gone
        plain.clear();
        let _ = give_back.try_send(plain);
    }
}

/// The loop of the output thread.
fn put_in_order<W: Write>(
    mut writer: ZFileWriter<W>,
    slots: &Receiver<Slot>,
) -> Result<ZFileWriter<W>, ZFileError> {
    for slot in slots {
        let lost = |_| ZFileError::from(io::Error::other("A compression thread ended early"));
        writer.put_packed(&slot.recv().map_err(lost)??)?;
    }
    Ok(writer)
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use super::*;
    use formats::zfile::Algo;

    fn sample(len: usize) -> Vec<u8> {
        (0..len)
            .map(|at| if at % 9000 < 5000 { (at / 31) as u8 } else { ((at * at) >> 7) as u8 })
            .collect()
    }

    #[test]
    fn any_number_of_threads_and_any_cut_of_the_input_give_the_bytes_of_one_thread() {
        let plain = sample(1_300_007);
        for (algo, block_size) in
            [(Algo::Lz4, 4096), (Algo::Lz4, 65536), (Algo::Zstd, 4096), (Algo::Zstd, 16384)]
        {
            let options = Options { algo, block_size, ..Options::default() };
            let mut writer = ZFileWriter::new(Cursor::new(Vec::new()), options).unwrap();
            writer.write_all(&plain).unwrap();
            let (alone, summary) = writer.finish().unwrap();
            for (workers, cut) in [(1, usize::MAX), (2, 4096), (3, 77_777), (5, 300_000)] {
                let mut writer =
                    ParallelWriter::new(Cursor::new(Vec::new()), options, workers).unwrap();
                for part in plain.chunks(cut.min(plain.len())) {
                    writer.write_all(part).unwrap();
                }
                let (together, same) = writer.finish().unwrap();
                assert_eq!(same, summary);
                assert!(together.get_ref() == alone.get_ref(), "{algo:?} {block_size} {workers}");
            }
        }
    }

    #[test]
    fn an_empty_file_is_one_too() {
        let writer = ParallelWriter::new(Cursor::new(Vec::new()), Options::default(), 2).unwrap();
        let (out, summary) = writer.finish().unwrap();
        assert_eq!((summary.blocks, out.get_ref().len()), (0, 1024));
    }

    /// An output that takes this many bytes and no more.
    struct Full(Cursor<Vec<u8>>, usize);

    impl Write for Full {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            if self.0.get_ref().len() + bytes.len() > self.1 {
                return Err(io::Error::from(io::ErrorKind::StorageFull));
            }
            self.0.write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl Seek for Full {
        fn seek(&mut self, to: io::SeekFrom) -> io::Result<u64> {
            self.0.seek(to)
        }
    }

    #[test]
    fn a_full_output_is_told_and_ends_all_threads() {
        let out = Full(Cursor::new(Vec::new()), 100_000);
        let mut writer = ParallelWriter::new(out, Options::default(), 2).unwrap();
        let plain: Vec<u8> = sample(100 << 20);
        let failed = writer.write_all(&plain).is_err();
        let error = writer.finish().err().unwrap();
        assert!(failed, "the caller learns of it long before its end");
        let ZFileError::Write(cause) = error else { panic!("{error}") };
        assert_eq!(cause.kind(), io::ErrorKind::StorageFull);
    }

    #[test]
    fn a_block_too_long_is_refused_as_by_one_thread() {
        let mut state = 1_u64;
        let noise: Vec<u8> = (0..65536)
            .map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                (state >> 56) as u8
            })
            .collect();
        let options = Options { block_size: 65536, ..Options::default() };
        let mut writer = ParallelWriter::new(Cursor::new(Vec::new()), options, 2).unwrap();
        let _ = writer.write_all(&noise);
        assert!(matches!(writer.finish(), Err(ZFileError::BlockTooLong { block: 0, .. })));
    }
}
