//! Traffic of a remote source, and its reads that are being retried.

use std::ops::Range;
use std::time::{Duration, Instant};

use parking_lot::{Mutex, MutexGuard};

/// Counts of a source so far. All zero for a local one.
#[derive(Clone, Debug, Default)]
pub struct Traffic {
    /// Bytes received, from complete reads or not.
    pub bytes: u64,
    /// Requests made.
    pub requests: u64,
    /// Number of those requests that repeat a failed one.
    pub retries: u64,
    /// Number of reads that failed after the last try.
    pub failures: u64,
    /// The host of the last request.
    pub host: Option<String>,
    /// Reads that have failed and are being retried, the oldest first.
    pub trying_again: Vec<TryingAgain>,
}

/// A read that has failed at least once and continues.
#[derive(Clone, Debug)]
pub struct TryingAgain {
    /// The requested bytes of the blob.
    pub range: Range<u64>,
    /// Start of the read.
    pub since: Instant,
    /// Number of failed tries so far.
    pub tries: u32,
    /// The error of the last try.
    pub error: String,
    /// Time of the next try.
    pub next: Instant,
}

/// The reads of one source that are being retried: as many as there are threads that wait for them.
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
        self.board.lock()
    }

    /// Starts a read of `range`. It is visible to others from its first failure until this is dropped.
    #[must_use]
    pub fn read(&self, range: Range<u64>) -> Attempts<'_> {
        Attempts { retries: self, range, since: Instant::now(), number: None, tries: 0 }
    }

    /// The present reads, the oldest first.
    #[must_use]
    pub fn now(&self) -> Vec<TryingAgain> {
        let mut reads: Vec<_> = self.lock().reads.iter().map(|(_, read)| read.clone()).collect();
        reads.sort_by_key(|read| read.since);
        reads
    }
}

/// One read with its tries.
pub struct Attempts<'a> {
    retries: &'a Retries,
    range: Range<u64>,
    since: Instant,
    number: Option<u64>,
    tries: u32,
}

impl Attempts<'_> {
    /// Reports that a try has failed, and that another follows after `wait`.
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
