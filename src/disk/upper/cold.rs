//! Reads of written data that the page cache no longer has.
//!
//! A call that asks a volume for the position of bytes must not wait, so a thread of this module does each
//! read that would wait for the disk. After that, the waiter is called, the read is repeated, and it finds
//! the bytes kept here. They are kept by their position in the data file, until a request has all its parts.
//! Without this, a request that needs the disk at several positions would never end.
//!
//! The bytes of an append-only layer never change. Those of a sparse one do, and a read that is repeated
//! after a write must not get the bytes from before it. So the kept bytes of the position are dropped, and a
//! read in progress is done again ([`ColdReads::overwritten`]).
//!
//! Bytes that were overwritten in the meantime are never requested again. Only in this case bytes stay, so
//! old ones are dropped when there are many.

use std::collections::VecDeque;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, unbounded};
use parking_lot::{Mutex, MutexGuard};

use super::layer::UpperLayer;
use crate::volume::{VolumeError, Waiter};
use crate::writable::WritableError;
use formats::lsmt::FIRST_SECTOR;
use formats::units::{SECTOR, Sectors};
use threads::Pool;

/// Number of reads that wait for the disk at the same time. They are of one file, usually on one disk: more
/// threads do not make it faster.
const THREADS: usize = 2;

/// Bytes kept regardless of their age: twice the amount that the queues of a ublk device of the default shape
/// can request at a time.
const KEPT: usize = 64 << 20;

/// Age of bytes that will not be requested again: a woken request is repeated at once.
const OLD: Duration = Duration::from_secs(10);

/// A part of the data file.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct DataPart {
    pub(super) at: Sectors,
    pub(super) len: Sectors,
}

impl DataPart {
    fn buffer(self) -> Vec<u8> {
        vec![0; (self.len.0 * SECTOR) as usize]
    }
}

/// A waiting request with its parts.
struct ColdRead {
    parts: Vec<DataPart>,
    /// Byte of the disk, for messages.
    offset: u64,
    waiter: Waiter,
}

struct KeptPart {
    part: DataPart,
    bytes: Arc<Vec<u8>>,
    since: Instant,
}

/// Parts that were read and not requested again yet, the oldest first; and those that are being read.
#[derive(Default)]
struct Kept {
    parts: VecDeque<KeptPart>,
    bytes: usize,
    /// Parts being read; true if the part was overwritten since its reading began.
    reading: Vec<(DataPart, bool)>,
}

impl Kept {
    fn put(&mut self, part: DataPart, bytes: Vec<u8>, now: Instant) {
        while self.bytes > KEPT
            && let Some(oldest) = self.parts.front()
            && now.saturating_duration_since(oldest.since) > OLD
        {
            self.bytes -= oldest.bytes.len();
            self.parts.pop_front();
        }
        self.bytes += bytes.len();
        self.parts.push_back(KeptPart { part, bytes: Arc::new(bytes), since: now });
    }

    fn get(&self, part: DataPart) -> Option<Arc<Vec<u8>>> {
        self.parts.iter().find(|kept| kept.part == part).map(|kept| kept.bytes.clone())
    }

    fn begin(&mut self, part: DataPart) {
        self.reading.push((part, false));
    }

    /// Ends a reading. Returns `false` if the part was overwritten in the meantime.
    fn end(&mut self, part: DataPart) -> bool {
        let at = self.reading.iter().position(|(reading, _)| *reading == part);
        at.is_none_or(|at| !self.reading.swap_remove(at).1)
    }

    fn overwritten(&mut self, place: &Range<u64>) {
        let touches =
            |part: &DataPart| part.at.0 < place.end && place.start < part.at.0 + part.len.0;
        self.parts.retain(|kept| !touches(&kept.part));
        self.bytes = self.parts.iter().map(|kept| kept.bytes.len()).sum();
        self.reading.iter_mut().filter(|(part, _)| touches(part)).for_each(|(_, was)| *was = true);
    }

