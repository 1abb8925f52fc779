//! For tests: a directory in memory whose power can fail, and one that fails as a plan says.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::Mutex;

use super::store::{ChunkPayload, Local, Store, StoredFile};

const PAGE: u64 = 4096;
/// Unit that a disk writes whole or not at all.
const SECTOR: usize = 512;

/// A directory in memory. Data that was written but not synced may be lost, whole or in sectors, when its
/// power fails ([`MemoryTierStore::crash`]); changes of names are durable at once.
#[derive(Clone)]
pub struct MemoryTierStore {
    disk: Arc<MemoryDisk>,
}

struct MemoryDisk {
    size: AtomicU64,
    files: Mutex<HashMap<String, Arc<MemoryFile>>>,
}

/// The bytes of a file: its allocated pages.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct FilePages {
    pages: BTreeMap<u64, Vec<u8>>,
    len: u64,
}

/// A change that is not synced yet.
enum UnsyncedChange {
    Write(u64, Vec<u8>),
    Punch(u64, u64),
}

#[derive(Default)]
struct FileVersions {
    now: FilePages,
    durable: FilePages,
    changes: Vec<UnsyncedChange>,
}

struct MemoryFile {
    disk: std::sync::Weak<MemoryDisk>,
    state: Mutex<FileVersions>,
    linked: AtomicBool,
}

impl FilePages {
    fn write(&mut self, at: u64, bytes: &[u8]) {
        for (offset, byte) in (at..).zip(bytes) {
            let page = self.pages.entry(offset / PAGE).or_insert_with(|| vec![0; PAGE as usize]);
            page[(offset % PAGE) as usize] = *byte;
        }
        self.len = self.len.max(at + bytes.len() as u64);
    }

    fn punch(&mut self, at: u64, len: u64) {
        let (first, end) = (at.div_ceil(PAGE), (at + len) / PAGE);
        self.pages.retain(|page, _| !(first..end).contains(page));
    }

    fn set_len(&mut self, len: u64) {
        self.len = len;
        self.pages.retain(|page, _| page * PAGE < len);
    }

    fn allocated(&self) -> u64 {
        self.pages.len() as u64 * PAGE
    }
}

impl MemoryDisk {
    fn allocated(&self) -> u64 {
        self.files.lock().values().map(|file| file.state.lock().now.allocated()).sum()
    }
}

impl MemoryTierStore {
    /// Creates an empty directory on a disk of `size` bytes.
    #[must_use]
    pub fn new(size: u64) -> Self {
        Self { disk: Arc::new(MemoryDisk { size: AtomicU64::new(size), files: Mutex::default() }) }
    }

    /// Simulates other users of the disk: it has `size` bytes for these files now.
    pub fn resize(&self, size: u64) {
        self.disk.size.store(size, Ordering::SeqCst);
    }

    /// Bytes that all files take.
    #[must_use]
    pub fn allocated(&self) -> u64 {
        self.disk.allocated()
    }

    /// The directory after a power failure: everything that was synced, and of the rest each sector for which
    /// `keep` returns true.
    #[must_use]
    pub fn crash(&self, mut keep: impl FnMut() -> bool) -> Self {
        let after = Self::new(self.disk.size.load(Ordering::SeqCst));
        let mut files = after.disk.files.lock();
        let before = self.disk.files.lock();
        let names: BTreeSet<&String> = before.keys().collect();
        for name in names {
            let state = before[name].state.lock();
            let mut content = state.durable.clone();
            for change in &state.changes {
                match change {
                    UnsyncedChange::Write(at, bytes) => {
                        for (number, sector) in bytes.chunks(SECTOR).enumerate() {
                            if keep() {
                                content.write(at + (number * SECTOR) as u64, sector);
                            }
                        }
                    }
                    UnsyncedChange::Punch(at, len) if keep() => content.punch(*at, *len),
                    UnsyncedChange::Punch(..) => {}
                }
            }
            let state =
                FileVersions { now: content.clone(), durable: content, changes: Vec::new() };
            let file = MemoryFile {
                disk: Arc::downgrade(&after.disk),
                state: Mutex::new(state),
                linked: AtomicBool::new(true),
            };
            files.insert(name.clone(), Arc::new(file));
        }
        drop(files);
        after
    }
}

