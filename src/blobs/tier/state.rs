//! The map of all files in memory, and the readers' operations on it.

use std::collections::{HashMap, HashSet};
use std::hash::{BuildHasher as _, RandomState};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use parking_lot::{Mutex, MutexGuard};

use super::fifo::Fifo;
use super::presence::{ChunkExtent, HEADER, RECORD, Subject};
use super::store::{Store, StoredFile};
use super::writer::{Gone, Offer, WriterCommand};
use super::{QUEUE, TierBlob, TierCounters, TierKind, TierOptions, Usage, in_pages};
use crate::quiet::{Allowance, Demand};

/// State shared by readers and the writer.
pub(super) struct TierShared {
    pub(super) kind: TierKind,
    pub(super) store: Arc<dyn Store>,
    pub(super) options: TierOptions,
    pub(super) counters: Arc<TierCounters>,
    state: Mutex<TierState>,
    commands: Mutex<Sender<WriterCommand>>,
    queued: AtomicU64,
    full: AtomicBool,
    /// The demand that the writer yields to, if there is one.
    demand: OnceLock<Arc<Demand>>,
}

/// All files.
#[derive(Default)]
pub(super) struct TierState {
    pub(super) files: HashMap<u32, FileState>,
    names: HashMap<String, u32>,
    pub(super) fifo: Fifo,
    /// Chunks that wait to be written.
    offered: HashSet<(u32, u32)>,
    /// Bytes that the files take, as [`FileState::bytes`] counts them.
    pub(super) used: u64,
    next: u32,
    turn: u64,
}

/// A chunk that is present.
#[derive(Clone, Copy, Debug)]
pub(super) struct PresentChunk {
    pub(super) extent: ChunkExtent,
    /// Number that tells it from a later chunk at the same place.
    turn: u64,
}

/// The files of a blob.
pub(super) struct FileState {
    /// Name without its suffix.
    pub(super) name: String,
    pub(super) subject: Subject,
    pub(super) seed: u32,
    pub(super) slots: HashMap<u32, PresentChunk>,
    /// Records in the map; `None` before the files are created.
    pub(super) records: Option<u64>,
    /// Bytes that the data file takes beyond its chunks: the filesystem's own metadata.
    pub(super) extra: u64,
    /// End of the last chunk in the data file.
    pub(super) end: u64,
    /// Number of handles to it.
    users: usize,
    /// The data file, open while it is used.
    pub(super) data: Option<Arc<dyn StoredFile>>,
}

impl FileState {
    /// Creates the state of a file without chunks.
    pub(super) fn new(name: String, subject: Subject, seed: u32) -> Self {
        Self {
            name,
            subject,
            seed,
            slots: HashMap::new(),
            records: None,
            extra: 0,
            end: 0,
            users: 0,
            data: None,
        }
    }

    pub(super) fn data_name(&self) -> String {
        format!("{}.data", self.name)
    }

    pub(super) fn map_name(&self) -> String {
        format!("{}.map", self.name)
    }

    /// Bytes that map and filesystem take beside the chunks.
    pub(super) fn overhead(&self) -> u64 {
        self.records.map_or(0, map_bytes) + self.extra
    }

    /// Bytes by which `records` more let the map grow.
    pub(super) fn growth(&self, records: u64) -> u64 {
        map_bytes(self.records.unwrap_or(0) + records) - self.records.map_or(0, map_bytes)
    }

    pub(super) fn is_used(&self) -> bool {
        self.users > 0
    }
}

/// Bytes that a map of so many records takes.
pub(super) fn map_bytes(records: u64) -> u64 {
    in_pages(HEADER as u64 + records * RECORD as u64)
}

/// File name for an identity: characters that need no quoting in a shell.
pub(super) fn file_name(subject: &Subject) -> String {
    let plain = |c: char| if c.is_ascii_alphanumeric() { c } else { '-' };
    let id: String = subject.id.chars().map(plain).collect();
    format!("{id}.{}", subject.kind.name())
}

impl TierState {
    /// Adds a file.
    pub(super) fn add(&mut self, file: FileState) -> u32 {
        let number = self.next;
        self.next += 1;
        self.used += file.overhead();
        self.names.insert(file.name.clone(), number);
        self.files.insert(number, file);
        number
    }

    /// Makes a chunk present. The caller counts its pages.
    pub(super) fn publish(&mut self, number: u32, chunk: u32, extent: ChunkExtent, old: bool) {
        self.turn += 1;
        let slot = PresentChunk { extent, turn: self.turn };
        let Some(file) = self.files.get_mut(&number) else { return };
        file.slots.insert(chunk, slot);
        file.end = file.end.max(extent.at + u64::from(extent.len));
        let pages = in_pages(extent.len.into());
        if old {
            self.fifo.insert_old((number, chunk), pages);
        } else {
            self.fifo.insert((number, chunk), pages);
        }
    }

