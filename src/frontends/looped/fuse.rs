//! The FUSE file system with the one file `disk`.

use std::ffi::{CString, OsStr};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant, UNIX_EPOCH};

use crossbeam_channel::{Receiver, Sender, unbounded};
use fuser::{
    Config, Errno, FileAttr, FileHandle, FileType, Filesystem, Generation, INodeNo, InitFlags,
    KernelConfig, LockOwner, OpenFlags, ReplyAttr, ReplyData, ReplyDirectory, ReplyEmpty,
    ReplyEntry, ReplyOpen, ReplyWrite, Request, Session, SessionACL, WriteFlags,
};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use super::{LoopedError, step};
use crate::counters::{FrontCounters, FrontTotals};
use disk::DiskRange;
use disk::volume::{Located, Piece, Volume, VolumeError, Waiter, WritableVolume};
use formats::units::SECTOR;
use threads::{Counter, mark_io_thread};

/// Name of the file.
pub(super) const NAME: &str = "disk";
/// Inode of the file; the directory is 1 by FUSE's rule.
const FILE: INodeNo = INodeNo(2);
/// Lifetime of attributes: nothing here ever changes, so the kernel may cache them.
const FOREVER: Duration = Duration::from_secs(1 << 30);
/// Largest read, equal to the chunk of a ublk device: most reads lie in one decoded piece.
const MAX_READ: u32 = 256 * 1024;
/// Limit on the kernel's reads in flight: 64, the depth of a ublk queue. FUSE's default is 12.
const IN_FLIGHT: u16 = 64;
/// Number of session threads, which receive requests. A request that waits does not hold one.
const SESSION_THREADS: usize = 2;
/// Number of answer threads, which answer requests whose bytes have arrived.
const ANSWER_THREADS: usize = 2;
/// Time that the kernel may take to release the file after the loop device was detached.
const RELEASE: Duration = Duration::from_secs(5);

/// A read that waits for its bytes.
struct Read {
    range: DiskRange,
    reply: ReplyData,
}

/// A read with the result of its wait.
struct WaitedRead {
    read: Read,
    result: Result<(), Option<VolumeError>>,
}

/// State shared by session and answer threads.
struct SessionShared {
    volume: Arc<dyn Volume>,
    counters: FrontCounters,
    zeros: Vec<u8>,
}

impl SessionShared {
    /// Answers now, or leaves the read with the volume.
    fn read(&self, read: Read, answers: &Sender<Option<WaitedRead>>) {
        let range = read.range;
        // The volume may create and call the waiter before `locate` returns, so the read goes with the
        // waiter; if it was not needed, the slot returns it.
        let slot = Arc::new(ReadSlot {
            read: parking_lot::Mutex::new(Some(read)),
            answers: answers.clone(),
        });
        let located = self.volume.locate(range, &mut || slot.waiter());
        match located {
            Ok(Located::Pending) => {
                self.counters.pending.add(1);
            }
            Ok(Located::Ready(pieces)) => {
                if let Some(read) = slot.take() {
                    self.reply(read, &pieces);
                }
            }
            Err(error) => {
                if let Some(read) = slot.take() {
                    self.fail(read, Some(&error));
                }
            }
        }
    }

    fn reply(&self, read: Read, pieces: &[Piece]) {
        let (counters, len) = (&self.counters, read.range.buffer_len());
        if pieces.iter().map(Piece::len).sum::<usize>() != len {
            tracing::error!(read.range.offset, len, "The volume answered with a wrong length");
            return self.fail(read, None);
        }
        counters.reads.add(1);
        counters.bytes.add(read.range.len);
        if let [piece] = pieces
            && let Some(bytes) = piece.bytes()
        {
            counters.direct.add(1);
            return read.reply.data(bytes);
        }
        if pieces.iter().all(|piece| piece.bytes().is_none())
            && let Some(zeros) = self.zeros.get(..len)
        {
            counters.direct.add(1);
            return read.reply.data(zeros);
        }
        counters.gathered.add(1);
        let mut gathered = vec![0; len];
        let mut rest = gathered.as_mut_slice();
        for piece in pieces {
            let (part, tail) = rest.split_at_mut(piece.len());
            piece.copy_to(part);
            rest = tail;
        }
        read.reply.data(&gathered);
    }

