//! A small HTTP server for this host: one serves the metrics, another the snapshots.
//!
//! It has one thread of its own, which serves a few connections and no other work: a client that hangs, or
//! many of them, do not slow the devices.
//!
//! It listens at a TCP address, or on a Unix socket. A TCP port is open to every user of the host. The socket has the
//! mode 0600, and the kernel tells who is at its other end: only root and the user of this process are answered.

use std::convert::Infallible;
use std::fmt;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::FileTypeExt as _;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
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

/// Where an endpoint listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Listen {
    /// At an address, for everybody who reaches it.
    Tcp(SocketAddr),
    /// On a socket, for root and the user of this process.
    Unix(PathBuf),
}

impl fmt::Display for Listen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => write!(f, "http://{address}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

enum Listener {
    Tcp(tokio::net::TcpListener),
    Unix(tokio::net::UnixListener),
}

/// A connection of either kind.
trait EndpointStream: tokio::io::AsyncRead + tokio::io::AsyncWrite + Send + Unpin {}

impl<T: tokio::io::AsyncRead + tokio::io::AsyncWrite + Send + Unpin> EndpointStream for T {}

impl Listener {
    /// The next connection; `None` for one of a user that is not answered.
    async fn accept(&self) -> io::Result<Option<Box<dyn EndpointStream>>> {
        match self {
            Self::Tcp(listener) => Ok(Some(Box::new(listener.accept().await?.0))),
            Self::Unix(listener) => {
                let (stream, _) = listener.accept().await?;
                let uid = stream.peer_cred()?.uid();
                let is_known = uid == 0 || uid == rustix::process::geteuid().as_raw();
                if !is_known {
                    tracing::warn!(uid, "A connection of another user was refused");
                }
                Ok(is_known.then(|| Box::new(stream) as Box<dyn EndpointStream>))
            }
        }
    }
}

/// The server. Dropping it ends it.
pub struct Endpoint {
    listen: Listen,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Endpoint {
    /// Listens there on a thread named `name`, which calls `before` first.
    ///
    /// # Errors
    /// Returns an error when the address is in use, the path has another file, or no thread can be started.
    pub fn start(
        name: &'static str,
        listen: &Listen,
        before: fn(),
        answer: PageHandler,
    ) -> io::Result<Self> {
        let (stop, stopped) = oneshot::channel();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let (listen, listener) = {
            // The runtime's reactor takes the descriptor.
            let _inside = runtime.enter();
            bind(listen)?
        };
        let body = move || {
            before();
            let serve = async {
                tokio::select! {
                    () = accept(name, listener, answer) => {}
                    _ = stopped => {}
                }
            };
            runtime.block_on(serve);
        };
        let thread = std::thread::Builder::new().name(name.into()).spawn(body)?;
        Ok(Self { listen, stop: Some(stop), thread: Some(thread) })
    }

    /// Where it listens: its address with the port that it got.
    #[must_use]
    pub fn listen(&self) -> &Listen {
        &self.listen
    }
}

fn bind(listen: &Listen) -> io::Result<(Listen, Listener)> {
    match listen {
        Listen::Tcp(address) => {
            let listener = TcpListener::bind(address)?;
            listener.set_nonblocking(true)?;
            let bound = Listen::Tcp(listener.local_addr()?);
            Ok((bound, Listener::Tcp(tokio::net::TcpListener::from_std(listener)?)))
        }
        Listen::Unix(path) => {
            if let Some(folder) = path.parent() {
                sys::private::folder(folder)?;
            }
            // A socket that was left behind; any other file is the operator's.
            if std::fs::symlink_metadata(path).is_ok_and(|meta| meta.file_type().is_socket()) {
                std::fs::remove_file(path)?;
            }
            let mask = rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o177));
            let listener = UnixListener::bind(path);
            rustix::process::umask(mask);
            let listener = listener?;
            listener.set_nonblocking(true)?;
            Ok((listen.clone(), Listener::Unix(tokio::net::UnixListener::from_std(listener)?)))
        }
    }
}

impl Drop for Endpoint {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        if let Listen::Unix(path) = &self.listen {
            let _ = std::fs::remove_file(path);
        }
    }
}

async fn accept(name: &'static str, listener: Listener, answer: PageHandler) {
    let free = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let Ok(permit) = free.clone().acquire_owned().await else { return };
        match listener.accept().await {
            Ok(None) => {}
            Ok(Some(stream)) => {
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

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::os::unix::fs::PermissionsExt as _;
    use std::os::unix::net::UnixStream;
    use std::path::Path;

    use super::*;

    fn ask(path: &Path) -> io::Result<String> {
        let mut stream = UnixStream::connect(path)?;
        stream.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).map(|_| answer)
    }

    fn started(path: &Path) -> io::Result<Endpoint> {
        let answer: PageHandler =
            Arc::new(|_| reply(StatusCode::OK, "here".to_owned(), "text/plain"));
        Endpoint::start("tests", &Listen::Unix(path.to_owned()), || {}, answer)
    }

    #[test]
    fn a_socket_answers_root_and_its_own_user_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sock");
        let endpoint = started(&path).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(ask(&path).unwrap().ends_with("here"));
        if rustix::process::geteuid().is_root() {
            // Even if its mode let others connect.
            for (path, mode) in [(dir.path(), 0o711), (path.as_path(), 0o666)] {
                std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
            }
            let place = path.clone();
            let other = std::thread::spawn(move || {
                let nobody = rustix::process::Uid::from_raw(65534);
                rustix::thread::set_thread_res_uid(nobody, nobody, nobody).unwrap();
                ask(&place)
            });
            let told = other.join().unwrap();
            assert!(told.as_ref().map_or(true, String::is_empty), "{told:?}");
            assert!(ask(&path).unwrap().ends_with("here"), "the next one is answered");
        }
        drop(endpoint);
        assert!(!path.exists());
        // What is left of a killed process is replaced, and another file is not.
        drop(UnixListener::bind(&path).unwrap());
        drop(started(&path).unwrap());
        std::fs::write(&path, "a file").unwrap();
        assert!(started(&path).is_err());
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "a file");
    }
}
