//! Merging several starts into one trace.
//!
//! A start gives the pieces that it touched a weight of [`FIRST`]. Each later start that touches a piece
//! again adds one, up to [`MAX_WEIGHT`], and each that does not subtracts one; at zero the piece is removed.
//! So an accidental touch is forgotten after two starts, and a recurring one survives four different starts,
//! such as a shell in the same image. A start that touched very little proves nothing about the other pieces
//! and subtracts nothing.

use super::{MAX_TOUCHES, MAX_WEIGHT, Touch, Trace};

/// Weight after the first touch.
const FIRST: u8 = 2;

/// Divisor: a start that touched less than this part of the trace is of another kind, and no weight is
/// reduced.
const SAME_KIND: u64 = 4;

/// For each blob the ranges that some touches cover, by their starts, with the greatest weight in each.
struct Covered(Vec<Vec<(u64, u64, u8)>>);

impl Covered {
    fn of(touches: &[Touch], blobs: usize) -> Self {
        let mut by_blob = vec![Vec::new(); blobs];
        for touch in touches {
            if let Some(ranges) = by_blob.get_mut(touch.blob as usize) {
                ranges.push((touch.start, touch.end(), touch.weight));
            }
        }
        for ranges in &mut by_blob {
            ranges.sort_unstable();
            ranges.dedup_by(|next, range| {
                let overlaps = next.0 < range.1;
                if overlaps {
                    range.1 = range.1.max(next.1);
                    range.2 = range.2.max(next.2);
                }
                overlaps
            });
        }
        Self(by_blob)
    }

    /// The greatest weight of the ranges that overlap `touch`, 0 if none does.
    fn weight(&self, touch: &Touch) -> u8 {
        let Some(ranges) = self.0.get(touch.blob as usize) else { return 0 };
        let first = ranges.partition_point(|range| range.1 <= touch.start);
        let overlapping = ranges[first..].iter().take_while(|range| range.0 < touch.end());
        overlapping.map(|range| range.2).max().unwrap_or(0)
    }
}

impl Trace {
    /// Adds the touches of another start. They keep their order and times; touches of earlier starts only are
    /// placed among them by their times.
    pub fn merge(&mut self, start: &Trace) {
        if start.touches.is_empty() {
            return;
        }
        let numbers: Vec<Option<u32>> = start.blobs.iter().map(|blob| self.blob(*blob)).collect();
        let own = |touch: &Touch| {
            let blob = numbers.get(touch.blob as usize).copied().flatten()?;
            Some(Touch { blob, ..*touch })
        };
        let mut new: Vec<Touch> = start.touches.iter().filter_map(own).collect();
        let before = Covered::of(&self.touches, self.blobs.len());
        for touch in &mut new {
            touch.weight = match before.weight(touch) {
                0 => FIRST,
                weight => (weight + 1).min(MAX_WEIGHT),
            };
        }
        let now = Covered::of(&new, self.blobs.len());
        let fades = u8::from(start.bytes() >= self.bytes() / SAME_KIND);
        self.touches.retain_mut(|touch| {
            touch.weight = touch.weight.saturating_sub(fades);
            // A piece that was touched again is in `new`, in this start's division.
            touch.weight > 0 && now.weight(touch) == 0
        });
        self.touches.extend(new);
        self.touches.sort_by_key(|touch| touch.at);
        if self.touches.len() > MAX_TOUCHES {
            self.touches.retain(|touch| touch.weight >= FIRST);
            self.touches.truncate(MAX_TOUCHES);
        }
        self.starts = self.starts.saturating_add(start.starts.max(1));
        self.forget_blobs();
    }