    fn fail(&self, read: Read, error: Option<&VolumeError>) {
        let (offset, bytes) = (read.range.offset, read.range.len);
        match error {
            Some(error) => tracing::error!(
                offset,
                bytes,
                error = error as &dyn std::error::Error,
                "A read of the disk failed"
            ),
            None => tracing::error!(
                offset,
                bytes,
                "A read of the disk failed: the volume gave no bytes and no reason"
            ),
        }
        self.counters.errors.add(1);
        read.reply.error(Errno::EIO);
    }
}

impl SessionShared {
    /// Changes the disk; a failure is reported to the log and to the kernel.
    fn change(
        &self,
        offset: u64,
        counter: &Counter,
        what: impl FnOnce(&dyn WritableVolume) -> Result<(), VolumeError>,
    ) -> Result<(), Errno> {
        let Some(volume) = self.volume.writable() else { return Err(Errno::EROFS) };
        counter.add(1);
        what(volume).map_err(|error| {
            tracing::error!(
                offset,
                error = &error as &dyn std::error::Error,
                "A write of the disk failed"
            );
            self.counters.errors.add(1);
            Errno::from_i32(error.errno())
        })
    }
}

/// Holds a read until it is answered.
struct ReadSlot {
    read: parking_lot::Mutex<Option<Read>>,
    answers: Sender<Option<WaitedRead>>,
}

impl ReadSlot {
    fn take(&self) -> Option<Read> {
        self.read.lock().take()
    }

    fn waiter(self: &Arc<Self>) -> Waiter {
        let mut promise = ReadPromise { slot: Some(self.clone()) };
        Box::new(move |result| promise.keep(result.map_err(Some)))
    }
}

/// The one answer of a waiter; if it is dropped uncalled, the answer is an error.
struct ReadPromise {
    slot: Option<Arc<ReadSlot>>,
}

impl ReadPromise {
    fn keep(&mut self, result: Result<(), Option<VolumeError>>) {
        if let Some(slot) = self.slot.take()
            && let Some(read) = slot.take()
        {
            // Fails only when the session has ended; the dropped reply then answers EIO.
            let _ = slot.answers.send(Some(WaitedRead { read, result }));
        }
    }
}

impl Drop for ReadPromise {
    fn drop(&mut self) {
        self.keep(Err(None));
    }
}

/// Body of an answer thread; `None` in the queue ends one thread.
fn answer(
    shared: &SessionShared,
    queue: &Receiver<Option<WaitedRead>>,
    answers: &Sender<Option<WaitedRead>>,
) {
    while let Ok(Some(WaitedRead { read, result })) = queue.recv() {
        match result {
            Ok(()) => shared.read(read, answers),
            Err(error) => shared.fail(read, error.as_ref()),
        }
    }
}

struct DiskFile {
    shared: Arc<SessionShared>,
    answers: Sender<Option<WaitedRead>>,
}

impl DiskFile {
    fn attr(&self, inode: INodeNo) -> Option<FileAttr> {
        let (kind, perm, size) = match inode {
            INodeNo::ROOT => (FileType::Directory, 0o500, 0),
            FILE => {
                let perm = if self.shared.volume.writable().is_some() { 0o600 } else { 0o400 };
                (FileType::RegularFile, perm, self.shared.volume.size())
            }
            _ => return None,
        };
        Some(FileAttr {
            ino: inode,
            size,
            blocks: size / SECTOR,
            atime: UNIX_EPOCH,
            mtime: UNIX_EPOCH,
            ctime: UNIX_EPOCH,
            crtime: UNIX_EPOCH,
            kind,
            perm,
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        })
    }
}

impl Filesystem for DiskFile {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> io::Result<()> {
        // Without ASYNC_DIO each direct read of the loop device would wait for the one before.
        let _ = config.add_capabilities(InitFlags::FUSE_ASYNC_DIO);
        let _ = config.set_max_background(IN_FLIGHT);
        let _ = config.set_congestion_threshold(IN_FLIGHT);
        // A read-ahead above the kernel's offer is refused with the largest value that it accepts.
        if let Err(most) = config.set_max_readahead(MAX_READ) {
            let _ = config.set_max_readahead(most);
        }
        Ok(())
    }

    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match self.attr(FILE).filter(|_| parent == INodeNo::ROOT && name == NAME) {
            Some(attr) => reply.entry(&FOREVER, &attr, Generation(0)),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, _: &Request, inode: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        match self.attr(inode) {
            Some(attr) => reply.attr(&FOREVER, &attr),
            None => reply.error(Errno::ENOENT),
        }
    }

