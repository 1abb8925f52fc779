//! The last failures of a blob, for reports on why its readers wait.

use std::collections::VecDeque;
use std::time::SystemTime;

use parking_lot::{Mutex, MutexGuard};

/// Number of failures that are kept of a blob: enough to see a pattern, and a few KiB at most.
const KEPT: usize = 16;

/// Limit on a stored reason, in bytes: the size of a registry's error page must not decide the memory of a
/// failure.
const LONGEST: usize = 512;

/// One failure.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RecentFailure {
    /// Its time.
    pub at: SystemTime,
    /// The chunk of the blob.
    pub chunk: u32,
    /// True if the chunk is fetched again automatically.
    pub again: bool,
    /// The reason.
    pub reason: String,
}

/// The last failures, the oldest first.
#[derive(Debug, Default)]
pub struct Recent {
    failures: Mutex<VecDeque<RecentFailure>>,
}

impl Recent {
    fn lock(&self) -> MutexGuard<'_, VecDeque<RecentFailure>> {
        self.failures.lock()
    }

    /// Records a failure.
    pub fn note(&self, chunk: u32, again: bool, error: &dyn std::error::Error) {
        let mut reason = error.to_string();
        let mut cause = error.source();
        while let Some(error) = cause {
            reason = format!("{reason}: {error}");
            cause = error.source();
        }
        if reason.len() > LONGEST {
            let end = (0..=LONGEST).rev().find(|&end| reason.is_char_boundary(end)).unwrap_or(0);
            reason.truncate(end);
            reason.push('…');
        }
        let mut failures = self.lock();
        if failures.len() == KEPT {
            failures.pop_front();
        }
        failures.push_back(RecentFailure { at: SystemTime::now(), chunk, again, reason });
    }

    /// The failures now, the oldest first.
    #[must_use]
    pub fn now(&self) -> Vec<RecentFailure> {
        self.lock().iter().cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_last_failures_are_kept_and_none_is_long() {
        let recent = Recent::default();
        for chunk in 0..40 {
            recent.note(chunk, false, &std::io::Error::other("ä".repeat(LONGEST)));
        }
        let now = recent.now();
        assert_eq!(
            now.iter().map(|one| one.chunk).collect::<Vec<_>>(),
            (24..40).collect::<Vec<_>>()
        );
        assert!(
            now.iter().all(|one| one.reason.len() <= LONGEST + 3 && one.reason.starts_with('ä'))
        );
    }
}
