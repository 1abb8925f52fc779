//! What holds for disks as a whole.
