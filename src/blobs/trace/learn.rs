//! The traces of this host: learned at each start, kept, merged, replayed.
//!
//! The first start of an image is recorded from the first chunk that it touches until [`LearnOptions::quiet`]
//! has passed without a new one, at most [`LearnOptions::longest`], or until the device is removed. Its
//! touches are merged into the file of the image, which the next attach replays. Every later start is
//! recorded too, so that the trace follows the use of the image.
//!
//! The file is named by the layers of the image: the digest of their blobs' digests and origins in order. So an image
//! keeps its trace whatever tag, meta image or device configuration it is attached by. An image of another repository
//! that names the same digests has a trace of its own: no image decides what another fetches. The file is replaced
//! as a whole, by a rename; a damaged one is skipped with a warning and then replaced.
//!
//! One thread for all recordings of a process checks once a second for those that are over, and ends when
//! there are none.

use std::fs;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock, Weak};
use std::thread;
use std::time::Duration;

use parking_lot::Mutex;

use super::recorder::{Recorder, Recorders};
use super::replay::{Replayed, replay_for};
use crate::cache::Cache;
use formats::oci::Digest;
use formats::trace::{MAX_FILE, Trace};

/// Suffix of a trace file's name.
const SUFFIX: &str = "trace";

/// Limit on the traces that are kept; the oldest are removed. Traces of a thousand images take a few MB.
const MOST_KEPT: usize = 1000;

/// Interval of the check for recordings that are over.
const TICK: Duration = Duration::from_secs(1);

/// Divisor of the cache for a replay: the rest is for other reads, and for the next image.
const REPLAY_SHARE: u64 = 2;

/// Options of learning.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LearnOptions {
    /// True to learn and replay; if false, traces are not replayed either.
    pub enable: bool,
    /// Directory of the traces; created with the first trace.
    pub dir: PathBuf,
    /// Time without a new touch after which a start is over. A slow start waits for computation or other
    /// services now and then, seldom half a minute.
    pub quiet: Duration,
    /// Longest duration of a start: later reads are part of the work.
    pub longest: Duration,
}

impl Default for LearnOptions {
    fn default() -> Self {
        Self {
            enable: true,
            dir: default_dir().to_owned(),
            quiet: Duration::from_secs(30),
            longest: Duration::from_secs(300),
        }
    }
}

/// Default directory of the traces: beside the meta images.
#[must_use]
pub fn default_dir() -> &'static Path {
    Path::new("/var/lib/turbobd/traces")
}

/// Finds a trace, and may take time.
pub type Seek = Box<dyn FnOnce() -> Option<Trace> + Send>;

/// Trace of an image that other hosts have learned.
pub enum Given {
    /// None.
    Nothing,
    /// It came with the image.
    Here(Trace),
    /// It may exist in some place; the start does not wait for the search.
    Sought(Seek),
}

/// The traces of this host.
pub struct Traces {
    options: LearnOptions,
    active: Mutex<Active>,
    /// Held while a file is read, merged and replaced.
    files: Mutex<()>,
}

#[derive(Default)]
struct Active {
    starts: Vec<Weak<Recorder>>,
    watched: bool,
}

impl Traces {
    /// Learns and replays according to `options`.
    #[must_use]
    pub fn new(options: LearnOptions) -> Arc<Self> {
        Arc::new(Self { options, active: Mutex::default(), files: Mutex::default() })
    }

    /// Begins a start of a disk: fetches the chunks of its trace ahead, and records the start. `given` is the
    /// trace of other hosts; it counts until this host has learned one. Returns the result of the replay, if
    /// there is a trace by now.
    pub fn begin(
        self: &Arc<Self>,
        recorders: &Arc<Recorders>,
        cache: &Arc<Cache>,
        given: Given,
    ) -> Option<Replayed> {
        if !self.options.enable {
            return None;
        }
        let path = self.path(recorders);
        let learned = read(&path).filter(|trace| !trace.touches.is_empty());
        // The given trace is the first part of this host's own.
        let others = Arc::new(OnceLock::new());
        let replayed = match (&learned, given) {
            (Some(trace), _) => Some(fetch_ahead(trace, recorders, cache)),
            (None, Given::Nothing) => None,
            (None, Given::Here(trace)) => {
                Some(fetch_ahead(others.get_or_init(|| trace), recorders, cache))
            }
            (None, Given::Sought(seek)) => {
                seek_and_replay(seek, recorders, cache, &others);
                None
            }
        };
        let own = self.clone();
        let keep = move |start: Trace| own.keep(&path, others.get(), &start);
        if let Some(recorder) = recorders.learn(keep) {
            self.watch(&recorder);
        }
        replayed
    }

