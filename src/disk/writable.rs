//! A layer that is being written: append-only, two files (spec lsmt 2 and 7).
//!
//! ```text
//! data   header 4096 | payload, in the order of the writes
//! index  header 4096 | 16 bytes a write: these disk sectors are at that place; the last one wins
//! ```
//!
//! A write appends its bytes to `data`. A discard appends no data: its record says zero. The positions of all
//! sectors are kept in memory (`Extents`), so a read is a look-up and a `pread`.
//!
//! # State after a crash
//!
//! The format has no checksum and no sequence number, so safety depends only on the order of writing. Records
//! are held back in memory. [`flush`](WritableLayer::flush) first makes the data durable, then writes the
//! records, then makes those durable: a record on disk never points at bytes that are not there. Flushed
//! changes are present after a crash. Each later write is present as a whole or not at all, as a disk with a
//! write cache promises. A torn tail of the index (a partial record, a record of zeros, one that points past
//! the data) is cut off when the layer is opened again.
//!
//! A write completes only if the index file has room for its record (`room`), so an acknowledged write can
//! still be flushed when the filesystem is full.
//!
//! Space of overwritten data is not reclaimed: [`commit`](WritableLayer::commit) copies only the current
//! data. Upstream can open both files unchanged, at any moment after a flush.
//!
//! # Steps
//!
//! Each change has three steps, and only the second does file I/O: a *place* in the data file is taken, the
//! bytes are written there, the record is noted. A flush has three steps too: a *batch* of records is taken,
//! written and made durable, and counted. [`WritableLayer`] does the steps in a row for one thread.
//! [`SharedLayer`] does them for many threads and holds its lock during none of the I/O.
//!
//! Upstream has a second kind, [`sparse`]: its payload lies in one file, each sector at its position on the
//! disk.
//!
//! Contents: `log` reading the index file, `place` a change in progress, `room` space for records, `batch` a
//! flush in progress, [`shared`] a layer for many threads, `seal` turning a layer into one of the layers
//! below, [`mod@view`] a read-only view.

mod batch;
mod extents;
mod log;
mod place;
mod room;
mod seal;
pub mod shared;
pub mod sparse;
mod view;

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::io::{ReadWriteFlags, preadv2};
use thiserror::Error;

pub use shared::SharedLayer;
pub use sparse::SparseLayer;
pub use view::view;

use self::batch::{BatchFailure, MappingBatch};
use self::extents::{Extents, RUN_MEMORY, RunContent};
use self::log::Log;
use self::place::RunWrite;
use self::room::IndexRoom;
use crate::DiskRange;
use formats::lsmt::layer::{FLAG_DATA, FLAG_HEADER, LsmtHeader, Uuid};
use formats::lsmt::mapping::{ENTRY, LBA_LIMIT, MAX_LEN, MOFFSET_LIMIT, Mapping};
use formats::lsmt::writer::{LayerIdentity, NativeWriter};
use formats::lsmt::{LsmtError, RECORD};
use formats::units::{Bytes, SECTOR, Sectors};
use source::{OverBudget, Reserved};

/// The data file in a layer's folder, named as by containerd's snapshotter.
pub const DATA_NAME: &str = "writable_data";
/// The index file.
pub const INDEX_NAME: &str = "writable_index";

/// Largest number of records of a writable index (upstream's limit, spec lsmt 5).
const MAX_RECORDS: u64 = 128_000_000;

/// Most records held back: 1 MiB of index.
const HELD_BACK: u64 = 1 << 16;

/// Steps in which memory of the index is reserved: a thousand runs.
const MEMORY_STEP: u64 = 1000 * RUN_MEMORY;

/// Bytes per step of a commit's copying and of its search for zeros.
const COPY: usize = 1 << 20;
const BLOCK: u64 = 4096 / SECTOR;

