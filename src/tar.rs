//! Tar headers with exact offsets.
