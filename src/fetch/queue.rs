//! What is wanted and not yet under way, and what of it goes into one request.
//!
//! Chunks are taken in the order of their urgency, and within that in the order in which they were
//! asked for. What is taken brings its neighbours along: chunks of the same blob that are wanted too
//! and lie next to it become one range. A request for demand grows only forwards into what is merely
//! wanted ahead, so that nothing arrives before what somebody waits for.
//!
//! Long stretches are cut so that all free connections get a part; see [`Limit`].

use std::collections::{HashMap, VecDeque};
use std::ops::Range;
use std::sync::Arc;

use super::blob::{Blob, Key};
use crate::source::Class;

/// A chunk that is wanted.
#[derive(Clone)]
pub struct Wanted {
    /// Of which blob.
    pub blob: Arc<Blob>,
    /// Which.
    pub chunk: u32,
    /// How urgently.
    pub class: Class,
    /// Damaged deliveries so far.
    pub tries: u8,
}

impl Wanted {
    /// Its key.
    #[must_use]
    pub fn key(&self) -> Key {
        self.blob.key(self.chunk)
    }
}

/// How much goes into one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limit {
    /// Most encoded bytes of a request; one chunk is always allowed.
    pub most: u64,
    /// Encoded bytes below which a stretch is not divided.
    pub least: u64,
    /// Connections that are free: a long stretch is divided between them.
    pub free: usize,
    /// Whether only demand may be taken.
    pub demand_only: bool,
}

/// Chunks that go into one request.
pub struct Taken {
    /// Of which blob.
    pub blob: Arc<Blob>,
    /// Which, ascending and without a gap.
    pub chunks: Range<u32>,
    /// Urgency and tries of each.
    pub wanted: Vec<(Class, u8)>,
    /// The most urgent of them.
    pub class: Class,
}

/// The chunks that are wanted and not under way.
#[derive(Default)]
pub struct Queue {
    demand: VecDeque<Key>,
    ahead: VecDeque<Key>,
    wanted: HashMap<Key, Wanted>,
}

impl Queue {
    /// Adds a chunk that is not in the queue yet.
    pub fn push(&mut self, wanted: Wanted) {
        self.order(wanted.class).push_back(wanted.key());
        self.wanted.insert(wanted.key(), wanted);
    }

    fn order(&mut self, class: Class) -> &mut VecDeque<Key> {
        if class == Class::Demand { &mut self.demand } else { &mut self.ahead }
    }

    /// Makes a chunk demand, if it is still here.
    pub fn urge(&mut self, key: Key) {
        if let Some(wanted) =
            self.wanted.get_mut(&key).filter(|wanted| wanted.class > Class::Demand)
        {
            wanted.class = Class::Demand;
            self.demand.push_back(key); // its old place in the other order is passed over
        }
    }

    /// Number of chunks.
    #[must_use]
    pub fn len(&self) -> usize {
        self.wanted.len()
    }

    /// Whether nothing is wanted.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.wanted.is_empty()
    }

    /// Whether there is anything to take under `limit`.
    #[must_use]
    pub fn has(&self, demand_only: bool) -> bool {
        if demand_only {
            self.demand.iter().any(|key| self.wanted.contains_key(key))
        } else {
            !self.wanted.is_empty()
        }
    }

    /// The next request.
    pub fn take(&mut self, limit: Limit) -> Option<Taken> {
        let first = self.next(limit.demand_only)?;
        let Wanted { blob, chunk, class, tries } = self.wanted.remove(&first)?;
        let size =
            |chunk| blob.source().encoded(chunk).map_or(u64::MAX, |place| place.len() as u64);
        let is_wanted = |chunk: u32, most: Class| {
            self.wanted.get(&blob.key(chunk)).is_some_and(|wanted| wanted.class <= most)
        };
        // Behind what was asked for first only what is as urgent.
        let first = (0..chunk).rev().take_while(|&before| is_wanted(before, class)).last();
        let stretch = (chunk..u32::MAX).skip(1).take_while(|&next| is_wanted(next, Class::Fill));
        let last = stretch.last().unwrap_or(chunk);
        let first = first.unwrap_or(chunk);
        let whole = (first..=last).map(size).fold(0, u64::saturating_add);
        let share = (whole / limit.free.max(1) as u64).max(limit.least).min(limit.most);
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
        Some(Taken { blob, chunks: start..end, wanted, class })
    }

    /// The key to begin with; passes over what is gone or has become more urgent.
    fn next(&mut self, demand_only: bool) -> Option<Key> {
        while let Some(key) = self.demand.pop_front() {
            if self.wanted.contains_key(&key) {
                return Some(key);
            }
        }
        while !demand_only && let Some(key) = self.ahead.pop_front() {
            if self.wanted.contains_key(&key) {
                return Some(key);
            }
        }
        None
    }

    /// Everything that is left.
    pub fn drain(&mut self) -> Vec<Wanted> {
        self.demand.clear();
        self.ahead.clear();
        self.wanted.drain().map(|(_, wanted)| wanted).collect()
    }
}
