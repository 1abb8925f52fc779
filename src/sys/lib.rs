//! System calls of the daemon that need `unsafe` code, or a word of explanation.
//!
//! A leaf crate: it knows nothing of images, disks or registries. What the standard library and `rustix` offer
//! safely is called from where it is needed; here stands what they do not offer, and what several crates need
//! in the same way.
//!
//! * [`extents`] where the bytes of a file lie on its device (`FS_IOC_FIEMAP`)
//! * [`flock`]   a file that one process has at a time
//! * [`idmap`]   a clone of a mount with other owners (`mount_setattr`)
//! * [`limits`]  limits of a process
//! * [`private`] folders and files that no other user can replace
//! * [`privilege`] rights that the daemon gives up at its start
//! * [`heap`]    gives free memory back to the system
//!
//! ```
//! let dir = tempfile::tempdir()?;
//! let file = std::fs::File::create(dir.path().join("lock"))?;
//! assert!(turbobd_sys::flock::exclusive(&file, turbobd_sys::flock::MOMENT)?);
//! # Ok::<(), std::io::Error>(())
//! ```

pub mod extents;
pub mod flock;
pub mod heap;
pub mod idmap;
pub mod limits;
pub mod private;
pub mod privilege;
