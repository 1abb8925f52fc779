//! The page of metrics over HTTP.
//!
//! It is served on this host alone unless the configuration names another address, because the page names the
//! images that run here.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;

use hyper::header::{ALLOW, HeaderValue};
use hyper::{Method, StatusCode};

use crate::endpoint::{Endpoint, Listen, PageReply, PageRequest, reply};
use threads::Counter;

/// Address and path of the page.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExporterOptions {
    /// Address to listen on.
    pub address: SocketAddr,
    /// Path of the page, with a leading slash.
    pub path: String,
}

/// Upstream's defaults: port 9863, `/metrics`; on this host alone.
impl Default for ExporterOptions {
    fn default() -> Self {
        let address = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 9863);
        Self { address, path: "/metrics".to_owned() }
    }
}

/// Counters of the endpoint.
#[derive(Debug, Default)]
pub struct ExporterCounters {
    /// Requests, with any answer.
    pub requests: Counter,
}

/// Renders the page.
pub type Render = Arc<dyn Fn() -> String + Send + Sync>;

/// The endpoint. Dropping it ends it.
pub struct Exporter {
    endpoint: Endpoint,
    counters: Arc<ExporterCounters>,
}

impl Exporter {
    /// Listens, and from then on answers with the result of `render`.
    ///
    /// # Errors
    /// Returns an error when the address is in use, or no thread can be started.
    pub fn start(options: &ExporterOptions, render: Render) -> io::Result<Self> {
        let counters = Arc::new(ExporterCounters::default());
        let (path, count) = (options.path.clone(), counters.clone());
        let answer = move |request: &PageRequest| {
            count.requests.add(1);
            page(request, &path, &*render)
        };
        let endpoint = {
            let listen = Listen::Tcp(options.address);
            let before = sys::privilege::become_clerk;
            Endpoint::start("metrics", &listen, before, Arc::new(answer))?
        };
        Ok(Self { endpoint, counters })
    }

    /// Its address.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        match self.endpoint.listen() {
            Listen::Tcp(address) => *address,
            // It was started with an address.
            Listen::Unix(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        }
    }

    /// Its counters.
    #[must_use]
    pub fn counters(&self) -> &Arc<ExporterCounters> {
        &self.counters
    }
}

fn page(request: &PageRequest, path: &str, render: &dyn Fn() -> String) -> PageReply {
    const PLAIN: &str = "text/plain; charset=utf-8";
    if request.uri().path().trim_end_matches('/') != path.trim_end_matches('/') {
        let hint = format!("No such page; the metrics are at {path}\n");
        return reply(StatusCode::NOT_FOUND, hint, PLAIN);
    }
    if *request.method() != Method::GET && *request.method() != Method::HEAD {
        let refusal = "This page can only be read\n".to_owned();
        let mut refused = reply(StatusCode::METHOD_NOT_ALLOWED, refusal, PLAIN);
        refused.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
        return refused;
    }
    reply(StatusCode::OK, render(), "text/plain; version=0.0.4; charset=utf-8")
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
        assert_eq!(exporter.counters().requests.get(), 4);
        // The address is in use now, and free again afterwards, even with open connections.
        let taken = ExporterOptions { address, ..options };
        assert!(Exporter::start(&taken, render.clone()).is_err());
        let _idle = TcpStream::connect(address).unwrap();
        drop(exporter);
        assert!(TcpStream::connect(address).is_err());
    }
}
