//! Read-ahead: guesses of the chunks that are read next.
//!
//! File data lie in the tar in the order in which the image was packed, directory by directory. A program
//! reads some files from end to end, and many small files from a few directories, in an order of its own. So
//! two patterns are watched, both in the order of chunks in a *blob*, not in a file:
//!
//! * chunks of a sequential read ([`Streams`]) are fetched ahead, as far as the line needs;
//! * when a miss lies near earlier touches, its *neighbours* on both sides are fetched by the same request,
//!   provided that the line transfers them faster than the answer to a second request would come.
//!
//! Both are guesses, and their cost is limited by their success so far in this blob: each touch near an
//! earlier one earns credit, and each chunk that was guessed and is not touched yet costs credit. A single
//! touch earns nothing, so a 4 KiB read of a cold blob fetches one chunk, and scattered reads fetch little
//! more than their own chunks.
//!
//! Pure: no clock, no thread, no I/O.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ops::Range;

use super::streams::Streams;

/// Distance at which a touch is near another, and number of neighbours fetched on each side. On recorded
/// starts (a large framework, a small service) a distance of three makes 0.02 fewer requests a chunk and
/// fetches 0.03 more bytes.
const NEAR: u32 = 2;
/// Limit on neighbours on each side, for expensive requests.
const FAR: u32 = 4;

/// Credit of a near touch, when a round trip transfers two chunks (5 ms at a gigabit). It grows with that
/// number, up to three times as much: the more a request costs, the more wrong guesses are acceptable.
const EARNED: u64 = 6;
/// Price of a guess that may still turn out right, in units of the credit: half of the neighbours are
/// touched, and nearly all chunks of a stream.
const NEIGHBOUR: u64 = 5;
const NEXT: u64 = 2;
/// Price of a guess that is not touched so far. With these prices the recorded starts make half a request a
/// chunk and fetch a quarter more bytes than they touch; see perf/README.
const UNUSED: u64 = 10;

/// State of a chunk that is no longer in its initial state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum GuessState {
    /// Fetched ahead, and not touched so far.
    Guessed,
    Touched,
}

/// A touch of a chunk that differs from the last one touched.
#[derive(Clone, Copy, Debug)]
pub struct ChunkTouch {
    /// The chunk.
    pub chunk: u32,
    /// True if it has to be fetched for this touch.
    pub missed: bool,
    /// Limit on the chunks to fetch ahead of a stream.
    pub most: u32,
    /// Chunks that the line transfers in the time of two round trips: the cost of a request.
    pub worth: u32,
    /// Number of chunks of the blob.
    pub count: u32,
}

/// Touches and guesses of a blob.
#[derive(Debug, Default)]
pub struct Ahead {
    streams: Streams,
    chunks: HashMap<u32, GuessState>,
    /// Number of touches near earlier ones.
    near: u64,
    /// Chunks that are guessed and not touched so far.
    unused: u64,
}

impl Ahead {
    /// Returns the chunks to fetch besides the touched one, which may be among them; none for most touches.
    /// Never past the blob's end.
    pub fn touched(&mut self, touch: ChunkTouch) -> Range<u32> {
        let ChunkTouch { chunk, missed, most, worth, count } = touch;
        if chunk >= count {
            return 0..0;
        }
        let before = self.chunks.insert(chunk, GuessState::Touched);
        self.unused -= u64::from(before == Some(GuessState::Guessed));
        self.near += u64::from(before != Some(GuessState::Touched) && self.is_near(chunk));
        let stream = self.streams.touched(chunk, most, count);
        let guess = if !stream.is_empty() {
            let most = u32::try_from(self.credit(worth) / NEXT).unwrap_or(u32::MAX);
            stream.start..stream.end.min(stream.start.saturating_add(most))
        } else if missed && before.is_none() {
            self.neighbours(chunk, worth, count)
        } else {
            // A chunk that was evicted comes back alone: the cache is too small for more.
            0..0
        };
        for chunk in guess.clone() {
            if let Entry::Vacant(entry) = self.chunks.entry(chunk) {
                entry.insert(GuessState::Guessed);
                self.unused += 1;
            }
        }
        guess
    }

    fn is_near(&self, chunk: u32) -> bool {
        let (first, last) = (chunk.saturating_sub(NEAR), chunk.saturating_add(NEAR));
        let touched =
            |other: u32| other != chunk && self.chunks.get(&other) == Some(&GuessState::Touched);
        (first..=last).any(touched)
    }