/// Error of using a writable layer.
#[derive(Debug, Error)]
pub enum WritableError {
    /// A file cannot be made, read or written.
    #[error("Cannot {what} {path}", path = path.display())]
    Io {
        /// The action that failed.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// A header breaks a rule of the format.
    #[error("{path} is not a usable writable layer: {rule}", path = path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// The broken rule.
        rule: &'static str,
    },
    /// Another process uses the layer.
    #[error("The writable layer {path} is in use", path = path.display())]
    Busy {
        /// The data file.
        path: PathBuf,
    },
    /// A range that is not whole sectors, or leaves the disk.
    #[error("Bytes {offset}..{end} cannot be written: {rule}")]
    Range {
        /// First byte.
        offset: u64,
        /// One past the last byte.
        end: u64,
        /// The broken rule.
        rule: &'static str,
    },
    /// An earlier flush failed. It is unknown which writes since the flush before it reached the disk,
    /// because the kernel reports such an error only once.
    #[error("An earlier flush of {path} failed: detach, check its disk, and attach again", path = path.display())]
    Broken {
        /// The data file.
        path: PathBuf,
    },
    /// The index of the written data has no room in memory.
    #[error(transparent)]
    Memory(#[from] OverBudget),
    /// The log has reached its limit.
    #[error("The writable layer has {MAX_RECORDS} records, the limit of readers: commit it")]
    Full,
    /// The committed layer breaks a limit, or cannot be written.
    #[error(transparent)]
    Commit(#[from] LsmtError),
}

impl WritableError {
    /// True if there is no space: on the filesystem, in a quota, or in the format.
    #[must_use]
    pub fn is_full(&self) -> bool {
        match self {
            Self::Io { source, .. } => {
                matches!(source.raw_os_error(), Some(libc::ENOSPC | libc::EDQUOT))
            }
            Self::Full | Self::Memory(_) => true,
            _ => false,
        }
    }
}

/// The paths of a layer's two files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WritableFiles {
    /// The payload.
    pub data: PathBuf,
    /// The index log; for a sparse layer, a file that is never read.
    pub index: PathBuf,
}

impl WritableFiles {
    /// The names that containerd's snapshotter gives them in a layer's folder.
    #[must_use]
    pub fn in_dir(dir: &Path) -> Self {
        Self { data: dir.join(DATA_NAME), index: dir.join(INDEX_NAME) }
    }
}

/// An open file with its name, for messages.
struct Named {
    file: File,
    path: PathBuf,
}

impl Named {
    fn error(&self, what: &'static str) -> impl FnOnce(io::Error) -> WritableError + use<> {
        let path = self.path.clone();
        move |source| WritableError::Io { what, path, source }
    }

    fn invalid(&self, rule: &'static str) -> WritableError {
        WritableError::Invalid { path: self.path.clone(), rule }
    }

    fn open(path: &Path, options: &OpenOptions) -> Result<Self, WritableError> {
        let path = path.to_path_buf();
        match options.open(&path) {
            Ok(file) => Ok(Self { file, path }),
            Err(source) => Err(WritableError::Io { what: "open", path, source }),
        }
    }

    fn open_to_read(path: &Path) -> Result<Self, WritableError> {
        Self::open(path, OpenOptions::new().read(true))
    }

    fn open_to_write(path: &Path) -> Result<Self, WritableError> {
        Self::open(path, OpenOptions::new().read(true).write(true))
    }

    fn lock(&self) -> Result<(), WritableError> {
        if sys::flock::exclusive(&self.file, sys::flock::MOMENT).unwrap_or(false) {
            Ok(())
        } else {
            Err(WritableError::Busy { path: self.path.clone() })
        }
    }

    /// Bytes of the file.
    fn len(&self) -> Result<u64, WritableError> {
        self.file.metadata().map(|meta| meta.len()).map_err(self.error("look at"))
    }

    /// Reads from sector `at` of the file; can wait for the disk.
    fn read(&self, at: Sectors, buf: &mut [u8]) -> Result<(), WritableError> {
        self.file.read_exact_at(buf, at.0 * SECTOR).map_err(self.error("read"))
    }

    /// Reads from sector `at` if the page cache has all of it.
    fn read_cached(&self, at: Sectors, buf: &mut [u8]) -> bool {
        let len = buf.len();
        let mut buffers = [io::IoSliceMut::new(buf)];
        let read = preadv2(&self.file, &mut buffers, at.0 * SECTOR, ReadWriteFlags::NOWAIT);
        read == Ok(len)
    }

