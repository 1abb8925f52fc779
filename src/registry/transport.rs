//! Synchronous requests, one at a time, over sockets that I/O threads own.
//!
//! [`Transport::send`] hands a request to an I/O thread and blocks until the head of the answer is
//! there. The body follows through a channel of a few frames: when the caller does not take them,
//! the I/O thread stops reading, the TCP window closes and the server waits. An upload runs the
//! other way: the caller's thread reads its reader and feeds the I/O thread.
//!
//! Every wait ends. Connecting, the wait for a head, and silence in the middle of a body each have
//! a limit ([`Timeouts`]), and a whole exchange may have a deadline. The waiting side needs no
//! clock of its own: the I/O thread always sends an end or an error.
//!
//! HTTP/1.1 only, with as many connections as there are parallel requests: HTTP/2 was measured and
//! gains nothing (`perf/http2`).

use std::error::Error as StdError;
use std::io::{self, Read};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll};
use std::thread;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use hyper::header::PROXY_AUTHORIZATION;
use hyper::{HeaderMap, Request, Response, StatusCode};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::{Client, Error as ClientError};
use hyper_util::rt::{TokioExecutor, TokioTimer};
use rustls::ClientConfig;
use source::failure::with_causes;
use thiserror::Error;
use tokio::runtime::{Builder, Handle};
use tokio::sync::mpsc;
use tokio::time::{Instant as IoInstant, sleep_until, timeout, timeout_at};

use super::payload::{Gauge, RequestBody};
use super::proxy::{Proxies, Route};
use super::reach::{OutOfReach, Reach};
use super::wait::block_on;

/// Frames of a body between the I/O thread and its reader. hyper's frames are at most some 400 KiB,
/// so a stream holds a few MiB in the worst case; fewer frames would make the two threads wait in
/// turns.
const FRAMES_AHEAD: usize = 8;

/// Bytes read from an uploader at once.
const UPLOAD_PIECE: usize = 256 << 10;

/// Idle connections kept per host. More parallel reads than this open more, and close them
/// afterwards.
const IDLE_CONNECTIONS: usize = 32;

/// Limit of silence for each stage of an exchange.
#[derive(Clone, Copy, Debug)]
pub struct Timeouts {
    /// TCP connect.
    pub connect: Duration,
    /// From the request to the head of its answer, TLS handshake included; counted from the last
    /// byte of an upload.
    pub head: Duration,
    /// Between two frames of a body, in either direction.
    pub idle: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(10),
            head: Duration::from_secs(30),
            idle: Duration::from_secs(20),
        }
    }
}

/// Reasons why an exchange failed. The text is the reason alone; the caller knows host and purpose.
#[derive(Clone, Debug, Error)]
pub enum TransportError {
    /// No connection, a broken one, or an answer that is not HTTP.
    #[error("{0}")]
    Broken(String),
    /// The server's certificate was refused.
    #[error("{0}")]
    Untrusted(String),
    /// A registry or an image named an address that this host is not sent to.
    #[error("{0}")]
    OutOfReach(OutOfReach),
    /// Nothing came in time.
    #[error("nothing arrived for {:.1} s while waiting for {waiting_for}", .after.as_secs_f64())]
    Silent {
        /// The stage that was waited for.
        waiting_for: &'static str,
        /// Length of the silence.
        after: Duration,
    },
    /// The body is larger than the caller accepts.
    #[error("the body is larger than {0} bytes")]
    TooLarge(usize),
    /// The reader that was to be uploaded failed.
    #[error("the reader of the upload failed")]
    Reader(#[source] Arc<io::Error>),
}

/// The I/O threads of this process. They start with the first request and never end; a program that
/// forks does so before.
struct IoThreads {
    handles: Vec<Handle>,
    next: AtomicUsize,
}

/// The runtime of the I/O threads. It has two, so that one connection's TLS does not hold up the
/// others; a machine with one core gets one.
fn io_threads() -> Result<&'static IoThreads, TransportError> {
    static THREADS: OnceLock<Result<IoThreads, String>> = OnceLock::new();
    let threads = THREADS.get_or_init(|| {
        let count = thread::available_parallelism().map_or(1, |cores| cores.get().min(2));
        let handles = (0..count).map(start_io_thread).collect::<io::Result<_>>();
        handles
            .map(|handles| IoThreads { handles, next: AtomicUsize::new(0) })
            .map_err(|error| error.to_string())
    });
    threads.as_ref().map_err(|error| {
        TransportError::Broken(format!("the I/O threads cannot be started: {error}"))
    })
}