    fn credit(&self, worth: u32) -> u64 {
        let earned = (EARNED * u64::from(worth) / 4).clamp(EARNED, 3 * EARNED);
        (earned * self.near).saturating_sub(UNUSED * self.unused)
    }

    /// Chunks around a missed one, from the nearest outwards, up to the first that is not missing.
    fn neighbours(&self, chunk: u32, worth: u32, count: u32) -> Range<u32> {
        let most = worth.min(NEAR).max(worth / 8).min(FAR);
        let mut left = self.credit(worth) / NEIGHBOUR;
        let missing = |chunk: u32| chunk < count && !self.chunks.contains_key(&chunk);
        let (mut start, mut end) = (chunk, chunk + 1);
        let (mut before, mut behind) = (true, true);
        while before || behind {
            behind &= left > 0 && end - chunk <= most && missing(end);
            end += u32::from(behind);
            left -= u64::from(behind);
            before &= left > 0 && chunk - start < most && start > 0 && missing(start - 1);
            start -= u32::from(before);
            left -= u64::from(before);
        }
        start..end
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    const COUNT: u32 = 1000;

    /// Touches chunks of a cold blob one after the other; returns the fetched chunks, and the number of
    /// requests.
    fn fetched(touches: &[u32], worth: u32) -> (BTreeSet<u32>, usize) {
        let (mut ahead, mut here, mut requests) = (Ahead::default(), BTreeSet::new(), 0);
        for &chunk in touches {
            let missed = here.insert(chunk);
            let more = ahead.touched(ChunkTouch { chunk, missed, most: 16, worth, count: COUNT });
            let apart = !more.is_empty() && more.start > chunk + 1;
            requests += usize::from(missed) + usize::from(apart || !missed && !more.is_empty());
            here.extend(more);
        }
        (here, requests)
    }

    #[test]
    fn a_lone_touch_and_scattered_ones_bring_nothing_else() {
        assert_eq!(fetched(&[5], 40), (BTreeSet::from([5]), 1));
        let scattered = [5, 900, 30, 500, 77, 12, 650, 333, 801];
        assert_eq!(fetched(&scattered, 40).0, BTreeSet::from(scattered));
    }

    #[test]
    fn among_others_a_miss_brings_its_neighbours_by_the_same_request() {
        // Files of a few directories, in an order of their own: every chunk of 100..160 in the end.
        let touches: Vec<u32> = (0..60).map(|step| 100 + step * 37 % 60).collect();
        let (here, requests) = fetched(&touches, 4);
        assert!(requests <= 40, "{requests}");
        assert!(here.len() <= 66, "{here:?}");
        // Fewer requests on a line with expensive requests.
        let (here, dear) = fetched(&touches, 40);
        assert!(dear < requests && here.len() <= 100, "{dear}, {here:?}");
        // On a line too slow for that, each chunk is fetched alone.
        assert_eq!(fetched(&touches, 0).1, 60);
    }

    #[test]
    fn what_is_read_in_order_is_fetched_ahead() {
        let (here, requests) = fetched(&(200..500).collect::<Vec<_>>(), 4);
        assert!(requests <= 75, "{requests}");
        assert!(here.len() <= 300 + 16 && *here.first().unwrap() >= 198, "{here:?}");
    }

    #[test]
    fn what_was_given_up_comes_back_alone() {
        let mut ahead = Ahead::default();
        let touch = |chunk| ChunkTouch { chunk, missed: true, most: 0, worth: 4, count: COUNT };
        for step in 0..60 {
            ahead.touched(touch(100 + step * 37 % 60));
        }
        assert!((100..160).all(|chunk| ahead.touched(touch(chunk)).is_empty()));
    }

    proptest! {
        #[test]
        fn guesses_in_vain_are_paid_by_near_touches_and_nothing_lies_past_the_end(
            touches in proptest::collection::vec((0..120_u32, any::<bool>(), 0..40_u32), 1..300),
        ) {
            let mut ahead = Ahead::default();
            let (mut guessed, mut touched) = (BTreeSet::new(), BTreeSet::new());
            let mut near = 0;
            for (chunk, missed, most) in touches {
                let close = |other: &u32| *other != chunk && other.abs_diff(chunk) <= NEAR;
                near += usize::from(!touched.contains(&chunk) && touched.iter().any(close));
                touched.insert(chunk);
                let more = ahead.touched(ChunkTouch { chunk, missed, most, worth: 4, count: 100 });
                prop_assert!(more.end <= 100);
                guessed.extend(more);
                let vain = guessed.difference(&touched).count();
                prop_assert!(vain <= near * 3, "{vain} of {near}");
            }
        }
    }
}
