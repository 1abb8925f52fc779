//! The request descriptors that the driver shares with this process.
//!
//! `unsafe` is needed for one read: the kernel writes the descriptors into the mapped memory. See
//! [`Descriptors::get`].
#![allow(unsafe_code)]

use std::fs::File;
use std::io;

use libublk::sys;
use memmap2::{MmapOptions, MmapRaw};

/// The requests of one queue, as the kernel writes them.
pub(super) struct Descriptors {
    mapped: MmapRaw,
    depth: u16,
}

impl Descriptors {
    /// Maps the descriptors of a queue.
    ///
    /// # Errors
    /// Returns the system's refusal to map.
    pub(super) fn map(node: &File, queue: u16, depth: u16) -> io::Result<Self> {
        let one = size_of::<sys::ublksrv_io_desc>() as u64;
        let offset = u64::from(sys::UBLKSRV_CMD_BUF_OFFSET)
            + u64::from(queue) * u64::from(sys::UBLK_MAX_QUEUE_DEPTH) * one;
        let len = usize::from(depth) * one as usize;
        let len = len.next_multiple_of(rustix::param::page_size());
        let mapped = MmapOptions::new().offset(offset).len(len).map_raw_read_only(node)?;
        Ok(Self { mapped, depth })
    }

    /// The request of a tag that the driver has given to this process and that was not committed yet.
    ///
    /// # Panics
    /// If the queue has no such tag: the caller tests it with `ServedQueue::has`.
    pub(super) fn get(&self, tag: u16) -> sys::ublksrv_io_desc {
        assert!(tag < self.depth);
        let all = self.mapped.as_ptr().cast::<sys::ublksrv_io_desc>();
        // SAFETY: the mapping has a descriptor for every tag below the depth. The kernel writes a descriptor
        // before it completes the tag's command and not again before the tag is committed; the read is volatile
        // because the compiler cannot know of the kernel's writes.
        unsafe { all.add(usize::from(tag)).read_volatile() }
    }
}
