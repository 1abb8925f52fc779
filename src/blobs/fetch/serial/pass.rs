//! The pass of one thread through one frame.

use std::collections::VecDeque;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::super::blob::{Blob, Key};
use super::super::inflate::{DecodeJob, Input};
use super::super::queue::WantedChunk;
use super::super::{Claim, FetchShared, failure};
use super::feed::Feed;
use super::{Orders, PARKED};
use crate::quiet::Allowance;
use crate::tier::store::ChunkPayload;
use crate::tier::{QUEUE, TierBlob, TierKind};
use source::Class;
use source::chunk::{ChunkBytes, ChunkError, EncodedChunk, Room, SerialDecoder};

/// Limit on the bytes that wait for the disk: the rest of the tier's queue is for other blobs.
const MOST_WAITING: u64 = QUEUE / 4 * 3;

/// Time that a waiter for a later chunk waits for the disk, at each chunk.
const DISK_PATIENCE: Duration = Duration::from_millis(100);

/// Time that a chunk which was given to the tier may take to get there.
const LONGEST_WRITE: Duration = Duration::from_secs(10);

/// Bytes of chunks without a waiter that are kept when no tier keeps them: requests for a chunk and the one
/// after it may arrive in the other order.
const MOST_PASSED: usize = 8 << 20;

/// Interval at which a frame of the fill that is held back looks for new orders; a waiter ends it at once.
const HELD_BACK: Duration = Duration::from_millis(100);

/// Number of chunks that are still decoded for waiters ahead when a passed chunk has a waiter.
const PATIENCE: u32 = 64;

/// Decodes a frame while chunks of it are wanted.
pub(super) fn run(shared: &Arc<FetchShared>, blob: &Arc<Blob>, chunks: Range<u32>) {
    let first = blob.key(chunks.start);
    let mut pass = Pass {
        shared,
        blob,
        first,
        at: chunks.start,
        chunks,
        decoder: None,
        window: 0,
        feed: Feed::default(),
        passed: VecDeque::new(),
        patience: PATIENCE,
    };
    // A panic is a bug of the decoder; the readers get an error and the thread continues.
    let result = catch_unwind(AssertUnwindSafe(|| {
        while pass.step()? {}
        Ok(())
    }));
    let result = result.unwrap_or_else(|_| Err(failure(blob, "The decoder of a frame panicked")));
    if let Err(error) = result {
        let wanted = shared.serials.give_up(first);
        if wanted.is_empty() {
            tracing::debug!(%error, "A frame is not decoded to its end");
        }
        for wanted in wanted {
            shared.fail(&wanted, error.clone());
        }
    }
}

/// Reasons to decode a chunk.
enum DecodeReason {
    /// It has a waiter.
    Reader,
    /// For the background fill.
    Fill,
    /// It fits into free memory.
    Spare,
    /// It precedes wanted chunks.
    Way,
}

struct Pass<'a> {
    shared: &'a Arc<FetchShared>,
    blob: &'a Arc<Blob>,
    /// Key of the frame.
    first: Key,
    chunks: Range<u32>,
    /// The next chunk to decode.
    at: u32,
    /// The decoder; `None` before the first chunk.
    decoder: Option<Box<dyn SerialDecoder>>,
    /// Bytes of memory reserved for it.
    window: u64,
    feed: Feed,
    /// Chunks that were recently given to the decoded tier, and may not be there yet; without one, the last
    /// passed chunks.
    passed: VecDeque<(u32, Instant, Arc<ChunkBytes>)>,
    /// See [`PATIENCE`].
    patience: u32,
}

