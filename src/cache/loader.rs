//! The threads that load chunks.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
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

/// The way to the threads.
pub(super) struct Loaders {
    jobs: Option<Sender<Job>>,
    crew: Arc<Crew>,
}

/// The threads: one at first, and another whenever all are at work, up to a limit.
///
/// A daemon starts with its first image and mounts it without loading much, so sixteen threads at once
/// would only delay that. New ones are started by loader threads, never by who asks for a chunk: a
/// thread inherits the CPUs that it may run on, and a ublk queue is bound to its own.
struct Crew {
    chunks: Arc<Chunks>,
    inbox: Receiver<Job>,
    ending: AtomicBool,
    most: usize,
    /// Threads that load.
    busy: AtomicUsize,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl Loaders {
    /// At most `count` threads; fewer when the system has no more, and with none at all every load
    /// fails rather than waits.
    pub(super) fn start(chunks: &Arc<Chunks>, count: usize) -> Self {
        let (jobs, inbox) = crossbeam_channel::unbounded();
        let crew = Arc::new(Crew {
            chunks: chunks.clone(),
            inbox,
            ending: AtomicBool::new(false),
            most: count,
            busy: AtomicUsize::new(0),
            threads: Mutex::default(),
        });
        let started = crew.grow();
        Self { jobs: started.then_some(jobs), crew }
    }

    /// Hands a job to the threads, or back when there are none.
    pub(super) fn send(&self, job: Job) -> Result<(), Job> {
        match &self.jobs {
            Some(jobs) => jobs.send(job).map_err(|refused| refused.0),
            None => Err(job),
        }
    }

    /// Number of threads now.
    #[cfg(test)]
    pub(super) fn threads(&self) -> usize {
        self.crew.lock().len()
    }
}

impl Drop for Loaders {
    fn drop(&mut self) {
        self.crew.ending.store(true, Ordering::SeqCst);
        self.jobs = None;
        // A thread that just starts another one is itself still to be joined.
        while let Some(thread) = self.crew.next_to_join() {
            // A waiter may hold the last reference to the cache, and drop it on a loader thread.
            if thread.thread().id() != thread::current().id() {
                let _ = thread.join();
            }
        }
    }
}

impl Crew {
    fn lock(&self) -> MutexGuard<'_, Vec<JoinHandle<()>>> {
        self.threads.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn next_to_join(&self) -> Option<JoinHandle<()>> {
        self.lock().pop()
    }

    /// Starts a thread unless one is free, or there are as many as there may be. Whether there is one.
    fn grow(self: &Arc<Self>) -> bool {
        let mut threads = self.lock();
        let number = threads.len();
        let enough = self.busy.load(Ordering::SeqCst) < number || number >= self.most;
        if enough || self.ending.load(Ordering::SeqCst) {
            return number > 0;
        }
        let crew = self.clone();
        let named = thread::Builder::new().name(format!("load-{number}"));
        match named.spawn(move || crew.run()) {
            Ok(thread) => threads.push(thread),
            Err(error) => tracing::error!("Cannot start loader thread {number}: {error}"),
        }
        !threads.is_empty()
    }

    /// Loads until the cache ends; then answers what is left with an error.
    fn run(self: &Arc<Self>) {
        for Job { source, key } in &self.inbox {
            self.busy.fetch_add(1, Ordering::SeqCst);
            let result = if self.ending.load(Ordering::SeqCst) {
                Err(ended(&*source))
            } else {
                self.grow();
                load(&*source, key.chunk)
            };
            self.chunks.deliver(key, &result.map(Arc::new));
            self.busy.fetch_sub(1, Ordering::SeqCst);
        }
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
