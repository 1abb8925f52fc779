//! The devices of a host: what to open, how it is served, and the socket to ask for it.
//!
//! Every user of a device (the command line, a device config, overlaybd's snapshot API, a snapshotter) says what it wants
//! as a [`DeviceSpec`](client::DeviceSpec), and all go one way: [`images`] opens the image, the device table of
//! [`daemon`] serves its disk by a front end and keeps its record. A failure carries a [`Code`](client::Code) for
//! programs and the chain of its reasons for people ([`failure`]). Nothing here names an argument of a command line.
//!
//! * [`images`]   from a spec to an opened image: one cache and one network for all devices
//! * [`daemon`]   the device table, the control socket, the life of the process
//! * [`config`]   the service configuration: overlaybd's keys and turbobd's
//! * [`metrics`]  every number that is counted, and the page on which others read it
//! * [`readings`] figures of a device, for the metrics and for lists
//! * [`doctor`]   what this host can do, and the remedy for what it cannot
//! * [`leftovers`] what dead daemons have left, and its removal
//! * [`endpoint`] a small HTTP server, for the metrics and for snapshots
//! * [`failure`]  from an error to its code
//!
//! ```
//! use turbobd_host::config::ServiceConfig;
//! let text = r#"{ "turbobd": { "memoryCacheMB": 64 } }"#;
//! let (config, warnings) = ServiceConfig::parse(text, "an example")?;
//! assert_eq!(config.turbobd.memory_cache, 64 << 20);
//! assert!(warnings.is_empty());
//! # Ok::<(), turbobd_host::config::ServiceConfigError>(())
//! ```

pub mod config;
pub mod daemon;
pub mod doctor;
pub mod endpoint;
pub mod failure;
pub mod images;
pub mod leftovers;
pub mod metrics;
pub mod readings;
