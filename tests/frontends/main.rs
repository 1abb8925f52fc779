//! Tests of the front ends, in a process of their own: they count its threads and descriptors.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "../block/mod.rs"]
mod block;
mod devices;
mod writes_over_ublk;