    /// Removes a chunk, so that no reader finds it. Its pages are counted until they are free.
    pub(super) fn take_out(&mut self, number: u32, chunk: u32) -> Option<Gone> {
        let slot = self.files.get_mut(&number)?.slots.remove(&chunk)?;
        self.fifo.remove((number, chunk));
        Some(Gone { file: number, chunk, extent: slot.extent })
    }

    /// Evicts the chunk that is least worth keeping.
    pub(super) fn evict(&mut self, capacity: u64) -> Option<Gone> {
        loop {
            let (number, chunk) = self.fifo.pop(capacity)?;
            let slot = self.files.get_mut(&number).and_then(|file| file.slots.remove(&chunk));
            if let Some(slot) = slot {
                return Some(Gone { file: number, chunk, extent: slot.extent });
            }
        }
    }

    /// Forgets all chunks of a file that is no longer on the disk.
    pub(super) fn reset(&mut self, number: u32) {
        let Some(file) = self.files.get_mut(&number) else { return };
        self.used -= file.overhead();
        for (chunk, slot) in file.slots.drain() {
            self.used -= in_pages(slot.extent.len.into());
            self.fifo.remove((number, chunk));
        }
        (file.records, file.extra, file.end, file.data) = (None, 0, 0, None);
    }

    /// Takes out a file without users and chunks; the files of that name may be removed.
    pub(super) fn retire(&mut self, number: u32) -> Option<FileState> {
        let file = self.files.get(&number)?;
        if file.is_used() || !file.slots.is_empty() {
            return None;
        }
        let file = self.files.remove(&number)?;
        self.names.remove(&file.name);
        self.used -= file.overhead();
        Some(file)
    }
}

impl TierShared {
    pub(super) fn new(
        kind: TierKind,
        store: Arc<dyn Store>,
        options: TierOptions,
        commands: Sender<WriterCommand>,
    ) -> Self {
        Self {
            kind,
            store,
            options,
            counters: Arc::default(),
            state: Mutex::default(),
            commands: Mutex::new(commands),
            queued: AtomicU64::new(0),
            full: AtomicBool::new(false),
            demand: OnceLock::new(),
        }
    }

    pub(super) fn yield_to(&self, demand: Arc<Demand>) {
        let _ = self.demand.set(demand);
    }

    /// Time until it is quiet; `None` if a batch may be written now: it is quiet, or so much waits that more would be
    /// dropped.
    pub(super) fn holds_back(&self) -> Option<Duration> {
        let demand = self.demand.get()?;
        let waits = self.queued() <= QUEUE / 2 && demand.allowance() == Allowance::Nothing;
        waits.then(|| demand.left())
    }

