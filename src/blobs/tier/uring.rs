//! The writer's `io_uring`, on systems that have one.
//!
//! `tokio_uring` runs the writer: a batch of chunks is written with all its writes in the ring at once, and
//! the thread sleeps once for all of them. It serves only the writer: readers wait for single chunks, and
//! `pread` is the fastest call for one. Containers often refuse `io_uring` (seccomp, `io_uring_disabled`);
//! the same writer then runs on plain `pwrite` and `fdatasync`.
//!
//! `unsafe` is needed to give the ring a buffer that other threads may read during the write ([`ChunkPayload`]):
//! the write holds an `Arc`, so that the bytes stay at their address until the kernel has written them.
#![allow(unsafe_code)]

use std::cell::Cell;
use std::fs::File;
use std::future::{Future, poll_fn};
use std::io;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use tokio_uring::buf::IoBuf;

use super::store::{ChunkPayload, Local};
use source::StableBytes;

thread_local! {
    /// True if this thread runs in a ring's runtime.
    static IN_RING: Cell<bool> = const { Cell::new(false) };
}

/// Runs the writer in a ring if there is one. `tokio_uring::start` would panic on a system without.
pub(super) fn run(work: Local<'static, ()>) {
    match tokio_uring::Runtime::new(&tokio_uring::builder()) {
        Ok(runtime) => {
            IN_RING.set(true);
            runtime.block_on(work);
            IN_RING.set(false);
        }
        Err(error) => {
            tracing::info!(%error, "The system gives no io_uring: the disk tier is written with pwrite");
            block_on(work);
        }
    }
}

/// Runs a future that finishes each step within its poll.
pub(super) fn block_on<T>(work: impl Future<Output = T>) -> T {
    let mut work = pin!(work);
    loop {
        if let Poll::Ready(value) = work.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
            return value;
        }
        std::thread::yield_now();
    }
}

/// Runs futures side by side.
pub(super) async fn join<T>(futures: Vec<Local<'_, T>>) -> Vec<T> {
    let mut slots: Vec<Result<T, Local<'_, T>>> = futures.into_iter().map(Err).collect();
    poll_fn(|context| {
        let mut pending = false;
        for slot in &mut slots {
            if let Err(future) = slot {
                match Pin::new(future).poll(context) {
                    Poll::Ready(value) => *slot = Ok(value),
                    Poll::Pending => pending = true,
                }
            }
        }
        if pending { Poll::Pending } else { Poll::Ready(()) }
    })
    .await;
    slots.into_iter().filter_map(Result::ok).collect()
}

/// The file in the ring of this thread; `None` outside of one.
pub(super) fn file(file: &File) -> Option<io::Result<tokio_uring::fs::File>> {
    IN_RING.get().then(|| file.try_clone().map(tokio_uring::fs::File::from_std))
}

/// A payload in the form that the ring needs.
struct Whole(Arc<ChunkPayload>);

// SAFETY: a chunk and a vector are stable, the range in the vector never changes, and neither can be borrowed
// exclusively behind the `Arc`s that hold them.
unsafe impl StableBytes for ChunkPayload {
    fn bytes(&self) -> &[u8] {
        self.bytes()
    }
}

// SAFETY: the bytes are those of a `StableBytes` behind an `Arc` that this holds: they stay at their address,
// unchanged and initialised.
unsafe impl IoBuf for Whole {
    fn stable_ptr(&self) -> *const u8 {
        self.0.bytes().as_ptr()
    }

    fn bytes_init(&self) -> usize {
        self.0.bytes().len()
    }

    fn bytes_total(&self) -> usize {
        self.0.bytes().len()
    }
}

/// Writes all of a payload.
pub(super) async fn write(
    file: &tokio_uring::fs::File,
    bytes: Arc<ChunkPayload>,
    at: u64,
) -> io::Result<()> {
    file.write_all_at(Whole(bytes), at).await.0
}
