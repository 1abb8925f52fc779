//! Traces: lists of the chunks that a start reads, recorded once and fetched ahead at later starts.
//!
//! A container that starts reads a few percent of its image, and nearly the same few percent every time.
//! Read-ahead recognises sequential reads; a *trace* lists the others. It lists the touched pieces in their
//! order: ranges of *decoded* bytes of the blobs that hold the data, each with the time since the start. A
//! blob is named by its digest and its bytes by their position in the uncompressed layer; nothing depends on
//! the index's division into segments. So a trace outlives a conversion with another span, and serves every
//! image that has the layer.
//!
//! A [`Recorder`] records the first touch of each chunk; each later one costs the look-up of one bit. A start
//! is over when no new chunk was touched for a while. Its touches are then merged into those of earlier
//! starts ([`Trace::merge`](formats::trace::Trace::merge)): a touch that recurs gains weight, one that does not loses weight and is removed
//! in the end. All this is automatic for each image that is attached ([`learn`]).
//!
//! A host without a trace of its own for an image takes the trace that was [published] beside the image, if
//! there is one.
//!
//! At the next attach the trace is [replayed](replay()): its chunks are fetched ahead of demand in its order,
//! as many as the cache can hold and the rest as these are read; chunks near each other are fetched by one
//! request.
//!
//! # Contents
//!
//! * [`recorder`]  the first touches of one disk
//! * [`replay`](mod@replay)  from a trace to requests for chunks
//! * `clusters`    chunks that are fetched by one request
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

/// Name of the blob of `source` in a trace.
#[must_use]
pub fn blob_name(source: &dyn ChunkSource) -> Digest {
    digest_of(source.id())
}

/// Name in a trace of the blob with the cache identity `id`: the digest in it. A local file without a digest
/// gets the digest of its path, size and time: the same file keeps its name, a changed one does not.
#[must_use]
pub fn digest_of(id: &str) -> Digest {
    crate::identity::claimed(id)
        .unwrap_or_else(|| Digest::of(id.split('#').next().unwrap_or(id).as_bytes()))
}
