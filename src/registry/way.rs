//! Sources of a blob: the registry, a mirror of it, and a peer for each, when there is one.
//!
//! When a registry redirects, the final URL is kept ([`redirect::lifetime`]) and the next reads go
//! directly there, without `Authorization`. When that URL is refused (401, 403, 404, 410) it is
//! dropped and the registry is asked again within the same try.
//!
//! Mirrors come before the registry, in the order of the configuration. A mirror that failed
//! recently is asked after the others; one that does not have this blob, or sent wrong bytes of it,
//! is asked last for a while. All sources together are one try: there is a pause only when the last
//! one has failed.
//!
//! The `urls` of a layer's descriptor come last. An image names them, so they are asked only for bytes that a digest
//! covers, without any credential, and no farther than a redirect of the registry may lead ([`reach`](super::reach)).
//! Layers that must not be distributed are in no registry but only there.
//!
//! A peer-to-peer proxy is given the *actual* URL, appended to its own (spec runtime 6), so that
//! peers name shared bytes by their origin. The actual URL is learnt by one direct request. Each
//! request decides again about the peer: if the peer does not answer at once and correctly, the
//! bytes are requested directly.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::Bytes;
use hyper::header::{CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_RANGE, HeaderValue, RANGE};
use hyper::{HeaderMap, Method, Uri};
use parking_lot::Mutex;

use super::client::{Call, Landed, P2p, PlaceRole, RepositoryPlace, refusal, unix_now};
use super::error::RegistryError;
use super::host::Host;
use super::reach::Reach;
use super::redirect;
use super::transport::{ReplyBody, TransportError};
use super::wait::block_on;
use formats::oci::Digest;

/// Time that a mirror without this blob is asked last; after that it may have the blob.
const MISSING: Duration = Duration::from_secs(300);

/// Time that a source which sent wrong bytes of a blob is asked last for it: the copy itself may be
/// damaged.
const LIED: Duration = Duration::from_secs(600);

/// Most URLs of one layer that are asked. Descriptors have one or two; each costs the memory of a source.
const MOST_URLS: usize = 4;

/// The places of a blob that the user and the operator named.
#[derive(Clone, Copy)]
pub(super) struct BlobPlaces<'a> {
    pub(super) registry: &'a Arc<RepositoryPlace>,
    pub(super) mirrors: &'a [Arc<RepositoryPlace>],
    pub(super) digest: &'a Digest,
}

/// What the reader of a blob checks its bytes against.
#[derive(Clone, Copy)]
pub(super) enum CoveredBy<'a> {
    Nothing,
    /// Each byte against a digest: it may come from anywhere, also from these URLs, which an image names.
    Digests {
        urls: &'a [String],
    },
}

/// A blob, and all its sources.
pub(super) struct BlobAddress {
    pub(super) ways: Vec<Way>,
    /// Place of the registry among them.
    registry: usize,
    pub(super) size: u64,
}

impl BlobAddress {
    /// Creates the address; `what` names the blob in messages.
    pub(super) fn new(
        BlobPlaces { registry, mirrors, digest }: BlobPlaces<'_>,
        size: u64,
        covered: CoveredBy<'_>,
        what: &str,
    ) -> Result<Self, RegistryError> {
        let (covered, urls) = match covered {
            CoveredBy::Nothing => (false, &[][..]),
            CoveredBy::Digests { urls } => (true, urls),
        };
        let way = |place: Arc<RepositoryPlace>, url| Way {
            url,
            place,
            size,
            covered,
            what: what.to_owned(),
            moved: Mutex::default(),
            at_home: AtomicBool::new(false),
            last_until: Mutex::default(),
            peer_lied: AtomicBool::new(false),
        };
        let mut ways = Vec::with_capacity(mirrors.len() + 1);
        for place in mirrors.iter().chain([registry]) {
            ways.push(way(place.clone(), place.url(&format!("blobs/{digest}"))?));
        }
        // Relative ones have no meaning in a manifest.
        let absolute = urls.iter().filter(|url| url.contains("://"));
        let named = absolute.filter_map(|url| redirect::resolve(&registry.origin, url));
        ways.extend(named.take(MOST_URLS).map(|url| way(Arc::new(registry.elsewhere(&url)), url)));
        Ok(Self { ways, registry: mirrors.len(), size })
    }

