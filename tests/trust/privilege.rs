//! The daemon has the rights that it needs, and no more.
