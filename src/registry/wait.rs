//! Waiting for a future on a plain thread, up to a point in time.
//!
//! The future waits for a channel that an I/O thread feeds, so no runtime is needed here: the
//! thread parks, and the waker unparks it. That also leaves the thread free to block inside a
//! future, which the look-up of a credential does.

use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};
use std::thread::{self, Thread};
use std::time::Instant;

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

/// The result of `future`, or `None` when it is not done by `until`.
pub(super) fn block_until<T>(future: impl Future<Output = T>, until: Option<Instant>) -> Option<T> {
    let waker = Waker::from(Arc::new(Unpark(thread::current())));
    let mut context = Context::from_waker(&waker);
    let mut future = pin!(future);
    loop {
        if let Poll::Ready(done) = future.as_mut().poll(&mut context) {
            return Some(done);
        }
        match until {
            None => thread::park(),
            Some(until) => {
                let left = until.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    return None;
                }
                thread::park_timeout(left);
            }
        }
    }
}

/// The result of `future`.
pub(super) fn block_on<T>(future: impl Future<Output = T>) -> T {
    let mut future = pin!(future);
    loop {
        if let Some(done) = block_until(future.as_mut(), None) {
            return done;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_wait_ends_with_the_future_or_with_its_time() {
        let (sender, mut receiver) = tokio::sync::mpsc::channel(1);
        let soon = Instant::now() + Duration::from_millis(20);
        assert_eq!(block_until(receiver.recv(), Some(soon)), None);
        assert!(Instant::now() >= soon);
        let other = thread::spawn(move || {
            thread::sleep(Duration::from_millis(10));
            sender.blocking_send(7).unwrap();
        });
        assert_eq!(block_on(receiver.recv()), Some(7));
        other.join().unwrap();
    }
}
