//! The page of metrics over HTTP.
//!
//! One thread of its own, which serves a few connections and nothing else: a scraper that hangs, or
//! many of them, cost the devices nothing. It listens on this host alone unless the configuration names
//! another address, as the page tells which images run here.

use std::convert::Infallible;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::header::{ALLOW, CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::sync::{Semaphore, oneshot};

/// Connections at most: a scraper or two, and somebody who looks.
const CONNECTIONS: usize = 16;

/// How long a client may take to say what it wants, and an idle connection may stay.
const PATIENCE: Duration = Duration::from_secs(60);

/// Where the page is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExporterOptions {
    /// Address to listen on.
    pub address: SocketAddr,
    /// Path of the page, with a slash at its front.
    pub path: String,
}

/// Upstream's defaults: port 9863, `/metrics`; on this host alone.
impl Default for ExporterOptions {
    fn default() -> Self {
        let address = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 9863);
        Self { address, path: "/metrics".to_owned() }
    }
}

/// What the endpoint did.
#[derive(Debug, Default)]
pub struct ExporterCounters {
    /// Requests, whatever the answer.
    pub requests: AtomicU64,
}

/// Makes the page.
pub type Render = Arc<dyn Fn() -> String + Send + Sync>;

/// The endpoint. Dropping it ends it.
pub struct Exporter {
    address: SocketAddr,
    counters: Arc<ExporterCounters>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Exporter {
    /// Listens, and answers with what `render` makes from then on.
    ///
    /// # Errors
    /// When the address is taken, or there is no thread to be had.
    pub fn start(options: &ExporterOptions, render: Render) -> io::Result<Self> {
        let listener = TcpListener::bind(options.address)?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        let counters = Arc::new(ExporterCounters::default());
        let (stop, stopped) = oneshot::channel();
        let page = Arc::new(PageServer {
            path: options.path.clone(),
            render,
            counters: counters.clone(),
            free: Arc::new(Semaphore::new(CONNECTIONS)),
        });
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let body = move || {
            let serve = async {
                tokio::select! {
                    () = page.accept(listener) => {}
                    _ = stopped => {}
                }
            };
            runtime.block_on(serve);
        };
        let thread = std::thread::Builder::new().name("metrics".into()).spawn(body)?;
        Ok(Self { address, counters, stop: Some(stop), thread: Some(thread) })
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// What it did.
    #[must_use]
    pub fn counters(&self) -> &Arc<ExporterCounters> {
        &self.counters
    }
}

impl Drop for Exporter {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

struct PageServer {
    path: String,
    render: Render,
    counters: Arc<ExporterCounters>,
    free: Arc<Semaphore>,
}

impl PageServer {
    async fn accept(self: &Arc<Self>, listener: TcpListener) {
        let listener = match tokio::net::TcpListener::from_std(listener) {
            Ok(listener) => listener,
            Err(error) => {
                tracing::error!(%error, "The metrics endpoint does not listen");
                return;
            }
        };
        loop {
            let Ok(permit) = self.free.clone().acquire_owned().await else { return };
            match listener.accept().await {
                Ok((stream, _)) => {
                    let server = self.clone();
                    tokio::spawn(async move {
                        let service = service_fn(move |request| {
                            let response = server.answer(&request);
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
                    tracing::warn!(%error, "The metrics endpoint lost a connection");
                    tokio::time::sleep(Duration::from_secs(1)).await;
                }
            }
        }
    }

    fn answer(&self, request: &Request<Incoming>) -> Response<Full<Bytes>> {
        self.counters.requests.fetch_add(1, Ordering::Relaxed);
        let text = |status, text: String, kind: &'static str| {
            let mut response = Response::new(Full::new(Bytes::from(text)));
            *response.status_mut() = status;
            response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(kind));
            response
        };
        const PLAIN: &str = "text/plain; charset=utf-8";
        if request.uri().path().trim_end_matches('/') != self.path.trim_end_matches('/') {
            let hint = format!("Nothing is here; the metrics are at {}\n", self.path);
            return text(StatusCode::NOT_FOUND, hint, PLAIN);
        }
        if *request.method() != Method::GET && *request.method() != Method::HEAD {
            let mut response =
                text(StatusCode::METHOD_NOT_ALLOWED, "This can be read only\n".into(), PLAIN);
            response.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
            return response;
        }
        text(StatusCode::OK, (self.render)(), "text/plain; version=0.0.4; charset=utf-8")
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::net::TcpStream;

    use super::*;

    fn ask(address: SocketAddr, request: &str) -> String {
        let mut stream = TcpStream::connect(address).unwrap();
        write!(stream, "{request} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    }

    #[test]
    fn the_page_is_served_at_its_path_and_nothing_else_is() {
        let options = ExporterOptions {
            address: (Ipv4Addr::LOCALHOST, 0).into(),
            ..ExporterOptions::default()
        };
        let render: Render = Arc::new(|| "turbobd_x 1\n".to_owned());
        let exporter = Exporter::start(&options, render.clone()).unwrap();
        let address = exporter.address();
        let page = ask(address, "GET /metrics");
        assert!(page.starts_with("HTTP/1.1 200 OK\r\n"), "{page}");
        assert!(page.contains("content-type: text/plain; version=0.0.4"), "{page}");
        assert!(page.ends_with("\r\n\r\nturbobd_x 1\n"), "{page}");
        assert!(ask(address, "HEAD /metrics").ends_with("\r\n\r\n"));
        assert!(ask(address, "GET /").starts_with("HTTP/1.1 404 "));
        assert!(ask(address, "POST /metrics").starts_with("HTTP/1.1 405 "));
        assert_eq!(exporter.counters().requests.load(Ordering::Relaxed), 4);
        // The address is taken now, and free again afterwards, open connections or not.
        let taken = ExporterOptions { address, ..options };
        assert!(Exporter::start(&taken, render.clone()).is_err());
        let _idle = TcpStream::connect(address).unwrap();
        drop(exporter);
        assert!(TcpStream::connect(address).is_err());
    }
}
