//! TLS before a plain server: one request a connection, forwarded and answered.
//!
//! Certificates are created by the `openssl` command, so the client's own library does not make its test
//! data.

#![allow(unreachable_pub)]

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig, ServerConnection, StreamOwned};

/// A certificate authority, a server certificate for 127.0.0.1 and `registry.invalid`, and a client's.
pub struct Authority(tempfile::TempDir);

impl Authority {
    /// Creates all three, or prints the reason why it cannot.
    pub fn make() -> Option<Self> {
        if Command::new("openssl").arg("version").stdout(Stdio::null()).status().is_err() {
            let text = "TLS not checked: apt install openssl";
            assert!(
                std::env::var_os("TURBOBD_REQUIRE_ALL").is_none_or(|value| value != "1"),
                "{text}"
            );
            eprintln!("{text}");
            return None;
        }
        let folder = tempfile::tempdir().unwrap();
        let at = folder.path();
        let elliptic = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"];
        let make = |name: &str, more: &[&str]| {
            let (key, out) = (format!("{name}.key"), format!("{name}.pem"));
            let subject = format!("/CN={name}");
            let fixed =
                ["req", "-x509", "-days", "30", "-subj", &subject, "-keyout", &key, "-out", &out];
            openssl(at, &[&fixed[..], &elliptic, more].concat());
        };
        make("authority", &["-addext", "keyUsage=critical,keyCertSign"]);
        let signed = [
            "-CA",
            "authority.pem",
            "-CAkey",
            "authority.key",
            "-addext",
            "basicConstraints=critical,CA:FALSE",
        ];
        make(
            "server",
            &[&signed[..], &["-addext", "subjectAltName=IP:127.0.0.1,DNS:registry.invalid"]]
                .concat(),
        );
        make("client", &[&signed[..], &["-addext", "extendedKeyUsage=clientAuth"]].concat());
        Some(Self(folder))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub fn certificate(&self) -> PathBuf {
        self.path("authority.pem")
    }

    pub fn client(&self) -> (PathBuf, PathBuf) {
        (self.path("client.pem"), self.path("client.key"))
    }

    fn config(&self, ask_client: bool) -> ServerConfig {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = ServerConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()
            .unwrap();
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_file(self.certificate()).unwrap()).unwrap();
        let builder = if ask_client {
            let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider)
                .build()
                .unwrap();
            builder.with_client_cert_verifier(verifier)
        } else {
            builder.with_no_client_auth()
        };
        let chain = vec![CertificateDer::from_pem_file(self.path("server.pem")).unwrap()];
        builder
            .with_single_cert(chain, PrivateKeyDer::from_pem_file(self.path("server.key")).unwrap())
            .unwrap()
    }
}

fn openssl(at: &Path, arguments: &[&str]) {
    let done = Command::new("openssl").args(arguments).current_dir(at).output().unwrap();
    assert!(
        done.status.success(),
        "openssl {arguments:?}: {}",
        String::from_utf8_lossy(&done.stderr)
    );
}

pub struct TlsFront {
    address: SocketAddr,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl TlsFront {
    /// Serves `behind` (a plain `host:port`) over TLS.
    pub fn start(authority: &Authority, behind: &str, ask_client: bool) -> Self {
        let config = Arc::new(authority.config(ask_client));
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, behind) = (stop.clone(), behind.to_owned());
        let thread = thread::spawn(move || {
            for stream in listener.incoming() {
                if stopped.load(Ordering::Relaxed) {
                    return;
                }
                let (config, behind) = (config.clone(), behind.clone());
                thread::spawn(move || serve(stream.unwrap(), config, &behind));
            }
        });
        Self { address, stop, thread: Some(thread) }
    }

    pub fn host(&self) -> String {
        self.address.to_string()
    }
}

impl Drop for TlsFront {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let _ = TcpStream::connect(self.address); // wakes the listener
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Forwards one request without a body, and its answer. Any error ends the connection.
fn serve(stream: TcpStream, config: Arc<ServerConfig>, behind: &str) -> Option<()> {
    stream.set_read_timeout(Some(Duration::from_secs(5))).ok()?;
    let mut tls = StreamOwned::new(ServerConnection::new(config).ok()?, stream);
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        tls.read_exact(&mut byte).ok()?;
        head.push(byte[0]);
    }
    head.truncate(head.len() - 2);
    head.extend_from_slice(b"connection: close\r\n\r\n");
    let mut plain = TcpStream::connect(behind).ok()?;
    plain.write_all(&head).ok()?;
    let mut answer = Vec::new();
    plain.read_to_end(&mut answer).ok()?;
    tls.write_all(&answer).ok()?;
    tls.conn.send_close_notify();
    tls.flush().ok()
}
