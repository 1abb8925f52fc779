//! Sequential reads.
//!
//! A touch that continues where one of the last few streams ended belongs to that stream. A stream starts
//! without read-ahead: from its fourth step on it asks for as many chunks ahead as it has read already,
//! doubling up to a limit that the caller derives from the line ([`Streams::touched`]). Fewer steps predict
//! little: of the places where a start touches three neighbours, half end there.
//!
//! Pure: no clock, no thread, no I/O.

use std::ops::Range;

/// Number of streams watched at once in a blob: a process that starts reads a few libraries in turns.
const STREAMS: usize = 8;

/// Number of steps after which a stream gets read-ahead.
const BELIEVED: u32 = 4;

/// A run of chunks that is being read.
#[derive(Clone, Copy, Debug)]
struct ReadStream {
    /// The last touched chunk.
    at: u32,
    /// Number of chunks touched so far.
    touched: u32,
    /// One past the last chunk that was requested ahead.
    asked: u32,
}

/// The streams of a blob, the last touched one at the end.
#[derive(Debug, Default)]
pub(super) struct Streams {
    streams: Vec<ReadStream>,
}

impl Streams {
    /// Records a touch of a chunk that differs from the last one touched, and returns the chunks to fetch
    /// ahead, none for most touches. Never more than `most`, and none past `count`, the blob's number of
    /// chunks.
    pub(super) fn touched(&mut self, chunk: u32, most: u32, count: u32) -> Range<u32> {
        let near = |stream: &ReadStream| {
            chunk >= stream.at && chunk - stream.at <= 1
                // A chunk that was fetched ahead may be reached by a longer step.
                || (stream.at..stream.asked).contains(&chunk)
        };
        let Some(place) = self.streams.iter().rposition(near) else {
            if self.streams.len() == STREAMS {
                self.streams.remove(0);
            }
            self.streams.push(ReadStream { at: chunk, touched: 1, asked: chunk + 1 });
            return 0..0;
        };
        let mut stream = self.streams.remove(place);
        if chunk > stream.at {
            stream.touched += 1;
            stream.at = chunk;
        }
        // As far ahead as was read, so that wasted chunks are never more than used ones.
        let window = if stream.touched < BELIEVED {
            0
        } else {
            stream.touched.next_power_of_two().min(most)
        };
        let start = stream.asked.max(chunk + 1);
        let end = (chunk + 1).saturating_add(window).min(count);
        // Half a window at a time: neighbours are then fetched by one request.
        let due = stream.asked <= chunk + 1 + window / 2;
        let ahead = if due && start < end { start..end } else { 0..0 };
        stream.asked = stream.asked.max(chunk + 1).max(ahead.end);
        self.streams.push(stream);
        ahead
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn feed(touches: &[u32]) -> (Vec<u32>, usize) {
        let mut streams = Streams::default();
        let (mut ahead, mut requests) = (Vec::new(), 0);
        for &chunk in touches {
            let more = streams.touched(chunk, 16, 1000);
            requests += usize::from(!more.is_empty());
            ahead.extend(more);
        }
        (ahead, requests)
    }

    #[test]
    fn a_lone_touch_and_random_ones_fetch_nothing_ahead() {
        assert_eq!(feed(&[5]), (vec![], 0));
        assert_eq!(feed(&[5, 900, 30, 500, 77, 12, 650, 333, 801]), (vec![], 0));
        assert_eq!(feed(&[5, 4, 3, 2, 1]), (vec![], 0), "backwards is no stream");
    }

    #[test]
    fn a_sequence_is_fetched_ahead_in_doubling_windows_and_each_chunk_once() {
        let (ahead, requests) = feed(&(10..100).collect::<Vec<_>>());
        let unique: std::collections::BTreeSet<u32> = ahead.iter().copied().collect();
        assert_eq!(unique.len(), ahead.len(), "{ahead:?}");
        assert_eq!(*unique.first().unwrap(), 14);
        // Everything from there on, and at most a window too far.
        assert!((14..100).all(|chunk| unique.contains(&chunk)));
        assert!(*unique.last().unwrap() < 100 + 16);
        assert!(requests <= 90 / 4, "{requests} requests");
    }

    #[test]
    fn what_is_fetched_in_vain_is_no_more_than_what_was_read() {
        for len in 2..40 {
            let (ahead, _) = feed(&(100..100 + len).collect::<Vec<_>>());
            let vain = ahead.iter().filter(|&&chunk| chunk >= 100 + len).count() as u32;
            assert!(vain <= len.next_power_of_two().min(16), "{vain} of {len}");
        }
    }

    #[test]
    fn several_streams_are_followed_at_once() {
        let touches: Vec<u32> =
            (0..40).flat_map(|step| [100 + step, 300 + step, 700 + step]).collect();
        let (ahead, _) = feed(&touches);
        assert!(ahead.contains(&130) && ahead.contains(&330) && ahead.contains(&730));
        assert!(ahead.iter().all(|chunk| (100..160).contains(chunk)
            || (300..360).contains(chunk)
            || (700..760).contains(chunk)));
    }

    #[test]
    fn nothing_past_the_end_of_the_blob_is_asked_for() {
        let mut streams = Streams::default();
        let ahead: Vec<u32> = (0..20).flat_map(|chunk| streams.touched(chunk, 16, 20)).collect();
        assert!(ahead.iter().all(|&chunk| chunk < 20));
        assert!(streams.touched(u32::MAX - 1, 16, u32::MAX).is_empty());
    }
}
