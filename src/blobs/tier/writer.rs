//! The thread that writes: adds chunks and evicts others in batches, each step durable before the next one
//! needs it.
//!
//! A batch has these steps: records of the evictions, sync, holes; data, sync; records of the new chunks. The
//! last records become durable with the next batch, or after some time without work; a crash before that only
//! means that these chunks are fetched again.
//!
//! A batch is not begun while there is [demand](crate::quiet), for some time, and as long as the queue has room. What is asked for
//! by a command, or at the end, is written at once.

use std::collections::{BTreeMap, BTreeSet, HashSet, VecDeque};
use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use super::presence::{ChunkExtent, HEADER, PresenceRecord, RECORD};
use super::state::{FileState, TierShared, map_bytes};
use super::store::{ChunkPayload, StoredFile};
use super::uring::join;
use super::{PAGE, in_pages};

/// Limit on the bytes in a batch, 8 MiB: two syncs for it are then a small part of its time.
const BATCH: u64 = 8 << 20;
/// Time that a batch waits for more chunks, once it has begun.
const LINGER: Duration = Duration::from_millis(20);
/// Time without work after which the maps are synced and the free space is checked.
const IDLE: Duration = Duration::from_millis(500);
/// Longest time that a batch waits for quiet: what a crash would lose.
const PATIENCE: Duration = Duration::from_secs(5);
/// Longest sleep of a writer that is held back: more may come that fills its queue.
const STEP: Duration = Duration::from_millis(100);
/// Number of records from which on a map may be rewritten, when most of them are obsolete.
const MANY_RECORDS: u64 = 1024;

/// Divisor for the part of the capacity that is kept in reserve: a file of many holes takes blocks of its
/// filesystem's metadata, one for some 170 pieces in ext4, whose number is known only after the write.
const RESERVE: u64 = 32;
/// Rounds after which a disk that frees no space is left alone until the next batch.
const SETTLING: usize = 4;

/// Commands to the thread.
pub(super) enum WriterCommand {
    /// Writes this chunk.
    Offer(Offer),
    /// Frees the place of this chunk, which is taken out already.
    Forget(Gone),
    /// Answers when all earlier commands are durable.
    Flush(Sender<()>),
    /// Shrinks to so many bytes, and answers when that is done.
    Prune(u64, Sender<()>),
    /// Writes the rest, and ends.
    End,
}

impl WriterCommand {
    /// True if a caller waits for it.
    fn is_awaited(&self) -> bool {
        matches!(self, Self::Flush(_) | Self::Prune(..) | Self::End)
    }
}

/// A chunk to be written.
pub(super) struct Offer {
    pub(super) file: u32,
    pub(super) chunk: u32,
    pub(super) at: u64,
    pub(super) payload: Arc<ChunkPayload>,
}

impl Offer {
    fn len(&self) -> u64 {
        self.payload.bytes().len() as u64
    }
}

/// A chunk that was taken out, but still has its pages.
#[derive(Clone, Copy, Debug)]
pub(super) struct Gone {
    pub(super) file: u32,
    pub(super) chunk: u32,
    pub(super) extent: ChunkExtent,
}

fn in_whole_pages(bytes: u64) -> u64 {
    bytes / PAGE * PAGE
}

/// Body of the thread.
pub(super) fn run(shared: Arc<TierShared>, commands: Receiver<WriterCommand>) {
    threads::mark_io_thread();
    if let Err(error) = sys::idle::yield_disk() {
        tracing::debug!(%error, "A disk tier is written in the class of other threads");
    }
    let store = shared.store.clone();
    let writer = TierWriter { shared, dirty: BTreeSet::new(), received: VecDeque::new() };
    store.drive(Box::pin(writer.run(commands)));
}

struct TierWriter {
    shared: Arc<TierShared>,
    /// Files whose maps have records that are not durable yet.
    dirty: BTreeSet<u32>,
    /// Commands that are received and not in a batch.
    received: VecDeque<WriterCommand>,
}