    /// No code panics or waits while it holds this.
    pub(super) fn lock(&self) -> MutexGuard<'_, TierState> {
        self.state.lock()
    }

    pub(super) fn send(&self, command: WriterCommand) -> bool {
        self.commands.lock().send(command).is_ok()
    }

    pub(super) fn usage(&self) -> Usage {
        let state = self.lock();
        Usage {
            bytes: state.used,
            capacity: self.options.capacity,
            blobs: state.files.values().filter(|file| !file.slots.is_empty()).count(),
            chunks: state.fifo.len(),
        }
    }

    pub(super) fn is_full(&self) -> bool {
        self.full.load(Ordering::Relaxed)
    }

    /// Sets the flag, and logs each change.
    pub(super) fn set_full(&self, full: bool) {
        if self.full.swap(full, Ordering::Relaxed) != full {
            let (kind, dir) = (self.kind.name(), self.options.dir.display());
            if full {
                tracing::warn!(
                    "The disk of the {kind} cache in {dir} is full: it takes no more for now"
                );
            } else {
                tracing::info!("The disk of the {kind} cache in {dir} has space again");
            }
        }
    }

    pub(super) fn queued(&self) -> u64 {
        self.queued.load(Ordering::Relaxed)
    }

    /// Subtracts bytes that no longer wait, and these chunks.
    pub(super) fn unqueue(&self, bytes: u64, chunks: &[(u32, u32)]) {
        if !chunks.is_empty() {
            let mut state = self.lock();
            chunks.iter().for_each(|chunk| _ = state.offered.remove(chunk));
        }
        self.queued.fetch_sub(bytes, Ordering::Relaxed);
    }

    /// The file of this subject; a file of the same name with another subject is created anew.
    pub(super) fn register(&self, subject: &Subject) -> u32 {
        let name = file_name(subject);
        let mut state = self.lock();
        let mut known = state.names.get(&name).copied();
        if let Some(number) = known
            && state.files.get(&number).is_some_and(|file| file.subject != *subject)
        {
            self.counters.resets.add(1);
            tracing::warn!("The cache file {name} belongs to another blob and is created anew");
            state.reset(number);
            if let Some(file) = state.files.get_mut(&number) {
                file.subject = subject.clone();
            }
            known = Some(number);
        }
        let number = known.unwrap_or_else(|| {
            let seed = RandomState::new().hash_one(&name) as u32;
            state.add(FileState::new(name, subject.clone(), seed))
        });
        self.begin_use(&mut state, number);
        number
    }

    fn begin_use(&self, state: &mut TierState, number: u32) {
        let Some(file) = state.files.get_mut(&number) else { return };
        file.users += 1;
        if file.data.is_none() && file.records.is_some() {
            match self.store.open(&file.data_name()) {
                Ok(data) => file.data = Some(data),
                Err(error) => {
                    self.counters.failures.add(1);
                    tracing::warn!(%error, "Cannot open the cache file {}", file.data_name());
                }
            }
        }
    }

    /// Returns a handle to a known file.
    pub(super) fn hold(self: &Arc<Self>, number: u32) -> Option<TierBlob> {
        let mut state = self.lock();
        state.files.get(&number)?;
        self.begin_use(&mut state, number);
        Some(TierBlob { shared: self.clone(), file: number })
    }

    pub(super) fn let_go(&self, number: u32) {
        let mut state = self.lock();
        if let Some(file) = state.files.get_mut(&number) {
            file.users -= 1;
            if file.users == 0 {
                file.data = None;
            }
        }
    }

    /// All chunks: file, chunk, length; by file and in order.
    pub(super) fn all(&self) -> Vec<(u32, u32, usize)> {
        let state = self.lock();
        let mut all: Vec<_> = state
            .files
            .iter()
            .flat_map(|(&number, file)| {
                let slots = file.slots.iter();
                slots.map(move |(&chunk, slot)| (number, chunk, slot.extent.len as usize))
            })
            .collect();
        all.sort_unstable();
        all
    }

    pub(super) fn extent(&self, number: u32, chunk: u32) -> Option<ChunkExtent> {
        Some(self.lock().files.get(&number)?.slots.get(&chunk)?.extent)
    }

    pub(super) fn count(&self, number: u32) -> usize {
        self.lock().files.get(&number).map_or(0, |file| file.slots.len())
    }

    pub(super) fn offer(&self, offer: Offer) -> bool {
        let (len, key) = (offer.payload.bytes().len() as u64, (offer.file, offer.chunk));
        // A chunk that is longer than the queue is accepted when no other one waits.
        let before = self.queued.fetch_add(len, Ordering::Relaxed);
        let fits = before == 0 || before + len <= QUEUE;
        if fits {
            self.lock().offered.insert(key);
            if self.send(WriterCommand::Offer(offer)) {
                return true;
            }
            self.lock().offered.remove(&key);
        }
        self.unqueue(len, &[]);
        self.counters.dropped.add(1);
        false
    }

    /// True if a chunk waits to be written.
    pub(super) fn is_offered(&self, number: u32, chunk: u32) -> bool {
        self.lock().offered.contains(&(number, chunk))
    }

    pub(super) fn read(
        &self,
        number: u32,
        chunk: u32,
        buf: &mut [u8],
        verify: &dyn Fn(&[u8]) -> Option<bool>,
    ) -> bool {
        let (slot, data) = {
            let mut state = self.lock();
            let Some(file) = state.files.get(&number) else { return false };
            let (Some(slot), Some(data)) = (file.slots.get(&chunk), &file.data) else {
                return false;
            };
            let found = (*slot, data.clone());
            state.fifo.touch((number, chunk));
            found
        };
        let PresentChunk { extent, turn } = slot;
        let wrong = if extent.len as usize != buf.len() {
            Some("its length is different".to_owned())
        } else if let Err(error) = data.read_exact_at(buf, extent.at) {
            self.counters.failures.add(1);
            Some(error.to_string())
        } else {
            let good = verify(buf).unwrap_or_else(|| crc32c::crc32c(buf) == extent.crc);
            (!good).then(|| "its checksum differs".to_owned())
        };
        let Some(wrong) = wrong else {
            self.counters.reads.add(1);
            self.counters.read_bytes.add(buf.len() as u64);
            return true;
        };
        // It may have been evicted, and its place used again, during the read: no damage then.
        let same = {
            let state = self.lock();
            let now = state.files.get(&number).and_then(|file| file.slots.get(&chunk));
            now.is_some_and(|now| now.turn == turn)
        };
        if same {
            self.forget(number, chunk, &wrong);
        }
        false
    }

    pub(super) fn release(&self, number: u32, chunk: u32) {
        let gone = self.lock().take_out(number, chunk);
        if let Some(gone) = gone {
            self.send(WriterCommand::Forget(gone));
        }
    }

    pub(super) fn forget(&self, number: u32, chunk: u32, why: &str) {
        let mut state = self.lock();
        let Some(gone) = state.take_out(number, chunk) else { return };
        let name = state.files.get(&number).map(FileState::data_name).unwrap_or_default();
        drop(state);
        self.counters.damaged.add(1);
        tracing::warn!("Chunk {chunk} in the cache file {name} is forgotten: {why}");
        self.send(WriterCommand::Forget(gone));
    }
}
