//! Chunks that are wanted and not yet in flight, and their division into requests.
//!
//! Chunks are taken in the order of their urgency (demand, then read-ahead, then the background fill), and
//! within that devices take [turns](super::fair). A taken chunk brings its neighbours: chunks of the same blob
//! that are wanted too and lie next to it become one range. A request for demand grows forwards into chunks
//! that are wanted ahead; it grows backwards only as far as those chunks arrive sooner in this request than
//! by one of their own, because they arrive before the chunk that has a waiter.
//!
//! Long ranges are cut so that all free connections get a part; see [`Limit`].

use std::collections::{HashMap, VecDeque};
use std::ops::Range;
use std::sync::Arc;

use super::blob::{Blob, Key};
use super::fair::{Flow, Lines};
use source::Class;

/// A wanted chunk.
#[derive(Clone)]
pub struct WantedChunk {
    /// Its blob.
    pub blob: Arc<Blob>,
    /// Its number.
    pub chunk: u32,
    /// Its urgency.
    pub class: Class,
    /// Damaged deliveries so far.
    pub tries: u8,
    /// The device that wants it.
    pub flow: Flow,
}

impl WantedChunk {
    /// Its key.
    #[must_use]
    pub fn key(&self) -> Key {
        self.blob.key(self.chunk)
    }
}

/// Limits on one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limit {
    /// Limit on the encoded bytes of a request; one chunk is always allowed.
    pub most: u64,
    /// Encoded bytes below which a range is not divided, unless more arrive in two round trips.
    pub least: u64,
    /// Number of free connections: a long range is divided between them.
    pub free: usize,
    /// True if only demand may be taken.
    pub demand_only: bool,
    /// Limit on the encoded bytes of a request of the background fill; 0: none may be taken.
    pub fill: u64,
}

/// Chunks that go into one request.
pub struct Taken {
    /// Their blob.
    pub blob: Arc<Blob>,
    /// Their numbers, ascending and without a gap.
    pub chunks: Range<u32>,
    /// Urgency and tries of each.
    pub wanted: Vec<(Class, u8)>,
    /// The highest urgency among them.
    pub class: Class,
    /// The device whose turn it was.
    pub flow: Flow,
    /// Their encoded bytes.
    pub bytes: u64,
}

/// Encoded bytes that a request costs beside its own, for the turns of devices: those that arrive in a tenth of a round
/// trip.
const REQUEST_COST: u64 = 256 << 10;

/// The chunks that are wanted and not in flight.
#[derive(Default)]
pub struct FetchQueue {
    demand: Lines<Key>,
    ahead: Lines<Key>,
    fill: VecDeque<Key>,
    wanted: HashMap<Key, WantedChunk>,
}

impl FetchQueue {
    /// Adds a chunk that is not in the queue yet.
    pub fn push(&mut self, wanted: WantedChunk) {
        match wanted.class {
            Class::Demand => self.demand.push(wanted.flow, wanted.key()),
            Class::Prefetch => self.ahead.push(wanted.flow, wanted.key()),
            Class::Fill => self.fill.push_back(wanted.key()),
        }
        self.wanted.insert(wanted.key(), wanted);
    }

    /// Makes a chunk demand of a device, if it is still here. It stays the demand of others too. False if it is not here.
    pub fn urge(&mut self, key: Key, flow: Flow) -> bool {
        let Some(wanted) = self.wanted.get_mut(&key) else { return false };
        wanted.class = Class::Demand;
        self.demand.push(flow, key); // an older place is skipped
        true
    }

    /// Number of chunks.
    #[must_use]
    pub fn len(&self) -> usize {
        self.wanted.len()
    }

