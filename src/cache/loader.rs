//! The threads that load chunks.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use crossbeam_channel::{Receiver, Sender};

use super::{Chunks, Key};
use crate::chunk::{ChunkError, ChunkSource};
use crate::source::SourceError;

/// A chunk to be loaded.
pub(super) struct Job {
    pub(super) source: Arc<dyn ChunkSource>,
    pub(super) key: Key,
}

/// The threads and the way to them.
pub(super) struct Loaders {
    jobs: Option<Sender<Job>>,
    ending: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Loaders {
    /// Starts `count` threads; fewer when the system has no more, and with none at all every load
    /// fails rather than waits.
    pub(super) fn start(chunks: &Arc<Chunks>, count: usize) -> Self {
        let (jobs, inbox) = crossbeam_channel::unbounded();
        let ending = Arc::new(AtomicBool::new(false));
        let start = |number| {
            let (chunks, inbox, ending) = (chunks.clone(), inbox.clone(), ending.clone());
            let named = thread::Builder::new().name(format!("load-{number}"));
            match named.spawn(move || run(&chunks, &inbox, &ending)) {
                Ok(thread) => Some(thread),
                Err(error) => {
                    tracing::error!("Cannot start loader thread {number}: {error}");
                    None
                }
            }
        };
        let threads = (0..count).filter_map(start).collect();
        Self { jobs: Some(jobs), ending, threads }
    }

    /// Hands a job to the threads, or back when there are none.
    pub(super) fn send(&self, job: Job) -> Result<(), Job> {
        match &self.jobs {
            Some(jobs) => jobs.send(job).map_err(|refused| refused.0),
            None => Err(job),
        }
    }
}

impl Drop for Loaders {
    fn drop(&mut self) {
        self.ending.store(true, Ordering::Relaxed);
        self.jobs = None;
        for thread in self.threads.drain(..) {
            // A waiter may hold the last reference to the cache, and drop it on a loader thread.
            if thread.thread().id() != thread::current().id() {
                let _ = thread.join();
            }
        }
    }
}

/// Loads until the cache ends; then answers what is left with an error.
fn run(chunks: &Chunks, inbox: &Receiver<Job>, ending: &AtomicBool) {
    for Job { source, key } in inbox {
        let result = if ending.load(Ordering::Relaxed) {
            Err(ended(&*source))
        } else {
            load(&*source, key.chunk)
        };
        chunks.deliver(key, &result.map(Arc::new));
    }
}

/// Loads a chunk. A panic is a bug of the decoder; the reader gets an error and the thread lives on.
fn load(source: &dyn ChunkSource, index: u32) -> Result<crate::chunk::ChunkBytes, Arc<ChunkError>> {
    match catch_unwind(AssertUnwindSafe(|| source.load(index))) {
        Ok(result) => result.map_err(Arc::new),
        Err(_) => Err(failure(source, "The decoder of this chunk panicked")),
    }
}

/// Runs a waiter; if it panics, the others are called all the same.
pub(super) fn guarded(call: impl FnOnce()) {
    if catch_unwind(AssertUnwindSafe(call)).is_err() {
        tracing::error!("A waiter for a chunk panicked");
    }
}

/// What everyone gets who still waits when the cache ends.
pub(super) fn ended(source: &dyn ChunkSource) -> Arc<ChunkError> {
    failure(source, "The cache was closed before this chunk was loaded")
}

fn failure(source: &dyn ChunkSource, reason: &'static str) -> Arc<ChunkError> {
    let error = Arc::new(io::Error::other(reason));
    Arc::new(
        SourceError::Io { name: source.id().to_owned(), offset: 0, len: 0, source: error }.into(),
    )
}
