//! The allocator's threshold, for the sake of the FUSE library's buffers.
//!
//! Each session thread has a buffer of 16 MiB, of which a read-only file system uses a page. Mapped from
//! the system it costs that page. But glibc takes what was freed once for a size that is used often, and
//! the next device gets its buffers from the heap, zeroed: 32 MiB of memory and 12 ms (`perf/attach`).
//!
//! `unsafe` is needed for `mallopt(3)`.
#![allow(unsafe_code)]

/// Below the buffers, above the decoded chunks, which are better off on the heap.
#[cfg(target_env = "gnu")]
const MAPPED_FROM: libc::c_int = 8 << 20;

/// Freed memory that the heap keeps for the next chunks; by default 128 KiB, as the threshold is fixed.
#[cfg(target_env = "gnu")]
const KEPT: libc::c_int = 16 << 20;

/// Allocations of several mebibytes come from the system and go back there, from now on.
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

/// Other allocators map large buffers anyway.
#[cfg(not(target_env = "gnu"))]
pub(super) fn map_large_buffers() {}