/// Work of one round of the thread.
#[derive(Default)]
struct WriterRound {
    offers: Vec<Offer>,
    gone: Vec<Gone>,
    bytes: u64,
    /// Senders that wait for it to be durable.
    flushes: Vec<Sender<()>>,
    prune: Option<(u64, Sender<()>)>,
    end: bool,
}

impl WriterRound {
    /// Adds a command; returns true if more may be added.
    fn add(&mut self, command: WriterCommand) -> bool {
        match command {
            WriterCommand::Offer(offer) => {
                self.bytes += offer.len();
                self.offers.push(offer);
            }
            WriterCommand::Forget(gone) => self.gone.push(gone),
            WriterCommand::Flush(sender) => self.flushes.push(sender),
            WriterCommand::Prune(to, sender) => self.prune = Some((to, sender)),
            WriterCommand::End => self.end = true,
        }
        self.bytes < BATCH && self.flushes.is_empty() && self.prune.is_none() && !self.end
    }
}

impl TierWriter {
    async fn run(mut self, commands: Receiver<WriterCommand>) {
        loop {
            let mut batch = WriterRound::default();
            match self.receive(&commands, IDLE) {
                Some(RecvTimeoutError::Disconnected) => batch.end = true,
                Some(RecvTimeoutError::Timeout) => {}
                None => {
                    self.hold_back(&commands);
                    let until = Instant::now() + LINGER;
                    while let Some(command) = self.next(&commands, until)
                        && batch.add(command)
                    {}
                }
            }
            let (flushes, prune, end) =
                (std::mem::take(&mut batch.flushes), batch.prune.take(), batch.end);
            let idle = batch.offers.is_empty() && batch.gone.is_empty();
            let to = prune.as_ref().map(|(to, _)| *to);
            self.process(batch, to).await;
            if idle || end || !flushes.is_empty() || prune.is_some() {
                self.sync_maps().await;
            }
            if prune.is_some() {
                self.remove_empty();
            }
            flushes.into_iter().chain(prune.map(|(_, sender)| sender)).for_each(|sender| {
                let _ = sender.send(());
            });
            if end {
                return;
            }
        }
    }

    /// Receives a command, unless one was received before and is not in a batch.
    fn receive(
        &mut self,
        commands: &Receiver<WriterCommand>,
        most: Duration,
    ) -> Option<RecvTimeoutError> {
        if self.received.is_empty() {
            match commands.recv_timeout(most) {
                Ok(command) => self.received.push_back(command),
                Err(error) => return Some(error),
            }
        }
        None
    }

    /// The next command; waits for one until then.
    fn next(
        &mut self,
        commands: &Receiver<WriterCommand>,
        until: Instant,
    ) -> Option<WriterCommand> {
        let most = until.saturating_duration_since(Instant::now());
        let _ = self.receive(commands, most);
        self.received.pop_front()
    }

