//! Manifests and uploads of one repository.

use std::io::{self, Cursor, Read};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use hyper::header::{
    ACCEPT, CONTENT_LENGTH, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue, LOCATION,
};
use hyper::{Method, Uri};

use super::auth::parse_challenges;
use super::blob::RemoteBlob;
use super::client::{Call, Landed, RepositoryPlace, authority, keep_tls, refusal};
use super::error::RegistryError;
use super::redirect::resolve;
use super::retry::{Budget, RetryPolicy};
use super::stream::BlobReader;
use super::transport::HttpReply;
use super::way::{BlobPlaces, CoveredBy};
use formats::oci::Digest;

/// Limit on a manifest in bytes. Registries must accept manifests of 4 MiB and need not accept
/// larger ones (distribution specification, "Pushing manifests").
const MANIFEST_LIMIT: usize = 4 << 20;

/// Media types accepted for manifests: every form of an image or an index of images.
const MANIFEST_TYPES: &str = "application/vnd.oci.image.index.v1+json, \
    application/vnd.oci.image.manifest.v1+json, \
    application/vnd.docker.distribution.manifest.list.v2+json, \
    application/vnd.docker.distribution.manifest.v2+json";

const DOCKER_CONTENT_DIGEST: HeaderName = HeaderName::from_static("docker-content-digest");

/// Deadline of a mirror's manifest answer; after it the next host is asked.
const MIRROR_DEADLINE: Duration = Duration::from_secs(10);

/// Deadline of an upload. An upload may take as long as it makes progress; only the number of tries
/// counts.
const UPLOAD_DEADLINE: Duration = Duration::from_secs(24 * 3600);

/// A manifest as the registry stores it.
#[derive(Clone, Debug)]
pub struct FetchedManifest {
    /// `Content-Type`, without parameters.
    pub media_type: String,
    /// The bytes that `digest` names.
    pub bytes: Vec<u8>,
    /// Digest, computed from `bytes`.
    pub digest: Digest,
}

/// One repository of one registry. Clones are cheap.
#[derive(Clone)]
pub struct Repository {
    place: Arc<RepositoryPlace>,
    /// The mirrors, which are asked first.
    mirrors: Arc<[Arc<RepositoryPlace>]>,
}

impl Repository {
    pub(super) fn new(place: Arc<RepositoryPlace>, mirrors: Vec<Arc<RepositoryPlace>>) -> Self {
        Self { place, mirrors: mirrors.into() }
    }

    #[cfg(test)]
    pub(super) fn place(&self) -> &RepositoryPlace {
        &self.place
    }

    /// The registry's host, as it was named.
    #[must_use]
    pub fn host(&self) -> &str {
        &self.place.host
    }