    /// Answers `ENOSYS`, which means that the disk keeps no state per open file: the kernel opens the file by
    /// itself, keeps its pages (a loop device that reads buffered must find a page cache), and sends no
    /// RELEASE. A RELEASE would be in flight when the last close ends the connection, and its answer would
    /// find no receiver.
    fn open(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        reply.error(Errno::ENOSYS);
    }

    fn read(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        // The page cache asks for whole pages, past the end too.
        let rest = self.shared.volume.size().saturating_sub(offset);
        let len = u64::from(size).min(rest);
        if len == 0 {
            return reply.data(&[]);
        }
        self.shared.read(Read { range: DiskRange::new(offset, len), reply }, &self.answers);
    }

    fn write(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let writes = &self.shared.counters.writes;
        match self.shared.change(offset, writes, |volume| volume.write_at(data, offset)) {
            Ok(()) => reply.written(data.len() as u32),
            Err(error) => reply.error(error),
        }
    }

    fn fsync(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        match self.shared.change(0, &self.shared.counters.flushes, |volume| volume.flush()) {
            Ok(()) => reply.ok(),
            Err(error) => reply.error(error),
        }
    }

    /// Handles each close of a file descriptor; nothing is to be done.
    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.ok();
    }

    fn fallocate(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        // Discards punch holes, WRITE_ZEROES may ask for a zero range; both read as zeros here.
        let zeros = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_ZERO_RANGE;
        if mode & zeros == 0 {
            return reply.error(Errno::EOPNOTSUPP);
        }
        let writes = &self.shared.counters.writes;
        match self
            .shared
            .change(offset, writes, |volume| volume.discard(DiskRange::new(offset, length)))
        {
            Ok(()) => reply.ok(),
            Err(error) => reply.error(error),
        }
    }

    fn readdir(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        let entries = [
            (INodeNo::ROOT, FileType::Directory, "."),
            (INodeNo::ROOT, FileType::Directory, ".."),
            (FILE, FileType::RegularFile, NAME),
        ];
        for (index, (inode, kind, name)) in entries.into_iter().enumerate().skip(offset as usize) {
            if reply.add(inode, index as u64 + 1, kind, name) {
                break;
            }
        }
        reply.ok();
    }
}

/// The file system's threads. It ends when the last user of its file closes it.
pub(super) struct FuseSession {
    dir: PathBuf,
    session: Option<JoinHandle<io::Result<()>>>,
    shared: Arc<SessionShared>,
    answers: Sender<Option<WaitedRead>>,
    threads: Vec<JoinHandle<()>>,
}

impl FuseSession {
    /// Mounts at `dir`, opens the file, detaches the mount. After an error nothing remains.
    pub(super) fn new(volume: Arc<dyn Volume>, dir: &Path) -> Result<(Self, File), LoopedError> {
        let made = match std::fs::create_dir(dir) {
            Ok(()) => true,
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => false,
            Err(error) => return Err(step("create the directory", dir)(error)),
        };
        let result = Self::serve(volume, dir);
        if made {
            let _ = std::fs::remove_dir(dir);
        }
        result
    }

