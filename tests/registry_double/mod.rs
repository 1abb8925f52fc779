//! A registry in memory, for tests of everything that talks to one.
//!
//! It serves pull, push, tokens and signed URLs on a port of 127.0.0.1 from a thread of its own, and fails on
//! request: [`Double::fault`] takes a piece of text that a request's `METHOD /path?query` must contain, the
//! fault, and its number of times. Every request is in [`Double::log`]; the double ends when it is dropped.
//!
//! ```ignore
//! let registry = Double::start();
//! let digest = registry.add_blob("team/app", b"bytes");
//! registry.fault("GET /v2/team/app/blobs/", Fault::Status(503), 2);
//! ```

#![allow(dead_code, unreachable_pub, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod answer;
mod body;
pub mod real;
pub mod tls_front;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use bytes::Bytes;
use formats::oci::Digest;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::net::TcpListener;
use tokio::sync::oneshot;

/// A fault instead of an answer, or before it.
#[derive(Clone, Debug)]
pub enum Fault {
    /// Wait before the head.
    Delay(Duration),
    /// Answer this status with a small error document.
    Status(u16),
    /// 200 and an HTML page, the answer of some registries to unknown requests.
    LoginPage,
    /// Answer this status with `Retry-After`.
    RetryAfter(u16, String),
    /// 307 to this `Location`, unchanged.
    Location(String),
    /// 307 to a signed URL of that object store (its base URL), which states this lifetime in seconds.
    Redirect(String, u64),
    /// 200 and the whole blob, for any requested range.
    IgnoreRange,
    /// So many bytes less than the range, in an answer that is consistent except for its `Content-Range`.
    ShortBody(usize),
    /// So many bytes more than the range, without a `Content-Length`.
    LongBody(usize),
    /// Send so many bytes of the body, then break the connection.
    DropAfter(usize),
    /// Send so many bytes of the body, then stop without closing.
    StallAfter(usize),
    /// Another `Content-Range`.
    ContentRange(String),
    /// Flip these bits of the byte at this offset of the blob.
    Flip(u64, u8),
    /// Forget all tokens first, this request's among them.
    RevokeTokens,
    /// Another body with the same head.
    Garbage(Vec<u8>),
}

/// Access control.
#[derive(Clone, Debug)]
pub enum Access {
    /// Any client.
    Open,
    /// A client with these credentials, `user:password`.
    Basic(String),
    /// Clients with a token of the double's own token service.
    Bearer {
        /// Credentials for a token; `None`: any client gets one.
        login: Option<String>,
        /// Lifetime stated in `expires_in`.
        stated_life: Duration,
        /// Real lifetime of tokens.
        real_life: Duration,
        /// Answer to an expired token: 401 with a challenge, or 403 without one.
        refusal: u16,
    },
}

/// One request, with its answer.
#[derive(Clone, Debug)]
pub struct Seen {
    /// `GET /v2/team/app/manifests/latest`, with the query.
    pub line: String,
    /// The `Range` field.
    pub range: Option<String>,
    /// The `Authorization` field.
    pub authorization: Option<String>,
    /// The `Proxy-Authorization` field.
    pub proxy_authorization: Option<String>,
    /// The status of the answer.
    pub status: u16,
    /// Bytes of body to be sent.
    pub sent: usize,
}

struct StoredManifest {
    media_type: String,
    bytes: Bytes,
}

#[derive(Default)]
struct State {
    blobs: HashMap<(String, Digest), Bytes>,
    manifests: HashMap<(String, String), StoredManifest>,
    uploads: HashMap<String, Vec<u8>>,
    faults: Vec<(String, Fault, u32)>,
    access: Option<Access>,
    tokens: HashMap<String, Instant>,
    signatures: HashMap<String, Instant>,
    log: Vec<Seen>,
    counter: u64,
}

impl State {
    fn next_number(&mut self) -> u64 {
        self.counter += 1;
        self.counter
    }
}

type Shared = Arc<Mutex<State>>;

fn lock(state: &Shared) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A registry, or the object store behind one.
pub struct Double {
    address: SocketAddr,
    state: Shared,
    /// Blobs and signatures: its own, or those of the registry whose store it is.
    origin: Shared,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Double {
    /// Starts an empty registry, open to any client.
    pub fn start() -> Self {
        let state = Shared::default();
        Self::serve(state.clone(), state)
    }

    /// Starts an object store on another port that serves signed URLs for the blobs of `registry`.
    pub fn start_storage_of(registry: &Self) -> Self {
        Self::serve(Shared::default(), registry.state.clone())
    }

    /// Starts a peer-to-peer proxy that serves the blobs of `registry`, under `/accelerator/<actual URL>`.
    pub fn start_peer_of(registry: &Self) -> Self {
        Self::serve(Shared::default(), registry.state.clone())
    }

    fn serve(state: Shared, origin: Shared) -> Self {
        let (stop, stopped) = oneshot::channel::<()>();
        let (ready, address) = std::sync::mpsc::channel();
        let (served, blobs) = (state.clone(), origin.clone());
        let thread = std::thread::spawn(move || {
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async move {
                let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
                let here = listener.local_addr().unwrap();
                ready.send(here).unwrap();
                tokio::select! {
                    () = accept(listener, here, served, blobs) => {}
                    _ = stopped => {}
                }
            });
            // Connections still open end with the runtime.
        });
        let address = address.recv().unwrap();
        Self { address, state, origin, stop: Some(stop), thread: Some(thread) }
    }