    /// The file of the image with these layers.
    #[must_use]
    pub fn path(&self, recorders: &Recorders) -> PathBuf {
        let mut names = Vec::new();
        for blob in recorders.blobs() {
            let Some(source) = blob.as_ref().map(|blob| blob.source()) else {
                names.extend_from_slice(&[0; 64]);
                continue;
            };
            names.extend_from_slice(&super::blob_name(&**source).0);
            names.extend_from_slice(&Digest::of(source.blob().origin().name.as_bytes()).0);
        }
        self.options.dir.join(format!("{}.{SUFFIX}", Digest::of(&names).hex()))
    }

    fn watch(self: &Arc<Self>, recorder: &Arc<Recorder>) {
        let mut active = self.active.lock();
        active.starts.push(Arc::downgrade(recorder));
        if active.watched {
            return;
        }
        let own = Arc::downgrade(self);
        let body = move || {
            loop {
                thread::sleep(TICK);
                if !own.upgrade().is_some_and(|traces| traces.look()) {
                    return;
                }
            }
        };
        match thread::Builder::new().name("traces".into()).spawn(body) {
            Ok(_) => active.watched = true,
            // The recording then ends with the device.
            Err(error) => tracing::warn!(%error, "Cannot start the thread that ends recordings"),
        }
    }

    /// Ends the recordings that are over. True if others remain.
    fn look(&self) -> bool {
        let starts: Vec<Arc<Recorder>> = {
            let mut active = self.active.lock();
            active.starts.retain(|start| start.strong_count() > 0);
            active.watched = !active.starts.is_empty();
            active.starts.iter().filter_map(Weak::upgrade).collect()
        };
        let LearnOptions { quiet, longest, .. } = self.options;
        for start in &starts {
            if start.quiet().is_some_and(|(still, whole)| still >= quiet || whole >= longest) {
                start.end();
                let mut active = self.active.lock();
                active.starts.retain(|other| !std::ptr::eq(other.as_ptr(), &raw const **start));
            }
        }
        !starts.is_empty()
    }

    /// Merges a start into the file of its image.
    fn keep(&self, path: &Path, given: Option<&Trace>, start: &Trace) {
        if start.touches.is_empty() {
            return;
        }
        let _guard = self.files.lock();
        let mut trace = read(path).unwrap_or_default();
        given.into_iter().chain([start]).for_each(|start| trace.merge(start));
        let bytes = trace.to_bytes();
        let kept = write(path, &bytes).and_then(|()| prune(&self.options.dir));
        match kept {
            Ok(()) => tracing::info!(
                "A start that touched {} pieces is kept in {}",
                start.touches.len(),
                path.display()
            ),
            Err(error) => {
                tracing::warn!(%error, "The trace of a start cannot be kept in {}", path.display());
            }
        }
    }
}

/// Replays a trace into its share of the cache.
fn fetch_ahead(trace: &Trace, recorders: &Recorders, cache: &Cache) -> Replayed {
    replay_for(recorders.flow(), trace, cache, recorders.blobs(), cache.budget() / REPLAY_SHARE)
}

/// Seeks a published trace while the device is already in use, and replays it if the device still exists.
fn seek_and_replay(
    seek: Seek,
    recorders: &Arc<Recorders>,
    cache: &Arc<Cache>,
    others: &Arc<OnceLock<Trace>>,
) {
    let (recorders, cache, others) = (Arc::downgrade(recorders), cache.clone(), others.clone());
    let body = move || {
        let Some(trace) = seek() else { return };
        let Some(recorders) = recorders.upgrade() else { return };
        let replayed = fetch_ahead(others.get_or_init(|| trace), &recorders, &cache);
        tracing::info!("Replay of a published trace: {replayed}");
    };
    if let Err(error) = thread::Builder::new().name("trace-seek".into()).spawn(body) {
        tracing::warn!(%error, "Cannot start a thread to find a published trace");
    }
}

/// Reads the trace in a file; `None` if there is no readable one.
fn read(path: &Path) -> Option<Trace> {
    let bytes = match fs::metadata(path) {
        Ok(meta) if meta.len() <= MAX_FILE as u64 => fs::read(path),
        Ok(_) => Err(io::ErrorKind::FileTooLarge.into()),
        Err(error) => Err(error),
    };
    let bytes = match bytes {
        Ok(bytes) => bytes,
        Err(error) => {
            if error.kind() != io::ErrorKind::NotFound {
                tracing::warn!(%error, "The trace {} is skipped", path.display());
            }
            return None;
        }
    };
    Trace::parse(&bytes)
        .inspect_err(|error| tracing::warn!(%error, "The trace {} is skipped", path.display()))
        .ok()
}

/// Replaces a file as a whole: a reader sees the old bytes or the new.
///
/// # Errors
/// Returns the system's error; the file is then unchanged.
pub fn write(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    fs::create_dir_all(dir)?;
    let mut file = tempfile::NamedTempFile::new_in(dir)?;
    file.write_all(bytes)?;
    file.as_file().sync_all()?;
    file.persist(path)?;
    Ok(())
}

