//! The allocator's threshold for large buffers, raised for the buffers of the FUSE library.
//!
//! Each session thread has a buffer of 16 MiB; a read-only file system uses one page of it. If it is mapped
//! from the system, it costs only that page. But glibc treats a size that was freed once as frequently used,
//! and the next device gets its buffers from the heap, zeroed: 32 MiB of memory and 12 ms (`perf/attach`).
//!
//! `unsafe` is needed for `mallopt(3)`.
#![allow(unsafe_code)]

/// Threshold: below the buffers, above the decoded chunks, which are better allocated on the heap.
#[cfg(target_env = "gnu")]
const MAPPED_FROM: libc::c_int = 8 << 20;

/// Freed memory that the heap keeps for the next chunks; by default 128 KiB, once the threshold is fixed.
#[cfg(target_env = "gnu")]
const KEPT: libc::c_int = 16 << 20;

/// Makes allocations of several mebibytes come from the system and return to it, from now on.
#[cfg(target_env = "gnu")]
pub(super) fn map_large_buffers() {
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| {
        // SAFETY: mallopt takes two numbers and locks the allocator. If it refuses, nothing changes.
        unsafe {
            libc::mallopt(libc::M_MMAP_THRESHOLD, MAPPED_FROM);
            libc::mallopt(libc::M_TRIM_THRESHOLD, KEPT);
        }
    });
}

/// Does nothing: other allocators map large buffers anyway.
#[cfg(not(target_env = "gnu"))]
pub(super) fn map_large_buffers() {}