    /// The registry itself.
    pub(super) fn registry(&self) -> &Arc<RepositoryPlace> {
        &self.ways[self.registry].place
    }

    /// The order in which sources are asked: healthy ones first, each group in the order of the
    /// configuration.
    pub(super) fn order(&self) -> Vec<usize> {
        let mut order: Vec<usize> = (0..self.ways.len()).collect();
        order.sort_by_key(|way| !self.ways[*way].is_well());
        order
    }

    /// Requests `range` (not empty, inside the blob) from one source after the other, and checks
    /// the head of the answer.
    pub(super) fn open(
        &self,
        range: &Range<u64>,
        deadline: Option<Instant>,
    ) -> Result<RangeBody, RegistryError> {
        let mut told = ToldError::default();
        for number in self.order() {
            let way = &self.ways[number];
            match block_on(way.open(range.clone(), deadline, true)) {
                Ok(body) => return Ok(body),
                Err(error) => {
                    way.failed(&error);
                    told.add(error, way);
                }
            }
        }
        Err(told.take())
    }
}

/// The error to report of those of several sources: the registry's own; but of a blob that it has not, that of a
/// URL which should have had it.
#[derive(Default)]
pub(super) struct ToldError(Option<(u8, RegistryError)>);

impl ToldError {
    pub(super) fn add(&mut self, error: RegistryError, way: &Way) {
        let weight = match way.place.role {
            PlaceRole::Mirror => 0,
            PlaceRole::Registry if matches!(error, RegistryError::NotFound { .. }) => 1,
            PlaceRole::Elsewhere => 2,
            PlaceRole::Registry => 3,
        };
        if self.0.as_ref().is_none_or(|(told, _)| weight >= *told) {
            self.0 = Some((weight, error));
        }
    }

    pub(super) fn take(self) -> RegistryError {
        let none = || RegistryError::NotFound { what: "a blob".to_owned() };
        self.0.map_or_else(none, |(_, error)| error)
    }
}

/// One source of a blob.
pub(super) struct Way {
    pub(super) place: Arc<RepositoryPlace>,
    url: Uri,
    size: u64,
    /// Each byte is checked by its reader against a digest.
    covered: bool,
    what: String,
    moved: Mutex<Option<Moved>>,
    /// The place itself has the bytes: it was asked, and did not redirect.
    at_home: AtomicBool,
    /// Time until which this source is asked last.
    last_until: Mutex<Option<Instant>>,
    /// The peer has wrong bytes of this blob.
    peer_lied: AtomicBool,
}

#[derive(Clone)]
struct Moved {
    url: Uri,
    until: Instant,
}

impl Way {
    fn is_well(&self) -> bool {
        let last_until = *self.last_until.lock();
        self.place.state.is_healthy() && last_until.is_none_or(|until| until <= Instant::now())
    }

    fn put_last(&self, time: Duration) {
        let until = Instant::now() + time;
        *self.last_until.lock() = Some(until);
    }

    /// Records that the blob could not be read here.
    pub(super) fn failed(&self, error: &RegistryError) {
        let state = &self.place.state;
        match error {
            RegistryError::NotFound { .. }
            | RegistryError::OutOfReach { .. }
            | RegistryError::Denied { .. }
            | RegistryError::RangeIgnored { .. }
            | RegistryError::SizeMismatch { .. } => self.put_last(MISSING),
            RegistryError::RateLimited { retry_after, .. } => {
                state.stats().limited.add(1);
                state.failed(*retry_after);
            }
            _ => state.failed(None),
        }
        if self.place.is_mirror() {
            tracing::warn!(mirror = %self.place.host, %error, "registry: asking a mirror last for a while");
        }
    }