    /// True if no chunk is wanted.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.wanted.is_empty()
    }

    /// True if there is a chunk that [`Self::take`] may take.
    #[must_use]
    pub fn has(&self, demand_only: bool) -> bool {
        if demand_only {
            self.demand.iter().any(|key| self.wanted.contains_key(key))
        } else {
            !self.wanted.is_empty()
        }
    }

    /// True if chunks are wanted for the background fill.
    #[must_use]
    pub fn has_fill(&self) -> bool {
        !self.fill.is_empty()
    }

    /// Takes the next request; of a device only if it `may` have one more, of so many bytes at least.
    pub fn take(&mut self, limit: Limit, may: &dyn Fn(Flow, u64) -> bool) -> Option<Taken> {
        let (flow, first) = self.next(limit, may)?;
        self.take_from(flow, first, limit)
    }

    /// Takes the next request for demand of a way that is not busy.
    pub fn take_of_idle(&mut self, limit: Limit, is_busy: &dyn Fn(u32) -> bool) -> Option<Taken> {
        let Self { demand, wanted, .. } = self;
        let first = demand.remove(&|key| !is_busy(key.way) && wanted.contains_key(key))?;
        let flow = wanted.get(&first)?.flow;
        self.take_from(flow, first, limit)
    }

    /// Takes a request that begins with a chunk, and its neighbours, for a device.
    fn take_from(&mut self, flow: Flow, first: Key, limit: Limit) -> Option<Taken> {
        let WantedChunk { blob, chunk, class, tries, .. } = self.wanted.remove(&first)?;
        let size =
            |chunk| blob.source().encoded(chunk).map_or(u64::MAX, |place| place.len() as u64);
        let is_wanted = |chunk: u32, most: Class| {
            self.wanted.get(&blob.key(chunk)).is_some_and(|wanted| wanted.class <= most)
        };
        // Between the chunks of some blobs lie bytes that belong to no chunk; these are not requested.
        let place = |chunk| blob.source().encoded(chunk).map_or(0..0, |place| place.range);
        let adjoins = |chunk: u32| place(chunk).end >= place(chunk.saturating_add(1)).start;
        // Before the chunk that has a waiter, only chunks of the same urgency.
        let first = (0..chunk)
            .rev()
            .take_while(|&before| is_wanted(before, class) && adjoins(before))
            .last();
        // But one or two neighbours may come before it: that takes less time than another request.
        let worth = blob.worth_a_request();
        let mut before = 0;
        let near = (0..chunk).rev().take_while(|&chunk| {
            before += size(chunk).min(worth + 1);
            let is_near = class == Class::Demand && before <= worth / 2;
            is_near && is_wanted(chunk, Class::Prefetch) && adjoins(chunk)
        });
        let first = near.last().into_iter().chain(first).min();
        // After it, chunks that will probably be read; the rest of the blob can wait for a quiet line.
        let most = class.max(Class::Prefetch);
        let stretch = (chunk..u32::MAX)
            .skip(1)
            .take_while(|&next| is_wanted(next, most) && adjoins(next - 1));
        let last = stretch.last().unwrap_or(chunk);
        let first = first.unwrap_or(chunk);
        let whole = (first..=last).map(size).fold(0, u64::saturating_add);
        let share = match class {
            // Without a waiter, fewer requests are better.
            Class::Fill => limit.fill,
            Class::Prefetch => limit.most,
            Class::Demand => {
                let least = limit.least.max(worth);
                (whole / limit.free.max(1) as u64).max(least).min(limit.most)
            }
        };
        let (mut start, mut end) = (chunk, chunk + 1);
        let mut bytes = size(chunk);
        while end <= last && bytes.saturating_add(size(end)) <= share {
            bytes += size(end);
            end += 1;
        }
        while end > last && start > first && bytes.saturating_add(size(start - 1)) <= share {
            bytes += size(start - 1);
            start -= 1;
        }
        let mut wanted = Vec::with_capacity((end - start) as usize);
        for number in start..end {
            let own = (class, tries);
            wanted.push(match self.wanted.remove(&blob.key(number)) {
                Some(other) => (other.class, other.tries),
                None => own,
            });
        }
        match class {
            Class::Demand => self.demand.charge(flow, bytes.saturating_add(REQUEST_COST)),
            Class::Prefetch => self.ahead.charge(flow, bytes.saturating_add(REQUEST_COST)),
            Class::Fill => {}
        }
        Some(Taken { blob, chunks: start..end, wanted, class, flow, bytes })
    }

    /// The key to begin with; skips keys that are gone or have become more urgent.
    fn next(&mut self, limit: Limit, may: &dyn Fn(Flow, u64) -> bool) -> Option<(Flow, Key)> {
        let Self { demand, ahead, wanted, .. } = self;
        // A key that is not waiting in this order any more may always be taken, to be skipped.
        let may_take = |class: Class, flow, key: &Key| {
            let waiting = wanted.get(key).filter(|wanted| wanted.class == class);
            waiting.is_none_or(|WantedChunk { blob, chunk, .. }| {
                may(flow, blob.source().encoded(*chunk).map_or(0, |place| place.len() as u64))
            })
        };
        let orders = [
            (Class::Demand, Some(demand)),
            (Class::Prefetch, (!limit.demand_only).then_some(ahead)),
        ];
        for (class, lines) in orders {
            let Some(lines) = lines else { continue };
            while let Some((flow, key)) = lines.pop(&mut |flow, key| may_take(class, flow, key)) {
                if wanted.get(&key).is_some_and(|wanted| wanted.class == class) {
                    return Some((flow, key));
                }
            }
        }
        while !limit.demand_only
            && limit.fill > 0
            && let Some(key) = self.fill.pop_front()
        {
            // A key that has become demand has its place in that order.
            if self.wanted.get(&key).is_some_and(|wanted| wanted.class == Class::Fill) {
                return Some((Flow::default(), key));
            }
        }
        None
    }

    /// Takes all chunks that are left.
    pub fn drain(&mut self) -> Vec<WantedChunk> {
        self.demand.drain();
        self.ahead.drain();
        self.fill.clear();
        self.wanted.drain().map(|(_, wanted)| wanted).collect()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::tier::StoredBlob;
    use source::chunk::{ChunkSource, PlainChunks};
    use source::{ByteSource, SourceError};

    /// A source that has a length and is never read.
    struct UnreadSource(u64);

    impl ByteSource for UnreadSource {
        fn name(&self) -> &'static str {
            "length"
        }
        fn len(&self) -> u64 {
            self.0
        }
        fn read_exact_at(&self, _: &mut [u8], _: u64) -> Result<(), SourceError> {
            unreachable!("nothing is read here")
        }
    }

    /// A blob of chunks of 256 KiB.
    fn blob(number: u32, chunks: u64) -> Arc<Blob> {
        let source = Arc::new(UnreadSource(chunks * PlainChunks::CHUNK));
        let source: Arc<dyn ChunkSource> = Arc::new(PlainChunks::new("b", source));
        Arc::new(Blob::new(number, 0, source, StoredBlob::default(), Arc::default()))
    }

    fn wanted(blob: &Arc<Blob>, chunk: u32, class: Class) -> WantedChunk {
        WantedChunk { blob: blob.clone(), chunk, class, tries: 0, flow: Flow::default() }
    }

    const MIB: u64 = 1 << 20;
    const ALONE: Limit =
        Limit { most: 4 * MIB, least: MIB, free: 1, demand_only: false, fill: 4 * MIB };

    fn take(queue: &mut FetchQueue, limit: Limit) -> Option<Range<u32>> {
        queue.take(limit, &|_, _| true).map(|taken| taken.chunks)
    }

    #[test]
    fn a_request_grows_forwards_into_what_is_ahead_and_backwards_only_into_demand_and_near() {
        let blob = blob(0, 64);
        let mut queue = FetchQueue::default();
        for chunk in [10, 11, 12, 13, 14, 15, 17, 18, 19] {
            queue.push(wanted(&blob, chunk, Class::Prefetch));
        }
        queue.push(wanted(&blob, 16, Class::Demand));
        // 1.25 MB arrive in a round trip, before any measurement: four chunks.
        assert_eq!(take(&mut queue, ALONE), Some(12..20));
        queue.push(wanted(&blob, 31, Class::Demand));
        queue.push(wanted(&blob, 30, Class::Demand));
        assert_eq!(take(&mut queue, ALONE), Some(30..32));
        assert_eq!(take(&mut queue, ALONE), Some(10..12));
        assert_eq!(take(&mut queue, ALONE), None);
    }

    #[test]
    fn a_long_stretch_is_divided_between_the_connections_that_are_free() {
        let blob = blob(0, 64);
        for (free, first, requests) in [(1, 16, 2), (3, 10, 4), (100, 9, 4)] {
            let mut queue = FetchQueue::default();
            (0..32).for_each(|chunk| queue.push(wanted(&blob, chunk, Class::Demand)));
            let limit = Limit { free, ..ALONE };
            let taken: Vec<_> = std::iter::from_fn(|| take(&mut queue, limit)).collect();
            // The rest is divided anew, and never into less than the least.
            assert_eq!((taken[0].len(), taken.len()), (first, requests), "{taken:?}");
        }
    }

    #[test]
    fn what_becomes_urgent_is_taken_as_demand_and_once() {
        let blob = blob(0, 64);
        let mut queue = FetchQueue::default();
        for chunk in [1, 20, 40] {
            queue.push(wanted(&blob, chunk, Class::Prefetch));
        }
        assert!(!queue.has(true));
        queue.urge(blob.key(40), Flow::default());
        queue.urge(blob.key(41), Flow::default()); // not in the queue
        assert_eq!(take(&mut queue, Limit { demand_only: true, ..ALONE }), Some(40..41));
        assert!(!queue.has(true) && queue.len() == 2);
        assert_eq!(take(&mut queue, Limit { demand_only: true, ..ALONE }), None);
        assert_eq!(take(&mut queue, ALONE), Some(1..2));
        assert_eq!(take(&mut queue, ALONE), Some(20..21));
        assert!(queue.is_empty());
    }

    proptest! {
        /// For any requests in any order: each chunk is taken once, in requests that are contiguous, of one
        /// blob, and not too large; demand first.
        #[test]
        fn every_chunk_is_taken_once(
            asked in proptest::collection::btree_map((0_u32..2, 0_u32..64), 0_u8..3, 1..80),
            order in any::<u64>(),
            free in 1_usize..30,
        ) {
            let blobs = [blob(0, 64), blob(1, 64)];
            let mut asked: Vec<_> = asked.into_iter().collect();
            let shift = order as usize % asked.len();
            asked.rotate_left(shift);
            let mut queue = FetchQueue::default();
            for ((number, chunk), class) in &asked {
                let class = [Class::Demand, Class::Prefetch, Class::Fill][usize::from(*class)];
                queue.push(wanted(&blobs[*number as usize], *chunk, class));
            }
            let mut taken = Vec::new();
            let mut ahead = false;
            while let Some(request) = queue.take(Limit { free, ..ALONE }, &|_, _| true) {
                prop_assert_eq!(request.wanted.len(), request.chunks.len());
                prop_assert!(request.chunks.len() <= 16);
                prop_assert!(request.class == Class::Demand || request.wanted.iter().all(|(class, _)| *class > Class::Demand));
                prop_assert!(!ahead || request.class > Class::Demand);
                ahead |= request.class > Class::Demand;
                taken.extend(request.chunks.map(|chunk| request.blob.key(chunk)));
            }
            let mut expected: Vec<Key> = asked.iter().map(|((blob, chunk), _)| blobs[*blob as usize].key(*chunk)).collect();
            expected.sort();
            taken.sort();
            prop_assert_eq!(taken, expected);
        }
    }
}
