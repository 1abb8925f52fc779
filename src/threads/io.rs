//! The mark of a thread that serves I/O.

/// Marks the calling thread as one that serves I/O: memory that it allocates must not wait for I/O that it would
/// itself have to serve (`PR_SET_IO_FLUSHER`). Only root may mark a thread; other users serve no block device, so
/// the refusal is ignored.
pub fn mark_io_thread() {
    let _ = rustix::process::configure_io_flusher_behavior(true);
}
