//! The parts that every group of threads needs.
//!
//! * [`pool`]    threads that are started by need and joined at the end
//! * [`counter`] numbers that many threads count up
//! * [`io`]      the mark of a thread that serves I/O
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
pub use io::mark_io_thread;
pub use pool::Pool;
