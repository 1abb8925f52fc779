//! The whole writer against oracles that we did not write: e2fsck, debugfs and the kernel.
