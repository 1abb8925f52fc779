//! Marks of the used bytes of a window.
//!
//! A reader that begins at a checkpoint needs the 32 KiB before it, but the output after it refers to few of
//! those bytes: 3.4 of 32 KiB on average. The scan logs the matches near a target. Once 32 KiB have been
//! decoded past a candidate, the log shows exactly which bytes of its window they refer to. Later output
//! cannot refer to the window: the distance is too great. Matches that start behind the candidate and refer
//! to bytes behind it need no mark, because those bytes are rebuilt from marked ones.

/// Distance in bytes that a match can reach back (RFC 1951, 2).
pub const WINDOW: usize = 32768;

/// One bit for each byte of a window.
pub type Marks = [u64; WINDOW / 64];

/// Matches in output order. Each entry holds the low 32 bits of the output position, then the distance, then
/// the length.
#[derive(Default)]
pub struct MatchLog {
    entries: Vec<u64>,
    len: usize,
}

impl MatchLog {
    /// A match as an entry of the log.
    #[inline(always)]
    pub fn entry(at: u32, distance: u32, len: u32) -> u64 {
        u64::from(at) << 32 | u64::from(distance << 16 | len)
    }

    /// Room for `more` entries; [`note`](Self::note) then sets the number of those written.
    pub fn room(&mut self, more: usize) -> &mut [u64] {
        let need = self.len + more;
        if self.entries.len() < need {
            self.entries.resize(need.next_power_of_two(), 0);
        }
        &mut self.entries[self.len..need]
    }

    /// Adds the first `written` entries of the room to the log.
    pub fn note(&mut self, written: usize) {
        self.len = (self.len + written).min(self.entries.len());
    }

    /// Logs a match.
    pub fn push(&mut self, at: u32, distance: u32, len: u32) {
        self.room(1)[0] = Self::entry(at, distance, len);
        self.note(1);
    }

    /// Forgets all matches.
    pub fn clear(&mut self) {
        self.len = 0;
    }

    /// Index of the first match at output position `at` or later.
    fn first_from(&self, at: u64) -> usize {
        let Some(&first) = self.entries[..self.len].first() else { return 0 };
        // Positions are compared by their distance from the first one: the log never spans 4 GiB.
        let origin = (first >> 32) as u32;
        let wanted = (at as u32).wrapping_sub(origin);
        if wanted > u32::MAX / 2 {
            return 0;
        }
        self.entries[..self.len]
            .partition_point(|&entry| ((entry >> 32) as u32).wrapping_sub(origin) < wanted)
    }

    /// Removes matches before output position `at`.
    pub fn forget_before(&mut self, at: u64) {
        let first = self.first_from(at);
        self.entries.copy_within(first..self.len, 0);
        self.len -= first;
    }

    /// The marks of the window bytes before output position `at` that the next 32 KiB refer to, and their
    /// number; `None` as soon as there are `bound` or more.
    pub fn used(&self, at: u64, bound: u32) -> Option<(Box<Marks>, u32)> {
        let mut marks: Box<Marks> = Box::new([0; WINDOW / 64]);
        let low = at as u32;
        let (first, end) = (self.first_from(at), self.first_from(at + WINDOW as u64));
        for batch in self.entries[first..end].chunks(512) {
            for &entry in batch {
                let ahead = ((entry >> 32) as u32).wrapping_sub(low) as usize;
                let distance = (entry >> 16) as usize & 0xffff;
                if distance > ahead {
                    let len = (entry & 0xffff) as usize;
                    mark(&mut marks, WINDOW + ahead - distance, len.min(distance - ahead));
                }
            }
            if count(&marks) >= bound {
                return None;
            }
        }
        let used = count(&marks);
        (used < bound).then_some((marks, used))
    }
}

fn count(marks: &Marks) -> u32 {
    marks.iter().map(|word| word.count_ones()).sum()
}

#[inline(always)]
fn mark(marks: &mut Marks, start: usize, len: usize) {
    let (mut word, mut at, mut left) = (start / 64, start % 64, len);
    while left > 0 {
        let here = left.min(64 - at);
        if let Some(bits) = marks.get_mut(word) {
            *bits |= (u64::MAX >> (64 - here)) << at;
        }
        word += 1;
        at = 0;
        left -= here;
    }
}

/// `window` with every unmarked byte set to zero. A window shorter than 32 KiB is the end of one, and is
/// padded in front.
pub fn masked(window: &[u8], marks: &Marks) -> Box<[u8; WINDOW]> {
    let mut sparse = Box::new([0; WINDOW]);
    let pad = WINDOW.saturating_sub(window.len());
    sparse[pad..].copy_from_slice(&window[window.len().saturating_sub(WINDOW)..]);
    for (bytes, &bits) in sparse.chunks_exact_mut(64).zip(marks) {
        match bits {
            0 => bytes.fill(0),
            u64::MAX => {}
            _ => {
                for (at, byte) in bytes.iter_mut().enumerate() {
                    *byte &= ((bits >> at & 1) as u8).wrapping_neg();
                }
            }
        }
    }
    sparse
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_bytes_before_the_point_that_are_copied_from_after_it_count() {
        let mut log = MatchLog::default();
        let at = u64::from(u32::MAX) - 5; // positions wrap in the log
        log.push((at - 10) as u32, 100, 50); // before the point
        log.push(at as u32, 10, 4); // window[-10..-6]
        log.push((at + 4) as u32, 6, 100); // window[-2..], then bytes of its own copy
        log.push((at + 104) as u32, 104, 20); // own bytes
        log.push((at + 32767) as u32, 32768, 258); // the last byte, then its own
        log.push((at + 32768) as u32, 32768, 258); // its own bytes only
        let (marks, used) = log.used(at, u32::MAX).unwrap();
        assert_eq!(used, 4 + 2);
        let marked: Vec<usize> =
            (0..WINDOW).filter(|&i| marks[i / 64] >> (i % 64) & 1 == 1).collect();
        assert_eq!(
            marked,
            [WINDOW - 10, WINDOW - 9, WINDOW - 8, WINDOW - 7, WINDOW - 2, WINDOW - 1]
        );
        assert!(log.used(at, 6).is_none());
    }
}
