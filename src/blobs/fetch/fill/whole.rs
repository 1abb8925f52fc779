//! Whole blobs: hashed when the fill has fetched them, and from then on proved.
//!
//! A native layer, or a bare tar without a sidecar, brings no checksums that prove a chunk. Its digest covers only the
//! whole blob, so it is compared when the encoded tier has all chunks; the bytes between and behind them (headers, the
//! jump table) are fetched for it. If it fits, the chunks move to a file of the tier that belongs to the digest and not
//! to an origin: every image that names the digest reads them there. If it does not fit, the chunks stay what they
//! were, bytes of one origin; that is counted, logged, and told as a failure of the blob.

use std::sync::Arc;
use std::time::Duration;

use sha2::{Digest as _, Sha256};
use sys::idle::IdleThread;

use super::super::FetchShared;
use super::super::blob::Blob;
use super::MOST_UNDER_WAY;
use crate::identity;
use crate::tier::store::ChunkPayload;
use crate::tier::{TierBlob, TierKind};
use formats::oci::Digest;
use source::chunk::ChunkError;
use source::{ByteSource, Class, OneBuffer, SourceError};

/// Bytes between chunks that are fetched and hashed at a time, 1 MiB.
const STEP: u64 = 1 << 20;

/// Interval at which the tier's queue is checked.
const POLL: Duration = Duration::from_millis(10);

/// Compares the digest of a blob that the tier has as a whole, and moves its chunks to where all images find them.
/// `is_over` waits for quiet, and ends it early.
pub(super) fn verify(
    shared: &FetchShared,
    thread: &IdleThread,
    blob: &Arc<Blob>,
    is_over: &dyn Fn() -> bool,
) {
    let Some(digest) = identity::claimed(blob.source().id()) else { return };
    let (Some((TierKind::Encoded, stored)), Some(whole)) =
        (blob.stored().target(), &blob.stored().whole)
    else {
        return;
    };
    let chunks = blob.source().chunk_count();
    let is_stored = |chunk| stored.has(chunk) || whole.has(chunk);
    if blob.is_whole() || !(0..chunks).all(is_stored) {
        return;
    }
    let name = blob.source().blob().name();
    match hash(thread, blob, is_over) {
        Ok(Some((found, sums))) if found == digest => {
            shared.counters.whole_blobs.add(1);
            tracing::info!("{name} was fetched whole, and has its digest");
            move_chunks(blob, stored, whole, &sums, is_over);
        }
        Ok(Some((found, _))) => {
            shared.counters.whole_wrong.add(1);
            tracing::warn!("{name} was fetched whole: its bytes have the digest {found}");
            let (blob_name, reason) = (name.to_owned(), format!("the whole blob has {found}"));
            let (start, end) = (0, blob.source().blob().len());
            let error = ChunkError::Damaged { blob: blob_name, chunk: 0, start, end, reason };
            blob.failures().note(0, false, &error);
        }
        Ok(None) => {}
        Err(error) => tracing::debug!(%error, "{name} cannot be hashed as a whole"),
    }
}

/// The blob around a source, and the position of the source's first byte in it.
fn outermost(source: &Arc<dyn ByteSource>) -> (&Arc<dyn ByteSource>, u64) {
    let (mut blob, mut start) = (source, 0);
    while let Some((outer, at)) = blob.outer() {
        (blob, start) = (outer, start + at);
    }
    (blob, start)
}

/// The digest of the blob, and that of each chunk's encoded bytes; `None` when a chunk is gone, or it is over.
fn hash(
    thread: &IdleThread,
    blob: &Blob,
    is_over: &dyn Fn() -> bool,
) -> Result<Option<(Digest, Vec<[u8; 32]>)>, ChunkError> {
    let source = blob.source();
    let (bytes, base) = outermost(source.blob());
    let (mut hasher, mut at, mut sums) = (Sha256::new(), 0, Vec::new());
    let mut buffer = Vec::new();
    for chunk in 0..source.chunk_count() {
        let place = source.encoded(chunk)?;
        let (start, end) = (base + place.range.start, base + place.range.end);
        if is_over() || !read(blob, chunk, place.len(), &mut buffer) {
            return Ok(None);
        }
        hash_between(bytes, &mut hasher, at..start)?;
        sums.push(thread.run(|| Sha256::digest(&buffer)).into());
        // Chunks may begin within the byte where the one before ends.
        let known = at.saturating_sub(start) as usize;
        thread.run(|| hasher.update(buffer.get(known..).unwrap_or_default()));
        at = at.max(end);
    }
    hash_between(bytes, &mut hasher, at..bytes.len())?;
    Ok(Some((Digest::from_hasher(hasher), sums)))
}

/// Hashes bytes that belong to no chunk.
fn hash_between(
    bytes: &Arc<dyn ByteSource>,
    hasher: &mut Sha256,
    range: std::ops::Range<u64>,
) -> Result<(), SourceError> {
    let mut at = range.start;
    let mut step = Vec::new();
    while at < range.end {
        let step_len = (range.end - at).min(STEP);
        step.resize(step_len as usize, 0);
        let run = &mut OneBuffer::new(&mut step);
        bytes.read_run(at..at + step_len, Class::Fill, run)?;
        hasher.update(&step);
        at += step.len() as u64;
    }
    Ok(())
}

/// Reads the encoded bytes of a chunk from the tier.
fn read(blob: &Blob, chunk: u32, len: usize, buffer: &mut Vec<u8>) -> bool {
    buffer.resize(len, 0);
    blob.stored().all_encoded().any(|file| file.has(chunk) && file.read(chunk, buffer, &|_| None))
}

/// Moves the chunks to the file of the whole blob, each only with the bytes that were hashed.
fn move_chunks(
    blob: &Blob,
    stored: &TierBlob,
    whole: &TierBlob,
    sums: &[[u8; 32]],
    is_over: &dyn Fn() -> bool,
) {
    let mut buffer = Vec::new();
    let mut moved = 0;
    for (chunk, sum) in (0..).zip(sums) {
        let Ok(place) = blob.source().encoded(chunk) else { return };
        while whole.waiting() + place.len() as u64 > MOST_UNDER_WAY && whole.waiting() > 0 {
            if is_over() {
                return;
            }
            std::thread::sleep(POLL);
            moved = release(stored, whole, moved..chunk);
        }
        let good =
            read(blob, chunk, place.len(), &mut buffer) && Sha256::digest(&buffer)[..] == sum[..];
        if !good || is_over() {
            return;
        }
        whole.offer(chunk, place.range.start, ChunkPayload::from(std::mem::take(&mut buffer)));
    }
    while whole.waiting() > 0 && !is_over() {
        std::thread::sleep(POLL);
    }
    release(stored, whole, moved..sums.len() as u32);
}

/// Gives up chunks of the origin's file that the whole blob's file has by now; returns the first that it has not.
fn release(stored: &TierBlob, whole: &TierBlob, chunks: std::ops::Range<u32>) -> u32 {
    let end = chunks.end;
    let there = chunks.clone().take_while(|&chunk| whole.has(chunk));
    let next = there.inspect(|&chunk| stored.release(chunk)).last();
    next.map_or(chunks.start, |last| last + 1).min(end)
}
