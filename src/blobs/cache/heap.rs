//! Chunks without room in the arena: served from the heap, and not kept.
//!
//! That happens when readers hold pieces everywhere in the arena, or a chunk is longer than it. A reader holds a chunk
//! until the rest of its request is there, so a device whose registry answers half of each request could hold any number.
//! So these bytes are reserved in the budget of images, and one device gets a quarter of that at most.

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::Mutex;

use crate::fetch::Flow;
use source::{Accounted, MemoryBudget, Reserved};

/// Divisor of the budget of images for the chunks of one device.
const SHARE: u64 = 4;

/// The bytes on the heap, by device.
pub(super) struct Heap {
    budget: MemoryBudget,
    held: Mutex<HashMap<Flow, u64>>,
}

impl Heap {
    pub(super) fn new(budget: MemoryBudget) -> Arc<Self> {
        Arc::new(Self { budget, held: Mutex::default() })
    }

    /// Takes `len` bytes for a device; one chunk is always allowed if the budget has room.
    pub(super) fn take(self: &Arc<Self>, len: usize, flow: Flow) -> Option<OnHeap> {
        let bytes = len as u64;
        let mut held = self.held.lock();
        let own = held.get(&flow).copied().unwrap_or(0);
        if own > 0 && own.saturating_add(bytes) > self.budget.limit() / SHARE {
            return None;
        }
        let part = self.budget.reserve(bytes, "A chunk").ok()?;
        *held.entry(flow).or_default() += bytes;
        drop(held);
        let part = HeapPart { heap: self.clone(), flow, reserved: part };
        Some(Accounted::new(vec![0; len], part))
    }
}

/// A chunk on the heap.
pub(super) type OnHeap = Accounted<Vec<u8>, HeapPart>;

/// The part of a device's share that a chunk takes.
pub(super) struct HeapPart {
    heap: Arc<Heap>,
    flow: Flow,
    reserved: Reserved,
}

impl Drop for HeapPart {
    fn drop(&mut self) {
        let mut held = self.heap.held.lock();
        if let Some(own) = held.get_mut(&self.flow) {
            *own = own.saturating_sub(self.reserved.bytes());
            if *own == 0 {
                held.remove(&self.flow);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_device_gets_a_quarter_and_all_together_what_the_budget_has() {
        let budget = MemoryBudget::new(1000);
        let heap = Heap::new(budget.clone());
        let mut first: Vec<_> = std::iter::from_fn(|| heap.take(100, Flow(1))).collect();
        assert_eq!(first.len(), 2);
        assert!(heap.take(600, Flow(2)).is_some(), "one chunk is always allowed");
        first.pop();
        assert!(heap.take(100, Flow(1)).is_some());
        let _kept = budget.reserve(900, "an image").unwrap();
        assert!(heap.take(1, Flow(3)).is_none());
        drop(first);
        assert_eq!(budget.used(), 900);
    }
}
