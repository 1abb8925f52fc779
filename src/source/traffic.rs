//! What a remote source did, and what it is trying again.

use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// What a source has brought so far. All zero for one that is near.
#[derive(Clone, Debug, Default)]
pub struct Traffic {
    /// Bytes that arrived, whole reads or not.
    pub bytes: u64,
    /// Requests made.
    pub requests: u64,
    /// Of those, the ones that repeat a failed one.
    pub retries: u64,
    /// Reads that failed for good.
    pub failures: u64,
    /// Who was asked last.
    pub host: Option<String>,
    /// Reads that have failed and are being tried again, the oldest first.
    pub trying_again: Vec<TryingAgain>,
}

/// A read that has failed at least once and goes on.
#[derive(Clone, Debug)]
pub struct TryingAgain {
    /// What of the blob was asked for, in bytes.
    pub range: Range<u64>,
    /// When it began.
    pub since: Instant,
    /// Failed tries so far.
    pub tries: u32,
    /// How the last one failed.
    pub error: String,
    /// When it is tried next.
    pub next: Instant,
}

/// The reads of one source that are being tried again. As many as have threads that wait for them.
#[derive(Debug, Default)]
pub struct Retries {
    board: Mutex<Board>,
}

#[derive(Debug, Default)]
struct Board {
    last: u64,
    reads: Vec<(u64, TryingAgain)>,
}

impl Retries {
    fn lock(&self) -> MutexGuard<'_, Board> {
        self.board.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A read of `range` begins. It is seen by others from its first failure until this is dropped.
    #[must_use]
    pub fn read(&self, range: Range<u64>) -> Attempts<'_> {
        Attempts { retries: self, range, since: Instant::now(), number: None, tries: 0 }
    }

    /// The reads now, the oldest first.
    #[must_use]
    pub fn now(&self) -> Vec<TryingAgain> {
        let mut reads: Vec<_> = self.lock().reads.iter().map(|(_, read)| read.clone()).collect();
        reads.sort_by_key(|read| read.since);
        reads
    }
}

/// One read and its tries.
pub struct Attempts<'a> {
    retries: &'a Retries,
    range: Range<u64>,
    since: Instant,
    number: Option<u64>,
    tries: u32,
}

impl Attempts<'_> {
    /// A try has failed, and there will be another after `wait`.
    pub fn failed(&mut self, error: &dyn std::fmt::Display, wait: Duration) {
        self.tries += 1;
        let now = TryingAgain {
            range: self.range.clone(),
            since: self.since,
            tries: self.tries,
            error: error.to_string(),
            next: Instant::now() + wait,
        };
        let mut board = self.retries.lock();
        let number = *self.number.get_or_insert_with(|| {
            board.last += 1;
            board.last
        });
        match board.reads.iter_mut().find(|(other, _)| *other == number) {
            Some((_, read)) => *read = now,
            None => board.reads.push((number, now)),
        }
    }
}

impl Drop for Attempts<'_> {
    fn drop(&mut self) {
        if let Some(number) = self.number {
            self.retries.lock().reads.retain(|(other, _)| *other != number);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_read_is_seen_from_its_first_failure_to_its_end() {
        let retries = Retries::default();
        let mut read = retries.read(5..9);
        assert!(retries.now().is_empty());
        read.failed(&"no", Duration::ZERO);
        let mut other = retries.read(1..2);
        other.failed(&"later", Duration::ZERO);
        read.failed(&"never", Duration::from_secs(1));
        let now = retries.now();
        assert_eq!(now.len(), 2);
        assert_eq!((now[0].range.clone(), now[0].tries, now[0].error.as_str()), (5..9, 2, "never"));
        assert!(now[0].next > Instant::now());
        drop(read);
        assert_eq!(retries.now().len(), 1);
        drop(other);
        assert!(retries.now().is_empty());
    }
}
