//! A virtual disk as a block device of the kernel.
//!
//! A front end takes a [`Volume`](disk::volume::Volume) and makes a device of it; it knows no image. ublk serves reads
//! without a copy in user space and needs a kernel that has it. The loop front end works on every kernel: the disk is
//! one file in FUSE, under a loop device.
//!
//! * [`ublk`]   the block device by the ublk driver
//! * [`looped`] the disk as one FUSE file under a loop device
//! * `served`   what both have in common: [`serve`] makes a [`ServedDevice`] of a disk, [`stop_all`] ends many
//! * `counters` the [counters](FrontTotals) of a device
//!
//! ```
//! // The probe says what the kernel of this host can do, and changes nothing.
//! let report = turbobd_frontends::ublk::probe::examine();
//! # drop(report);
//! ```

mod counters;
pub mod looped;
mod served;
pub mod ublk;

pub use counters::FrontTotals;
pub use served::{FrontChoice, FrontError, FrontKind, ServedDevice, serve, stop_all};
