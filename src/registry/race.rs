//! One read of a blob: usually one request, sometimes two that race.
//!
//! Most requests for the same kind of object take about the same time, and a few take many times
//! longer: a server that collects garbage, a lost packet, a disk that retries. A process that
//! starts makes hundreds of reads one after the other, so these few decide its total time. When the
//! first byte or the next byte of a demand read is later than its host's patience
//! ([`host`](super::host)), a second request is made for the rest, at the next source if there is
//! one and else over another connection. Both answers are read, each byte is taken from the answer
//! that brings it first, and the first answer to reach the end completes the read; the other
//! connection is closed.
//!
//! No process waits for a prefetch, so it never gets a second request. When a source fails, the
//! next one is asked at once; the read fails only when all have failed.
//!
//! A frame is accepted when another frame or a proper end follows it: an answer that continues past
//! its end is rejected.

use std::future::poll_fn;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use bytes::{Buf as _, Bytes};

use super::blob::{Deliveries, RemoteStats};
use super::error::RegistryError;
use super::host::Network;
use super::wait::{block_on, block_until};
use super::way::{BlobAddress, RangeBody, ToldError, Way};
use source::{Class, Run};

/// A read in progress, over all its tries.
pub(super) struct RacedRead<'a> {
    pub(super) blob: &'a BlobAddress,
    pub(super) network: &'a Network,
    pub(super) stats: &'a RemoteStats,
    pub(super) deliveries: &'a Deliveries,
    /// The next byte that is wanted.
    pub(super) at: u64,
    /// One past the last byte.
    pub(super) end: u64,
    pub(super) class: Class,
    pub(super) run: &'a mut dyn Run,
}

/// One request of a race.
struct Lane<'a> {
    number: usize,
    way: &'a Way,
    is_second: bool,
    begun: Instant,
    from: u64,
    /// Time of the head, and of the last frame.
    head: Option<Instant>,
    heard: Option<Instant>,
    /// Position in the blob after the last byte that was handed out.
    at: u64,
    held: Option<Bytes>,
    stage: Stage<'a>,
}

enum Stage<'a> {
    Opening(Pin<Box<dyn Future<Output = Result<RangeBody, RegistryError>> + 'a>>),
    Flowing(RangeBody),
}

enum RaceEvent {
    Head,
    /// Bytes that can be taken.
    Bytes(Bytes),
    End,
    Broken(RegistryError),
}

impl Lane<'_> {
    fn poll(&mut self, context: &mut Context<'_>) -> Poll<RaceEvent> {
        loop {
            match &mut self.stage {
                Stage::Opening(opening) => {
                    let opened = ready!(opening.as_mut().poll(context));
                    return Poll::Ready(match opened {
                        Err(error) => RaceEvent::Broken(error),
                        Ok(body) => {
                            self.stage = Stage::Flowing(body);
                            RaceEvent::Head
                        }
                    });
                }
                Stage::Flowing(body) => match ready!(body.poll_frame(context)) {
                    Ok(Some(frame)) => {
                        self.heard = Some(Instant::now());
                        if let Some(bytes) = self.held.replace(frame) {
                            return Poll::Ready(RaceEvent::Bytes(bytes));
                        }
                    }
                    Ok(None) => return Poll::Ready(RaceEvent::End),
                    Err(error) => return Poll::Ready(RaceEvent::Broken(error)),
                },
            }
        }
    }

    fn is_by_peer(&self) -> bool {
        matches!(&self.stage, Stage::Flowing(body) if body.by_peer)
    }

    /// Time at which a second request is due.
    fn patience_ends(&self, end: u64, least: Duration) -> Instant {
        let host = &self.way.place.state;
        let patience = host.patience().max(least);
        let Some(heard) = self.heard.or(self.head) else { return self.begun + patience };
        let silent = heard + patience;
        let whole = host.patience_with_body(end - self.at.min(end));
        whole.map_or(silent, |whole| silent.min(self.begun + patience + whole))
    }
}