/// Look-ups of host names at once, for each I/O thread: as many as there are requests in flight, so that no request waits
/// behind the look-ups of a registry whose name server is slow. Threads exist only while they look up.
const LOOK_UPS: usize = 64;

fn start_io_thread(number: usize) -> io::Result<Handle> {
    let mut builder = Builder::new_current_thread();
    let runtime = builder.enable_all().max_blocking_threads(LOOK_UPS).build()?;
    let handle = runtime.handle().clone();
    thread::Builder::new().name(format!("registry-io-{number}")).spawn(move || {
        threads::mark_io_thread();
        runtime.block_on(std::future::pending::<()>());
    })?;
    Ok(handle)
}

impl IoThreads {
    fn pick(&self) -> &Handle {
        let turn = self.next.fetch_add(1, Ordering::Relaxed);
        &self.handles[turn % self.handles.len()]
    }
}

/// Runs `task` on an I/O thread and waits for it. For work that is not a request, such as a socket
/// of another kind.
///
/// # Errors
/// Returns [`TransportError::Broken`] when there is no I/O thread, or the task panicked.
pub(super) fn on_io_thread<T: Send + 'static>(
    task: impl Future<Output = T> + Send + 'static,
) -> Result<T, TransportError> {
    block_on(io_threads()?.pick().spawn(task)).map_err(|_| gave_up())
}

type Connector = HttpsConnector<Route>;

/// Pools of connections with one setting of trust, proxies and timeouts: one pool for each [`Reach`].
#[derive(Clone)]
pub struct Transport {
    pools: [Client<Connector, RequestBody>; Reach::ALL.len()],
    route: Route,
    timeouts: Timeouts,
}

/// The head of an answer, with the body to come.
#[derive(Debug)]
pub struct HttpReply {
    /// HTTP status.
    pub status: StatusCode,
    /// Header fields.
    pub headers: HeaderMap,
    /// Body of the answer.
    pub body: ReplyBody,
}

/// A body in transfer. Dropping it closes the connection unless all of it was read.
#[derive(Debug)]
pub struct ReplyBody {
    frames: mpsc::Receiver<Result<Bytes, TransportError>>,
}

impl ReplyBody {
    /// The next bytes, or `None` at the end of the body. Blocks; not for asynchronous code.
    pub fn next_frame(&mut self) -> Option<Result<Bytes, TransportError>> {
        self.frames.blocking_recv()
    }

    /// Form of [`ReplyBody::next_frame`] that does not block.
    pub fn poll_frame(
        &mut self,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Bytes, TransportError>>> {
        self.frames.poll_recv(context)
    }

    /// The whole body, when it has at most `limit` bytes.
    ///
    /// # Errors
    /// Returns [`TransportError::TooLarge`] past `limit`; else the reason why the connection broke.
    pub fn collect(mut self, limit: usize) -> Result<Vec<u8>, TransportError> {
        let mut all = Vec::new();
        while let Some(frame) = self.next_frame() {
            let frame = frame?;
            if frame.len() > limit - all.len() {
                return Err(TransportError::TooLarge(limit));
            }
            all.extend_from_slice(&frame);
        }
        Ok(all)
    }

    /// Reads the rest when it is short, so that the connection can be used again.
    pub fn discard(self) {
        block_on(self.discard_async());
    }

    /// Form of [`ReplyBody::discard`] that does not block.
    pub async fn discard_async(mut self) {
        let mut left = 64 << 10;
        while let Some(Ok(frame)) = self.frames.recv().await {
            if frame.len() > left {
                return;
            }
            left -= frame.len();
        }
    }
}

impl Transport {
    /// Creates the pools with these rules.
    #[must_use]
    pub fn new(tls: ClientConfig, proxies: &Proxies, timeouts: Timeouts) -> Self {
        let pools = Reach::ALL.map(|reach| {
            let connector = HttpsConnectorBuilder::new()
                .with_tls_config(tls.clone())
                .https_or_http()
                .enable_http1()
                .wrap_connector(Route::new(proxies, timeouts.connect, reach));
            Client::builder(TokioExecutor::new())
                .timer(TokioTimer::new())
                .pool_timer(TokioTimer::new())
                .pool_idle_timeout(Duration::from_secs(60))
                .pool_max_idle_per_host(IDLE_CONNECTIONS)
                .build(connector)
        });
        let route = Route::new(proxies, timeouts.connect, Reach::Named);
        Self { pools, route, timeouts }
    }

