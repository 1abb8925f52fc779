//! The buffers of one request: one for each chunk, filled one after the other.

use std::sync::Arc;
use std::time::Instant;

use super::FetchShared;
use super::inflate::{DecodeJob, Input};
use super::queue::{Taken, WantedChunk};
use source::chunk::{EncodedChunk, EncodedRange};
use source::{Class, Run};

/// The chunks of a request in flight. Complete ones go to the decode threads while the rest arrives.
pub(super) struct ChunkRun<'a> {
    shared: &'a Arc<FetchShared>,
    taken: &'a Taken,
    places: &'a [EncodedRange],
    /// The chunk that is being filled, and its number of bytes so far.
    current: Option<(EncodedChunk, usize)>,
    /// Number of chunks that were handed on.
    done: usize,
    /// Last byte of the chunk before: chunks begin within a byte where others end, and both have it.
    seam: Option<u8>,
    /// Time of the first byte.
    first: Option<Instant>,
}

impl<'a> ChunkRun<'a> {
    /// Creates the buffers. `places` are those of the chunks of `taken`.
    pub(super) fn new(
        shared: &'a Arc<FetchShared>,
        taken: &'a Taken,
        places: &'a [EncodedRange],
    ) -> Self {
        Self { shared, taken, places, current: None, done: 0, seam: None, first: None }
    }

    /// Time of the first byte.
    pub(super) fn first_byte(&self) -> Option<Instant> {
        self.first
    }

    /// The chunks that were not handed on.
    pub(super) fn rest(&self) -> impl Iterator<Item = WantedChunk> + '_ {
        (self.done..self.places.len()).map(|number| self.wanted(number))
    }

    fn wanted(&self, number: usize) -> WantedChunk {
        let (class, tries) = self.taken.wanted[number];
        let chunk = self.taken.chunks.start + number as u32;
        WantedChunk { blob: self.taken.blob.clone(), chunk, class, tries, flow: self.taken.flow }
    }

    /// A buffer for chunk `number`, with the byte that it shares with the one before.
    fn begin(&self, number: usize) -> (EncodedChunk, usize) {
        let place = &self.places[number];
        let mut encoded = EncodedChunk::new(place, self.shared.workers.buffer());
        let shares = number > 0 && self.places[number - 1].range.end > place.range.start;
        match (self.seam.filter(|_| shares), encoded.bytes_mut().first_mut()) {
            (Some(seam), Some(first)) => {
                *first = seam;
                (encoded, 1)
            }
            _ => (encoded, 0),
        }
    }

    /// Hands the next chunk on to the decode threads.
    fn hand_on(&mut self, encoded: EncodedChunk) {
        self.seam = encoded.bytes().last().copied();
        let counters = &self.shared.counters;
        counters.chunks.add(1);
        counters.bytes.add(encoded.bytes().len() as u64);
        let WantedChunk { blob, chunk, mut class, tries, flow } = self.wanted(self.done);
        self.done += 1;
        if class > Class::Demand && self.shared.delivery.is_awaited(blob.key(chunk)) {
            class = Class::Demand;
        }
        let job = DecodeJob { blob, chunk, class, tries, flow, input: Input::Fetched(encoded) };
        let (key, is_fill) = (job.key(), class == Class::Fill);
        if let Err(job) = self.shared.workers.push(job) {
            let wanted = job.wanted();
            self.shared.fail(&wanted, super::ended(&wanted.blob));
        } else if is_fill {
            self.shared.urge_awaited(key, flow);
        }
    }
}

impl Run for ChunkRun<'_> {
    fn room(&mut self) -> Option<&mut [u8]> {
        loop {
            let (encoded, at) = match self.current.take() {
                Some(current) => current,
                None if self.done == self.places.len() => return None,
                None => self.begin(self.done),
            };
            if at < encoded.bytes().len() {
                let (encoded, at) = self.current.insert((encoded, at));
                return Some(&mut encoded.bytes_mut()[*at..]);
            }
            self.hand_on(encoded);
        }
    }

    fn filled(&mut self, bytes: usize) {
        if self.first.is_none() {
            self.first = Some(Instant::now());
            if self.taken.class == Class::Fill {
                self.shared.crew.answered(self.taken.blob.key(self.taken.chunks.start));
            }
        }
        if let Some((encoded, at)) = self.current.take() {
            if at + bytes < encoded.bytes().len() {
                self.current = Some((encoded, at + bytes));
            } else {
                self.hand_on(encoded);
            }
        }
    }
}
