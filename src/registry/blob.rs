//! Range reads of one blob.
//!
//! A read is one `GET` with a `Range`, and an answer is believed only when it says that it is the very
//! range: 206, `Content-Range` with our first and last byte and the blob's size, and exactly that many
//! bytes. The size comes from the descriptor, so nothing is asked before the first read.
//!
//! When the registry redirects, the final URL is kept ([`redirect::lifetime`]) and the next reads go
//! straight there, without `Authorization`. When that URL is refused (401, 403, 404, 410) it is dropped and
//! the registry is asked again within the same try.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use hyper::header::{CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_RANGE, HeaderValue, RANGE};
use hyper::{HeaderMap, Method, Uri};

use super::client::{Call, Landed, Place, refusal, unix_now};
use super::error::RegistryError;
use super::redirect;
use super::retry::Budget;
use super::transport::{Body, TransportError};
use crate::oci::Digest;
use crate::source::{ByteSource, Class, OneBuffer, Retries, Run, SourceError, Traffic};

/// What was fetched of a blob so far.
#[derive(Debug, Default)]
pub struct RemoteStats {
    /// Range requests made, each with all its redirects counted as one.
    pub requests: AtomicU64,
    /// Bytes of bodies that arrived.
    pub bytes: AtomicU64,
    /// Requests that failed and were made again.
    pub retries: AtomicU64,
    /// Reads that failed for good.
    pub failures: AtomicU64,
    /// Reads that have failed and are about to be made again.
    pub trying_again: Retries,
}

/// A blob in a registry, readable at any position by many threads.
pub struct RemoteBlob {
    blob: BlobAddress,
    name: String,
    stats: Arc<RemoteStats>,
}

impl RemoteBlob {
    pub(super) fn new(
        place: Arc<Place>,
        digest: &Digest,
        size: u64,
    ) -> Result<Self, RegistryError> {
        let name = place.describe(&digest.to_string());
        // The reader's error names the blob; what is under it need not do so again.
        let blob = BlobAddress::new(place, digest, size, "this blob".to_owned())?;
        Ok(Self { blob, name, stats: Arc::default() })
    }

    /// Counts into `stats`, which other blobs may share.
    #[must_use]
    pub fn with_stats(mut self, stats: Arc<RemoteStats>) -> Self {
        self.stats = stats;
        self
    }

    /// What was fetched so far.
    #[must_use]
    pub fn stats(&self) -> &Arc<RemoteStats> {
        &self.stats
    }

