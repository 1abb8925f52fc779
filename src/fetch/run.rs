//! The buffers of one request: each chunk's own, filled one after the other.

use std::sync::Arc;

use super::inflate::{Input, Job};
use super::queue::{Taken, Wanted};
use super::{Shared, count};
use crate::chunk::{Encoded, EncodedChunk};
use crate::source::Run;

/// A request's chunks on their way. Whole ones go to the inflate workers while the rest arrives.
pub(super) struct ChunkRun<'a> {
    shared: &'a Arc<Shared>,
    taken: &'a Taken,
    places: &'a [Encoded],
    /// Chunk that is being filled.
    current: Option<EncodedChunk>,
    /// Number of chunks that were begun.
    begun: usize,
}

impl<'a> ChunkRun<'a> {
    /// `places` are those of the chunks of `taken`.
    pub(super) fn new(shared: &'a Arc<Shared>, taken: &'a Taken, places: &'a [Encoded]) -> Self {
        Self { shared, taken, places, current: None, begun: 0 }
    }

    /// Hands the last chunk on. Call it when the read has succeeded.
    pub(super) fn finish(&mut self) {
        if let Some(whole) = self.current.take() {
            self.hand_on(whole);
        }
    }

    /// The chunks that were not handed on: all from the one that was being filled.
    pub(super) fn rest(&self) -> impl Iterator<Item = Wanted> + '_ {
        let first = self.begun - usize::from(self.current.is_some());
        (first..self.places.len()).map(|number| self.wanted(number))
    }

    fn wanted(&self, number: usize) -> Wanted {
        let (class, tries) = self.taken.wanted[number];
        let chunk = self.taken.chunks.start + number as u32;
        Wanted { blob: self.taken.blob.clone(), chunk, class, tries }
    }

    fn hand_on(&self, encoded: EncodedChunk) {
        let counters = &self.shared.counters;
        count(&counters.chunks, 1);
        count(&counters.bytes, encoded.bytes().len() as u64);
        let Wanted { blob, chunk, class, tries } = self.wanted(self.begun - 1);
        let job = Job { blob, chunk, class, tries, input: Input::Fetched(encoded) };
        if let Err(job) = self.shared.workers.push(job) {
            let wanted = job.wanted();
            self.shared.fail(&wanted, super::ended(&wanted.blob));
        }
    }
}

impl Run for ChunkRun<'_> {
    fn next(&mut self) -> Option<&mut [u8]> {
        loop {
            let before = self.current.take();
            let Some(place) = self.places.get(self.begun) else {
                self.current = before; // `finish` hands it on
                return None;
            };
            let mut encoded = EncodedChunk::new(place, self.shared.workers.buffer());
            // Chunks begin within a byte where others end: both have it.
            let shared = match self.begun.checked_sub(1) {
                Some(number) => {
                    self.places[number].range.end.saturating_sub(place.range.start) as usize
                }
                None => 0,
            };
            if let Some(before) = before {
                let bytes = before.bytes();
                let tail = &bytes[bytes.len() - shared.min(bytes.len())..];
                encoded.bytes_mut()[..tail.len()].copy_from_slice(tail);
                self.hand_on(before);
            }
            self.begun += 1;
            self.current = Some(encoded);
            if place.len() > shared {
                return self.current.as_mut().map(|encoded| &mut encoded.bytes_mut()[shared..]);
            }
        }
    }
}
