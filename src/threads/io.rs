//! The marks of a thread: that it serves I/O, that it computes for long.

/// Marks the calling thread as one that serves I/O: memory that it allocates must not wait for I/O that it would
/// itself have to serve (`PR_SET_IO_FLUSHER`). Only root may mark a thread; other users serve no block device, so
/// the refusal is ignored.
pub fn mark_io_thread() {
    let _ = rustix::process::configure_io_flusher_behavior(true);
}

/// Lowers the priority of the calling thread: beside short work of this process it gets a tenth of a busy processor. A
/// refusal is ignored, because the thread then only competes.
pub fn yield_to_short_work() {
    let _ = rustix::process::nice(10);
}