impl Store for MemoryTierStore {
    fn open(&self, name: &str) -> io::Result<Arc<dyn StoredFile>> {
        let mut files = self.disk.files.lock();
        let file = files.entry(name.to_owned()).or_insert_with(|| {
            Arc::new(MemoryFile {
                disk: Arc::downgrade(&self.disk),
                state: Mutex::default(),
                linked: AtomicBool::new(true),
            })
        });
        Ok(file.clone())
    }

    fn names(&self) -> io::Result<Vec<String>> {
        Ok(self.disk.files.lock().keys().cloned().collect())
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        if let Some(file) = self.disk.files.lock().remove(name) {
            file.linked.store(false, Ordering::SeqCst);
        }
        Ok(())
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        let mut files = self.disk.files.lock();
        let file = files.remove(from).ok_or(io::ErrorKind::NotFound)?;
        if let Some(other) = files.insert(to.to_owned(), file) {
            other.linked.store(false, Ordering::SeqCst);
        }
        Ok(())
    }

    fn available(&self) -> io::Result<u64> {
        Ok(self.disk.size.load(Ordering::SeqCst).saturating_sub(self.disk.allocated()))
    }
}

impl StoredFile for MemoryFile {
    fn len(&self) -> io::Result<u64> {
        Ok(self.state.lock().now.len)
    }

    fn read_exact_at(&self, buf: &mut [u8], at: u64) -> io::Result<()> {
        let state = self.state.lock();
        if at + buf.len() as u64 > state.now.len {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        for (offset, byte) in (at..).zip(buf) {
            let page = state.now.pages.get(&(offset / PAGE));
            *byte = page.map_or(0, |page| page[(offset % PAGE) as usize]);
        }
        Ok(())
    }

    fn write(&self, bytes: Arc<ChunkPayload>, at: u64) -> Local<'_, io::Result<()>> {
        Box::pin(async move {
            let bytes = bytes.bytes();
            let disk = self.disk.upgrade().ok_or(io::ErrorKind::NotFound)?;
            let (first, end) = (at / PAGE, (at + bytes.len() as u64).div_ceil(PAGE));
            let more = {
                let state = self.state.lock();
                (first..end).filter(|page| !state.now.pages.contains_key(page)).count() as u64
            };
            if disk.allocated() + more * PAGE > disk.size.load(Ordering::SeqCst) {
                return Err(io::ErrorKind::StorageFull.into());
            }
            let mut state = self.state.lock();
            state.now.write(at, bytes);
            state.changes.push(UnsyncedChange::Write(at, bytes.to_vec()));
            Ok(())
        })
    }

    fn sync(&self) -> Local<'_, io::Result<()>> {
        Box::pin(async move {
            let mut state = self.state.lock();
            state.durable = state.now.clone();
            state.changes.clear();
            Ok(())
        })
    }

    fn punch(&self, at: u64, len: u64) -> io::Result<()> {
        let mut state = self.state.lock();
        state.now.punch(at, len);
        state.changes.push(UnsyncedChange::Punch(at, len));
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let mut state = self.state.lock();
        state.now.set_len(len);
        state.durable = state.now.clone();
        state.changes.clear();
        Ok(())
    }

    fn allocated(&self) -> io::Result<u64> {
        Ok(self.state.lock().now.allocated())
    }

    fn is_linked(&self) -> io::Result<bool> {
        Ok(self.linked.load(Ordering::SeqCst))
    }
}

/// Effect of [`FaultyTierStore`] on one step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StoreFault {
    /// The disk is full.
    NoSpace,
    /// The disk fails.
    Io,
    /// Half of a write arrives, and the write fails.
    Short,
    /// Half of a write arrives, and the write reports success.
    Torn,
}

impl StoreFault {
    fn error(self) -> io::Error {
        match self {
            Self::NoSpace => io::Error::from_raw_os_error(libc::ENOSPC),
            Self::Io | Self::Short | Self::Torn => io::Error::from_raw_os_error(libc::EIO),
        }
    }
}

