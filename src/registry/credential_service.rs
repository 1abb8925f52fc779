//! A service that gives credentials (overlaybd's `credentialConfig` modes `http`, `https` and
//! `uds`, spec runtime 3).
//!
//! The request is `GET <path>?remote_url=<URL of the repository's blobs>`, or over a Unix socket
//! `GET /auth?remote_url=…`. The answer is `{"traceId", "success": bool, "data": {"auths": {…}}}`
//! with `auths` in docker's form. The service is asked again for every token, so a rotated password
//! is found. The longest match in its answer wins, as in a file.

use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::header::{ACCEPT, HOST};
use hyper::{Request, Uri};
use hyper_util::rt::TokioIo;
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use serde::Deserialize;
use tokio::net::UnixStream;

use super::auth::Scope;
use super::credentials::{Credential, CredentialError, find_in_auths};
use super::error::RegistryError;
use super::proxy::Proxies;
use super::reach::Reach;
use super::tls::{self, ClientCertificate};
use super::transport::{Timeouts, Transport, on_io_thread};

/// Limit on an answer in bytes. An answer may list many registries.
const ANSWER_LIMIT: usize = 1 << 20;

/// One service. Clones share its connections.
#[derive(Clone)]
pub struct CredentialService {
    place: CredentialPlace,
    timeout: Duration,
    certificate: Option<ClientCertificate>,
    authority: Option<PathBuf>,
    /// Created by the first request: the authorities of the platform take long to read.
    transport: Arc<OnceLock<Result<Transport, RegistryError>>>,
}

impl std::fmt::Debug for CredentialService {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "CredentialService({})", self.address())
    }
}

/// Where a credential service listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CredentialPlace {
    /// An HTTP or HTTPS URL.
    Url(String),
    /// A Unix socket.
    Socket(PathBuf),
}

#[derive(Deserialize)]
struct CredentialAnswer {
    #[serde(default)]
    success: bool,
    #[serde(default)]
    data: Data,
}

#[derive(Deserialize, Default)]
struct Data {
    #[serde(default)]
    auths: serde_json::Value,
}

impl CredentialService {
    /// The service named in the configuration; `None` in mode `file`.
    #[must_use]
    pub fn new(
        place: CredentialPlace,
        timeout: Duration,
        certificate: Option<ClientCertificate>,
        authority: Option<PathBuf>,
    ) -> Self {
        Self { place, timeout, certificate, authority, transport: Arc::default() }
    }

    fn address(&self) -> String {
        match &self.place {
            CredentialPlace::Url(url) => url.clone(),
            CredentialPlace::Socket(path) => path.display().to_string(),
        }
    }

    fn failed(&self, reason: impl Into<String>) -> CredentialError {
        CredentialError::Service { address: self.address(), reason: reason.into() }
    }

    /// The credential for a repository, or `None` when the service has none.
    pub(super) fn find(&self, scope: &Scope) -> Result<Option<Credential>, CredentialError> {
        // overlaybd sends the URL of a blob; only the part before the digest decides.
        let blobs = format!("{}/v2/{}/blobs/", scope.origin, scope.repository);
        let query = format!("remote_url={}", utf8_percent_encode(&blobs, NON_ALPHANUMERIC));
        let (status, body) = match &self.place {
            CredentialPlace::Url(url) => self.ask_url(url, &query),
            CredentialPlace::Socket(path) => self.ask_socket(path, &query),
        }
        .map_err(|reason| self.failed(reason))?;
        if status != 200 {
            return Err(self.failed(format!("it answered {status}")));
        }
        // serde's text may quote a secret.
        let answer: CredentialAnswer = serde_json::from_slice(&body)
            .map_err(|_| self.failed("its answer is not valid JSON of credentials"))?;
        if !answer.success {
            return Err(self.failed("its answer says that it failed"));
        }
        if answer.data.auths.is_null() {
            return Ok(None);
        }
        find_in_auths(Path::new(&self.address()), answer.data.auths, scope)
    }

    fn ask_url(&self, url: &str, query: &str) -> Result<(u16, Bytes), String> {
        let joint = if url.contains('?') { '&' } else { '?' };
        let uri: Uri = format!("{url}{joint}{query}")
            .parse()
            .map_err(|_| "its address is not a URL".to_owned())?;
        let request = Request::get(uri).header(ACCEPT, "application/json").body(Bytes::new());
        let request = request.map_err(|error| error.to_string())?;
        let made = self.transport.get_or_init(|| self.connect());
        let transport = made.as_ref().map_err(ToString::to_string)?;
        let reply = transport
            .send(request, Reach::Named, Some(Instant::now() + self.timeout))
            .map_err(|error| error.to_string())?;
        let status = reply.status.as_u16();
        let body = reply.body.collect(ANSWER_LIMIT).map_err(|error| error.to_string())?;
        Ok((status, body.into()))
    }

    fn connect(&self) -> Result<Transport, RegistryError> {
        let authorities: Vec<PathBuf> = self.authority.iter().cloned().collect();
        let tls = tls::configure(&authorities, self.certificate.as_ref(), false)?;
        let timeouts = Timeouts { connect: self.timeout, head: self.timeout, idle: self.timeout };
        Ok(Transport::new(tls, &Proxies::Environment, timeouts))
    }

    fn ask_socket(&self, path: &Path, query: &str) -> Result<(u16, Bytes), String> {
        let request = Request::get(format!("/auth?{query}"))
            .header(HOST, "localhost")
            .header(ACCEPT, "application/json")
            .body(Empty::<Bytes>::new())
            .map_err(|error| error.to_string())?;
        let (path, limit) = (path.to_owned(), self.timeout);
        let asked = async move {
            let ask = async move {
                let stream = UnixStream::connect(path).await.map_err(|error| error.to_string())?;
                let (mut sender, connection) =
                    hyper::client::conn::http1::handshake(TokioIo::new(stream))
                        .await
                        .map_err(|error| error.to_string())?;
                let connection = tokio::spawn(connection);
                let response =
                    sender.send_request(request).await.map_err(|error| error.to_string())?;
                let status = response.status().as_u16();
                let body = Limited::new(response.into_body(), ANSWER_LIMIT).collect().await;
                connection.abort();
                Ok((status, body.map_err(|error| error.to_string())?.to_bytes()))
            };
            let silent = || Err(format!("it did not answer in {:.1} s", limit.as_secs_f64()));
            tokio::time::timeout(limit, ask).await.unwrap_or_else(|_| silent())
        };
        on_io_thread(asked).unwrap_or_else(|error| Err(error.to_string()))
    }
}
