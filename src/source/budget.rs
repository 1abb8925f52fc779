//! A bound on memory, and the parts of it that are taken.
//!
//! What an image claims decides how much memory it needs: the size of its metadata, the number of its segments. So the
//! memory is *reserved* first, with the claimed number, and taken only after that. A claim that does not fit is refused
//! with the figures. A [`Reserved`] part is given back when it is dropped; the owner of the memory keeps it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use thiserror::Error;

/// A claim that does not fit.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error(
    "{what} needs {needed} bytes of memory; {free} of {limit} bytes are free for it: raise {key}, or detach other images"
)]
pub struct OverBudget {
    /// What the memory is for.
    pub what: String,
    /// Bytes that it needs.
    pub needed: u64,
    /// Bytes that are free.
    pub free: u64,
    /// Bytes of the budget.
    pub limit: u64,
    /// The setting that raises the limit.
    pub key: &'static str,
}

/// The setting of the budget.
const KEY: &str = "turbobd.memoryBudgetMB";

/// A bound on bytes of memory. Clones share it.
#[derive(Clone, Debug)]
pub struct MemoryBudget(Arc<Account>);

#[derive(Debug)]
struct Account {
    limit: u64,
    used: AtomicU64,
}

impl Default for MemoryBudget {
    /// Without a bound: for a program that opens one image that its user chose.
    fn default() -> Self {
        Self::new(u64::MAX)
    }
}

impl MemoryBudget {
    /// A budget of `limit` bytes.
    #[must_use]
    pub fn new(limit: u64) -> Self {
        Self(Arc::new(Account { limit, used: AtomicU64::new(0) }))
    }

    /// Its bytes.
    #[must_use]
    pub fn limit(&self) -> u64 {
        self.0.limit
    }

    /// Bytes that are reserved.
    #[must_use]
    pub fn used(&self) -> u64 {
        self.0.used.load(Ordering::Relaxed)
    }

    /// Bytes that can be reserved.
    #[must_use]
    pub fn free(&self) -> u64 {
        self.limit().saturating_sub(self.used())
    }

    /// A part of no bytes, to be grown.
    #[must_use]
    pub fn part(&self) -> Reserved {
        Reserved { budget: self.clone(), bytes: 0 }
    }

    /// Reserves `bytes` for what the text of `what` names.
    ///
    /// # Errors
    /// [`OverBudget`] when they are not free.
    pub fn reserve(&self, bytes: u64, what: &str) -> Result<Reserved, OverBudget> {
        let mut reserved = self.part();
        reserved.grow_to(bytes, what)?;
        Ok(reserved)
    }
}

/// A part of a budget. Dropping it gives the part back.
#[derive(Debug)]
pub struct Reserved {
    budget: MemoryBudget,
    bytes: u64,
}

impl Reserved {
    /// Nothing yet, of a budget without a bound.
    #[must_use]
    pub fn unbounded() -> Self {
        Self { budget: MemoryBudget::default(), bytes: 0 }
    }

    /// Its bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Reserves more, up to `bytes` in total; does nothing if it has as many.
    ///
    /// # Errors
    /// [`OverBudget`]; the part then stays as it was.
    pub fn grow_to(&mut self, bytes: u64, what: &str) -> Result<(), OverBudget> {
        let more = bytes.saturating_sub(self.bytes);
        let limit = self.budget.limit();
        let add = |used: u64| used.checked_add(more).filter(|&sum| sum <= limit);
        match self.budget.0.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, add) {
            Ok(_) => {
                self.bytes += more;
                Ok(())
            }
            Err(used) => Err(OverBudget {
                what: what.to_owned(),
                needed: bytes,
                free: limit.saturating_sub(used).saturating_add(self.bytes),
                limit,
                key: KEY,
            }),
        }
    }

    /// Reserves `bytes` more.
    ///
    /// # Errors
    /// [`OverBudget`]; the part then stays as it was.
    pub fn add(&mut self, bytes: u64, what: &str) -> Result<(), OverBudget> {
        self.grow_to(self.bytes.saturating_add(bytes), what)
    }

    /// Gives back what is above `bytes`.
    pub fn shrink_to(&mut self, bytes: u64) {
        let less = self.bytes.saturating_sub(bytes);
        self.bytes -= less;
        self.budget.0.used.fetch_sub(less, Ordering::Relaxed);
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        self.shrink_to(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_does_not_fit_is_refused_with_the_figures_and_what_is_dropped_is_free_again() {
        let budget = MemoryBudget::new(100);
        let mut first = budget.reserve(60, "one").unwrap();
        let error = budget.reserve(41, "The metadata of a").unwrap_err();
        let text = error.to_string();
        assert!(
            text.starts_with("The metadata of a needs 41 bytes of memory; 40 of 100"),
            "{text}"
        );
        assert!(text.contains("turbobd.memoryBudgetMB"), "{text}");
        assert!(first.grow_to(101, "one").is_err());
        assert_eq!((first.bytes(), budget.used()), (60, 60));
        first.grow_to(100, "one").unwrap();
        assert!(budget.reserve(1, "two").is_err());
        first.shrink_to(10);
        assert_eq!(budget.free(), 90);
        drop(first);
        assert_eq!(budget.used(), 0);
    }

    #[test]
    fn threads_never_reserve_more_than_there_is() {
        let budget = MemoryBudget::new(1000);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..1000 {
                        let kept = budget.reserve(300, "a part");
                        assert!(budget.used() <= 1000);
                        drop(kept);
                    }
                });
            }
        });
        assert_eq!(budget.used(), 0);
    }
}