    /// Name of the host that sends the bytes: the target of the redirect, while that is valid.
    pub(super) fn sender(&self, by_peer: bool) -> String {
        if let Some(peer) = self.place.services.p2p.as_ref().filter(|_| by_peer) {
            return peer.host.name().to_owned();
        }
        let moved = self.moved_to().and_then(|moved| moved.url.host().map(str::to_owned));
        moved.unwrap_or_else(|| self.place.host.clone())
    }

    /// Records that bytes from this source were wrong.
    pub(super) fn lied(&self, by_peer: bool) {
        // Another URL may lead to another node.
        self.set_moved(None);
        if by_peer {
            self.peer_lied.store(true, Ordering::Relaxed);
        } else {
            self.place.state.lied();
            self.put_last(LIED);
        }
    }

    /// Requests `range` and checks the head of the answer; through the peer first, if that is
    /// wanted.
    pub(super) async fn open(
        &self,
        range: Range<u64>,
        deadline: Option<Instant>,
        by_peer: bool,
    ) -> Result<RangeBody, RegistryError> {
        let peer = self.place.services.p2p.as_ref().filter(|peer| {
            // The peer would ask any address.
            let may = by_peer && !self.place.is_elsewhere();
            may && peer.host.is_healthy() && !self.peer_lied.load(Ordering::Relaxed)
        });
        if let Some(peer) = peer {
            let url = match self.known_url() {
                Some(url) => url,
                None => {
                    self.open_straight(&(0..1), deadline).await?.discard().await;
                    self.known_url().unwrap_or_else(|| self.url.clone())
                }
            };
            match self.ask_peer(peer, &range, &url, deadline).await {
                Ok(body) => return Ok(body),
                Err(error) => {
                    tracing::warn!(peer = %peer.host.name(), %error, "registry: skipping a peer");
                    peer.host.failed(None);
                    self.set_moved(None); // or the URL has expired
                }
            }
        }
        self.open_straight(&range, deadline).await
    }

    async fn open_straight(
        &self,
        range: &Range<u64>,
        deadline: Option<Instant>,
    ) -> Result<RangeBody, RegistryError> {
        if let Some(moved) = self.moved_to() {
            let landed = self.ask(range, moved.url, deadline).await;
            match landed {
                // The URL expired before its time: the registry knows a new one.
                Ok(landed)
                    if matches!(landed.reply.status.as_u16(), 400 | 401 | 403 | 404 | 410) =>
                {
                    self.set_moved(None);
                    landed.reply.body.discard_async().await;
                }
                Ok(landed) => {
                    return self.check(range, landed).inspect_err(|_| self.set_moved(None));
                }
                Err(error) => {
                    self.set_moved(None);
                    return Err(error);
                }
            }
        }
        let landed = self.ask(range, self.url.clone(), deadline).await?;
        let moved = landed.away.then(|| landed.url.clone());
        let body = self.check(range, landed)?;
        self.at_home.store(moved.is_none(), Ordering::Relaxed);
        if let Some(url) = moved {
            let until = Instant::now() + redirect::lifetime(&url, unix_now());
            self.set_moved(Some(Moved { url, until }));
        }
        Ok(body)
    }