    /// Sends a request whose body is in memory, as far as `reach`, and waits for the head of the answer. Head and body
    /// must arrive before `deadline`, if there is one.
    ///
    /// # Errors
    /// Returns [`TransportError`]. Any HTTP status is an answer, not an error.
    pub fn send(
        &self,
        request: Request<Bytes>,
        reach: Reach,
        deadline: Option<Instant>,
    ) -> Result<HttpReply, TransportError> {
        block_on(self.send_async(request, reach, deadline))
    }

    /// Form of [`Transport::send`] that does not block. Dropping this future ends the exchange.
    ///
    /// # Errors
    /// Returns the errors of [`Transport::send`].
    pub async fn send_async(
        &self,
        request: Request<Bytes>,
        reach: Reach,
        deadline: Option<Instant>,
    ) -> Result<HttpReply, TransportError> {
        let mut answer = self.start(request.map(RequestBody::Memory), reach, None, deadline)?;
        answer.0.recv().await.unwrap_or_else(|| Err(gave_up()))
    }

    /// Sends `length` bytes of `reader` as the body of a request, as far as `reach`, and waits for the head of the answer.
    ///
    /// # Errors
    /// Returns [`TransportError::Reader`] when `reader` fails or ends early, else the errors of
    /// [`Transport::send`].
    pub fn upload(
        &self,
        request: Request<()>,
        reach: Reach,
        reader: &mut dyn Read,
        length: u64,
    ) -> Result<HttpReply, TransportError> {
        let (pieces, receiver) = mpsc::channel(2);
        let gauge = Arc::new(Gauge::default());
        let stream = RequestBody::Stream { pieces: receiver, left: length, gauge: gauge.clone() };
        let mut answer = self.start(request.map(|()| stream), reach, Some(gauge), None)?;
        let handle = io_threads()?.pick();
        let mut left = length;
        while left > 0 {
            let mut piece = vec![0; UPLOAD_PIECE.min(usize::try_from(left).unwrap_or(usize::MAX))];
            if let Err(error) = reader.read_exact(&mut piece) {
                let error = Arc::new(error);
                // The body fails too, so that the server never takes a part for the whole.
                let _ = pieces.blocking_send(Err(io::Error::other("the reader failed")));
                return Err(TransportError::Reader(error));
            }
            left -= piece.len() as u64;
            // A server that answers early need not read on, so sending alone might block without
            // end.
            let early = handle.block_on(async {
                tokio::select! {
                    sent = pieces.send(Ok(piece.into())) => if sent.is_ok() { None } else { Some(answer.0.recv().await) },
                    early = answer.0.recv() => Some(early),
                }
            });
            if let Some(early) = early {
                return early.unwrap_or_else(|| Err(gave_up()));
            }
        }
        drop(pieces);
        answer.wait()
    }

    fn start(
        &self,
        mut request: Request<RequestBody>,
        reach: Reach,
        gauge: Option<Arc<Gauge>>,
        deadline: Option<Instant>,
    ) -> Result<PendingReply, TransportError> {
        // A numeric host never comes to the resolver, nor does any that a proxy connects to.
        if let Some(host) = request.uri().host() {
            reach.check_literal(host).map_err(TransportError::OutOfReach)?;
        }
        if let Some(value) = self.route.proxy_authorization(request.uri()) {
            request.headers_mut().insert(PROXY_AUTHORIZATION, value);
        }
        let (head_sender, head) = mpsc::channel(1);
        let exchange = Exchange {
            pool: self.pools[reach.number()].clone(),
            timeouts: self.timeouts,
            deadline: deadline.map(IoInstant::from_std),
        };
        io_threads()?.pick().spawn(exchange.run(request, gauge, head_sender));
        Ok(PendingReply(head))
    }
}

/// The error of a task that ended without a result: it panicked, or its runtime is gone.
fn gave_up() -> TransportError {
    TransportError::Broken("the I/O thread ended without an answer".to_owned())
}

/// The answer to come.
struct PendingReply(mpsc::Receiver<Result<HttpReply, TransportError>>);

impl PendingReply {
    fn wait(&mut self) -> Result<HttpReply, TransportError> {
        self.0.blocking_recv().unwrap_or_else(|| Err(gave_up()))
    }
}

/// One request, on an I/O thread.
struct Exchange {
    pool: Client<Connector, RequestBody>,
    timeouts: Timeouts,
    deadline: Option<IoInstant>,
}

impl Exchange {
    async fn run(
        self,
        request: Request<RequestBody>,
        gauge: Option<Arc<Gauge>>,
        head: mpsc::Sender<Result<HttpReply, TransportError>>,
    ) {
        let answer = async {
            match gauge {
                None => self.answer(request).await,
                Some(gauge) => self.answer_upload(request, &gauge).await,
            }
        };
        let answer = tokio::select! {
            answer = answer => answer,
            // The reader has gone: another request was quicker.
            () = head.closed() => return,
        };
        let (sender, frames) = mpsc::channel(FRAMES_AHEAD);
        match answer {
            Err(error) => {
                let _ = head.send(Err(error)).await;
            }
            Ok(response) => {
                let (parts, incoming) = response.into_parts();
                let reply = HttpReply {
                    status: parts.status,
                    headers: parts.headers,
                    body: ReplyBody { frames },
                };
                if head.send(Ok(reply)).await.is_ok() {
                    self.pump(incoming, &sender).await;
                }
            }
        }
    }