    fn forget(&mut self, parts: &[DataPart]) {
        self.parts.retain(|kept| !parts.contains(&kept.part));
        self.bytes = self.parts.iter().map(|kept| kept.bytes.len()).sum();
    }
}

/// The threads.
pub(super) struct ColdReads {
    layer: Arc<UpperLayer>,
    kept: Arc<Mutex<Kept>>,
    jobs: Option<Sender<ColdRead>>,
    threads: Pool,
}

impl ColdReads {
    /// Starts threads that read from `layer`.
    pub(super) fn start(layer: &Arc<UpperLayer>) -> io::Result<Self> {
        let (jobs, queue) = unbounded();
        let kept = Arc::default();
        let mut this =
            Self { layer: layer.clone(), kept, jobs: Some(jobs), threads: Pool::default() };
        for _ in 0..THREADS {
            let (layer, kept, queue) = (layer.clone(), this.kept.clone(), queue.clone());
            this.threads.spawn("upper-read", move || serve(&layer, &kept, &queue))?;
        }
        Ok(this)
    }

    /// The bytes of these parts, requested at byte `offset` of the disk. `None` if they must be read; the
    /// waiter is then taken.
    pub(super) fn read(
        &self,
        parts: &[DataPart],
        offset: u64,
        waiter: &mut dyn FnMut() -> Waiter,
    ) -> Option<Vec<Arc<Vec<u8>>>> {
        if parts.is_empty() {
            return Some(Vec::new());
        }
        let kept: Vec<_> = {
            let kept = self.lock();
            parts.iter().map(|part| kept.get(*part)).collect()
        };
        let was_kept = kept.iter().any(Option::is_some);
        let mut found = Vec::with_capacity(parts.len());
        let mut missing = Vec::new();
        for (part, kept) in parts.iter().zip(kept) {
            match kept.or_else(|| self.cached(*part)) {
                Some(bytes) => found.push(bytes),
                None => missing.push(*part),
            }
        }
        if !missing.is_empty() {
            self.fetch(ColdRead { parts: missing, offset, waiter: waiter() });
            return None;
        }
        if was_kept {
            self.lock().forget(parts);
        }
        Some(found)
    }

    /// Reports that bytes `range` of the disk of a sparse layer were overwritten.
    pub(super) fn overwritten(&self, range: Range<u64>) {
        let sector = |byte: u64| FIRST_SECTOR.0 + byte / SECTOR;
        self.lock().overwritten(&(sector(range.start)..sector(range.end)));
    }

    fn lock(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock()
    }

    fn cached(&self, part: DataPart) -> Option<Arc<Vec<u8>>> {
        let mut sectors = part.buffer();
        self.layer.read_cached(part.at, &mut sectors).then(|| Arc::new(sectors))
    }

    fn fetch(&self, job: ColdRead) {
        if let Some(jobs) = &self.jobs {
            // A sender exists until the drop, and so do threads that receive; otherwise the waiter is dropped
            // with the job.
            let _ = jobs.send(job);
        }
    }
}

impl Drop for ColdReads {
    /// Joins the threads: afterwards none of them has the layer's files open.
    fn drop(&mut self) {
        self.jobs = None;
        self.threads.take().join();
    }
}

/// Loop of a thread.
fn serve(layer: &UpperLayer, kept: &Mutex<Kept>, queue: &Receiver<ColdRead>) {
    threads::mark_io_thread();
    while let Ok(ColdRead { parts, offset, waiter }) = queue.recv() {
        let result: Result<(), WritableError> =
            parts.iter().try_for_each(|part| read(layer, kept, *part));
        waiter(result.map_err(|source| VolumeError::Upper { offset, source: Arc::new(source) }));
    }
}