    fn header(&self) -> Result<LsmtHeader, WritableError> {
        let mut bytes = [0; RECORD as usize];
        self.file.read_exact_at(&mut bytes, 0).map_err(|source| match source.kind() {
            io::ErrorKind::UnexpectedEof => self.invalid("it is shorter than its header"),
            _ => self.error("read")(source),
        })?;
        LsmtHeader::parse(&bytes).map_err(|rule| self.invalid(rule))
    }
}

/// Refuses a data file that does not belong to an append-only layer, or no longer does.
fn check_appended(data: &Named, header: &LsmtHeader) -> Result<(), WritableError> {
    if header.flags != FLAG_HEADER | FLAG_DATA {
        return Err(data.invalid(
            "its header is not that of an append-only layer; a sparse one becomes a layer when it is sealed",
        ));
    }
    seal::check_unsealed(data)
}

/// First sector and number of sectors of a range. The disk has `size` bytes; 0 accepts any range.
fn whole_sectors(size: u64, range: DiskRange) -> Result<(Sectors, u64), WritableError> {
    let DiskRange { offset, len } = range;
    let end = range.end();
    let limit = match size {
        0 => LBA_LIMIT.saturating_mul(SECTOR),
        size => size,
    };
    let rule = if !offset.is_multiple_of(SECTOR) || !len.is_multiple_of(SECTOR) {
        "they are not whole sectors of 512 bytes"
    } else if end > limit {
        "the disk ends before them"
    } else {
        return Ok((Sectors(offset / SECTOR), len / SECTOR));
    };
    Err(WritableError::Range { offset, end, rule })
}

/// Position of a run of disk sectors, by this layer alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WrittenRun {
    /// First disk sector.
    pub lba: Sectors,
    /// Number of sectors, never 0.
    pub len: Sectors,
    /// Position of the run.
    pub place: WrittenPlace,
}

/// Position of a [`WrittenRun`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WrittenPlace {
    /// Never written: the run comes from the layers below.
    Below,
    /// Zeros.
    Zero,
    /// At this sector of the data file.
    Data(Sectors),
}

/// An append-only layer.
pub struct WritableLayer {
    data: Arc<Named>,
    index: Arc<Named>,
    room: Arc<IndexRoom>,
    header: LsmtHeader,
    extents: Extents,
    /// What the runs of `extents` take.
    memory: Reserved,
    /// Sector of the data file for the next payload.
    position: u64,
    /// Records in the index file.
    records: u64,
    /// Records of the batch in progress.
    leaving: u64,
    /// Records that are not in the index file yet.
    pending: Vec<Mapping>,
    /// Records of changes in progress: their place is taken, but they are not noted yet.
    promised: u64,
    /// Bytes of a torn tail that were cut off at opening.
    cut: u64,
    /// True after a failed flush.
    broken: bool,
}

impl WritableLayer {
    /// Makes an empty layer of a disk of `virtual_size` in `files`; 0 stands for the size given by the layer
    /// below. Their folder is made if needed.
    ///
    /// # Errors
    /// [`WritableError`], also if the files exist.
    pub fn create(
        files: &WritableFiles,
        virtual_size: Bytes,
        identity: LayerIdentity,
    ) -> Result<Self, WritableError> {
        let WritableFiles { data: data_path, index: index_path } = files;
        let dir = data_path.parent().unwrap_or(Path::new("."));
        let io = |what, path: &Path| {
            let path = path.to_path_buf();
            move |source| WritableError::Io { what, path, source }
        };
        fs::create_dir_all(dir).map_err(io("make the folder", dir))?;
        let header = LsmtHeader {
            flags: FLAG_HEADER | FLAG_DATA,
            index_offset: 0,
            index_size: 0,
            virtual_size: virtual_size.get(),
            uuid: identity.uuid,
            parent: identity.parent,
            user_tag: identity.user_tag,
        };
        // The index is made first: a layer exists once its data file exists, and is then complete.
        let index_header =
            LsmtHeader { flags: FLAG_HEADER, index_offset: RECORD, ..header.clone() };
        for (path, record) in [(index_path, &index_header), (data_path, &header)] {
            if path == index_path && data_path.exists() {
                let source = io::Error::from(io::ErrorKind::AlreadyExists);
                return Err(io("make", data_path)(source));
            }
            let mut file = File::create(path).map_err(io("make", path))?;
            file.write_all(&record.encode()).map_err(io("write", path))?;
            file.sync_all().map_err(io("write", path))?;
        }
        File::open(dir).and_then(|dir| dir.sync_all()).map_err(io("write", dir))?;
        Self::open(files)
    }

