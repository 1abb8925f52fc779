//! The memory of decoded chunks: one mapping, as large as the cache's budget.
//!
//! On the heap, a chunk of the usual size is a mapping of its own: created, faulted in page by page, zeroed
//! by the kernel, and returned, which costs a fifth of the time to decode it. The arena is mapped once, in
//! huge pages where the system has them, so that a chunk costs only its decoding; and the budget holds by
//! construction, because there is no other memory to take.
//!
//! Chunks differ in length (a gzip segment ends where a block ends), so there are no slots of one size: runs
//! of pages are taken best fit first, and joined with their neighbours when they are returned. Pages that
//! were never needed are never touched, and cost nothing.
//!
//! `unsafe` is needed to hand out parts of one mapping as slices. A [`PageRun`] is the only owner of its pages
//! from the moment they are taken until it is dropped, so its slices overlap no other's.
#![allow(unsafe_code)]

use std::collections::{BTreeMap, BTreeSet};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use memmap2::{Advice, MmapMut, MmapOptions};
use parking_lot::{Mutex, MutexGuard};

use source::StableBytes;
use source::chunk::Room;

/// Unit of the arena: the kernel's page, so that no two chunks share one.
const PAGE: usize = 4096;

/// Memory for chunks.
pub(super) struct Arena {
    /// The mapping. Its bytes are used through `base`.
    map: Option<MmapMut>,
    base: NonNull<u8>,
    pages: u32,
    free: Mutex<FreeRuns>,
    /// First page that was never given out; all pages after it are unused too.
    fresh: AtomicU32,
}

// SAFETY: `base` points into `map`, which is owned here and is not moved or unmapped before the end. Access
// to the bytes goes through `PageRun`s, which do not overlap.
unsafe impl Send for Arena {}
// SAFETY: see `Send`; all shared state is behind the mutex.
unsafe impl Sync for Arena {}

impl Arena {
    /// Creates an arena of at most `budget` bytes, in whole pages. On a system that refuses the mapping the
    /// arena is empty: the cache then keeps nothing, and logs that.
    pub(super) fn new(budget: u64) -> Arc<Self> {
        let pages = u32::try_from(budget / PAGE as u64).unwrap_or(u32::MAX);
        let len = pages as usize * PAGE;
        let map = (pages > 0).then(|| MmapOptions::new().len(len).no_reserve_swap().map_anon());
        let mut map = match map.transpose() {
            Ok(map) => map,
            Err(error) => {
                tracing::error!(%error, "No memory for a cache of {budget} bytes: nothing is kept");
                None
            }
        };
        let pages = if map.is_some() { pages } else { 0 };
        let mut base = NonNull::dangling();
        if let Some(map) = &mut map {
            // Only advice: a kernel without huge pages is slower.
            let _ = map.advise(Advice::HugePage);
            base = NonNull::new(map.as_mut_ptr()).unwrap_or(base);
        }
        Arc::new(Self {
            map,
            base,
            pages,
            free: Mutex::new(FreeRuns::new(pages)),
            fresh: AtomicU32::new(0),
        })
    }

    fn free(&self) -> MutexGuard<'_, FreeRuns> {
        self.free.lock()
    }

    /// Makes the kernel back newly used pages all at once: otherwise a decoder would fault on each of them,
    /// which costs more than decoding on machines with expensive page faults.
    fn populate(&self, first: u32, pages: u32) {
        let before = self.fresh.fetch_max(first + pages, Ordering::Relaxed);
        let fresh = before.max(first)..first + pages;
        if let (Some(map), false) = (&self.map, fresh.is_empty()) {
            let (at, len) = (fresh.start as usize * PAGE, fresh.len() * PAGE);
            // Since Linux 5.14; on an older kernel the decoder faults.
            let _ = map.advise_range(Advice::PopulateWrite, at, len);
        }
    }

    /// True if `len` bytes would fit into the empty arena.
    pub(super) fn could_hold(&self, len: usize) -> bool {
        len.div_ceil(PAGE) <= self.pages as usize
    }

    /// Takes `len` bytes, if there is a run of pages for them.
    pub(super) fn take(self: &Arc<Self>, len: usize) -> Option<PageRun> {
        let pages = u32::try_from(len.div_ceil(PAGE)).ok().filter(|pages| *pages > 0)?;
        let first = self.free().take(pages)?;
        self.populate(first, pages);
        Some(PageRun { arena: self.clone(), first, pages, len })
    }
}

/// A run of pages of an arena.
pub(super) struct PageRun {
    arena: Arc<Arena>,
    first: u32,
    pages: u32,
    len: usize,
}

