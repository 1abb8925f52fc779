//! What a start reads, recorded once and fetched ahead ever after.
//!
//! A container that starts reads a few percent of its image, and nearly the same few percent every time.
//! Read-ahead finds out what is read in order; a *trace* knows the rest. It lists, in their order, the
//! pieces that were touched: ranges of *decoded* bytes of the blobs that hold the data, each with the
//! time since the start. A blob is named by its digest and its bytes by their place in the uncompressed
//! layer; nothing depends on how the index cut it. So a trace outlives a conversion with another span,
//! and serves every image that has the layer.
//!
//! A [`Recorder`] notes the first touch of each chunk; each later one costs the look-up of one bit. A
//! start is over when nothing new was touched for a while. What was seen is then merged into what earlier
//! starts have left ([`Trace::merge`]): what recurs gains weight, what does not fades and goes. All that
//! happens without being asked for, for each image that is attached ([`learn`]).
//!
//! A host that has learned nothing of an image yet takes the trace that was [published] beside it, if one was.
//!
//! At the next attach the trace is [replayed](replay()): its chunks are asked for ahead of demand in its
//! order, as many as the cache can hold and the rest as these are read; what lies near each other comes by
//! one request.
//!
//! # Contents
//!
//! * [`recorder`]  the first touches of one disk
//! * [`replay`](mod@replay)  from a trace to chunks that are asked for
//! * `clusters`    what of them comes by one request
//! * [`learn`]     the traces of this host: kept, merged, replayed
//! * [`published`] traces that travel with an image
//! * [`upstream`]  overlaybd's own trace files

mod clusters;
pub mod learn;
pub mod published;
pub mod recorder;
pub mod replay;
pub mod upstream;

use formats::oci::Digest;
use source::chunk::ChunkSource;

pub use learn::{Given, LearnOptions, Traces};
pub use recorder::{Recorder, Recorders};
pub use replay::{Replayed, replay};

/// What a trace calls the blob of `source`.
#[must_use]
pub fn blob_name(source: &dyn ChunkSource) -> Digest {
    digest_of(source.id())
}

/// What a trace calls the blob that a cache knows by `id`: the digest in it. A local file that no digest names
/// gets that of its path, size and time: the same file is known again, a changed one is not.
#[must_use]
pub fn digest_of(id: &str) -> Digest {
    let named = id.find("sha256:").and_then(|at| id.get(at..at + 71)?.parse().ok());
    named.unwrap_or_else(|| Digest::of(id.split('#').next().unwrap_or(id).as_bytes()))
}
