//! A small HTTP server of this host: the metrics and the snapshots are asked for through one each.
//!
//! One thread of its own, which serves a few connections and nothing else: a client that hangs, or many of
//! them, cost the devices nothing.

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

/// Connections at most: a scraper or two, and somebody who looks.
const CONNECTIONS: usize = 16;

/// How long a client may take to say what it wants, and an idle connection may stay.
const PATIENCE: Duration = Duration::from_secs(60);

/// A request. Nobody reads its body.
pub type Asked = Request<Incoming>;

/// An answer.
pub type Reply = Response<Full<Bytes>>;

/// Answers a request. The endpoint's only thread calls it: while it works, other clients wait.
pub type Answer = Arc<dyn Fn(&Asked) -> Reply + Send + Sync>;

/// A text of the type `kind`.
#[must_use]
pub fn reply(status: StatusCode, text: String, kind: &'static str) -> Reply {
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
    /// Listens at `address` on a thread called `name`.
    ///
    /// # Errors
    /// When the address is taken, or there is no thread to be had.
    pub fn start(name: &'static str, address: SocketAddr, answer: Answer) -> io::Result<Self> {
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

    /// Where it listens.
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

async fn accept(name: &'static str, listener: TcpListener, answer: Answer) {
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
                    // A client that breaks off has no answer coming.
                    let _ = http.serve_connection(TokioIo::new(stream), service).await;
                    drop(permit);
                });
            }
            Err(error) => {
                // For want of descriptors, mostly: try again in a while.
                tracing::warn!(%error, "The endpoint of the {name} lost a connection");
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        }
    }
}