    /// Asks the peer once and accepts its answer when it is the range; every other result leads to
    /// a direct request.
    async fn ask_peer(
        &self,
        peer: &P2p,
        range: &Range<u64>,
        url: &Uri,
        deadline: Option<Instant>,
    ) -> Result<RangeBody, RegistryError> {
        let services = &self.place.services;
        let call = self.call(range, url.clone());
        let header = if self.place.is_home(url) {
            let token_deadline =
                deadline.unwrap_or_else(|| Instant::now() + services.retry.deadline);
            services.tokens.current(services, &self.place.scope(call.actions), token_deadline)?
        } else {
            None
        };
        peer.host.stats().requests.add(1);
        let wrapped = peer.wrap(url)?;
        let request = self.place.request(&call, &wrapped, header.as_ref())?;
        let sent = services.transport.send_async(request, Reach::Named, deadline).await;
        let reply = sent.map_err(|error| services.broken(&self.what, peer.host.name(), &error))?;
        let body = self.check(range, Landed { reply, url: wrapped, away: true })?;
        Ok(RangeBody { source: peer.host.clone(), by_peer: true, ..body })
    }

    fn known_url(&self) -> Option<Uri> {
        let here = || self.at_home.load(Ordering::Relaxed).then(|| self.url.clone());
        self.moved_to().map(|moved| moved.url).or_else(here)
    }

    fn moved_to(&self) -> Option<Moved> {
        let moved = self.moved.lock();
        moved.clone().filter(|moved| moved.until > Instant::now())
    }

    fn set_moved(&self, to: Option<Moved>) {
        *self.moved.lock() = to;
    }

    fn whole(&self, range: &Range<u64>) -> bool {
        range.start == 0 && range.end == self.size
    }

    fn call(&self, range: &Range<u64>, url: Uri) -> Call {
        let call =
            Call { verified: self.covered, ..Call::new(Method::GET, url, self.what.clone()) };
        let value = HeaderValue::try_from(format!("bytes={}-{}", range.start, range.end - 1));
        match value {
            Ok(value) if !self.whole(range) => call.header(RANGE, value),
            _ => call,
        }
    }

    async fn ask(
        &self,
        range: &Range<u64>,
        url: Uri,
        deadline: Option<Instant>,
    ) -> Result<Landed, RegistryError> {
        self.place.exchange_async(&self.call(range, url), deadline).await
    }

    fn check(&self, range: &Range<u64>, landed: Landed) -> Result<RangeBody, RegistryError> {
        let host = landed.host().to_owned();
        let protocol = |rule: String| RegistryError::Protocol {
            what: self.what.clone(),
            host: host.clone(),
            rule,
        };
        let headers = &landed.reply.headers;
        let length = range.end - range.start;
        match landed.reply.status.as_u16() {
            206 => {
                let text = headers
                    .get(CONTENT_RANGE)
                    .and_then(|value| value.to_str().ok())
                    .unwrap_or_default();
                let (first, last, total) = parse_content_range(text)
                    .ok_or_else(|| protocol(format!("206 with the Content-Range {text:?}")))?;
                if total != self.size {
                    return Err(self.other_size(host, total));
                }
                if (first, last) != (range.start, range.end - 1) {
                    let (start, end) = (range.start, range.end - 1);
                    return Err(protocol(format!(
                        "it sent bytes {first}-{last} instead of {start}-{end}"
                    )));
                }
            }
            200 if self.whole(range) => {
                if let Some(stated) = content_length(headers).filter(|stated| *stated != self.size)
                {
                    return Err(self.other_size(host, stated));
                }
            }
            200 => return Err(RegistryError::RangeIgnored { what: self.what.clone(), host }),
            status @ (401 | 403 | 404) if self.place.is_elsewhere() => {
                let host = format!("{host} (a URL of the layer's descriptor)");
                let reason = String::new();
                return Err(RegistryError::Server {
                    what: self.what.clone(),
                    host,
                    status,
                    reason,
                });
            }
            status @ (401 | 403 | 404) if landed.away => {
                return Err(protocol(format!(
                    "the URL that the registry redirects to answered {status}"
                )));
            }
            _ => return Err(refusal(&self.what, &host, &self.place.host, landed.reply)),
        }
        if let Some(encoding) = headers
            .get(CONTENT_ENCODING)
            .filter(|value| !value.as_bytes().eq_ignore_ascii_case(b"identity"))
        {
            return Err(protocol(format!(
                "the body was encoded as {encoding:?} although no encoding was requested"
            )));
        }
        if let Some(stated) = content_length(headers).filter(|stated| *stated != length) {
            return Err(protocol(format!(
                "a Content-Length of {stated} for a range of {length} bytes"
            )));
        }
        Ok(RangeBody {
            left: length,
            what: self.what.clone(),
            host,
            place: self.place.clone(),
            body: landed.reply.body,
            source: self.place.state.clone(),
            by_peer: false,
        })
    }

