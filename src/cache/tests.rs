//! What holds for the cache as a whole.
