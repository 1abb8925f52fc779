//! Connections to a host: direct, or through a proxy.
//!
//! Proxies are named by the usual environment variables (`HTTP_PROXY`, `HTTPS_PROXY`, `ALL_PROXY`,
//! `NO_PROXY`, in either case). For `https` the client opens a tunnel with `CONNECT`, so the proxy
//! sees only the host's name; a plain request goes to the proxy with its whole URL. Hosts of this
//! machine are always reached directly, as in Go's client, whose behaviour container tools share.

use std::error::Error as StdError;
use std::fmt;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use hyper::Uri;
use hyper::header::HeaderValue;
use hyper::rt::{Read, ReadBufCursor, Write};
use hyper_util::client::legacy::connect::proxy::Tunnel;
use hyper_util::client::legacy::connect::{Connected, Connection, HttpConnector};
use hyper_util::client::proxy::matcher::Matcher;
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tower_service::Service;

use super::reach::{Reach, Resolver};

/// Source of the proxies' names.
#[derive(Clone, Default)]
pub enum Proxies {
    /// The environment, at the time the client is created.
    #[default]
    Environment,
    /// No proxy: connect directly.
    Direct,
    /// Named here.
    Explicit {
        /// Proxy for plain requests, such as `http://proxy:3128`, or empty.
        http: String,
        /// Proxy for TLS, or empty.
        https: String,
        /// Hosts to reach directly, in the form of `NO_PROXY`.
        no: String,
    },
}

impl fmt::Debug for Proxies {
    /// Omits the addresses: they may hold a password.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Environment => "Proxies::Environment",
            Self::Direct => "Proxies::Direct",
            Self::Explicit { .. } => "Proxies::Explicit(hidden)",
        })
    }
}

impl Proxies {
    fn matcher(&self) -> Matcher {
        match self {
            Self::Environment => Matcher::from_env(),
            Self::Direct => Matcher::builder().build(),
            Self::Explicit { http, https, no } => {
                Matcher::builder().http(http.as_str()).https(https.as_str()).no(no.as_str()).build()
            }
        }
    }
}

/// True if `host` (without port) is this machine: `localhost`, 127.0.0.0/8 or `::1`.
#[must_use]
pub fn is_loopback(host: &str) -> bool {
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    bare.eq_ignore_ascii_case("localhost")
        || bare.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

/// Makes TCP connections within one [`Reach`], through a proxy where one applies.
#[derive(Clone)]
pub(super) struct Route {
    tcp: HttpConnector<Resolver>,
    /// To proxies, which the operator named.
    to_proxy: HttpConnector<Resolver>,
    proxies: Arc<Matcher>,
}

fn connector(reach: Reach, connect: Duration) -> HttpConnector<Resolver> {
    let mut tcp = HttpConnector::new_with_resolver(Resolver::new(reach));
    tcp.enforce_http(false);
    tcp.set_nodelay(true);
    tcp.set_connect_timeout(Some(connect));
    tcp.set_keepalive(Some(Duration::from_secs(30)));
    tcp
}

impl Route {
    pub(super) fn new(proxies: &Proxies, connect: Duration, reach: Reach) -> Self {
        Self {
            tcp: connector(reach, connect),
            to_proxy: connector(Reach::Named, connect),
            proxies: Arc::new(proxies.matcher()),
        }
    }

    /// `Proxy-Authorization` for a plain request through a proxy.
    pub(super) fn proxy_authorization(&self, uri: &Uri) -> Option<HeaderValue> {
        if uri.scheme_str() != Some("http") || uri.host().is_some_and(is_loopback) {
            return None;
        }
        let mut value = self.proxies.intercept(uri)?.basic_auth()?.clone();
        value.set_sensitive(true);
        Some(value)
    }
}

type BoxError = Box<dyn StdError + Send + Sync>;

impl Service<Uri> for Route {
    type Response = Link;
    type Error = BoxError;
    type Future = Pin<Box<dyn Future<Output = Result<Link, BoxError>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.tcp.poll_ready(cx).map_err(Into::into)
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let intercept =
            if uri.host().is_some_and(is_loopback) { None } else { self.proxies.intercept(&uri) };
        let (mut tcp, mut to_proxy) = (self.tcp.clone(), self.to_proxy.clone());
        Box::pin(async move {
            let Some(proxy) = intercept else {
                let stream = tcp.call(uri).await?;
                return Ok(Link { stream, proxied: false });
            };
            let via = proxy.uri().clone();
            if via.scheme_str() != Some("http") {
                return Err(
                    io::Error::other(format!("The proxy {via} is not an http:// proxy")).into()
                );
            }
            if uri.scheme_str() == Some("https") {
                let mut tunnel = Tunnel::new(via, to_proxy);
                if let Some(auth) = proxy.basic_auth() {
                    tunnel = tunnel.with_auth(auth.clone());
                }
                let stream = tunnel.call(uri).await?;
                return Ok(Link { stream, proxied: false });
            }
            let stream = to_proxy.call(via).await?;
            Ok(Link { stream, proxied: true })
        })
    }
}

/// A TCP connection, and if requests on it need their whole URL.
pub(super) struct Link {
    stream: TokioIo<TcpStream>,
    proxied: bool,
}

impl Connection for Link {
    fn connected(&self) -> Connected {
        self.stream.connected().proxy(self.proxied)
    }
}

impl Read for Link {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl Write for Link {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_proxys_password_is_in_no_text() {
        let http = "http://me:hunter2@proxy:3128".to_owned();
        let proxies = Proxies::Explicit { https: http.clone(), http, no: String::new() };
        assert!(!format!("{proxies:?} {:?}", proxies.matcher()).contains("hunter2"));
        let target = Uri::from_static("https://registry.invalid/");
        let proxy = proxies.matcher().intercept(&target).unwrap();
        assert!(!proxy.uri().to_string().contains("hunter2"), "messages name the proxy by this");
    }

    #[test]
    fn hosts_of_this_machine_are_known_by_name_and_number() {
        for host in ["localhost", "LOCALHOST", "127.0.0.1", "127.8.8.8", "[::1]", "::1"] {
            assert!(is_loopback(host), "{host}");
        }
        for host in ["localhost.example", "128.0.0.1", "127.0.0.1.example", "[::2]", ""] {
            assert!(!is_loopback(host), "{host}");
        }
    }
}