    /// The earlier of "silent for `limit`" and the deadline.
    fn until(&self, limit: Duration) -> IoInstant {
        let silent = IoInstant::now() + limit;
        self.deadline.map_or(silent, |deadline| deadline.min(silent))
    }

    async fn answer(
        &self,
        request: Request<RequestBody>,
    ) -> Result<Response<Incoming>, TransportError> {
        let started = IoInstant::now();
        let limit = self.until(self.timeouts.connect + self.timeouts.head);
        match timeout_at(limit, self.pool.request(request)).await {
            Ok(answer) => answer.map_err(|error| explain(&error)),
            Err(_) => {
                Err(TransportError::Silent { waiting_for: "an answer", after: started.elapsed() })
            }
        }
    }

    /// Form of `answer` whose clock runs only while the server causes the wait.
    async fn answer_upload(
        &self,
        request: Request<RequestBody>,
        gauge: &Gauge,
    ) -> Result<Response<Incoming>, TransportError> {
        let mut answer = std::pin::pin!(self.pool.request(request));
        loop {
            let before = gauge.sent.get();
            let limit = if gauge.done.load(Ordering::Relaxed) {
                // A registry hashes a whole layer before it answers the last byte.
                self.timeouts.head + Duration::from_millis(before >> 17)
            } else {
                self.timeouts.connect + self.timeouts.idle
            };
            match timeout(limit, answer.as_mut()).await {
                Ok(answer) => return answer.map_err(|error| explain(&error)),
                Err(_) if gauge.sent.get() != before || gauge.starved.load(Ordering::Relaxed) => {}
                Err(_) => {
                    return Err(TransportError::Silent {
                        waiting_for: "the upload to continue",
                        after: limit,
                    });
                }
            }
        }
    }

    async fn pump(
        &self,
        mut incoming: Incoming,
        frames: &mpsc::Sender<Result<Bytes, TransportError>>,
    ) {
        loop {
            let asked = IoInstant::now();
            let limit = self.until(self.timeouts.idle);
            let next = tokio::select! {
                frame = incoming.frame() => frame,
                () = sleep_until(limit) => {
                    let after = asked.elapsed();
                    let _ = frames.send(Err(TransportError::Silent { waiting_for: "the rest of the body", after })).await;
                    return;
                }
                () = frames.closed() => return,
            };
            let item = match next {
                None => return,
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(data) => Ok(data),
                    Err(_trailers) => continue,
                },
                Some(Err(error)) => Err(TransportError::Broken(with_causes(&error))),
            };
            let broken = item.is_err();
            if frames.send(item).await.is_err() || broken {
                return;
            }
        }
    }
}

fn explain(error: &ClientError) -> TransportError {
    let mut cause: Option<&(dyn StdError + 'static)> = Some(error);
    while let Some(here) = cause {
        if let Some(out) = here.downcast_ref::<OutOfReach>() {
            return TransportError::OutOfReach(out.clone());
        }
        // `source()` of the level above skips the error that an `io::Error` wraps.
        let wrapped = here.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
        let tls = wrapped
            .and_then(|inner| find_certificate_error(inner))
            .or_else(|| here.downcast_ref::<rustls::Error>().filter(|tls| is_distrust(tls)));
        if let Some(tls) = tls {
            return TransportError::Untrusted(tls.to_string());
        }
        cause = here.source();
    }
    TransportError::Broken(with_causes(error))
}

fn find_certificate_error<'a>(
    error: &'a (dyn StdError + Send + Sync + 'static),
) -> Option<&'a rustls::Error> {
    if let Some(tls) = error.downcast_ref::<rustls::Error>() {
        return Some(tls).filter(|tls| is_distrust(tls));
    }
    error.downcast_ref::<io::Error>().and_then(io::Error::get_ref).and_then(find_certificate_error)
}

fn is_distrust(error: &rustls::Error) -> bool {
    matches!(error, rustls::Error::InvalidCertificate(_) | rustls::Error::NoCertificatesPresented)
}
