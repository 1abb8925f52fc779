//! Random access into gzip layers.
