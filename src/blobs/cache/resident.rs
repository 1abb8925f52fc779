//! Bytes that stay in memory while an image needs them: filesystem metadata, by the digest of its source.
//!
//! They are not part of the cache's budget, because none of them can be evicted while a device needs them; but a
//! thousand devices of one base image hold them once. They, and all other memory that an open image takes, are reserved
//! in the [`budget`](Residents::budget) of images before they are read.

use std::collections::HashMap;
use std::sync::{Arc, Weak};

use parking_lot::Mutex;

use crate::fetch::FRAMES_MEMORY;
use source::{MemoryBudget, OverBudget, Reserved, SharedBytes, StableBytes};

/// Shared bytes by name, kept while at least one user holds them.
#[derive(Default)]
pub struct Residents {
    budget: MemoryBudget,
    /// The memory of long frames, while an image has one.
    frames: Mutex<Weak<Reserved>>,
    known: Mutex<HashMap<Box<str>, Weak<dyn StableBytes>>>,
}

impl Residents {
    /// Bytes of images within `budget`.
    pub(super) fn within(budget: MemoryBudget) -> Self {
        Self { budget, ..Self::default() }
    }

    /// The memory that open images may take together.
    #[must_use]
    pub fn budget(&self) -> &MemoryBudget {
        &self.budget
    }

    /// The memory of long zstd frames: one part for all images that have such a frame, as long as one is open.
    ///
    /// # Errors
    /// [`OverBudget`].
    pub fn frames(&self) -> Result<Arc<Reserved>, OverBudget> {
        let mut frames = self.frames.lock();
        if let Some(part) = frames.upgrade() {
            return Ok(part);
        }
        let part = Arc::new(self.budget.reserve(FRAMES_MEMORY, "Decoding long zstd frames")?);
        *frames = Arc::downgrade(&part);
        Ok(part)
    }

    /// Returns the bytes of this name that a user already holds; else `bytes`, which later callers then
    /// share. The caller guarantees that the name stands for exactly these bytes.
    #[must_use]
    pub fn share(&self, name: &str, bytes: SharedBytes) -> SharedBytes {
        let mut known = self.known.lock();
        if let Some(shared) = known.get(name).and_then(Weak::upgrade)
            && shared.bytes().len() == bytes.bytes().len()
        {
            return shared;
        }
        known.retain(|_, bytes| bytes.strong_count() > 0);
        known.insert(name.into(), Arc::downgrade(&bytes));
        bytes
    }

    /// Total of these bytes in memory, each counted once.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        let known = self.known.lock();
        known.values().filter_map(Weak::upgrade).map(|bytes| bytes.bytes().len() as u64).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_of_a_name_are_there_once_and_as_long_as_somebody_has_them() {
        let residents = Residents::default();
        let bytes = |byte| -> SharedBytes { Arc::new(vec![byte; 10]) };
        let first = residents.share("a", bytes(1));
        let second = residents.share("a", bytes(1));
        assert!(Arc::ptr_eq(&first, &second));
        let other = residents.share("b", bytes(2));
        assert_eq!(residents.bytes(), 20);
        drop((first, second));
        assert_eq!(residents.bytes(), 10);
        assert_eq!(residents.share("a", bytes(3)).bytes(), [3; 10]);
        drop(other);
    }
}
