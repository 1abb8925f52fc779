//! Asks a turbobd daemon for devices: the protocol of its socket, and a client that speaks it.
//!
//! A daemon serves the devices of a host. A program says what it wants as a [`DeviceSpec`], plain data (its types are
//! here and in the crate `formats`); the [`DaemonClient`] sends it over the daemon's Unix socket and returns a
//! [`DeviceRecord`], or a [`Fault`] whose [`Code`] a program can act upon. The daemon never mounts: mounting happens
//! in the caller's mount namespace, by [`mounts`].
//!
//! * [`spec`]     what to open and how to serve it
//! * [`protocol`] requests, replies and records: one JSON object a line
//! * [`error`]    codes and causes
//! * [`daemon`]   finds or starts a daemon and asks it
//! * [`mounts`]   ext4 and erofs mounts of a device
//! * [`detaching`] removal of a device with its mounts: all of it, or nothing
//! * [`holders`]  the processes that keep a device busy
//! * [`mountinfo`] the mounts of a process
//! * `connection` lines on the socket
//!
//! ```
//! use turbobd_client::DaemonClient;
//! let empty = tempfile::tempdir()?;
//! // No daemon has its socket in this directory.
//! assert!(DaemonClient::connect(empty.path())?.is_none());
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod connection;
pub mod daemon;
pub mod detaching;
pub mod error;
pub mod holders;
pub mod mountinfo;
pub mod mounts;
pub mod protocol;
pub mod spec;

pub use connection::Connection;
pub use daemon::DaemonClient;
pub use detaching::Patience;
pub use error::{ClientError, Code, Fault, step};
pub use protocol::{DeviceRecord, find};
pub use spec::{CertificateSpec, DeviceSpec, Frontend, ImageSource, ImageSpec, RegistrySpec};