    /// The repository's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.place.name
    }

    fn retry<T>(
        &self,
        attempt: impl FnMut(Instant) -> Result<T, RegistryError>,
    ) -> Result<T, RegistryError> {
        Budget::new(self.place.services.retry, &self.place).run(attempt)
    }

    /// Asks the healthy mirrors, each once, and then the registry until its budget is used up.
    fn read<T>(
        &self,
        attempt: impl Fn(&RepositoryPlace, Instant) -> Result<T, RegistryError>,
    ) -> Result<T, RegistryError> {
        for mirror in self.mirrors.iter().filter(|mirror| mirror.state.is_healthy()) {
            match attempt(mirror, Instant::now() + MIRROR_DEADLINE) {
                Ok(done) => {
                    mirror.state.succeeded();
                    return Ok(done);
                }
                // A mirror of a part, or one without a list of referrers, counts as healthy.
                Err(error @ RegistryError::NotFound { .. }) => {
                    tracing::info!(mirror = %mirror.host, %error, "registry: skipping a mirror");
                }
                Err(error) => {
                    tracing::warn!(mirror = %mirror.host, %error, "registry: skipping a mirror");
                    if error.is_transient() {
                        mirror.state.failed(error.retry_after());
                    }
                }
            }
        }
        self.retry(|deadline| attempt(&self.place, deadline))
    }

    /// Sends `call` until it is answered with one of `accepted`.
    fn ask(&self, call: &Call, accepted: &[u16]) -> Result<Landed, RegistryError> {
        self.retry(|deadline| {
            let landed = self.place.exchange(call, Some(deadline))?;
            self.accept(call, landed, accepted)
        })
    }

    fn accept(
        &self,
        call: &Call,
        landed: Landed,
        accepted: &[u16],
    ) -> Result<Landed, RegistryError> {
        if accepted.contains(&landed.reply.status.as_u16()) {
            return Ok(landed);
        }
        let host = landed.host().to_owned();
        Err(refusal(&call.what, &host, &self.place.host, landed.reply))
    }

    /// The manifest under a tag or a digest, of any media type. By digest, the bytes are verified;
    /// by tag, they are checked against `Docker-Content-Digest` when the registry sends it.
    ///
    /// # Errors
    /// Returns [`RegistryError::TooLarge`] past 4 MiB, [`RegistryError::DigestMismatch`], and all
    /// others.
    pub fn manifest(&self, reference: &str) -> Result<FetchedManifest, RegistryError> {
        let expected = check_reference(reference)?;
        let what = self.place.describe(&format!("manifest {reference}"));
        self.read(|place, deadline| {
            let url = place.url(&format!("manifests/{reference}"))?;
            let call = Call::new(Method::GET, url, what.clone())
                .header(ACCEPT, HeaderValue::from_static(MANIFEST_TYPES));
            let call = Call { verified: expected.is_some(), ..call };
            let landed = place.exchange(&call, Some(deadline))?;
            let landed = self.accept(&call, landed, &[200])?;
            self.read_manifest(&call, landed, expected)
        })
    }

    fn read_manifest(
        &self,
        call: &Call,
        landed: Landed,
        expected: Option<Digest>,
    ) -> Result<FetchedManifest, RegistryError> {
        let host = landed.host().to_owned();
        let headers = &landed.reply.headers;
        let content_type =
            headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
        let media_type = content_type.split(';').next().unwrap_or_default().trim().to_owned();
        let stated = stated_digest(headers);
        let body = landed.reply.body.collect(MANIFEST_LIMIT);
        let bytes = body.map_err(|error| self.place.services.broken(&call.what, &host, &error))?;
        let digest = Digest::of(&bytes);
        for expected in expected.into_iter().chain(stated) {
            if expected != digest {
                return Err(RegistryError::DigestMismatch {
                    what: call.what.clone(),
                    expected: expected.to_string(),
                    actual: digest.to_string(),
                });
            }
        }
        Ok(FetchedManifest { media_type, bytes, digest })
    }

    /// Stores a manifest under a tag or its digest; returns its digest.
    ///
    /// # Errors
    /// See [`RegistryError`]; [`RegistryError::DigestMismatch`] when the registry stored something else.
    pub fn put_manifest(
        &self,
        reference: &str,
        media_type: &str,
        bytes: &[u8],
    ) -> Result<Digest, RegistryError> {
        let digest = Digest::of(bytes);
        let what = self.place.describe(&format!("manifest {reference}"));
        if let Some(named) = check_reference(reference)?.filter(|named| *named != digest) {
            return Err(RegistryError::DigestMismatch {
                what,
                expected: named.to_string(),
                actual: digest.to_string(),
            });
        }
        let content_type = HeaderValue::from_str(media_type).map_err(|_| {
            RegistryError::BadName { text: media_type.to_owned(), expected: "a media type" }
        })?;
        let url = self.place.url(&format!("manifests/{reference}"))?;
        let mut call = Call::new(Method::PUT, url, what).header(CONTENT_TYPE, content_type);
        call.body = Bytes::copy_from_slice(bytes);
        let landed = self.ask(&call, &[200, 201, 202])?;
        self.check_stored(&call, &landed, digest)?;
        landed.reply.body.discard();
        Ok(digest)
    }

    fn check_stored(
        &self,
        call: &Call,
        landed: &Landed,
        digest: Digest,
    ) -> Result<(), RegistryError> {
        match stated_digest(&landed.reply.headers) {
            Some(stored) if stored != digest => Err(RegistryError::DigestMismatch {
                what: call.what.clone(),
                expected: digest.to_string(),
                actual: stored.to_string(),
            }),
            _ => Ok(()),
        }
    }

    /// The index of manifests that refer to `digest` (OCI 1.1 referrers), or, from a registry without
    /// that, the index under the fallback tag `sha256-…`; `None` when there is neither.
    ///
    /// # Errors
    /// See [`RegistryError`].
    pub fn referrers(&self, digest: &Digest) -> Result<Option<FetchedManifest>, RegistryError> {
        let what = self.place.describe(&format!("referrers of {digest}"));
        let found = self.read(|place, deadline| {
            let url = place.url(&format!("referrers/{digest}"))?;
            let call = Call::new(Method::GET, url, what.clone())
                .header(ACCEPT, HeaderValue::from_static(MANIFEST_TYPES));
            let landed = place.exchange(&call, Some(deadline))?;
            match landed.reply.status.as_u16() {
                200 => self.read_manifest(&call, landed, None).map(Some),
                // An older mirror does not know which referrers the registry has.
                400 | 404 | 405 if !place.is_mirror() => Ok(None),
                _ => self.accept(&call, landed, &[]).map(|_| None),
            }
        })?;
        // Some registries answer unknown requests with a login page.
        let index = "application/vnd.oci.image.index.v1+json";
        if let Some(manifest) = found.filter(|manifest| manifest.media_type == index) {
            return Ok(Some(manifest));
        }
        match self.manifest(&format!("sha256-{}", digest.hex())) {
            Ok(manifest) => Ok(Some(manifest)),
            Err(RegistryError::NotFound { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// True if the repository has this blob.
    ///
    /// # Errors
    /// See [`RegistryError`]; "not found" is not an error here.
    pub fn blob_exists(&self, digest: &Digest) -> Result<bool, RegistryError> {
        let what = self.place.describe(&format!("blob {digest}"));
        let url = self.place.url(&format!("blobs/{digest}"))?;
        let call = Call::new(Method::HEAD, url, what);
        match self.ask(&call, &[200]) {
            Ok(_) => Ok(true),
            Err(RegistryError::NotFound { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Length of a blob in bytes, for callers without its descriptor.
    ///
    /// # Errors
    /// See [`RegistryError`]; [`RegistryError::Protocol`] when the registry does not state the
    /// length.
    pub fn blob_size(&self, digest: &Digest) -> Result<u64, RegistryError> {
        let what = self.place.describe(&format!("blob {digest}"));
        let landed = self.read(|place, deadline| {
            let url = place.url(&format!("blobs/{digest}"))?;
            let call = Call::new(Method::HEAD, url, what.clone());
            self.accept(&call, place.exchange(&call, Some(deadline))?, &[200])
        })?;
        let length = landed
            .reply
            .headers
            .get(CONTENT_LENGTH)
            .and_then(|value| value.to_str().ok()?.parse().ok());
        length.ok_or_else(|| RegistryError::Protocol {
            what: what.clone(),
            host: self.place.host.clone(),
            rule: "a HEAD of a blob is answered with its Content-Length".to_owned(),
        })
    }

    /// Opens a blob for range reads; its descriptor gives `size` in bytes. Makes no request yet.
    ///
    /// # Errors
    /// [`RegistryError::BadName`] never happens for a digest, but the URL is built here.
    pub fn blob(&self, digest: &Digest, size: u64) -> Result<RemoteBlob, RegistryError> {
        RemoteBlob::new(self.address(digest), size, CoveredBy::Nothing)
    }

    /// As [`Repository::blob`], for a caller that checks each byte against a digest: then a redirect may leave TLS, and what
    /// the repository does not deliver is read at `urls`, those of the layer's descriptor.
    ///
    /// # Errors
    /// As [`Repository::blob`].
    pub fn covered_blob(
        &self,
        digest: &Digest,
        size: u64,
        urls: &[String],
    ) -> Result<RemoteBlob, RegistryError> {
        RemoteBlob::new(self.address(digest), size, CoveredBy::Digests { urls })
    }

    /// Opens a blob of `size` bytes for reading from front to end. The caller verifies the digest; so `urls` are those of
    /// [`Repository::covered_blob`].
    ///
    /// # Errors
    /// Returns the errors of [`Repository::blob`]; the first read asks the registry.
    pub fn blob_stream(
        &self,
        digest: &Digest,
        size: u64,
        urls: &[String],
    ) -> Result<BlobReader, RegistryError> {
        BlobReader::new(self.address(digest), size, urls)
    }

    fn address<'r>(&'r self, digest: &'r Digest) -> BlobPlaces<'r> {
        BlobPlaces { registry: &self.place, mirrors: &self.mirrors, digest }
    }

    /// Mounts a blob of the repository `from` of the same registry without sending it; returns true
    /// if the registry did so. A registry that does not support this opens an upload instead, which
    /// is left to expire.
    ///
    /// # Errors
    /// See [`RegistryError`]; a refusal, for example without the right to read `from`, is not an
    /// error here.
    pub fn mount_blob(&self, digest: &Digest, from: &str) -> Result<bool, RegistryError> {
        let what = self.place.describe(&format!("blob {digest}"));
        let path = format!("blobs/uploads/?mount=sha256%3A{}&from={from}", digest.hex());
        let call = Call::new(Method::POST, self.place.url(&path)?, what)
            .header(CONTENT_LENGTH, HeaderValue::from_static("0"));
        match self.ask(&call, &[201, 202]) {
            Ok(landed) => {
                let mounted = landed.reply.status == 201;
                landed.reply.body.discard();
                Ok(mounted)
            }
            Err(RegistryError::NotFound { .. } | RegistryError::Denied { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Stores a blob that is in memory, unless the repository has it; returns true if it was sent.
    ///
    /// # Errors
    /// See [`RegistryError`].
    pub fn push_blob(&self, digest: &Digest, bytes: &Bytes) -> Result<bool, RegistryError> {
        self.push_blob_from(digest, bytes.len() as u64, &mut || {
            Ok(Box::new(Cursor::new(bytes.clone())))
        })
    }

    /// Stores a blob of `length` bytes, unless the repository has it; returns true if it was sent.
    /// `open` is called for each try and returns a reader of the blob from its start.
    ///
    /// # Errors
    /// Returns [`RegistryError::Upload`] when the reader fails or ends early; else see
    /// [`RegistryError`].
    pub fn push_blob_from(
        &self,
        digest: &Digest,
        length: u64,
        open: &mut dyn FnMut() -> io::Result<Box<dyn Read>>,
    ) -> Result<bool, RegistryError> {
        if self.blob_exists(digest)? {
            return Ok(false);
        }
        let upload = Upload {
            repository: self,
            digest: *digest,
            length,
            what: self.place.describe(&format!("blob {digest}")),
        };
        let policy = RetryPolicy { deadline: UPLOAD_DEADLINE, ..self.place.services.retry };
        let mut in_one = true;
        Budget::new(policy, &self.place).run(|_| {
            if in_one {
                match upload.whole(open)? {
                    UploadAnswer::Yes => return Ok(()),
                    UploadAnswer::NotThisWay => in_one = false,
                }
            }
            upload.in_pieces(open)
        })?;
        Ok(true)
    }
}

enum UploadAnswer {
    Yes,
    /// The registry accepts no body with the closing `PUT`.
    NotThisWay,
}

/// One blob being uploaded (distribution specification, "Pushing blobs").
struct Upload<'a> {
    repository: &'a Repository,
    digest: Digest,
    length: u64,
    what: String,
}

impl Upload<'_> {
    /// `POST`, then `PUT` with the bytes.
    fn whole(
        &self,
        open: &mut dyn FnMut() -> io::Result<Box<dyn Read>>,
    ) -> Result<UploadAnswer, RegistryError> {
        let url = self.closing_url(&self.session()?)?;
        let call = self.call(Method::PUT, url);
        let landed = self.send(&call, open)?;
        if matches!(landed.reply.status.as_u16(), 404 | 405 | 411 | 415 | 416 | 501) {
            return Ok(UploadAnswer::NotThisWay);
        }
        self.finish(&call, landed)?;
        Ok(UploadAnswer::Yes)
    }

    /// `POST`, `PATCH` with the bytes, `PUT` without any.
    fn in_pieces(
        &self,
        open: &mut dyn FnMut() -> io::Result<Box<dyn Read>>,
    ) -> Result<(), RegistryError> {
        let mut location = self.session()?;
        if self.length > 0 {
            let range = format!("0-{}", self.length - 1);
            let mut call = self.call(Method::PATCH, location);
            if let Ok(range) = HeaderValue::try_from(range) {
                call = call.header(hyper::header::CONTENT_RANGE, range);
            }
            let landed = self.send(&call, open)?;
            let landed = self.repository.accept(&call, landed, &[202])?;
            location = self.location(&landed)?;
            landed.reply.body.discard();
        }
        let call = self
            .call(Method::PUT, self.closing_url(&location)?)
            .header(CONTENT_LENGTH, HeaderValue::from_static("0"));
        let landed = self.repository.place.exchange(&call, None)?;
        self.finish(&call, landed)
    }

    fn call(&self, method: Method, url: Uri) -> Call {
        Call::new(method, url, self.what.clone())
            .header(CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"))
    }

    /// Opens an upload and returns the URL for its next request.
    fn session(&self) -> Result<Uri, RegistryError> {
        let url = self.repository.place.url("blobs/uploads/")?;
        let call = Call::new(Method::POST, url, self.what.clone())
            .header(CONTENT_LENGTH, HeaderValue::from_static("0"));
        let landed = self.repository.ask(&call, &[202])?;
        let location = self.location(&landed)?;
        landed.reply.body.discard();
        Ok(location)
    }

    fn location(&self, landed: &Landed) -> Result<Uri, RegistryError> {
        let location = landed.reply.headers.get(LOCATION).and_then(|value| value.to_str().ok());
        let next =
            location.and_then(|location| resolve(&landed.url, location)).ok_or_else(|| {
                RegistryError::Protocol {
                    what: self.what.clone(),
                    host: landed.host().to_owned(),
                    rule: "it accepted an upload without a Location to send it to".to_owned(),
                }
            })?;
        keep_tls(&self.what, &landed.url, &next)?;
        Ok(next)
    }

    fn closing_url(&self, location: &Uri) -> Result<Uri, RegistryError> {
        let joint = if location.query().is_some() { '&' } else { '?' };
        let text = format!("{location}{joint}digest=sha256%3A{}", self.digest.hex());
        text.parse().map_err(|_| RegistryError::BadName { text, expected: "a URL" })
    }

    /// Sends the blob's bytes as the body of `call`; repeats it once with a new token when it is
    /// refused.
    fn send(
        &self,
        call: &Call,
        open: &mut dyn FnMut() -> io::Result<Box<dyn Read>>,
    ) -> Result<Landed, RegistryError> {
        let place = &self.repository.place;
        let (services, scope) = (&place.services, place.scope(call.actions));
        let deadline = Instant::now() + services.retry.deadline;
        let at_home = place.is_home(&call.url);
        let header =
            if at_home { services.tokens.current(services, &scope, deadline)? } else { None };
        let reply = self.send_once(call, open, header.as_ref())?;
        if at_home && matches!(reply.status.as_u16(), 401 | 403) {
            let challenges = parse_challenges(&reply.headers);
            let deadline = Instant::now() + services.retry.deadline;
            let fresh =
                services.tokens.renew(services, &scope, header.as_ref(), challenges, deadline)?;
            if fresh.is_some() {
                let reply = self.send_once(call, open, fresh.as_ref())?;
                return Ok(Landed { reply, url: call.url.clone(), away: false });
            }
        }
        Ok(Landed { reply, url: call.url.clone(), away: !at_home })
    }

    fn send_once(
        &self,
        call: &Call,
        open: &mut dyn FnMut() -> io::Result<Box<dyn Read>>,
        authorization: Option<&HeaderValue>,
    ) -> Result<HttpReply, RegistryError> {
        let place = &self.repository.place;
        let mut request = place.request(call, &call.url, authorization)?.map(|_| ());
        request.headers_mut().insert(CONTENT_LENGTH, HeaderValue::from(self.length));
        let unreadable = |source: io::Error| RegistryError::Upload {
            what: self.what.clone(),
            source: source.into(),
        };
        let mut reader = open().map_err(unreadable)?;
        let reach = place.reach(&call.url);
        let sent = place.services.transport.upload(request, reach, &mut *reader, self.length);
        sent.map_err(|error| place.services.broken(&self.what, authority(&call.url), &error))
    }

    fn finish(&self, call: &Call, landed: Landed) -> Result<(), RegistryError> {
        let landed = self.repository.accept(call, landed, &[200, 201, 204])?;
        self.repository.check_stored(call, &landed, self.digest)?;
        landed.reply.body.discard();
        Ok(())
    }
}

/// `Docker-Content-Digest`, if its algorithm can be checked.
fn stated_digest(headers: &HeaderMap) -> Option<Digest> {
    headers.get(DOCKER_CONTENT_DIGEST)?.to_str().ok()?.trim().parse().ok()
}

/// Checks a tag (distribution specification, "Pulling manifests") or a digest, and returns the
/// digest.
fn check_reference(reference: &str) -> Result<Option<Digest>, RegistryError> {
    if reference.contains(':') {
        let expected = "a digest (sha256: and 64 lower-case hexadecimal digits)";
        let digest = reference.parse();
        return digest
            .map(Some)
            .map_err(|_| RegistryError::BadName { text: reference.to_owned(), expected });
    }
    let word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    let bytes = reference.as_bytes();
    let tag = bytes.len() <= 128
        && bytes.first().is_some_and(|b| word(*b))
        && bytes.iter().all(|b| word(*b) || b".-".contains(b));
    if tag {
        Ok(None)
    } else {
        Err(RegistryError::BadName { text: reference.to_owned(), expected: "a tag or a digest" })
    }
}