    /// Removes the blobs that no touch names.
    fn forget_blobs(&mut self) {
        let mut numbers = vec![None; self.blobs.len()];
        let mut blobs = Vec::new();
        for touch in &mut self.touches {
            let number = numbers[touch.blob as usize].get_or_insert_with(|| {
                blobs.push(self.blobs[touch.blob as usize]);
                blobs.len() as u32 - 1
            });
            touch.blob = *number;
        }
        self.blobs = blobs;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::oci::Digest;

    /// A start that touched these chunks of a mebibyte of a blob.
    fn start(blob: &[u8], chunks: impl IntoIterator<Item = u64>) -> Trace {
        let touches = chunks.into_iter().enumerate().map(|(number, chunk)| Touch {
            blob: 0,
            start: chunk << 20,
            len: 1 << 20,
            at: number as u32 * 10,
            weight: 1,
        });
        Trace { starts: 1, blobs: vec![Digest::of(blob)], touches: touches.collect() }
    }

    fn chunks(trace: &Trace) -> Vec<u64> {
        trace.touches.iter().map(|touch| touch.start >> 20).collect()
    }

    #[test]
    fn what_recurs_stays_and_an_accident_is_gone_after_two_more_starts() {
        let mut trace = Trace::default();
        trace.merge(&start(b"a", [5, 9, 1]));
        assert_eq!(chunks(&trace), [5, 9, 1]);
        trace.merge(&start(b"a", [5, 1]));
        assert_eq!((chunks(&trace), trace.starts), (vec![5, 9, 1], 2));
        trace.merge(&start(b"a", [5, 1]));
        assert_eq!(chunks(&trace), [5, 1]);
        // Other work of the same size in the same image, four times.
        for round in 0..4 {
            assert!(chunks(&trace).contains(&5), "after {round}");
            trace.merge(&start(b"a", [70, 71]));
        }
        assert_eq!(chunks(&trace), [70, 71]);
    }

    #[test]
    fn a_start_that_touched_next_to_nothing_takes_away_nothing() {
        let mut trace = Trace::default();
        trace.merge(&start(b"a", 0..40));
        for _ in 0..9 {
            trace.merge(&start(b"a", [100]));
        }
        assert_eq!(trace.touches.len(), 41);
        trace.merge(&Trace::default());
        assert_eq!((trace.touches.len(), trace.starts), (41, 10));
    }

    #[test]
    fn pieces_that_were_cut_otherwise_are_the_same_place_and_blobs_that_fade_are_forgotten() {
        let mut trace = start(b"a", 0..4);
        let mut other = start(b"a", 0..2);
        other.touches.iter_mut().for_each(|touch| touch.len = 2 << 20);
        other.touches[1].start = 2 << 20;
        trace.merge(&other);
        assert_eq!(trace.touches.iter().map(|touch| touch.weight).collect::<Vec<_>>(), [2, 2]);
        trace.merge(&start(b"b", 0..4));
        trace.merge(&start(b"b", 0..4));
        assert_eq!((trace.blobs.clone(), trace.bytes()), (vec![Digest::of(b"b")], 4 << 20));
    }

    proptest! {
        /// After any starts: the last one is in the trace whole, no piece is in it twice, and it can be
        /// stored.
        #[test]
        fn the_last_start_is_in_the_trace_and_nothing_twice(
            starts in proptest::collection::vec((0_u8..3, proptest::collection::btree_set(0_u64..40, 0..30)), 1..8)
        ) {
            let mut trace = Trace::default();
            for (blob, touched) in &starts {
                trace.merge(&start(&[*blob], touched.iter().copied()));
                let digest = Digest::of(&[*blob]);
                let held: Vec<u64> = trace.touches.iter()
                    .filter(|touch| trace.blobs[touch.blob as usize] == digest)
                    .map(|touch| touch.start >> 20).collect();
                prop_assert!(touched.iter().all(|chunk| held.contains(chunk)));
                let unique: std::collections::BTreeSet<_> = held.iter().collect();
                prop_assert_eq!(unique.len(), held.len());
                prop_assert_eq!(Trace::parse(&trace.to_bytes()), Ok(trace.clone()));
            }
        }
    }
}