/// A store that fails at chosen steps: every write, sync, punch, change of length or name is one.
pub struct FaultyTierStore {
    inner: Arc<dyn Store>,
    plan: Arc<Plan>,
}

/// The number of steps so far, and the planned faults.
#[derive(Default)]
pub struct Plan {
    step: AtomicU64,
    faults: Mutex<BTreeMap<u64, StoreFault>>,
    /// Step from which on everything fails.
    end: AtomicU64,
    /// Reads fail.
    pub deaf: AtomicBool,
}

impl Plan {
    /// Creates a plan without faults.
    #[must_use]
    pub fn new() -> Arc<Self> {
        let plan = Self::default();
        plan.end.store(u64::MAX, Ordering::SeqCst);
        Arc::new(plan)
    }

    /// Steps so far.
    #[must_use]
    pub fn steps(&self) -> u64 {
        self.step.load(Ordering::SeqCst)
    }

    /// Makes this step fail.
    pub fn at(&self, step: u64, fault: StoreFault) {
        self.faults.lock().insert(step, fault);
    }

    /// Makes everything fail from this step on: the power is off.
    pub fn end_at(&self, step: u64) {
        self.end.store(step, Ordering::SeqCst);
    }

    fn next(&self) -> Option<StoreFault> {
        let step = self.step.fetch_add(1, Ordering::SeqCst);
        if step >= self.end.load(Ordering::SeqCst) {
            return Some(StoreFault::Io);
        }
        self.faults.lock().remove(&step)
    }

    fn step(&self) -> io::Result<()> {
        self.next().map_or(Ok(()), |fault| Err(fault.error()))
    }
}

impl FaultyTierStore {
    /// Wraps `inner` with the faults of `plan`.
    #[must_use]
    pub fn new(inner: Arc<dyn Store>, plan: Arc<Plan>) -> Self {
        Self { inner, plan }
    }
}

impl Store for FaultyTierStore {
    fn open(&self, name: &str) -> io::Result<Arc<dyn StoredFile>> {
        let inner = self.inner.open(name)?;
        Ok(Arc::new(FaultyFile { inner, plan: self.plan.clone() }))
    }

    fn names(&self) -> io::Result<Vec<String>> {
        self.inner.names()
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        self.plan.step()?;
        self.inner.remove(name)
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        self.plan.step()?;
        self.inner.rename(from, to)
    }

    fn available(&self) -> io::Result<u64> {
        self.inner.available()
    }
}

struct FaultyFile {
    inner: Arc<dyn StoredFile>,
    plan: Arc<Plan>,
}

impl StoredFile for FaultyFile {
    fn len(&self) -> io::Result<u64> {
        self.inner.len()
    }

    fn read_exact_at(&self, buf: &mut [u8], at: u64) -> io::Result<()> {
        if self.plan.deaf.load(Ordering::SeqCst) {
            return Err(StoreFault::Io.error());
        }
        self.inner.read_exact_at(buf, at)
    }

    fn write(&self, bytes: Arc<ChunkPayload>, at: u64) -> Local<'_, io::Result<()>> {
        Box::pin(async move {
            let fault = self.plan.next();
            if let Some(StoreFault::Short | StoreFault::Torn) = fault {
                let half = bytes.bytes()[..bytes.bytes().len() / 2].to_vec();
                self.inner.write(Arc::new(half.into()), at).await?;
            }
            match fault {
                None => self.inner.write(bytes, at).await,
                Some(StoreFault::Torn) => Ok(()),
                Some(fault) => Err(fault.error()),
            }
        })
    }

    fn sync(&self) -> Local<'_, io::Result<()>> {
        Box::pin(async move {
            self.plan.step()?;
            self.inner.sync().await
        })
    }

    fn punch(&self, at: u64, len: u64) -> io::Result<()> {
        self.plan.step()?;
        self.inner.punch(at, len)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.plan.step()?;
        self.inner.set_len(len)
    }

    fn allocated(&self) -> io::Result<u64> {
        self.inner.allocated()
    }

    fn is_linked(&self) -> io::Result<bool> {
        self.inner.is_linked()
    }
}
