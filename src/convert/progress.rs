//! Receiver of a conversion's progress.

use formats::oci::Digest;

/// Receives every layer's start, advance and end, from several threads.
pub trait Progress: Sync {
    /// A layer of `size` compressed bytes is about to be read.
    fn start(&self, layer: &Digest, size: u64);
    /// `bytes` more of it have been read.
    fn advance(&self, layer: &Digest, bytes: u64);
    /// The layer is converted.
    fn finish(&self, layer: &Digest);
}

/// Ignores all reports.
pub struct Silent;

impl Progress for Silent {
    fn start(&self, _: &Digest, _: u64) {}
    fn advance(&self, _: &Digest, _: u64) {}
    fn finish(&self, _: &Digest) {}
}