    /// Waits until it is quiet, but not for ever, not while much waits, and not while a caller does.
    fn hold_back(&mut self, commands: &Receiver<WriterCommand>) {
        let until = Instant::now() + PATIENCE;
        while !self.received.iter().any(WriterCommand::is_awaited)
            && let Some(left) = self.shared.holds_back()
            && Instant::now() < until
        {
            match commands.recv_timeout(left.min(STEP)) {
                Ok(command) => self.received.push_back(command),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
        }
    }

    /// Processes one batch. `to`: shrink to so many bytes.
    async fn process(&mut self, batch: WriterRound, to: Option<u64>) {
        let bytes: u64 = batch.offers.iter().map(Offer::len).sum();
        let chunks: Vec<_> = batch.offers.iter().map(|offer| (offer.file, offer.chunk)).collect();
        let mut gone = batch.gone;
        let offers = self.plan(batch.offers, &mut gone, to);
        if !gone.is_empty() {
            self.free(&gone).await;
        }
        if !offers.is_empty() {
            self.store(offers).await;
        }
        self.settle().await;
        self.shared.unqueue(bytes, &chunks);
    }

    /// Corrects the count when writes and holes took other pages than planned: holes that the disk refused,
    /// blocks of the filesystem's metadata. More chunks are then evicted, before any new one is taken.
    async fn settle(&mut self) {
        for _ in 0..SETTLING {
            if self.shared.lock().used <= self.shared.options.capacity {
                return;
            }
            let mut gone = Vec::new();
            self.plan(Vec::new(), &mut gone, None);
            if gone.is_empty() {
                return;
            }
            self.free(&gone).await;
        }
    }

    /// Chooses the offers to write, and adds the evictions that they need. Their pages are counted from here
    /// on.
    fn plan(&self, offers: Vec<Offer>, gone: &mut Vec<Gone>, to: Option<u64>) -> Vec<Offer> {
        let shared = &self.shared;
        let capacity = shared.options.capacity;
        let available = shared.store.available().unwrap_or(0);
        let mut spare = available.saturating_sub(shared.options.floor);
        let mut state = shared.lock();
        let mut seen = HashSet::new();
        let mut offers: Vec<Offer> = offers
            .into_iter()
            .filter(|offer| {
                let file = state.files.get(&offer.file);
                file.is_some_and(|file| !file.slots.contains_key(&offer.chunk))
                    && seen.insert((offer.file, offer.chunk))
            })
            .collect();
        // Below the floor: no new chunks, and as many bytes go as are missing.
        let mut missing = shared.options.floor.saturating_sub(available);
        let low = missing > 0;
        let mut refused = false;
        if low {
            refused |= !offers.is_empty();
            shared.counters.refused.add(offers.len() as u64);
            offers.clear();
        } else {
            offers.retain(|offer| {
                let pages = in_pages(offer.len());
                let fits = pages <= spare && pages <= capacity;
                if fits {
                    spare -= pages;
                } else {
                    refused |= pages <= capacity;
                    shared.counters.refused.add(1);
                }
                fits
            });
        }
        shared.set_full(low || refused);
        let limit = to.unwrap_or(capacity).min(capacity - in_whole_pages(capacity / RESERVE));
        loop {
            let mut records = BTreeMap::<u32, u64>::new();
            let numbers = gone.iter().map(|gone| gone.file);
            numbers.chain(offers.iter().map(|offer| offer.file)).for_each(|file| {
                *records.entry(file).or_default() += 1;
            });
            let growth: u64 = records
                .iter()
                .filter_map(|(number, count)| Some(state.files.get(number)?.growth(*count)))
                .sum();
            let new: u64 = offers.iter().map(|offer| in_pages(offer.len())).sum();
            let freed: u64 = gone.iter().map(|gone| in_pages(gone.extent.len.into())).sum();
            let over = (state.used + growth + new).saturating_sub(freed + limit);
            if over == 0 && missing == 0 {
                break;
            }
            // Evicts the whole excess at once, then checks what its records take.
            let (mut left, mut found) = (over.max(missing), false);
            while left > 0
                && let Some(victim) = state.evict(capacity)
            {
                shared.counters.evicted.add(1);
                let pages = in_pages(victim.extent.len.into());
                left = left.saturating_sub(pages);
                missing = missing.saturating_sub(pages);
                gone.push(victim);
                found = true;
            }
            if !found {
                missing = 0;
                if over > 0 && offers.pop().is_none() {
                    break;
                }
                shared.counters.refused.add(u64::from(over > 0));
            }
        }
        state.used += offers.iter().map(|offer| in_pages(offer.len())).sum::<u64>();
        offers
    }

    fn failed(&self, what: &str, name: &str, error: &io::Error) {
        self.shared.counters.failures.add(1);
        tracing::warn!(%error, "Cannot {what} the cache file {name}");
        if error.kind() == io::ErrorKind::StorageFull {
            self.shared.set_full(true);
        }
    }

    /// Records durably that chunks are gone, and frees their pages.
    async fn free(&mut self, gone: &[Gone]) {
        let mut by_file = BTreeMap::<u32, Vec<Gone>>::new();
        gone.iter().for_each(|gone| by_file.entry(gone.file).or_default().push(*gone));
        for (number, gone) in by_file {
            let records: Vec<PresenceRecord> =
                gone.iter().map(|gone| PresenceRecord::Forgotten(gone.chunk)).collect();
            // A map that cannot be written is no reason to keep the pages: every read is verified.
            if self.append(number, &records).await {
                self.sync_map(number).await;
            }
            let names = self.with_file(number, |file| (file.data_name(), file.data.clone()));
            let pages: u64 = gone.iter().map(|gone| in_pages(gone.extent.len.into())).sum();
            let Some((name, data)) = names else {
                self.shared.lock().used -= pages;
                continue;
            };
            let data = data.map_or_else(|| self.shared.store.open(&name), Ok);
            match data {
                Ok(data) => {
                    for gone in &gone {
                        if let Err(error) =
                            data.punch(gone.extent.at, in_pages(gone.extent.len.into()))
                        {
                            self.failed("free a part of", &name, &error);
                        }
                    }
                    self.shared.lock().used -= pages;
                    self.measure(number, &*data);
                }
                Err(error) => self.failed("open", &name, &error),
            }
        }
    }

    fn with_file<T>(&self, number: u32, get: impl FnOnce(&FileState) -> T) -> Option<T> {
        self.shared.lock().files.get(&number).map(get)
    }

    /// Corrects the count to the real size of the two files.
    fn measure(&self, number: u32, data: &dyn StoredFile) {
        let Some((map, records)) = self.with_file(number, |file| (file.map_name(), file.records))
        else {
            return;
        };
        let map = records.map(|_| self.shared.store.open(&map).and_then(|map| map.allocated()));
        let (Ok(data), Ok(map)) = (data.allocated(), map.unwrap_or(Ok(0))) else { return };
        let mut state = self.shared.lock();
        let Some(file) = state.files.get_mut(&number) else { return };
        let pages: u64 = file.slots.values().map(|slot| in_pages(slot.extent.len.into())).sum();
        let known = file.records.map_or(0, map_bytes);
        let extra = data.saturating_sub(pages) + map.saturating_sub(known);
        let before = std::mem::replace(&mut file.extra, extra);
        state.used = state.used + extra - before;
    }

    /// Appends records to an existing map.
    async fn append(&mut self, number: u32, records: &[PresenceRecord]) -> bool {
        let known = self.with_file(number, |file| (file.map_name(), file.seed, file.records));
        let Some((name, seed, Some(before))) = known else { return false };
        let bytes: Vec<u8> = records.iter().flat_map(|record| record.bytes(seed)).collect();
        let at = HEADER as u64 + before * RECORD as u64;
        let written = match self.shared.store.open(&name) {
            Ok(map) => map.write(Arc::new(bytes.into()), at).await,
            Err(error) => Err(error),
        };
        if let Err(error) = written {
            self.failed("write to", &name, &error);
            return false;
        }
        let mut state = self.shared.lock();
        if let Some(file) = state.files.get_mut(&number) {
            let growth = file.growth(records.len() as u64);
            file.records = Some(before + records.len() as u64);
            state.used += growth;
        }
        self.dirty.insert(number);
        true
    }

    async fn sync_map(&mut self, number: u32) {
        self.dirty.remove(&number);
        let Some(name) = self.with_file(number, FileState::map_name) else { return };
        let synced = match self.shared.store.open(&name) {
            Ok(map) => map.sync().await,
            Err(error) => Err(error),
        };
        if let Err(error) = synced {
            self.failed("sync", &name, &error);
        }
    }

    async fn sync_maps(&mut self) {
        for number in std::mem::take(&mut self.dirty) {
            self.sync_map(number).await;
            self.compact(number).await;
            if let Some(data) = self.with_file(number, |file| file.data.clone()).flatten() {
                self.measure(number, &*data);
            }
        }
    }

    /// The data file of `number`, created with its map if necessary; `None` when that fails.
    async fn data(&mut self, number: u32) -> Option<Arc<dyn StoredFile>> {
        let (name, data, records, end) = self.with_file(number, |file| {
            (file.data_name(), file.data.clone(), file.records, file.end)
        })?;
        if let Some(records) = records {
            match self.usable(number, data, &name, records, end) {
                Ok(Some(data)) => return Some(data),
                Ok(None) => {
                    self.shared.counters.resets.add(1);
                    tracing::warn!(
                        "The cache file {name} was removed or truncated, and is created anew"
                    );
                    self.shared.lock().reset(number);
                }
                Err(error) => {
                    self.failed("open", &name, &error);
                    return None;
                }
            }
        }
        match self.make(number).await {
            Ok(data) => data,
            Err(error) => {
                self.failed("make", &name, &error);
                None
            }
        }
    }

    /// The data file, if it and its map are still the same files.
    fn usable(
        &self,
        number: u32,
        data: Option<Arc<dyn StoredFile>>,
        name: &str,
        records: u64,
        end: u64,
    ) -> io::Result<Option<Arc<dyn StoredFile>>> {
        let data = data.map_or_else(|| self.shared.store.open(name), Ok)?;
        let Some(map) = self.with_file(number, FileState::map_name) else { return Ok(None) };
        let map = self.shared.store.open(&map)?;
        let whole = data.is_linked()?
            && data.len()? >= end
            && map.len()? >= HEADER as u64 + records * RECORD as u64;
        Ok(whole.then_some(data))
    }

    /// Creates both files, the map with its header.
    async fn make(&mut self, number: u32) -> io::Result<Option<Arc<dyn StoredFile>>> {
        let store = self.shared.store.clone();
        let known = self.with_file(number, |file| {
            (file.data_name(), file.map_name(), file.subject.header(file.seed), file.is_used())
        });
        let Some((data_name, map_name, header, used)) = known else { return Ok(None) };
        // An old map must never stand beside new data, nor a new map beside old data.
        store.remove(&map_name)?;
        store.remove(&data_name)?;
        let data = store.open(&data_name)?;
        let map = store.open(&map_name)?;
        map.write(Arc::new(header.into()), 0).await?;
        map.sync().await?;
        let mut state = self.shared.lock();
        let Some(file) = state.files.get_mut(&number) else { return Ok(None) };
        file.records = Some(0);
        file.data = used.then(|| data.clone());
        let overhead = file.overhead();
        state.used += overhead;
        Ok(Some(data))
    }

    /// Writes chunks, all at once, and makes them present when they are durable.
    async fn store(&mut self, offers: Vec<Offer>) {
        let mut by_file = BTreeMap::<u32, Vec<Offer>>::new();
        for offer in offers {
            by_file.entry(offer.file).or_default().push(offer);
        }
        let mut files = Vec::new();
        for (number, offers) in by_file {
            match self.data(number).await {
                Some(data) => files.push((number, data, offers)),
                None => self.uncount(&offers),
            }
        }
        let writes = files.iter().flat_map(|(_, data, offers)| {
            offers.iter().map(|offer| data.write(offer.payload.clone(), offer.at))
        });
        let mut written = join(writes.collect()).await.into_iter();
        for (number, data, offers) in &mut files {
            let name = self.with_file(*number, FileState::data_name).unwrap_or_default();
            let (good, bad): (Vec<_>, Vec<_>) =
                std::mem::take(offers).into_iter().partition(|_| match written.next() {
                    Some(Err(error)) => {
                        self.failed("write to", &name, &error);
                        false
                    }
                    written => written.is_some(),
                });
            self.undo(&**data, &bad);
            *offers = good;
        }
        let synced = join(files.iter().map(|(_, data, _)| data.sync()).collect()).await;
        for ((number, data, offers), synced) in files.into_iter().zip(synced) {
            let name = self.with_file(number, FileState::data_name).unwrap_or_default();
            if let Err(error) = synced {
                self.failed("sync", &name, &error);
                self.undo(&*data, &offers);
            } else {
                self.publish(number, &*data, offers).await;
            }
            self.measure(number, &*data);
        }
    }

    async fn publish(&mut self, number: u32, data: &dyn StoredFile, offers: Vec<Offer>) {
        let extents: Vec<(u32, ChunkExtent)> = offers
            .iter()
            .map(|offer| {
                let bytes = offer.payload.bytes();
                let crc = crc32c::crc32c(bytes);
                (offer.chunk, ChunkExtent { at: offer.at, len: bytes.len() as u32, crc })
            })
            .collect();
        let records: Vec<PresenceRecord> = extents
            .iter()
            .map(|(chunk, extent)| PresenceRecord::Present(*chunk, *extent))
            .collect();
        if offers.is_empty() || !self.append(number, &records).await {
            self.undo(data, &offers);
            return;
        }
        for offer in &offers {
            data.let_go(offer.at, in_pages(offer.len()));
        }
        let counters = &self.shared.counters;
        counters.writes.add(offers.len() as u64);
        counters.written_bytes.add(offers.iter().map(Offer::len).sum());
        let mut state = self.shared.lock();
        for (chunk, extent) in extents {
            state.publish(number, chunk, extent, false);
        }
    }

    /// Frees the pages of these offers, including those that may have been written.
    fn undo(&self, data: &dyn StoredFile, offers: &[Offer]) {
        for offer in offers {
            let _ = data.punch(offer.at, in_pages(offer.len()));
        }
        self.uncount(offers);
    }

    fn uncount(&self, offers: &[Offer]) {
        self.shared.counters.refused.add(offers.len() as u64);
        let pages = offers.iter().map(|offer| in_pages(offer.len())).sum::<u64>();
        self.shared.lock().used -= pages;
    }

    /// Rewrites a map that has mostly obsolete records.
    async fn compact(&mut self, number: u32) {
        let known = self.with_file(number, |file| {
            let present: Vec<_> = file
                .slots
                .iter()
                .map(|(chunk, slot)| PresenceRecord::Present(*chunk, slot.extent))
                .collect();
            let header = file.subject.header(file.seed);
            (file.map_name(), header, file.seed, present, file.records.unwrap_or(0))
        });
        let Some((name, mut bytes, seed, present, before)) = known else { return };
        let now = present.len() as u64;
        if before < MANY_RECORDS + 2 * now {
            return;
        }
        bytes.extend(present.iter().flat_map(|record| record.bytes(seed)));
        let new = format!("{name}.new");
        let write = async {
            self.shared.store.remove(&new)?;
            let file = self.shared.store.open(&new)?;
            file.write(Arc::new(bytes.into()), 0).await?;
            file.sync().await?;
            self.shared.store.rename(&new, &name)
        };
        if let Err(error) = write.await {
            self.failed("write anew", &name, &error);
            let _ = self.shared.store.remove(&new);
            return;
        }
        let mut state = self.shared.lock();
        let Some(file) = state.files.get_mut(&number) else { return };
        let before = file.overhead();
        file.records = Some(now);
        let after = file.overhead();
        state.used = state.used + after - before;
    }

    /// Removes files that have no chunks and no users.
    fn remove_empty(&self) {
        let numbers: Vec<u32> = self.shared.lock().files.keys().copied().collect();
        for number in numbers {
            let Some(file) = self.shared.lock().retire(number) else { continue };
            for name in [file.map_name(), file.data_name()] {
                if let Err(error) = self.shared.store.remove(&name) {
                    self.failed("remove", &name, &error);
                }
            }
        }
    }
}
