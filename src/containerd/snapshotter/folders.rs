//! Folders of snapshots, and their removal.
//!
//! ```text
//! ROOT/records.redb         the store
//! ROOT/snapshots/ID/fs      files of a snapshot: the upper folder of its mount, a lower one of its children's
//! ROOT/snapshots/ID/work    for overlayfs, of active snapshots
//! ROOT/trash/N              folders of removed snapshots, and what is left of them
//! ```
//!
//! A removed folder is renamed into the trash, which takes no time whatever is in it; the thread `trash` takes it apart. It never
//! descends: it moves the subfolders of a folder into the trash beside it and removes the folder, so that neither depth nor
//! number of files has a limit, and work that was cut off goes on at the next start. What is mounted below stays
//! untouched, because a mount point cannot be moved.

use std::fs::{self, DirBuilder, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Instant;

use parking_lot::{Condvar, Mutex};

use super::error::{SnapshotError, step};
use super::failpoint;

/// Mode of the root of a container: the tools of every user must enter it.
const FS_MODE: u32 = 0o755;

/// Mode of the folder for overlayfs.
const WORK_MODE: u32 = 0o711;

/// Mode of a snapshot's folder. Other users get in through mounts alone.
const FOLDER_MODE: u32 = 0o700;

/// The folders of a root.
#[derive(Debug)]
pub struct Folders {
    root: PathBuf,
    trash: Arc<Trash>,
    thread: Option<JoinHandle<()>>,
}

/// Folders to take apart, and the state of the thread that does it.
#[derive(Debug)]
struct Trash {
    place: PathBuf,
    next: AtomicU64,
    work: Mutex<TrashWork>,
    changed: Condvar,
}

/// What the thread `trash` has to do.
#[derive(Debug, Default)]
struct TrashWork {
    /// Something came in, or a caller wants another try.
    wanted: bool,
    /// The thread takes folders apart.
    busy: bool,
    /// The thread ends.
    ending: bool,
}

impl Folders {
    /// Makes what is missing of a root, and starts the thread of the trash.
    ///
    /// # Errors
    /// Returns [`SnapshotError::Folder`].
    pub fn open(root: &Path) -> Result<Self, SnapshotError> {
        let place = root.join("trash");
        for folder in [&root.join("snapshots"), &place] {
            let made = DirBuilder::new().recursive(true).mode(FOLDER_MODE).create(folder);
            made.map_err(step("make the folder", folder.as_path()))?;
        }
        let names = fs::read_dir(&place).map_err(step("read the folder", &place))?;
        let numbers =
            names.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<u64>().ok());
        let next = numbers.max().map_or(1, |number| number.saturating_add(1));
        let trash = Arc::new(Trash {
            place: place.clone(),
            next: AtomicU64::new(next),
            work: Mutex::new(TrashWork { wanted: true, ..TrashWork::default() }),
            changed: Condvar::new(),
        });
        let thread = std::thread::Builder::new()
            .name("trash".to_owned())
            .spawn({
                let trash = trash.clone();
                move || trash.serve()
            })
            .map_err(step("start the thread of", &place))?;
        Ok(Self { root: root.to_owned(), trash, thread: Some(thread) })
    }

    /// Folder of the folders of all snapshots.
    #[must_use]
    pub fn snapshots(&self) -> PathBuf {
        self.root.join("snapshots")
    }

    /// Folder of a snapshot.
    #[must_use]
    pub fn folder(&self, id: u64) -> PathBuf {
        self.root.join(format!("snapshots/{id}"))
    }

    /// Its folder of files.
    #[must_use]
    pub fn upper(&self, id: u64) -> PathBuf {
        self.root.join(format!("snapshots/{id}/fs"))
    }

    /// Its folder for overlayfs.
    #[must_use]
    pub fn work(&self, id: u64) -> PathBuf {
        self.root.join(format!("snapshots/{id}/work"))
    }

    /// Makes the folder of a snapshot, durably; `work` with the folder for overlayfs. The folder of files belongs to `owner`
    /// (user, group), as the root folder of the layer below does.
    ///
    /// # Errors
    /// Returns [`SnapshotError::Folder`]; the folder is then in the trash.
    pub fn create(
        &self,
        id: u64,
        work: bool,
        owner: Option<(u32, u32)>,
    ) -> Result<(), SnapshotError> {
        make(&self.folder(id), FOLDER_MODE)?;
        failpoint::reached("folder-begun");
        let filled = self.fill(id, work, owner);
        if filled.is_err() {
            let _ = self.discard(id);
        }
        filled
    }

    fn fill(&self, id: u64, work: bool, owner: Option<(u32, u32)>) -> Result<(), SnapshotError> {
        let folder = self.folder(id);
        let upper = self.upper(id);
        make(&upper, FS_MODE)?;
        if let Some((user, group)) = owner {
            std::os::unix::fs::lchown(&upper, Some(user), Some(group))
                .map_err(step("give away the folder", &upper))?;
        }
        if work {
            make(&self.work(id), WORK_MODE)?;
        }
        failpoint::reached("folder-made");
        // The last change of the folder: what came before it, its own name included, is in the same or an earlier transaction of the
        // journals of ext4, xfs and btrfs.
        let synced = fs::File::open(&folder).and_then(|file| file.sync_all());
        synced.map_err(step("write to disk the folder", &folder))?;
        failpoint::reached("folder-durable");
        Ok(())
    }

    /// Moves the folder of a snapshot to the trash; a missing one is no error.
    ///
    /// # Errors
    /// Returns [`SnapshotError::Folder`].
    pub fn discard(&self, id: u64) -> Result<(), SnapshotError> {
        self.discard_path(&self.folder(id))
    }

    /// Moves anything of the root to the trash.
    ///
    /// # Errors
    /// Returns [`SnapshotError::Folder`].
    pub fn discard_path(&self, path: &Path) -> Result<(), SnapshotError> {
        match fs::rename(path, self.trash.place()) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            moved => moved.map_err(step("move to the trash", path))?,
        }
        failpoint::reached("folder-moved");
        self.trash.wake();
        Ok(())
    }

    /// Waits until the trash has been taken apart, at most until `until`. True if nothing is left of it.
    #[must_use]
    pub fn empty(&self, until: Instant) -> bool {
        let mut work = self.trash.work.lock();
        work.wanted = true;
        self.trash.changed.notify_all();
        while work.wanted || work.busy {
            if self.trash.changed.wait_until(&mut work, until).timed_out() {
                return false;
            }
        }
        drop(work);
        fs::read_dir(&self.trash.place).is_ok_and(|mut names| names.next().is_none())
    }
}

