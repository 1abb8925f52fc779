//! The disk sectors of a writable layer and their positions: runs without overlap. A later run replaces the
//! parts of earlier ones that it covers.

use std::collections::BTreeMap;

/// Content of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RunContent {
    /// Zeros.
    Zero,
    /// Data from this sector of the data file on.
    At(u64),
}

impl RunContent {
    fn advance(self, by: u64) -> Self {
        match self {
            RunContent::Zero => RunContent::Zero,
            RunContent::At(at) => RunContent::At(at + by),
        }
    }
}

/// The runs: first sector → length and content.
#[derive(Debug, Default)]
pub(super) struct Extents {
    runs: BTreeMap<u64, (u64, RunContent)>,
}

/// Memory of a run, in bytes: 32 of key and value, in nodes that are at least half full.
pub(super) const RUN_MEMORY: u64 = 64;

impl Extents {
    /// Number of runs.
    pub(super) fn count(&self) -> u64 {
        self.runs.len() as u64
    }

    pub(super) fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    /// All runs, ascending: first sector, length, content.
    pub(super) fn iter(&self) -> impl Iterator<Item = (u64, u64, RunContent)> + '_ {
        self.runs.iter().map(|(&start, &(len, content))| (start, len, content))
    }

    /// Adds a run and replaces the runs that it covers.
    pub(super) fn insert(&mut self, lba: u64, len: u64, content: RunContent) {
        if len == 0 {
            return;
        }
        let end = lba + len;
        // The run that begins before it may reach into the new one, or past it.
        if let Some((&start, &(old_len, old))) = self.runs.range(..lba).next_back()
            && start + old_len > lba
        {
            self.runs.insert(start, (lba - start, old));
            if start + old_len > end {
                self.runs.insert(end, (start + old_len - end, old.advance(end - start)));
            }
        }
        while let Some((&start, &(old_len, old))) = self.runs.range(lba..end).next() {
            self.runs.remove(&start);
            if start + old_len > end {
                self.runs.insert(end, (start + old_len - end, old.advance(end - start)));
            }
        }
        // Joined to the run before it if it continues that run in the data file too: a long sequential write
        // is one run.
        if let Some((&start, &(old_len, old))) = self.runs.range(..lba).next_back()
            && start + old_len == lba
            && old.advance(old_len) == content
        {
            self.runs.insert(start, (old_len + len, old));
            return;
        }
        self.runs.insert(lba, (len, content));
    }

    /// The parts of runs inside `from..to`, ascending.
    pub(super) fn within(
        &self,
        from: u64,
        to: u64,
    ) -> impl Iterator<Item = (u64, u64, RunContent)> + '_ {
        let first = self
            .runs
            .range(..from)
            .next_back()
            .filter(|(start, (len, _))| **start + len > from)
            .map_or(from, |(&start, _)| start);
        self.runs.range(first..to.max(first)).map(move |(&start, &(len, content))| {
            let begin = start.max(from);
            let end = (start + len).min(to);
            (begin, end - begin, content.advance(begin - start))
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_sector_is_what_the_last_run_over_it_said(
            runs in prop::collection::vec((0_u64..200, 1_u64..60, any::<bool>()), 1..40),
            from in 0_u64..250,
            len in 0_u64..100,
        ) {
            let mut extents = Extents::default();
            let mut model: Vec<Option<RunContent>> = vec![None; 400];
            let mut at = 8;
            for (lba, len, zero) in runs {
                let content = if zero { RunContent::Zero } else { RunContent::At(at) };
                extents.insert(lba, len, content);
                for sector in 0..len {
                    model[(lba + sector) as usize] = Some(content.advance(sector));
                }
                at += len;
            }
            let mut found: Vec<Option<RunContent>> = vec![None; 400];
            let mut free = 0;
            for (start, len, content) in extents.iter() {
                prop_assert!(start >= free && len > 0);
                free = start + len;
                for sector in 0..len {
                    found[(start + sector) as usize] = Some(content.advance(sector));
                }
            }
            prop_assert_eq!(&found, &model);
            let mut part: Vec<Option<RunContent>> = vec![None; 400];
            for (start, len, content) in extents.within(from, from + len) {
                for sector in 0..len {
                    part[(start + sector) as usize] = Some(content.advance(sector));
                }
            }
            for sector in 0..400 {
                let inside = (from..from + len).contains(&sector);
                let expected = if inside { model[sector as usize] } else { None };
                prop_assert_eq!(part[sector as usize], expected);
            }
        }
    }
}