/// Reads a part until it is not overwritten during the read, and keeps it.
fn read(layer: &UpperLayer, kept: &Mutex<Kept>, part: DataPart) -> Result<(), WritableError> {
    let lock = || kept.lock();
    let mut sectors = part.buffer();
    loop {
        lock().begin(part);
        let read = layer.read_data(part.at, &mut sectors);
        let mut kept = lock();
        let is_current = kept.end(part);
        read?;
        if is_current {
            kept.put(part, sectors, Instant::now());
            return Ok(());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;
    use crate::writable::WritableFiles;
    use formats::units::Bytes;
    use source::MemoryBudget;

    fn part(at: u64, len: u64) -> DataPart {
        DataPart { at: Sectors(at), len: Sectors(len) }
    }

    #[test]
    fn what_a_thread_has_read_is_kept_until_a_request_has_all_of_its_parts() {
        let dir = tempfile::tempdir().unwrap();
        let files = WritableFiles::in_dir(dir.path());
        let layer = UpperLayer::create(&files, Bytes(1 << 20), &MemoryBudget::default()).unwrap();
        let bytes: Vec<u8> = (0..4096_u32).map(|at| (at / 7) as u8).collect();
        let UpperLayer::Appended(appended) = &layer else { panic!("it is append-only") };
        appended.write(0, &bytes).unwrap();
        let cold = ColdReads::start(&Arc::new(layer)).unwrap();
        let fetch = |parts: &[DataPart]| {
            let (sender, receiver) = channel();
            let waiter: Waiter = Box::new(move |result| sender.send(result).unwrap());
            cold.fetch(ColdRead { parts: parts.to_vec(), offset: 512, waiter });
            receiver.recv().unwrap()
        };
        let (one, two, past) = (part(8 + 2, 3), part(8 + 6, 1), part(1 << 30, 1));
        fetch(&[one]).unwrap();
        // Another of its parts cannot be read, so this one is kept.
        let (sender, receiver) = channel();
        let mut waiter = || -> Waiter {
            let sender = sender.clone();
            Box::new(move |result| sender.send(result).unwrap())
        };
        assert!(cold.read(&[one, past], 512, &mut waiter).is_none());
        let error = receiver.recv().unwrap().unwrap_err();
        assert!(matches!(error, VolumeError::Upper { offset: 512, .. }), "{error}");
        fetch(&[two]).unwrap();
        assert_eq!(cold.lock().bytes, 4 * 512);
        let mut unasked = || -> Waiter { panic!("it was kept") };
        let found = cold.read(&[one, two], 512, &mut unasked).unwrap();
        assert_eq!(found[0][..], bytes[2 * 512..5 * 512]);
        assert_eq!(found[1][..], bytes[6 * 512..7 * 512]);
        assert_eq!(cold.lock().bytes, 0);
    }

    #[test]
    fn what_nobody_asks_for_again_does_not_stay_for_ever() {
        let mut kept = Kept::default();
        let start = Instant::now();
        for at in 0..100 {
            kept.put(part(at, 2048), vec![0; 1 << 20], start);
        }
        assert_eq!(kept.parts.len(), 100, "all of it is wanted still");
        kept.put(part(100, 2048), vec![0; 1 << 20], start + 2 * OLD);
        assert_eq!((kept.bytes, kept.parts.len()), (KEPT + (1 << 20), 65));
        assert!(kept.get(part(35, 2048)).is_none() && kept.get(part(36, 2048)).is_some());
    }

    #[test]
    fn what_was_read_before_a_write_to_its_place_is_never_kept_after_it() {
        let mut kept = Kept::default();
        let (one, two) = (part(8, 8), part(16, 8));
        for part in [one, two] {
            kept.put(part, vec![0; 4096], Instant::now());
            kept.begin(part);
        }
        kept.overwritten(&(12..16));
        assert!(kept.get(one).is_none() && kept.get(two).is_some());
        assert_eq!(kept.bytes, 4096);
        assert!(!kept.end(one) && kept.end(two));
        kept.begin(one);
        assert!(kept.end(one), "it was read again");
    }
}
