//! Tests of the whole program, in one binary: each file is a module named after what it holds true.
//!
//! Most of them run the program that cargo has built. Helpers stand in folders: [`image`] makes images,
//! [`registry_double`] is a registry that fails on request, [`machine`] and [`run_dir`] are this machine and a daemon of
//! a test's own, [`block`] reads block devices and starts guests, [`listing`] compares trees, [`checker`] is an
//! independent checker of all formats, [`serve`] opens images over the double, [`stack`] is a real
//! containerd.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod block;
mod checker;
mod erofs;
mod image;
mod listing;
mod machine;
mod registry_double;
mod run_dir;
mod serve;
mod stack;

mod attach;
mod bad_input;
mod closed_pipe;
mod commit;
mod containerd;
mod continued;
mod convert;
mod cri;
mod daemon;
mod device_config;
mod encodings;
mod faults;
mod formats;
mod guest;
mod house;
mod interop;
mod large;
mod meta;
mod native;
mod pages;
mod plain;
mod registry;
mod registry_ways;
mod rpull;
mod settings;
mod slips;
mod snapshotter;
mod snapshotter_containers;
mod sparse;
mod survival;
mod trace;
mod trust;
mod uppers;
mod writable;