/// Removes the oldest traces, if there are too many.
fn prune(dir: &Path) -> io::Result<()> {
    let mut files = Vec::new();
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path.extension().is_some_and(|suffix| suffix == SUFFIX)
            && let Ok(time) = fs::metadata(&path).and_then(|meta| meta.modified())
        {
            files.push((time, path));
        }
    }
    if files.len() > MOST_KEPT {
        files.sort();
        let much = files.len() - MOST_KEPT;
        files[..much].iter().for_each(|(_, path)| _ = fs::remove_file(path));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;
    use source::MemorySource;
    use source::chunk::PlainChunks;

    const CHUNK: u64 = PlainChunks::CHUNK;

    fn traces(dir: &Path) -> Arc<Traces> {
        let quiet = Duration::from_millis(50);
        Traces::new(LearnOptions { dir: dir.join("t"), quiet, ..LearnOptions::default() })
    }

    fn disk(cache: &Cache) -> Arc<Recorders> {
        let source = MemorySource::new("a", vec![0; 40 * CHUNK as usize]);
        Recorders::new(vec![Some(cache.open(Arc::new(PlainChunks::new("a", Arc::new(source)))))])
    }

    fn wait(what: impl Fn() -> bool) {
        let until = Instant::now() + Duration::from_secs(20);
        while !what() {
            assert!(Instant::now() < until, "it does not come");
            thread::sleep(Duration::from_millis(10));
        }
    }

    #[test]
    fn a_start_is_learned_when_it_is_over_and_replayed_at_the_next() {
        let dir = tempfile::tempdir().unwrap();
        let (traces, cache) = (traces(dir.path()), Cache::new(64 * CHUNK, 1));
        let first = disk(&cache);
        assert_eq!(traces.begin(&first, &cache, Given::Nothing), None);
        [3, 30, 4].iter().for_each(|&chunk| first.touched(0, chunk));
        let path = traces.path(&first);
        // While the device continues.
        wait(|| path.exists());
        first.touched(0, 9);
        assert_eq!(read(&path).unwrap().touches.len(), 3);

        let other = Cache::new(64 * CHUNK, 1);
        let second = disk(&other);
        let replayed = traces.begin(&second, &other, Given::Nothing).unwrap();
        assert_eq!((replayed.chunks, replayed.bytes), (3, 3 * CHUNK));
        let blob = second.blobs()[0].as_ref().unwrap();
        wait(|| [3, 4, 30].iter().all(|&chunk| other.holds(blob, chunk)));
        // Or when it is removed; its touches are merged.
        second.touched(0, 5);
        drop(second);
        let trace = read(&path).unwrap();
        assert_eq!((trace.starts, trace.touches.len()), (2, 4));
    }

    #[test]
    fn a_damaged_trace_is_passed_over_and_replaced_and_a_device_that_was_not_used_leaves_it() {
        let dir = tempfile::tempdir().unwrap();
        let (traces, cache) = (traces(dir.path()), Cache::new(64 * CHUNK, 1));
        let first = disk(&cache);
        let path = traces.path(&first);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, b"turbotrc, or not").unwrap();
        assert_eq!(traces.begin(&first, &cache, Given::Nothing), None);
        drop(first);
        assert_eq!(fs::read(&path).unwrap(), b"turbotrc, or not");
        let second = disk(&cache);
        traces.begin(&second, &cache, Given::Nothing);
        second.touched(0, 1);
        drop(second);
        assert_eq!(read(&path).unwrap().touches.len(), 1);
        // The trace is the only file in the folder.
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
    }

    #[test]
    fn a_trace_that_came_with_the_image_counts_until_one_was_learned() {
        let dir = tempfile::tempdir().unwrap();
        let (traces, cache) = (traces(dir.path()), Cache::new(64 * CHUNK, 1));
        let recorder = Recorder::new(disk(&cache).blobs(), |_| {});
        recorder.touched(0, 7);
        let given = recorder.trace();
        let first = disk(&cache);
        assert_eq!(traces.begin(&first, &cache, Given::Here(given.clone())).unwrap().chunks, 1);
        first.touched(0, 8);
        let path = traces.path(&first);
        drop(first);
        assert_eq!(read(&path).unwrap().touches.len(), 2);
        // And one that is found when the device is up already.
        let (later, sought) = (self::traces(&dir.path().join("later")), given.clone());
        let empty = Cache::new(64 * CHUNK, 1);
        let second = disk(&empty);
        let seek = Given::Sought(Box::new(move || Some(sought)));
        assert_eq!(later.begin(&second, &empty, seek), None);
        let blob = second.blobs()[0].clone().unwrap();
        wait(|| empty.holds(&blob, 7));
        second.touched(0, 8);
        let path = later.path(&second);
        drop(second);
        wait(|| read(&path).is_some_and(|trace| trace.touches.len() == 2));
        let off = LearnOptions { enable: false, ..traces.options.clone() };
        assert_eq!(Traces::new(off).begin(&disk(&cache), &cache, Given::Here(given.clone())), None);
    }
}
