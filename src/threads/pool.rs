//! Threads that are started by need and joined at the end.

use std::io;
use std::thread::{self, Builder, JoinHandle};

/// A group of threads. Dropping it leaves them running: [`join`](Self::join) it, after they were told to end.
#[derive(Debug, Default)]
pub struct Pool {
    threads: Vec<JoinHandle<()>>,
}

impl Pool {
    /// Number of threads.
    #[must_use]
    pub fn len(&self) -> usize {
        self.threads.len()
    }

    /// True if it has no thread.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.threads.is_empty()
    }

    /// Starts one more thread, called `name-N` with its number from 0 on.
    ///
    /// # Errors
    /// Returns the system's refusal.
    pub fn spawn(&mut self, name: &str, body: impl FnOnce() + Send + 'static) -> io::Result<()> {
        let name = format!("{name}-{}", self.len());
        self.threads.push(Builder::new().name(name).spawn(body)?);
        Ok(())
    }

    /// Starts one more thread in the way of [`spawn`](Self::spawn), and logs a refusal. True if it runs.
    pub fn spawn_or_log(&mut self, name: &str, body: impl FnOnce() + Send + 'static) -> bool {
        let result = self.spawn(name, body);
        if let Err(error) = &result {
            tracing::error!("Cannot start the thread {name}-{}: {error}", self.len());
        }
        result.is_ok()
    }

    /// Takes the threads out, to join them without the lock that holds the pool. The pool is empty then.
    #[must_use]
    pub fn take(&mut self) -> Self {
        std::mem::take(self)
    }

    /// Waits for the threads to end. If the last owner of a pool is dropped on one of its threads, this one is left
    /// to end by itself.
    pub fn join(self) {
        for thread in self.threads {
            if thread.thread().id() != thread::current().id() {
                let _ = thread.join(); // its panic was reported when it happened
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;
    use std::thread;

    use super::*;

    #[test]
    fn threads_have_numbers_and_have_ended_after_the_join() {
        let mut pool = Pool::default();
        let (sender, names) = channel();
        for _ in 0..2 {
            let sender = sender.clone();
            pool.spawn("counted", move || {
                sender.send(thread::current().name().map(str::to_owned)).unwrap()
            })
            .unwrap();
        }
        drop(sender);
        let all = pool.take();
        assert!(pool.is_empty() && all.len() == 2);
        all.join();
        let mut names: Vec<_> = names.iter().flatten().collect();
        names.sort();
        assert_eq!(names, ["counted-0", "counted-1"]);
    }

    #[test]
    fn a_pool_that_is_joined_on_one_of_its_threads_does_not_wait_for_that_one() {
        let mut pool = Pool::default();
        let (give, take) = channel::<Pool>();
        let (done, ended) = channel();
        pool.spawn("self", move || {
            take.recv().unwrap().join();
            done.send(()).unwrap();
        })
        .unwrap();
        give.send(pool).unwrap();
        ended.recv().unwrap();
    }
}