    /// `127.0.0.1:port`.
    pub fn host(&self) -> String {
        self.address.to_string()
    }

    /// `http://127.0.0.1:port`.
    pub fn base_url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Puts a blob into a repository.
    pub fn add_blob(&self, repository: &str, bytes: &[u8]) -> Digest {
        let digest = Digest::of(bytes);
        lock(&self.state)
            .blobs
            .insert((repository.to_owned(), digest), Bytes::copy_from_slice(bytes));
        digest
    }

    /// Puts other bytes under the digest of a blob into a repository: a registry that lies.
    pub fn add_lie(&self, repository: &str, digest: &Digest, bytes: &[u8]) {
        let key = (repository.to_owned(), *digest);
        lock(&self.state).blobs.insert(key, Bytes::copy_from_slice(bytes));
    }

    /// Removes a blob.
    pub fn remove_blob(&self, repository: &str, digest: &Digest) {
        lock(&self.state).blobs.remove(&(repository.to_owned(), *digest));
    }

    /// A blob that was pushed or added.
    pub fn blob(&self, repository: &str, digest: &Digest) -> Option<Bytes> {
        lock(&self.state).blobs.get(&(repository.to_owned(), *digest)).cloned()
    }

    /// Puts a manifest under a tag and its digest.
    pub fn add_manifest(
        &self,
        repository: &str,
        tag: &str,
        media_type: &str,
        bytes: &[u8],
    ) -> Digest {
        let digest = Digest::of(bytes);
        answer::store_manifest(
            &mut lock(&self.state),
            repository,
            tag,
            media_type,
            &Bytes::copy_from_slice(bytes),
        );
        digest
    }

    /// Media type and bytes under a tag or digest.
    pub fn manifest(&self, repository: &str, reference: &str) -> Option<(String, Bytes)> {
        let state = lock(&self.state);
        let found = state.manifests.get(&(repository.to_owned(), reference.to_owned()))?;
        Some((found.media_type.clone(), found.bytes.clone()))
    }

    /// Applies `fault` to the next `times` requests whose `METHOD /path?query` contains `pattern`. Of several
    /// faults that match, all are used; of a kind that replaces the answer, the first.
    pub fn fault(&self, pattern: &str, fault: Fault, times: u32) {
        lock(&self.state).faults.push((pattern.to_owned(), fault, times));
    }

    /// Removes all faults.
    pub fn clear_faults(&self) {
        lock(&self.state).faults.clear();
    }

    /// Sets the access control from now on.
    pub fn set_access(&self, access: Access) {
        lock(&self.state).access = Some(access);
    }

    /// Revokes every token given out so far.
    pub fn revoke_tokens(&self) {
        lock(&self.state).tokens.clear();
    }

    /// Revokes every signed URL given out so far, whatever its stated lifetime.
    pub fn revoke_signatures(&self) {
        lock(&self.origin).signatures.clear();
    }

    /// All requests, in order.
    pub fn log(&self) -> Vec<Seen> {
        lock(&self.state).log.clone()
    }

    /// Clears the log.
    pub fn clear_log(&self) {
        lock(&self.state).log.clear();
    }

    /// Number of requests that contain `pattern`.
    pub fn count(&self, pattern: &str) -> usize {
        lock(&self.state).log.iter().filter(|seen| seen.line.contains(pattern)).count()
    }

    /// Number of requests for a blob's bytes that were answered with some, and number of bytes.
    pub fn traffic(&self, digest: &Digest) -> (usize, usize) {
        let text = digest.to_string();
        let state = lock(&self.state);
        let served = state.log.iter().filter(|seen| {
            seen.line.starts_with("GET") && seen.line.contains(&text) && seen.status < 300
        });
        served.fold((0, 0), |(requests, bytes), seen| (requests + 1, bytes + seen.sent))
    }

    /// Waits until `counted` returns as many bytes as were sent of a blob: bytes that are read ahead may
    /// still be in flight when a reader has its own.
    #[track_caller]
    pub fn until_counted(&self, digest: &Digest, counted: impl Fn() -> u64) {
        let begun = Instant::now();
        loop {
            let (counted, (_, sent)) = (counted(), self.traffic(digest));
            if counted == sent as u64 {
                return;
            }
            assert!(begun.elapsed() < Duration::from_secs(10), "{counted} counted, {sent} sent");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Double {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

async fn accept(listener: TcpListener, here: SocketAddr, state: Shared, origin: Shared) {
    loop {
        let Ok((stream, _)) = listener.accept().await else { return };
        let (state, origin) = (state.clone(), origin.clone());
        tokio::spawn(async move {
            let service = service_fn(move |request| {
                answer::answer(request, here, state.clone(), origin.clone())
            });
            // A connection that a fault broke ends with an error, as intended.
            let _ = hyper::server::conn::http1::Builder::new()
                .serve_connection(TokioIo::new(stream), service)
                .await;
        });
    }
}
