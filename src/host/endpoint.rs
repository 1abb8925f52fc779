//! A small HTTP server for this host: one serves the metrics, another the snapshots.
//!
//! It has one thread of its own, which serves a few connections and no other work: a client that hangs, or
//! many of them, do not slow the devices.

use std::convert::Infallible;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::sync::{Semaphore, oneshot};

/// Limit on connections: a scraper or two, and a user who looks.
const CONNECTIONS: usize = 16;

/// Time limit for a client's request, and for an idle connection.
const PATIENCE: Duration = Duration::from_secs(60);

/// A request. Its body is not read.
pub type PageRequest = Request<Incoming>;

/// An answer.
pub type PageReply = Response<Full<Bytes>>;

/// Answers a request. The endpoint's only thread calls it: while it works, other clients wait.
pub type PageHandler = Arc<dyn Fn(&PageRequest) -> PageReply + Send + Sync>;

/// A text of the type `kind`.
#[must_use]
pub fn reply(status: StatusCode, text: String, kind: &'static str) -> PageReply {
    let mut response = Response::new(Full::new(Bytes::from(text)));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    response
}

/// The server. Dropping it ends it.
pub struct Endpoint {
    address: SocketAddr,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Endpoint {
    /// Listens at `address` on a thread named `name`.
    ///
    /// # Errors
    /// Returns an error when the address is in use, or no thread can be started.
    pub fn start(name: &'static str, address: SocketAddr, answer: PageHandler) -> io::Result<Self> {
        let listener = TcpListener::bind(address)?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        let (stop, stopped) = oneshot::channel();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let body = move || {
            let serve = async {
                tokio::select! {
                    () = accept(name, listener, answer) => {}
                    _ = stopped => {}
                }
            };
            runtime.block_on(serve);
        };
        let thread = std::thread::Builder::new().name(name.into()).spawn(body)?;
        Ok(Self { address, stop: Some(stop), thread: Some(thread) })
    }

    /// Its address.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for Endpoint {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

async fn accept(name: &'static str, listener: TcpListener, answer: PageHandler) {
    let listener = match tokio::net::TcpListener::from_std(listener) {
        Ok(listener) => listener,
        Err(error) => {
            tracing::error!(%error, "The endpoint of the {name} does not listen");
            return;
        }
    };
    let free = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let Ok(permit) = free.clone().acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, _)) => {
                let answer = answer.clone();
                tokio::spawn(async move {
                    let service = service_fn(move |request| {
                        let response = answer(&request);
                        async move { Ok::<_, Infallible>(response) }
                    });
                    let mut http = http1::Builder::new();
                    http.timer(TokioTimer::new()).header_read_timeout(PATIENCE);
                    // A client that breaks off needs no answer.
                    let _ = http.serve_connection(TokioIo::new(stream), service).await;
                    drop(permit);
                });
            }
            Err(error) => {
                // Usually for lack of descriptors: try again after a pause.
                tracing::warn!(%error, "The endpoint of the {name} lost a connection");
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        }
    }
}