    /// Opens a layer by its two files, and cuts off a torn tail.
    ///
    /// # Errors
    /// [`WritableError`].
    pub fn open(files: &WritableFiles) -> Result<Self, WritableError> {
        Self::open_within(files, Reserved::unbounded())
    }

    /// As [`open`](Self::open), with the memory of the layer's index in `memory`, which grows with it. A change for which
    /// it has no room fails with [`WritableError::Memory`].
    ///
    /// # Errors
    /// [`WritableError`].
    pub fn open_within(files: &WritableFiles, mut memory: Reserved) -> Result<Self, WritableError> {
        let (data, index) =
            (Named::open_to_write(&files.data)?, Named::open_to_write(&files.index)?);
        data.lock()?;
        let header = data.header()?;
        check_appended(&data, &header)?;
        let log = Log::read(&index, &data, &mut memory)?;
        let (data, index) = (Arc::new(data), Arc::new(index));
        let layer = Self {
            room: Arc::new(IndexRoom::new(index.clone())),
            data,
            index,
            header,
            extents: log.extents,
            memory,
            position: log.position,
            records: log.records,
            leaving: 0,
            pending: Vec::new(),
            promised: 0,
            cut: log.torn,
            broken: false,
        };
        layer.cut_tails()?;
        Ok(layer)
    }

    /// A new layer whose index grows in `memory`, as with [`open_within`](Self::open_within).
    #[must_use]
    pub fn within(self, memory: Reserved) -> Self {
        Self { memory, ..self }
    }

    /// Cuts off unflushed bytes: the end of the log, and payload without a record.
    fn cut_tails(&self) -> Result<(), WritableError> {
        if self.cut > 0 {
            let kept = RECORD + self.records * ENTRY;
            self.index.file.set_len(kept).map_err(self.index.error("shorten"))?;
        }
        self.data.file.set_len(self.position * SECTOR).map_err(self.data.error("shorten"))
    }

    /// Size of the disk by this layer, or 0.
    #[must_use]
    pub fn virtual_size(&self) -> Bytes {
        Bytes(self.header.virtual_size)
    }

    /// Identity of this layer and of the one below.
    #[must_use]
    pub fn uuids(&self) -> (Uuid, Uuid) {
        (self.header.uuid, self.header.parent)
    }

    /// Bytes of a torn tail that were cut off at opening.
    #[must_use]
    pub fn cut(&self) -> u64 {
        self.cut
    }