impl<'a> RacedRead<'a> {
    /// Reads on from `at`, asking each source once; afterwards `at` is the position reached.
    pub(super) fn once(&mut self, deadline: Instant) -> Result<(), RegistryError> {
        let order = self.blob.order();
        let mut next = order.iter().copied().peekable();
        let mut lanes = Vec::with_capacity(2);
        let mut told = ToldError::default();
        let mut patient = self.hedges_after();
        self.network.earn_hedge();
        lanes.extend(next.next().map(|number| self.lane(number, deadline, true)));
        while !lanes.is_empty() {
            let due = patient
                .filter(|_| lanes.len() == 1)
                .map(|least| lanes[0].patience_ends(self.end, least));
            let event = poll_fn(|context| {
                for (number, lane) in lanes.iter_mut().enumerate() {
                    if let Poll::Ready(event) = lane.poll(context) {
                        return Poll::Ready((number, event));
                    }
                }
                Poll::Pending
            });
            let happened = match due {
                None => Some(block_on(event)),
                Some(due) => block_until(event, Some(due)),
            };
            match happened {
                None => {
                    patient = None;
                    if self.network.take_hedge() {
                        // A URL of an image is asked for what the others do not have, not for what they are late with.
                        let other = next.next_if(|way| !self.blob.ways[*way].place.is_elsewhere());
                        let second = self.second(&lanes[0], other, deadline);
                        lanes.push(second);
                    }
                }
                Some((number, RaceEvent::Head)) => self.head(&mut lanes[number]),
                Some((number, RaceEvent::Bytes(bytes))) => self.take(&mut lanes[number], bytes),
                Some((number, RaceEvent::End)) => {
                    let mut lane = lanes.swap_remove(number);
                    if let Some(bytes) = lane.held.take() {
                        self.take(&mut lane, bytes);
                    }
                    self.whole(&lane);
                    return Ok(());
                }
                Some((number, RaceEvent::Broken(error))) => {
                    let mut lane = lanes.swap_remove(number);
                    let by_peer = self.broken(&mut lane, &error);
                    told.add(error, lane.way);
                    if lanes.is_empty() {
                        // The rest of a read that a peer broke off is requested from the registry
                        // or mirror directly.
                        let again = by_peer.then_some(lane.number).or_else(|| next.next());
                        lanes.extend(again.map(|number| self.lane(number, deadline, !by_peer)));
                    }
                }
            }
        }
        Err(told.take())
    }

    fn hedges_after(&self) -> Option<Duration> {
        self.network.hedges_after().filter(|_| self.class == Class::Demand)
    }

    fn lane(&self, number: usize, deadline: Instant, by_peer: bool) -> Lane<'a> {
        let way = &self.blob.ways[number];
        self.stats.requests.add(1);
        way.place.state.stats().requests.add(1);
        let opening = way.open(self.at..self.end, Some(deadline), by_peer);
        Lane {
            number,
            way,
            is_second: false,
            begun: Instant::now(),
            from: self.at,
            head: None,
            heard: None,
            at: self.at,
            held: None,
            stage: Stage::Opening(Box::pin(opening)),
        }
    }

    /// Starts the second request for a read that `first` is late with. A peer is not asked again.
    fn second(&self, first: &Lane<'_>, next: Option<usize>, deadline: Instant) -> Lane<'a> {
        tracing::debug!(host = %first.way.place.host, at = self.at, "registry: asking a second time");
        self.stats.hedges.add(1);
        first.way.place.state.stats().hedges.add(1);
        Lane { is_second: true, ..self.lane(next.unwrap_or(first.number), deadline, false) }
    }

    fn head(&self, lane: &mut Lane<'_>) {
        let now = Instant::now();
        lane.head = Some(now);
        if !lane.is_by_peer() {
            lane.way.place.state.heard_after(now - lane.begun);
        }
    }

    /// Takes the bytes that no other request has brought yet.
    fn take(&mut self, lane: &mut Lane<'_>, mut bytes: Bytes) {
        let arrived = bytes.len() as u64;
        self.stats.bytes.add(arrived);
        let known = (self.at - lane.at).min(arrived);
        bytes.advance(usize::try_from(known).unwrap_or(bytes.len()));
        lane.at += arrived;
        if let Stage::Flowing(body) = &lane.stage {
            body.source.stats().bytes.add(arrived);
        }
        if !bytes.is_empty() {
            let range = self.at..lane.at;
            self.deliveries.add(range, lane.number, lane.is_by_peer());
            self.run.put(&bytes);
            self.at = lane.at;
        }
    }

    fn whole(&self, lane: &Lane<'_>) {
        if let Stage::Flowing(body) = &lane.stage {
            body.source.succeeded();
        }
        if lane.is_second {
            self.stats.hedges_won.add(1);
            lane.way.place.state.stats().hedges_won.add(1);
        } else if let Some(head) = lane.head
            && !lane.is_by_peer()
        {
            lane.way.place.state.brought(lane.at - lane.from, head.elapsed());
        }
    }

    /// Keeps the accepted part of a broken answer; returns true if a peer sent it.
    fn broken(&mut self, lane: &mut Lane<'_>, error: &RegistryError) -> bool {
        let Stage::Flowing(body) = &lane.stage else {
            lane.way.failed(error);
            return false;
        };
        let (by_peer, source, left) = (body.by_peer, body.source.clone(), body.left());
        if let Some(bytes) = lane.held.take().filter(|_| left > 0) {
            self.take(lane, bytes);
        }
        if by_peer {
            source.failed(None);
        } else {
            lane.way.failed(error);
        }
        by_peer
    }
}