    fn serve(volume: Arc<dyn Volume>, dir: &Path) -> Result<(Self, File), LoopedError> {
        let writable = volume.writable().is_some();
        let (answers, queue) = unbounded();
        let shared = Arc::new(SessionShared {
            volume,
            counters: FrontCounters::default(),
            zeros: vec![0; MAX_READ as usize],
        });
        let mut this = Self {
            dir: dir.to_owned(),
            session: None,
            shared: shared.clone(),
            answers: answers.clone(),
            threads: Vec::new(),
        };
        for number in 0..ANSWER_THREADS {
            let (shared, queue, answers) = (shared.clone(), queue.clone(), answers.clone());
            let thread = std::thread::Builder::new()
                .name(format!("disk-answer-{number}"))
                .spawn(move || {
                    mark_io_thread();
                    answer(&shared, &queue, &answers);
                })
                .map_err(step("start a thread for", dir))?;
            this.threads.push(thread);
        }
        let (mounted, device) = Mounted::new(dir, writable)?;
        let mut config = Config::default();
        config.n_threads = Some(SESSION_THREADS);
        config.clone_fd = true;
        // Only the thread is kept: the rest of the handle has a descriptor of the connection. The session
        // threads must have the only ones: if they end at their start, for lack of descriptors, the kernel
        // ends the connection, and the open below fails instead of waiting without end.
        let start = || {
            mark_io_thread();
            Session::from_fd(DiskFile { shared, answers }, device, SessionACL::All, config)
                .and_then(Session::spawn)
                .map(|session| session.guard)
        };
        // The session threads inherit the mark from a thread of this moment: the caller must not keep it.
        let session = std::thread::scope(|scope| scope.spawn(start).join())
            .unwrap_or_else(|_| Err(io::Error::other("the start of a session panicked")));
        this.session = Some(session.map_err(step("serve the file system at", dir))?);
        let file = dir.join(NAME);
        let opened = OpenOptions::new().read(true).write(writable).open(&file);
        let file = opened.map_err(step("open", &file))?;
        drop(mounted);
        Ok((this, file))
    }

    /// Counters now.
    pub(super) fn counters(&self) -> FrontTotals {
        self.shared.counters.totals()
    }

    /// Joins the threads; the file must be closed everywhere.
    pub(super) fn end(mut self) -> Result<(), LoopedError> {
        self.join()
    }

    /// Lets the threads serve the remaining users of the file, until they close it.
    pub(super) fn abandon(mut self) {
        self.session = None;
        self.threads.clear();
    }

    fn join(&mut self) -> Result<(), LoopedError> {
        let mut result = Ok(());
        if let Some(session) = self.session.take() {
            // Without a file and a mount the kernel ends the connection, a moment later; each session
            // thread's read then fails with ENODEV.
            let until = Instant::now() + RELEASE;
            while !session.is_finished() && Instant::now() < until {
                std::thread::sleep(Duration::from_millis(1));
            }
            result = if session.is_finished() {
                end_of(session)
            } else {
                Err(io::ErrorKind::TimedOut.into())
            }
            .map_err(step("end the file system of", &self.dir));
        }
        for _ in &self.threads {
            let _ = self.answers.send(None);
        }
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
        result
    }
}

/// The result of the session's first thread.
fn end_of(session: JoinHandle<io::Result<()>>) -> io::Result<()> {
    match session.join() {
        // The error of a read that is inside the kernel when the connection ends.
        Ok(Err(error)) if error.kind() == io::ErrorKind::ConnectionAborted => Ok(()),
        Ok(result) => result,
        Err(_) => Err(io::Error::other("a session thread panicked")),
    }
}

impl Drop for FuseSession {
    fn drop(&mut self) {
        if let Err(error) = self.join() {
            tracing::error!(
                error = &error as &dyn std::error::Error,
                "A FUSE session does not end"
            );
        }
    }
}

/// The FUSE device node.
const DEVICE: &str = "/dev/fuse";

/// A FUSE mount, detached from the tree when dropped: it then lives as long as its open files.
struct Mounted<'a> {
    dir: &'a Path,
}

impl<'a> Mounted<'a> {
    /// Calls `mount(2)` directly instead of through the library, for the options and for exact errors.
    fn new(dir: &'a Path, writable: bool) -> Result<(Self, OwnedFd), LoopedError> {
        let path = Path::new(DEVICE);
        let device = OpenOptions::new().read(true).write(true).open(path);
        let device: OwnedFd = device.map_err(step("open", path))?.into();
        let options = format!(
            "fd={},rootmode=40000,user_id=0,group_id=0,max_read={MAX_READ}",
            device.as_raw_fd()
        );
        let options =
            CString::new(options).map_err(io::Error::other).map_err(step("mount", dir))?;
        let mut flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
        if !writable {
            flags |= MountFlags::RDONLY;
        }
        mount("turbobd", dir, "fuse.turbobd", flags, options.as_c_str())
            .map_err(io::Error::from)
            .map_err(step("mount a FUSE file system at", dir))?;
        Ok((Self { dir }, device))
    }
}

impl Drop for Mounted<'_> {
    fn drop(&mut self) {
        if let Err(error) = unmount(self.dir, UnmountFlags::DETACH) {
            tracing::error!(dir = %self.dir.display(), %error, "Cannot detach a FUSE mount");
        }
    }
}