    /// True if the layer was never written to.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.extents.is_empty()
    }

    /// Writes whole sectors at byte `offset` of the disk. Durable after the next [`flush`](Self::flush).
    ///
    /// # Errors
    /// [`WritableError`]; then the layer is unchanged.
    pub fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<(), WritableError> {
        let place = self.take_place(DiskRange::new(offset, bytes.len() as u64))?;
        let written = place.write(bytes);
        self.settle(&place, written)
    }

    /// Makes whole sectors zero, whatever the layers below contain. Durable after the next flush.
    ///
    /// # Errors
    /// [`WritableError`].
    pub fn discard(&mut self, range: DiskRange) -> Result<(), WritableError> {
        let place = self.take_zeros(range)?;
        let made = place.make_room();
        self.settle(&place, made)
    }

    fn settle(
        &mut self,
        place: &RunWrite,
        written: Result<(), WritableError>,
    ) -> Result<(), WritableError> {
        if let Err(error) = written {
            self.give_back(place);
            return Err(error);
        }
        if self.note_place(place) { self.flush() } else { Ok(()) }
    }

    /// Takes the next place in the data file for a range of the disk.
    fn take_place(&mut self, range: DiskRange) -> Result<RunWrite, WritableError> {
        let (lba, count) = whole_sectors(self.header.virtual_size, range)?;
        if self.position + count > MOFFSET_LIMIT {
            return Err(WritableError::Full);
        }
        let place = self.promise(lba.0, count, RunContent::At(self.position))?;
        self.position += count;
        Ok(place)
    }

    /// Takes a place for zeros, which need only a record.
    fn take_zeros(&mut self, range: DiskRange) -> Result<RunWrite, WritableError> {
        let (lba, count) = whole_sectors(self.header.virtual_size, range)?;
        self.promise(lba.0, count, RunContent::Zero)
    }

    fn promise(
        &mut self,
        lba: u64,
        count: u64,
        content: RunContent,
    ) -> Result<RunWrite, WritableError> {
        if self.broken {
            return Err(self.is_broken());
        }
        let needs = count.div_ceil(MAX_LEN);
        let all = self.records + self.leaving + self.pending.len() as u64 + self.promised + needs;
        if all > MAX_RECORDS {
            return Err(WritableError::Full);
        }
        // Each change adds two runs at most: itself, and the end of one that it parts.
        let runs = self.extents.count() + 2 * (self.promised + needs);
        let needed = runs * RUN_MEMORY;
        if needed > self.memory.bytes() {
            let what = format!("The index of {}", self.data.path.display());
            let step = needed.next_multiple_of(MEMORY_STEP);
            self.memory.grow_to(step, &what).or_else(|_| self.memory.grow_to(needed, &what))?;
        }
        self.promised += needs;
        let (data, room) = (self.data.clone(), self.room.clone());
        let index_end = RECORD + all * ENTRY;
        Ok(RunWrite { data, room, index_end, lba, count, needs, content })
    }

    /// Undoes a change that failed. If another place was taken since, this place stays unused.
    fn give_back(&mut self, place: &RunWrite) {
        self.promised -= place.needs;
        if let RunContent::At(at) = place.content
            && at + place.count == self.position
        {
            self.position = at;
        }
    }

    /// Notes a change whose bytes are in their place. Returns `true` if a flush is due, because many records
    /// are held back.
    fn note_place(&mut self, place: &RunWrite) -> bool {
        self.promised -= place.needs;
        self.extents.insert(place.lba, place.count, place.content);
        self.pending.extend(place.records(self.position));
        self.pending.len() as u64 >= HELD_BACK
    }

    fn is_broken(&self) -> WritableError {
        WritableError::Broken { path: self.data.path.clone() }
    }

    /// Makes all writes up to now durable.
    ///
    /// # Errors
    /// [`WritableError::Io`]. If the step that makes bytes durable failed, every later call returns
    /// [`WritableError::Broken`]: changes flushed before are safe, and the state of the others is unknown
    /// until the layer is opened again. A flush that failed for another reason, such as a lack of space, can
    /// be repeated.
    pub fn flush(&mut self) -> Result<(), WritableError> {
        let Some(batch) = self.take_batch()? else { return Ok(()) };
        let written = batch.write();
        self.end_batch(batch, written)
    }

    /// Takes the records that are held back; `None` if there are none. Only one batch exists at a time.
    fn take_batch(&mut self) -> Result<Option<MappingBatch>, WritableError> {
        if self.broken {
            return Err(self.is_broken());
        }
        if self.pending.is_empty() {
            return Ok(None);
        }
        let records = std::mem::take(&mut self.pending);
        self.leaving = records.len() as u64;
        let (data, index) = (self.data.clone(), self.index.clone());
        Ok(Some(MappingBatch { data, index, first: self.records, records }))
    }

    /// Notes the result of a batch.
    fn end_batch(
        &mut self,
        mut batch: MappingBatch,
        written: Result<(), BatchFailure>,
    ) -> Result<(), WritableError> {
        self.leaving = 0;
        match written {
            Ok(()) => {
                self.records += batch.records.len() as u64;
                Ok(())
            }
            Err(failure) => {
                // Keeps the order in which they were noted.
                batch.records.append(&mut self.pending);
                self.pending = batch.records;
                self.broken |= failure.is_lasting();
                Err(failure.into())
            }
        }
    }

    /// The runs of `count` sectors from `lba` on, without a gap.
    #[must_use]
    pub fn look_up(&self, lba: Sectors, count: Sectors) -> Vec<WrittenRun> {
        runs(&self.extents, lba, count)
    }

    /// Reads payload from sector `at` of the data file on.
    ///
    /// # Errors
    /// [`WritableError::Io`].
    pub fn read_data(&self, at: Sectors, buf: &mut [u8]) -> Result<(), WritableError> {
        self.data.read(at, buf)
    }

    /// Writes the current content of the layer as a committed layer (spec lsmt 8.1): without overwritten
    /// data, in the order of the disk, and with blocks of zeros declared instead of stored. The layer is
    /// flushed first and stays unchanged.
    ///
    /// # Errors
    /// [`WritableError::Commit`] for a limit of the format or a full output.
    pub fn commit<W: Write>(
        &mut self,
        out: W,
        virtual_size: Bytes,
        identity: LayerIdentity,
    ) -> Result<W, WritableError> {
        self.flush()?;
        let mut writer = NativeWriter::new(out, virtual_size, identity)?;
        let mut buf = vec![0; COPY];
        for (start, len, content) in self.extents.iter() {
            let at = match content {
                RunContent::Zero => {
                    writer.zeroed(Sectors(start), Sectors(len))?;
                    continue;
                }
                RunContent::At(at) => at,
            };
            let mut done = 0;
            while done < len {
                // Steps end at blocks of the disk, so that blocks of zeros are found.
                let step = (COPY as u64 / SECTOR).min(len - done);
                let bytes = &mut buf[..(step * SECTOR) as usize];
                self.read_data(Sectors(at + done), bytes)?;
                put(&mut writer, start + done, bytes)?;
                done += step;
            }
        }
        Ok(writer.finish()?)
    }
}

