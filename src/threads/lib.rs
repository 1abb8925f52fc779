//! The parts that every group of threads needs.
//!
//! * [`pool`]    threads that are started by need and joined at the end
//! * [`counter`] numbers that many threads count up
//! * [`io`]      the marks of a thread: that it serves I/O, that it computes for long
//!
//! Locks are those of `parking_lot`: they have no poison, so a panic elsewhere never makes one unusable. Each
//! value behind a lock is valid between two statements that change it.
//!
//! ```
//! use turbobd_threads::Pool;
//! let mut pool = Pool::default();
//! pool.spawn("worker", || println!("I am worker-0"))?;
//! pool.join();
//! # Ok::<(), std::io::Error>(())
//! ```

pub mod counter;
pub mod io;
pub mod pool;

pub use counter::Counter;
pub use io::{mark_io_thread, yield_to_short_work};
pub use pool::Pool;