impl Pass<'_> {
    /// Decodes one chunk, or waits. False when the frame was given up.
    fn step(&mut self) -> Result<bool, Arc<ChunkError>> {
        let orders = self.shared.serials.orders(self.first, self.at);
        if orders.ending {
            return Ok(false);
        }
        let lost = orders.behind.iter().filter(|wanted| !self.serve_passed(wanted)).count();
        let missed = lost > 0;
        if missed {
            let ahead = orders.last.is_some() && orders.class == Class::Demand;
            if !ahead || self.patience == 0 {
                self.begin_again();
                return Ok(true);
            }
            self.patience -= 1;
        }
        let to_end = !missed && !orders.contested && self.keeps_all();
        let goal = orders.last.max(if to_end { self.last_not_kept() } else { None });
        match goal {
            Some(goal) if self.at < self.chunks.end => {
                // With new orders after a wait: they may have a waiter.
                if self.may_go_on(&orders) {
                    self.produce(goal, &orders)?;
                }
                Ok(true)
            }
            _ => Ok(self.park()),
        }
    }

    /// Returns to the first chunk.
    fn begin_again(&mut self) {
        self.at = self.chunks.start;
        self.drop_decoder();
        self.feed = Feed::default();
        self.patience = PATIENCE;
    }

    fn drop_decoder(&mut self) {
        self.decoder = None;
        self.shared.serials.release(self.first.way, std::mem::take(&mut self.window));
    }

    /// Creates the decoder, when there is memory for it.
    fn begin(&mut self, first: &EncodedChunk) -> Result<(), Arc<ChunkError>> {
        let (shared, source) = (self.shared, self.blob.source());
        let serial = source.serial().ok_or_else(|| failure(self.blob, "It has no long frame"))?;
        let window = serial.window(first.bytes());
        if !shared.serials.reserve(self.first.way, window) {
            return Err(super::super::ended(self.blob));
        }
        self.window = window;
        self.decoder = Some(serial.begin_frame(self.chunks.start).map_err(Arc::new)?);
        shared.counters.frames.add(1);
        Ok(())
    }

    /// The tier for decoded chunks, if this frame's chunks go there.
    fn decoded_tier(&self) -> Option<&TierBlob> {
        let target = self.blob.stored().target();
        target.and_then(|(kind, stored)| (kind == TierKind::Decoded).then_some(stored))
    }

    /// True if the tier takes the whole frame, so that it need be decoded only once.
    fn keeps_all(&self) -> bool {
        let source = self.blob.source();
        let end =
            source.span(self.chunks.end - 1).map_or(0, |last| last.start + u64::from(last.len));
        let len = end - source.span(self.chunks.start).map_or(end, |first| first.start);
        self.decoded_tier().is_some_and(|stored| !stored.is_full() && stored.capacity() > len)
    }

    /// The last chunk ahead that the tier does not have yet.
    fn last_not_kept(&self) -> Option<u32> {
        let stored = self.decoded_tier()?;
        (self.at..self.chunks.end).rev().find(|&chunk| !stored.has(chunk))
    }

    /// Delivers a passed chunk, from the tier or on its way there. False when it is lost and the frame has to
    /// be begun again for it, which is not done for a guess.
    fn serve_passed(&self, wanted: &WantedChunk) -> bool {
        let (shared, chunk) = (self.shared, wanted.chunk);
        let passed = self.passed.iter().find(|(number, ..)| *number == chunk);
        if let Some((_, _, bytes)) = passed {
            if let Some(wanted) = shared.serials.remove(self.first, chunk)
                && !self.is_for_nobody(&wanted)
            {
                shared.deliver(wanted.key(), Ok(bytes.clone()));
            }
            return true;
        }
        if !self.blob.stored().decoded.as_ref().is_some_and(|stored| stored.has(chunk)) {
            return wanted.class == Class::Prefetch && self.drop_guess(chunk);
        }
        if let Some(wanted) = shared.serials.remove(self.first, chunk)
            && !self.is_for_nobody(&wanted)
        {
            // A decode thread reads it; if it turns out to be damaged there, it comes back and is lost.
            let WantedChunk { blob, chunk, class, tries, flow } = wanted;
            let class = class.min(Class::Prefetch);
            let job = DecodeJob { blob, chunk, class, tries, flow, input: Input::Near };
            if let Err(job) = shared.workers.push(job) {
                let wanted = job.wanted();
                shared.fail(&wanted, super::super::ended(&wanted.blob));
            }
        }
        true
    }

    /// Takes a chunk that was wanted ahead of time off the list; not if it has a waiter by now.
    fn drop_guess(&self, chunk: u32) -> bool {
        let serials = &self.shared.serials;
        // Off the list first: once the load has ended, the next reader puts it there again.
        let Some(wanted) = serials.remove(self.first, chunk) else { return true };
        if self.shared.abandon(wanted.key()) {
            return true;
        }
        let wanted = WantedChunk { class: Class::Demand, ..wanted };
        if let Some(wanted) = serials.put_back(self.first, wanted) {
            self.shared.fail(&wanted, super::super::ended(self.blob));
        }
        false
    }

    /// Ends the background fill's load of a chunk that the tier has, unless it has a waiter by now.
    fn is_for_nobody(&self, wanted: &WantedChunk) -> bool {
        wanted.class == Class::Fill && self.shared.abandon(wanted.key())
    }

    /// Waits while there is demand, for a moment, if no chunk of this frame has a waiter. False if there still is.
    fn may_go_on(&self, orders: &Orders) -> bool {
        let (serials, demand) = (&self.shared.serials, self.shared.pace.demand());
        let held_back = || {
            let is_fill = orders.class == Class::Fill && !serials.is_needed(self.first);
            is_fill && demand.allowance() == Allowance::Nothing
        };
        if held_back() {
            drop(serials.wait(serials.lock(), demand.left().min(HELD_BACK)));
        }
        !held_back()
    }

    /// Decodes the next chunk, and gives it to its waiters and its tier.
    fn produce(&mut self, goal: u32, orders: &Orders) -> Result<(), Arc<ChunkError>> {
        let (shared, blob, chunk) = (self.shared, self.blob, self.at);
        let encoded = self.feed.next(shared, blob, chunk, goal, orders.class)?;
        if self.decoder.is_none() {
            self.begin(&encoded)?;
        }
        let wanted = shared.serials.remove(self.first, chunk);
        let (purpose, room) = self.purpose(wanted.as_ref());
        let bytes = match self.decode(&encoded, room) {
            Ok(bytes) => Arc::new(bytes),
            Err(error) => {
                match wanted {
                    Some(wanted) => shared.fail(&wanted, error.clone()),
                    None if matches!(purpose, DecodeReason::Spare) => {
                        shared.deliver(blob.key(chunk), Err(error.clone()));
                    }
                    None => {}
                }
                return Err(error);
            }
        };
        self.at += 1;
        let key = blob.key(chunk);
        match purpose {
            DecodeReason::Reader | DecodeReason::Spare => shared.deliver(key, Ok(bytes.clone())),
            DecodeReason::Fill | DecodeReason::Way => {}
        }
        let len = encoded.bytes().len();
        if let DecodeReason::Way = purpose
            && self.decoded_tier().is_none()
        {
            self.passed.push_back((chunk, Instant::now(), bytes.clone()));
            self.forget_passed();
        }
        self.keep(chunk, encoded, &bytes, wanted.is_some());
        if let DecodeReason::Fill = purpose {
            if !shared.abandon(key) {
                shared.deliver(key, Ok(bytes.clone()));
            }
            shared.filled(len);
        }
        // A waiter may have come during the decoding.
        if shared.serials.remove(self.first, chunk).is_some() {
            shared.deliver(key, Ok(bytes));
        }
        if orders.class < Class::Fill {
            shared.pace.demand().note();
        }
        Ok(())
    }

    /// The reason to decode the next chunk, and the memory for it.
    fn purpose(&self, wanted: Option<&WantedChunk>) -> (DecodeReason, Box<dyn Room>) {
        let (shared, blob, chunk) = (self.shared, self.blob, self.at);
        let len = blob.source().room(chunk);
        let heap = || -> Box<dyn Room> { Box::new(vec![0; len]) };
        let key = blob.key(chunk);
        match wanted {
            Some(one) if one.class < Class::Fill || shared.delivery.is_awaited(key) => {
                let room = shared.delivery.room(len, one.flow);
                (DecodeReason::Reader, room.unwrap_or_else(heap))
            }
            Some(_) if blob.stored().target().is_some() => (DecodeReason::Fill, heap()),
            Some(_) => match shared.delivery.spare_room(len) {
                Some(room) => (DecodeReason::Reader, room),
                None => (DecodeReason::Fill, heap()),
            },
            None if self.decoded_tier().is_some() => (DecodeReason::Way, heap()),
            None => match shared.delivery.spare_room(len) {
                Some(room) if matches!(shared.delivery.claim(blob, chunk), Claim::Claimed) => {
                    (DecodeReason::Spare, room)
                }
                _ => (DecodeReason::Way, heap()),
            },
        }
    }

    fn decode(
        &mut self,
        encoded: &EncodedChunk,
        mut room: Box<dyn Room>,
    ) -> Result<ChunkBytes, Arc<ChunkError>> {
        let begun = Instant::now();
        let len = room.bytes().len().min(self.blob.source().room(self.at));
        let Some(decoder) = &mut self.decoder else {
            return Err(failure(self.blob, "The frame has no decoder"));
        };
        decoder.decode_next(encoded, &mut room.bytes_mut()[..len]).map_err(Arc::new)?;
        self.shared.counters.inflated(encoded.bytes().len(), len, begun);
        Ok(ChunkBytes::new(room, 0..len))
    }

    /// Offers a chunk to the tier that keeps it.
    fn keep(&mut self, chunk: u32, encoded: EncodedChunk, bytes: &Arc<ChunkBytes>, wanted: bool) {
        let source = self.blob.source();
        match self.blob.stored().target() {
            // A tier that cannot hold the whole frame keeps chunks with waiters, not those on the way.
            Some((TierKind::Decoded, stored)) if wanted || self.keeps_all() => {
                self.wait_for_disk(stored, bytes.len() as u64);
                let Some(span) = source.span(chunk) else { return };
                if stored.offer(chunk, span.start, ChunkPayload::Shared(bytes.clone()))
                    && !stored.has(chunk)
                {
                    self.passed.push_back((chunk, Instant::now(), bytes.clone()));
                }
                self.forget_passed();
            }
            Some((TierKind::Encoded, stored)) if !stored.has(chunk) => {
                if let Ok(place) = source.encoded(chunk) {
                    let (buffer, data) = encoded.into_parts();
                    stored.offer(chunk, place.range.start, ChunkPayload::Owned(buffer, data));
                }
            }
            _ => {}
        }
    }

    /// Waits for the disk; not for long while a later chunk has a waiter.
    fn wait_for_disk(&self, stored: &TierBlob, len: u64) {
        let begun = Instant::now();
        let serials = &self.shared.serials;
        while stored.waiting() + len > MOST_WAITING && !stored.is_full() {
            if begun.elapsed() > DISK_PATIENCE && serials.is_urgent(self.first) {
                return;
            }
            drop(serials.wait(serials.lock(), Duration::from_millis(5)));
        }
    }

    /// Forgets passed chunks that have reached the tier, or never will; without a tier, all but the last few.
    fn forget_passed(&mut self) {
        if let Some(stored) = &self.blob.stored().decoded {
            self.passed.retain(|(chunk, when, _)| {
                let waits = stored.is_offered(*chunk) || when.elapsed() < LONGEST_WRITE;
                waits && !stored.has(*chunk)
            });
            return;
        }
        let mut bytes: usize = self.passed.iter().map(|(_, _, bytes)| bytes.len()).sum();
        while bytes > MOST_PASSED
            && let Some((_, _, first)) = self.passed.pop_front()
        {
            bytes -= first.len();
        }
    }

    /// Waits for a reader that continues. False when none came, and the frame was given up.
    fn park(&mut self) -> bool {
        let at_end = self.at == self.chunks.end;
        if at_end {
            self.drop_decoder();
        }
        let serials = &self.shared.serials;
        let first = self.first;
        serials.park(first, PARKED, &mut || {
            self.forget_passed();
            at_end && (self.passed.is_empty() || self.decoded_tier().is_none())
        })
    }
}

impl Drop for Pass<'_> {
    fn drop(&mut self) {
        self.drop_decoder();
    }
}
