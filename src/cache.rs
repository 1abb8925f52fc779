//! Decoded chunks in memory.
