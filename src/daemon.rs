//! The devices of this host.