/// Makes a folder with this mode, whatever the umask of the process.
fn make(path: &Path, mode: u32) -> Result<(), SnapshotError> {
    let made = DirBuilder::new().mode(mode).create(path);
    made.and_then(|()| fs::set_permissions(path, Permissions::from_mode(mode)))
        .map_err(step("make the folder", path))
}

impl Drop for Folders {
    fn drop(&mut self) {
        self.trash.work.lock().ending = true;
        self.trash.changed.notify_all();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Trash {
    /// A name that nothing in the trash has.
    fn place(&self) -> PathBuf {
        self.place.join(self.next.fetch_add(1, Ordering::Relaxed).to_string())
    }

    fn wake(&self) {
        self.work.lock().wanted = true;
        self.changed.notify_all();
    }

    fn is_ending(&self) -> bool {
        self.work.lock().ending
    }

    /// Body of the thread.
    fn serve(&self) {
        loop {
            {
                let mut work = self.work.lock();
                work.busy = false;
                self.changed.notify_all();
                while !work.wanted && !work.ending {
                    self.changed.wait(&mut work);
                }
                if work.ending {
                    return;
                }
                (work.wanted, work.busy) = (false, true);
            }
            self.take_apart();
        }
    }

    /// Removes what is in the trash, again and again while folders come out of folders. What cannot be removed stays for the next
    /// time.
    fn take_apart(&self) {
        loop {
            let Ok(names) = fs::read_dir(&self.place) else { return };
            let before = self.next.load(Ordering::Relaxed);
            let mut removed = false;
            for entry in names.flatten() {
                if self.is_ending() {
                    return;
                }
                failpoint::reached("trash-opened");
                match self.remove(&entry.path()) {
                    Ok(()) => removed = true,
                    Err(_) if self.is_ending() => return,
                    Err(error) => tracing::warn!(
                        "{} of a removed snapshot cannot be removed now: {error}",
                        entry.path().display()
                    ),
                }
                failpoint::reached("trash-emptied");
            }
            // Neither is anything gone, nor has anything come out of a folder.
            if !removed && before == self.next.load(Ordering::Relaxed) {
                return;
            }
        }
    }

    /// Removes one thing of the trash; its subfolders become things of their own.
    fn remove(&self, path: &Path) -> io::Result<()> {
        match fs::remove_file(path) {
            // Linux says EISDIR of a folder.
            Err(error) if error.kind() == io::ErrorKind::IsADirectory => {}
            removed => return removed,
        }
        if fs::remove_dir(path).is_ok() {
            return Ok(());
        }
        for entry in fs::read_dir(path)? {
            let entry = entry?;
            if self.is_ending() {
                return Err(io::ErrorKind::Interrupted.into());
            }
            if entry.file_type()?.is_dir() {
                let inner = entry.path();
                if fs::remove_dir(&inner).is_err() {
                    fs::rename(inner, self.place())?;
                }
            } else {
                fs::remove_file(entry.path())?;
            }
        }
        fs::remove_dir(path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt as _;
    use std::time::Duration;

    fn minute() -> Instant {
        Instant::now() + Duration::from_secs(60)
    }

    #[test]
    fn folders_have_their_modes_whatever_the_umask() {
        let dir = tempfile::tempdir().unwrap();
        let folders = Folders::open(dir.path()).unwrap();
        folders.create(1, true, None).unwrap();
        folders.create(2, false, None).unwrap();
        let mode = |path: PathBuf| fs::metadata(path).unwrap().mode() & 0o7777;
        assert_eq!(mode(folders.upper(1)), 0o755);
        assert_eq!(mode(folders.work(1)), 0o711);
        assert_eq!(mode(folders.folder(1)), 0o700);
        assert!(!folders.work(2).exists());
        assert!(folders.create(1, true, None).is_err(), "a number is used once");
        assert!(folders.upper(1).exists(), "the folder that was there stays");
    }

    #[test]
    fn a_removed_folder_of_any_depth_is_gone_after_a_while() {
        let dir = tempfile::tempdir().unwrap();
        let folders = Folders::open(dir.path()).unwrap();
        folders.create(1, true, None).unwrap();
        // Deeper than a path can say.
        let mut at = fs::File::open(folders.upper(1)).unwrap();
        for _ in 0..3000 {
            use rustix::fs::{Mode, OFlags, mkdirat, openat};
            mkdirat(&at, "deeper", Mode::RWXU).unwrap();
            at = openat(&at, "deeper", OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty())
                .unwrap()
                .into();
        }
        fs::write(folders.upper(1).join("file"), b"x").unwrap();
        std::os::unix::fs::symlink("/", folders.upper(1).join("link")).unwrap();
        folders.discard(1).unwrap();
        assert!(!folders.folder(1).exists());
        assert!(folders.empty(minute()));
        folders.discard(1).unwrap();
        assert!(Path::new("/").exists());
    }

    #[test]
    fn what_a_killed_process_left_in_the_trash_is_removed_at_the_next_start() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("trash/7/fs/a/b")).unwrap();
        let folders = Folders::open(dir.path()).unwrap();
        folders.create(1, false, None).unwrap();
        folders.discard(1).unwrap();
        assert!(folders.empty(minute()));
    }
}
