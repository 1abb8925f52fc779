//! The registry, and the line between it and the host.
//!
//! The registry is Debian's `docker-registry` with its storage on a local disk. Every pull of every system goes
//! through one proxy in this process, which gives the line its round trip, its bandwidth and its slow requests, and
//! counts what passes. So the line is the same for all, whatever a system uses: parallel connections, ranges, many
//! ranges in one request. Conversions and uploads go to the registry directly.
//!
//! # Contents
//!
//! * [`registry`] the registry and what is pushed to it
//! * [`shape`]    named lines: round trip, bandwidth, share of slow requests
//! * [`proxy`]    shapes and counts HTTP between the systems and the registry

pub(crate) mod proxy;
pub(crate) mod registry;
pub(crate) mod shape;