impl PageRun {
    fn address(&self) -> NonNull<u8> {
        // SAFETY: `FreeRuns` gives out pages of the mapping only.
        unsafe { self.arena.base.add(self.first as usize * PAGE) }
    }
}

// SAFETY: a run keeps its arena, whose mapping stays until its drop; the pages belong to this run alone.
unsafe impl StableBytes for PageRun {
    fn bytes(&self) -> &[u8] {
        // SAFETY: the pages are in the mapping, zeroed by the kernel or written before, and belong to this
        // run alone; they are written only through `bytes_mut`, which borrows the run exclusively.
        unsafe { std::slice::from_raw_parts(self.address().as_ptr(), self.len) }
    }
}

impl Room for PageRun {
    fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: see `bytes`; `&mut self` guarantees that no other slice of this run exists.
        unsafe { std::slice::from_raw_parts_mut(self.address().as_ptr(), self.len) }
    }

    fn held(&self) -> u64 {
        u64::from(self.pages) * PAGE as u64
    }
}

impl Drop for PageRun {
    fn drop(&mut self) {
        self.arena.free().give_back(self.first, self.pages);
    }
}

/// The free pages: as runs, by place and by length.
struct FreeRuns {
    by_first: BTreeMap<u32, u32>,
    by_pages: BTreeSet<(u32, u32)>,
}

impl FreeRuns {
    fn new(pages: u32) -> Self {
        let mut free = Self { by_first: BTreeMap::new(), by_pages: BTreeSet::new() };
        if pages > 0 {
            free.insert(0, pages);
        }
        free
    }

    fn insert(&mut self, first: u32, pages: u32) {
        self.by_first.insert(first, pages);
        self.by_pages.insert((pages, first));
    }

    fn remove(&mut self, first: u32, pages: u32) {
        self.by_first.remove(&first);
        self.by_pages.remove(&(pages, first));
    }

    /// Takes the shortest run that is long enough; among equal ones the first.
    fn take(&mut self, pages: u32) -> Option<u32> {
        let &(found, first) = self.by_pages.range((pages, 0)..).next()?;
        self.remove(first, found);
        if found > pages {
            self.insert(first + pages, found - pages);
        }
        Some(first)
    }

    fn give_back(&mut self, mut first: u32, mut pages: u32) {
        let after = first + pages;
        if let Some(&more) = self.by_first.get(&after) {
            self.remove(after, more);
            pages += more;
        }
        let before = self.by_first.range(..first).next_back().map(|(&f, &p)| (f, p));
        if let Some((start, len)) = before.filter(|(start, len)| start + len == first) {
            self.remove(start, len);
            first = start;
            pages += len;
        }
        self.insert(first, pages);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_is_given_back_is_joined_and_can_be_had_whole() {
        let arena = Arena::new(10 * PAGE as u64 + 4095);
        assert!(arena.could_hold(10 * PAGE) && !arena.could_hold(10 * PAGE + 1));
        let mut runs: Vec<_> = (0..10).map(|_| arena.take(PAGE).unwrap()).collect();
        assert!(arena.take(1).is_none());
        // Every second one: enough room in total, but no run of two pages.
        for number in (0..5).rev() {
            runs.remove(number * 2);
        }
        assert!(arena.take(PAGE + 1).is_none());
        runs.clear();
        assert_eq!(arena.take(10 * PAGE).unwrap().held(), 10 * PAGE as u64);
    }

    #[test]
    fn an_arena_of_nothing_has_no_room() {
        assert!(Arena::new(4095).take(1).is_none());
        assert!(Arena::new(1 << 20).take(0).is_none());
    }

    proptest! {
        /// Every run keeps its contents, in any order of takes and returns around it.
        #[test]
        fn runs_never_overlap(steps in proptest::collection::vec((any::<bool>(), 1_usize..30_000), 1..200)) {
            let arena = Arena::new(64 * PAGE as u64);
            let mut runs: Vec<(u8, PageRun)> = Vec::new();
            for (number, (take, len)) in steps.into_iter().enumerate() {
                if take {
                    if let Some(mut run) = arena.take(len) {
                        run.bytes_mut().fill(number as u8);
                        runs.push((number as u8, run));
                    }
                } else if !runs.is_empty() {
                    let (mark, run) = runs.swap_remove(len % runs.len());
                    prop_assert!(run.bytes().iter().all(|&byte| byte == mark));
                }
                let held: u64 = runs.iter().map(|(_, run)| run.held()).sum();
                prop_assert!(held <= 64 * PAGE as u64);
            }
            for (mark, run) in &runs {
                prop_assert!(run.bytes().iter().all(|byte| byte == mark));
            }
            drop(runs);
            prop_assert!(arena.take(64 * PAGE).is_some());
        }
    }
}
