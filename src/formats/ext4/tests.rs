//! Tests of the whole writer against oracles of other projects: e2fsck, debugfs and the kernel.

// Parts of the tests.
mod disk;
mod fixture;

// The promises.
mod attribute;
mod continued;
mod data;
mod directory;
mod kind;
mod layer;
mod random;
mod size;
