//! One blob from front to end, resumed after a broken connection.
//!
//! This is for the converter, which needs every byte of a layer once. A connection that breaks
//! after 9 GB of 10 is continued by a range request; from a registry without ranges the blob is
//! fetched again and the known part discarded, which is slow but succeeds.

use std::io::{self, Read};
use std::time::Instant;

use bytes::{Buf as _, Bytes};

use super::downloads::Download;
use super::error::RegistryError;
use super::retry::Budget;
use super::way::{BlobAddress, BlobPlaces, CoveredBy, RangeBody};
use formats::oci::Digest;
use source::Class;

/// Progress in bytes after which the count of tries starts anew: a connection that gives less
/// between two breaks is given up.
const PROGRESS: u64 = 64 << 10;

/// Reader of a whole blob. It gives exactly the blob's size in bytes, or an [`io::Error`] that
/// holds a [`RegistryError`]; the caller verifies the digest.
pub struct BlobReader {
    blob: BlobAddress,
    digest: Digest,
    begun: Instant,
    /// Who sends, once it was asked.
    host: Option<String>,
    body: Option<RangeBody>,
    frame: Bytes,
    /// Bytes that arrived, delivered or in `frame`.
    received: u64,
    /// Bytes of the present body to discard: it started at 0.
    skip: u64,
    received_at_break: u64,
    ranges_ignored: bool,
    budget: Budget,
}

impl BlobReader {
    pub(super) fn new(
        places: BlobPlaces<'_>,
        size: u64,
        urls: &[String],
    ) -> Result<Self, RegistryError> {
        let digest = *places.digest;
        let what = places.registry.describe(&format!("blob {digest}"));
        let budget = Budget::new(places.registry.services.read_retry, places.registry);
        let blob = BlobAddress::new(places, size, CoveredBy::Digests { urls }, &what)?;
        Ok(Self {
            blob,
            digest,
            begun: Instant::now(),
            host: None,
            body: None,
            frame: Bytes::new(),
            received: 0,
            skip: 0,
            received_at_break: 0,
            ranges_ignored: false,
            budget,
        })
    }

    /// Size of the blob in bytes, by its descriptor.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.blob.size
    }

    /// Fetches the next frame; `false` at the end of the blob.
    fn advance(&mut self) -> Result<bool, RegistryError> {
        while self.received < self.blob.size {
            match self.try_advance() {
                Ok(()) if self.frame.is_empty() => {}
                Ok(()) => return Ok(true),
                Err(RegistryError::RangeIgnored { .. }) if !self.ranges_ignored => {
                    self.ranges_ignored = true;
                }
                Err(error) => {
                    self.body = None;
                    if self.received - self.received_at_break >= PROGRESS {
                        self.budget.renew();
                    }
                    self.received_at_break = self.received;
                    self.budget.pause(error)?;
                }
            }
        }
        Ok(false)
    }

    fn try_advance(&mut self) -> Result<(), RegistryError> {
        let mut body = match self.body.take() {
            Some(body) => body,
            None => {
                let from = if self.ranges_ignored { 0 } else { self.received };
                self.skip = self.received - from;
                let body = self.blob.open(&(from..self.blob.size), None)?;
                self.host = Some(body.host.clone());
                body
            }
        };
        let frame = body.next_frame().inspect_err(|_| body.source.failed(None))?;
        let Some(mut frame) = frame else { return Ok(()) };
        let known = self.skip.min(frame.len() as u64);
        frame.advance(usize::try_from(known).unwrap_or(frame.len()));
        self.skip -= known;
        let received = self.received + frame.len() as u64;
        if received == self.blob.size {
            // The body must end here: this reads its end, and returns the connection to the pool.
            body.next_frame()?;
        } else {
            self.body = Some(body);
        }
        self.received = received;
        self.frame = frame;
        Ok(())
    }
}

impl Read for BlobReader {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if buf.is_empty() {
            return Ok(0);
        }
        if self.frame.is_empty() && !self.advance().map_err(io::Error::other)? {
            return Ok(0);
        }
        let count = buf.len().min(self.frame.len());
        self.frame.copy_to_slice(&mut buf[..count]);
        Ok(count)
    }
}

/// Tells the log of downloads, if there is one, how much of the blob came.
impl Drop for BlobReader {
    fn drop(&mut self) {
        let registry = self.blob.registry();
        if let (Some(log), Some(host)) = (registry.services.network.log(), self.host.take()) {
            let (received, size) = (self.received, self.blob.size);
            log.downloaded(Download {
                blob: self.digest,
                range: 0..received,
                class: Class::Demand,
                took: self.begun.elapsed(),
                host,
                error: (received < size).then(|| format!("{received} of {size} bytes came")),
            });
        }
    }
}