    fn other_size(&self, host: String, actual: u64) -> RegistryError {
        RegistryError::SizeMismatch { what: self.what.clone(), host, expected: self.size, actual }
    }
}

/// A body that must have exactly as many bytes as its range.
pub(super) struct RangeBody {
    left: u64,
    what: String,
    pub(super) host: String,
    place: Arc<RepositoryPlace>,
    body: ReplyBody,
    /// The host that sends these bytes.
    pub(super) source: Arc<Host>,
    /// True if they come through the peer.
    pub(super) by_peer: bool,
}

impl RangeBody {
    /// Bytes of the range that have not arrived yet.
    pub(super) fn left(&self) -> u64 {
        self.left
    }

    /// The next bytes, never more than are left; `None` once all have arrived. Blocks.
    pub(super) fn next_frame(&mut self) -> Result<Option<Bytes>, RegistryError> {
        block_on(std::future::poll_fn(|context| self.poll_frame(context)))
    }

    /// Form of `next_frame` that does not block.
    pub(super) fn poll_frame(
        &mut self,
        context: &mut Context<'_>,
    ) -> Poll<Result<Option<Bytes>, RegistryError>> {
        let frame = std::task::ready!(self.body.poll_frame(context));
        Poll::Ready(self.accept(frame))
    }

    fn accept(
        &mut self,
        frame: Option<Result<Bytes, TransportError>>,
    ) -> Result<Option<Bytes>, RegistryError> {
        let frame = frame.transpose().map_err(|error| self.broken(&error))?;
        let rule = match &frame {
            Some(frame) if frame.len() as u64 > self.left => {
                "the body is longer than the range".to_owned()
            }
            None if self.left > 0 => {
                format!("the body ended {} bytes before the end of the range", self.left)
            }
            _ => {
                self.left -= frame.as_ref().map_or(0, |frame| frame.len() as u64);
                return Ok(frame);
            }
        };
        Err(RegistryError::Protocol { what: self.what.clone(), host: self.host.clone(), rule })
    }

    async fn discard(self) {
        self.body.discard_async().await;
    }

    fn broken(&self, error: &TransportError) -> RegistryError {
        self.place.services.broken(&self.what, &self.host, error)
    }
}

fn content_length(headers: &HeaderMap) -> Option<u64> {
    headers.get(CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

/// Parses `bytes 0-99/1000` (RFC 9110 14.4). An unknown size (`*`) is rejected: it proves nothing.
fn parse_content_range(text: &str) -> Option<(u64, u64, u64)> {
    let (range, total) = text.trim().strip_prefix("bytes")?.trim_start().split_once('/')?;
    let (first, last) = range.split_once('-')?;
    let number =
        |text: &str| text.bytes().all(|b| b.is_ascii_digit()).then(|| text.parse().ok()).flatten();
    Some((number(first)?, number(last)?, number(total)?))
}

#[cfg(test)]
mod tests {
    use super::parse_content_range;

    #[test]
    fn a_content_range_is_three_numbers_or_nothing() {
        assert_eq!(parse_content_range("bytes 0-99/1000"), Some((0, 99, 1000)));
        for bad in [
            "",
            "bytes */1000",
            "bytes 0-99/*",
            "0-99/1000",
            "bytes 0-/1",
            "bytes +0-1/2",
            "bytes 0-99999999999999999999/1",
        ] {
            assert_eq!(parse_content_range(bad), None, "{bad}");
        }
    }
}
