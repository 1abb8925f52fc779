//! The whole writer against oracles that we did not write: e2fsck, debugfs and the kernel.

// What they are made of.
mod disk;
mod fixture;

// What they promise.
mod attribute;
mod continued;
mod data;
mod directory;
mod kind;
mod layer;
mod random;
mod size;