    /// As [`ByteSource::read_run`], with an error that can be matched: by as many requests as it takes.
    /// What arrived before a break is kept, and the rest is asked for.
    ///
    /// # Errors
    /// See [`RegistryError`]. The caller has checked that the range lies in the blob.
    fn fetch(&self, range: Range<u64>, run: &mut dyn Run) -> Result<(), RegistryError> {
        let mut at = range.start;
        let mut budget = Budget::new(self.blob.place.services.read_retry);
        let mut attempts = self.stats.trying_again.read(range.clone());
        loop {
            let result = self.try_fetch(&mut at, range.end, run, budget.deadline());
            let Err(error) = result else { return Ok(()) };
            if let Err(error) =
                budget.pause_telling(error, |error, wait| attempts.failed(error, wait))
            {
                self.stats.failures.fetch_add(1, Ordering::Relaxed);
                return Err(error);
            }
            self.stats.retries.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// One request, from `at` on, which says afterwards how far it came.
    fn try_fetch(
        &self,
        at: &mut u64,
        end: u64,
        run: &mut dyn Run,
        deadline: Instant,
    ) -> Result<(), RegistryError> {
        self.stats.requests.fetch_add(1, Ordering::Relaxed);
        let mut stream = self.blob.open(*at..end, Some(deadline))?;
        let mut take = |frame: bytes::Bytes| {
            run.put(&frame);
            *at += frame.len() as u64;
        };
        // A frame is taken when there is another behind it or a proper end: an answer that goes on past
        // its end is not believed.
        let mut last: Option<bytes::Bytes> = None;
        loop {
            match stream.next_frame() {
                Ok(Some(frame)) => {
                    self.stats.bytes.fetch_add(frame.len() as u64, Ordering::Relaxed);
                    last.replace(frame).into_iter().for_each(&mut take);
                }
                Ok(None) => {
                    last.into_iter().for_each(&mut take);
                    return Ok(());
                }
                Err(error) => {
                    if stream.left() > 0 {
                        last.into_iter().for_each(&mut take);
                    }
                    return Err(error);
                }
            }
        }
    }
}

impl ByteSource for RemoteBlob {
    fn len(&self) -> u64 {
        self.blob.size
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> Result<(), SourceError> {
        let range = offset..offset.saturating_add(buf.len() as u64);
        self.read_run(range, Class::Demand, &mut OneBuffer::new(buf))
    }

    fn read_run(&self, range: Range<u64>, _: Class, run: &mut dyn Run) -> Result<(), SourceError> {
        let (offset, end, size) = (range.start, range.end, self.blob.size);
        if offset > end || end > size {
            return Err(SourceError::PastEnd { name: self.name.clone(), offset, end, size });
        }
        if range.is_empty() {
            return Ok(());
        }
        self.fetch(range, run).map_err(|error| SourceError::Remote {
            name: self.name.clone(),
            offset,
            end,
            reason: error.to_string(),
            lasting: !error.root().is_transient(),
        })
    }

    fn traffic(&self) -> Traffic {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let moved = self.blob.moved_to().and_then(|moved| moved.url.host().map(str::to_owned));
        Traffic {
            bytes: get(&self.stats.bytes),
            requests: get(&self.stats.requests),
            retries: get(&self.stats.retries),
            failures: get(&self.stats.failures),
            host: moved.or_else(|| Some(self.blob.place.host.clone())),
            trying_again: self.stats.trying_again.now(),
        }
    }

    fn is_local(&self) -> bool {
        false
    }

    fn name(&self) -> &str {
        &self.name
    }
}

/// Where a blob's bytes are: its URL at the registry, and the one that redirected to, while it holds.
pub(super) struct BlobAddress {
    pub(super) place: Arc<Place>,
    pub(super) size: u64,
    pub(super) what: String,
    url: Uri,
    moved: Mutex<Option<Moved>>,
}

#[derive(Clone)]
struct Moved {
    url: Uri,
    until: Instant,
}

impl BlobAddress {
    pub(super) fn new(
        place: Arc<Place>,
        digest: &Digest,
        size: u64,
        what: String,
    ) -> Result<Self, RegistryError> {
        let url = place.url(&format!("blobs/{digest}"))?;
        Ok(Self { place, size, what, url, moved: Mutex::new(None) })
    }

    /// Asks for `range` (not empty, inside the blob) and checks the head of the answer.
    pub(super) fn open(
        &self,
        range: Range<u64>,
        deadline: Option<Instant>,
    ) -> Result<RangeBody, RegistryError> {
        if let Some(moved) = self.moved_to() {
            let landed = self.ask(&range, moved.url, deadline);
            match landed {
                // The URL ran out before its time: the registry knows a new one.
                Ok(landed)
                    if matches!(landed.reply.status.as_u16(), 400 | 401 | 403 | 404 | 410) =>
                {
                    self.set_moved(None);
                    landed.reply.body.discard();
                }
                Ok(landed) => {
                    return self.check(&range, landed).inspect_err(|_| self.set_moved(None));
                }
                Err(error) => {
                    self.set_moved(None);
                    return Err(error);
                }
            }
        }
        let landed = self.ask(&range, self.url.clone(), deadline)?;
        let moved = landed.away.then(|| landed.url.clone());
        let body = self.check(&range, landed)?;
        if let Some(url) = moved {
            let until = Instant::now() + redirect::lifetime(&url, unix_now());
            self.set_moved(Some(Moved { url, until }));
        }
        Ok(body)
    }

    fn moved_to(&self) -> Option<Moved> {
        let moved = self.moved.lock().unwrap_or_else(PoisonError::into_inner);
        moved.clone().filter(|moved| moved.until > Instant::now())
    }

    fn set_moved(&self, to: Option<Moved>) {
        *self.moved.lock().unwrap_or_else(PoisonError::into_inner) = to;
    }

    fn whole(&self, range: &Range<u64>) -> bool {
        range.start == 0 && range.end == self.size
    }

    fn ask(
        &self,
        range: &Range<u64>,
        url: Uri,
        deadline: Option<Instant>,
    ) -> Result<Landed, RegistryError> {
        let mut call = Call { verified: true, ..Call::new(Method::GET, url, self.what.clone()) };
        if !self.whole(range)
            && let Ok(value) =
                HeaderValue::try_from(format!("bytes={}-{}", range.start, range.end - 1))
        {
            call = call.header(RANGE, value);
        }
        self.place.exchange(&call, deadline)
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
                        "bytes {first}-{last} came instead of {start}-{end}"
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
                "the body was encoded as {encoding:?} although this was not wanted"
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
    host: String,
    place: Arc<Place>,
    body: Body,
}

impl RangeBody {
    /// Bytes of the range that have not come yet.
    pub(super) fn left(&self) -> u64 {
        self.left
    }

    /// The next bytes, never more than are left; `None` once all have come.
    pub(super) fn next_frame(&mut self) -> Result<Option<bytes::Bytes>, RegistryError> {
        let frame = self.body.next_frame().transpose().map_err(|error| self.broken(&error))?;
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

    fn broken(&self, error: &TransportError) -> RegistryError {
        self.place.services.broken(&self.what, &self.host, error)
    }
}

fn content_length(headers: &HeaderMap) -> Option<u64> {
    headers.get(CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

/// `bytes 0-99/1000` (RFC 9110 14.4). An unknown size (`*`) is not accepted: it proves nothing.
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