/// The runs of `count` sectors from `lba` on, without a gap.
fn runs(extents: &Extents, lba: Sectors, count: Sectors) -> Vec<WrittenRun> {
    let mut runs = Vec::new();
    let mut at = lba.0;
    let end = lba.0.saturating_add(count.0);
    let mut add = |from: u64, to: u64, place| {
        if from < to {
            runs.push(WrittenRun { lba: Sectors(from), len: Sectors(to - from), place });
        }
    };
    for (start, len, content) in extents.within(lba.0, end) {
        add(at, start, WrittenPlace::Below);
        let place = match content {
            RunContent::Zero => WrittenPlace::Zero,
            RunContent::At(place) => WrittenPlace::Data(Sectors(place)),
        };
        add(start, start + len, place);
        at = start + len;
    }
    add(at, end, WrittenPlace::Below);
    runs
}

/// Adds sectors from `lba` on; whole blocks of zeros are declared as zeros.
fn put<W: Write>(writer: &mut NativeWriter<W>, lba: u64, bytes: &[u8]) -> Result<(), LsmtError> {
    let count = bytes.len() as u64 / SECTOR;
    let part = |from: u64, to: u64| &bytes[(from * SECTOR) as usize..(to * SECTOR) as usize];
    let zero =
        |from: u64, to: u64| to - from == BLOCK && part(from, to).iter().all(|&byte| byte == 0);
    // Ends of the blocks of the disk that the run touches.
    let mut at = 0;
    while at < count {
        let block_end = |at: u64| (BLOCK - (lba + at) % BLOCK + at).min(count);
        let mut end = block_end(at);
        let is_zero = zero(at, end);
        while end < count && zero(end, block_end(end)) == is_zero {
            end = block_end(end);
        }
        if is_zero {
            writer.zeroed(Sectors(lba + at), Sectors(end - at))?;
        } else {
            writer.data(Sectors(lba + at), part(at, end))?;
        }
        at = end;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
