//! The disk as one FUSE file under a loop device.
